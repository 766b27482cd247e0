"""The page of bundles that take no images, in a real Chromium: rows typed, points clicked."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from machines import Made
from small_bundles import small_bundle

from reptile.runtime import FewShotModel, FewShotRegressor

pytestmark = pytest.mark.browser

Machines = Callable[[str], Made]
OpenPage = Callable[..., Any]
Serve = Callable[[Path], str]

ROWS: list[list[str]] = [
    ["2026-01-03T12:00", "2100", "south"],
    ["2026-01-05T00:00", "", "north"],
    ["2026-01-09T00:00", "1800", "other"],
    ["2026-01-12T00:00", "1900", ""],
]
GIVEN = [
    {"when": when, "dose": float(dose) if dose else None, "site": site or None}
    for when, dose, site in ROWS
]


@pytest.fixture
def line_server(serve_bundle: Serve, tmp_path: Path) -> str:
    """The address of a server on a bundle that learns straight lines."""
    return serve_bundle(small_bundle(tmp_path / "bundle", 1, 1))


def cells(page: Any, row: int) -> Any:
    return page.locator("#rows tbody tr").nth(row).locator("input, select")


def fill(page: Any, targets: list[str]) -> None:
    """Type all rows, the last of which has no target."""
    page.get_by_role("button", name="Add a row").click()
    for number, (row, target) in enumerate(zip(ROWS, [*targets, ""], strict=True)):
        found = cells(page, number)
        found.nth(0).fill(row[0])
        found.nth(1).fill(row[1])
        found.nth(2).select_option(row[2])
        found.nth(3).fill(target)
        found.nth(3).press("Tab")


def learnt(page: Any, where: str, rows: int) -> list[str]:
    """Choose where, and return what is predicted."""
    page.locator(f"[name=where][value={where}]").check(force=True)
    place = {"server": "on the server", "browser": "in this browser"}[where]
    said = re.compile(rf"Learnt from {rows} rows? in .* {place}")
    page.locator("#status", has_text=said).wait_for(timeout=60_000)
    return [str(each) for each in page.locator("#rows output").all_inner_texts()]


def numbers(text: str) -> list[float]:
    return [float(each) for each in re.findall(r"-?\d+(?:\.\d+)?", text)]


def click(page: Any, x: float, y: float) -> None:
    """Click a point of the plot, whose axes go from -5 to 5."""
    page.locator("#chart svg").scroll_into_view_if_needed()
    box = page.locator("#chart .frame").bounding_box()
    page.mouse.click(
        box["x"] + box["width"] * (x + 5) / 10, box["y"] + box["height"] * (5 - y) / 10
    )


def curve(page: Any, name: str) -> np.ndarray:
    """The points [N, 2] of a path of the chart, in its axes' numbers."""
    frame = page.locator("#chart .frame")
    left, top, width, height = (
        float(frame.get_attribute(key)) for key in ("x", "y", "width", "height")
    )
    path = np.array(numbers(page.locator(f"#chart .{name}").get_attribute("d"))).reshape(-1, 2)
    return np.stack([10 * (path[:, 0] - left) / width - 5, 5 - 10 * (path[:, 1] - top) / height], 1)


def test_clicked_points_are_learnt_as_a_curve_with_its_interval(
    open_page: OpenPage, line_server: str
) -> None:
    page = open_page(line_server)
    for count, x in enumerate((-4.0, 0.0, 3.0), 1):
        click(page, x, 1 + 0.5 * x)
        learnt(page, "server", count)
    for where in ("server", "browser"):
        predicted = [numbers(each)[0] for each in learnt(page, where, 3)]
        np.testing.assert_allclose(predicted, [-1, 1, 2.5], atol=0.1)
        x, y = curve(page, "function").T
        np.testing.assert_allclose(y, 1 + 0.5 * x, atol=0.1)
        high, low = np.split(curve(page, "band"), 2)
        assert (high[:, 1] > y).all() and (low[::-1, 1] < y).all()
    label = page.locator("#chart svg").get_attribute("aria-label")
    assert label.startswith("y by x, learnt from 3 points: from ")
    np.testing.assert_allclose(numbers(label), [3, -1.5, -5, 3.5, 5], atol=0.1)
    click(page, 0, 1)  # takes the point away
    assert len(learnt(page, "browser", 2)) == 2
    assert page.locator("#chart circle").count() == 2


