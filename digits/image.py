"""Pictures of digits, as people send them, made into what the network was trained on.

The canonical image is LeCun's recipe for MNIST (http://yann.lecun.com/exdb/mnist/): the digit is scaled to fit a 20x20
box with its aspect kept, the grey levels come from anti-aliasing, and its centre of mass lies at the centre of 28x28.
Ink is 255 on paper 0.

The path is ``decode`` (bytes -> grey) -> ``ink_map`` (grey -> how much ink each pixel holds, paper and light removed)
-> ``main_digit`` (the connected pieces of ink that are the digit) -> ``normalise`` (one digit -> canonical). A picture
that is 28x28 already is taken to be canonical in geometry: only its polarity is settled, so that images of the data set
come through byte for byte.
"""

import contextlib
import io
import math
import zlib
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter, ImageOps

from digits.contract import IMAGE_BYTES, IMAGE_HEIGHT, IMAGE_WIDTH
from digits.errors import BadImage, DigitsError, TooLarge

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

MAX_PIXELS: Final = 25_000_000
"""Width times height that is decoded at most: a phone's 24-megapixel photograph passes."""

MAX_DECODED_BYTES: Final = 36_000_000
"""Memory that a picture may unpack to: 9 million pixels in colour (a 4K screenshot passes). Ordinary JPEGs do not come
near it, since their decoder scales them down itself."""

BOX: Final = 20.0
"""Side in pixels of the square that a digit is scaled to fit."""

CENTRE: Final = 14.5
"""Where the centre of mass goes, from the image's edge in pixels: the middle of pixel 14, measured on MNIST."""

MIN_STROKE, MAX_STROKE = 2.2, 3.6
"""Stroke widths in canonical pixels that are left as they are (MNIST's 10th to 90th percentile, about)."""

_WORK_SIDE: Final = 1000  # pixels of the longer side that ink is looked for in: larger pictures are averaged down
_FINE_SIDE: Final = 160  # pixels of a digit's longer side at which its strokes are measured and mended
_MIN_CONTRAST: Final = 8.0  # grey levels of 255: less is JPEG and sensor noise
_MIN_DIGIT: Final = 5  # pixels of the working picture

_SIGNATURES: Final = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
)
_PNG_28_GREY: Final = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x1c\0\0\0\x1c\x08\0\0\0\0\x57\x66\x80\x48"
_PNG_END: Final = b"\0\0\0\0IEND\xae\x42\x60\x82"
_FAINT: Final = bytes(range(int(_MIN_CONTRAST)))
_READ: Final = "PNG, JPEG, WebP, BMP, GIF or TIFF"


def read_digit(data: bytes, *, max_pixels: int = MAX_PIXELS) -> U8:
    """The digit in an encoded picture, as the network expects it.

    Args:
        data: a PNG, JPEG, WebP, BMP, TIFF or single-frame GIF; ink darker or lighter than the paper.
        max_pixels: width times height allowed; judged from the header, before anything is decoded.

    Returns:
        uint8 (28, 28), ink 255 on paper 0.

    Raises:
        BadImage: not a picture, damaged, animated, or without anything drawn on it.
        TooLarge: more than ``max_pixels``.
    """
    grey = decode(data, max_pixels=max_pixels)
    if grey.shape == (IMAGE_HEIGHT, IMAGE_WIDTH):
        return _settle_polarity(grey)
    ink = ink_map(grey)
    sheet = _sheet_in(ink, grey)
    if sheet is not None:
        with contextlib.suppress(BadImage):  # nothing on it: then it was no sheet, but the digit itself
            return normalise(main_digit(ink_map(sheet)))
    return normalise(main_digit(ink))


def from_raw(data: bytes) -> U8:
    """A canonical image sent as its bare 784 bytes, row by row, ink 255 on paper 0 -> uint8 (28, 28).

    Raises:
        BadImage: any other length.
    """
    if len(data) != IMAGE_BYTES:
        raise BadImage(
            f"a raw image is {IMAGE_BYTES} bytes ({IMAGE_HEIGHT}x{IMAGE_WIDTH}, a byte each), but {len(data):,} came: "
            f"send a {_READ} picture for any other size"
        )
    return np.frombuffer(data, np.uint8).reshape(IMAGE_HEIGHT, IMAGE_WIDTH)


