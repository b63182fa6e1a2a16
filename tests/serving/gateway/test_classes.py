"""A model of other classes than the ten digits: the gateway learns from the model server how many and their names."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from serving.protos import digits_pb2 as pb
from serving.protos import open_inference_pb2, open_inference_pb2_grpc
from tests.serving.gateway.conftest import Here, eventually, random_images
from tests.serving.gateway.upstream_server import Behaviour, expected_probabilities

GARMENTS = ("Ankle boot", "Bag", "Sandal")
TEN = ("Top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Boot")


@pytest.fixture
def garments(start: Callable[..., Here]) -> Here:
    """A gateway whose model server has gone from the digits to three garments."""
    here = start()
    here.upstream.behaviour = Behaviour(version=4, classes=GARMENTS)
    return here


def number() -> bytes:
    picture = np.full((60, 120), 255, np.uint8)
    picture[10:50, 20:26] = picture[10:50, 80:86] = 0
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def test_each_answer_has_the_models_classes_and_their_names(garments: Here) -> None:
    """REST, its ASGI way too, and gRPC: from the first answer of the new version on."""
    for image in random_images(6):
        expected = expected_probabilities(image[None], 3)[0]
        name = GARMENTS[image[0] % 3]
        for more in ({}, {"x-other": "not lean"}):
            found = garments.classify(image.tobytes(), **more).json()
            assert (found["digit"], found["label"], found["model_version"]) == (image[0] % 3, name, "4")
            np.testing.assert_array_equal(np.float32(found["probabilities"]), expected)
        answer = garments.stub.Classify(pb.ClassifyRequest(image=image.tobytes()))
        assert (answer.digit, answer.label) == (image[0] % 3, name)
        np.testing.assert_array_equal(np.float32(answer.probabilities), expected)


def test_digits_have_no_names_besides(here: Here) -> None:
    """The answer is what it always was."""
    found = here.classify(random_images(1)[0].tobytes()).json()
    assert set(found) == {"digit", "confidence", "probabilities", "model_version", "request_id"}
    assert here.stub.Classify(pb.ClassifyRequest(image=random_images(1)[0].tobytes())).label == ""


def test_metadata_tells_how_many_classes_there_are(garments: Here) -> None:
    """By REST and gRPC of the open inference protocol."""
    eventually(lambda: garments.http.get("/v2/models/digits").json()["versions"] == ["4"])
    told = garments.http.get("/v2/models/digits").json()["outputs"][0]
    assert told == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]}
    stub = open_inference_pb2_grpc.GRPCInferenceServiceStub(garments.channel)
    told = stub.ModelMetadata(open_inference_pb2.ModelMetadataRequest(name="digits", version="4")).outputs[0]
    assert list(told.shape) == [-1, 3]


def test_both_other_protocols_answer_with_that_many_probabilities(garments: Here) -> None:
    image = random_images(1)[0]
    rows = image.reshape(28, 28).tolist()
    (found,) = garments.http.post("/v1/models/digits:predict", json={"instances": [rows]}).json()["predictions"]
    assert (found["digit"], len(found["probabilities"])) == (image[0] % 3, 3)
    inputs = [{"name": "images", "datatype": "UINT8", "shape": [1, 28, 28], "data": [rows]}]
    outputs = garments.http.post("/v2/models/digits/infer", json={"inputs": inputs}).json()["outputs"]
    assert [output["shape"] for output in outputs] == [[1, 3], [1]]


def test_each_class_is_counted(garments: Here) -> None:
    for image in random_images(4):
        garments.classify(image.tobytes())
    counts = [garments.metric("digits_predictions_total", digit=str(k), model_version="4") for k in range(3)]
    assert counts == np.bincount(random_images(4)[:, 0] % 3, minlength=3).tolist()
    assert 'digit="3",model_version="4"' not in garments.http.get("/metrics").text


@pytest.mark.parametrize("classes", [GARMENTS, TEN, tuple("0123")], ids=["three", "ten others", "four digits"])
def test_a_number_is_read_with_the_ten_digits_only(start: Callable[..., Here], classes: tuple[str, ...]) -> None:
    """Said in one line, with what to do instead; nothing is counted as read."""
    here = start()
    here.upstream.behaviour = Behaviour(version=4, classes=classes)
    answer = here.http.post("/read", content=number(), headers={"content-type": "image/png"})
    assert answer.status_code == 501
    error = answer.json()["error"]
    assert error["code"] == "unimplemented"
    assert f"tells {len(classes)} classes apart" in error["message"]
    assert error["message"].endswith("use /classify")


def test_a_server_that_tells_nothing_of_its_classes_is_answered_from_all_the_same(start: Callable[..., Here]) -> None:
    """One whose model was exported before it had names: the answer's own shape says how many there are."""
    here = start()
    here.upstream.behaviour = Behaviour(version=4, classes=GARMENTS, tells_classes=False)
    image = random_images(1)[0]
    found = here.classify(image.tobytes()).json()
    assert (found["digit"], len(found["probabilities"]), "label" in found) == (image[0] % 3, 3, False)
