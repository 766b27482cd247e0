"""Reading requests' bodies, each bounded before it is parsed, the large ones off the event loop."""

import asyncio
import codecs
import re
import time
from collections.abc import Callable, Coroutine
from typing import Any, Literal, TypeVar

import numpy.typing as npt
from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from reptile.errors import InputError
from reptile.images import decode, fit
from reptile.serve.errors import first_error
from reptile.serve.service import Service
from reptile.serve.task_store import normal

Array = npt.NDArray[Any]
BodyType = Literal["json", "form", "csv"]
TYPES: dict[str, BodyType] = {
    "": "json",
    "application/json": "json",
    "multipart/form-data": "form",
    "text/csv": "csv",
}
Model = TypeVar("Model", bound=BaseModel)
Result = TypeVar("Result")
MAX_LABEL = 200  # characters
CHARSET = re.compile(r";\s*charset\s*=\s*\"?([^\s;\"]*)")
# Clients of old write \ before a quotation mark and a backslash; others %22, and nothing.
AMBIGUOUS = re.compile(rb'[; ]name="[^"]*\\(?:\\|";|"$)')
LARGE = 2**16  # bytes of a body that is parsed in a thread of its own


async def json_body(request: Request, service: Service) -> bytes:
    """Return a body that is JSON, bounded in size."""
    body, most = await whole_body(request), service.settings.max_json_bytes
    if len(body) > most:
        way_out = (
            "image files as a form, or fewer images" if service.takes == "images" else "fewer rows"
        )
        raise HTTPException(413, f"JSON of more than {most} bytes: send {way_out}")
    return body


async def csv_body(request: Request, service: Service) -> bytes:
    """Return the content of a CSV file, sent as the body or as the one file of a form."""
    if body_type(request, service) == "csv":
        content = await whole_body(request)
    else:
        files = await form_files(request, 2)
        if len(files) != 1:
            raise InputError(f"the form has {len(files)} files: send one, as -F rows=@FILE")
        ((_, _, content),) = files
    if len(content) > (most := service.settings.max_json_bytes):
        raise HTTPException(413, f"CSV of more than {most} bytes: send fewer rows")
    return content


async def whole_body(request: Request) -> bytes:
    """Return a body, which the middleware bounds; Request.body does the same more slowly."""
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
        InputError: values that do not fit the model.
    """
    try:
        values = from_json(body.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False)
    except ValueError as error:
        raise HTTPException(400, f"the body is not JSON: {str(error)[:200]}") from None
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(first_error(error)) from None


async def in_thread_if_large(size: int, work: Callable[[], Result]) -> Result:
    """Run `work` on `size` bytes; in a thread if they are many, so as not to block others."""
    return await to_thread.run_sync(work, limiter=_few()) if size > LARGE else work()


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Wait for what takes long; stop if the client hangs up. The body must have been read.

    Raises:
        ClientDisconnect: it did.
    """
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
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


def body_type(request: Request, service: Service) -> BodyType:
    """Return what the body is by its content type, if this bundle's inputs may come as that."""
    given = request.headers.get("content-type", "").lower()
    name = given.partition(";")[0].strip()
    charset = CHARSET.search(given)
    if charset and charset[1] not in ("utf-8", "utf8", "us-ascii"):
        raise HTTPException(415, f"charset {charset[1][:100]!r}: send UTF-8")
    allowed = ("json", "form") if service.takes == "images" else ("json", "form", "csv")
    if TYPES.get(name) not in allowed:
        known = [each for each, kind in TYPES.items() if each and kind in allowed]
        raise HTTPException(415, f"content-type {name[:100]!r}: send {' or '.join(known)}")
    return TYPES[name]


class _InMemoryParser(MultiPartParser):
    """Keeps files in memory, whose size the middleware bounds; needs no temporary folder."""

    spool_max_size = 0  # never moves a file to disk

    def on_headers_finished(self) -> None:
        """Refuse a field's name that can be read in two ways, and begin its part."""
        header = self._current_part.content_disposition or b""
        try:
            header.decode()
        except UnicodeDecodeError:
            raise MultiPartException(f"a field's name is not UTF-8: {header[:200]!r}") from None
        if AMBIGUOUS.search(header):
            raise MultiPartException(
                f"backslashes that clients write in two ways: {header[:200]!r}; send JSON instead"
            )
        super().on_headers_finished()


def _unescaped(name: str) -> str:
    """Undo the escapes of a field's name; browsers and HTTP clients follow WHATWG's standard."""
    return normal(name.replace("%22", '"').replace("%0D", "\r").replace("%0A", "\n"))


async def form_files(request: Request, most: int) -> list[tuple[str, str, bytes]]:
    """Return at most so many files of a form: field name, file name and content of each."""
    parser = _InMemoryParser(request.headers, request.stream(), max_files=most, max_fields=16)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, f"the form cannot be read: {error.message}") from None
    contents: list[tuple[str, str, bytes]] = []
    for encoded, value in form.multi_items():
        name = _unescaped(encoded)
        if not isinstance(value, UploadFile):
            raise InputError(f"field {name[:100]!r} is text: send files, as -F NAME=@FILE")
        if len(name) > MAX_LABEL:
            raise InputError(f"a field's name has {len(name)} characters: at most {MAX_LABEL}")
        contents.append((name, value.filename or name, await value.read()))
    if not contents:
        raise InputError("the form is empty: send one or more files, as -F NAME=@FILE")
    return contents


async def read_files(request: Request, service: Service) -> list[tuple[str, Array]]:
    """Return the form's image files as (field name, pixels [C, H, W])."""
    settings = service.settings
    contents = await form_files(request, settings.max_images)
    channels, height, width = service.model.bundle.image_shape

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
            found.append((name, fit(image, (channels, height, width))))
        return found

    return await to_thread.run_sync(decoded, limiter=_few())
