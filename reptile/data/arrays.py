"""Arrays or a torch `Dataset` as prepared data: in memory, with nothing written to disk.

For data that a program has already; `prepare` is for image files.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError

from reptile.data.dataset import (
    DatasetIndex,
    Inputs,
    PreparedClass,
    PreparedData,
    Split,
    Values,
    content_digest,
    splits_digest,
)
from reptile.data.names import can_be_shown, normal, refuse_two_spellings
from reptile.data.readers.base import SPLITS, Source, SourceClass
from reptile.data.splits import SplitList, assign_splits, split_by_list
from reptile.errors import InputError
from reptile.minibatches import IntArray
from reptile.settings import PrepareSettings, describe

if TYPE_CHECKING:
    from torch.utils.data import Dataset

Splits = Mapping[Split, int | float | Sequence[str | int]]
"""How much validation and test hold out, or lists of names; see `from_arrays`."""
DEFAULT_SPLITS: Splits = MappingProxyType({"validation": 0.1, "test": 0.2})


def from_arrays(
    inputs: Any,
    targets: Any,
    *,
    tasks: Any = None,
    groups: Any = None,
    splits: Splits = DEFAULT_SPLITS,
    split_seed: int = 0,
    ordered: bool = False,
    name: str = "arrays",
) -> PreparedData:
    """Use arrays with labels, or with values to predict, as prepared data.

    Everything that is given may be a NumPy array, a torch tensor or a sequence. Where the rows of
    each class lie together, the classes keep the order of their rows and the inputs are not copied,
    so they may be memory-mapped; they must not change afterwards. Otherwise the rows are copied
    once, into the order of their classes' names.

    Args:
        inputs: [N, ...]. uint8 [N, C, H, W] are images of pixels 0..255; floating-point numbers of
            any shape are used as they are, as float32.
        targets: [N] labels, integers or strings. With `tasks`: values to predict, [N] or
            [N, outputs].
        tasks: [N] names, for regression: which function (person, device, patient) a row belongs
            to. A task of a few-shot regression is one of them.
        groups: [N] names, for classification: the group of each row's class, such as the alphabet
            of a character. Classes of one label in two groups are two classes, named `group/label`.
        splits: what is held out, e.g. `{"validation": 0.1, "test": 0.2}`: fractions, or whole
            numbers, of the groups (of the classes where there are no groups; of the tasks), chosen
            by a hash of their names as `prepare` does. Or lists of names of classes or groups:
            `{"validation": ["cat"], "test": ["dog", "cow"]}`; the rest is for training, unless
            there is a list for "train" too.
        split_seed: chooses another split where fractions or numbers are held out.
        ordered: whether the rows of each class, or task, are in the order of time. Then a support
            set is always older than its queries (see `reptile.tasks.held_out_task`).
        name: the name of the data in reports.

    Raises:
        InputError: shapes, types or names that cannot be used, or values that are not finite.
    """
    return collect(
        inputs,
        targets,
        tasks=tasks,
        groups=groups,
        assign=lambda source: _assign(source, splits, split_seed),
        ordered=ordered,
        name=name,
    )


def collect(
    inputs: Any,
    targets: Any,
    *,
    tasks: Any,
    groups: Any,
    assign: Callable[[Source], tuple[dict[str, Split], dict[str, object]]],
    ordered: bool,
    name: str,
    where: str = "",
) -> PreparedData:
    """As `from_arrays`, with splits by `assign`; `where` precedes the arrays' names in errors.

    It returns the split of each class, and what is recorded as settings.
    """
    images = _inputs(inputs, where)
    values = None
    if tasks is None:
        labels = _labels(targets, f"{where}labels" if where else "targets", len(images))
    else:
        labels = _names(tasks, f"{where}tasks", len(images))
        refuse_two_spellings(f"{where}tasks", ([name] for name in np.unique(labels).tolist()))
        values = _values(targets, images, where)
    groups_of_rows = None if groups is None else _names(groups, f"{where}groups", len(images))
    rows, classes = _classes(labels, groups_of_rows)
    if rows is not None:
        images = images[rows]
        values = None if values is None else values[rows]

    source = Source(name, tuple(SourceClass(c.name, c.group, ()) for c in classes), _unread)
    split_of, settings = assign(source)
    table = tuple(c.model_copy(update={"split": split_of[c.name]}) for c in classes)
    for array in (images, values):
        if array is not None:
            array.flags.writeable = False
    index = DatasetIndex(
        name=name,
        image_shape=images.shape[1:],
        classes=table,
        content_sha256=content_digest(images, table, values, where, rows),
        splits_sha256=splits_digest(table),
        settings=settings,
        dtype="uint8" if images.dtype == np.uint8 else "float32",
        values=0 if values is None else values.shape[1],
        ordered=ordered,
    )
    return PreparedData(images, index, values)


def from_torch(
    dataset: "Dataset[Any]",
    *,
    tasks: Any = None,
    groups: Any = None,
    splits: Splits = DEFAULT_SPLITS,
    split_seed: int = 0,
    name: str | None = None,
) -> PreparedData:
    """Read a map-style torch `Dataset` of (input, label) pairs into prepared data.

    It is read once, into memory. Inputs are tensors, arrays or PIL images (grey or RGB; they become
    uint8 [C, H, W]), all of one shape and type. Where the dataset has a list `classes`, as those of
    torchvision have, integer labels are numbers in it and the classes get these names.

    Args:
        dataset: with a length; each item is a pair of an input and a label (or, with `tasks`, of an
            input and one or several values).
        tasks: see `from_arrays`, like all others.
        groups: [N], the group of each item's class.
        splits: what is held out.
        split_seed: chooses another split.
        name: the dataset's class name if it is None.

    Raises:
        InputError: not such a dataset, items of several shapes, or what `from_arrays` refuses.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise InputError(
            f"{type(dataset).__name__}: only datasets with a length and numbered items can be "
            "used; collect the items of an iterable one and call from_arrays"
        )
    inputs: npt.NDArray[Any] | None = None
    targets: list[Any] = []
    for number in range(len(dataset)):
        item = dataset[number]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise InputError(f"item {number} of the dataset: expected a pair of input and label")
        row = _row(item[0])
        if inputs is None:
            inputs = np.empty((len(dataset), *row.shape), row.dtype)
        if row.shape != inputs.shape[1:] or row.dtype != inputs.dtype:
            raise InputError(
                f"item {number} of the dataset: {row.dtype} {list(row.shape)}, the first one is "
                f"{inputs.dtype} {list(inputs.shape[1:])}; give it a transform that resizes and "
                "converts all to one shape and type"
            )
        inputs[number] = row
        targets.append(_array(item[1]) if tasks is not None else _label(item[1]))
    if inputs is None:
        raise InputError(f"{type(dataset).__name__}: the dataset is empty")
    names = getattr(dataset, "classes", None)
    if tasks is None and isinstance(names, list) and all(isinstance(each, str) for each in names):
        targets = [names[each] if _is_index(each, names) else each for each in targets]
    return from_arrays(
        inputs,
        targets,
        tasks=tasks,
        groups=groups,
        splits=splits,
        split_seed=split_seed,
        name=name or type(dataset).__name__,
    )