def read_small_png(data: bytes) -> bytes | None:
    """Like ``read_digit`` for the plainest of PNGs, 28x28 in 8 grey levels on pure black, in a third of the time.

    Returns:
        The canonical 784 bytes, or None for anything unusual: let ``read_digit`` look at it.
    """
    length = int.from_bytes(data[33:37])
    end = 41 + length
    if (
        not data.startswith(_PNG_28_GREY)
        or len(data) != end + 4 + len(_PNG_END)
        or data[37:41] != b"IDAT"
        or not data.endswith(_PNG_END)
        or zlib.crc32(data[37:end]) != int.from_bytes(data[end : end + 4])
    ):
        return None
    try:
        pixels = Image.frombytes("L", (IMAGE_WIDTH, IMAGE_HEIGHT), data[41:end], "zip", "L", 0).tobytes()
    except Exception:  # noqa: BLE001 - Pillow's decoders raise whatever a damaged file leads them to
        return None
    # Most of the edge is pure paper, as _settle_polarity wants it, and some pixel stands out: it changes nothing then.
    edge = pixels[:IMAGE_WIDTH] + pixels[-IMAGE_WIDTH:] + pixels[IMAGE_WIDTH:-IMAGE_WIDTH:IMAGE_WIDTH]
    edge += pixels[2 * IMAGE_WIDTH - 1 : -IMAGE_WIDTH : IMAGE_WIDTH]
    if edge.count(0) <= len(edge) // 2 or not pixels.translate(None, _FAINT):
        return None
    return pixels


# --- bytes -> grey ----------------------------------------------------------------------------------------------------


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> U8:
    """Encoded picture -> grey uint8 (H, W), upright, over the paper if it was transparent.

    Pictures whose longer side is over 1,000 pixels are averaged down by a whole factor. Colours of one brightness but
    different hue stay apart.

    Raises:
        BadImage, TooLarge: as ``read_digit``.
    """
    file_format = _sniff(data)
    try:
        with Image.open(io.BytesIO(data), formats=(file_format,)) as picture:
            _check_header(picture, max_pixels)
            return _to_grey(picture)
    except DigitsError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(f"a picture may have {max_pixels:,} pixels; this one has far more: scale it down") from error
    except MemoryError as error:
        raise TooLarge("there is not enough memory to decode this picture: scale it down") from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise BadImage(
            f"this {file_format} file is damaged or cut off ({len(data):,} bytes came): send the whole file"
        ) from error


def _sniff(data: bytes) -> str:
    """Pillow's name for the file format, by its first bytes: no other decoder ever sees the data."""
    if not data:
        raise BadImage(f"a picture was expected, but no bytes came: send a {_READ} file as the body")
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    raise BadImage(
        f"a {_READ} picture was expected, but the {len(data):,} bytes that came are none of these "
        f"(they start with {data[:8].hex(' ')}): send the file's own bytes"
    )


def _check_header(picture: Image.Image, max_pixels: int) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise TooLarge(
            f"a picture may have {max_pixels:,} pixels; this one has {width:,} x {height:,} = {width * height:,}: "
            "scale it down"
        )
    unpacked_bytes = width * height * _bytes_per_pixel(picture)
    if unpacked_bytes > MAX_DECODED_BYTES:
        raise TooLarge(
            f"a picture may unpack to {MAX_DECODED_BYTES / 1e6:.0f} MB; this {picture.format} of {width:,} x "
            f"{height:,} pixels would take {unpacked_bytes / 1e6:.0f} MB: scale it down, or send a baseline JPEG"
        )
    # A phone's JPEG may carry further pictures (MPO: depth, preview); the first is the photograph.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise BadImage(
            f"one still picture was expected, but this {picture.format} has several frames: send one of them alone"
        )


def _bytes_per_pixel(picture: Image.Image) -> int:
    """What Pillow's decoder holds at its peak; 0 where it scales down while it decodes."""
    if picture.format in ("JPEG", "MPO") and not picture.info.get("progressive"):
        return 0
    if picture.format == "WEBP":
        return 8  # the whole picture twice
    return {"1": 1, "L": 1, "P": 1}.get(picture.mode, 2 if picture.mode.startswith("I;16") else 4)


