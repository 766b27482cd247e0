"""Files of arrays as sources of prepare: equal to `from_arrays`; windows; and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from reptile.data.arrays import from_arrays
from reptile.data.prepare import prepare
from reptile.errors import InputError
from reptile.learn.run import run_training
from reptile.settings import PrepareSettings, TrainSettings

CLASSES, EXAMPLES, CHANNELS, TIME = 8, 4, 3, 20
N = CLASSES * EXAMPLES
SIGNALS = np.random.default_rng(0).normal(size=(N, CHANNELS, TIME)).astype(np.float32)
LABELS = np.arange(N) % CLASSES
Arrays = dict[str, np.ndarray]


def settings_of(source: Path, **changes: object) -> PrepareSettings:
    values: dict[str, object] = {
        "source": str(source),
        "cross_domain": (),
        "images_per_class": EXAMPLES,
        "validation": 1,
        "test": 2,
        **changes,
    }
    return PrepareSettings.model_validate(values)


def npz(folder: Path, arrays: Arrays) -> Path:
    np.savez(folder / "signals.npz", **arrays)  # type: ignore[arg-type]
    return folder / "signals.npz"


def npy(folder: Path, arrays: Arrays) -> Path:
    (folder / "signals").mkdir()
    for name, array in arrays.items():
        np.save(folder / "signals" / f"{name}.npy", array)
    return folder / "signals"


def safetensors(folder: Path, arrays: Arrays) -> Path:
    save_file(arrays, folder / "signals.safetensors")
    return folder / "signals.safetensors"


@pytest.mark.parametrize("save", [npz, npy, safetensors])
def test_a_file_of_signals_is_what_from_arrays_makes_of_them(
    save: Callable[[Path, Arrays], Path], tmp_path: Path
) -> None:
    source = save(tmp_path, {"inputs": SIGNALS, "labels": LABELS})
    data = prepare(settings_of(source), tmp_path / "out")
    other = from_arrays(SIGNALS, LABELS, splits={"validation": 1, "test": 2})
    assert data.name == "signals" and data.image_shape == (CHANNELS, TIME)
    assert np.array_equal(data.images, other.images)
    assert data.content_sha256 == other.content_sha256
    assert data.splits_sha256 == other.splits_sha256


def test_values_have_tasks_and_an_order(tmp_path: Path) -> None:
    targets = SIGNALS[:, :2].sum(-1)
    source = npz(tmp_path, {"inputs": SIGNALS, "targets": targets, "tasks": LABELS})
    data = prepare(settings_of(source, order=True), tmp_path / "out")
    assert data.values == data.index.values == 2 and data.split("train").ordered
    assert data.targets is not None
    for c in data.classes:
        rows = np.flatnonzero(int(c.name) == LABELS)
        assert np.array_equal(data.images[c.start : c.start + c.count], SIGNALS[rows])
        assert np.array_equal(data.targets[c.start : c.start + c.count], targets[rows])


def test_labels_may_be_places_in_names_and_classes_lie_in_groups(tmp_path: Path) -> None:
    names, groups = np.array([f"gesture {c}" for c in range(CLASSES)]), LABELS // 2
    arrays: Arrays = {"inputs": SIGNALS, "labels": LABELS, "names": names, "groups": groups}
    data = prepare(settings_of(npz(tmp_path, arrays), test=1), tmp_path / "out")
    assert {c.name for c in data.classes} == {f"{c // 2}/gesture {c}" for c in range(CLASSES)}
    assert sum(c.split == "test" for c in data.classes) == 2  # a group of two


@pytest.mark.parametrize("step", [3, 5, 8])
def test_windows_are_slices_of_their_recording(tmp_path: Path, step: int) -> None:
    source = npy(tmp_path, {"inputs": SIGNALS, "labels": LABELS})
    windows = {"length": 8, "step": step}
    data = prepare(settings_of(source, windows=windows), tmp_path / "out")
    assert data.image_shape == (CHANNELS, 8)
    for c in data.classes:
        expected = [
            SIGNALS[row, :, start : start + 8]
            for row in np.flatnonzero(int(c.name) == LABELS)
            for start in range(0, TIME - 8 + 1, step)
        ]
        assert np.array_equal(data.images[c.start : c.start + c.count], expected)


def test_a_network_learns_from_prepared_signals(tmp_path: Path) -> None:
    source = npz(tmp_path, {"inputs": SIGNALS, "labels": LABELS})
    data = prepare(settings_of(source, validation=2), tmp_path / "out")
    settings = TrainSettings.model_validate(
        {"model": {"name": "mlp"}, "ways": 2, "train_shots": 3, "meta_iterations": 2}
    )
    assert run_training(settings, data, tmp_path / "work").info.image_shape == (CHANNELS, TIME)


WRONG: dict[str, tuple[Arrays, dict[str, object], str]] = {
    "no inputs": ({"labels": LABELS}, {}, "no array `inputs`"),
    "no labels": ({"inputs": SIGNALS}, {}, "give labels .* or targets"),
    "targets without tasks": (
        {"inputs": SIGNALS, "targets": LABELS},
        {},
        "targets and tasks go together",
    ),
    "one label too few": ({"inputs": SIGNALS, "labels": LABELS[1:]}, {}, "expected .32."),
    "one label too few for windows": (
        {"inputs": SIGNALS, "labels": LABELS[1:]},
        {"windows": {"length": 4, "step": 4}},
        "labels of shape .31.: expected .N.",
    ),
    "a pickle": ({"inputs": SIGNALS, "labels": np.array([{}] * N)}, {}, "a pickle, which can run"),
    "not finite": ({"inputs": SIGNALS + np.inf, "labels": LABELS}, {}, "not finite"),
    "single numbers": ({"inputs": SIGNALS[:, 0, 0], "labels": LABELS}, {}, "expected .N, ...."),
    "nothing": ({"inputs": SIGNALS[:0], "labels": LABELS[:0]}, {}, "expected .N, ...."),
    "integers": ({"inputs": LABELS[:, None], "labels": LABELS}, {}, "inputs are int64"),
    "one target alone": (
        {"inputs": SIGNALS, "targets": np.array(3.0), "tasks": LABELS},
        {"windows": {"length": 4, "step": 4}},
        r"signals.npz: targets of shape \[\] for 32 inputs",
    ),
    "labels that are fractions": (
        {"inputs": SIGNALS, "labels": LABELS / 2},
        {},
        "signals.npz: labels are float64: labels must be integers or strings",
    ),
    "names without labels": (
        {"inputs": SIGNALS, "labels": LABELS[:0], "names": np.array(["a", "b"])},
        {},
        r"signals.npz: labels of shape \[0\] for 32 inputs",
    ),
    "too large for float32": (
        {"inputs": SIGNALS.astype(float) * 1e300, "labels": LABELS},
        {},
        "signals.npz: inputs: row 0 has numbers that are not finite in float32",
    ),
    "values too large for float32": (
        {"inputs": SIGNALS, "targets": LABELS * 1e300, "tasks": LABELS},
        {},
        "signals.npz: targets: row 1 has numbers that are not finite in float32",
    ),
    "columns of a table": (
        {"inputs": SIGNALS, "labels": LABELS},
        {"table": {"inputs": ["dose"]}},
        "prepare.table: is for tables .* and .*signals.npz is none; leave it out",
    ),
    "windows too long": (
        {"inputs": SIGNALS, "labels": LABELS},
        {"windows": {"length": 21, "step": 1}},
        "20 samples are shorter than windows.length = 21",
    ),
    "too few names": (
        {"inputs": SIGNALS, "labels": LABELS, "names": np.array(["a", "b"])},
        {},
        "with 2 names, labels .* from 0 to 1",
    ),
    "an order by column": (
        {"inputs": SIGNALS, "labels": LABELS},
        {"order": "time"},
        "arrays have no columns",
    ),
    "too few examples": (
        {"inputs": SIGNALS, "labels": LABELS},
        {"images_per_class": 5},
        "has 4 of the 5 examples",
    ),
    "another domain": (
        {"inputs": SIGNALS, "labels": LABELS},
        {"cross_domain": ["digits"]},
        "set prepare.cross_domain to",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arrays_are_one_sentence_and_write_nothing(case: str, tmp_path: Path) -> None:
    arrays, changes, sentence = WRONG[case]
    source = npz(tmp_path, arrays)
    with pytest.raises(InputError, match=sentence) as error:
        prepare(settings_of(source, **changes), tmp_path / "out")
    assert len(str(error.value).splitlines()) == 1
    assert [*tmp_path.iterdir()] == [source]


@pytest.mark.parametrize("name", ["signals.npz", "signals.safetensors", "signals/inputs.npy"])
def test_a_broken_file_is_one_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x80\x04nothing of the kind")
    source = path.parent if path.suffix == ".npy" else path
    with pytest.raises(InputError, match="cannot be read"):
        prepare(settings_of(source), tmp_path / "out")


def test_another_form_under_the_name_of_arrays_is_one_sentence(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", SIGNALS)
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"a\.npz: cannot be read \(File is not a zip file\)"):
        prepare(settings_of(tmp_path / "a.npz"), tmp_path / "out")
    halves = torch.tensor(SIGNALS).bfloat16()
    save_torch({"inputs": halves, "labels": torch.tensor(LABELS)}, tmp_path / "a.safetensors")
    # The reason depends on whether something has imported ml_dtypes, which adds it to NumPy.
    with pytest.raises(InputError, match=r"a\.safetensors: .*bfloat16"):
        prepare(settings_of(tmp_path / "a.safetensors"), tmp_path / "out")
    folder = npy(tmp_path, {"inputs": SIGNALS})
    np.save(folder / "labels.npy", np.array([{}] * N))
    with pytest.raises(InputError, match="a pickle, which can run code"):
        prepare(settings_of(folder), tmp_path / "out")


@pytest.mark.parametrize("write", [npz, npy, safetensors])
def test_arrays_that_are_not_read_are_named(
    write: Callable[[Path, Arrays], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A misspelt `groups` would leave groups in two splits without a word."""
    source = write(tmp_path, {"inputs": SIGNALS, "labels": LABELS, "group": LABELS % 2})
    prepare(settings_of(source), tmp_path / "out")
    assert "group: not used; known are inputs, labels, targets, tasks, groups" in caplog.text


@pytest.mark.parametrize("source", ["digits", "sinusoid"])
@pytest.mark.parametrize(
    "change",
    [{"order": True}, {"windows": {"length": 2, "step": 1}}, {"table": {"inputs": ["dose"]}}],
    ids=lambda change: next(iter(change)),
)
def test_what_is_of_tables_or_arrays_is_refused_for_other_sources(
    source: str, change: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"and {source} is none; leave it out"):
        prepare(settings_of(Path(source), **change), tmp_path / "out")
