import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from reptile.errors import DivergedError, InputError
from reptile.minibatches import mini_batches
from reptile.runtime import FewShotModel

FOUR = ["ox", "ox", "hen", "hen", "cat", "cat", "dog", "dog"]


def test_adaptation_equals_the_same_steps_in_numpy(
    model: FewShotModel, images: np.ndarray, redo_in_numpy: Callable[..., Any]
) -> None:
    adapted = model.adapt(images, FOUR, steps=17, learning_rate=0.3, seed=5)
    batches = mini_batches(np.random.default_rng(5), 8, 3, 17)
    losses, weights = redo_in_numpy(images, np.repeat(np.arange(4), 2), batches, 0.3)
    np.testing.assert_allclose(adapted.losses, losses, rtol=1e-4)
    logits = images.reshape(8, -1) / 255 @ weights["head.weight"].T + weights["head.bias"]
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    prediction = adapted.predict(images)
    np.testing.assert_allclose(prediction.probabilities, expected, rtol=1e-3)
    assert prediction.labels == [adapted.labels[i] for i in expected.argmax(1)]
    assert prediction.probabilities.dtype == np.float32


def test_adaptation_learns_the_support_set(model: FewShotModel, images: np.ndarray) -> None:
    adapted = model.adapt(images, FOUR, steps=50)
    assert adapted.labels == ["ox", "hen", "cat", "dog"]
    labels, probabilities = adapted.predict(images)
    assert labels == FOUR
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)


def test_the_bundles_steps_and_rate_are_the_defaults(
    model: FewShotModel, images: np.ndarray
) -> None:
    default = model.adapt(images, FOUR)
    spelled = model.adapt(images, FOUR, steps=20, learning_rate=0.5, seed=0)
    assert default.losses.tolist() == spelled.losses.tolist()
    other = model.adapt(images, FOUR, seed=1)
    assert default.losses.tolist() != other.losses.tolist()


