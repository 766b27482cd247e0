import importlib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest

from reptile.errors import InputError
from reptile.runtime import FewShotModel
from reptile.runtime.provider import CPU, load_onnxruntime, open_session

CUDA = "CUDAExecutionProvider"


@pytest.fixture
def graph(bundle: Path) -> bytes:
    return (bundle / "predict_adapted/1/model.onnx").read_bytes()


def test_one_distribution_gives_the_module() -> None:
    assert load_onnxruntime() is onnxruntime


def test_both_distributions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    with pytest.raises(InputError, match="onnxruntime and onnxruntime-gpu are both installed"):
        load_onnxruntime()


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a broken library"])
def test_no_usable_distribution_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    def import_module(name: str) -> Any:
        if left == "an empty folder":
            return SimpleNamespace()
        raise ModuleNotFoundError(name) if left == "nothing" else ImportError("libcudart.so")

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(InputError, match=r"cannot be imported.*pip install onnxruntime"):
        load_onnxruntime()


def test_a_provider_this_build_lacks_is_refused(bundle: Path) -> None:
    with pytest.raises(InputError, match=r"'NoSuchProvider' is not in this ONNX Runtime.*CPUExec"):
        FewShotModel.load(bundle, providers=[CPU, "NoSuchProvider"])


class FakeRuntime:
    """An ONNX Runtime whose CUDA provider is built in, but starts only where `starts` says."""

    __version__ = "0"
    SessionOptions = SimpleNamespace

    def __init__(self, starts: bool) -> None:
        self.starts, self.preloaded = starts, False
        self.InferenceSession = self.open

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU]

    def preload_dlls(self) -> None:
        self.preloaded = True

    def open(self, graph: bytes, options: Any, providers: list[str], enable_fallback: int) -> Any:
        assert enable_fallback == 0 and self.preloaded == (CUDA in providers)
        return SimpleNamespace(get_providers=lambda: [CUDA, CPU] if self.starts else [CPU])


@pytest.mark.parametrize("starts", [True, False])
def test_cuda_that_does_not_start_is_never_replaced_by_the_cpu(
    monkeypatch: pytest.MonkeyPatch, starts: bool
) -> None:
    runtime = FakeRuntime(starts)
    monkeypatch.setattr("reptile.runtime.provider.load_onnxruntime", lambda: runtime)
    if starts:
        assert CUDA in open_session(b"", "adapt", providers=[CUDA]).get_providers()
        return
    with pytest.raises(InputError, match=f"{CUDA} did not start.*or use {CPU}"):
        open_session(b"", "adapt", providers=[CUDA])


def test_the_cpu_needs_no_cuda_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime(starts=False)
    monkeypatch.setattr("reptile.runtime.provider.load_onnxruntime", lambda: runtime)
    open_session(b"", "adapt")
    assert not runtime.preloaded


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "2"])
def test_threads_are_a_positive_integer(graph: bytes, threads: Any) -> None:
    with pytest.raises(InputError, match="threads must be an integer of at least 1"):
        open_session(graph, "predict_adapted", threads=threads)


def test_threads_reach_the_session(graph: bytes) -> None:
    session = open_session(graph, "predict_adapted", threads=2)
    assert session.get_session_options().intra_op_num_threads == 2
    assert session.get_providers() == [CPU]
