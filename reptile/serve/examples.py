"""Reading examples and queries: images, rows of a table or other inputs, as JSON, CSV or files."""

import math
from collections.abc import Iterable
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from reptile.bundle_format import Column
from reptile.errors import InputError
from reptile.runtime.columns import check_rows, check_values
from reptile.runtime.inputs import check_points
from reptile.serve.csv_rows import Table, read_csv
from reptile.serve.errors import first_error
from reptile.serve.request_body import (
    MAX_LABEL,
    body_type,
    csv_body,
    in_thread_if_large,
    json_body,
    parse,
    read_files,
)
from reptile.serve.service import Service
from reptile.serve.task_store import normal

Array = npt.NDArray[Any]


def _read_label(label: Any) -> Any:
    """Return a label as every client reads it: in Unicode's form NFC, and 1.0 as 1."""
    if isinstance(label, str):
        label = normal(label)
    elif isinstance(label, float) and label.is_integer() and abs(label) < 2**53:
        label = int(label)
    if (
        not isinstance(label, str | int | float)
        or (isinstance(label, float) and not math.isfinite(label))  # 1e400
        or len(str(label)) > MAX_LABEL
    ):
        raise PydanticCustomError(
            "label", f"a label is text of at most {MAX_LABEL} characters, a number, true or false"
        )
    return label


Label = Annotated[str | int | bool | float, BeforeValidator(_read_label)]
LABELS = TypeAdapter(list[Label])


class Options(BaseModel):
    """Options of an adaptation, as query parameters or in JSON."""

    steps: int | None = None
    learning_rate: float | None = None
    seed: int | None = None


class Level(BaseModel):
    """The option of a prediction, as a query parameter or in JSON."""

    level: float | None = None
    """The probability of a regressor's intervals; see `Service.predict`."""


class Inputs(BaseModel):
    """Inputs, as JSON: one of the keys, by what the bundle takes."""

    model_config = ConfigDict(extra="allow")  # `_check_keys` refuses others

    images: list[Any] | None = None
    """[N, C, H, W], or [N, H, W] where C is 1; pixels 0..255."""
    rows: list[dict[str, Any]] | None = None
    """Of a table: values by the names of their columns."""
    inputs: list[Any] | None = None
    """[N, ...]: other numbers."""


class Queries(Inputs, Level):
    """What to predict for, as JSON."""


class Examples(Inputs):
    """Inputs and what is to be learnt of each, as JSON; rows hold it themselves."""

    labels: list[Label] | None = None
    """The label of each image or other input."""
    values: list[Any] | None = None
    """[N, outputs], or [N] of a single output: the values of each input of a regressor."""


class Support(Examples, Options):
    """A support set, as JSON."""


class ReadExamples(NamedTuple):
    """Examples, as the service takes them."""

    inputs: Array  # as `Service.inputs` returns them
    targets: Any  # a list of labels; or values [N, outputs]
    options: dict[str, Any]  # of the body


class ReadQueries(NamedTuple):
    """What to predict for, as the service takes it."""

    inputs: Array  # as `Service.inputs` returns them
    level: float | None = None  # of the body


async def read_examples(request: Request, service: Service, kind: type[Examples]) -> ReadExamples:
    """Read a request's inputs, and their labels or values.

    Raises:
        HTTPException, InputError: a body that cannot be read or used.
    """
    if service.takes == "images" and body_type(request, service) == "form":
        files = await read_files(request, service)
        images = np.stack([image for _, image in files])
        return ReadExamples(images, [name for name, _ in files], {})
    label = request.query_params.get("label", "label")
    content, is_csv = await _content(request, service)

    def read() -> ReadExamples:
        if is_csv:
            names = service.targets if service.predicts_values else [Column(label, "category", ())]
            table = _table(content, service, names)
            inputs = _table_inputs(table, service)
            if service.predicts_values:
                return ReadExamples(inputs, check_values(table, service.targets, "rows"), {})
            given = table.get(label, [None] * len(inputs))
            return ReadExamples(inputs, _labels(given, label, service), {})
        body = parse(kind, content)
        needed: list[str] = [service.takes]
        if service.takes != "rows":
            needed.append("values" if service.predicts_values else "labels")
        _check_keys(body, needed)
        inputs = service.inputs(getattr(body, service.takes))
        options = body.model_dump(include=set(Options.model_fields), exclude_none=True)
        return ReadExamples(inputs, _targets(body, service, label), options)

    return await in_thread_if_large(len(content), read)


async def read_queries(request: Request, service: Service) -> ReadQueries:
    """Read a request's inputs.

    Raises:
        HTTPException, InputError: a body that cannot be read or used.
    """
    if service.takes == "images" and body_type(request, service) == "form":
        files = await read_files(request, service)
        return ReadQueries(np.stack([image for _, image in files]))
    content, is_csv = await _content(request, service)

    def read() -> ReadQueries:
        if is_csv:
            return ReadQueries(_table_inputs(_table(content, service, []), service))
        body = parse(Queries, content)
        _check_keys(body, [service.takes])
        return ReadQueries(service.inputs(getattr(body, service.takes)), body.level)

    return await in_thread_if_large(len(content), read)


async def _content(request: Request, service: Service) -> tuple[bytes, bool]:
    """Return JSON or CSV, and whether it is CSV."""
    if body_type(request, service) == "json":
        return await json_body(request, service), False
    return await csv_body(request, service), True


def _table(content: bytes, service: Service, targets: Iterable[Column]) -> Table:
    columns = {column.name: column.kind for column in (*targets, *service.columns)}
    return read_csv(content, columns, service.settings.max_images)


def _table_inputs(table: Table, service: Service) -> Array:
    """Return the inputs of a CSV file's rows, as `Service.inputs` does.

    Raises:
        InputError: no such columns, none or too many rows, or a value that cannot be used.
    """
    check = check_rows if service.takes == "rows" else check_values  # rows may have missing values
    numbers = check(table, service.columns, "rows")
    return service.inputs(numbers.reshape(len(numbers), *service.model.bundle.image_shape))


def _check_keys(body: Inputs, needed: list[str]) -> None:
    keys = [key for key in Examples.model_fields if getattr(body, key, None) is not None]
    given = [*keys, *(body.model_extra or {})]
    if sorted(given) != sorted(needed):
        raise InputError(
            f"the body has {' and '.join(given)[:200] or 'no inputs'}: this bundle needs "
            f"{' and '.join(needed)}"
        )


def _targets(body: Examples, service: Service, label: str) -> Any:
    """Return a label of each input, or the values [N, outputs]."""
    bundle = service.model.bundle
    if service.takes != "rows":
        if not service.predicts_values:
            return body.labels
        return check_points(body.values or [], (bundle.outputs,), "values")
    rows = body.rows or []
    if service.predicts_values:
        return check_values(rows, bundle.targets, "rows")
    return _labels([row.get(label) for row in rows], label, service)


def _labels(given: list[Any], label: str, service: Service) -> list[Label]:
    """Return the labels of rows, given the column of this name."""
    if label in {column.name for column in service.columns}:
        raise InputError(f"column {label!r} is an input: name that of the labels with label=NAME")
    if None in given:
        raise InputError(
            f"rows: row {given.index(None)} has no {label[:50]!r}, its label; name another column "
            "with label=NAME"
        )
    try:
        return LABELS.validate_python(given)
    except ValidationError as error:
        raise InputError(f"column {label!r}: {first_error(error)}") from None
