"""Answers that had better not be used: the gateway has the model's threshold from its server and marks them."""

from collections.abc import Callable

import numpy as np
import pytest

from serving.protos import digits_pb2 as pb
from tests.serving.gateway.conftest import Here, random_images
from tests.serving.gateway.test_classes import number
from tests.serving.gateway.upstream_server import Behaviour

CONTRACT = {"digit", "confidence", "probabilities", "model_version", "request_id"}


def two_images() -> np.ndarray:
    """uint8 (2, 784): one that is read with 50 % (certainty 0.78, nine others share the rest), one with 100 %."""
    images = random_images(2)
    images[:, 1] = [0, 255]
    return images


def marks(here: Here) -> list[tuple[bool, bool, bool]]:
    """Of both images, whether the answer is marked: by REST, REST the ASGI way, gRPC."""
    found = []
    for image in two_images():
        lean, other = (here.classify(image.tobytes(), **more).json() for more in ({}, {"x-other": "not lean"}))
        answer = here.stub.Classify(pb.ClassifyRequest(image=image.tobytes()))
        for body in (lean, other):
            assert set(body) - {"unsure"} == CONTRACT
            assert body.get("unsure", True) is True
        found.append(("unsure" in lean, "unsure" in other, answer.unsure))
    return found


def test_what_the_model_is_less_certain_of_than_its_threshold_is_marked_and_counted(start: Callable[..., Here]) -> None:
    here = start()
    here.upstream.behaviour = Behaviour(version=4, abstain_below=0.85)
    assert marks(here) == [(True,) * 3, (False,) * 3]
    assert here.metric("digits_unsure_total", model_version="4") == 3


def test_certainty_decides_and_not_the_probability(start: Callable[..., Here]) -> None:
    """50 % beside nine others of 6 % each is above a threshold of 0.7."""
    here = start()
    here.upstream.behaviour = Behaviour(version=4, abstain_below=0.7)
    assert marks(here) == [(False,) * 3, (False,) * 3]


def test_a_setting_goes_before_the_models_threshold(start: Callable[..., Here]) -> None:
    here = start(unsure_below=0.0)
    here.upstream.behaviour = Behaviour(version=4, abstain_below=1.0)
    assert marks(here) == [(False,) * 3, (False,) * 3]


@pytest.mark.parametrize("threshold", [None, float("nan"), -1.0, 7.0, b"abc"])
def test_without_a_threshold_that_is_one_nothing_is_marked(
    start: Callable[..., Here], threshold: float | bytes | None
) -> None:
    here = start()
    here.upstream.behaviour = Behaviour(version=4, abstain_below=threshold)
    assert marks(here) == [(False,) * 3, (False,) * 3]


def test_each_digit_of_a_number_is_marked(start: Callable[..., Here]) -> None:
    """Only those that were read are counted, not what else was tried."""
    here = start()
    here.upstream.behaviour = Behaviour(version=4, abstain_below=0.999)
    answer = here.http.post("/read", content=number(), headers={"content-type": "image/png"}).json()
    assert [digit["unsure"] for digit in answer["digits"]] == [True] * len(answer["number"])
    assert here.metric("digits_unsure_total", model_version="4") == len(answer["number"]) > 0
