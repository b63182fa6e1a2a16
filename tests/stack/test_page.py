"""A person's visit to the drawing page, in a real Chromium on the running stack."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from serving.gateway.auth import key_line, make_key
from tests.serving.gateway.conftest import LoopThread, start_gateway, stop_gateway
from tests.stack import strokes

CHROMIUM = shutil.which("chromium")
OUTPUT = Path(__file__).parents[2] / "test-output"
SAMPLES = Path(__file__).parents[2] / "serving" / "gateway" / "page"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

LIMIT_MS = 120_000  # a hang's limit, not a claim about speed
expect.set_options(timeout=LIMIT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                  "--disable-component-update", "--disable-sync", "--no-first-run"],
        )  # fmt: skip
        yield chromium
        chromium.close()


class Visit:
    """An open page and all that the browser complained about or asked for."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.context = context
        self.url = url
        self.page: Page = context.new_page()
        self.page.set_default_timeout(LIMIT_MS)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.classified = 0
        self.page.on("console", lambda m: self.complaints.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._note)
        self.page.goto(url)
        expect(self.page.locator("#model")).to_have_attribute("data-state", "ready", timeout=LIMIT_MS)

    def _note(self, request: Any) -> None:
        self.requests.append(request.url)
        self.classified += request.url.endswith("/classify")

    def draw(self, paths: list[strokes.Path]) -> None:
        """With the mouse, point by point; coordinates are shares of the sheet."""
        self.page.locator("#canvas").scroll_into_view_if_needed()
        box = self.page.locator("#canvas").bounding_box()
        assert box is not None
        for path in map(strokes.thin_out, paths):
            points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in path]
            self.page.mouse.move(*points[0])
            self.page.mouse.down()
            for point in points[1:]:
                self.page.mouse.move(*point)
            self.page.mouse.up()

    def draw_digit(self, digit: int, style: str, size: float = 0.7, centre: strokes.Point = (0.5, 0.5)) -> None:
        self.draw(strokes.place(strokes.STYLES[digit][style], size, centre))

    def set_pen(self, width: int) -> None:
        self.page.locator("#pen").fill(str(width))

    def state(self) -> str:
        """What the answer shows once the page is at rest: idle, read or error."""
        expect(self.page.locator("#answer")).to_have_attribute("data-settled", "true", timeout=LIMIT_MS)
        return self.page.locator("#answer").get_attribute("data-state") or ""

    def digit(self) -> str:
        assert self.state() == "read", self.page.locator("#answer").inner_text()
        return self.page.locator("#digit").inner_text()

    def clear(self) -> None:
        self.page.get_by_role("button", name="Clear").click()
        assert self.state() == "idle"

    def bars(self) -> list[float]:
        """The ten bars' lengths, 0 to 1, as drawn on the screen."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll('#rows .bar')].map((bar) => {
                 const outer = bar.getBoundingClientRect(), inner = bar.firstElementChild.getBoundingClientRect();
                 return Math.max(0, Math.min(1, (inner.right - outer.left) / outer.width));
               })"""
        )


@pytest.fixture(scope="module")
def shared(browser: Browser, stack: Any) -> Iterator[Visit]:
    """One desktop visit that several tests share; each clears the sheet when it is done."""
    context = browser.new_context(viewport={"width": 1280, "height": 920}, reduced_motion="reduce")
    yield Visit(context, stack.rest_url + "/")
    context.close()


@pytest.fixture
def visit(shared: Visit) -> Visit:
    shared.complaints.clear()
    if shared.page.locator("#clear").is_enabled():
        shared.clear()
    shared.set_pen(18)
    return shared


# Styles that are read the same way on both sides of the Atlantic.
DRAWN = {
    0: ("round", "narrow", "slanted"),
    1: ("bar", "slanted", "flag and base"),
    2: ("plain", "loop", "swan"),
    3: ("round", "flat top", "narrow"),
    4: ("open", "closed", "curved"),
    5: ("two strokes", "one stroke", "curvy"),
    6: ("curved", "straight", "hooked"),
    7: ("plain", "barred", "curved"),
    8: ("one stroke", "two circles", "slanted"),
    9: ("straight tail", "curved tail", "slanted"),
}


@pytest.mark.parametrize("digit", DRAWN)
def test_a_digit_drawn_with_the_mouse_is_read_thick_thin_small_and_off_centre(visit: Visit, digit: int) -> None:
    """Three hands a digit: a usual pen in the middle, a hairline that is small in a corner, a thick marker."""
    usual, thin, thick = DRAWN[digit]
    read = {}
    visit.draw_digit(digit, usual)
    read["usual"] = visit.digit()
    visit.clear()
    visit.set_pen(2)
    visit.draw_digit(digit, thin, size=0.3, centre=(0.75, 0.28))
    read["hairline, small, top right"] = visit.digit()
    visit.clear()
    visit.set_pen(40)
    visit.draw_digit(digit, thick, size=0.72, centre=(0.46, 0.54))
    read["marker, low left"] = visit.digit()
    assert read == dict.fromkeys(read, str(digit))
    assert visit.complaints == []


