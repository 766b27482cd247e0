"""Choosing an engine, and building the kernel: once, privately, and with a way out."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from reptile.errors import InputError, PlatformError
from reptile.learn.engines import EagerEngine, make_engine
from reptile.learn.engines.batched import BatchedEngine
from reptile.learn.engines.native import BuildError, build
from reptile.models import build_model
from reptile.settings import ModelSettings, OptimizerSettings

SGD = OptimizerSettings(name="sgd", learning_rate=0.05)
MLP = ModelSettings(name="mlp", hidden=(20,))
CPU = torch.device("cpu")


def images(shape: tuple[int, int, int]) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (60, *shape), dtype=np.uint8)


@pytest.mark.usefixtures("kernel")
def test_auto_takes_the_native_engine_and_eager_stays_eager() -> None:
    model, pixels = build_model(MLP, 5, (1, 15, 15)), images((1, 15, 15))
    assert make_engine("auto", model, SGD, pixels, CPU).name.startswith("native")
    assert make_engine("native", model, SGD, pixels, CPU).name.startswith("native")
    assert make_engine("eager", model, SGD, pixels, CPU).name == "eager on cpu"
    cuda = torch.device("cuda")
    assert isinstance(make_engine("auto", model, SGD, pixels, cuda), BatchedEngine)
    with pytest.raises(InputError, match="not on cuda"):
        make_engine("native", model, SGD, pixels, cuda)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with nothing in it, and a small source that builds fast."""
    source = tmp_path / "source" / "kernel.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" __attribute__((visibility("default"))) int one() { return 1; }\n')
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reptile"


def libraries(cache: Path) -> set[str]:
    return {path.name for path in cache.glob("kernel-*.so")}


def test_kernel_is_built_once_and_again_for_other_sources_or_flags(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build.load_kernel().one() == 1
    first = libraries(empty_cache)
    build.load_kernel()
    assert libraries(empty_cache) == first
    build.SOURCE.with_name("part.h").write_text("// another file of the same kernel\n")
    build.load_kernel()
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    build.load_kernel()
    assert len(libraries(empty_cache)) == 3
    assert stat.S_IMODE(empty_cache.stat().st_mode) == 0o700
    assert not list(empty_cache.glob(".kernel-*"))


def test_built_library_serves_where_there_is_no_compiler(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="no-such-compiler"):
        build.load_kernel()
    monkeypatch.delenv("CXX")
    build.load_kernel()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.load_kernel().one() == 1


def test_cache_that_others_can_write_to_is_refused(empty_cache: Path) -> None:
    empty_cache.mkdir(parents=True)
    empty_cache.chmod(0o777)
    with pytest.raises(BuildError, match="other users can write"):
        build.load_kernel()


def test_library_shipped_beside_its_source_needs_neither_compiler_nor_cache(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REPTILE_MARCH", "x86-64-v2")
    build.load_kernel()
    (library,) = empty_cache.glob("kernel-*.so")
    library.rename(build.SOURCE.with_name(library.name))
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no-such-place")  # nobody can write here
    assert build.load_kernel().one() == 1
    build.SOURCE.write_text(f"{build.SOURCE.read_text()}// changed since\n")
    with pytest.raises(BuildError):
        build.load_kernel()


def test_failing_compiler_falls_back_to_eager_with_one_line(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.SOURCE.write_text("int broken( {\n")
    with pytest.raises(BuildError) as raised:
        build.load_kernel()
    assert "error" in str(raised.value) and "\n" not in str(raised.value)
    assert not libraries(empty_cache)

    monkeypatch.setattr("reptile.learn.engines.native._kernel", build.load_kernel)
    model, pixels = build_model(MLP, 5, (1, 15, 15)), images((1, 15, 15))
    fallback = make_engine("auto", model, SGD, pixels, CPU)
    assert isinstance(fallback, EagerEngine)
    assert str(raised.value) in fallback.name
    with pytest.raises(PlatformError, match=r"train\.engine = native: .*error"):
        make_engine("native", model, SGD, pixels, CPU)


def test_two_processes_build_one_library_between_them(empty_cache: Path) -> None:
    compiler = empty_cache.parent.parent / "slow-compiler"
    log = compiler.with_suffix(".log")
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec c++ --version\necho >> {log}\nsleep 1\n'
        'exec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    script = (  # the module by itself: importing its package would import torch
        "from pathlib import Path; import runpy; "
        f"build = runpy.run_path({build.__file__!r}); load = build['load_kernel']; "
        f"load.__globals__['SOURCE'] = Path({str(build.SOURCE)!r}); assert load().one() == 1"
    )
    environment = {**os.environ, "CXX": str(compiler)}
    runs = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(2)]
    assert [run.wait(timeout=60) for run in runs] == [0, 0]
    assert len(log.read_text()) == 1  # lines: one compilation
    assert len(libraries(empty_cache)) == 1
