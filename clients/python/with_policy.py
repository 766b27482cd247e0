"""A policy learns where its goal is, in ONNX Runtime: no PyTorch, the environment in the loop.

    pip install 'reptile-fewshot[cpu,rl]'
    python with_policy.py artifacts/rl/bundle

The bundle is a policy's (`reptile rl export`). What a graph cannot do, the least squares of the
baseline, is a few lines of NumPy here.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from reptile.rl.environments import FAMILIES

Array = npt.NDArray[Any]


class Policy:
    """The bundle's two graphs."""

    def __init__(self, bundle: Path) -> None:
        self.manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        self.initial = np.load(bundle / "initial.npy")
        self._act, self._update = (
            ort.InferenceSession(bundle / self.manifest["graphs"][name]["path"])
            for name in ("policy", "update")
        )

    def act(self, weights: Array, observations: Array, rng: np.random.Generator) -> Array:
        """Draw actions: of a mean and a deviation, or of logits."""
        feeds = {"weights": weights, "observations": observations}
        outputs, *deviation = self._act.run(None, feeds)
        if not deviation:
            return np.asarray((outputs + rng.gumbel(size=outputs.shape)).argmax(-1))
        return np.asarray(
            outputs + deviation[0] * rng.standard_normal(outputs.shape, dtype=np.float32)
        )

    def update(self, weights: Array, steps: dict[str, Array]) -> Array:
        """Take one step of the policy gradient."""
        rate = np.array(self.manifest["settings"]["inner_rate"], np.float32)
        (updated,) = self._update.run(
            ["updated"], {"weights": weights, "learning_rate": rate, **steps}
        )
        return np.asarray(updated)


def collect(
    policy: Policy, weights: Array, goal: Array, number: int, rng: np.random.Generator
) -> tuple[float, dict[str, Array]]:
    """Let the policy act for some trajectories; return their mean return, and their steps."""
    family = FAMILIES[policy.manifest["settings"]["environment"]]
    env = family.make(np.repeat(goal[None], number, axis=0))
    seen, _ = env.reset(seed=int(rng.integers(2**31)))
    alive = np.ones(number, bool)
    observations, actions, rewards, masks = [], [], [], []
    for _ in range(policy.manifest["horizon"]):
        chosen = policy.act(weights, seen, rng)
        observations.append(seen)
        actions.append(chosen)
        masks.append(alive)
        seen, reward, ended, cut, _ = env.step(chosen)
        rewards.append(np.where(alive, reward, 0))
        alive = alive & ~(ended | cut)
    rewarded, mask = np.stack(rewards), np.stack(masks)  # [steps, trajectories]
    advantages = advantage(np.stack(observations), rewarded, mask, policy.manifest)
    steps = {
        "observations": np.stack(observations)[mask],
        "actions": np.stack(actions)[mask],
        "advantages": advantages.astype(np.float32),
    }
    return float(rewarded.sum(0).mean()), steps


def advantage(seen: Array, rewards: Array, mask: Array, manifest: dict[str, Any]) -> Array:
    """Return the returns to go less a fitted baseline, of unit deviation, where `mask` is true."""
    discount = manifest["settings"]["discount"]
    togo, after = np.zeros(rewards.shape), np.zeros(rewards.shape[1])
    for step in reversed(range(len(rewards))):
        after = togo[step] = rewards[step] + discount * after
    time = np.broadcast_to((np.arange(len(seen)) / 100)[:, None, None], (*seen.shape[:2], 1))
    x = np.clip(seen.astype(np.float64), -10, 10)
    features = np.concatenate([x, x**2, time, time**2, time**3, np.ones_like(time)], -1)[mask]
    gram = features.T @ features + 1e-5 * np.eye(features.shape[1])
    left = togo[mask] - features @ np.linalg.solve(gram, features.T @ togo[mask])
    return np.asarray((left - left.mean()) / (left.std() + 1e-8))


def main() -> None:
    """Learn three goals."""
    policy = Policy(Path(sys.argv[1]))
    rng = np.random.default_rng(0)
    goals = FAMILIES[policy.manifest["settings"]["environment"]].draw(rng, 3)
    for goal in goals:
        weights, returns = policy.initial, []
        for _ in range(4):
            mean, steps = collect(policy, weights, goal, 20, rng)
            returns.append(mean)
            weights = policy.update(weights, steps)
        shown = ", ".join(f"{mean:.1f}" for mean in returns)
        print(f"goal {goal.round(2).tolist()}: return before and after 1, 2, 3 updates: {shown}")


if __name__ == "__main__":
    main()