def test_bars_and_words_follow_the_drawing_while_the_pen_is_down(visit: Visit) -> None:
    """The answer appears before the pen is lifted; afterwards bars, table, words and version agree with it."""
    page = visit.page
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    (path,) = strokes.place(strokes.STYLES[7]["plain"], 0.7)
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in strokes.thin_out(path)]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point)
    expect(page.locator("#answer")).to_have_attribute("data-state", "read", timeout=LIMIT_MS)
    expect(page.locator("#digit")).to_have_text("7", timeout=LIMIT_MS)
    page.mouse.up()
    assert visit.digit() == "7"
    bars = visit.bars()
    assert bars.index(max(bars)) == 7
    assert sum(bars) == pytest.approx(1, abs=0.05)
    assert page.get_by_role("row").nth(8).inner_text().startswith("7")
    assert page.locator("#rows tr[data-top]").count() == 1
    assert "7" in page.locator("#words").inner_text()
    assert page.locator("#version").inner_text().isdigit()
    assert page.locator("#latency").inner_text().endswith(" ms")


def test_a_long_drawing_asks_often_but_never_twice_at_once(visit: Visit) -> None:
    """While a request is under way the newest drawing waits; a hundred moves are not a hundred requests."""
    page = visit.page
    flying, most = 0, 0

    def leave(request: Any) -> None:
        nonlocal flying, most
        if request.url.endswith("/classify"):
            flying += 1
            most = max(most, flying)

    def arrive(request: Any) -> None:
        nonlocal flying
        flying -= request.url.endswith("/classify")

    page.on("request", leave)
    page.on("requestfinished", arrive)
    before = visit.classified
    visit.draw_digit(8, "one stroke")
    assert visit.digit() == "8"
    page.remove_listener("request", leave)
    page.remove_listener("requestfinished", arrive)
    assert 1 <= visit.classified - before <= 40
    assert most == 1


def test_undo_takes_back_strokes_and_clear_and_an_empty_sheet_is_idle(visit: Visit) -> None:
    """Undo goes back stroke by stroke, and brings back what was cleared."""
    page = visit.page
    visit.draw_digit(1, "bar")
    assert visit.digit() == "1"
    page.get_by_role("button", name="Undo").click()
    assert visit.state() == "idle"
    expect(page.get_by_role("button", name="Clear")).to_be_disabled()
    assert max(visit.bars()) == 0
    visit.draw_digit(3, "round")
    assert visit.digit() == "3"
    visit.clear()
    page.keyboard.press("Control+z")
    assert visit.digit() == "3"


def encoded(picture: Image.Image, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "kind", "ink", "paper"),
    [("five.png", "PNG", 0, 255), ("five.jpg", "JPEG", 250, 20), ("five.tiff", "TIFF", 60, 190)],
)
def test_an_uploaded_picture_is_read_dark_on_light_and_light_on_dark(
    visit: Visit, name: str, kind: str, ink: int, paper: int
) -> None:
    """Also a TIFF, which the browser cannot show but the gateway reads."""
    paths = strokes.place(strokes.STYLES[5]["one stroke"], 0.5, (0.4, 0.55))
    picture = strokes.render(paths, side=400, width=16, ink=ink, paper=paper)
    visit.page.set_input_files(
        "#file", [{"name": name, "mimeType": f"image/{kind.lower()}", "buffer": encoded(picture, kind)}]
    )
    expect(visit.page.locator("#source")).to_have_text(name, timeout=LIMIT_MS)
    assert visit.digit() == "5"


def test_a_picture_dropped_or_pasted_is_read(visit: Visit) -> None:
    """The clipboard and the desktop are ways in, too."""
    data = encoded(strokes.render(strokes.place(strokes.STYLES[2]["plain"], 0.7)))
    for event, field in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        visit.page.evaluate(
            """([bytes, event, field]) => {
                 const carried = new DataTransfer();
                 carried.items.add(new File([new Uint8Array(bytes)], event + ".png", {type: "image/png"}));
                 const Kind = event === "paste" ? ClipboardEvent : DragEvent;
                 document.body.dispatchEvent(new Kind(event, {[field]: carried, bubbles: true, cancelable: true}));
               }""",
            [list(data), event, field],
        )
        expect(visit.page.locator("#source")).to_have_text(f"{event}.png", timeout=LIMIT_MS)
        assert visit.digit() == "2"


