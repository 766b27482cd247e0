"""What a command of the pipeline printed, and the words of the commonest one."""

from typing import Any, NamedTuple


class Result(NamedTuple):
    code: int
    out: str
    error: str


def only(things: dict[str, Any]) -> Any:
    (thing,) = things.values()
    return thing


def submitted(*more: str) -> tuple[str, ...]:
    return ("submit", "-P", "data_revision=4f2c", *more)