def _to_grey(picture: Image.Image) -> U8:
    mode = picture.mode
    if mode == "L" and "transparency" not in picture.info and picture.width <= _WORK_SIDE >= picture.height:
        return np.asarray(_upright(picture))  # the common case, kept quick
    if picture.format in ("JPEG", "MPO"):
        picture.draft(None, (_WORK_SIDE, _WORK_SIDE))  # lets the decoder itself scale a photograph down
    picture = _upright(picture)
    if mode.startswith("I") or mode == "F":
        return _from_deep(picture)
    if picture.has_transparency_data:
        # Averaged with premultiplied colours: what is transparent has no say in its neighbours' colour.
        picture = _flatten(_reduce(picture, "RGBA", "RGBa").convert("RGBA"))
    if mode == "LAB":
        picture = picture.getchannel(0)
    modes = () if picture.mode in ("L", "RGB") else ("L" if mode == "1" else "RGB",)
    picture = _reduce(picture, *modes)
    return np.asarray(picture) if picture.mode == "L" else _grey_of_colour(np.asarray(picture))


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says. Damaged EXIF is no reason to refuse a sound picture."""
    picture.load()
    if picture.format == "PNG" and "exif" not in picture.info:
        return picture
    try:
        return ImageOps.exif_transpose(picture)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - the EXIF parser raises whatever a damaged block leads it to
        return picture


def _reduce(picture: Image.Image, *modes: str) -> Image.Image:
    """Averaged down by a whole factor to the working size, converted to each of ``modes`` in turn before that.

    Done in bands of rows, so that no second copy of a large picture is ever in memory.
    """
    factor = math.ceil(max(picture.size) / _WORK_SIDE)
    rows = picture.height if factor == 1 else factor * max(1, 256 // factor)
    bands = []
    for top in range(0, picture.height, rows):
        band = picture.crop((0, top, picture.width, min(top + rows, picture.height))) if factor > 1 else picture
        for mode in modes:
            band = band.convert(mode)
        bands.append(band.reduce(factor) if factor > 1 else band)
    if len(bands) == 1:
        return bands[0]
    whole = Image.new(bands[0].mode, (bands[0].width, sum(band.height for band in bands)))
    top = 0
    for band in bands:
        whole.paste(band, (0, top))
        top += band.height
    return whole


def _from_deep(picture: Image.Image) -> U8:
    """16 and 32 bits a pixel, or floats -> uint8 (H, W): scaled by the type's range, or by what is used of it."""
    values = np.asarray(_reduce(picture) if picture.mode in ("I", "F") else _reduce(picture, "I")).astype(np.float64)
    values[~np.isfinite(values)] = 0
    low, high = float(values.min()), float(values.max())
    if low >= 0 and 64 * 257 <= high <= 65535 and high - low >= 64 * 257:
        return np.round(values / 257).astype(np.uint8)
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        return np.zeros(values.shape, np.uint8)
    return np.round((values - low) * (255 / (high - low))).astype(np.uint8)


def _flatten(rgba: Image.Image) -> Image.Image:
    """Transparent parts filled so that the ink shows: it may be the opaque part itself, in any colour."""
    pixels = np.asarray(rgba)
    alpha = pixels[..., 3].astype(np.float32)
    opacity = float(alpha.mean()) / 255
    if opacity >= 1:
        return rgba.convert("RGB")
    if opacity > 0.6:  # an opaque sheet with holes or round corners: they take the sheet's colour
        paper = np.median(pixels[..., :3][alpha > 127], axis=0).astype(int)
        backdrop = (int(paper[0]), int(paper[1]), int(paper[2]), 255)
    else:  # ink on nothing: white or black, whichever it stands out from
        luma = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32)
        weight = float(alpha.sum())
        dark = weight == 0 or float((luma * alpha).sum()) / weight < 128
        backdrop = (255, 255, 255, 255) if dark else (0, 0, 0, 255)
    return Image.alpha_composite(Image.new("RGBA", rgba.size, backdrop), rgba).convert("RGB")


