"""scikit-learn's own checks of the estimators, and that they answer as the runtime does.

A bundle takes inputs of one size, and scikit-learn's checks make data of 1 to 10 columns: there the
estimators take a bundle of the data's size. Nothing else of them is changed, and no check is
expected to fail.
"""

import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from small_bundles import NOISE, STRENGTH, small_bundle

from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.runtime import FewShotModel
from reptile.sklearn import FewShotClassifier, FewShotRegressor


class OfAnySize:
    """Opens a bundle of the size of the data."""

    folder: ClassVar[Path]

    def _adapt(self, inputs: np.ndarray, targets: np.ndarray) -> Any:
        self._size = (inputs.shape[1], targets.shape[1] if targets.ndim > 1 else 1)
        return super()._adapt(inputs, targets)  # type: ignore[misc]

    def _open(self) -> Any:
        inputs, outputs = self._size
        outputs = 0 if isinstance(self, FewShotClassifier) else outputs
        folder = self.folder / f"{inputs}-{outputs}"
        if not folder.exists():
            small_bundle(folder, inputs, outputs)
        return self._runtime.load(folder)  # type: ignore[attr-defined]


class Classifier(OfAnySize, FewShotClassifier):
    pass


class Regressor(OfAnySize, FewShotRegressor):
    pass


