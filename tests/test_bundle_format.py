"""Bundles hold to their JSON Schemas, and what the schemas refuse, the readers refuse too."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from bundles import METRICS
from schemas import (
    CLOSED_FORM,
    DISAGREEMENTS,
    GOLDEN,
    GONE,
    MANIFEST,
    SCHEMAS,
    schema,
    spoil,
    validate_bundle,
    validator,
)

from reptile.bundle_format import parse_golden, parse_manifest
from reptile.errors import InputError
from reptile.evaluate.metrics import Metrics, upgrade

FORMAT_1_METRICS = {
    "patterns": {
        "1-shot": {
            "frozen": {
                "accuracy": 0.75,
                "interval": 0.01,
                "random_accuracy": 0.25,
                "random_interval": 0.02,
            },
            "nearest_mean": {"accuracy": 0.5, "interval": 0.02},
        }
    }
}


@pytest.fixture(scope="module")
def manifest(exported: Path) -> Any:
    return json.loads((exported / "manifest.json").read_text())


@pytest.fixture(scope="module")
def golden(exported: Path) -> Any:
    return json.loads((exported / "golden/golden.json").read_text())


def titles(spoiled: list[tuple[str, str, Any]]) -> Any:
    return pytest.mark.parametrize(
        ("path", "value"), [pytest.param(*each, id=title) for title, *each in spoiled]
    )


@pytest.mark.parametrize("path", sorted(SCHEMAS.iterdir()), ids=lambda path: path.name)
def test_a_schema_is_one_of_draft_2020_12(path: Path) -> None:
    content = json.loads(path.read_text())
    assert content["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema_rs.meta.validate(content)


def test_the_schema_of_metrics_is_the_one_of_its_class() -> None:
    made = {"$schema": schema("manifest")["$schema"], **Metrics.model_json_schema()}
    assert schema("metrics") == made, "write this to metrics.schema.json:\n" + json.dumps(
        made, indent=2
    )


def test_an_exported_bundle_holds_to_the_schemas_and_is_read(
    exported: Path, manifest: Any, golden: Any
) -> None:
    validate_bundle(exported)
    assert parse_manifest(json.dumps(manifest), "here").raw == manifest
    assert [case._asdict() for case in parse_golden(json.dumps(golden), "here")] == golden["cases"]
    validator("metrics").validate(METRICS.model_dump(mode="json"))
    validator("manifest").validate(spoil(manifest, "metrics", None))


@titles(MANIFEST)
def test_a_manifest_is_refused_by_schema_and_reader(manifest: Any, path: str, value: Any) -> None:
    spoiled = spoil(manifest, path, value)
    assert not validator("manifest").is_valid(spoiled)
    with pytest.raises(InputError, match=r"^here: "):
        parse_manifest(json.dumps(spoiled), "here")


@titles(CLOSED_FORM)
def test_a_closed_form_manifest_is_refused_by_schema_and_reader(
    closed_form_bundle: Path, path: str, value: Any
) -> None:
    manifest = json.loads((closed_form_bundle / "manifest.json").read_text())
    validator("manifest").validate(manifest)
    assert parse_manifest(json.dumps(manifest), "here").weights["head.bias"] == (None,)
    spoiled = spoil(manifest, path, value)
    assert not validator("manifest").is_valid(spoiled)
    with pytest.raises(InputError, match=r"^here: "):
        parse_manifest(json.dumps(spoiled), "here")


def test_without_a_pixel_range_inputs_are_numbers_of_any_shape(manifest: Any) -> None:
    assert parse_manifest(json.dumps(manifest), "here").pixels
    numbers = spoil(manifest, "task/pixel_range", GONE)
    assert not parse_manifest(json.dumps(numbers), "here").pixels
    text = json.dumps(spoil(numbers, "task/layout", GONE)).replace("1, 12, 12]", "144]")
    flat = json.loads(text)
    validator("manifest").validate(flat)
    assert parse_manifest(text, "here").image_shape == (144,)


@titles(DISAGREEMENTS)
def test_a_manifest_that_contradicts_itself_is_refused_by_the_reader(
    manifest: Any, path: str, value: Any
) -> None:
    with pytest.raises(InputError, match=r"^here: "):
        parse_manifest(json.dumps(spoil(manifest, path, value)), "here")


@titles(GOLDEN)
def test_a_golden_index_is_refused_by_schema_and_reader(golden: Any, path: str, value: Any) -> None:
    spoiled = spoil(golden, path, value)
    assert not validator("golden").is_valid(spoiled)
    with pytest.raises(InputError, match=r"^here"):
        parse_golden(json.dumps(spoiled), "here")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", 1),
        ("metric", "error"),
        ("ways", 0),
        ("held_out", None),
        ("scores/patterns/1/trained/frozen/interval", "small"),
        ("scores/patterns/1/trained/frozen", 0.75),
        ("more", 1),
    ],
)
def test_metrics_are_refused_by_schema_and_reader(path: str, value: Any) -> None:
    spoiled = spoil(METRICS.model_dump(mode="json"), path, value)
    assert not validator("metrics").is_valid(spoiled)
    with pytest.raises(ValueError, match="validation error"):
        Metrics.model_validate(spoiled)


def test_manifests_of_formats_1_and_2_are_read(manifest: Any) -> None:
    first = manifest | {"format": 1, "metrics": FORMAT_1_METRICS}
    second = manifest | {"format": 2}
    for old in (first, second):
        del old["learner"]
        assert not validator("manifest").is_valid(old)
        now, then = (vars(parse_manifest(json.dumps(each), "here")) for each in (manifest, old))
        assert now.pop("raw") == manifest
        assert then.pop("raw") == old
        assert now == then
    assert upgrade(first["metrics"], first["task"]["ways"], "patterns") == METRICS


def test_a_manifest_without_a_kind_of_task_is_a_classifiers(manifest: Any) -> None:
    del (old := spoil(manifest, "format", 3))["task"]["kind"]
    validator("manifest").validate(old)
    assert parse_manifest(json.dumps(old), "here").kind == "classification"


def test_the_examples_in_the_docs_hold_to_the_schemas(root: Path) -> None:
    text = (root / "docs/bundle.md").read_text(encoding="utf-8")
    metrics, golden = map(json.loads, re.findall(r"```json\n(.*?)```", text, re.DOTALL))
    validator("metrics").validate(metrics)
    validator("golden").validate(golden)
    for name in re.findall(r"\]\(\.\./reptile/schemas/(.*?)\)", text):
        assert (SCHEMAS / name).is_file()
