"""Trajectories of tasks side by side, and what a policy gradient takes of them."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reptile.rl.environments import Family, Goals
from reptile.rl.policy import Policy

RIDGE = 1e-5  # of the baseline


class Trajectories(NamedTuple):
    """R trajectories of each of T tasks, H steps at most."""

    observations: npt.NDArray[np.float32]  # [T, R, H, O]
    actions: npt.NDArray[np.float32] | npt.NDArray[np.int64]  # [T, R, H, A] or [T, R, H]
    rewards: npt.NDArray[np.float64]  # [T, R, H], 0 after the end
    mask: npt.NDArray[np.bool_]  # [T, R, H], False after the end

    @property
    def returns(self) -> npt.NDArray[np.float64]:
        """The mean undiscounted return of each task [T]."""
        return np.asarray(self.rewards.sum(-1).mean(-1))


class Batch(NamedTuple):
    """What the loss of a policy gradient takes: N steps of each of T tasks."""

    observations: Tensor  # [T, N, O]
    actions: Tensor  # [T, N, A], or integers [T, N]
    advantages: Tensor  # [T, N], 0 after the end
    mask: Tensor  # [T, N], 1 or 0


@torch.no_grad()
def rollout(
    policy: Policy,
    weights: Tensor,
    family: Family,
    goals: Goals,
    trajectories: int,
    rng: np.random.Generator,
) -> Trajectories:
    """Let a policy act until every trajectory has ended.

    Args:
        policy: gives the actions.
        weights: [T, P], those of each task.
        family: the environments.
        goals: [T, goal size].
        trajectories: R, of each task.
        rng: gives all noise; the same gives the same trajectories.
    """
    tasks, horizon = len(goals), family.horizon
    shape = (tasks, trajectories)
    env = family.make(np.repeat(goals, trajectories, axis=0))
    seen, _ = env.reset(seed=int(rng.integers(2**31)))
    observations = np.zeros((*shape, horizon, family.observations), np.float32)
    size = () if family.discrete else (family.actions,)
    actions = np.zeros((*shape, horizon, *size), np.int64 if family.discrete else np.float32)
    rewards = np.zeros((*shape, horizon))
    mask = np.zeros((*shape, horizon), bool)
    alive = np.ones(shape, bool)
    for step in range(horizon):
        observed = np.asarray(seen, np.float32).reshape(*shape, -1)
        chosen = policy.act(weights, torch.from_numpy(observed), rng).numpy()
        seen, reward, ended, cut, _ = env.step(chosen.reshape(-1, *size))
        observations[:, :, step], actions[:, :, step] = observed, chosen
        rewards[:, :, step] = np.where(alive, reward.reshape(shape), 0)
        mask[:, :, step] = alive
        alive &= ~(ended | cut).reshape(shape)
        if not alive.any():
            break
    env.close()
    return Trajectories(observations, actions, rewards, mask)


def batch(trajectories: Trajectories, discount: float) -> Batch:
    """Return the steps with their advantages: returns to go, less a baseline, of unit deviation.

    The baseline is linear in features of observation and time, and fitted to each task (Duan et
    al., Benchmarking deep reinforcement learning, 2016).
    """
    seen, actions, _, mask = trajectories
    tasks, number, horizon, _ = seen.shape
    togo = returns_to_go(trajectories.rewards, discount)
    advantages = np.zeros(togo.shape)
    for task in range(tasks):
        valid = mask[task]
        features = _features(seen[task])[valid]
        target = togo[task][valid]
        gram = features.T @ features + RIDGE * np.eye(features.shape[1])
        left = target - features @ np.linalg.solve(gram, features.T @ target)
        advantages[task][valid] = (left - left.mean()) / (left.std() + 1e-8)
    steps = number * horizon

    def flat(values: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values.reshape(tasks, steps, *values.shape[3:]))

    return Batch(flat(seen), flat(actions), flat(advantages).float(), flat(mask).float())


def returns_to_go(rewards: npt.NDArray[np.float64], discount: float) -> npt.NDArray[np.float64]:
    """Return the discounted sum of rewards [..., H] from each step on."""
    sums = np.zeros_like(rewards)
    after = np.zeros(rewards.shape[:-1])
    for step in reversed(range(rewards.shape[-1])):
        after = rewards[..., step] + discount * after
        sums[..., step] = after
    return sums


def _features(observations: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return [R, H, 2·O + 4]: the observation, its square, and powers of time."""
    seen = np.clip(observations.astype(np.float64), -10, 10)
    time = np.broadcast_to((np.arange(seen.shape[1]) / 100)[:, None], (*seen.shape[:2], 1))
    return np.concatenate([seen, seen**2, time, time**2, time**3, np.ones_like(time)], axis=-1)
