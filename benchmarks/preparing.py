"""How much memory and time does `reptile prepare` take? On any number of synthetic photographs.

    python -m benchmarks.preparing --images 100000 --folder /somewhere/large

Linux only, as the memory is read from /proc: its peak with all mapped pages (VmHWM), and the peak
of what no file backs (RssAnon, every 10 ms).
"""

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NamedTuple

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


def prepare(source: Path, artifacts: Path, size: int) -> Usage:
    """Run the command in a separate process and watch it."""
    settings = (f"source={source}", f"image_size={size}", *SETTINGS)
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
    folder: Annotated[Path | None, typer.Option(help="Where there is room.")] = None,
) -> None:
    """Print what preparing takes for a twentieth of the images, and for all of them."""
    with TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        for count in (images // 20, images):
            source = root / f"photographs{count}"
            make_photographs(source, count, size)
            usage = prepare(source, root / "artifacts", size)
            written = load_prepared(root / "artifacts/prepared").images.nbytes
            typer.echo(
                f"{count:,} images, {written / 1e6:,.0f} MB written: {usage.seconds:.0f} s on "
                f"{available_cpus()} processors ({count / usage.seconds:,.0f} images/s), "
                f"peak {usage.peak / 2**20:,.0f} MiB resident, "
                f"{usage.peak_anonymous / 2**20:,.0f} MiB of it anonymous"
            )


if __name__ == "__main__":
    typer.run(main)
