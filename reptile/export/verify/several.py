"""Verification of the bundles of several learners, and of the copy of one that is shipped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reptile.bundle_format import MANIFEST_FILE, bundle_folders, parse_manifest
from reptile.data.dataset import PreparedData
from reptile.errors import InputError
from reptile.export.verify.bundle import verify_bundle
from reptile.export.verify.conformance import Check, check_files
from reptile.learn.checkpoint import Checkpoint
from reptile.settings import VerifySettings


def verify_bundles(
    settings: VerifySettings,
    folder: Path,
    best: Path,
    learners: Mapping[str, Checkpoint],
    data: PreparedData,
) -> dict[str, Any]:
    """Run every check on each bundle; return one report, as `verify_bundle` does.

    Args:
        settings: the tasks of the accuracy checks.
        folder: the bundles, each in a folder of the name of its algorithm.
        best: the copy of one of them.
        learners: what they were exported from, by their methods in the evaluation.
        data: what the checkpoints were trained on.

    Raises:
        InputError: there is no manifest to read, or the test split cannot make tasks.
    """
    names = bundle_folders({name: each.info.settings.algorithm for name, each in learners.items()})
    reports = {
        names[method]: verify_bundle(settings, folder / names[method], checkpoint, data)
        for method, checkpoint in learners.items()
    }
    checks = [
        check | {"name": f"{name}: {check['name']}"}
        for name, report in reports.items()
        for check in report["checks"]
    ]
    manifests = {(folder / name / MANIFEST_FILE).read_bytes() for name in reports}
    where = best / MANIFEST_FILE
    try:
        content = where.read_bytes()
    except OSError as error:
        raise InputError(f"{best}: no manifest ({error}); run `reptile export` first") from None
    other = [] if content in manifests else [f"its manifest is none of those in {folder}"]
    copied = [
        Check.none_of(f"{best.name}: is one of the bundles", other),
        *check_files(best, parse_manifest(content, str(where))),
    ]
    checks += [check._asdict() for check in copied]
    return next(iter(reports.values())) | {
        "passed": all(check["passed"] for check in checks),
        "checks": checks,
    }