def test_a_specialized_task_predicts_the_same_with_its_own_weights_inside(
    model: FewShotModel, images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (model.adapt(images, FOUR, seed=seed) for seed in (0, 1))
    for task in (first, second):
        own = task.specialized()
        assert [node.name for node in own._sessions["predict_adapted"].get_inputs()] == ["images"]
        np.testing.assert_allclose(own.logits(images), task.logits(images), rtol=1e-4, atol=1e-5)
        own.save(tmp_path / "task")
        again = model.load_adapted(tmp_path / "task")
        assert (again.logits(images) == task.logits(images)).all()
    assert not np.allclose(first.specialized().logits(images), second.logits(images))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(InputError, match="pip install onnx"):
        first.specialized()


def test_logits_are_what_probabilities_are_the_softmax_of(
    model: FewShotModel, images: np.ndarray
) -> None:
    adapted = model.adapt(images[:4], FOUR[:4])  # two names of four
    logits, probabilities = adapted.logits(images), adapted.predict(images).probabilities
    assert logits.shape == (8, 2)
    np.testing.assert_allclose(np.diff(logits), np.diff(np.log(probabilities)), atol=1e-4)


def test_no_steps_give_the_initialisation(model: FewShotModel, images: np.ndarray) -> None:
    still = model.adapt(images, FOUR, steps=0)
    assert still.losses.shape == (0,)
    relabelled = model.adapt(images, FOUR[::-1], steps=0)
    first, second = (task.predict(images).probabilities for task in (still, relabelled))
    assert (first == second).all()


def test_a_support_set_smaller_than_the_batch_is_used_whole(
    model: FewShotModel, images: np.ndarray, redo_in_numpy: Callable[..., Any]
) -> None:
    adapted = model.adapt(images[:2], ["a", "b"], steps=4)
    losses, _ = redo_in_numpy(images[:2], np.array([0, 1]), np.array([[0, 1]] * 4), 0.5)
    np.testing.assert_allclose(adapted.losses, losses, rtol=1e-4)


def test_spare_outputs_of_the_head_never_win(model: FewShotModel, images: np.ndarray) -> None:
    untrained = model.adapt(images, FOUR, steps=0).predict(images).probabilities
    assert (untrained.argmax(axis=1) >= 2).any()  # the head as it is prefers an output unused below
    labels, probabilities = model.adapt(images[:4], FOUR[:4], steps=0).predict(images)
    assert probabilities.shape == (8, 2)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
    assert set(labels) <= {"ox", "hen"}


def test_queries_do_not_depend_on_one_another(model: FewShotModel, images: np.ndarray) -> None:
    adapted = model.adapt(images, FOUR)
    many = model.bundle.images_at_once
    together = adapted.predict(np.tile(images, (many // 4, 1, 1, 1))).probabilities
    assert len(together) == 2 * many  # more than one run
    alone = np.concatenate([adapted.predict(image[None]).probabilities for image in images])
    np.testing.assert_allclose(together, np.tile(alone, (many // 4, 1)), rtol=1e-5)


def test_no_images_give_an_empty_answer(model: FewShotModel, images: np.ndarray) -> None:
    labels, probabilities = model.adapt(images, FOUR).predict(images[:0])
    assert labels == [] and probabilities.shape == (0, 4)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float64, ">f4"])
def test_pixels_of_any_real_type_mean_the_same(
    model: FewShotModel, images: np.ndarray, dtype: Any
) -> None:
    whole = np.asarray(images, dtype=np.uint8)
    expected = model.adapt(whole, FOUR).predict(whole).probabilities
    other = whole.astype(dtype)
    got = model.adapt(other.tolist(), FOUR).predict(other[:, 0]).probabilities
    assert (got == expected).all()


def test_labels_may_be_arrays_or_anything_hashable(model: FewShotModel, images: np.ndarray) -> None:
    numbers = model.adapt(images, np.repeat([30, 10, 20, 40], 2))
    assert numbers.labels == [30, 10, 20, 40]
    assert all(type(label) is int for label in numbers.labels)
    pairs = model.adapt(images, [("a", i // 4) for i in range(8)])
    assert pairs.labels == [("a", 0), ("a", 1)]


class Scalar:
    """Like a torch scalar: equal values, different identities and hashes."""

    def __init__(self, value: int) -> None:
        self.value = value

    def tolist(self) -> int:
        return self.value


def test_scalars_that_hash_by_identity_count_by_value(
    model: FewShotModel, images: np.ndarray
) -> None:
    assert model.adapt(images, [Scalar(i // 2) for i in range(8)]).labels == [0, 1, 2, 3]


def test_threads_may_share_a_model(model: FewShotModel, images: np.ndarray) -> None:
    expected = [model.adapt(images, FOUR, seed=seed).losses.tolist() for seed in range(4)]
    found: dict[int, list[list[float]]] = {seed: [] for seed in range(4)}

    def work(seed: int) -> None:
        for _ in range(10):
            adapted = model.adapt(images, FOUR, seed=seed)
            adapted.predict(images)
            found[seed].append(adapted.losses.tolist())

    threads = [Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[seed] == [expected[seed]] * 10 for seed in range(4))


def test_what_an_adapted_model_shares_cannot_be_changed(
    model: FewShotModel, images: np.ndarray
) -> None:
    adapted = model.adapt(images, FOUR)
    for array in (adapted.losses, *adapted.state.weights.values()):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_saved_and_loaded_predicts_the_same(
    model: FewShotModel, images: np.ndarray, tmp_path: Path
) -> None:
    labels = ["ox", 'h"é\n', 3, 2.5]
    adapted = model.adapt(images, [label for label in labels for _ in range(2)])
    adapted.save(tmp_path / "new" / "task.safetensors")
    loaded = model.load_adapted(tmp_path / "new" / "task.safetensors")
    assert loaded.labels == labels
    assert [type(label) for label in loaded.labels] == [str, str, int, float]
    assert loaded.losses.tolist() == adapted.losses.tolist()
    first, second = adapted.predict(images), loaded.predict(images)
    assert first.labels == second.labels
    assert (first.probabilities == second.probabilities).all()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["task.safetensors"]


def test_a_task_of_no_steps_can_be_saved(
    model: FewShotModel, images: np.ndarray, tmp_path: Path
) -> None:
    model.adapt(images, FOUR, steps=0).save(tmp_path / "task")
    assert model.load_adapted(tmp_path / "task").losses.shape == (0,)


def test_any_safetensors_reader_opens_a_saved_task(
    model: FewShotModel, images: np.ndarray, tmp_path: Path
) -> None:
    adapted = model.adapt(images, FOUR)
    adapted.save(tmp_path / "task.safetensors")
    with safe_open(tmp_path / "task.safetensors", framework="numpy") as file:
        assert json.loads(file.metadata()["labels"]) == adapted.labels
        assert set(file.keys()) == {"head.weight", "head.bias", "losses"}
        for name, value in adapted.state.weights.items():
            assert (file.get_tensor(name) == value).all()


@pytest.mark.parametrize("label", [None, ("a", 1), float("inf")])
def test_labels_that_json_cannot_hold_are_not_saved(
    model: FewShotModel, images: np.ndarray, tmp_path: Path, label: Any
) -> None:
    adapted = model.adapt(images, [label] * 4 + ["other"] * 4)
    with pytest.raises(InputError, match="saved"):
        adapted.save(tmp_path / "task")
    assert not (tmp_path / "task").exists()


def test_a_task_of_another_bundle_is_refused(
    model: FewShotModel,
    images: np.ndarray,
    bundle: Path,
    tmp_path: Path,
    rewrite_manifest: Callable[..., None],
) -> None:
    model.adapt(images, FOUR).save(tmp_path / "task")
    rewrite_manifest(bundle, lambda manifest: manifest.update(name="other"))
    with pytest.raises(InputError, match="adapted from another bundle"):
        FewShotModel.load(bundle).load_adapted(tmp_path / "task")


@pytest.fixture
def saved(model: FewShotModel, images: np.ndarray, tmp_path: Path) -> Path:
    model.adapt(images, FOUR).save(tmp_path / "task")
    return tmp_path / "task"


def patch_header(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        assert old in content and len(old) == len(new)
        return content.replace(old, new)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: b"", "not strict JSON"),
        (lambda content: b"PK\x03\x04" + content, "not a file that AdaptedModel.save wrote"),
        (lambda content: content[:-1], "damaged"),
        (lambda content: content + b"\0" * 4, "damaged"),
        (lambda content: content + b"\0" * 10_000, "damaged"),
        (lambda content: content[:-4] + np.float32("nan").tobytes(), "NaN or infinite"),
        (patch_header(b"reptile-adapted/1", b"reptile-adapted/2"), "not a file that"),
        (patch_header(b"[4, 15]", b"[15, 4]"), "damaged"),
        (patch_header(b'"F32"', b'"I32"'), "damaged"),
        (patch_header(b'\\"hen\\"', b'\\"ox\\" '), "2..4 distinct names"),
        (patch_header(b'\\"hen\\"', b"[[1,2]]"), "2..4 distinct names"),
        (patch_header(b'\\"hen\\"', b" NaN   "), "NaN is not a number"),
        (patch_header(b'\\"hen\\"', rb"\ud8005"), "the labels of .* not strict JSON"),
        (patch_header(b'\\"hen\\"', b" true,5"), "2..4 distinct names"),
    ],
)
def test_a_damaged_task_is_refused(
    model: FewShotModel, saved: Path, change: Callable[[bytes], bytes], words: str
) -> None:
    saved.write_bytes(change(saved.read_bytes()))
    with pytest.raises(InputError, match=words):
        model.load_adapted(saved)


def test_no_flipped_bit_in_the_header_gives_another_error(model: FewShotModel, saved: Path) -> None:
    content = saved.read_bytes()
    for position in range(0, 8 + int.from_bytes(content[:8], "little"), 3):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        saved.write_bytes(changed)
        with contextlib.suppress(InputError):
            assert len(model.load_adapted(saved).labels) == 4


def test_paths_that_cannot_be_used_are_input_errors(
    model: FewShotModel, images: np.ndarray, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file"):
        model.load_adapted(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        model.adapt(images, FOUR).save(tmp_path / "file" / "task")


def test_a_diverged_adaptation_says_to_lower_the_rate(
    model: FewShotModel, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Diverges:
        def run(self, names: list[str], feeds: dict[str, Any]) -> list[Any]:
            return [np.array(False), *[np.zeros(1, np.float32)] * (len(names) - 1)]

    object.__setattr__(model, "_sessions", {**model._sessions, "adapt": Diverges()})
    with pytest.raises(DivergedError, match=r"diverged.*lower learning_rate.*made for 0\.5"):
        model.adapt(images, FOUR)


def test_the_models_facts_are_the_manifests(model: FewShotModel, bundle: Path) -> None:
    assert model.ways == 4 and model.image_shape == (1, 3, 5)
    assert model.manifest == json.loads((bundle / "manifest.json").read_text())


def test_objects_show_what_they_are(model: FewShotModel, images: np.ndarray, bundle: Path) -> None:
    assert repr(model) == f"FewShotModel({str(bundle)!r}, ways=4, image_shape=(1, 3, 5))"
    assert repr(model.adapt(images, FOUR)) == "AdaptedModel(labels=['ox', 'hen', 'cat', 'dog'])"


def test_an_adaptation_is_refused_when_its_time_is_up(
    model: FewShotModel, images: np.ndarray
) -> None:
    images, labels = images[:4], ["a", "a", "b", "b"]
    in_time = model.adapt(images, labels, steps=3, timeout=60)
    unhurried = model.adapt(images, labels, steps=3)
    np.testing.assert_array_equal(in_time.losses, unhurried.losses)
    with pytest.raises(TimeoutError, match="not done within"):
        model.adapt(images, labels, steps=20, timeout=0)
