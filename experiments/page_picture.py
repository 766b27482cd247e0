"""Draw docs/images/page.png: the page of `reptile serve` in Chromium, after it has learnt.

python -m experiments.page_picture            # after `make repro` and `make page`
python -m experiments.page_picture BUNDLE --output docs/images/page-values.png  # of sinusoids
"""

import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from playwright.sync_api import Locator, Page, sync_playwright

from benchmarks.server import Server
from experiments import run
from reptile.errors import InputError

PICTURE = Path("docs/images/page.png")
EXAMPLES = 3
Point = tuple[float, float]
Stroke = Callable[[float], Point]


def _spiral(t: float) -> Point:
    angle, radius = 15 * t, 0.08 + 0.3 * t
    return 0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)


def _through(*corners: Point) -> Stroke:
    """Return the stroke through some corners, at an even pace from each to the next."""

    def stroke(t: float) -> Point:
        place = min(int(t * (len(corners) - 1)), len(corners) - 2)
        share = t * (len(corners) - 1) - place
        (ax, ay), (bx, by) = corners[place : place + 2]
        return ax + share * (bx - ax), ay + share * (by - ay)

    return stroke


SYMBOLS: dict[str, list[Stroke]] = {
    "spiral": [_spiral],
    "ladder": [
        _through((0.36, 0.1), (0.3, 0.85)),
        _through((0.68, 0.1), (0.64, 0.85)),
        _through((0.35, 0.32), (0.66, 0.31)),
        _through((0.33, 0.55), (0.65, 0.54)),
    ],
    "mountain": [_through((0.15, 0.75), (0.35, 0.3), (0.52, 0.72), (0.68, 0.42), (0.85, 0.75))],
    "kite": [
        _through((0.5, 0.1), (0.7, 0.35), (0.5, 0.6), (0.3, 0.35), (0.5, 0.1)),
        _through((0.5, 0.6), (0.42, 0.7), (0.56, 0.8), (0.46, 0.9)),
    ],
}


def main(
    bundle: Annotated[
        Path, typer.Argument(help="A bundle of images, or of values of one number.")
    ] = Path("artifacts/bundle"),
    output: Annotated[Path, typer.Option(help="Where to draw; a PNG.")] = PICTURE,
) -> None:
    """Serve the bundle, draw symbols or click points on its page, and take a screenshot."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise InputError("Chromium is not installed; on Debian: apt install chromium")
    with Server(bundle) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": 1120, "height": 900},
            device_scale_factor=1.25,
            reduced_motion="reduce",
        )
        page.goto(server.url)
        page.locator(".symbol, #chart svg").first.wait_for()
        if page.locator("#chart").count():
            _click(page)
        else:
            _use(page)
        page.screenshot(path=output, full_page=True)
        browser.close()


def _use(page: Page) -> None:
    """Draw examples of each symbol, let the browser learn them, and draw one more."""
    rng = random.Random(0)
    add = page.locator("#add")
    while page.locator(".symbol").count() < len(SYMBOLS) and add.is_visible():
        add.click()
    names = list(SYMBOLS)[: page.locator(".symbol").count()]
    for card, name in zip(page.locator(".symbol").all(), names, strict=True):
        card.locator(".name").fill(name)
        for _ in range(EXAMPLES):
            _draw(page, card.locator(".pad"), SYMBOLS[name], rng)
            card.locator(".keep").click()
    page.locator("[name=where][value=browser]").check(force=True)
    page.locator("#learn").click()
    page.wait_for_function(
        """() => !document.querySelector("#error").hidden ||
          document.querySelector("#status").textContent.includes("Learnt")""",
        timeout=120_000,
    )
    if error := page.locator("#error p").text_content():
        raise InputError(f"the page says: {error}")
    _draw(page, page.locator("#query"), SYMBOLS[names[min(2, len(names) - 1)]], rng)
    page.locator("#spoken", has_text="Looks like").wait_for(state="attached")


def _click(page: Page) -> None:
    """Click points of a sinusoid, and let the browser learn them."""
    page.locator("[name=where][value=browser]").check(force=True)
    box = page.locator("#chart .frame").bounding_box()
    if box is None:
        raise InputError("the page shows no chart")
    for x in (0.1, 0.25, 0.45, 0.6, 0.85):
        y = 0.5 - 0.3 * math.sin(10 * x)
        page.mouse.click(box["x"] + box["width"] * x, box["y"] + box["height"] * y)
    page.locator("#status", has_text="Learnt from 5 rows").wait_for(timeout=120_000)


def _draw(page: Page, pad: Locator, strokes: list[Stroke], rng: random.Random) -> None:
    """Draw a symbol as a hand does: a little larger or smaller, shifted, and not quite steady."""
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    if box is None:
        raise InputError("the page shows no drawing pad")
    size, shift = rng.uniform(0.85, 1.05), (rng.uniform(-0.04, 0.04), rng.uniform(-0.04, 0.04))
    for stroke in strokes:
        for i in range(41):
            x, y = (
                0.5 + (value - 0.5) * size + move + rng.uniform(-0.004, 0.004)
                for value, move in zip(stroke(i / 40), shift, strict=True)
            )
            page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * y)
            if i == 0:
                page.mouse.down()
        page.mouse.up()


if __name__ == "__main__":
    run(main)
