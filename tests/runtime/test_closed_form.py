"""Tasks of a closed-form bundle in the runtime: classes come and go, and files keep them."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.runtime import AdaptedModel, FewShotModel

ROUNDING = 5e-5  # ridge's logits are several units, and its inverse is computed in float32


@pytest.fixture(scope="module")
def model(closed_form_bundle: Path) -> FewShotModel:
    return FewShotModel.load(closed_form_bundle)


@pytest.fixture(scope="module")
def support(data: PreparedData) -> tuple[np.ndarray, list[str]]:
    """Six classes of three images each, class after class."""
    starts = data.split("test").starts[:6]
    images = np.concatenate([data.images[start : start + 3] for start in starts])
    return images, [name for name in "abcdef" for _ in range(3)]


@pytest.fixture(scope="module")
def queries(data: PreparedData) -> np.ndarray:
    return np.stack([data.images[start + 5] for start in data.split("test").starts[:6]])


@pytest.fixture
def adapted(model: FewShotModel, support: tuple[np.ndarray, list[str]]) -> AdaptedModel:
    return model.adapt(*support)


def test_a_task_has_more_classes_than_any_gradient_head(
    model: FewShotModel, adapted: AdaptedModel, queries: np.ndarray
) -> None:
    assert model.check() < 1e-4
    assert model.ways == 50
    labels, probabilities = adapted.predict(queries)
    right = sum(label == name for label, name in zip(labels, "abcdef", strict=True))
    assert right >= 3, "by chance one"
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    assert adapted.losses.shape == (0,)


def test_its_graphs_compute_what_numpy_does(
    model: FewShotModel,
    adapted: AdaptedModel,
    support: tuple[np.ndarray, list[str]],
    queries: np.ndarray,
) -> None:
    """Ridge once more, from its definition, on the graph's features in float64."""
    examples = adapted.state.examples
    assert examples is not None
    x = np.hstack([examples.features, np.ones((18, 1))]).astype(np.float64)
    primal = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ np.eye(6)[examples.targets])
    session = model.bundle.open("embed", threads=1, providers=None)
    (embedded,) = session.run(["features"], {"images": queries.astype(np.float32)})
    wanted = 4 * np.hstack([embedded, np.ones((6, 1))]) @ primal
    np.testing.assert_allclose(adapted.logits(queries), wanted, rtol=1e-5, atol=ROUNDING)


def test_adding_classes_equals_adapting_to_all_again(
    model: FewShotModel, support: tuple[np.ndarray, list[str]], queries: np.ndarray
) -> None:
    images, labels = support
    first = model.adapt(images[:9], labels[:9])
    before = first.logits(queries)
    grown = first.add(images[9:12], labels[9:12]).add(images[12:], labels[12:])
    assert grown.labels == list("abcdef")
    wanted = model.adapt(images, labels).predict(queries).probabilities
    np.testing.assert_allclose(grown.predict(queries).probabilities, wanted, rtol=0, atol=1e-5)
    assert first.labels == list("abc")
    assert (first.logits(queries) == before).all()


def test_adding_examples_of_known_classes_equals_adapting_to_all_again(
    model: FewShotModel, support: tuple[np.ndarray, list[str]], queries: np.ndarray
) -> None:
    images, labels = support
    order = np.argsort(np.arange(18) % 3, kind="stable")  # one image of each class comes first
    named = [labels[place] for place in order]
    grown = model.adapt(images[order[:6]], named[:6]).add(images[order[6:]], named[6:])
    wanted = model.adapt(images, labels).predict(queries).probabilities
    np.testing.assert_allclose(grown.predict(queries).probabilities, wanted, rtol=0, atol=1e-5)


def test_removing_a_class_equals_adapting_to_the_others(
    model: FewShotModel,
    adapted: AdaptedModel,
    support: tuple[np.ndarray, list[str]],
    queries: np.ndarray,
) -> None:
    images, labels = support
    rest = [place for place, label in enumerate(labels) if label != "c"]
    shrunk = adapted.remove("c")
    assert shrunk.labels == list("abdef")
    wanted = model.adapt(images[rest], [labels[place] for place in rest])
    np.testing.assert_allclose(
        shrunk.logits(queries), wanted.logits(queries), rtol=1e-5, atol=ROUNDING
    )
    again = shrunk.add(images[6:9], labels[6:9])
    assert again.labels == list("abdefc")
    np.testing.assert_allclose(
        again.predict(queries).probabilities[:, -1],
        adapted.predict(queries).probabilities[:, 2],
        rtol=0,
        atol=1e-5,
    )


