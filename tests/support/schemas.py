"""The JSON Schemas of reptile/schemas, and ways to spoil a manifest and a golden index.

Each way is a title, a path and the value put there (GONE: what is there is taken out).
"""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema_rs

import reptile

SCHEMAS = Path(reptile.__file__).parent / "schemas"
GONE = object()
Spoiled = list[tuple[str, str, Any]]


def schema(name: str) -> Any:
    return json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))


def validator(name: str) -> jsonschema_rs.Draft202012Validator:
    """A validator against one of the schemas, which may refer to the others beside it."""
    return jsonschema_rs.Draft202012Validator(
        schema(name), base_uri=(SCHEMAS / f"{name}.schema.json").as_uri()
    )


def validate_bundle(folder: Path) -> None:
    """Hold a bundle's manifest and golden index to their schemas."""
    for name, path in (("manifest", "manifest.json"), ("golden", "golden/golden.json")):
        validator(name).validate(json.loads((folder / path).read_text(encoding="utf-8")))


def spoil(values: Any, path: str, value: Any) -> Any:
    """Return a copy with another value at a path such as `a/b/0`."""
    place = values = copy.deepcopy(values)
    *parents, last = path.split("/")
    for key in parents:
        place = place[int(key) if isinstance(place, list) else key]
    where: Any = int(last) if isinstance(place, list) else last
    if value is GONE:
        del place[where]
    else:
        place[where] = value
    return values


