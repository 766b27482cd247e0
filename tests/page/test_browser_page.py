"""The page in a real Chromium: drawn on by pointer, finger and keyboard, in both modes."""

import base64
import io
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from PIL import Image

pytestmark = pytest.mark.browser

Point = tuple[float, float]
OpenPage = Callable[..., Any]


def ring(t: float) -> Point:
    return 0.5 + 0.3 * math.cos(6.2 * t), 0.5 + 0.3 * math.sin(6.2 * t)


def zigzag(t: float) -> Point:
    return 0.15 + 0.7 * t, 0.5 + 0.3 * (1 - 4 * abs((2 * t) % 1 - 0.5))


def corner(t: float) -> Point:
    return (0.3, 0.15 + 1.4 * t) if t < 0.5 else (t - 0.2, 0.85)


SYMBOLS = {"ring": ring, "zigzag": zigzag, "corner": corner}


def hand(pad: Any, shape: Callable[[float], Point], rng: random.Random) -> Iterator[Point]:
    """Where a hand that is never quite exact passes, in the window's pixels."""
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    size, shift = rng.uniform(0.85, 1.1), (rng.uniform(-0.04, 0.04), rng.uniform(-0.04, 0.04))
    for i in range(15):
        x, y = (
            0.5 + (value - 0.5) * size + move + rng.uniform(-0.01, 0.01)
            for value, move in zip(shape(i / 14), shift, strict=True)
        )
        yield box["x"] + box["width"] * x, box["y"] + box["height"] * y


def draw(page: Any, pad: Any, shape: Callable[[float], Point], rng: random.Random) -> None:
    for i, place in enumerate(hand(pad, shape, rng)):
        page.mouse.move(*place)
        if i == 0:
            page.mouse.down()
    page.mouse.up()


def draw_examples(page: Any, rng: random.Random) -> None:
    for i, (name, shape) in enumerate(SYMBOLS.items()):
        card = page.locator(".symbol").nth(i)
        card.locator(".name").fill(name)
        for _ in range(3):
            draw(page, card.locator(".pad"), shape, rng)
            card.locator(".keep").click()
        assert card.locator(".examples li").count() == 3


def learn(page: Any, where: str) -> None:
    page.locator(f"[name=where][value={where}]").check(force=True)
    page.locator("#learn").click()
    page.locator("#status", has_text="Learnt from").wait_for(timeout=60_000)


def percents(page: Any) -> dict[str, int]:
    rows = page.locator("#probabilities li")
    return {
        rows.nth(i).locator(".label").inner_text(): int(
            rows.nth(i).locator(".percent").inner_text().removesuffix("%")
        )
        for i in range(rows.count())
    }


def settled(page: Any) -> dict[str, int]:
    """The probabilities once they have stopped moving."""
    page.locator("#spoken", has_text="Looks like").wait_for(state="attached")
    page.wait_for_timeout(300)
    return percents(page)


def picture(colour: tuple[int, int, int], rng: random.Random) -> dict[str, Any]:
    file = io.BytesIO()
    shade = tuple(min(255, max(0, value + rng.randint(-40, 40))) for value in colour)
    Image.new("RGB", (rng.randint(10, 60), 40), shade).save(file, "PNG")
    return {"name": "picture.png", "mimeType": "image/png", "buffer": file.getvalue()}


@pytest.mark.parametrize("where", ["server", "browser"])
def test_it_learns_what_is_drawn_and_recognises_new_drawings(
    open_page: OpenPage, where: str
) -> None:
    page, rng = open_page(), random.Random(where)
    draw_examples(page, rng)
    learn(page, where)
    assert "from 9 examples" in page.locator("#status").inner_text()
    losses = page.locator("#curve svg").get_attribute("aria-label")
    first, last = (float(word) for word in losses.split() if word[0].isdigit() and "." in word)
    assert last < 0.3 * first
    for name, shape in SYMBOLS.items():
        page.locator("#query-clear").click()
        seen = set()
        for i, place in enumerate(hand(page.locator("#query"), shape, rng)):
            page.mouse.move(*place)
            if i == 0:
                page.mouse.down()
            page.wait_for_timeout(20)
            if page.locator("#verdict strong").count():
                seen.add(tuple(percents(page).values()))
        assert len(seen) > 1, "the probabilities move while the pen is down"
        assert page.locator("#spoken").inner_text() == "", "no chatter until it is lifted"
        page.mouse.up()
        found = settled(page)
        assert max(found, key=found.__getitem__) == name, found
        assert page.locator("#verdict strong").inner_text() == name


