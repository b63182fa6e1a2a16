"""What people send becomes what the network was trained on, or a clear refusal."""

import itertools
import random
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from digits.errors import BadImage, DigitsError, TooLarge
from digits.image import find_components, from_raw, ink_map, main_digit, read_digit, read_small_png
from tests.digits.pictures import (
    drawing,
    encode,
    framed,
    on_a_table,
    on_nothing,
    photograph,
    png_bomb,
    png_chunk,
    png_with,
    ruled,
    specked,
)
from tests.stack import strokes


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two canonical images: 1 when they are the same."""
    return float(np.corrcoef(a.ravel().astype(float), b.ravel().astype(float))[0, 1])


def stroke_width(image: np.ndarray) -> float:
    solid = np.pad(image > 127, 1)
    outline = (solid[1:] != solid[:-1]).sum() + (solid[:, 1:] != solid[:, :-1]).sum()
    return float(2 * image.sum() / 255 / (outline * np.pi / 4))  # soft edges count by their grey


def extent(image: np.ndarray) -> int:
    """The longer side of the box around what is more than a trace of ink."""
    rows, columns = np.flatnonzero((image > 25).any(1)), np.flatnonzero((image > 25).any(0))
    return int(max(np.ptp(rows), np.ptp(columns))) + 1


def centre_of_mass(image: np.ndarray) -> np.ndarray:
    y, x = np.mgrid[:28, :28]
    return np.array([(image * y).sum(), (image * x).sum()]) / image.sum()


CLEAN = read_digit(encode(drawing()))


# --- images of the data set pass through ------------------------------------------------------------------------------


def test_every_test_image_sent_as_png_comes_back_byte_for_byte(mnist_test: np.ndarray) -> None:
    """Ink on black is canonical already: geometry and grey levels of all 10,000 are untouched."""
    changed = [k for k, image in enumerate(mnist_test) if (read_digit(encode(image)) != image).any()]
    assert changed == []


def test_the_quick_way_for_plain_pngs_reads_every_test_image_alike(mnist_test: np.ndarray) -> None:
    """It declines what has no pure paper around it, and never differs."""
    quick = [read_small_png(encode(image)) for image in mnist_test]
    assert sum(one is None for one in quick) < 10
    for one, image in zip(quick, mnist_test, strict=True):
        assert one is None or one == image.tobytes()


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 300), value=st.integers(0, 255), cut=st.integers(0, 300), ink=st.integers(0, 12))
def test_the_quick_way_says_nothing_that_the_other_would_not(
    mnist_test: np.ndarray, at: int, value: int, cut: int, ink: int
) -> None:
    """A changed byte, a cut file, faint ink, a grey paper: the same image or none."""
    image = mnist_test[at].copy()
    if ink < 12:
        image = np.minimum(image, ink)
    for data in (encode(image), encode(255 - image), encode(np.maximum(image, ink))):
        for sent in (data, data[:at] + bytes((value,)) + data[at + 1 :], data[: cut + 1]):
            quick = read_small_png(sent)
            assert quick is None or quick == read_digit(sent).tobytes()


def test_every_inverted_test_image_comes_back_as_the_original(mnist_test: np.ndarray) -> None:
    """Black on white of the same 10,000 gives the same pixels."""
    changed = [k for k, image in enumerate(mnist_test) if (read_digit(encode(255 - image)) != image).any()]
    assert changed == []


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "I;16"])
def test_a_28x28_image_keeps_its_pixels_in_every_lossless_mode(mnist_test: np.ndarray, mode: str) -> None:
    """Sixteen bits are scaled by 257, colours and opaque alpha are dropped."""
    for image in mnist_test[:200]:
        picture = Image.fromarray(image.astype(np.uint16) * 257 if mode == "I;16" else image)
        sent = encode(picture if mode == "I;16" else picture.convert(mode))
        assert (read_digit(sent) == image).all()


def test_a_28x28_photograph_has_its_paper_set_to_zero_and_its_ink_to_255(mnist_test: np.ndarray) -> None:
    """Grey paper under grey ink is stretched, whichever is the darker."""
    for image in mnist_test[:50]:
        for seen in (190 - image // 2, 60 + image // 4):
            back = read_digit(encode(seen.astype(np.uint8)))
            assert back.max() == 255
            assert np.median(back) == 0
            assert likeness(back, image) > 0.999


def test_raw_bytes_are_taken_as_they_are(mnist_test: np.ndarray) -> None:
    """784 bytes, row by row."""
    assert (from_raw(mnist_test[0].tobytes()) == mnist_test[0]).all()


@pytest.mark.parametrize("length", [0, 1, 783, 785, 3136])
def test_raw_bytes_of_any_other_length_are_refused_with_both_numbers(length: int) -> None:
    """The message says what was expected and what came."""
    with pytest.raises(BadImage, match="784 bytes.*" + f"{length:,}"):
        from_raw(bytes(length))


# --- the canonical geometry -------------------------------------------------------------------------------------------


ALL_STYLES = [(digit, style) for digit, styles in strokes.STYLES.items() for style in styles]


@pytest.mark.parametrize(("digit", "style"), ALL_STYLES)
def test_a_drawing_fills_20x20_around_its_centre_of_mass(digit: int, style: str) -> None:
    """LeCun's recipe, measured on the result: longer side 20 (a soft edge may reach one pixel further), mass centred
    on pixel 14, strokes as wide as MNIST's, ink 255 and paper 0.
    """
    image = read_digit(encode(drawing(digit, style)))
    assert image.dtype == np.uint8
    assert image.shape == (28, 28)
    assert 19 <= extent(image) <= 21
    assert np.abs(centre_of_mass(image) - 14).max() < 0.1
    assert 1.8 <= stroke_width(image) <= 4
    assert image.max() == 255
    assert (image == 0).mean() > 0.5


@pytest.mark.parametrize("centre", [(0.2, 0.2), (0.8, 0.25), (0.5, 0.8), (0.22, 0.7)])
@pytest.mark.parametrize("size", [0.12, 0.3])
def test_place_and_size_on_the_sheet_do_not_matter(centre: tuple[float, float], size: float) -> None:
    """A small digit in a corner becomes the same image as a large one in the middle."""
    paths = strokes.place(strokes.STYLES[2]["plain"], size, centre)
    image = read_digit(encode(strokes.render(paths, side=600, width=18 * 600 / 280 * size / 0.7)))
    assert likeness(image, CLEAN) > 0.97


@pytest.mark.parametrize(
    ("side", "width", "smooth"),
    [(40, 1, True), (64, 2, True), (280, 1, False), (280, 3, True), (280, 40, True), (1000, 1, False), (1000, 70, True),
     (3000, 2, False), (4000, 240, True)],
)  # fmt: skip
def test_hairlines_stay_and_markers_are_thinned(side: int, width: float, smooth: bool) -> None:
    """From one pixel on a large sheet to a seventh of the digit's height, strokes end up as wide as MNIST's."""
    image = read_digit(encode(drawing(side=side, width=width, smooth=smooth)))
    assert 1.7 <= stroke_width(image) <= 4
    assert likeness(image, CLEAN) > 0.8
    assert image.max() == 255


def test_aspect_is_kept() -> None:
    """A one is a thin upright line, not stretched to the box."""
    image = read_digit(encode(drawing(1, "bar")))
    assert np.flatnonzero(image.any(0)).size <= 5
    assert extent(image) >= 19


# --- polarity, colour, transparency, depth ----------------------------------------------------------------------------


def modes() -> dict[str, bytes]:
    """The same drawing in every kind of file."""
    grey = drawing()
    values = np.asarray(grey)
    blue = Image.merge("RGB", [grey, grey, Image.new("L", grey.size, 255)])
    red_on_green = Image.composite(
        Image.new("RGB", grey.size, (0, 130, 0)), Image.new("RGB", grey.size, (255, 0, 0)), grey
    )
    corner = grey.convert("RGBA")
    corner.paste((0, 0, 0, 0), (0, 0, 30, 30))
    half = Image.fromarray((values.astype(np.uint16) * 100 + 9000).astype(np.uint16))
    return {
        "L png": encode(grey),
        "1 png": encode(grey.convert("1", dither=Image.Dither.NONE)),
        "P png": encode(grey.convert("P")),
        "RGB png": encode(grey.convert("RGB")),
        "LA png": encode(grey.convert("LA")),
        "16-bit png": encode(Image.fromarray(values.astype(np.uint16) * 257)),
        "16-bit png, part of its range": encode(half),
        "float tiff": encode(Image.fromarray(values.astype(np.float32) / 255), "TIFF"),
        "32-bit tiff": encode(Image.fromarray(values.astype(np.int32) * 1000 - 50), "TIFF"),
        "16-bit tiff": encode(half, "TIFF"),
        "LAB tiff": encode(Image.merge("LAB", [grey, grey, grey]), "TIFF"),
        "CMYK tiff": encode(grey.convert("RGB").convert("CMYK"), "TIFF"),
        "CMYK jpeg (Adobe, inverted)": encode(grey.convert("RGB").convert("CMYK"), "JPEG", quality=90),
        "jpeg": encode(grey, "JPEG", quality=60),
        "colour jpeg, progressive": encode(grey.convert("RGB"), "JPEG", progressive=True),
        "webp": encode(grey.convert("RGB"), "WEBP"),
        "lossless webp with alpha": encode(on_nothing(grey, (0, 0, 0)), "WEBP", lossless=True),
        "bmp": encode(grey, "BMP"),
        "gif": encode(grey, "GIF"),
        "interlaced gif": encode(grey, "GIF", interlace=True),
        "blue on white": encode(blue),
        "red on green of one brightness": encode(red_on_green),
        "white on black": encode(Image.fromarray(255 - values)),
        "grey on grey": encode(Image.fromarray((100 + values // 8).astype(np.uint8))),
        "light grey on grey": encode(Image.fromarray((140 - values // 8).astype(np.uint8))),
        "ten levels of contrast": encode(Image.fromarray((120 + (values > 127) * 10).astype(np.uint8))),
        "black on nothing": encode(on_nothing(grey, (0, 0, 0))),
        "white on nothing": encode(on_nothing(grey, (255, 255, 255))),
        "red on nothing": encode(on_nothing(grey, (200, 30, 30))),
        "black on nothing, grey and alpha": encode(on_nothing(grey, (0, 0, 0)).convert("LA")),
        "a transparent corner": encode(corner),
        "palette with a transparent colour": encode(
            Image.fromarray((values > 127).astype(np.uint8) * 255).convert("P"), transparency=255
        ),
        "grey with a transparent colour": encode(grey, transparency=255),
    }


MODES = modes()


@pytest.mark.parametrize("kind", MODES)
def test_one_drawing_in_any_kind_of_file_is_one_image(kind: str) -> None:
    """Format, depth, colour, alpha and polarity carry no meaning."""
    assert likeness(read_digit(MODES[kind]), CLEAN) > 0.98


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_obeyed(orientation: int) -> None:
    """All eight ways to hold a camera give the same upright digit."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = drawing()
    held = picture.transpose(undo[orientation]) if orientation in undo else picture
    for file_format in ("JPEG", "PNG", "WEBP"):
        assert likeness(read_digit(encode(held.convert("RGB"), file_format, exif=exif)), CLEAN) > 0.97


