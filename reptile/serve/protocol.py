"""The Open Inference Protocol, version 2: its JSON and its binary tensors, as arrays and back.

Checks what the protocol says of tensors; `service` checks the values that a graph takes.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field
from pydantic_core import to_json

from reptile.bundle_format import TensorType
from reptile.errors import InputError

Array = npt.NDArray[Any]

DATATYPES = {"float32": "FP32", "float64": "FP64", "int64": "INT64", "bool": "BOOL"}
EXTENSIONS = ("binary_tensor_data",)
_NAMES = {np.dtype(dtype): datatype for dtype, datatype in DATATYPES.items()}
_KINDS = {"FP32": "iuf", "FP64": "iuf", "INT64": "iu", "BOOL": "b", "UINT8": "iu"}
_DTYPES = {"FP32": "float32", "FP64": "float64", "INT64": "int64", "BOOL": "bool", "UINT8": "uint8"}


class TensorParameters(BaseModel):
    """Of one tensor that is sent."""

    binary_data_size: Annotated[int, Field(ge=0)] | None = None
    """Bytes of the values, if they come after the JSON: row-major, little-endian."""


class InputTensor(BaseModel):
    """One input of an inference request."""

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=8)]
    datatype: str
    data: Any = None
    """The values, flat or nested, in row-major order; left out if they are binary."""
    parameters: TensorParameters | None = None


class OutputParameters(BaseModel):
    """Of one output that is wanted."""

    binary_data: bool = False
    """Whether the values are to come after the JSON."""


class RequestedOutput(BaseModel):
    """One output that is wanted."""

    name: str
    parameters: OutputParameters | None = None


class RequestParameters(BaseModel):
    """Of the whole request."""

    binary_data_output: bool = False
    """Whether the values of all outputs are to come after the JSON, if no output is named."""


class InferenceRequest(BaseModel):
    """The body of `infer`."""

    id: Annotated[str, Field(max_length=200)] | None = None
    inputs: Annotated[list[InputTensor], Field(max_length=16)]
    outputs: Annotated[list[RequestedOutput], Field(max_length=16)] | None = None
    """All outputs, if none is named."""
    parameters: RequestParameters | None = None


class OutputTensor(BaseModel):
    """One output of an inference response."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    """The values in row-major order, unless they are binary."""
    parameters: TensorParameters | None = None


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


def read_inputs(
    request: InferenceRequest, expected: Mapping[str, TensorType], binary: memoryview
) -> dict[str, Array]:
    """Return the request's tensors by name, of the types and shapes that are expected.

    Args:
        request: the JSON.
        expected: the model's inputs.
        binary: what came after the JSON: the binary tensors, in the order of the inputs.

    Raises:
        InputError: a tensor is missing, unknown, given twice, or not as expected.
    """
    given = [tensor.name for tensor in request.inputs]
    if sorted(given) != sorted(expected):
        raise InputError(
            f"inputs are {', '.join(given)[:200] or 'none'}: give each of "
            f"{', '.join(expected)} once"
        )
    found, start = {}, 0
    for tensor in request.inputs:
        size = _binary_size(tensor) or 0
        found[tensor.name] = _read(tensor, expected[tensor.name], binary[start : start + size])
        start += size
    if start != len(binary):
        raise InputError(
            f"{len(binary)} bytes after the JSON: the inputs' binary_data_size make {start}"
        )
    return found


def _binary_size(tensor: InputTensor) -> int | None:
    return tensor.parameters.binary_data_size if tensor.parameters else None


def _read(tensor: InputTensor, expected: TensorType, binary: memoryview) -> Array:
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
    dtype = np.dtype(_DTYPES[tensor.datatype])
    size = _binary_size(tensor)
    if (size is None) == (tensor.data is None):
        raise InputError(f"{name}: give its values as data, or their binary_data_size")
    if size is not None:
        if size != math.prod(shape) * dtype.itemsize or size != len(binary):
            raise InputError(
                f"{name}: {len(binary)} bytes of the binary_data_size {size} came; the shape "
                f"{list(shape)} of {tensor.datatype} takes {math.prod(shape) * dtype.itemsize}"
            )
        return np.frombuffer(binary, dtype.newbyteorder("<")).astype(dtype).reshape(shape)
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
    return values.astype(dtype).reshape(shape)


def write_outputs(
    request: InferenceRequest, model: str, found: Mapping[str, Array]
) -> tuple[bytes, bytes]:
    """Return the outputs that were asked for: an InferenceResponse, and what comes after it.

    Raises:
        InputError: one is asked for that there is not, or twice.
    """
    after = bool(request.parameters and request.parameters.binary_data_output)
    binary = dict.fromkeys(found, after)
    if request.outputs:
        binary = {
            output.name: bool(output.parameters and output.parameters.binary_data)
            for output in request.outputs
        }
    asked = [output.name for output in request.outputs or ()]
    if len(binary) < len(asked) or not set(binary) <= set(found):
        names = ", ".join(asked)
        raise InputError(f"outputs {names[:200]}: ask for some of {', '.join(found)}, each once")
    outputs, contents = [], []
    for name, as_bytes in binary.items():
        values = found[name]
        output: dict[str, Any] = {
            "name": name,
            "shape": values.shape,
            "datatype": _NAMES[values.dtype],
        }
        if as_bytes:
            contents.append(values.astype(values.dtype.newbyteorder("<")).tobytes())
            output["parameters"] = {"binary_data_size": len(contents[-1])}
        else:
            output["data"] = values.ravel().tolist()
        outputs.append(output)
    response = {"model_name": model, "model_version": "1", "outputs": outputs}
    if request.id is not None:
        response["id"] = request.id
    return to_json(response), b"".join(contents)
