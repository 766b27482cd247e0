"""docs/serving.md does what it says, with a real server and curl."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import httpx
import pytest
from machines import Made
from PIL import Image, ImageDraw
from small_bundles import small_bundle

from reptile.serve.settings import ServeSettings


@contextmanager
def serving(bundle: Path, folder: Path) -> Iterator[str]:
    """The command of the first block, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", str(bundle), "--tasks", str(folder / "tasks"), "--port", str(port)]
    with subprocess.Popen(
        [sys.executable, "-m", "reptile", *arguments], stderr=subprocess.DEVNULL
    ) as process:
        opener = build_opener(ProxyHandler({}))
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 60
        while True:
            try:
                opener.open(f"{url}/v2/health/ready", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.1)
        yield url
        process.terminate()
        assert process.wait(60) == 0


def block_of(root: Path, word: str) -> str:
    """The one block of commands that has a word."""
    text = (root / "docs/serving.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if word in b)
    return str(block)


def run(block: str, server: str, folder: Path) -> str:
    """Return what a block of commands prints."""
    done = subprocess.run(
        ["sh", "-ec", block.replace("http://127.0.0.1:8080", server)],
        cwd=folder,
        env=os.environ | {"no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


curl = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")


@curl
def test_three_lines_go_from_a_bundle_to_a_right_prediction(
    exported: Path, root: Path, tmp_path: Path
) -> None:
    block = block_of(root, "new.png")
    assert len(block.strip().splitlines()) == 3
    for name in ("ring1", "ring2", "cross1", "cross2", "new"):
        draw("cross" if name.startswith("cross") else "ring", len(name), tmp_path / f"{name}.png")
    with serving(exported, tmp_path) as server:
        printed = run(block, server, tmp_path)
    assert '"label":"ring"' in printed, printed


@curl
def test_the_rows_of_the_document_are_learnt(
    machines: Callable[[str], Made], root: Path, tmp_path: Path
) -> None:
    text = (root / "docs/serving.md").read_text(encoding="utf-8")
    known, _ = re.findall(r"```csv\n(.*?)```", text, re.DOTALL)
    (tmp_path / "known.csv").write_text(known)
    (tmp_path / "asked.csv").write_text("when,dose,site\n2026-01-12,1900,west\n")
    with serving(machines("bayes").folder, tmp_path) as server:
        printed = run(block_of(root, "known.csv"), server, tmp_path)
    answers = [json.loads(each) for each in re.findall(r'{"predictions":.*?}}\]}', printed)]
    assert len(answers) == 2, printed
    for answer in answers:
        ((values, low, high),) = (
            (each["values"]["wear"], each["low"]["wear"], each["high"]["wear"])
            for each in answer["predictions"]
        )
        assert low < values < high
        assert 45_000 < values < 55_000


def test_the_numbers_of_the_document_are_learnt(root: Path, tmp_path: Path) -> None:
    text = (root / "docs/serving.md").read_text(encoding="utf-8")
    _, table = re.findall(r"```csv\n(.*?)```", text, re.DOTALL)
    with serving(small_bundle(tmp_path / "bundle", 2, 1), tmp_path) as server:
        client = httpx.Client(base_url=server, trust_env=False)
        headers = {"content-type": "text/csv"}
        task = client.post("/tasks", content=table.encode(), headers=headers).json()["id"]
        asked = {"inputs": [[0.1, -2], [0.7, 0.4]]}
        predictions = client.post(f"/tasks/{task}/predict", json=asked).json()["predictions"]
    assert [each["values"]["y"] for each in predictions] == pytest.approx([1.3, 2.0], abs=0.1)


def test_the_document_has_each_setting_with_its_default(root: Path) -> None:
    text = (root / "docs/serving.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (.+) \|$", text, re.MULTILINE)
    for name, default, meaning in rows:
        field = ServeSettings.model_fields[name]
        value = None if default == "none" else float(default.replace(",", ""))
        assert (field.default or None) == value, name
        assert meaning == " ".join((field.description or "").split()), name
    assert [name for name, *_ in rows] == [*ServeSettings.model_fields]


def draw(symbol: str, shift: int, path: Path) -> None:
    """Draw with a pen; `shift` makes no two alike."""
    image = Image.new("L", (105, 105), "white")
    pen, box = ImageDraw.Draw(image), (15 + shift, 15, 85 + shift, 85)
    if symbol == "ring":  # a hole, as the model is a small one
        pen.rectangle((0, 0, 104, 104), "black")
        pen.ellipse(box, "white")
    else:
        pen.line(box, "black", 5)
        pen.line((box[2], box[1], box[0], box[3]), "black", 5)
    image.save(path)


def test_every_bound_can_be_changed_and_a_wrong_one_is_named(exported: Path) -> None:
    def reptile(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "reptile", "serve", str(exported), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    without = [sys.executable, "-m", "reptile", "serve", "--bounds"]
    listed = subprocess.run(without, capture_output=True, text=True, check=True).stdout
    assert listed == reptile("--bounds").stdout
    assert "max_tasks = 1000" in listed and "max_json_bytes" in listed
    for wrong in ("max_tasks=0", "no_such=1", "adaptations"):
        done = reptile("-S", wrong)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert wrong.partition("=")[0] in done.stderr
