"""What every source is: classes that are listed at once, and images that are read one by one.

So a source may be larger than memory. Each format has a module of its own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from PIL import Image

from reptile.data.dataset import Split

SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class SourceClass:
    """One class: its name with its group's (`alphabet01/character03`), and its files in order."""

    name: str
    group: str  # "" where classes are not grouped
    files: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Classes in the order of their names, and how to read one of their files.

    `read` returns an upright image of mode "L" or "RGB" and may be called from any thread.
    `published` says which class is in which split, where the source's own files say so; `no_split`
    why they do not.
    """

    name: str
    classes: tuple[SourceClass, ...]
    read: Callable[[str], Image.Image]
    published: Mapping[str, Split] = field(default_factory=dict)
    no_split: str = "its files tell no split"
