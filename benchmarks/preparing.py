"""How much memory and time does `reptile prepare` take? On made photographs, or a made table.

    python -m benchmarks.preparing --images 100000 --folder /somewhere/large
    python -m benchmarks.preparing --rows 10000000 --folder /somewhere/large

Linux only, as the memory is read from /proc: its peak with all mapped pages (VmHWM), and the peak
of what no file backs (RssAnon, every 10 ms).
"""

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

import duckdb
import numpy as np
import typer
from PIL import Image

from reptile.cpus import available_cpus
from reptile.data.dataset import load_prepared

CLASSES = 100
SETTINGS = (
    "held_out=classes",
    "cross_domain=[]",
    "channels=rgb",
    "rotations=false",
    "images_per_class=1",
)


TABLE = (
    "cross_domain=[]",
    "order=at",
    "images_per_class=20",
    "table={task: user, inputs: [at, a, b, kind], targets: [y]}",
)
ROWS_PER_TASK = 100


class Usage(NamedTuple):
    """What one run of the command took; memory in bytes."""

    seconds: float
    peak: int
    peak_anonymous: int


def make_photographs(folder: Path, images: int, size: int) -> None:
    """Write JPEG files of smooth noise, cycling through `CLASSES` folders."""

    def make(number: int) -> None:
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        path = folder / f"class{number % CLASSES:02}" / f"{number:07}.jpg"
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(path, quality=90)

    for number in range(CLASSES):
        (folder / f"class{number:02}").mkdir(parents=True)
    with ThreadPoolExecutor(available_cpus()) as pool:
        for _ in pool.map(make, range(images)):
            pass


def make_table(path: Path, rows: int) -> None:
    """Write a CSV file of tasks in mixed order: a date, two numbers, a category and a target."""
    tasks = max(1, rows // ROWS_PER_TASK)
    with duckdb.connect(config={"memory_limit": "1GB"}) as database:
        database.execute(
            f"COPY (SELECT 'user' || hash(i) % {tasks} AS user, "
            "TIMESTAMP '2020-01-01' + INTERVAL (i % 1000000) MINUTE AS at, "
            "round(random() * 100, 3) AS a, round(random(), 4) AS b, "
            "'k' || hash(i * 7) % 12 AS kind, round(random() * 10, 3) AS y "
            f"FROM range({rows}) numbers(i)) TO '{path}' (HEADER)"
        )


def prepare(source: Path, artifacts: Path, settings: Sequence[str]) -> Usage:
    """Run the command in a separate process and watch it."""
    settings = (f"source={source}", *settings)
    changes = [word for each in settings for word in ("-S", f"prepare.{each}")]
    command = [sys.executable, "-m", "reptile", "prepare", "--artifacts", str(artifacts), *changes]
    start = time.perf_counter()
    peak = anonymous = 0
    with subprocess.Popen(command) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            sizes = dict(re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB", status.read_text(), re.M))
            peak = max(peak, 1024 * int(sizes.get("VmHWM", 0)))
            anonymous = max(anonymous, 1024 * int(sizes.get("RssAnon", 0)))
            time.sleep(0.01)
    if process.returncode:
        raise typer.Exit(process.returncode)
    return Usage(time.perf_counter() - start, peak, anonymous)


def main(
    images: Annotated[int, typer.Option(min=2000)] = 100_000,
    size: Annotated[int, typer.Option(help="Width and height, made and prepared.")] = 84,
    rows: Annotated[int, typer.Option(help="Of a table, instead of images.")] = 0,
    folder: Annotated[Path | None, typer.Option(help="Where there is room.")] = None,
) -> None:
    """Print what preparing takes for a twentieth of the images, and for all of them."""
    with TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        if rows:
            make_table(root / "table.csv", rows)
            report(f"{rows:,} rows", rows, prepare(root / "table.csv", root / "artifacts", TABLE))
            return
        for count in (images // 20, images):
            source = root / f"photographs{count}"
            make_photographs(source, count, size)
            usage = prepare(source, root / "artifacts", (f"image_size={size}", *SETTINGS))
            written = load_prepared(root / "artifacts/prepared").images.nbytes
            report(f"{count:,} images, {written / 1e6:,.0f} MB written", count, usage)


def report(what: str, count: int, usage: Usage) -> None:
    """Print a line of what was prepared and what it took."""
    typer.echo(
        f"{what}: {usage.seconds:.0f} s on "
        f"{available_cpus()} processors ({count / usage.seconds:,.0f} a second), "
        f"peak {usage.peak / 2**20:,.0f} MiB resident, "
        f"{usage.peak_anonymous / 2**20:,.0f} MiB of it anonymous"
    )


if __name__ == "__main__":
    typer.run(main)
