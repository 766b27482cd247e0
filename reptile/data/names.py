"""Names of classes and groups: one spelling for each, and which of them can be shown.

The same class has the same name in folders, zips, lists of splits and labels of arrays.
"""

import unicodedata

JOINERS = "\u200c\u200d"  # within words of Persian and Indian languages, and within emoji


def normal(name: str) -> str:
    """Return the name in Unicode's form NFC: é has two spellings, and file systems differ in it."""
    return unicodedata.normalize("NFC", name)


def can_be_shown(name: str) -> bool:
    """Say whether a terminal and a page can show the name: no control or direction characters."""
    return all(
        char.isprintable() or char in JOINERS or unicodedata.category(char) == "Zs" for char in name
    )
