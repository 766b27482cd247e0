"""Reading requests' bodies, each bounded before it is parsed, the large ones off the event loop."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import numpy.typing as npt
from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar
from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from reptile.errors import InputError
from reptile.images import decode, fit
from reptile.serve.errors import told
from reptile.serve.service import Service

Array = npt.NDArray[Any]
Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")
MAX_LABEL = 200  # characters
SCHEMAS = "#/components/schemas/{model}"
LARGE = 2**16  # bytes of a body that is parsed in a thread of its own


def described_body(kinds: dict[str, type[BaseModel] | None]) -> dict[str, Any]:
    """Describe a body that is read by hand, so that nothing is parsed before it is bounded."""
    files = {
        "type": "object",
        "additionalProperties": {"type": "string", "format": "binary"},
        "minProperties": 1,
    }
    content = {
        kind: {"schema": {"$ref": SCHEMAS.format(model=model.__name__)} if model else files}
        for kind, model in kinds.items()
    }
    return {"requestBody": {"required": True, "content": content}}


async def json_body(request: Request, service: Service) -> bytes:
    """Return a body that is JSON, bounded in size."""
    body, most = await whole_body(request), service.settings.max_json_bytes
    if len(body) > most:
        raise HTTPException(
            413, f"JSON of more than {most} bytes: send image files as a form, or fewer images"
        )
    return body


async def whole_body(request: Request) -> bytes:
    """Return a body, which the guard has bounded; Request.body does the same more slowly."""
    parts, more = [], True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def parse(kind: type[Model], body: bytes) -> Model:
    """Read JSON.

    Raises:
        HTTPException: not JSON.
        InputError: values that do not belong there.
    """
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"the body is no JSON: {str(error)[:200]}") from None
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(told(error.errors(include_url=False, include_input=False))) from None


async def apart(size: int, work: Callable[[], Result]) -> Result:
    """Run what takes long for large bodies in a thread, so that others are answered meanwhile."""
    return await to_thread.run_sync(work, limiter=_few()) if size > LARGE else work()


async def unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Wait for what takes long; stop if the client hangs up. The body must have been read.

    Raises:
        ClientDisconnect: it did.
    """
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


_LIMITER: RunVar[CapacityLimiter] = RunVar("large bodies")


def _few() -> CapacityLimiter:
    """Return what lets two large bodies be read at a time: they grow, and take the processor."""
    try:
        return _LIMITER.get()
    except LookupError:
        _LIMITER.set(CapacityLimiter(2))
        return _LIMITER.get()


def is_form(request: Request) -> bool:
    """Return whether the body is a form of files, or else JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return True
    if kind not in ("application/json", ""):
        raise HTTPException(
            415, f"content-type {kind[:100]!r}: send application/json or multipart/form-data"
        )
    return False


async def read_files(request: Request, service: Service) -> list[tuple[str, Array]]:
    """Return the form's image files as (field name, pixels [C, H, W])."""
    settings = service.settings
    async with request.form(max_files=settings.max_images, max_fields=16) as form:
        contents: list[tuple[str, str, bytes]] = []
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                raise InputError(
                    f"field {name[:100]!r} is text: send image files, as -F NAME=@FILE"
                )
            if len(name) > MAX_LABEL:
                raise InputError(f"a field's name has {len(name)} characters: at most {MAX_LABEL}")
            contents.append((name, value.filename or name, await value.read()))
    if not contents:
        raise InputError("no images: send one or more files, as -F NAME=@FILE")

    def decoded() -> list[tuple[str, Array]]:
        found, left = [], settings.max_request_pixels
        until = time.monotonic() + settings.request_seconds
        for name, file, content in contents:
            if time.monotonic() > until:
                raise TimeoutError(
                    f"the images were not read within {settings.request_seconds:g} s"
                )
            image = decode(file[:200], content, min(left, settings.max_image_pixels))
            left -= image.width * image.height
            found.append((name, fit(image, service.model.image_shape)))
        return found

    return await to_thread.run_sync(decoded, limiter=_few())
