"""Pictures that people and attackers send."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def png(pixels: np.ndarray, **options: object) -> bytes:
    """uint8 (H, W) or (H, W, C) → PNG."""
    return encode(Image.fromarray(pixels), "PNG", **options)


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def stroke(side: int = 28) -> np.ndarray:
    """A vertical stroke of ink 255 on paper 0: uint8 (side, side)."""
    pixels = np.zeros((side, side), np.uint8)
    pixels[side // 5 : -side // 5, side * 3 // 7 : side * 4 // 7] = 255
    return pixels


def truncated_png() -> bytes:
    whole = png(np.random.default_rng(1).integers(0, 256, (300, 300), np.uint8))
    return whole[: len(whole) // 2]


def animated_gif() -> bytes:
    frames = [Image.fromarray(stroke(40)).rotate(turn) for turn in (0, 20, 40)]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


def bomb_png(side: int = 20_000) -> bytes:
    """A few kilobytes that ask for side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(side * 50))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