def _array(value: Any) -> npt.NDArray[Any]:
    if isinstance(value, torch.Tensor):
        return np.asarray(value.detach().cpu())
    if isinstance(value, Sequence) and any(isinstance(each, torch.Tensor) for each in value):
        return np.stack([_array(each) for each in value])
    return np.asarray(value)


def _row(value: Any) -> npt.NDArray[Any]:
    """One input of a torch `Dataset`; PIL images as uint8 [C, H, W]."""
    if not hasattr(value, "getbands"):
        return _array(value)
    if value.mode not in ("L", "RGB"):
        value = value.convert("L" if value.mode in ("1", "LA") else "RGB")
    pixels = np.asarray(value)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _label(value: Any) -> Any:
    array = _array(value)
    if array.ndim:
        raise InputError(
            f"a label of shape {list(array.shape)}: each item needs one label, an integer or a "
            "string; for values to predict give `tasks`"
        )
    return array.item()


def _is_index(label: Any, names: list[str]) -> bool:
    return isinstance(label, int) and 0 <= label < len(names)


def _inputs(inputs: Any, where: str) -> Inputs:
    array = _array(inputs)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what is infinite then is refused
            array = array.astype(np.float32, copy=False)
    elif array.dtype != np.uint8:
        raise InputError(
            f"{where}inputs are {array.dtype}: give pixels 0..255 as uint8, or floating-point "
            "numbers"
        )
    if array.ndim < 2 or 0 in array.shape:
        raise InputError(
            f"{where}inputs of shape {list(array.shape)}: expected [N, ...], one row an example; "
            "single numbers are [N, 1]"
        )
    if array.dtype == np.uint8 and (array.ndim != 4 or array.shape[1] not in (1, 3)):
        raise InputError(
            f"{where}inputs are uint8 {list(array.shape)}: images are [N, C, H, W] with 1 or 3 "
            "channels; give anything else as float32"
        )
    return np.ascontiguousarray(array).view()  # a view, to be marked read-only; mostly no copy


