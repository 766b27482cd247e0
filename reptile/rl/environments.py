"""Families of tasks: environments that differ in a goal, drawn anew for every task.

Vectorised: one environment of gymnasium's vector interface runs all trajectories of all tasks.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from reptile.errors import InputError

try:
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import VectorEnv
except ImportError:
    raise InputError("gymnasium is not installed: pip install 'reptile-fewshot[rl]'") from None

FloatArray = npt.NDArray[np.float32]
Goals = npt.NDArray[np.float32]
"""What tells tasks apart, float32 [N, goal size]."""


class Family(Protocol):
    """Tasks of one kind."""

    @property
    def name(self) -> str:
        """Of the settings."""

    @property
    def horizon(self) -> int:
        """The most steps of a trajectory."""

    @property
    def observations(self) -> int:
        """Size of an observation."""

    @property
    def actions(self) -> int:
        """Size of an action; of a discrete one, how many there are."""

    @property
    def discrete(self) -> bool:
        """Whether an action is an integer."""

    def draw(self, rng: np.random.Generator, tasks: int) -> Goals:
        """Draw goals [tasks, goal size]."""

    def make(self, goals: Goals) -> "VectorEnv[Any, Any, Any]":
        """Return environments that run side by side, one for each goal."""


class Navigation(gymnasium.Env[FloatArray, FloatArray]):
    """A point in the plane that moves to a goal (Finn et al. 2017, section 5.3).

    Observation: its position [2]. Action: its velocity [2], clipped to -0.1..0.1. Reward: minus the
    squared distance to the goal. It starts at the origin and ends within 0.01 of the goal.

    Args:
        goal: [2]; by default one is drawn at every reset.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-0.1, 0.1, (2,), np.float32)

    def __init__(self, goal: npt.ArrayLike | None = None) -> None:
        self._given = None if goal is None else np.asarray(goal, np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Go back to the origin."""
        super().reset(seed=seed)
        drawn = NavigationFamily().draw(self.np_random, 1)[0]
        self.goal = drawn if self._given is None else self._given
        self._position = np.zeros(2, np.float32)
        return self._position, {}

    def step(self, action: FloatArray) -> tuple[FloatArray, float, bool, bool, dict[str, Any]]:
        """Move by the clipped action."""
        self._position, reward, there = _move(self._position, np.asarray(action), self.goal)
        return self._position, float(reward), bool(there), False, {}


class _Vector(VectorEnv[Any, Any, Any]):
    """Environments in NumPy, side by side; whoever steps them stops at the end of a trajectory."""

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.DISABLED}  # noqa: RUF012

    def __init__(self, goals: Goals, observation: spaces.Space[Any], action: Any) -> None:
        self.goals, self.num_envs = goals, len(goals)
        self.single_observation_space, self.single_action_space = observation, action
        self.observation_space = gymnasium.vector.utils.batch_space(observation, self.num_envs)
        self.action_space = gymnasium.vector.utils.batch_space(action, self.num_envs)


class NavigationVector(_Vector):
    """Many of `Navigation`."""

    def __init__(self, goals: Goals) -> None:
        super().__init__(goals, Navigation.observation_space, Navigation.action_space)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Go back to the origin."""
        self._positions = np.zeros((self.num_envs, 2), np.float32)
        return self._positions, {}

    def step(self, actions: FloatArray) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Move by the clipped actions."""
        self._positions, rewards, there = _move(self._positions, actions, self.goals)
        return self._positions, rewards, there, np.zeros_like(there), {}


@dataclass(frozen=True)
class NavigationFamily:
    """`Navigation` with goals anywhere in -0.5..0.5."""

    name: str = "navigation"
    horizon: int = 100
    observations: int = 2
    actions: int = 2
    discrete: bool = False

    def draw(self, rng: np.random.Generator, tasks: int) -> Goals:
        """Draw goals [tasks, 2]."""
        return rng.uniform(-0.5, 0.5, (tasks, 2)).astype(np.float32)

    def make(self, goals: Goals) -> NavigationVector:
        """Return environments that run side by side, one for each goal."""
        return NavigationVector(goals)


class GridVector(_Vector):
    """A walk on a square of cells to a goal that cannot be seen.

    Observation: row and column in -1..1, float32 [2]. Action: up, down, left or right; into a wall
    it stays. Reward: 1 on reaching the goal, -0.05 for any other step. It starts in the middle.
    """

    SIZE = 7
    STEPS = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]])

    def __init__(self, goals: Goals) -> None:
        super().__init__(goals, spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(4))

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[FloatArray, dict[str, Any]]:
        """Go back to the middle."""
        self._cells = np.full((self.num_envs, 2), self.SIZE // 2)
        return self._seen(), {}

    def step(self, actions: npt.NDArray[np.int64]) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Walk one cell."""
        self._cells = np.clip(self._cells + self.STEPS[actions], 0, self.SIZE - 1)
        there = (self._cells == self.goals).all(1)
        rewards = np.where(there, 1.0, -0.05).astype(np.float32)
        return self._seen(), rewards, there, np.zeros_like(there), {}

    def _seen(self) -> FloatArray:
        middle = self.SIZE // 2
        return ((self._cells - middle) / middle).astype(np.float32)


@dataclass(frozen=True)
class GridFamily:
    """`GridVector` with a goal in any cell of the rim."""

    name: str = "grid"
    horizon: int = 20
    observations: int = 2
    actions: int = 4
    discrete: bool = True

    def draw(self, rng: np.random.Generator, tasks: int) -> Goals:
        """Draw goals [tasks, 2]: row and column."""
        last = GridVector.SIZE - 1
        cells = [(r, c) for r in range(last + 1) for c in range(last + 1) if {r, c} & {0, last}]
        return np.array(cells, np.float32)[rng.integers(len(cells), size=tasks)]

    def make(self, goals: Goals) -> GridVector:
        """Return environments that run side by side, one for each goal."""
        return GridVector(goals)


class _Cheetah(gymnasium.vector.VectorWrapper[Any, Any, Any]):
    """MuJoCo's half-cheetah, rewarded for what the goal asks instead of for running forward."""

    def __init__(self, env: "VectorEnv[Any, Any, Any]", goals: Goals, *, velocity: bool) -> None:
        super().__init__(env)
        self._goals, self._velocity = goals[:, 0], velocity

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Take a step; the cost of the effort is that of the original."""
        seen, _, ended, cut, info = self.env.step(actions)
        speed = info["x_velocity"]
        wanted = -np.abs(speed - self._goals) if self._velocity else self._goals * speed
        return seen, wanted + info["reward_ctrl"], ended, cut, info


@dataclass(frozen=True)
class CheetahFamily:
    """The half-cheetah of the MAML paper: to run forward or backward, or at a speed in 0..2."""

    velocity: bool
    horizon: int = 200
    observations: int = 17
    actions: int = 6
    discrete: bool = False

    @property
    def name(self) -> str:
        """Of the settings."""
        return f"half-cheetah-{'velocity' if self.velocity else 'direction'}"

    def draw(self, rng: np.random.Generator, tasks: int) -> Goals:
        """Draw goals [tasks, 1]: -1 or 1, or a speed."""
        drawn = rng.uniform(0, 2, tasks) if self.velocity else rng.choice([-1.0, 1.0], tasks)
        return drawn.astype(np.float32)[:, None]

    def make(self, goals: Goals) -> "VectorEnv[Any, Any, Any]":
        """Return environments that run side by side, one for each goal.

        Raises:
            InputError: MuJoCo is not installed.
        """
        try:
            env = gymnasium.make_vec(
                "HalfCheetah-v5", num_envs=len(goals), vectorization_mode="sync"
            )
        except (gymnasium.error.DependencyNotInstalled, ImportError):
            raise InputError(
                f"{self.name}: MuJoCo is not installed: pip install 'reptile-fewshot[rl-mujoco]'"
            ) from None
        return _Cheetah(env, goals, velocity=self.velocity)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        NavigationFamily(),
        GridFamily(),
        CheetahFamily(velocity=False),
        CheetahFamily(velocity=True),
    )
}


def _move(
    positions: FloatArray, actions: FloatArray, goals: Goals
) -> tuple[FloatArray, FloatArray, npt.NDArray[np.bool_]]:
    """Return positions [..., 2] after a step, the rewards [...] and who is at the goal [...]."""
    positions = positions + np.clip(actions, -0.1, 0.1).astype(np.float32)
    squared = np.square(positions - goals).sum(-1)
    return positions, -squared, squared < 0.01**2
