"""Settings of meta-reinforcement-learning, typed and checked as those of the stages are."""

from typing import Annotated, Literal

from pydantic import Field

from reptile.settings import Fraction, NonZero, Positive, Rate, Section, Seed, Width

EnvironmentName = Literal["navigation", "grid", "half-cheetah-direction", "half-cheetah-velocity"]
AlgorithmName = Literal["reptile", "fomaml", "maml", "joint", "random"]


class RLSettings(Section):
    """One training of a policy's initialisation, and how it is measured.

    The defaults are those of the 2-D navigation of Finn et al. (2017), but for the outer step: Adam
    instead of TRPO.
    """

    environment: EnvironmentName = "navigation"
    algorithm: AlgorithmName = "maml"
    """`joint`: a policy trained on all tasks, without an inner loop. `random`: not trained."""
    seed: Seed = 0
    hidden: Annotated[tuple[Width, ...], Field(min_length=1, max_length=4)] = (100, 100)
    tasks: Positive = 20
    """Tasks of a meta-iteration."""
    trajectories: Annotated[int, Field(ge=2)] = 20
    """Trajectories of each task before each update, in training and at test time."""
    updates: Annotated[int, Field(ge=1, le=10)] = 1
    """Inner policy-gradient updates in training."""
    inner_rate: Rate = 0.1
    outer_rate: Rate = 0.003
    """Step size of Adam: maml, fomaml and joint."""
    meta_step: NonZero = 1.0
    """reptile: how far the start moves towards the adapted weights; falls linearly to 0."""
    discount: Fraction = 0.99
    episodes: Positive = 100_000
    """Budget: trajectories that training may take in all, so that algorithms compare."""
    checkpoint_every: Positive = 10
    """Meta-iterations between checkpoints, which are also points of the curve."""
    test_tasks: Annotated[int, Field(ge=2)] = 40
    test_updates: Annotated[int, Field(ge=1, le=20)] = 3

    @property
    def episodes_per_iteration(self) -> int:
        """Trajectories of one meta-iteration: those before each update, and those of the loss."""
        rounds = {"reptile": self.updates, "joint": 1}.get(self.algorithm, self.updates + 1)
        return self.tasks * self.trajectories * rounds

    @property
    def iterations(self) -> int:
        """Meta-iterations that the budget allows."""
        return 0 if self.algorithm == "random" else self.episodes // self.episodes_per_iteration