MANIFEST: Spoiled = [
    *(
        (f"no {path}", path, GONE)
        for path in (
            "format",
            "task",
            "task/ways",
            "task/image_shape",
            "task/layout",
            "task/dtype",
            "inner",
            "inner/steps",
            "inner/batch",
            "inner/learning_rate",
            "inner/replacement",
            "limits",
            "limits/max_steps",
            "limits/max_support",
            "graphs",
            "graphs/adapt",
            "graphs/predict_adapted",
            "graphs/adapt/path",
            "graphs/adapt/inputs",
            "graphs/adapt/inputs/0",
            "graphs/adapt/inputs/3/shape",
            "graphs/adapt/outputs/1",
            "graphs/predict_adapted/inputs/0",
            "graphs/predict_adapted/outputs/0",
            "adapted",
            "files",
        )
    ),
    ("format as text", "format", "2"),
    ("an older format", "format", 0),
    ("a newer format", "format", 4),
    ("no learner", "learner", GONE),
    ("an unknown learner", "learner", "bayes"),
    ("a learner of other graphs", "learner", "closed_form"),
    ("another kind of task", "task/kind", "ranking"),
    ("ways as text", "task/ways", "3"),
    ("ways true", "task/ways", True),
    ("one way", "task/ways", 1),
    ("too many ways", "task/ways", 2**70),
    ("two sizes of an image", "task/image_shape", [12, 12]),
    ("four sizes of an image", "task/image_shape", [1, 1, 12, 12]),
    ("a size of zero", "task/image_shape/1", 0),
    ("a size as text", "task/image_shape", "1x12x12"),
    ("channels last", "task/layout", "NHWC"),
    ("pixels to one", "task/pixel_range", [0, 1]),
    ("images of bytes", "task/dtype", "uint8"),
    ("steps below zero", "inner/steps", -1),
    ("half a step", "inner/steps", 0.5),
    ("an empty mini-batch", "inner/batch", 0),
    ("no learning rate", "inner/learning_rate", None),
    ("a learning rate of zero", "inner/learning_rate", 0),
    ("a negative learning rate", "inner/learning_rate", -0.1),
    ("a huge learning rate", "inner/learning_rate", 1e6),
    ("a learning rate as text", "inner/learning_rate", "0.001"),
    ("a learning rate true", "inner/learning_rate", True),
    ("replacement as a number", "inner/replacement", 0),
    ("no steps at all", "limits/max_steps", 0),
    ("no support at all", "limits/max_support", 0),
    ("support as text", "limits/max_support", "50"),
    ("graphs as a list", "graphs", []),
    ("a path as a number", "graphs/adapt/path", 3),
    ("inputs as an object", "graphs/adapt/inputs", {}),
    ("an unknown dtype", "graphs/adapt/inputs/0/dtype", "bfloat16"),
    ("images of float64", "graphs/predict_adapted/inputs/0/dtype", "float64"),
    ("labels of another dtype", "graphs/adapt/inputs/1/dtype", "float32"),
    ("labels of two dimensions", "graphs/adapt/inputs/1/shape", ["support", 3]),
    ("a fixed support", "graphs/adapt/inputs/0/shape/0", 15),
    ("a learning rate of one dimension", "graphs/adapt/inputs/3/shape", [1]),
    ("an input of another name", "graphs/adapt/inputs/2/name", "rows"),
    ("finite as a number", "graphs/adapt/outputs/1/dtype", "float32"),
    ("a weight of a free size", "graphs/predict_adapted/inputs/1/shape/0", "filters"),
    ("logits of whole numbers", "graphs/predict_adapted/outputs/0/dtype", "int64"),
    ("adapted as a list", "adapted", []),
    ("adapted of no shape", "adapted/head.bias", 3),
    ("files as a list", "files", []),
    ("a hash as a number", "files/MODEL_CARD.md", 0),
]
CLOSED_FORM: Spoiled = [
    ("no learner", "learner", GONE),
    ("a learner of other graphs", "learner", "gradient"),
    ("a regressor", "task/kind", "regression"),
    ("no support at all", "limits/max_support", 0),
    *(
        (f"no {path}", path, GONE)
        for path in (
            "graphs/embed",
            "graphs/fit",
            "graphs/adapt",
            "graphs/predict_adapted",
            "graphs/adapt/outputs/0",
            "graphs/fit/inputs/1",
            "adapted/head.bias",
        )
    ),
    ("features of a free size", "graphs/embed/outputs/0/shape/1", "features"),
    ("a fixed number of classes", "graphs/fit/outputs/0/shape/0", 5),
    ("logits of a fixed number of classes", "graphs/predict_adapted/outputs/0/shape/1", 5),
    ("labels of another dtype", "graphs/fit/inputs/1/dtype", "float32"),
    ("an input of a gradient learner", "graphs/adapt/inputs/1/name", "batches"),
    ("a fixed number of classes in adapted", "adapted/head.bias", [5]),
]
DISAGREEMENTS: Spoiled = [
    ("images of three dimensions", "graphs/adapt/inputs/0/shape", ["support", 12, 12]),
    ("more steps than the graph takes", "inner/steps", 61),
    ("images of another size", "task/image_shape", [1, 14, 14]),
    ("more ways than logits", "task/ways", 4),
    ("a weight of another shape in adapt", "graphs/adapt/outputs/3/shape", [9]),
    ("a weight that adapt does not give", "graphs/adapt/outputs/3", GONE),
    ("another shape in adapted", "adapted/head.bias", [4]),
    ("a weight that adapted lacks", "adapted/head.bias", GONE),
]
"""What a schema cannot see: parts of a manifest that contradict one another."""
GOLDEN: Spoiled = [
    ("no cases", "cases", GONE),
    ("an empty list of cases", "cases", []),
    ("cases as an object", "cases", {}),
    *(
        (f"no {key}", f"cases/0/{key}", GONE)
        for key in ("graph", "inputs", "outputs", "atol", "rtol")
    ),
    ("a graph as a number", "cases/0/graph", 1),
    ("inputs as a list", "cases/0/inputs", ["images.npy"]),
    ("a path as a number", "cases/0/inputs/images", 1),
    ("outputs that hold nothing", "cases/0/outputs", {}),
    ("a tolerance as text", "cases/0/atol", "1e-4"),
    ("a tolerance true", "cases/0/rtol", True),
    ("a tolerance below zero", "cases/0/atol", -1e-4),
    ("a tolerance that allows all", "cases/0/rtol", 2),
    ("a tolerance of no end", "cases/0/atol", 1e300),
]
