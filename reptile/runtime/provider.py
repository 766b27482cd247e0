"""Importing ONNX Runtime, and sessions on the requested execution provider.

The only module of the runtime that imports onnxruntime.
"""

import importlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from threading import Timer
from typing import Any

from reptile.errors import InputError

CPU = "CPUExecutionProvider"
# Both provide the module `onnxruntime` and overwrite each other's files.
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu")


def load_onnxruntime() -> Any:
    """Import the module onnxruntime.

    Raises:
        InputError: it is absent or broken, or both of its distributions are installed.
    """
    if len(present := [name for name in _DISTRIBUTIONS if _is_installed(name)]) > 1:
        raise InputError(
            f"{' and '.join(present)} are both installed and overwrite each other's files: "
            "pip uninstall both, then install the one you need"
        )
    try:
        module = importlib.import_module("onnxruntime")
        _ = module.InferenceSession  # an uninstall can leave an empty folder that still imports
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"ONNX Runtime cannot be imported ({error}): "
            "pip install onnxruntime (or onnxruntime-gpu for CUDA), never both"
        ) from error
    return module


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def open_session(
    graph: bytes, name: str, *, threads: int = 1, providers: Sequence[str] | None = None
) -> Any:
    """Open an InferenceSession on a graph's bytes; no other file is read.

    The CUDA path follows ONNX Runtime's documentation and has not been verified on hardware.

    Args:
        graph: the ONNX file's content, weights included.
        name: its name in error messages.
        threads: threads one operator may use, at least 1.
        providers: execution providers by preference; None means CPU.

    Raises:
        InputError: a provider is not available (never a silent fall-back to CPU), or the graph
            cannot be opened.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise InputError(f"threads must be an integer of at least 1, got {threads!r}")
    ort = load_onnxruntime()
    wanted = _wanted_providers(providers, ort.get_available_providers())
    if "CUDAExecutionProvider" in wanted:
        ort.preload_dlls()  # finds the CUDA libraries that pip installed
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = ort.InferenceSession(graph, options, providers=wanted, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no other base class
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"onnxruntime {ort.__version__} cannot open the graph {name!r} on {wanted}: {reason}"
        ) from error
    if missing := [provider for provider in wanted if provider not in session.get_providers()]:
        raise InputError(
            f"{', '.join(missing)} did not start (see ONNX Runtime's log above; for CUDA the "
            f"driver, CUDA and cuDNN versions must match this build): fix that, or use {CPU}"
        )
    return session


def run_within(
    session: Any, outputs: Sequence[str], feeds: Mapping[str, Any], seconds: float | None
) -> list[Any]:
    """Run a session, with a time limit.

    Args:
        session: what `open_session` returned.
        outputs: names of the outputs wanted.
        feeds: arrays by input name.
        seconds: the time limit; None for no limit.

    Raises:
        TimeoutError: the time is up.
    """
    if seconds is None:
        return list(session.run(outputs, feeds))
    if seconds <= 0:
        raise TimeoutError(f"not done within {seconds:g} s")
    options = load_onnxruntime().RunOptions()
    timer = Timer(seconds, setattr, (options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        return list(session.run(outputs, feeds, options))
    except Exception as error:
        if options.terminate:
            raise TimeoutError(f"not done within {seconds:g} s") from error
        raise
    finally:
        timer.cancel()


def _wanted_providers(providers: Sequence[str] | None, available: Sequence[str]) -> list[str]:
    wanted = [providers] if isinstance(providers, str) else list(providers or [CPU])
    if absent := [name for name in wanted if name not in available]:
        raise InputError(
            f"execution provider {', '.join(map(repr, absent))} is not in this ONNX Runtime "
            f"(it has {', '.join(available)}): choose one of these, "
            "or install the build that has it, such as onnxruntime-gpu"
        )
    return wanted
