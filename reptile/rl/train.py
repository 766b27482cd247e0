"""Training a policy's initialisation, with exact resume; and measuring it on new tasks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from reptile.errors import DivergedError, InputError
from reptile.files import atomic_directory, write_json
from reptile.rl.environments import FAMILIES, Family
from reptile.rl.learners import STEPS, Sampler, State, updates
from reptile.rl.policy import Policy
from reptile.rl.rollout import batch, rollout
from reptile.rl.settings import RLSettings
from reptile.tasks import Purpose, random_stream

WEIGHTS_FILE, INFO_FILE = "weights.safetensors", "run.json"
VALIDATION_TASKS = 10  # of each point of the curve
Returns = npt.NDArray[np.float64]


class Point(BaseModel):
    """A point of the learning curve: returns on validation tasks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    episodes: int
    """Trajectories that training had taken."""
    before: float
    after: float
    """After the updates of the settings."""


class Run(BaseModel):
    """What a checkpoint's run.json holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    settings: RLSettings
    iteration: int = 0
    curve: tuple[Point, ...] = ()


class Trained(NamedTuple):
    """A policy's initialisation."""

    policy: Policy
    family: Family
    state: State
    run: Run


def train(
    settings: RLSettings,
    folder: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trained:
    """Train within the budget of episodes; write checkpoints to `folder` and resume from them.

    The same settings give the same weights, whether training was interrupted or not.

    Args:
        settings: of the training.
        folder: of the checkpoint.
        on_progress: called with the meta-iterations done, and all of them.

    Raises:
        InputError: the budget is below one meta-iteration, or the folder has another run.
        DivergedError: the weights are no longer finite.
    """
    iterations = settings.iterations
    if iterations < 1 and settings.algorithm != "random":
        raise InputError(
            f"episodes = {settings.episodes}: one meta-iteration of {settings.algorithm} takes "
            f"{settings.episodes_per_iteration}; raise episodes, or lower tasks or trajectories"
        )
    policy, family, state, run = _start(settings, folder)
    for iteration in range(run.iteration, iterations):
        rng = random_stream(settings.seed, Purpose.TRAIN, iteration)
        goals = family.draw(rng, settings.tasks)
        sample = Sampler(policy, family, goals, settings.trajectories, settings.discount, rng)
        state = STEPS[settings.algorithm](state, sample, settings)
        if not state.weights.isfinite().all():
            raise DivergedError(
                f"the weights are no longer finite in meta-iteration {iteration + 1}: lower "
                f"inner_rate (now {settings.inner_rate:g}) or outer_rate (now "
                f"{settings.outer_rate:g})"
            )
        done = iteration + 1
        if done % settings.checkpoint_every == 0 or done == iterations:
            point = _point(policy, family, state.weights, settings, done)
            run = run.model_copy(update={"iteration": done, "curve": (*run.curve, point)})
            save(folder, Trained(policy, family, state, run))
        on_progress(done, iterations)
    if iterations == 0:
        save(folder, Trained(policy, family, state, run))
    return Trained(policy, family, state, run)


def measure(
    trained: Trained,
    purpose: Purpose,
    tasks: int,
    number: int,
    seed: int | None = None,
) -> Returns:
    """Return the mean return of each task before and after each update, [updates + 1, tasks].

    Args:
        trained: where every task starts.
        purpose: which tasks.
        tasks: how many.
        number: updates.
        seed: of tasks and noise; by default that of training.
    """
    policy, family, state, run = trained
    settings = run.settings
    rng = random_stream(settings.seed if seed is None else seed, purpose)
    goals = family.draw(rng, tasks)
    weights = state.weights.expand(tasks, -1)
    returns = []
    for done in range(number + 1):
        found = rollout(policy, weights, family, goals, settings.trajectories, rng)
        returns.append(found.returns)
        if done < number:
            steps = batch(found, settings.discount)
            weights = updates(policy, weights, steps, settings.inner_rate)
    return np.stack(returns)


def save(folder: Path, trained: Trained) -> None:
    """Write a checkpoint, all of it or nothing."""
    state = trained.state
    with atomic_directory(folder) as temporary:
        tensors = {
            "weights": state.weights,
            "first_moment": state.first_moment,
            "second_moment": state.second_moment,
            "step": torch.tensor(state.step),
        }
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / WEIGHTS_FILE)
        write_json(temporary / INFO_FILE, trained.run.model_dump(mode="json"))


def load(folder: Path) -> Trained:
    """Read a checkpoint.

    Raises:
        InputError: there is none, or it is damaged.
    """
    try:
        run = Run.model_validate_json((folder / INFO_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError:
        raise InputError(f"{folder}: no checkpoint of a policy; train one") from None
    except (OSError, ValidationError, SafetensorError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{folder}: damaged, train again: {reason[:200]}") from None
    family = FAMILIES[run.settings.environment]
    policy = Policy.of(family, run.settings.hidden)
    vectors = [tensors.get(name) for name in ("weights", "first_moment", "second_moment")]
    if any(vector is None or vector.shape != (policy.size,) for vector in vectors):
        raise InputError(f"{folder}: damaged, its weights are of another policy; train again")
    first, second, third = (vector for vector in vectors if vector is not None)
    return Trained(policy, family, State(first, second, third, int(tensors["step"])), run)


def _start(settings: RLSettings, folder: Path) -> Trained:
    """Return the checkpoint in the folder, or the start of a new training."""
    if (folder / INFO_FILE).is_file():
        there = load(folder)
        if there.run.settings != settings:
            theirs, ours = (
                json.loads(each.model_dump_json()) for each in (there.run.settings, settings)
            )
            other = [f"{k}: {theirs[k]}, now {ours[k]}" for k in ours if theirs[k] != ours[k]]
            raise InputError(
                f"{folder} has a run of other settings ({', '.join(other)}); name another folder"
            )
        return there
    family = FAMILIES[settings.environment]
    policy = Policy.of(family, settings.hidden)
    weights = policy.initialise(settings.seed)
    return Trained(policy, family, State.start(weights), Run(settings=settings))


def _point(
    policy: Policy, family: Family, weights: Tensor, settings: RLSettings, done: int
) -> Point:
    trained = Trained(policy, family, State.start(weights), Run(settings=settings))
    returns = measure(trained, Purpose.VALIDATE, VALIDATION_TASKS, settings.updates).mean(1)
    return Point(
        episodes=done * settings.episodes_per_iteration,
        before=round(float(returns[0]), 4),
        after=round(float(returns[-1]), 4),
    )
