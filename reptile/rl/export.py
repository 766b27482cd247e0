"""A policy and its update as ONNX graphs: a bundle that learns a task from its own trajectories.

`policy.onnx`: weights [P], observations [steps, O] → outputs [steps, A], means or logits, and, of a
normal policy, deviation [A]. `update.onnx`: weights, observations, actions, advantages [steps] and
learning_rate [] → updated [P] and loss [], one step of the policy gradient. `initial.npy`: the
weights to start from. manifest.json tells the rest. Standard operators, free numbers of steps.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.func import grad_and_value

from reptile.errors import VerificationError
from reptile.export.graphs import Spec, Specs, describe, to_onnx
from reptile.export.tracing import BATCH, trace
from reptile.export.verify.conformance import Check
from reptile.files import atomic_directory, sha256_file, write_json
from reptile.provenance import versions
from reptile.rl.policy import Policy
from reptile.rl.train import Trained

MANIFEST_FILE, INITIAL_FILE = "manifest.json", "initial.npy"
LIMIT = 1e-4  # of the graphs' error, relative to the largest value
STEPS = (1, 7, 400)  # numbers of steps that are verified
UPDATES, RATE = 5, 0.01  # in a row, and their step size


class _Act(nn.Module):
    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, weights: Tensor, observations: Tensor) -> tuple[Tensor, ...]:
        outputs = self.policy.outputs(weights, observations)
        if self.policy.discrete:
            return (outputs,)
        return outputs, self.policy.log_deviation(weights).exp()


class _Update(nn.Module):
    def __init__(self, policy: Policy) -> None:
        super().__init__()
        actions = _actions(policy)
        example = (
            torch.zeros(policy.size),
            torch.zeros(BATCH, _observations(policy)),
            torch.zeros((BATCH, *map(int, actions.shape[1:])), dtype=actions.dtype),
            torch.zeros(BATCH),
        )

        def loss(weights: Tensor, observations: Tensor, actions: Tensor, shares: Tensor) -> Tensor:
            logs = policy.log_probability(weights, observations, actions)
            return -(shares * logs).sum()

        self.gradient = trace(grad_and_value(loss), example, (1, 2, 3), self)

    def forward(
        self,
        weights: Tensor,
        observations: Tensor,
        actions: Tensor,
        advantages: Tensor,
        learning_rate: Tensor,
    ) -> tuple[Tensor, Tensor]:
        shares = advantages / torch.ones_like(advantages).sum()
        gradient, loss = self.gradient(weights, observations, actions, shares)
        return weights - learning_rate * gradient, loss


def export_policy(trained: Trained, folder: Path) -> list[Check]:
    """Write the bundle, if its graphs compute what PyTorch does; return the checks.

    Raises:
        VerificationError: they do not; nothing is written.
        InputError: the folder cannot be written.
    """
    policy, family, state, run = trained
    weights = Spec(torch.float32, (policy.size,))
    seen = Spec(torch.float32, ("steps", family.observations))
    outputs: Specs = {"outputs": Spec(torch.float32, ("steps", family.actions))}
    if not policy.discrete:
        outputs["deviation"] = Spec(torch.float32, (family.actions,))
    steps = {
        "weights": weights,
        "observations": seen,
        "actions": _actions(policy),
        "advantages": Spec(torch.float32, ("steps",)),
        "learning_rate": Spec(torch.float32, ()),
    }
    updated = {"updated": weights, "loss": Spec(torch.float32, ())}
    graphs = {
        "policy": to_onnx(
            "policy", _Act(policy), {"weights": weights, "observations": seen}, outputs
        ),
        "update": to_onnx("update", _Update(policy), steps, updated),
    }
    with atomic_directory(folder) as temporary:
        for name, graph in graphs.items():
            onnx.save(graph, temporary / f"{name}.onnx")
        np.save(temporary / INITIAL_FILE, state.weights.numpy())
        checks = list(verify(trained, temporary))
        if wrong := [check for check in checks if not check.passed]:
            raise VerificationError(
                f"{wrong[0].name}: {wrong[0].measured} is above {wrong[0].limit:g}"
            )
        write_json(
            temporary / MANIFEST_FILE,
            {
                "format": 1,
                "kind": "policy",
                "settings": run.settings.model_dump(mode="json"),
                "horizon": family.horizon,
                "discrete": policy.discrete,
                "graphs": {
                    name: {
                        "path": f"{name}.onnx",
                        "inputs": describe(graph.graph.input),
                        "outputs": describe(graph.graph.output),
                    }
                    for name, graph in graphs.items()
                },
                "files": {path.name: sha256_file(path) for path in sorted(temporary.iterdir())},
                "versions": versions("torch", "onnx", "onnxruntime", "gymnasium"),
            },
        )
    return checks


def verify(trained: Trained, folder: Path) -> Iterator[Check]:
    """Compare the graphs with PyTorch in float64, on drawn steps."""
    policy, family, state, run = trained
    rng = np.random.default_rng(run.settings.seed)
    for threads in (1, 2):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        act, update = (
            ort.InferenceSession(folder / f"{name}.onnx", options) for name in ("policy", "update")
        )
        for number in STEPS:
            weights = state.weights.numpy()
            exact = state.weights.double()
            for _ in range(UPDATES):
                seen = rng.normal(size=(number, family.observations)).astype(np.float32)
                (outputs, *_) = act.run(None, {"weights": weights, "observations": seen})
                expected = policy.outputs(exact, torch.from_numpy(seen).double())
                drawn = policy.act(
                    torch.from_numpy(weights)[None], torch.from_numpy(seen)[None], rng
                )
                actions = drawn[0].numpy()
                advantages = rng.normal(size=number).astype(np.float32)
                feeds = {
                    "weights": weights,
                    "observations": seen,
                    "actions": actions,
                    "advantages": advantages,
                    "learning_rate": np.array(RATE, np.float32),
                }
                weights = update.run(["updated"], feeds)[0]
                exact = _updated(policy, exact, seen, actions, advantages)
            where = f"{number} steps, {threads} thread{'s' * (threads > 1)}"
            yield Check.at_most(f"outputs, {where}", _error(outputs, expected), LIMIT)
            yield Check.at_most(
                f"weights after {UPDATES} updates, {where}", _error(weights, exact), LIMIT
            )


def _updated(
    policy: Policy,
    weights: Tensor,
    seen: np.ndarray,
    actions: np.ndarray,
    advantages: np.ndarray,
) -> Tensor:
    """Take the step in float64, by autograd."""
    leaf = weights.clone().requires_grad_()
    given = torch.from_numpy(actions)
    logs = policy.log_probability(
        leaf, torch.from_numpy(seen).double(), given if policy.discrete else given.double()
    )
    loss = -(torch.from_numpy(advantages).double() * logs).mean()
    (gradient,) = torch.autograd.grad(loss, leaf)
    return weights - RATE * gradient


def _error(found: np.ndarray, expected: Tensor) -> float:
    exact = expected.detach().numpy()
    return float(np.abs(found - exact).max() / max(np.abs(exact).max(), 1.0))


def _observations(policy: Policy) -> int:
    return policy.network.image_shape[-1]


def _actions(policy: Policy) -> Spec:
    if policy.discrete:
        return Spec(torch.int64, ("steps",))
    return Spec(torch.float32, ("steps", policy.network.outputs))
