"""Pixels as JSON lists and protobuf fields, checked for shape and range: canonical images before they go anywhere."""

from collections.abc import Sequence
from typing import Any, Final

import orjson

from digits import contract
from digits.errors import BadRequest, TooLarge

SHAPE: Final = (contract.IMAGE_HEIGHT, contract.IMAGE_WIDTH)

_LEAST_BYTES: Final = 2 * contract.IMAGE_WIDTH
"""Bytes that a row of pixels takes in JSON at least."""

_SPARE_BRACKETS: Final = 1000


def load_json(body: bytes) -> dict[str, Any]:
    """A JSON object of pixels.

    Deep nesting is refused by the parser; a body that is mostly brackets is refused before it is parsed, since every
    one of them would become an object of fifty bytes and more.

    Raises:
        BadRequest: Not JSON, or no object.
    """
    if body.count(b"[") + body.count(b"{") > _SPARE_BRACKETS + len(body) * 2 // _LEAST_BYTES:
        raise BadRequest("JSON Parse error: expected lists of 28 x 28 pixels, came mostly brackets")
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as err:
        raise BadRequest(f"JSON Parse error: {err}") from err
    if not isinstance(document, dict):
        raise BadRequest(f"expected a JSON object, came {_kind(document)}")
    return document


def pixels_in(images: list[Any], name: str, max_images: int) -> bytes:
    """A list of N lists of 28 lists of 28 whole numbers from 0 to 255 → ``N * 784`` bytes.

    Raises:
        BadRequest: Another shape, or a value that is no pixel.
        TooLarge: More than ``max_images``.
    """
    check_count(len(images), max_images)
    rows: list[bytes] = []
    for at, image in enumerate(images):
        if not _is_list(image, contract.IMAGE_HEIGHT):
            raise BadRequest(f"{name}[{at}]: expected 28 rows of 28 pixels, came {_kind(image)}")
        for row in image:
            if not _is_list(row, contract.IMAGE_WIDTH):
                raise BadRequest(f"{name}[{at}]: expected rows of 28 pixels, came {_kind(row)}")
            rows.append(bytes_of(row, f"{name}[{at}]"))
    return b"".join(rows)


def bytes_of(values: Sequence[Any], where: str) -> bytes:
    """Whole numbers from 0 to 255 → bytes.

    Raises:
        BadRequest: A value is not one.
    """
    try:
        data = bytes(values)
    except (TypeError, ValueError) as err:
        raise BadRequest(f"{where}: expected whole numbers from 0 to 255 (uint8)") from err
    # Python takes True for 1, and a bool is quicker to rule out where there can be one.
    if (b"\0" in data or b"\1" in data) and any(isinstance(value, bool) for value in values):
        raise BadRequest(f"{where}: expected whole numbers from 0 to 255 (uint8), came true or false")
    return data


def check_count(count: int, max_images: int) -> None:
    """Raises BadRequest or TooLarge unless there are 1 to ``max_images`` images."""
    if count < 1:
        raise BadRequest("expected one image or more, came none")
    if count > max_images:
        raise TooLarge(f"expected at most {max_images:,} images in one request, came {count:,}: send several requests")


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    return {dict: "an object", str: "a string", bool: "true or false", type(None): "null"}.get(type(value), "a number")