def test_damaged_exif_is_no_reason_to_refuse_a_sound_picture() -> None:
    """The orientation is then taken as upright."""
    sent = encode(drawing(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(40))
    assert likeness(read_digit(sent), CLEAN) > 0.98


def test_the_first_picture_of_a_phones_mpo_is_read() -> None:
    """Phones append depth maps and previews to a JPEG; that is no animation."""
    sent = encode(drawing().convert("RGB"), "MPO", save_all=True, append_images=[Image.new("RGB", (280, 280))])
    assert likeness(read_digit(sent), CLEAN) > 0.98


# --- photographs and dirt ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "light",
    [
        {"noise": 4},
        {"noise": 18},
        {"gradient": 0.9, "noise": 4},
        {"shadow": True, "noise": 4},
        {"gradient": 0.4, "shadow": True, "noise": 4},
        {"contrast": 0.25, "gradient": 0.3, "noise": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize(("digit", "style"), [(2, "plain"), (4, "open"), (8, "one stroke")])
def test_a_photograph_is_read_as_the_drawing_it_shows(light: dict, digit: int, style: str) -> None:
    """Falling light, the edge of a shadow, sensor noise and pale pencil leave no trace in the canonical image."""
    picture = drawing(digit, style, size=0.5, side=600, width=14)
    clean = read_digit(encode(picture))
    assert likeness(read_digit(encode(photograph(picture, **light), "JPEG", quality=80)), clean) > 0.93


@pytest.mark.parametrize("gradient", [0.0, 0.6])
def test_chalk_on_a_board_is_read_as_ink_on_paper(gradient: float) -> None:
    """Light ink on a dark ground, unevenly lit."""
    seen = photograph(Image.fromarray(255 - np.asarray(drawing())), gradient=gradient, noise=5, contrast=0.7)
    assert likeness(read_digit(encode(seen)), CLEAN) > 0.95


@pytest.mark.parametrize("squares", [False, True])
def test_the_lines_of_ruled_and_squared_paper_are_left_out(squares: bool) -> None:
    """They are paler than the ink, even where they cross it."""
    picture = drawing(size=0.5, side=400, width=14)
    assert likeness(read_digit(encode(ruled(picture, squares))), read_digit(encode(picture))) > 0.97


@pytest.mark.parametrize("turn", [0, 3, -4])
@pytest.mark.parametrize(("digit", "style"), [(0, "round"), (1, "bar"), (7, "plain")])
def test_a_sheet_on_a_dark_table_is_not_taken_for_the_digit(digit: int, style: str, turn: float) -> None:
    """What is written on the sheet is read, not the sheet."""
    picture = drawing(digit, style, size=0.5, side=400, width=14)
    flat = read_digit(encode(picture.rotate(turn, fillcolor=255, resample=Image.Resampling.BICUBIC)))
    assert likeness(read_digit(encode(on_a_table(picture, turn), "JPEG")), flat) > 0.93


@pytest.mark.parametrize(("digit", "style"), [(0, "round"), (8, "two circles"), (1, "bar"), (6, "curved")])
def test_a_fat_digit_is_not_taken_for_a_sheet(digit: int, style: str) -> None:
    """Its holes are not what was written."""
    fat = read_digit(encode(drawing(digit, style, size=0.8, width=60)))
    slim = read_digit(encode(drawing(digit, style, size=0.8, width=24)))
    assert likeness(fat, slim) > 0.7


def test_specks_are_left_out() -> None:
    """Dirt away from the digit changes neither its place nor its scale."""
    picture = drawing(size=0.5)
    assert likeness(read_digit(encode(specked(picture))), read_digit(encode(picture))) > 0.9


@pytest.mark.parametrize(("inset", "width"), [(0, 1), (0, 4), (2, 2), (8, 3), (20, 2)])
def test_a_frame_around_the_digit_is_left_out(inset: int, width: int) -> None:
    """Borders at the edge and boxes drawn around."""
    assert likeness(read_digit(encode(framed(drawing(), inset, width))), CLEAN) > 0.99


def test_a_line_along_an_edge_is_left_out() -> None:
    """The edge of the sheet in a photograph."""
    picture = np.array(drawing())
    picture[-6:] = 0
    assert likeness(read_digit(encode(picture)), CLEAN) > 0.99


def test_parts_that_the_pen_set_down_apart_stay_together() -> None:
    """A five's bar that does not touch its body belongs to it."""
    body, bar = strokes.STYLES[5]["two strokes"]
    apart = [body, [(x + 0.03, y - 0.06) for x, y in bar]]
    seen = main_digit(ink_map(np.asarray(strokes.render(strokes.place(apart, 0.7), width=12))))
    whole = main_digit(ink_map(np.asarray(strokes.render(strokes.place([body], 0.7), width=12))))
    assert seen.shape[0] > whole.shape[0] + 5


def test_connected_pieces_are_found_across_corners() -> None:
    """Eight neighbours count, holes and spirals are one piece, and boxes are right."""
    mask = np.array(
        [
            [1, 0, 0, 0, 1, 1, 1],
            [0, 1, 0, 0, 1, 0, 1],
            [0, 0, 1, 0, 1, 0, 1],
            [0, 0, 0, 0, 0, 0, 1],
            [1, 1, 0, 1, 1, 1, 1],
        ],
        bool,
    )
    pieces = find_components(mask)
    boxes = sorted(zip(pieces.left, pieces.top, pieces.right, pieces.bottom, pieces.area, strict=True))
    assert boxes == [(0, 0, 3, 3, 3), (0, 4, 2, 5, 2), (3, 0, 7, 5, 12)]
    for piece, area in enumerate(pieces.area):
        assert pieces.mask_of(np.arange(3) == piece).sum() == area


# --- refusals ---------------------------------------------------------------------------------------------------------


def noise_on_paper() -> bytes:
    rng = np.random.default_rng(1)
    return encode(np.clip(rng.normal(180, 4, (300, 300)), 0, 255).astype(np.uint8), "JPEG")


def shaded_paper() -> bytes:
    y, x = np.mgrid[:300, :300]
    return encode((120 + 0.2 * x + 0.1 * y).astype(np.uint8))


def animation(file_format: str) -> bytes:
    return encode(drawing(side=64, width=5).convert("RGB"), file_format, save_all=True,
                  append_images=[Image.new("RGB", (64, 64), "red")])  # fmt: skip


REFUSED = {
    "nothing": (b"", "no bytes came"),
    "text": (b"hello, a seven please", "PNG, JPEG"),
    "html": (b"<!doctype html><title>x</title>", "PNG, JPEG"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "PNG, JPEG"),
    "pdf": (b"%PDF-1.7\n" + bytes(99), "PNG, JPEG"),
    "icon": (bytes([0, 0, 1, 0, 1, 0, 16, 16]) + bytes(99), "PNG, JPEG"),
    "zeros": (bytes(784), "PNG, JPEG"),
    "png signature alone": (b"\x89PNG\r\n\x1a\n", "damaged or cut off"),
    "png cut in half": (encode(drawing())[:900], "damaged or cut off"),
    "jpeg cut in half": (encode(drawing(), "JPEG")[:2500], "damaged or cut off"),
    "webp cut in half": (encode(drawing().convert("RGB"), "WEBP")[:700], "damaged or cut off"),
    "bmp cut in half": (encode(drawing(), "BMP")[:9000], "damaged or cut off"),
    "tiff cut in half": (encode(drawing(), "TIFF")[:9000], "damaged or cut off"),
    "gif cut in half": (encode(drawing(), "GIF")[:1200], "damaged or cut off"),
    "white sheet": (encode(Image.new("L", (280, 280), 255)), "blank"),
    "white 28x28": (encode(Image.new("L", (28, 28), 255)), "blank"),
    "black sheet": (encode(Image.new("RGB", (280, 280))), "blank"),
    "nothing on nothing": (encode(Image.new("RGBA", (280, 280), (0, 0, 0, 0))), "blank"),
    "one pixel": (encode(Image.new("L", (1, 1))), "blank"),
    "16-bit blank": (encode(Image.fromarray(np.full((40, 40), 700, np.uint16))), "blank"),
    "float blank": (encode(Image.fromarray(np.full((40, 40), np.nan, np.float32)), "TIFF"), "blank"),
    "noise on paper": (noise_on_paper(), "blank"),
    "shaded paper": (shaded_paper(), "blank"),
    "specks alone": (encode(specked(Image.new("L", (280, 280), 255), 12)), "blank"),
    "animated gif": (animation("GIF"), "several frames"),
    "animated png": (animation("PNG"), "several frames"),
    "animated webp": (animation("WEBP"), "several frames"),
    "two-page tiff": (animation("TIFF"), "several frames"),
    "compressed text that unpacks to 200 MB": (
        png_with(png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200_000_000), 1))), "damaged"),
    "colour profile that unpacks to 200 MB": (
        png_with(png_chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(200_000_000), 1))), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_holds_no_digit_is_refused_with_its_reason(kind: str) -> None:
    """BadImage, and a message that says what was expected, what came, and what to do."""
    data, reason = REFUSED[kind]
    with pytest.raises(BadImage, match=reason) as refusal:
        read_digit(data)
    message = str(refusal.value)
    assert ":" in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    "data",
    [
        png_bomb(20_000, 20_000),
        encode(Image.new("1", (12_000, 12_000)), "TIFF", compression="group4"),
        encode(Image.new("1", (12_000, 6_000)), "GIF"),
        encode(Image.new("L", (9_000, 9_000)), "JPEG"),
        encode(Image.new("RGB", (16_000, 1_600)), "WEBP", lossless=True, method=0),
    ],
    ids=["png", "tiff", "gif", "jpeg", "webp"],
)
def test_a_bomb_is_refused_by_its_header_before_it_is_decoded(data: bytes) -> None:
    """A small file that would decode into hundreds of megabytes costs none of them."""
    tracemalloc.start()
    with pytest.raises(TooLarge, match="25,000,000 pixels"):
        read_digit(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * len(data) + 2_000_000


def test_the_pixel_limit_is_the_callers() -> None:
    """100 x 100 is one pixel too many for 9,999."""
    sent = encode(drawing(side=100, width=8))
    assert read_digit(sent, max_pixels=10_000).shape == (28, 28)
    with pytest.raises(TooLarge, match="9,999 pixels; this one has 100 x 100 = 10,000"):
        read_digit(sent, max_pixels=9_999)


# --- nothing but DigitsError ever comes out ---------------------------------------------------------------------------


def small_files() -> list[bytes]:
    """One small sound file of each kind, to be damaged."""
    grey = drawing(side=40, width=4)
    rgb = grey.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        encode(grey),
        encode(grey.resize((28, 28))),
        encode(on_nothing(grey, (9, 9, 9))),
        encode(grey.convert("P"), transparency=3),
        encode(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)),
        encode(rgb, "PNG", exif=exif),
        encode(rgb, "JPEG", exif=exif),
        encode(rgb.convert("CMYK"), "JPEG"),
        encode(rgb, "JPEG", progressive=True),
        encode(rgb, "MPO", save_all=True, append_images=[rgb]),
        encode(grey, "GIF"),
        encode(grey, "GIF", save_all=True, append_images=[Image.fromarray(255 - np.asarray(grey))]),
        encode(grey, "BMP"),
        encode(grey.convert("1"), "BMP"),
        encode(grey, "TIFF"),
        encode(rgb, "TIFF", compression="tiff_lzw"),
        encode(rgb, "TIFF", compression="tiff_adobe_deflate"),
        encode(Image.fromarray(np.asarray(grey).astype(np.float32)), "TIFF"),
        encode(rgb, "WEBP"),
        encode(on_nothing(grey, (9, 9, 9)), "WEBP", lossless=True),
    ]