def test_what_is_no_picture_or_blank_is_refused_in_words(visit: Visit) -> None:
    """The server's reason is shown, and the next drawing is read as if nothing had been."""
    blank = encoded(Image.new("L", (200, 200), 255))
    for name, data, reason in (("notes.png", b"not a picture", "PNG"), ("blank.png", blank, "blank")):
        visit.page.set_input_files("#file", [{"name": name, "mimeType": "image/png", "buffer": data}])
        expect(visit.page.locator("#answer")).to_have_attribute("data-state", "error", timeout=LIMIT_MS)
        expect(visit.page.locator("#words")).to_have_text("No digit to read", timeout=LIMIT_MS)
        expect(visit.page.locator("#sure")).to_contain_text(reason, timeout=LIMIT_MS)
        assert visit.state() == "error"
    visit.clear()
    visit.draw_digit(0, "round")
    assert visit.digit() == "0"


def test_all_ten_samples_are_read_by_click_and_by_key(visit: Visit) -> None:
    """A click or the digit's key tries a sample; the one in use is marked."""
    read = []
    for digit in range(10):
        button = visit.page.get_by_role("button", name=f"Sample {digit}")
        if digit % 2:
            button.click()
        else:
            visit.page.keyboard.press(str(digit))
        expect(visit.page.locator("#source")).to_have_text(f"sample {digit}", timeout=LIMIT_MS)
        read.append(visit.digit())
        assert button.get_attribute("aria-pressed") == "true"
    assert "".join(read) == "0123456789"


def test_the_samples_are_images_of_the_test_split(stack: Any) -> None:
    """What the page offers as written by people is just that, pixel for pixel."""
    images = np.fromfile(Path(stack.data_dir) / "t10k-images-idx3-ubyte", np.uint8)[16:].reshape(-1, 28, 28)
    labels = np.fromfile(Path(stack.data_dir) / "t10k-labels-idx1-ubyte", np.uint8)[8:]
    for digit in range(10):
        sample = np.asarray(Image.open(SAMPLES / f"sample-{digit}.png"))
        assert digit in labels[(images == sample).all(axis=(1, 2))]


def test_everything_can_be_reached_by_keyboard_and_is_named(visit: Visit) -> None:
    """Tab goes through all controls with a visible ring, Enter works them, and each tells a screen reader its name."""
    page = visit.page
    visit.draw_digit(4, "open")
    assert visit.digit() == "4"
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    names = []
    for _ in range(20):
        page.keyboard.press("Tab")
        names.append(
            page.evaluate(
                """() => {
                     const at = document.activeElement, style = getComputedStyle(at);
                     if (at === document.body) return ["", false]; // past the last
                     const name = at.getAttribute("aria-label") || at.labels?.[0]?.textContent || at.textContent;
                     return [name.trim(), style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
                   }"""
            )
        )
        if names[-1][0] == "Sample 6":
            page.keyboard.press("Enter")
    reached = [name for name, _ in names]
    for control in (
        "Undo",
        "Clear",
        "Upload",
        "Pen",
        *(f"Sample {digit}" for digit in range(10)),
        "Keyboard shortcuts",
    ):
        assert control in reached
    assert all(ring for name, ring in names if name)
    expect(page.locator("#digit")).to_have_text("6", timeout=LIMIT_MS)
    page.keyboard.press("c")
    assert visit.state() == "idle"


def test_a_screen_reader_is_told_the_answer_once_it_holds(visit: Visit) -> None:
    """One polite sentence, not one a frame; the sheet has a role, a name that says what is on it, a description."""
    page = visit.page
    spoken = page.get_by_role("status")
    assert spoken.get_attribute("aria-live") == "polite"
    visit.draw_digit(9, "curved tail")
    expect(spoken).to_contain_text("9", timeout=LIMIT_MS)
    expect(spoken).to_contain_text("sure", timeout=LIMIT_MS)
    sheet = page.get_by_role("img", name="Drawing area: 1 stroke drawn")
    expect(sheet).to_be_visible()
    described = sheet.get_attribute("aria-describedby")
    assert page.locator(f"#{described}").inner_text()
    assert page.get_by_role("table", name="Probability of each digit").get_by_role("row").count() == 11