def test_a_file_keeps_a_task_with_its_examples(
    model: FewShotModel, adapted: AdaptedModel, queries: np.ndarray, tmp_path: Path
) -> None:
    adapted.save(tmp_path / "task")
    loaded = model.load_adapted(tmp_path / "task")
    assert loaded.labels == adapted.labels
    assert (loaded.logits(queries) == adapted.logits(queries)).all()
    shrunk, wanted = loaded.remove("a"), adapted.remove("a")
    assert (shrunk.logits(queries) == wanted.logits(queries)).all()
    assert (tmp_path / "task").stat().st_size < 10_000


def test_safetensors_reads_the_file(adapted: AdaptedModel, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    adapted.save(tmp_path / "task")
    tensors = load_file(tmp_path / "task")
    assert set(tensors) == {"features", "targets", "head.weight", "head.bias", "losses"}
    assert tensors["targets"].tolist() == [place for place in range(6) for _ in range(3)]
    np.testing.assert_array_equal(tensors["head.weight"], adapted.state.weights["head.weight"])


def edited(path: Path, change: Any) -> Path:
    """Write the file's header and body anew, `change`d."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, body = change(json.loads(content[8 : 8 + size]), bytearray(content[8 + size :]))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda header, body: (header, body[:-4]), "its tensors are not those"),
        (lambda header, body: (header, body + b"0000"), "its tensors are not those"),
        (
            lambda header, body: (header | {"targets": {"shape": [10**9]}}, body),
            "its tensors are not those",
        ),
        (
            lambda header, body: (header | {"targets": {"shape": [-1]}}, body),
            "its tensors are not those",
        ),
        (lambda header, body: (header | {"targets": 1}, body), "its tensors are not those"),
        (
            lambda header, body: (header, body[:-4] + struct.pack("<f", float("nan"))),
            "NaN or infinite",
        ),
        (
            lambda header, body: (
                header,
                body.replace(struct.pack("<3q", 5, 5, 5), struct.pack("<3q", 9, 9, 9)),
            ),
            "its examples are not of its labels",
        ),
    ],
)
def test_a_damaged_file_is_refused(
    model: FewShotModel, adapted: AdaptedModel, tmp_path: Path, change: Any, reason: str
) -> None:
    adapted.save(tmp_path / "task")
    with pytest.raises(InputError, match=reason):
        model.load_adapted(edited(tmp_path / "task", change))


@pytest.mark.parametrize("options", [{"steps": 5}, {"learning_rate": 0.1}, {"seed": 1}])
def test_settings_of_gradient_steps_are_refused(
    model: FewShotModel, support: tuple[np.ndarray, list[str]], options: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match="leave out steps, learning_rate and seed"):
        model.adapt(*support, **options)


def test_what_cannot_be_added_or_removed_is_refused(
    model: FewShotModel, adapted: AdaptedModel, support: tuple[np.ndarray, list[str]]
) -> None:
    images, labels = support
    for call, reason in (
        (lambda: adapted.remove("z"), "no class 'z'"),
        (lambda: model.adapt(images[:6], labels[:6]).remove("a"), "nothing to tell apart"),
        (lambda: adapted.add(images[:2], ["a"]), "2 images but 1 labels"),
        (lambda: adapted.add(images[:2, :, :5], ["a", "b"]), "have shape"),
        (lambda: adapted.add(np.repeat(images, 2, axis=0), labels * 2), "adapts to 1..50"),
        (lambda: adapted.add(images[:0], []).remove("z"), "no class 'z'"),
    ):
        with pytest.raises(InputError, match=reason):
            call()


def test_a_bundle_of_gradient_steps_needs_every_example(exported: Path, data: PreparedData) -> None:
    adapted = FewShotModel.load(exported).adapt(data.images[:2], ["a", "b"], steps=1)
    for call in (lambda: adapted.remove("a"), lambda: adapted.add(data.images[:1], ["a"])):
        with pytest.raises(InputError, match="adapt again with all images"):
            call()


def test_the_network_is_constant_already(adapted: AdaptedModel) -> None:
    assert adapted.specialized() is adapted


def test_what_is_not_done_in_time_is_given_up(
    model: FewShotModel, support: tuple[np.ndarray, list[str]]
) -> None:
    with pytest.raises(TimeoutError):
        model.adapt(*support, timeout=1e-9)
