"""The metrics of requests that have ended, and a line of the log for each.

All that end in one turn of the event loop are written together, which costs a third as much.
"""

import asyncio
import logging
from datetime import UTC, datetime
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Histogram
from pydantic_core import to_json

METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}

log = logging.getLogger(__name__)


class Ended(NamedTuple):
    """A request that ended."""

    id: str
    method: str
    path: str
    route: str
    status: int  # 0 if nothing was answered
    seconds: float

    def fields(self) -> dict[str, object]:
        """Return what the log says of it."""
        return {
            "id": self.id,
            "method": self.method,
            "path": self.path[:200],
            "status": self.status,
            "milliseconds": round(1000 * self.seconds, 1),
        }


class AccessLog:
    """Counts and logs requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ended: list[Ended] = []
        self._seconds = Histogram(
            "reptile_request_seconds",
            "From a request's start to its answer's end.",
            ["route", "method", "status"],
            registry=registry,
        )

    def add(self, request: Ended) -> None:
        """Add a request that ended; it is written before the loop reads another."""
        if not self._ended:
            asyncio.get_running_loop().call_soon(self._write)
        self._ended.append(request)

    def _write(self) -> None:
        ended, self._ended = self._ended, []
        for request in ended:
            method = request.method if request.method in METHODS else "other"
            self._seconds.labels(request.route, method, request.status).observe(request.seconds)
        log.info("request", extra={"events": [request.fields() for request in ended]})


class JsonLines(logging.Formatter):
    """A line of JSON for each of a record's `events`, or one for the record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's lines."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat()
        common = {
            "timestamp": time,
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        if record.exc_info:
            common["exception"] = self.formatException(record.exc_info)
        events = getattr(record, "events", [{}])
        return b"\n".join(to_json(common | each) for each in events).decode()
