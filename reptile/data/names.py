"""Names of classes and groups: one spelling for each, and which of them can be shown.

The same class has the same name in folders, zips, lists of splits and labels of arrays.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable
from itertools import combinations

from reptile.errors import InputError

JOINERS = "\u200c\u200d"  # within words of Persian and Indian languages, and within emoji
SPACES = "".join(char for char in map(chr, range(0x3001)) if unicodedata.category(char) == "Zs")


def normal(name: str) -> str:
    """Return the name in Unicode's form NFC, without spaces at the ends of its parts.

    The letter é has two spellings, and file systems differ in it; some drop the last spaces.
    """
    return "/".join(part.strip(SPACES) for part in unicodedata.normalize("NFC", name).split("/"))


def refuse_two_spellings(where: str, parts: Iterable[Collection[str]]) -> None:
    """Refuse names that seem to be one person or class, which would be trained and tested on.

    They differ in upper and lower case, in what is between words, or as 7, 07 and 7.0 do. Two names
    that are in one of the parts together are two.

    Raises:
        InputError: there are two such names.
    """
    parts = list(parts)
    alike: dict[str, list[str]] = {}
    for name in sorted({name for part in parts for name in part}):
        alike.setdefault(_spelling(name), []).append(name)
    for names in alike.values():
        for name, other in combinations(names, 2):
            if not any(name in part and other in part for part in parts):
                raise InputError(
                    f"{where}: {name!r} and {other!r} may be one in two spellings, which would be "
                    "trained and tested on; write them alike, or rename one"
                )


def _spelling(name: str) -> str:
    """Return what all spellings of one name share."""
    if number := re.fullmatch(r"0*([0-9]+)(\.0*)?", name):
        return number[1]
    return re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).casefold())


def can_be_shown(name: str) -> bool:
    """Say whether a terminal and a page can show the name: no control or direction characters."""
    return all(char.isprintable() or char in JOINERS + SPACES for char in name)
