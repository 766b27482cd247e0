"""A graph whose inputs become constants; the only module of the runtime that needs onnx."""

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from reptile.errors import InputError


def with_constants(graph: bytes, constants: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Return an ONNX file like `graph` in which some inputs have become constants.

    Args:
        graph: an ONNX file's content.
        constants: a value for each of these inputs, by name.

    Raises:
        InputError: the package onnx is absent.
    """
    try:
        onnx = importlib.import_module("onnx")
    except ImportError as error:
        raise InputError(
            f"a graph with constant weights needs onnx ({error}): pip install onnx"
        ) from error
    model = onnx.load_model_from_string(graph)
    inputs = [each for each in model.graph.input if each.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
        for name, value in constants.items()
    )
    return bytes(model.SerializeToString())