def _grey_of_colour(rgb: U8) -> U8:
    """uint8 (H, W, 3) -> (H, W): brightness, or the axis of greatest spread where brightness hides the ink."""
    luma = np.asarray(Image.fromarray(rgb).convert("L"))
    step = max(1, math.isqrt(luma.size // 20_000))
    red, green, blue = (rgb[::step, ::step, channel].astype(np.float32) for channel in range(3))
    if max(float(np.abs(red - green).max()), float(np.abs(green - blue).max())) <= _MIN_CONTRAST:
        return luma  # no colour in it
    sample = np.stack((red.ravel(), green.ravel(), blue.ravel()), axis=1)
    centred = sample - sample.mean(axis=0)
    spread, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    if spread[2] <= 4 * float(luma[::step, ::step].astype(np.float32).var()):
        return luma
    along = rgb.astype(np.float32) @ axes[:, 2].astype(np.float32)
    low, high = float(along.min()), float(along.max())
    return np.round((along - low) * (255 / max(high - low, 1e-3))).astype(np.uint8)


# --- grey -> ink ------------------------------------------------------------------------------------------------------


def _blank(contrast: float) -> BadImage:
    return BadImage(
        f"a digit was expected, but the picture is blank (contrast {max(contrast, 0.0):.0f} of 255 grey levels): "
        "draw one darker or lighter than its paper"
    )


def _settle_polarity(grey: U8) -> U8:
    """Canonical geometry (28, 28) -> ink 255 on paper 0; pixels unchanged where the paper is pure."""
    if int(grey.max()) - int(grey.min()) < _MIN_CONTRAST:
        raise _blank(float(grey.max()) - float(grey.min()))
    border = np.concatenate((grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]))
    border.sort()
    paper = int(border[len(border) // 2])
    if paper == 0:
        return grey
    if paper == 255:
        return 255 - grey
    residual = grey.astype(np.float32) - paper
    if _skew(residual) < 0:
        residual = -residual
    return np.round(np.clip(residual, 0, None) * (255 / max(float(residual.max()), 1.0))).astype(np.uint8)


def ink_map(grey: U8) -> F32:
    """Grey uint8 (H, W), either polarity, evenly lit or not -> float32 (H, W), ink 1 on paper 0, edges between.

    Raises:
        BadImage: nothing stands out from the paper.
    """
    contrast = float(grey.max()) - float(grey.min())
    if contrast < _MIN_CONTRAST:
        raise _blank(contrast)
    noise = _noise(grey)
    if noise > 1.5:  # film grain, sensor noise, paper: averaged over a neighbourhood that strokes outlast
        radius = 1.0 if noise < 6 else 1.6
        grey = np.asarray(Image.fromarray(grey).filter(ImageFilter.GaussianBlur(radius * max(grey.shape) / 600 + 0.3)))
        contrast = float(grey.max()) - float(grey.min())
    values = grey.astype(np.float32)
    ring = _ring(values)
    low, high = np.percentile(ring, (15, 85))
    even = high - low <= 0.1 * contrast or _has_two_levels(grey)
    residual = values - np.float32(np.median(ring)) if even else _less_uneven_light(grey)
    if _skew(residual) < 0:
        np.negative(residual, out=residual)
    ink = _scale_ink(residual)
    # A hairline seldom covers a whole pixel: what it does cover counts double, or it would fall to pieces.
    return np.minimum(2 * ink, 1) if _stroke_width(ink >= 0.3) < 2 else ink


def _has_two_levels(grey: U8) -> bool:
    """Whether all but the soft edges is either paper or ink: then the light was even, whatever the border shows."""
    count = np.bincount(grey.ravel(), minlength=256)
    low, high = np.flatnonzero(count)[[0, -1]]
    margin = max(1, round(0.12 * (high - low)))
    return int(count[low + margin : high - margin + 1].sum()) <= 0.06 * grey.size


def _skew(residual: F32) -> float:
    """Sum of the cubes: its sign says on which side of the paper the ink lies, the rarer and the stronger."""
    flat = residual.ravel()
    return float(np.dot(flat * flat, flat))


def _ring(values: F32) -> F32:
    """The pixels near the edges, where a picture of a digit shows its paper."""
    height, width = values.shape
    depth = max(1, round(0.04 * min(height, width)))
    if height <= 2 * depth or width <= 2 * depth:
        return values.ravel()
    middle = values[depth:-depth]
    return np.concatenate(
        (values[:depth].ravel(), values[-depth:].ravel(), middle[:, :depth].ravel(), middle[:, -depth:].ravel())
    )


def _noise(grey: U8) -> float:
    """Standard deviation in grey levels of what differs between neighbours, robust to strokes."""
    if grey.shape[1] < 3:
        return 0.0
    step = max(1, grey.shape[0] // 200)
    rows = grey[::step].astype(np.int16)
    second = rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:]
    return float(np.median(np.abs(second))) * 1.4826 / math.sqrt(6)


def _less_uneven_light(grey: U8) -> F32:
    """Grey (H, W) less its background -> float32 (H, W): shadows, vignettes and gradients gone, either polarity kept.

    A quadratic surface takes the slow part; what is left, such as the edge of a shadow, is followed by a morphological
    closing (or opening, for light ink) that is wider than any stroke.
    """
    picture = Image.fromarray(grey)
    factor = max(1, math.ceil(max(grey.shape) / 320))
    reduced = picture.reduce(factor)
    dark_ink = _ink_is_dark(reduced)
    small = np.asarray(reduced).astype(np.float32)
    surface = _quadratic_surface(small)
    rest = small - surface
    ring = _ring(rest)
    low, high = np.percentile(ring, (15, 85))
    if high - low > 0.12 * float(rest.max() - rest.min()):
        surface = _closed_surface(small) if dark_ink else -_closed_surface(-small)
    background = Image.fromarray(surface.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
    backdrop = np.asarray(background)
    residual = grey.astype(np.float32) - backdrop
    if dark_ink:  # ink takes a share of the light that falls on it, so less of it in a shadow
        level = float(np.median(backdrop))
        residual *= np.clip(level / np.maximum(backdrop, 1.0), 0.5, 3.0)
    return residual - np.float32(np.median(residual))


def _closed_surface(values: F32) -> F32:
    """The paper behind dark ink, by a closing three times as wide as strokes: a wider one would round off shadows."""
    reach = max(3, round(0.15 * min(values.shape)))
    closed = _closing(values, reach)
    depth = closed - values
    stroke = _stroke_width(depth >= 0.5 * float(depth.max()))
    return _closing(values, min(reach, max(3, round(3 * stroke + 3))))


def _ink_is_dark(grey: Image.Image) -> bool:
    """Polarity under uneven light: against its neighbourhood, ink is the rarer and the stronger side."""
    local = np.asarray(grey.filter(ImageFilter.BoxBlur(max(1, 0.1 * min(grey.size)))))
    return _skew(np.asarray(grey).astype(np.float32) - local) < 0


def _quadratic_surface(values: F32) -> F32:
    """The paper's brightness as a quadratic in x and y, fitted with outlying pixels (ink) left out in turn."""
    height, width = values.shape
    step = max(1, max(values.shape) // 64)
    sample = values[::step, ::step].ravel().astype(np.float64)
    basis = _quadratic_basis(height, width, step)
    keep = np.ones(sample.size, bool)
    weights: npt.NDArray[np.floating] = np.zeros(6)
    for _ in range(5):
        weights, *_ = np.linalg.lstsq(basis[keep], sample[keep], rcond=None)
        off = np.abs(sample - basis @ weights)
        keep = off <= max(2.0, 2.5 * float(np.median(off)))
        if keep.sum() < 60:
            break
    return (_quadratic_basis(height, width, 1) @ weights).reshape(values.shape).astype(np.float32)


def _quadratic_basis(height: int, width: int, step: int) -> npt.NDArray[np.float64]:
    """1, x, y, x², xy, y² (pixels, 6) at every ``step``-th pixel, both axes from -1 to 1."""
    y, x = np.meshgrid(np.linspace(-1, 1, height)[::step], np.linspace(-1, 1, width)[::step], indexing="ij")
    return np.stack((np.ones_like(x), x, y, x * x, x * y, y * y), axis=-1).reshape(-1, 6)


def _closing(values: F32, reach: int) -> F32:
    """Grey closing by a square of ``reach``: dark things narrower than it vanish."""
    widened = _running_max(_running_max(values, reach).T, reach).T
    return -_running_max(_running_max(-widened, reach).T, reach).T


def _running_max(values: F32, reach: int) -> F32:
    """Maximum over ``reach`` columns around each, by doubling: log2(reach) passes."""
    before = reach // 2
    padded = np.pad(values, ((0, 0), (before, reach - 1 - before)), mode="constant", constant_values=-np.inf)
    done = 1
    while done < reach:
        step = min(done, reach - done)
        padded = np.maximum(padded[:, :-step], padded[:, step:])
        done += step
    return padded


def _noise_below(residual: F32) -> float:
    """Noise of the paper, from what lies below it: ink is above, even where it covers most of the picture.

    The larger of a median (and half a grey level, since they are whole) and of a root mean square without the outermost
    hundredth: JPEG noise is too patchy for the one, faint noise too coarse for the other.
    """
    below = residual[residual <= 0]
    if below.size == 0:
        return 0.0
    kept = below[below >= np.percentile(below, 1)]
    return max(1.4826 * (0.5 - float(np.median(below))), math.sqrt(float(np.dot(kept, kept)) / kept.size))


def _scale_ink(residual: F32) -> F32:
    """Grey levels above the paper -> ink 0 to 1: nothing at the noise floor, full at the ink's own level."""
    top = float(residual.max())
    step = max(1, residual.size // 50_000)
    sample = residual.ravel()[::step]
    sigma = _noise_below(sample)
    floor = max(_MIN_CONTRAST / 2, 0.15 * top, min(4 * sigma, 0.5 * top))
    strong = residual[residual > floor]
    # What stands out by 40 levels is no grain, however much the remains of a shadow add to the noise.
    if top < max(_MIN_CONTRAST, min(6 * sigma, 40)) or strong.size == 0:
        raise _blank(top)
    # The ink's own level, not that of the paler lines it may be written on.
    level = float(np.median(strong[strong >= 0.55 * np.percentile(strong, 99.5)]))
    foot = min(max(2 * sigma, 0.08 * level), 0.4 * level)
    return np.clip((residual - foot) / (level - foot), 0, 1)


# --- ink -> the digit's ink -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Components:
    """Connected pieces of a mask (8-neighbours), each as runs of pixels in rows; one entry a run, or one a piece."""

    shape: tuple[int, int]
    run_row: npt.NDArray[np.intp]
    run_start: npt.NDArray[np.intp]
    run_end: npt.NDArray[np.intp]  # one past the last column
    run_piece: npt.NDArray[np.intp]
    area: npt.NDArray[np.intp]  # pixels of each piece
    left: npt.NDArray[np.intp]
    top: npt.NDArray[np.intp]
    right: npt.NDArray[np.intp]  # one past
    bottom: npt.NDArray[np.intp]  # one past

    def mask_of(self, chosen: Mask) -> Mask:
        """Pixels (H, W) of the pieces chosen (bool, one a piece)."""
        height, width = self.shape
        runs = chosen[self.run_piece]
        change = np.zeros((height, width + 1), np.int8)
        change[self.run_row[runs], self.run_start[runs]] = 1
        change[self.run_row[runs], self.run_end[runs]] = -1
        return np.cumsum(change, axis=1, dtype=np.int8)[:, :width].astype(bool)


def find_components(mask: Mask) -> Components:
    """Connected pieces of a bool (H, W), by runs and union-find, all in numpy."""
    height, width = mask.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = mask
    change = np.diff(padded, axis=1)
    row, start = np.nonzero(change == 1)
    _, end = np.nonzero(change == -1)
    # Runs of neighbouring rows touch where one starts no later than the other ends (corners count).
    stride = width + 2
    first = np.searchsorted(row * stride + end, (row + 1) * stride + start, "left")
    last = np.searchsorted(row * stride + start, (row + 1) * stride + end, "right")
    count = np.maximum(last - first, 0)
    above = np.repeat(np.arange(len(row)), count)
    below = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    root = _union(len(row), above, below)
    names, piece = np.unique(root, return_inverse=True)
    pieces = len(names)
    left, top = np.full(pieces, width), np.full(pieces, height)
    right, bottom = np.zeros(pieces, np.intp), np.zeros(pieces, np.intp)
    np.minimum.at(left, piece, start)
    np.minimum.at(top, piece, row)
    np.maximum.at(right, piece, end)
    np.maximum.at(bottom, piece, row + 1)
    area = np.bincount(piece, weights=end - start, minlength=pieces).astype(np.intp)
    return Components((height, width), row, start, end, piece, area, left, top, right, bottom)


def _union(nodes: int, a: npt.NDArray[np.intp], b: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """The smallest node that each node is joined with through the edges a-b."""
    root = np.arange(nodes)
    while True:
        root_a, root_b = root[a], root[b]
        apart = root_a != root_b
        if not apart.any():
            return root
        np.minimum.at(root, np.maximum(root_a, root_b)[apart], np.minimum(root_a, root_b)[apart])
        while True:
            shorter = root[root]
            if (shorter == root).all():
                break
            root = shorter


def _sheet_in(ink: F32, grey: U8) -> U8 | None:
    """Grey (h, w) of a sheet of paper that lies in the picture on a darker or lighter table, or None.

    A sheet is a piece of "ink" that fills most of an upright rectangle of some size. What is outside it becomes paper.
    """
    solid = ink >= 0.45
    if float(solid.mean()) < 0.12:
        return None
    pieces = find_components(solid)
    chosen = np.arange(len(pieces.area)) == np.argmax(pieces.area)
    mask = pieces.mask_of(chosen)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    mask = mask[window]
    if min(mask.shape[0] / grey.shape[0], mask.shape[1] / grey.shape[1]) < 0.3:
        return None
    hull = _between_ends(mask) & _between_ends(mask.T).T
    if hull.mean() < 0.85 or mask.sum() < 0.8 * hull.sum():
        return None
    edge = max(2, round(0.02 * min(mask.shape)))  # the sheet's own soft edge and shadow
    hull[:edge] = hull[-edge:] = False
    hull[:, :edge] = hull[:, -edge:] = False
    seen = grey[window]
    return np.where(hull, seen, np.uint8(np.median(seen[mask])))


def _between_ends(mask: Mask) -> Mask:
    """In each row, everything from the first set pixel to the last."""
    return np.logical_or.accumulate(mask, axis=1) & np.logical_or.accumulate(mask[:, ::-1], axis=1)[:, ::-1]


def main_digit(ink: F32) -> F32:
    """The ink of the one digit in a picture: float32 (h, w), cropped; specks, frames and edge lines left out.

    Raises:
        BadImage: there is nothing as large as a digit.
    """
    pieces = find_components(ink >= 0.45)
    keep = _belongs_to_digit(pieces) if len(pieces.area) else np.zeros(0, bool)
    if not keep.any():
        raise BadImage("a digit was expected, but the picture is blank but for specks: draw one larger")
    mask = pieces.mask_of(keep)
    top, bottom = int(pieces.top[keep].min()), int(pieces.bottom[keep].max())
    left, right = int(pieces.left[keep].min()), int(pieces.right[keep].max())
    # Two pixels more, for the soft edge outside the threshold.
    window = (slice(max(0, top - 2), bottom + 2), slice(max(0, left - 2), right + 2))
    return np.where(_widen(_widen(mask[window])), ink[window], np.float32(0))


def _widen(mask: Mask) -> Mask:
    """The mask and the pixels next to it."""
    across = mask.copy()
    across[:, 1:] |= mask[:, :-1]
    across[:, :-1] |= mask[:, 1:]
    wide = across.copy()
    wide[1:] |= across[:-1]
    wide[:-1] |= across[1:]
    return wide


def _belongs_to_digit(pieces: Components) -> Mask:
    """Which pieces are the digit's own (bool, one a piece)."""
    height, width = pieces.shape
    wide, high = pieces.right - pieces.left, pieces.bottom - pieces.top
    extent = np.maximum(wide, high)
    keep = extent >= max(_MIN_DIGIT, 0.02 * max(height, width))
    frames = _frames(pieces, wide, high) if keep.sum() > 1 else np.zeros(len(extent), bool)
    keep &= ~frames
    main = int(np.argmax(np.where(keep, pieces.area * np.sqrt(extent), 0)))
    # Noise falls into a thousand pieces of which none is a twentieth of the whole.
    if not keep.any() or pieces.area[main] < 0.05 * pieces.area[~frames].sum():
        return np.zeros(len(extent), bool)
    # Parts that the pen set down apart: the bar of a five, the stem of a four. Not specks, nor what lies far off.
    gap_x = np.maximum(np.maximum(pieces.left - pieces.right[main], pieces.left[main] - pieces.right), 0)
    gap_y = np.maximum(np.maximum(pieces.top - pieces.bottom[main], pieces.top[main] - pieces.bottom), 0)
    gap = np.maximum(gap_x, gap_y)
    large = (pieces.area >= 0.06 * pieces.area[main]) & (extent >= 0.15 * extent[main])
    keep &= large & (gap <= 0.25 * extent[main])
    keep[main] = True
    return keep


def _frames(pieces: Components, wide: npt.NDArray[np.intp], high: npt.NDArray[np.intp]) -> Mask:
    """Pieces that frame the picture rather than being drawn in it: borders, boxes, lines along an edge."""
    height, width = pieces.shape
    sides = (pieces.left == 0).astype(int) + (pieces.top == 0) + (pieces.right == width) + (pieces.bottom == height)
    spans = (wide >= 0.7 * width) | (high >= 0.7 * height)
    thin = np.minimum(wide / width, high / height) <= 0.1
    along_edge = (sides >= 1) & spans & (thin | (sides >= 3))
    # A box around something: it holds another piece of size, and its ink is a small share of its area.
    biggest = np.zeros(len(wide), bool)
    candidate = int(np.argmax(wide * high))
    inside = (
        (pieces.left > pieces.left[candidate])
        & (pieces.right < pieces.right[candidate])
        & (pieces.top > pieces.top[candidate])
        & (pieces.bottom < pieces.bottom[candidate])
        & (high >= 0.25 * high[candidate])
    )
    hollow = pieces.area[candidate] <= 0.35 * wide[candidate] * high[candidate]
    biggest[candidate] = bool(inside.any()) and bool(hollow)
    return along_edge | biggest


# --- the digit's ink -> canonical -------------------------------------------------------------------------------------


def normalise(ink: F32) -> U8:
    """One digit's ink, float32 (h, w) of 0 to 1 at any size -> canonical uint8 (28, 28).

    Strokes thinner or thicker than a pen's are widened or narrowed towards ``MIN_STROKE`` and ``MAX_STROKE`` before the
    digit is scaled down, so that a hairline does not fade away.
    """
    fine = _to_fine_grid(ink)
    solid = fine >= 0.5
    length = float(_extent(solid))
    stroke = min(_stroke_width(solid), length)
    # The centre line plus one stroke's width fills the box: (length - stroke) * scale + wanted = BOX.
    wanted = min(max(stroke * BOX / length, MIN_STROKE), MAX_STROKE)
    line = length - stroke
    scale = (BOX - wanted) / line if line > 2 * stroke else BOX / length
    grow = (wanted / scale - stroke) / 2
    if abs(grow) > 0.25:
        fine = _grow_strokes(solid, max(grow, -0.3 * stroke))
    return _place(fine)


def _extent(solid: Mask) -> int:
    rows, columns = np.flatnonzero(solid.any(axis=1)), np.flatnonzero(solid.any(axis=0))
    return int(max(rows[-1] - rows[0], columns[-1] - columns[0])) + 1


def _to_fine_grid(ink: F32) -> F32:
    """Resampled so that the longer side is about 80 to 160 pixels: the same cost and precision for every size."""
    height, width = ink.shape
    longer = max(height, width)
    if longer > _FINE_SIDE:
        factor = math.ceil(longer / _FINE_SIDE)
        thin = _stroke_width(ink >= 0.5) < 2 * factor  # averaging would wash such strokes out
        return _pool_max(ink, factor) if thin else _pool_mean(ink, factor)
    if longer < _FINE_SIDE // 2:
        factor = _FINE_SIDE / 2 / longer
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        return np.clip(np.asarray(Image.fromarray(ink).resize(size, Image.Resampling.BICUBIC)), 0, 1)
    return ink


def _blocks(values: F32, factor: int) -> F32:
    height, width = values.shape
    padded = np.pad(values, ((0, -height % factor), (0, -width % factor)))
    return padded.reshape(padded.shape[0] // factor, factor, -1, factor)


def _pool_mean(values: F32, factor: int) -> F32:
    return _blocks(values, factor).mean(axis=(1, 3))


def _pool_max(values: F32, factor: int) -> F32:
    return _blocks(values, factor).max(axis=(1, 3))


def _stroke_width(solid: Mask) -> float:
    """Mean width in pixels of the strokes of a mask: twice its area over its outline (Crofton's length)."""
    area = int(solid.sum())
    padded = np.pad(solid, 1)
    edges = int((padded[1:] != padded[:-1]).sum()) + int((padded[:, 1:] != padded[:, :-1]).sum())
    return 2 * area / (edges * math.pi / 4) if edges else 0.0


def _grow_strokes(solid: Mask, by: float) -> F32:
    """Outlines moved by ``by`` pixels, outwards if positive, with a soft edge one pixel wide."""
    if by > 0:
        margin = math.ceil(by) + 1
        padded = np.pad(solid, margin)
        distance = _distance(padded, math.ceil(by) + 1) - 0.5
        return np.clip(0.5 + by - distance, 0, 1)
    padded = np.pad(solid, 1)
    distance = _distance(~padded, math.ceil(-by) + 1) - 0.5
    thinner = np.clip(0.5 + distance + by, 0, 1)
    return np.where(padded, thinner, 0).astype(np.float32)


def _distance(target: Mask, reach: int) -> F32:
    """Euclidean distance in pixels of every pixel to the nearest of ``target``, up to ``reach`` (then reach + 1)."""
    far = np.float32((reach + 1) ** 2)
    across = np.where(target, np.float32(0), far)
    for shift in range(1, reach + 1):
        square = np.float32(shift * shift)
        near = np.where(target, square, far)
        np.minimum(across[:, shift:], near[:, :-shift], out=across[:, shift:])
        np.minimum(across[:, :-shift], near[:, shift:], out=across[:, :-shift])
    best = across.copy()
    for shift in range(1, reach + 1):
        square = np.float32(shift * shift)
        np.minimum(best[shift:], across[:-shift] + square, out=best[shift:])
        np.minimum(best[:-shift], across[shift:] + square, out=best[:-shift])
    return np.sqrt(np.minimum(best, far))


def _place(ink: F32) -> U8:
    """Scaled so that the ink fits 20x20, averaged down, centre of mass in the middle -> uint8 (28, 28)."""
    solid = ink >= 0.5
    scale = BOX / _extent(solid)
    mass = float(ink.sum())
    rows, columns = ink.sum(axis=1), ink.sum(axis=0)
    centre_y = float(rows @ np.arange(0.5, len(rows))) / mass
    centre_x = float(columns @ np.arange(0.5, len(columns))) / mass
    # A window of 28x28 canonical pixels around the centre of mass, with paper wherever it leaves the picture.
    side = IMAGE_HEIGHT / scale
    margin = math.ceil(side)
    padded = Image.fromarray(np.pad(ink, margin).astype(np.float32))
    x = centre_x + margin - CENTRE / scale
    y = centre_y + margin - CENTRE / scale
    box = (x, y, x + side, y + side)
    small = padded.resize((IMAGE_WIDTH, IMAGE_HEIGHT), Image.Resampling.HAMMING, box=box)
    values = np.asarray(small)
    return np.round(np.clip(values * (255 / max(float(values.max()), 1e-6)), 0, 255)).astype(np.uint8)
