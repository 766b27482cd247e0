"""The server's limits: what one request, and all together, may ask for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reptile.errors import InputError

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, le=3600)]


class ServeSettings(BaseModel):
    """Every bound has a default that suits a machine of two cores and a gigabyte."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tasks: Path | None = None
    """Folder that keeps taught tasks over a restart; None forgets them."""
    max_tasks: Positive = 1000
    """Taught tasks that are kept; the one used longest ago is forgotten first."""
    max_task_bytes: Positive = 2**29
    """All taught tasks together, in memory and on disk."""
    task_days: Annotated[float, Field(gt=0)] = 30.0
    """A task is forgotten so long after it was taught."""
    adaptations: Positive = 1
    """Adaptations at the same time, each on one thread."""
    waiting_adaptations: Annotated[int, Field(ge=0)] = 8
    """More than these are refused at once (429)."""
    waiting_images: Positive = 10_000
    """Images that may wait for a prediction; more are refused at once (429)."""
    request_seconds: Seconds = 60.0
    """From a request's first byte to its answer."""
    body_seconds: Seconds = 20.0
    """For a client to send a whole body."""
    max_body_bytes: Positive = 2**24
    """Of one request; image files, mostly."""
    max_json_bytes: Positive = 2**23
    """Of one request in JSON, which grows twentyfold when it is read."""
    max_held_bytes: Positive = 2**27
    """Of all requests that are being received or answered."""
    max_image_pixels: Positive = 2**24
    """Of one uploaded image file, before it is fitted."""
    max_request_pixels: Positive = 2**26
    """Of all image files of one request."""
    max_images: Positive = 1000
    """In one request."""
    connections: Positive = 500
    """Requests at the same time, of which more are answered 503; and half of all connections."""


def changed(tasks: Path | None, changes: Sequence[str]) -> ServeSettings:
    """Return the defaults with `NAME=VALUE` changes.

    Raises:
        InputError: an unknown name, or a value that it cannot have.
    """
    values: dict[str, str | Path | None] = {"tasks": tasks}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise InputError(f"{change!r}: write NAME=VALUE, such as max_tasks=100")
        values[name] = value
    try:
        return ServeSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise InputError(
                f"{name}: no such bound; `reptile serve --bounds` lists them"
            ) from None
        raise InputError(f"{name} = {first['input']}: {first['msg']}") from None
