"""Both engines learn the same: not bit for bit, as rounding differs, but as well as each other."""

from pathlib import Path

import pytest

from reptile.data.prepare import prepare
from reptile.evaluate import Evaluation, evaluate
from reptile.learn.run import run_training
from reptile.settings import EvaluateSettings, PrepareSettings, TrainSettings


@pytest.mark.slow
@pytest.mark.parametrize("state", ["sequential", "parallel"])
def test_the_native_engine_reaches_the_eager_engines_accuracy(
    state: str, root: Path, tmp_path: Path
) -> None:
    source = PrepareSettings(source=str(root / "data/glyphs.zip"), cross_domain=())
    data = prepare(source, tmp_path / "prepared")

    def trained_by(engine: str) -> Evaluation:
        values = {"engine": engine, "optimizer": {"state": state}}
        settings = TrainSettings.model_validate(
            values | {"meta_iterations": 400, "checkpoint_every": 400, "device": "cpu"}
        )
        checkpoint = run_training(settings, data, tmp_path / engine)
        protocol = EvaluateSettings(tasks=300, shots=(1,))
        return evaluate(protocol, checkpoint, data, {})

    native, eager = (trained_by(engine).held_out[0] for engine in ("native", "eager"))
    for mode in ("transductive", "frozen"):
        ours, theirs = native.score("trained", mode), eager.score("trained", mode)
        print(f"{state}, {mode}: native {ours.mean:.4f}, eager {theirs.mean:.4f}")
        assert abs(ours.mean - theirs.mean) < ours.interval + theirs.interval
        assert theirs.mean > eager.score("random", mode).mean + 0.2  # something was learnt