SMALL = small_files()


def damage(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, repeated or cut off; PNG checksums mended half the time so that decoders go on."""
    broken = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(max(1, len(broken)))
        kind = rng.randrange(5)
        if kind <= 1 and broken:
            broken[at : at + 1] = bytes([rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))])
        elif kind == 2:
            del broken[at : at + rng.choice((1, 2, 4, 30))]
        elif kind == 3:
            broken[at:at] = broken[at : at + rng.choice((1, 4, 30))]
        else:
            broken[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1"))
    if rng.random() < 0.15:
        del broken[rng.randrange(max(1, len(broken))) :]
    return mend_png(bytes(broken)) if rng.random() < 0.5 else bytes(broken)


def mend_png(data: bytes) -> bytes:
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, at = data[:8], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4])
        if at + 12 + length > len(data):
            break
        out += png_chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length])
        at += 12 + length
    return out + data[at:]


def assert_answers_or_refuses(data: bytes) -> None:
    try:
        image = read_digit(data, max_pixels=1_000_000)
    except DigitsError:
        return
    assert image.shape == (28, 28)
    assert image.dtype == np.uint8
    assert image.max() > 0


def test_damaged_files_give_an_image_or_a_digits_error() -> None:
    """3,000 files damaged in one to eight places, of every format: nothing else ever comes out."""
    rng = random.Random(20)
    for data in itertools.islice(itertools.cycle(SMALL), 3000):
        assert_answers_or_refuses(damage(data, rng))


FUZZ = settings(max_examples=600, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
SIGNATURES = st.sampled_from(
    [b"", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0", b"MM\0*",
     b"RIFF\0\0\0\0WEBPVP8 "]
)  # fmt: skip


@given(start=SIGNATURES, rest=st.binary(max_size=200))
@FUZZ
def test_random_bytes_give_a_digits_error(start: bytes, rest: bytes) -> None:
    """With and without the signature of a format in front."""
    assert_answers_or_refuses(start + rest)


@given(
    shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    seed=st.integers(0, 2**32 - 1),
    density=st.sampled_from([0.0005, 0.01, 0.1, 0.5, 0.9, 0.999]),
    levels=st.sampled_from([(0, 255), (250, 255), (90, 110), (0, 9)]),
)
@FUZZ
def test_any_grey_picture_gives_an_image_or_a_refusal(
    shape: tuple[int, int], seed: int, density: float, levels: tuple[int, int]
) -> None:
    """Noise of any density and contrast, in any shape down to a single row or column."""
    rng = np.random.default_rng(seed)
    picture = np.where(rng.random(shape) < density, levels[0], levels[1]).astype(np.uint8)
    assert_answers_or_refuses(encode(picture))