def test_both_modes_adapt_to_the_same_task(open_page: OpenPage) -> None:
    page = open_page()
    rows = page.evaluate(
        """async () => {
          const { ServiceModel } = await import("/page/client/service.js");
          const { BackgroundModel } = await import("/page/client/background.js");
          const { drawingPixels } = await import("/page/client/pixels.js");
          const models = [
            await ServiceModel.load("/"),
            await BackgroundModel.load("/bundle/", "/ort/ort.wasm.bundle.min.mjs"),
          ];
          const stroke = (a, b) => [[[a, 0.1], [b, 0.5], [a, 0.9]]];
          const draw = (a, b) => drawingPixels(stroke(a, b), models[0].imageShape);
          const images = [
            [0.2, 0.8], [0.3, 0.9], [0.25, 0.7],
            [0.9, 0.1], [0.8, 0.2], [0.85, 0.15],
            [0.5, 0.5], [0.45, 0.5], [0.55, 0.5],
          ].map(([a, b]) => draw(a, b));
          const rows = [];
          for (const model of models) {
            const task = await model.adapt(images, [..."aaabbbccc"], { steps: 10, seed: 3 });
            const { probabilities } = await task.predict([draw(0.4, 0.7), draw(0.6, 0.55)]);
            rows.push([...task.losses, ...probabilities.flatMap((row) => [...row])]);
          }
          return rows;
        }"""
    )
    assert len(rows[0]) == 10 + 2 * 3
    assert rows[1] == pytest.approx(rows[0], abs=1e-4)


def test_it_can_be_used_with_a_finger_on_a_narrow_phone(open_page: OpenPage) -> None:
    page = open_page(viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True)
    page.locator(".symbol").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    touch = page.context.new_cdp_session(page)
    pad = page.locator(".symbol .pad").first
    places = list(hand(pad, ring, random.Random(2)))
    scrolled = page.evaluate("scrollY")
    for i, (x, y) in enumerate(places):
        kind = "touchMove" if i else "touchStart"
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
    page.wait_for_timeout(200)  # a finger lifted in full swing would fling, and eat the next tap
    still = {"type": "touchMove", "touchPoints": [{"x": x + 1, "y": y}]}
    touch.send("Input.dispatchTouchEvent", still)
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert page.evaluate("scrollY") == scrolled
    assert pad.locator("path").count() == 1
    page.locator(".symbol .keep").first.tap()
    page.locator(".symbol").first.locator(".examples li").wait_for()


