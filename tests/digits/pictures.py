"""Encoded pictures for the tests of ``digits.image``."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from tests.stack import strokes


def encode(picture: Image.Image | np.ndarray, file_format: str = "PNG", **options: Any) -> bytes:
    """The picture as a file's bytes."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def drawing(digit: int = 2, style: str = "plain", size: float = 0.7, side: int = 280, **options: Any) -> Image.Image:
    """A steady hand's digit, grey, black on white unless told otherwise."""
    return strokes.render(strokes.place(strokes.STYLES[digit][style], size), side=side, **options)


def on_nothing(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Black on white -> ink of ``colour`` on a transparent ground (whose hidden colour is the ink's)."""
    result = Image.new("RGB", picture.size, colour)
    result.putalpha(Image.fromarray(255 - np.asarray(picture)))
    return result


def photograph(
    picture: Image.Image, gradient: float = 0.0, noise: float = 0.0, shadow: bool = False, contrast: float = 0.6
) -> Image.Image:
    """Black on white, as a camera sees it: light that falls off, a shadow's edge, blur and sensor noise."""
    reflectance = 1 - contrast * (1 - np.asarray(picture) / 255)
    height, width = reflectance.shape
    y, x = np.mgrid[:height, :width] / max(height, width)
    light = 170 * (1 + gradient * (0.8 * (x - 0.5) + 0.6 * (y - 0.5)))
    if shadow:
        light = np.where(x + 0.3 * y > 0.7, light, 0.62 * light)
    seen = Image.fromarray(np.clip(light * reflectance, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))
    grain = np.random.default_rng(7).normal(0, noise, (height, width)) if noise else 0
    return Image.fromarray(np.clip(np.asarray(seen) + grain, 0, 255).astype(np.uint8))


def framed(picture: Image.Image, inset: int = 4, width: int = 3) -> Image.Image:
    """The picture with a line drawn around it."""
    result = picture.copy()
    far = picture.width - 1 - inset
    ImageDraw.Draw(result).rectangle((inset, inset, far, far), outline=0, width=width)
    return result


def ruled(picture: Image.Image, squares: bool, level: int = 195) -> Image.Image:
    """The picture on ruled or squared paper, whose pale lines run through the digit."""
    values = np.array(picture)
    for at in range(10, max(values.shape), values.shape[0] // 12):
        values[at : at + 2] = np.minimum(values[at : at + 2], level)
        if squares:
            values[:, at : at + 2] = np.minimum(values[:, at : at + 2], level)
    return Image.fromarray(values)


def on_a_table(picture: Image.Image, turn: float, table: int = 60) -> Image.Image:
    """The picture as a sheet that lies, a little askew, on a dark table."""
    sheet = Image.fromarray((np.asarray(picture) * 0.75 + 20).astype(np.uint8)).convert("LA")
    sheet = sheet.rotate(turn, expand=True, resample=Image.Resampling.BICUBIC)
    result = Image.new("L", (picture.width * 3 // 2, picture.height * 3 // 2), table)
    result.paste(sheet.getchannel(0), (picture.width // 5, picture.height // 6), sheet.getchannel(1))
    return photograph(result, gradient=0.3, noise=4, contrast=1)


def specked(picture: Image.Image, count: int = 40) -> Image.Image:
    """The picture with dots of dirt all over it."""
    result = picture.copy()
    pen = ImageDraw.Draw(result)
    rng = np.random.default_rng(3)
    for _ in range(count):
        x, y = rng.uniform(0, picture.width, 2)
        radius = rng.uniform(0.5, 2)
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=0)
    return result


def png_chunk(name: bytes, body: bytes) -> bytes:
    """One chunk of a PNG file with its length and checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_with(extra: bytes) -> bytes:
    """A sound small PNG with more chunks after its header."""
    sound = encode(drawing(side=64, width=5))
    return sound[:33] + extra + sound[33:]


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that decodes to ``width`` x ``height`` zeros."""
    packer = zlib.compressobj(9)
    row = bytes(1 + width)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