def test_shortcuts_can_be_switched_off_and_do_not_fire_in_combination(visit: Visit) -> None:
    """Single keys are for those who want them (WCAG 2.1.4)."""
    page = visit.page
    page.locator("#help summary").click()
    page.get_by_label("single-key shortcuts on").uncheck()
    page.keyboard.press("5")
    assert visit.state() == "idle"
    page.get_by_label("single-key shortcuts on").check()
    page.keyboard.press("5")
    expect(page.locator("#source")).to_have_text("sample 5", timeout=LIMIT_MS)
    assert visit.digit() == "5"
    page.locator("#help summary").click()


def test_a_finger_draws_on_a_phone_without_scrolling_the_page(browser: Browser, stack: Any) -> None:
    """Touch, a narrow screen, dark: read, nothing wider than the screen, the page stays where it is."""
    context = browser.new_context(
        viewport={"width": 375, "height": 740}, device_scale_factor=2, has_touch=True, is_mobile=True,
        color_scheme="dark", reduced_motion="reduce",
    )  # fmt: skip
    visit = Visit(context, stack.rest_url + "/")
    page = visit.page
    wire = context.new_cdp_session(page)
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    for path in strokes.place(strokes.STYLES[3]["round"], 0.8):
        touch = [{"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]} for x, y in path]
        wire.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": touch[:1]})
        for point in touch[1:]:
            wire.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
        wire.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert visit.digit() == "3"
    assert page.evaluate("window.scrollY") == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    # The answer is in sight beside the drawing.
    expect(page.locator("#digit")).to_be_in_viewport()
    OUTPUT.mkdir(exist_ok=True)
    page.screenshot(path=OUTPUT / "page-phone.png")
    assert visit.complaints == []
    context.close()


def test_the_api_page_fits_a_phone(browser: Browser, stack: Any) -> None:
    """Nothing of it is wider than the screen but examples, which scroll in their own boxes."""
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(stack.rest_url + "/docs")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    OUTPUT.mkdir(exist_ok=True)
    page.screenshot(path=OUTPUT / "docs-phone.png", full_page=True)
    context.close()


def test_no_request_leaves_the_origin_and_the_browser_has_no_complaint(browser: Browser, stack: Any) -> None:
    """A whole visit: no outside resource, no script error, no breach of the content security policy."""
    context = browser.new_context(viewport={"width": 1280, "height": 920}, reduced_motion="reduce")
    visit = Visit(context, stack.rest_url + "/")
    response = visit.page.request.get(visit.url)
    assert "default-src 'self'" in response.headers["content-security-policy"]
    visit.page.keyboard.press("8")
    expect(visit.page.locator("#source")).to_have_text("sample 8", timeout=LIMIT_MS)
    assert visit.digit() == "8"
    picture = encoded(strokes.render(strokes.place(strokes.STYLES[6]["curved"], 0.6)))
    visit.page.set_input_files("#file", [{"name": "six.png", "mimeType": "image/png", "buffer": picture}])
    expect(visit.page.locator("#source")).to_have_text("six.png", timeout=LIMIT_MS)
    assert visit.digit() == "6"
    visit.draw_digit(7, "barred")
    assert visit.digit() == "7"
    OUTPUT.mkdir(exist_ok=True)
    visit.page.screenshot(path=OUTPUT / "page.png", full_page=True)
    outside = [url for url in visit.requests if not url.startswith((visit.url, "blob:", "data:"))]
    assert outside == []
    assert visit.complaints == []
    context.close()


def test_a_page_that_is_refused_for_its_key_asks_for_one(browser: Browser, tmp_path: Path) -> None:
    """Only then: the field is not there before. A wrong key is said to be wrong, a right one reads what was drawn."""
    key = make_key()
    (tmp_path / "keys").write_text(key_line("alice", key) + "\n")
    here = start_gateway(LoopThread(), api_keys_file=tmp_path / "keys", require_keys=True)
    context = browser.new_context(viewport={"width": 1280, "height": 920}, reduced_motion="reduce")
    try:
        visit = Visit(context, here.url + "/")
        field = visit.page.get_by_label("API key")
        expect(field).to_be_hidden()
        visit.page.keyboard.press("3")
        expect(field).to_be_focused()
        assert visit.state() == "error"
        visit.page.screenshot(path=OUTPUT / "page-key.png")
        visit.page.keyboard.type("7" * 20)  # into the field, not the seventh sample
        visit.page.keyboard.press("Enter")
        expect(visit.page.get_by_text("That key was not accepted")).to_be_visible()
        visit.page.locator("#key").fill(key)
        visit.page.get_by_role("button", name="Use it").click()
        expect(visit.page.locator("#answer")).to_have_attribute("data-state", "read")
        expect(visit.page.locator("#key-form")).to_be_hidden()
        assert visit.page.locator("#source").inner_text() == "sample 3"
        assert key not in here.log_text()
    finally:
        context.close()
        stop_gateway(here)