def test_it_can_be_used_with_the_keyboard_alone(open_page: OpenPage) -> None:
    page = open_page()
    page.locator(".symbol").first.wait_for()
    press = page.keyboard.press

    def tab_to(selector: str) -> None:
        for _ in range(60):
            press("Tab")
            if page.evaluate("(s) => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"Tab never reaches {selector}")

    for card, arrow in ((1, "ArrowRight"), (2, "ArrowDown")):
        tab_to(f".symbol:nth-child({card}) .name")
        page.keyboard.type(arrow)
        tab_to(f".symbol:nth-child({card}) .pad")
        for _ in range(2):
            for key in (" ", *[arrow] * 6, " ", "Enter"):
                press(key)
    tab_to("#learn")
    press("Enter")
    page.locator("#status", has_text="Learnt from 4 examples").wait_for()
    tab_to("#query")
    for key in (" ", *["ArrowDown"] * 5, " "):
        press(key)
    assert settled(page)["ArrowDown"] > 50
    press("Backspace")  # takes the stroke back
    page.locator("#verdict", has_text="Draw a new symbol").wait_for()


@pytest.mark.parametrize("where", ["server", "browser"])
def test_a_colour_bundle_adapts_to_the_colours_of_image_files(
    open_page: OpenPage, colour_server: str, where: str
) -> None:
    page, rng = open_page(colour_server), random.Random(0)
    colours = {"red": (200, 50, 50), "green": (50, 200, 50), "blue": (50, 50, 200)}
    for i, (name, colour) in enumerate(colours.items()):
        card = page.locator(".symbol").nth(i)
        card.locator(".name").fill(name)
        card.locator("input[type=file]").set_input_files([picture(colour, rng) for _ in range(4)])
        card.locator(".examples li").nth(3).wait_for()
    learn(page, where)
    for name, colour in colours.items():
        page.locator("#query-file").set_input_files(picture(colour, rng))
        page.locator("#verdict strong", has_text=name).wait_for()


def test_files_can_be_dropped_and_what_is_no_picture_is_refused(open_page: OpenPage) -> None:
    page = open_page()
    drop = """({ selector, name, content }) => {
      const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
      const dataTransfer = new DataTransfer();
      dataTransfer.items.add(new File([bytes], name));
      const event = new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true });
      document.querySelector(selector).dispatchEvent(event);
    }"""
    page.locator(".symbol").first.wait_for()
    content = base64.b64encode(picture((0, 0, 0), random.Random(0))["buffer"]).decode()
    page.evaluate(drop, {"selector": ".symbol", "name": "a.png", "content": content})
    page.locator(".examples li").wait_for()
    page.evaluate(drop, {"selector": ".symbol", "name": "notes.txt", "content": "bm90ZXM="})
    page.locator("#error", has_text="notes.txt cannot be read as a picture").wait_for()
    assert page.locator(".examples li").count() == 1


def test_what_is_missing_is_said_in_a_sentence(open_page: OpenPage) -> None:
    page, rng = open_page(), random.Random(0)
    error = page.locator("#error")
    page.locator("#learn").click()
    assert "at least one example of two symbols" in error.inner_text()
    for i in range(2):
        card = page.locator(".symbol").nth(i)
        card.locator(".name").fill("twin")
        draw(page, card.locator(".pad"), ring, rng)
    page.locator("#learn").click()
    assert "Two symbols are called twin" in error.inner_text()
    page.locator(".name").first.fill("other")
    page.locator("#learn").click()
    page.locator("#status", has_text="Learnt from 2 examples").wait_for()
    assert not error.is_visible()


def test_a_task_that_the_server_has_deleted_can_be_made_again(
    open_page: OpenPage, server: str
) -> None:
    page, rng = open_page(allowed="404"), random.Random(0)
    draw_examples(page, rng)
    with page.expect_response(lambda answer: answer.url.endswith("/tasks")) as answer:
        learn(page, "server")
    task = answer.value.json()["id"]
    urlopen(Request(f"{server}tasks/{task}", method="DELETE")).close()
    draw(page, page.locator("#query"), ring, rng)
    page.locator("#error", has_text="no longer has this task: learn it again").wait_for()
    learn(page, "server")
    assert settled(page)["ring"] > 50
    assert not page.locator("#error").is_visible()


def test_a_busy_server_and_a_missing_runtime_are_named(open_page: OpenPage) -> None:
    page, rng = open_page(allowed="Failed to load resource"), random.Random(0)
    draw_examples(page, rng)
    page.route(
        "**/tasks", lambda route: route.fulfill(status=429, headers={"Retry-After": "7"}, body="{}")
    )
    page.locator("#learn").click()
    page.locator("#error", has_text="The server is busy. Try again in 7 seconds.").wait_for()
    page.route("**/ort/**", lambda route: route.fulfill(status=404))
    page.locator("[name=where][value=browser]").check(force=True)
    page.locator("#learn").click()
    page.locator("#error", has_text="run `make page`").wait_for()
    page.unroute("**/ort/**")
    learn(page, "browser")
    assert not page.locator("#error").is_visible()


@pytest.mark.parametrize("where", ["server", "browser"])
def test_a_server_with_a_token_is_asked_with_it(
    open_page: OpenPage, guarded_server: str, where: str
) -> None:
    page, rng = open_page(guarded_server, allowed="Failed to load resource"), random.Random(0)
    for token in ("wrong", "sesame"):
        page.get_by_label("This server requires a token").fill(token)
        page.keyboard.press("Enter")
        if token == "wrong":
            page.locator("#error", has_text="does not accept this token").wait_for()
    draw_examples(page, rng)
    assert not page.locator("#token").is_visible()
    assert not page.locator("#error").is_visible()
    learn(page, where)
    draw(page, page.locator("#query"), ring, rng)
    assert settled(page)["ring"] > 50


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_to_complain_about(open_page: OpenPage, scheme: str, root: Path) -> None:
    page = open_page(color_scheme=scheme, reduced_motion="reduce")
    draw_examples(page, random.Random(0))
    learn(page, "server")
    draw(page, page.locator("#query"), ring, random.Random(1))
    settled(page)
    page.evaluate((root / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run().then(({ violations }) => violations)")
    assert found == [], json.dumps(
        [(entry["id"], [node["html"] for node in entry["nodes"]]) for entry in found], indent=1
    )
    assert page.evaluate("document.getAnimations().length") == 0  # as the visitor prefers