def test_points_are_given_by_the_keyboard_alone(open_page: OpenPage, line_server: str) -> None:
    page = open_page(line_server)
    page.get_by_label("x, row 1").focus()
    for keys in ("1", "Tab", "2", "Tab", "Tab", "Enter", "3", "Tab", "4", "Tab"):
        page.keyboard.press(keys)
        if page.evaluate("document.activeElement.id") == "add-row":
            page.keyboard.press("Enter")
    assert len(learnt(page, "server", 2)) == 2
    page.get_by_label("Remove row 1").focus()
    page.keyboard.press("Enter")
    assert len(learnt(page, "server", 1)) == 1
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Remove row 1"


def test_rows_get_the_values_of_the_runtime(
    open_page: OpenPage, serve_bundle: Serve, machines: Machines
) -> None:
    made = machines("bayes")
    wear = [50_100.0, 49_950.0, 49_800.0]
    adapted = FewShotRegressor.load(made.folder).adapt(GIVEN[:3], wear)
    low, high = adapted.predict_interval(GIVEN)
    wanted = np.hstack([adapted.predict(GIVEN), low, high])
    page = open_page(serve_bundle(machines("bayes").folder))
    fill(page, [f"{each:g}" for each in wear])
    for where in ("server", "browser"):
        found = [numbers(each) for each in learnt(page, where, 3)]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1.1)  # written as whole numbers
    assert page.locator("#chart").is_hidden()
    assert page.locator("#curve").is_hidden()
    found = page.evaluate(
        """async ([rows, values]) => {
          const { ServiceRegressor } = await import("/page/client/service.js");
          const model = await ServiceRegressor.load("/");
          const adapted = await model.adapt(rows.slice(0, 3), values);
          const intervals = await adapted.predictInterval(rows, 0.5);
          return intervals.map(([{ low, high }]) => [low, high]);
        }""",
        [GIVEN, wear],
    )
    half = np.hstack(adapted.predict_interval(GIVEN, 0.5))
    np.testing.assert_allclose(found, half, rtol=0, atol=0.1)


def test_rows_are_classified_as_by_the_runtime(
    open_page: OpenPage, serve_bundle: Serve, machines: Machines
) -> None:
    labels = ["high", "low", "high"]
    wanted = FewShotModel.load(machines("protonet").folder).adapt(GIVEN[:3], labels).predict(GIVEN)
    page = open_page(serve_bundle(machines("protonet").folder))
    fill(page, labels)
    for where in ("server", "browser"):
        found = learnt(page, where, 3)
        assert [each.split(",")[0] for each in found] == wanted.labels
        shares = [numbers(each)[0] for each in found]
        np.testing.assert_allclose(shares, 100 * wanted.probabilities.max(1), atol=0.6)
    for row in (0, 2):
        cells(page, row).nth(3).fill("low")
        cells(page, row).nth(3).press("Tab")
    page.locator("#status", has_text="Give rows of two labels").wait_for()
    assert page.locator("#rows output").all_inner_texts() == [""] * 4


def test_gradient_steps_show_their_losses(
    open_page: OpenPage, serve_bundle: Serve, machines: Machines
) -> None:
    page = open_page(serve_bundle(machines("reptile").folder))
    page.locator("#about", has_text="5 steps of learning").wait_for()
    fill(page, ["50100", "49950", "49800"])
    for where in ("server", "browser"):
        assert all("to" not in each for each in learnt(page, where, 3)), "no intervals"
        assert page.locator("#curve svg").is_visible()


def test_what_the_server_refuses_is_shown_and_mended(open_page: OpenPage, line_server: str) -> None:
    page = open_page(line_server, allowed="422")
    page.get_by_label("x, row 1").fill("1")
    page.get_by_label("y, row 1").fill("1e39")
    page.get_by_label("y, row 1").press("Tab")
    page.locator("#error", has_text="not finite in float32").wait_for()
    page.locator("[name=where][value=browser]").check(force=True)
    page.locator("#error", has_text="1e+39 is not finite in float32").wait_for(timeout=60_000)
    assert page.locator("#rows output").inner_text() == ""
    page.get_by_label("y, row 1").fill("1")
    page.get_by_label("y, row 1").press("Tab")
    assert len(learnt(page, "server", 1)) == 1
    assert page.locator("#error").is_hidden()


def test_inputs_of_many_numbers_are_for_programs(
    open_page: OpenPage, serve_bundle: Serve, tmp_path: Path
) -> None:
    page = open_page(serve_bundle(small_bundle(tmp_path / "bundle", 40, 1)))
    page.locator("#hint", has_text="40 numbers, too many to type").wait_for()
    assert page.get_by_role("button", name="Add a row").is_hidden()
