"""Which class is in which split: by a hash of names, as the source's files say, or by a list.

Splits depend on names and settings alone, never on a training run, so that no run can test on what
another has trained on. Lists that papers have published lie in the folder `published_splits`.
"""

import hashlib
import json
from collections import Counter
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from reptile.data.dataset import Split
from reptile.data.names import normal, refuse_two_spellings
from reptile.data.readers.base import SPLITS, Source
from reptile.errors import InputError
from reptile.settings import PrepareSettings, describe

PUBLISHED = Path(__file__).parent / "published_splits"


class SplitList(BaseModel):
    """A split by names, of classes or of whole groups of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = ""
    """Where it was published, and by whom."""
    counts: dict[Split, int] | None = None
    """How many classes each split is to have; anything else is an error."""
    train: tuple[str, ...] | None = None
    """None: whatever is named in neither of the others."""
    validation: tuple[str, ...] = ()
    test: tuple[str, ...]


def assign_splits(source: Source, settings: PrepareSettings) -> dict[str, Split]:
    """Return the split of each class.

    Where `held_out` is `groups` or `classes`, these are ordered by a hash of `split_seed` and their
    name: the first part is the test split, the next validation, the rest training; a fraction holds
    out at least one. So a new group moves few others.

    Raises:
        InputError: there are no groups, too few of them, or the list does not fit the classes.
    """
    held_out = settings.held_out
    if held_out != "classes":
        refuse_two_spellings(f"{source.name}: groups", ([c.group] for c in source.classes))
    if held_out == "published":
        if not source.published:
            raise InputError(
                f"{source.name}: {source.no_split}; set held_out: groups, classes, or a list"
            )
        return _checked(source, dict(source.published))
    if held_out not in ("groups", "classes"):
        return split_by_list(source, held_out, load_split_list(held_out))
    return _by_hash(source, settings)


def groups_or_classes(source: Source, settings: PrepareSettings) -> PrepareSettings:
    """Hold out `classes` instead of `groups` where there are no groups, as in tables and arrays."""
    if settings.held_out == "groups" and not any(c.group for c in source.classes):
        return settings.model_copy(update={"held_out": "classes"})
    return settings


def load_split_list(name: str) -> SplitList:
    """Read a published list by its name, or a JSON file by its path.

    Raises:
        InputError: no such file, or not of the form of `SplitList`.
    """
    path = Path(name) if name.endswith(".json") else PUBLISHED / f"{name}.json"
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a mark before
        return SplitList.model_validate(json.loads(text, object_pairs_hook=_each_once))
    except FileNotFoundError:
        raise InputError(f"held_out = {name!r}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except ValidationError as error:
        raise InputError(f"{path}: {describe(error)[0]}") from None


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse a key that is there twice, of which Python would take the last without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise InputError(f"{next(n for n in names if names.count(n) > 1)} is given twice")
    return values


def _by_hash(source: Source, settings: PrepareSettings) -> dict[str, Split]:
    held_out = settings.held_out
    unit = {c.name: c.group if held_out == "groups" else c.name for c in source.classes}
    if "" in unit.values():
        way_out = (
            "published, which takes the split of its folders" if source.published else "classes"
        )
        raise InputError(
            f"{source.name}: its classes lie in no groups, so no groups can be held out; "
            f"set held_out: {way_out}"
        )
    units = sorted(set(unit.values()), key=partial(_split_key, settings.split_seed))
    test = _share(settings.test, len(units))
    validation = _share(settings.validation, len(units))
    train = len(units) - test - validation
    if train < 1:
        way_out = ", or set held_out: classes" if held_out == "groups" else ""
        raise InputError(
            f"{source.name}: {test} for test and {validation} for validation (a fraction is at "
            f"least one) leave none of {len(units)} {held_out} for training; lower test = "
            f"{settings.test:g}, or validation = {settings.validation:g}, which may be 0{way_out}"
        )
    split: dict[str, Split] = dict.fromkeys(units, "train")
    split |= dict.fromkeys(units[:test], "test")
    split |= dict.fromkeys(units[test : test + validation], "validation")
    return {name: split[group] for name, group in unit.items()}


def _split_key(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def _share(wanted: int | float, units: int) -> int:
    return wanted if isinstance(wanted, int) else max(1, round(wanted * units))


def split_by_list(source: Source, name: str, chosen: SplitList) -> dict[str, Split]:
    """Return the split of each class by a list of names; errors call the list `name`.

    Raises:
        InputError: the list does not fit the classes, or leaves nothing for training or test.
    """
    listed: dict[str, Split] = {}
    for split in SPLITS:
        for entry in getattr(chosen, split) or ():
            unit = normal(entry)  # as the names of classes are
            if unit in listed:
                raise InputError(f"{name}: {unit} is in {listed[unit]} and in {split}")
            listed[unit] = split
    known = {c.name for c in source.classes} | {c.group for c in source.classes}
    if unknown := [entry for entry in listed if entry not in known]:
        more = f" and lacks {len(unknown) - 1} more of the list" if len(unknown) > 1 else ""
        raise InputError(
            f"{name}: {source.name} has no class or group {unknown[0]!r}{more}; "
            "is a part of the data missing?"
        )
    splits: dict[str, Split] = {}
    for c in source.classes:
        named = [entry for entry in (c.name, c.group) if entry in listed]
        if len(named) == 2:
            raise InputError(f"{name}: class {c.name} is named, and its group too; keep one")
        if not named and chosen.train is not None:
            raise InputError(
                f"{name}: class {c.name} of {source.name} is in no split; add it, or leave "
                "`train` out, which then is all the rest"
            )
        splits[c.name] = listed[named[0]] if named else "train"
    counts = Counter(splits.values())
    for split, published in (chosen.counts or {}).items():
        if counts[split] != published:
            raise InputError(
                f"{name}: {counts[split]:,} classes of {source.name} for {split}, published are "
                f"{published:,}; is a part of the data missing?"
            )
    return _checked(source, splits)


def _checked(source: Source, splits: dict[str, Split]) -> dict[str, Split]:
    for split in ("train", "test"):
        if split not in splits.values():
            raise InputError(
                f"{source.name}: no class for {split}; set held_out: classes, or another list"
            )
    return splits
