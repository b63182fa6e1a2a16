"""A whole number over REST: where its digits are, what is refused, what is counted."""

import io

import httpx
import numpy as np
import pytest
from PIL import Image

from serving.gateway.schema import ErrorAnswer, ReadAnswer
from tests.serving.gateway.conftest import Here
from tests.serving.gateway.pictures import animated_gif, bomb_png, encode, png, stroke, truncated_png

HEIGHT = 80
BOXES = [(20, 30, 12, HEIGHT), (70, 30, 40, HEIGHT), (150, 34, 14, HEIGHT - 4)]


def three_strokes(paper: int = 255, ink: int = 0) -> np.ndarray:
    """A bar, a ring and a bar: uint8 (140, 200)."""
    pixels = np.full((140, 200), paper, np.uint8)
    for x, y, w, h in BOXES:
        pixels[y : y + h, x : x + w] = ink
    x, y, w, h = BOXES[1]
    pixels[y + 12 : y + h - 12, x + 12 : x + w - 12] = paper
    return pixels


def read(here: Here, body: bytes, kind: str = "image/png") -> httpx.Response:
    return here.http.post("/read", content=body, headers={"content-type": kind})


def check(answer: httpx.Response, boxes: list[tuple[int, int, int, int]], slack: int = 4) -> None:
    assert answer.status_code == 200, answer.text
    found = ReadAnswer.model_validate_json(answer.content, strict=True)
    assert len(found.number) == len(found.digits) == len(boxes)
    assert found.number == "".join(str(one.digit) for one in found.digits)
    assert found.model_version == "3"
    assert found.request_id == answer.headers["x-request-id"]
    for one, box in zip(found.digits, boxes, strict=True):
        np.testing.assert_allclose(one.box, box, atol=slack)
        assert one.confidence == max(one.probabilities)


def test_digits_are_told_left_to_right_with_their_boxes(here: Here) -> None:
    """In the picture's own pixels, for either polarity, in one call upstream."""
    for paper, ink in ((255, 0), (0, 255), (190, 60)):
        check(read(here, png(three_strokes(paper, ink))), BOXES)
    assert len(here.behaviour.batches) == 3


def test_boxes_are_in_the_pixels_that_were_sent_however_large_or_turned(here: Here) -> None:
    """A large picture is averaged down to be read; a phone's is turned first."""
    large = np.kron(three_strokes(), np.ones((12, 12), np.uint8))
    boxes = [tuple(12 * one for one in box) for box in BOXES]
    check(read(here, png(large)), boxes, slack=40)
    check(read(here, encode(Image.fromarray(large), "JPEG"), "image/jpeg"), boxes, slack=40)
    turned = Image.fromarray(three_strokes()).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    out = io.BytesIO()
    turned.save(out, "JPEG", exif=exif, quality=95)
    check(read(here, out.getvalue(), "image/jpeg"), BOXES)


def test_one_digit_is_a_number_too(here: Here) -> None:
    """A stroke on a canvas, and a canonical image."""
    check(read(here, png(255 - stroke(100))), [(42, 20, 15, 60)])
    check(read(here, png(stroke())), [(12, 5, 4, 18)], slack=1)


def test_specks_and_commas_are_no_digits(here: Here) -> None:
    """Nor is a frame around the number."""
    pixels = three_strokes()
    pixels[18:21, 120:123] = 0
    pixels[100:108, 130:136] = 0
    pixels[8:11, 5:-5] = pixels[-11:-8, 5:-5] = 0
    pixels[8:-8, 5:8] = pixels[8:-8, -8:-5] = 0
    check(read(here, png(pixels)), BOXES)


def test_a_multipart_field_is_read(here: Here) -> None:
    """As for one digit."""
    check(here.http.post("/read", files={"image": ("n.png", png(three_strokes()), "image/png")}), BOXES)


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        pytest.param(b"", "image/png", 400, "bad_image", id="empty"),
        pytest.param(b"hello", "text/plain", 415, "unsupported_media_type", id="text"),
        pytest.param(truncated_png(), "image/png", 400, "bad_image", id="truncated"),
        pytest.param(animated_gif(), "image/gif", 400, "bad_image", id="animated"),
        pytest.param(bomb_png(), "image/png", 413, "too_large", id="bomb"),
        pytest.param(png(np.full((90, 90), 255, np.uint8)), "image/png", 400, "bad_image", id="blank"),
        pytest.param(bytes(784), "application/octet-stream", 400, "bad_image", id="raw bytes"),
        pytest.param(
            png(np.random.default_rng(0).integers(0, 2, (90, 90), np.uint8) * 255), "image/png", 400, None, id="noise"
        ),
        pytest.param(
            png(np.tile(np.repeat(np.uint8([255, 0]), [6, 3]), (300, 100))), "image/png", 400, None, id="bars"
        ),
    ],
)
def test_what_is_no_picture_of_a_number_is_refused(
    here: Here, body: bytes, kind: str, status: int, code: str | None
) -> None:
    """With the status that /classify gives it; what is drawn but absurd is refused or answered, never a defect."""
    answer = read(here, body, kind)
    if code is None:
        assert answer.status_code in (200, status)
        return
    assert answer.status_code == status, answer.text
    assert ErrorAnswer.model_validate_json(answer.content).error.code == code
    assert here.behaviour.batches == []


def test_only_the_digits_that_were_chosen_are_counted(here: Here) -> None:
    """Candidates that were tried and dropped would spoil the distribution that drift is judged by."""
    labels = {"digit": "0", "model_version": "3"}
    before = here.metric("digits_predictions_total", **labels)
    read(here, png(three_strokes()))
    assert sum(here.behaviour.batches) > 3
    assert here.metric("digits_predictions_total", **labels) == before + 3