def _values(targets: Any, inputs: Inputs, where: str) -> Values:
    if inputs.dtype != np.float32:
        raise InputError(
            f"{where}inputs are {inputs.dtype}: with `tasks` (regression) give float32"
        )
    array = _array(targets)
    if array.dtype.kind not in "fiu":
        raise InputError(f"{where}targets are {array.dtype}: with `tasks` they must be numbers")
    if array.ndim not in (1, 2) or len(array) != len(inputs) or 0 in array.shape:
        raise InputError(
            f"{where}targets of shape {list(array.shape)} for {len(inputs):,} inputs: expected "
            f"[{len(inputs)}] or [{len(inputs)}, outputs]"
        )
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array.reshape(len(array), -1), dtype=np.float32).view()


def _labels(values: Any, what: str, rows: int) -> npt.NDArray[np.str_]:
    if (array := _array(values)).dtype.kind == "f":
        raise InputError(
            f"{what} are {array.dtype}: labels must be integers or strings; to predict values "
            "(regression) give `tasks`, the name of each row's function"
        )
    return _names(array, what, rows)


def _names(values: Any, what: str, rows: int) -> npt.NDArray[np.str_]:
    """Return one name a row, as strings [N], normalised as the names of folders are."""
    array = _array(values)
    if array.dtype.kind == "O" and all(isinstance(each, str | int) for each in array.flat):
        array = array.astype(str)
    if array.dtype.kind not in "iuUb":
        raise InputError(f"{what} are {array.dtype}: they must be integers or strings")
    if array.shape != (rows,):
        raise InputError(
            f"{what} of shape {list(array.shape)} for {rows:,} inputs: expected [{rows}]"
        )
    unique, places = np.unique(array, return_inverse=True)
    names = [normal(str(each)) for each in unique]
    for each in names:
        if not each or not can_be_shown(each):
            raise InputError(f"{what}: the name {each!r} cannot be shown; choose another")
    return np.asarray(names)[places]


def _classes(
    labels: npt.NDArray[np.str_], groups: npt.NDArray[np.str_] | None
) -> tuple[IntArray | None, list[PreparedClass]]:
    """Return the order [N] to put the rows in, None for as they are; and the classes in it."""
    full = labels if groups is None else np.strings.add(np.strings.add(groups, "/"), labels)
    starts = np.flatnonzero(np.concatenate([[True], full[1:] != full[:-1]]))
    rows: IntArray | None = None
    if len(np.unique(full[starts])) < len(starts):  # a class lies in several places
        rows = np.argsort(full, kind="stable")
        ordered = full[rows]
        starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    counts = np.diff(starts, append=len(full))
    first = starts if rows is None else rows[starts]
    return rows, [
        PreparedClass(
            name=str(full[row]),
            group="" if groups is None else str(groups[row]),
            split="train",  # until the splits are assigned
            rotation=0,
            start=int(start),
            count=int(count),
        )
        for row, start, count in zip(first, starts, counts, strict=True)
    ]


def _assign(
    source: Source, splits: Splits, seed: int
) -> tuple[dict[str, Split], dict[str, object]]:
    """Return each class's split, and what is recorded about how it came about."""
    if unknown := [each for each in splits if each not in SPLITS]:
        raise InputError(f"splits: {unknown[0]!r} is none of {', '.join(SPLITS)}")
    shares = {each: share for each, share in splits.items() if isinstance(share, int | float)}
    try:
        if len(shares) < len(splits):
            if shares:
                raise InputError("splits: some are numbers and some are lists; give all in one way")
            lists = {each: tuple(map(str, entries)) for each, entries in splits.items()}  # type: ignore[arg-type]
            chosen = SplitList.model_validate(lists)
            return split_by_list(source, "splits", chosen), {"splits": lists}
        if "train" in shares:
            raise InputError('splits: "train" is whatever "validation" and "test" leave')
        settings = PrepareSettings(
            source=source.name,
            cross_domain=(),
            held_out="groups" if all(c.group for c in source.classes) else "classes",
            validation=shares.get("validation", 0),
            test=shares.get("test", 0),
            split_seed=seed,
            rotations=False,
        )
    except ValidationError as error:
        raise InputError(f"splits: {describe(error)[0]}") from None
    keys = {"held_out", "validation", "test", "split_seed"}
    return assign_splits(source, settings), settings.model_dump(mode="json", include=keys)


def _unread(file: str) -> Any:
    raise AssertionError(f"{file}: arrays have no files")