@pytest.fixture(autouse=True, scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> None:
    OfAnySize.folder = tmp_path_factory.mktemp("bundles")


@parametrize_with_checks([Classifier(""), Regressor("")])
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    places = np.repeat([2, 0, 1, 3], 6)
    names = np.array(["cat", "ant", "dog", "bee"])
    return rng.normal(places[:, None] * [3, -2, 1], 0.4, (24, 3)), names[places]


def test_the_nearest_centroids_are_those_of_scikit_learn(
    tmp_path: Path, blobs: tuple[np.ndarray, np.ndarray]
) -> None:
    X, y = blobs  # noqa: N806
    model = FewShotClassifier(small_bundle(tmp_path / "bundle", 3)).fit(X[::2], y[::2])
    assert list(model.classes_) == ["ant", "bee", "cat", "dog"]
    np.testing.assert_array_equal(
        model.predict(X[1::2]), NearestCentroid().fit(X[::2], y[::2]).predict(X[1::2])
    )
    probabilities = model.predict_proba(X)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(model.classes_[probabilities.argmax(1)], model.predict(X))
    assert model.score(X, y) == 1


@pytest.mark.parametrize("bundle", ["exported", "closed_form_bundle"])
def test_images_are_classified_as_by_the_runtime(
    bundle: str, data: PreparedData, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(bundle)
    split = data.split("test")
    rows = np.concatenate([start + np.arange(4) for start in split.starts[:3]])
    images, names = np.asarray(data.images[rows]), np.repeat(["c", "a", "b"], 4)
    model = FewShotClassifier(folder).fit(images, names)
    adapted = FewShotModel.load(folder).adapt(images, np.repeat([2, 0, 1], 4))
    logits, found = adapted.logits(images), model.predict_proba(images)
    expected = np.exp(logits - logits.max(1, keepdims=True))
    expected = (expected / expected.sum(1, keepdims=True))[:, np.argsort(adapted.labels)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    flat = FewShotClassifier(folder).fit(images.reshape(12, -1), names)
    np.testing.assert_array_equal(flat.predict_proba(images.reshape(12, -1)), found)


def test_steps_and_seed_are_those_of_the_runtime(exported: Path, data: PreparedData) -> None:
    images, names = np.asarray(data.images[:12]), np.arange(12) % 3
    model = FewShotClassifier(exported, steps=3, learning_rate=0.01, random_state=5)
    model.fit(images, names)
    runtime = FewShotModel.load(exported)
    adapted = runtime.adapt(images, names, steps=3, learning_rate=0.01, seed=5)
    np.testing.assert_array_equal(model.adapted_.losses, adapted.losses)
    search = GridSearchCV(FewShotClassifier(exported), {"steps": [1, 5]}, cv=2)
    assert search.fit(images, names).best_params_["steps"] in (1, 5)
    with pytest.raises(InputError, match=r"steps must lie in 0\.\."):
        FewShotClassifier(exported, steps=-1).fit(images, names)


def test_values_and_deviations_are_those_of_bayesian_regression(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    X, asked = rng.normal(size=(9, 2)), rng.normal(size=(5, 2))  # noqa: N806
    y = np.stack([X @ [1, -2] + 3, X @ [0.5, 0]], 1) + rng.normal(0, 0.1, (9, 2))
    model = FewShotRegressor(small_bundle(tmp_path / "bundle", 2, 2)).fit(X, y)
    phi, queries = (np.c_[each, np.ones(len(each))] for each in (X, asked))
    covariance = np.linalg.inv(phi.T @ phi + STRENGTH * np.eye(3))
    mean, deviation = model.predict(asked, return_std=True)
    np.testing.assert_allclose(mean, queries @ covariance @ phi.T @ y, atol=1e-5)
    spread = 1 + np.einsum("nd,de,ne->n", queries, covariance, queries)
    expected = np.sqrt(NOISE * spread)[:, None].repeat(2, 1)
    np.testing.assert_allclose(deviation, expected, rtol=1e-4)
    np.testing.assert_array_equal(model.predict(asked), mean)


def test_a_pipeline_of_a_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    X = rng.normal(50, 20, (30, 2))  # noqa: N806
    y = X @ [1, -0.5]
    model = make_pipeline(StandardScaler(), FewShotRegressor(small_bundle(tmp_path / "b", 2)))
    with pytest.raises(InputError, match="names classes and predicts no values"):
        model.fit(X, y)
    model = make_pipeline(StandardScaler(), FewShotRegressor(small_bundle(tmp_path / "c", 2, 1)))
    assert cross_val_score(clone(model), X, y).min() > 0.99
    mean, deviation = model.fit(X, y).predict(X, return_std=True)
    assert mean.shape == deviation.shape == (30,)


def test_a_fitted_estimator_is_pickled_with_what_it_learnt(
    tmp_path: Path, blobs: tuple[np.ndarray, np.ndarray]
) -> None:
    X, y = blobs  # noqa: N806
    folder = small_bundle(tmp_path / "bundle", 3)
    model = FewShotClassifier(folder).fit(X, y)
    content = pickle.dumps(model)
    again = pickle.loads(content)
    np.testing.assert_array_equal(again.predict_proba(X), model.predict_proba(X))
    assert pickle.loads(pickle.dumps(FewShotClassifier(folder))).bundle == folder
    shutil.rmtree(folder)
    small_bundle(folder, 4)
    with pytest.raises(InputError, match="adapted from another bundle"):
        pickle.loads(content)


def test_what_the_bundle_cannot_take_is_refused(
    tmp_path: Path, blobs: tuple[np.ndarray, np.ndarray]
) -> None:
    X, y = blobs  # noqa: N806
    model = FewShotClassifier(small_bundle(tmp_path / "bundle", 3))
    with pytest.raises(InputError, match=r"X has 2 features, and the bundle takes 3 of each"):
        model.fit(X[:, :2], y)
    with pytest.raises(InputError, match="y has 1 class, 'ant'"):
        model.fit(X, np.full(24, "ant"))
    with pytest.raises(InputError, match="leave out steps"):
        clone(model).set_params(steps=5).fit(X, y)
    with pytest.raises(InputError, match="is not a folder"):
        FewShotClassifier(tmp_path / "nothing").fit(X, y)


def test_the_example_of_the_guide_runs(exported: Path, data: PreparedData, root: Path) -> None:
    page = (root / "docs/guides/use.md").read_text(encoding="utf-8")
    (example,) = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
        if "sklearn" in block
    ]
    images, labels = np.asarray(data.images[:12]), np.arange(12) % 2
    shown: dict[str, Any] = {"images": images, "labels": labels, "more_images": images[:5]}
    exec(example.replace("artifacts/bundle", str(exported)), shown)
    assert shown["model"].predict(images[:5]).shape == (5,)


def test_torch_is_not_needed() -> None:
    program = "import sys, reptile.sklearn; print({'torch', 'onnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr
