"""The benchmark: its arithmetic on made-up times, and that every row of it runs."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from benchmarks import preparing
from benchmarks.__main__ import main
from benchmarks.machine import OtherWork, describe_machine
from benchmarks.results import Line, Results, Row, compared, read_results
from benchmarks.rows import ROWS
from benchmarks.timing import Effort, Spread, interleave, paired, stopwatch
from reptile.errors import InputError

QUICK_ROWS = ["article-mlp", "overhead", "sampling", "tasks"]


def results_of(*rows: Row, quick: bool = False) -> Results:
    machine = describe_machine().model_copy(update={"load_average": (0.0, 0.0, 0.0)})
    return Results(machine=machine, engine="", started="", seconds=0, quick=quick, rows=rows)


def line_of(ratios: list[float], **changes: Any) -> Line:
    return Line(label="auto", milliseconds=(1.0,), ratios=tuple(ratios), **changes)


def test_a_ratio_is_the_median_of_the_rounds_own_ratios() -> None:
    # The machine is ten times slower in the last round, and the medians fall in different rounds.
    _, fast = compared({"eager": [30, 20, 500], "auto": [10, 10, 50]}, "eager")
    assert fast.ratios == (3, 2, 10)
    assert fast.ratio is not None
    assert fast.ratio.median == 3  # of the medians it would be 30 / 10 by luck ...
    _, other = compared({"eager": [3, 20, 50], "auto": [1, 10, 5]}, "eager")
    assert other.ratio is not None
    assert other.ratio.median == 3  # ... and here 20 / 5


def test_a_machine_that_slows_all_alike_does_not_move_a_ratio() -> None:
    rng = np.random.default_rng(0)
    slowness = rng.uniform(1, 20, 50)
    _, fast = compared({"eager": list(8 * slowness), "auto": list(2 * slowness)}, "eager")
    assert fast.ratio == pytest.approx((4, 4, 4))


def test_comparisons_read_as_their_names_say() -> None:
    assert paired("speed", [2], [8]) == [4]
    assert paired("slowdown", [8], [2]) == [4]
    assert paired("share", [2], [8]) == [0.25]
    with pytest.raises(ValueError, match="zip"):
        paired("speed", [1, 2], [1])


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        (line_of([4.6], limit=4.5), True),
        (line_of([4.4], limit=4.5), False),
        (line_of([2.9], limit=3.0, comparison="slowdown"), True),
        (line_of([0.09], limit=0.08, comparison="share"), False),
        (line_of([4.4]), None),
    ],
)
def test_a_limit_is_the_least_speed_or_the_most_slowdown(line: Line, kept: bool | None) -> None:
    assert line.within_limit is kept


def test_every_round_runs_each_once_and_none_always_follows_the_same_other() -> None:
    ran: list[str] = []

    def measure(name: str) -> Callable[[], float]:
        def run() -> float:
            ran.append(name)
            return float(len(ran))

        return run

    effort = Effort(least=3, most=3, seconds=0, quick=True)
    times = interleave({name: measure(name) for name in "abc"}, effort)
    assert "".join(ran) == "abc" + "abc" + "bca" + "cab"  # the first is the warm-up
    assert times == {"a": [4, 9, 11], "b": [5, 7, 12], "c": [6, 8, 10]}


def test_rounds_end_with_the_time_but_not_before_the_least_number() -> None:
    def rounds(effort: Effort) -> int:
        return len(interleave({"a": stopwatch(lambda: time.sleep(0.03))}, effort)["a"])

    assert rounds(Effort(least=2, most=1000, seconds=0, quick=True)) == 2
    assert rounds(Effort(least=2, most=4, seconds=1000, quick=True)) == 4
    start = time.perf_counter()
    assert 2 <= rounds(Effort(least=2, most=1000, seconds=0.5, quick=True)) < 1000
    assert time.perf_counter() - start >= 0.5


def test_a_short_run_is_timed_over_many_calls() -> None:
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1

    start = time.perf_counter()
    milliseconds = stopwatch(run)()
    assert calls > 100
    assert milliseconds * calls < 2 * (time.perf_counter() - start) * 1e3  # of one call, not of all


def test_a_disturbed_run_says_so() -> None:
    quiet = Row(name="quiet", title="", lines=(line_of([4.0, 4.1, 4.2]),), others=0.01)
    assert results_of(quiet).warnings == ()
    crowded = quiet.model_copy(update={"name": "crowded", "others": 0.3})
    wide = Row(name="wide", title="", lines=(line_of([2.0, 4.0, 8.0]),))
    told = results_of(quiet, crowded, wide, quick=True).warnings
    assert ["crowded 30%" in text for text in told] == [False, True, False]
    assert ["wide 75%" in text for text in told] == [False, False, True]
    assert not any("quiet" in text for text in told)


def test_a_small_share_is_no_less_sure_than_a_large_one() -> None:
    line = line_of([0.01, 0.03, 0.05], comparison="share")
    assert line.unsure == pytest.approx(0.02)


def test_work_of_others_is_told_from_our_own() -> None:
    others = OtherWork()
    if others.share() is None and not Path("/proc/stat").exists():
        pytest.skip("this system does not tell")
    spin = "import time\nend = time.perf_counter() + 0.5\nwhile time.perf_counter() < end: pass"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.DEVNULL):
        time.sleep(0.6)
        as_another = others.share()
    as_ours = others.share()  # waited for, its time counts as ours
    assert as_another is not None
    assert as_ours is not None
    assert as_another > 0.1
    assert as_ours < as_another


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ran(
    threads: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[[list[str]], Results]:
    def run(rows: list[str]) -> Results:
        file, plot = tmp_path / "bench.json", tmp_path / "speed.png"
        main(rows, quick=True, threads=1, json=file, plot=plot)
        shown = capsys.readouterr()
        assert "a quick run" in shown.err
        assert plot.read_bytes().startswith(b"\x89PNG")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "speed.png"]
        results = read_results(file)
        assert [row.name for row in results.rows] == rows
        for row in results.rows:
            assert row.name in shown.out
            assert row.seconds > 0

        main(shown=file, as_markdown=True)
        table = capsys.readouterr().out.splitlines()
        lines = [line for line in table if line.startswith("| ")]
        assert len(lines) == 1 + sum(len(row.lines) for row in results.rows)
        assert len({line.count("|") for line in lines}) == 1
        check_json(json.loads(file.read_text()))
        return results

    return run


def check_json(values: dict[str, Any]) -> None:
    """The file alone gives every figure: rounds, quartiles, and ratios by pairs."""
    machine = values["machine"]
    assert machine["versions"].keys() >= {"python", "torch", "numpy"}
    assert machine["threads"] == 1
    assert len(machine["load_average"]) == 3
    for row in values["rows"]:
        for line in row["lines"]:
            times = line["milliseconds"]
            assert all(isinstance(time, float) for time in times)
            assert line["time"] == pytest.approx(Spread.of(times))
            if line["ratios"]:
                assert len(line["ratios"]) == len(times)
                assert line["ratio"] == pytest.approx(Spread.of(line["ratios"]))
    first = values["rows"][0]["lines"]
    times = {line["label"]: line["milliseconds"] for line in first}
    ratios = {line["label"]: line["ratios"] for line in first}
    assert ratios["eager"] == []
    for label in set(times) - {"eager"}:
        by_pairs = [a / b for a, b in zip(times["eager"], times[label], strict=True)]
        assert ratios[label] == pytest.approx(by_pairs)


def test_the_quick_form_measures_shows_draws_and_keeps_what_it_found(
    ran: Callable[[list[str]], Results],
) -> None:
    _, overhead, _, tasks = ran(QUICK_ROWS).rows
    whole, loops, rest = (np.array(line.milliseconds) for line in overhead.lines[:3])
    assert rest == pytest.approx(whole - loops)
    points = [(line.point.curve, line.point.x) for line in tasks.lines if line.point]
    assert points == [(curve, x) for x in (1, 2, 4) for curve in ("eager", "auto")]


@pytest.mark.slow
def test_every_row_runs_in_the_quick_form(ran: Callable[[list[str]], Results]) -> None:
    results = ran(list(ROWS))
    rows = {row.name: row for row in results.rows}
    assert [len(line.milliseconds) for line in rows["processes"].lines] == [1, 1, 1]
    busy = rows["busy-core"]
    assert busy.lines[1].comparison == "slowdown"


def test_an_unknown_row_or_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="nonsense: choose of omniglot-5way"):
        main(["nonsense"])
    with pytest.raises(InputError, match="no such file; measure first"):
        main(shown=tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match=r"bad.json: machine.*measure again"):
        main(shown=tmp_path / "bad.json")


@pytest.mark.slow
def test_preparing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preparing.main(images=2000, size=16, folder=tmp_path)
    small, large = capsys.readouterr().out.splitlines()
    assert small.startswith("100 images, 0 MB written")
    assert large.startswith("2,000 images, 2 MB written")
    preparing.main(rows=20_000, folder=tmp_path)
    assert capsys.readouterr().out.startswith("20,000 rows: ")
