"""The task `train` of the pipeline as a program, for a pod's process here or in a container."""

from pathlib import Path

import numpy as np
from patterns import make_data

from reptile.files import write_json
from reptile.settings import TrainSettings

SETTINGS = TrainSettings.model_validate(
    {
        "engine": "eager",
        "model": {"filters": 4},
        "ways": 3,
        "train_shots": 4,
        "inner_steps": 3,
        "inner_batch": 4,
        "meta_batch": 2,
        "meta_iterations": 600,
        "checkpoint_every": 100,
        "validation_tasks": 1,
        "device": "cpu",
    }
)
FILES = ("weights.safetensors", "checkpoint.json")
"""What a checkpoint consists of."""
SCRIPT = """
import json, logging, sys
from pathlib import Path
from types import SimpleNamespace
from components import artifacts, supervise
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
supervise.PAUSE = 0
folder, settings, work, secret = Path(sys.argv[1]), *sys.argv[2:]
made = {name: SimpleNamespace(path=str(folder / name), metadata={})
        for name in ("prepared", "checkpoint", "curves")}
artifacts.train(settings, work, 1, *made.values(), Path(secret))
print(json.dumps(made["checkpoint"].metadata))
"""
"""The component's call, with the least that KFP's artifacts have.

Its arguments: folder of prepared data and outputs, settings, work, folder with the store's keys.
"""


def write_prepared(folder: Path) -> None:
    """Write prepared data of few images."""
    data = make_data()
    folder.mkdir(exist_ok=True)
    np.save(folder / "images.npy", data.images)
    write_json(folder / "dataset.json", data.index.model_dump(mode="json"))
