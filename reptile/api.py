"""The library in one place: meta-train a network, evaluate it, save it, load it, export it.

Each function is one call into a package. For bundles see `reptile.runtime`, which needs no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reptile.data.dataset import PreparedData
from reptile.errors import VerificationError
from reptile.evaluate import Metrics, write_evaluation
from reptile.evaluate import evaluate as evaluate_checkpoint
from reptile.evaluate.write import metrics
from reptile.files import atomic_directory
from reptile.learn.checkpoint import Checkpoint, CheckpointInfo, load_checkpoint, save_checkpoint
from reptile.learn.run import run_training
from reptile.learn.train import Progress
from reptile.models import ModuleNetwork, size, unflatten
from reptile.settings import EvaluateSettings, ExportSettings, TrainSettings, VerifySettings


@dataclass(frozen=True)
class Initialisation:
    """What meta-training learns: weights from which a few steps learn a new task.

    Made by `train` or `load`; immutable.
    """

    checkpoint: Checkpoint

    @property
    def info(self) -> CheckpointInfo:
        """Settings, data and code it was trained with, and its learning curve."""
        return self.checkpoint.info

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The learnt weights by name."""
        model, state, _ = self.checkpoint
        return unflatten(model, state.weights[: size(model)])  # without a head's, or step sizes

    def module(self) -> nn.Module:
        """Return a copy of the user's module with the learnt weights, in evaluation mode.

        Its batch norm uses the statistics of each batch, as in training.

        Raises:
            TypeError: the network is one of those of the settings, which are not modules.
        """
        model = self.checkpoint.model
        if not isinstance(model, ModuleNetwork):
            raise TypeError(f"{model.name} is a function of its weights, not a torch module")
        return model.with_weights(self.weights)

    def evaluate(
        self,
        data: PreparedData,
        settings: EvaluateSettings | None = None,
        *,
        cross_domain: Mapping[str, PreparedData] | None = None,
        beside: "Mapping[str, Initialisation] | None" = None,
        report: str | Path | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Metrics:
        """Measure few-shot scores on held-out classes, and those of simpler methods on them.

        Args:
            data: what it was trained on; its test split makes tasks.
            settings: the protocol.
            cross_domain: further datasets of the same input shape, by name.
            beside: others trained on the same data, by name, to measure on the same tasks.
            report: folder for report.html, metrics.json and the plots' tables; replaced as a whole.
            on_progress: called with the number of adaptations done, and of all.

        Raises:
            InputError: other data, or a split that cannot make the tasks.
        """
        self.info.check_data(data)
        evaluation = evaluate_checkpoint(
            settings or EvaluateSettings(),
            self.checkpoint,
            data,
            cross_domain or {},
            on_progress,
            beside={name: other.checkpoint for name, other in (beside or {}).items()},
        )
        if report is not None:
            with atomic_directory(Path(report)) as folder:
                write_evaluation(evaluation, folder)
        return metrics(evaluation)

    def export(
        self,
        folder: str | Path,
        data: PreparedData,
        settings: ExportSettings | None = None,
        *,
        metrics: Metrics | None = None,
        protocol: EvaluateSettings | None = None,
    ) -> None:
        """Write the bundle that adapts to new tasks inside ONNX Runtime; see `reptile.runtime`.

        Args:
            folder: replaced as a whole.
            data: what it was trained on; its test split gives the bundle's golden tensors.
            settings: the bundle's name and limits; the gate is not applied here.
            metrics: what `evaluate` returned of it, for the model card and the scale of intervals.
            protocol: the evaluation's settings; its steps and batch become the bundle's defaults.

        Raises:
            InputError: other data, a test split without enough classes, or a network with an
                operator that ONNX does not have.
        """
        from reptile.export.write import export_bundle

        self.info.check_data(data)
        export_bundle(
            settings or ExportSettings(),
            self.checkpoint,
            data,
            metrics,
            Path(folder),
            protocol=protocol or EvaluateSettings(),
        )

    def verify(
        self, bundle: str | Path, data: PreparedData, settings: VerifySettings | None = None
    ) -> dict[str, Any]:
        """Check that a bundle computes what PyTorch does, and return the checks as a report.

        Args:
            bundle: what `export` wrote.
            data: what it was trained on.
            settings: the tasks of the accuracy check.

        Raises:
            InputError: other data, or no bundle.
            VerificationError: a check failed.
        """
        from reptile.export.verify import verify_bundle

        self.info.check_data(data)
        report = verify_bundle(settings or VerifySettings(), Path(bundle), self.checkpoint, data)
        failed = [
            f"{check['name']} ({check['measured']} against {check['limit']})"
            for check in report["checks"]
            if not check["passed"]
        ]
        if failed:
            raise VerificationError(f"{bundle} failed {'; '.join(failed)}")
        return report

    def save(self, folder: str | Path) -> None:
        """Write the checkpoint: a folder of safetensors and JSON, complete or not at all."""
        save_checkpoint(Path(folder), self.checkpoint)


def train(
    data: PreparedData,
    settings: TrainSettings | None = None,
    module: nn.Module | None = None,
    *,
    work: str | Path | None = None,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Initialisation:
    """Meta-train an initialisation.

    Args:
        data: from `from_arrays`, `from_torch` or `load_prepared`.
        settings: the algorithm and its numbers; `ways` is the number of outputs.
        module: any network that maps inputs [B, *shape] to [B, outputs]; it is copied, never
            changed. Without one, the network that `settings.model` names.
        work: folder for checkpoints on the way, of which `resume` takes the latest.
        resume: continue from there, if the same training was interrupted.
        on_progress: called after each meta-iteration.

    Raises:
        InputError: the data cannot make the tasks, or the module does not fit it.
        DivergedError: the loss is no longer finite.
        PlatformError: the device that the settings name is missing.
    """
    folder = Path(work) if work is not None else None
    return Initialisation(
        run_training(
            settings or TrainSettings(),
            data,
            folder,
            module=module,
            resume=resume,
            on_progress=on_progress,
        )
    )


def load(folder: str | Path, module: nn.Module | None = None) -> Initialisation:
    """Read a checkpoint.

    Args:
        folder: what `Initialisation.save` or `reptile train` wrote.
        module: a network of the same structure, if it was trained as a user's module.

    Raises:
        InputError: missing or damaged, or it needs another module.
    """
    return Initialisation(load_checkpoint(Path(folder), module))
