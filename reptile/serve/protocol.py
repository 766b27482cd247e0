"""The Open Inference Protocol, version 2: its JSON, as arrays and back.

Checks what the protocol says of tensors; what a graph says of its values is `models`' business.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field

from reptile.errors import InputError
from reptile.runtime.bundle import TensorType

Array = npt.NDArray[Any]

DATATYPES = {"float32": "FP32", "int64": "INT64", "bool": "BOOL"}
_KINDS = {"FP32": "iuf", "INT64": "iu", "BOOL": "b", "UINT8": "iu"}
_DTYPES = {"FP32": "float32", "INT64": "int64", "BOOL": "bool", "UINT8": "uint8"}


class InputTensor(BaseModel):
    """One input of an inference request."""

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=8)]
    datatype: str
    data: Any
    """The values, flat or nested, in row-major order."""
    parameters: dict[str, Any] = {}


class RequestedOutput(BaseModel):
    """One output that is wanted."""

    name: str
    parameters: dict[str, Any] = {}


class InferenceRequest(BaseModel):
    """The body of `infer`."""

    id: Annotated[str, Field(max_length=200)] | None = None
    inputs: Annotated[list[InputTensor], Field(max_length=16)]
    outputs: Annotated[list[RequestedOutput], Field(max_length=16)] = []
    """All outputs, if none is named."""
    parameters: dict[str, Any] = {}


class OutputTensor(BaseModel):
    """One output of an inference response."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any]


class InferenceResponse(BaseModel):
    """The answer of `infer`."""

    model_name: str
    model_version: str = "1"
    id: str | None = None
    outputs: list[OutputTensor]


class ServerMetadata(BaseModel):
    """What serves."""

    name: str
    version: str
    extensions: list[str] = []


class TensorMetadata(BaseModel):
    """A tensor's name, datatype, and shape with -1 for a size that may vary."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """What a model takes and gives."""

    name: str
    versions: list[str] = ["1"]
    platform: str = "onnxruntime_onnx"
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


def metadata(tensors: Mapping[str, TensorType]) -> list[TensorMetadata]:
    """Describe tensors as the protocol does."""
    return [
        TensorMetadata(
            name=name,
            datatype=DATATYPES[tensor.dtype],
            shape=[-1 if size is None else size for size in tensor.shape],
        )
        for name, tensor in tensors.items()
    ]


def read_inputs(request: InferenceRequest, expected: Mapping[str, TensorType]) -> dict[str, Array]:
    """Return the request's tensors by name, of the types and shapes that are expected.

    Raises:
        InputError: a tensor is missing, unknown, given twice, or not as expected.
    """
    given = [tensor.name for tensor in request.inputs]
    if sorted(given) != sorted(expected):
        raise InputError(
            f"inputs are {', '.join(given)[:200] or 'none'}: give each of "
            f"{', '.join(expected)} once"
        )
    return {tensor.name: _read(tensor, expected[tensor.name]) for tensor in request.inputs}


def _read(tensor: InputTensor, expected: TensorType) -> Array:
    name, wanted = tensor.name, DATATYPES[expected.dtype]
    allowed = (wanted, "UINT8") if wanted == "FP32" else (wanted,)  # pixels come as either
    if tensor.datatype not in allowed:
        raise InputError(f"{name}: datatype {tensor.datatype[:20]!r}, use {' or '.join(allowed)}")
    shape = tuple(tensor.shape)
    if expected.shape == () and shape == (1,):  # Triton knows no tensor without dimensions
        shape = ()
    if len(shape) != len(expected.shape) or any(
        want is not None and want != size for want, size in zip(expected.shape, shape, strict=True)
    ):
        raise InputError(f"{name}: shape {list(shape)}, expected {expected}")
    try:
        values = np.asarray(tensor.data)
    except (ValueError, OverflowError):
        raise InputError(f"{name}: data is neither flat nor nested evenly") from None
    if values.size != math.prod(shape):
        raise InputError(
            f"{name}: {values.size} values for the shape {list(shape)}, "
            f"which holds {math.prod(shape)}"
        )
    if values.size and values.dtype.kind not in _KINDS[tensor.datatype]:
        raise InputError(f"{name}: values that are not {tensor.datatype}")
    if tensor.datatype == "UINT8" and values.size and not 0 <= values.min() <= values.max() <= 255:
        raise InputError(f"{name}: UINT8 values lie in 0..255")
    return values.astype(_DTYPES[tensor.datatype]).reshape(shape)


def write_outputs(
    request: InferenceRequest, model: str, found: Mapping[str, Array]
) -> InferenceResponse:
    """Return the outputs that were asked for.

    Raises:
        InputError: one is asked for that there is not, or twice.
    """
    names = [output.name for output in request.outputs] or list(found)
    if len(set(names)) != len(names) or not set(names) <= set(found):
        raise InputError(
            f"outputs {', '.join(names)[:200]}: ask for some of {', '.join(found)}, each once"
        )
    outputs = [
        OutputTensor(
            name=name,
            shape=list(found[name].shape),
            datatype=DATATYPES[str(found[name].dtype)],
            data=found[name].ravel().tolist(),
        )
        for name in names
    ]
    return InferenceResponse(model_name=model, id=request.id, outputs=outputs)
