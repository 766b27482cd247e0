"""Verification of one bundle, by the checks of its kind of learner."""

from pathlib import Path
from typing import Any

from reptile.data.dataset import PreparedData
from reptile.export.verify import closed_form, parity, values
from reptile.learn.checkpoint import Checkpoint
from reptile.objectives import CLASSIFICATION
from reptile.settings import VerifySettings


def verify_bundle(
    settings: VerifySettings, bundle: Path, checkpoint: Checkpoint, data: PreparedData
) -> dict[str, Any]:
    """Run every check; return {"passed": bool, "checks": [{"name", "passed", "measured", …}], …}.

    Args:
        settings: the tasks of the accuracy check.
        bundle: the folder.
        checkpoint: what the bundle was exported from.
        data: what the checkpoint was trained on; tasks come from its test split.

    Raises:
        InputError: there is no manifest to read, or the test split cannot make tasks.
    """
    if checkpoint.info.settings.closed_form:
        if checkpoint.info.objective is not CLASSIFICATION:
            return values.verify_bundle(settings, bundle, checkpoint, data)
        return closed_form.verify_bundle(settings, bundle, checkpoint, data)
    return parity.verify_bundle(settings, bundle, checkpoint, data)
