"""The server's settings: limits of one request and of all together."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from reptile.errors import InputError

Positive = Annotated[int, Field(ge=1, le=2**53)]
Seconds = Annotated[float, Field(gt=0, le=3600)]
HOST_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*|[0-9a-f:.]+")
WITHIN = (
    ("max_json_bytes", "max_body_bytes"),
    ("max_body_bytes", "max_held_bytes"),
    ("max_image_pixels", "max_request_pixels"),
    ("body_seconds", "request_seconds"),
)
"""Limits of which the first has no effect beyond the second."""


class ServeSettings(BaseModel):
    """The server's limits; the defaults suit a machine of two cores and a gigabyte."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    tasks: Path | None = None
    """Folder that keeps adapted tasks over a restart; without one they are lost."""
    hosts: tuple[str, ...] = ()
    """Host names, separated by commas, under which the server may be used without a token, such as
    a proxy's; localhost, IP addresses and --host are always allowed."""
    max_tasks: Positive = 1000
    """Maximum number of adapted tasks; the least recently used is deleted first."""
    max_task_bytes: Positive = 2**29
    """Maximum size of all adapted tasks in bytes, in memory and on disk."""
    task_days: Annotated[float, Field(gt=0, le=36_500)] = 30.0
    """Days after which a task expires."""
    adaptations: Annotated[int, Field(ge=1, le=1024)] = 1
    """Maximum concurrent adaptations, each on one thread."""
    waiting_adaptations: Annotated[int, Field(ge=0, le=2**53)] = 8
    """Maximum adaptations that wait; further ones get 429."""
    waiting_images: Positive = 10_000
    """Maximum images, rows or other inputs that wait for a prediction; further ones get 429."""
    request_seconds: Seconds = 60.0
    """Maximum seconds from the first byte of a request to its answer."""
    body_seconds: Seconds = 20.0
    """Maximum seconds for a client to send a body."""
    max_body_bytes: Positive = 2**24
    """Maximum size of a body in bytes, such as a form of image files."""
    max_json_bytes: Positive = 2**23
    """Maximum size of a JSON body or a CSV file in bytes; parsed, it takes about 20 times as much
    memory."""
    max_held_bytes: Positive = 2**27
    """Maximum size in bytes of the bodies of all requests in progress."""
    max_image_pixels: Positive = 2**24
    """Maximum pixels of one image file."""
    max_request_pixels: Positive = 2**26
    """Maximum pixels of all image files of one request."""
    max_images: Positive = 1000
    """Maximum images, rows or other inputs in one request."""
    connections: Positive = 500
    """Maximum concurrent requests; further ones get 503. At most twice as many connections are
    kept open."""

    @property
    def largest_body(self) -> int:
        """Bytes of the largest body that is ever taken."""
        return min(self.max_body_bytes, self.max_held_bytes)

    @field_validator("hosts", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip().lower() for part in value.split(",") if part.strip())
        return value

    @field_validator("hosts")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not HOST_NAME.fullmatch(host):
                raise ValueError(
                    f"{host!r} is no host name: give names alone, such as shop.example, without "
                    "scheme, port or wildcard, others than ASCII as xn--…"
                )
        return hosts

    @model_validator(mode="after")
    def _check_within(self) -> Self:
        for inner, outer in WITHIN:
            value, limit = getattr(self, inner), getattr(self, outer)
            if inner in self.model_fields_set and value > limit:
                raise ValueError(f"{inner} = {value} is above {outer} = {limit}: raise that too")
        return self


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
        if not value.strip():
            raise InputError(f"{change!r}: give a value, or leave the setting out")
        values[name] = value
    try:
        return ServeSettings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise InputError(
                f"{name}: no such setting; `reptile serve --bounds` lists them"
            ) from None
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{name} = {first['input']}: {message}" if name else message) from None
