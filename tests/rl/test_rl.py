"""Meta-reinforcement-learning: gradients, environments, training, and the bundle."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from reptile import cli
from reptile.errors import InputError
from reptile.rl.compare import compare
from reptile.rl.environments import FAMILIES, GridVector, Navigation, NavigationFamily
from reptile.rl.export import export_policy
from reptile.rl.learners import STEPS, Sampler, State, loss, maml_loss, update
from reptile.rl.policy import Policy
from reptile.rl.rollout import Batch, batch, returns_to_go, rollout
from reptile.rl.settings import AlgorithmName, RLSettings
from reptile.rl.train import load, measure, train
from reptile.tasks import Purpose

SMALL = {
    "hidden": (4,),
    "tasks": 2,
    "trajectories": 3,
    "episodes": 24,
    "checkpoint_every": 1,
    "test_tasks": 3,
    "test_updates": 2,
}
NAMES = ("navigation", "grid")


def policy_of(name: str, hidden: tuple[int, ...] = (4,)) -> Policy:
    return Policy.of(FAMILIES[name], hidden)


def drawn_batches(name: str, number: int, tasks: int = 2) -> list[Batch]:
    """Batches of trajectories of a random policy, in float64."""
    policy, family = policy_of(name), FAMILIES[name]
    rng = np.random.default_rng(0)
    weights = policy.initialise(0).expand(tasks, -1)
    found = []
    for _ in range(number):
        steps = batch(
            rollout(policy, weights, family, family.draw(rng, tasks), 3, rng), discount=0.9
        )
        double = [each.double() if each.is_floating_point() else each for each in steps]
        found.append(Batch(*double))
    return found


def numeric(function: object, weights: torch.Tensor, places: list[int]) -> np.ndarray:
    """Central differences in some places."""
    found = []
    for place in places:
        step = torch.zeros_like(weights)
        step[place] = 1e-5
        up, down = (float(function(weights + sign * step)) for sign in (1, -1))  # type: ignore[operator]
        found.append((up - down) / 2e-5)
    return np.array(found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inner", [1, 2])
def test_the_meta_gradient_equals_finite_differences(name: str, inner: int) -> None:
    policy = policy_of(name)
    weights = policy.initialise(3).double() + 0.1
    *before, after = drawn_batches(name, inner + 1)

    def function(w: torch.Tensor) -> torch.Tensor:
        return maml_loss(policy, w, before, after, 0.3)

    exact = torch.func.grad(function)(weights)
    places = [0, 5, 9, policy.size - 2, policy.size - 1]
    assert exact[places].numpy() == pytest.approx(numeric(function, weights, places), abs=1e-7)
    first = torch.func.grad(lambda w: maml_loss(policy, w, before, after, 0.3, first_order=True))(
        weights
    )
    assert not torch.allclose(first, exact, rtol=1e-3), "the second derivatives count"


def test_first_order_is_the_gradient_at_the_adapted_weights() -> None:
    policy = policy_of("navigation")
    weights = policy.initialise(3).double()
    before, after = drawn_batches("navigation", 2)
    first = torch.func.grad(lambda w: maml_loss(policy, w, [before], after, 0.3, first_order=True))(
        weights
    )
    gradients = []
    for task in range(2):
        ours, theirs = (Batch(*(each[task] for each in steps)) for steps in (before, after))
        adapted = update(policy, weights, ours, 0.3)
        gradients.append(torch.func.grad(lambda w, s=theirs: loss(policy, w, s))(adapted))
    assert torch.allclose(first, torch.stack(gradients).mean(0), atol=1e-12)


def test_the_policy_gradient_of_a_bandit_is_that_of_the_closed_form() -> None:
    # One state, actions with rewards r: d E[r] / d logits = p * (r - p @ r).
    policy = policy_of("grid", hidden=(1,))
    weights = torch.zeros(policy.size, dtype=torch.float64)
    weights[-4:] = torch.tensor([0.3, -0.2, 0.1, 0.5])  # the head's bias
    rewards = torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    p = weights[-4:].softmax(0)
    # All actions as often as they are chosen: the expectation itself.
    counts = (p * 1000).round().long()
    actions = torch.repeat_interleave(torch.arange(4), counts)
    steps = Batch(
        torch.zeros(len(actions), 2, dtype=torch.float64),
        actions,
        rewards[actions],
        torch.ones(len(actions), dtype=torch.float64),
    )
    gradient = -torch.func.grad(lambda w: loss(policy, w, steps))(weights)[-4:]
    assert gradient.numpy() == pytest.approx((p * (rewards - p @ rewards)).numpy(), abs=2e-3)


def test_the_log_density_is_that_of_torchs_distribution() -> None:
    policy = policy_of("navigation")
    weights = policy.initialise(1)
    weights[-2:] = torch.tensor([-0.5, 0.3])
    seen, actions = torch.randn(5, 2), torch.randn(5, 2)
    normal = torch.distributions.Normal(policy.outputs(weights, seen), weights[-2:].exp())
    expected = normal.log_prob(actions).sum(-1)
    assert torch.allclose(policy.log_probability(weights, seen, actions), expected, atol=1e-5)


def test_returns_to_go_by_hand() -> None:
    found = returns_to_go(np.array([[1.0, 2.0, 4.0]]), 0.5)
    assert found.tolist() == [[1 + 0.5 * 2 + 0.25 * 4, 2 + 0.5 * 4, 4]]


def test_advantages_have_no_mean_and_unit_deviation_and_none_after_the_end() -> None:
    policy, family = policy_of("grid"), FAMILIES["grid"]
    rng = np.random.default_rng(2)
    goals = family.draw(rng, 2)
    found = rollout(policy, policy.initialise(0).expand(2, -1), family, goals, 40, rng)
    assert not found.mask.all(), "some reached the goal"
    steps = batch(found, 0.9)
    for advantages, mask in zip(steps.advantages, steps.mask, strict=True):
        valid = advantages[mask > 0]
        assert float(valid.mean()) == pytest.approx(0, abs=1e-5)
        assert float(valid.std(correction=0)) == pytest.approx(1, abs=1e-4)
        assert not advantages[mask == 0].any()


def test_navigation_is_a_sound_environment() -> None:
    check_env(Navigation(), skip_render_check=True)


def test_the_vectorised_navigation_is_many_of_the_single_one() -> None:
    rng = np.random.default_rng(0)
    goals = NavigationFamily().draw(rng, 3)
    many = NavigationFamily().make(goals)
    single = [Navigation(goal) for goal in goals]
    many.reset()
    for env in single:
        env.reset()
    for _ in range(5):
        actions = rng.normal(scale=0.2, size=(3, 2)).astype(np.float32)
        seen, rewards, ended, _, _ = many.step(actions)
        for i, env in enumerate(single):
            one_seen, one_reward, one_ended, _, _ = env.step(actions[i])
            assert np.array_equal(one_seen, seen[i])
            assert one_reward == pytest.approx(float(rewards[i]))
            assert one_ended == ended[i]


def test_the_grid_rewards_the_goal_and_has_walls() -> None:
    env = GridVector(np.array([[3, 6], [0, 0]], np.float32))
    env.reset()
    for _ in range(2):
        seen, rewards, ended, _, _ = env.step(np.array([3, 0]))  # right, up
        assert rewards.tolist() == pytest.approx([-0.05, -0.05])
    seen, rewards, ended, _, _ = env.step(np.array([3, 0]))
    assert rewards.tolist() == pytest.approx([1, -0.05])
    assert ended.tolist() == [True, False]
    seen, *_ = env.step(np.array([3, 0]))
    assert seen.tolist() == [[0, 1], [-1, 0]], "it stays at the wall"


@pytest.mark.parametrize("name", ["half-cheetah-direction", "half-cheetah-velocity"])
def test_the_half_cheetah_is_rewarded_for_the_goal(name: str) -> None:
    pytest.importorskip("mujoco")
    family = FAMILIES[name]
    goals = np.array([[-1.0], [1.0]] if "direction" in name else [[0.5], [2.0]], np.float32)
    env = family.make(goals)
    seen, _ = env.reset(seed=0)
    assert seen.shape == (2, family.observations)
    _, rewards, _, _, info = env.step(np.zeros((2, family.actions), np.float32))
    speed = info["x_velocity"]
    wanted = goals[:, 0] * speed if "direction" in name else -np.abs(speed - goals[:, 0])
    assert rewards == pytest.approx(wanted, abs=1e-6), "no effort, no cost"


@pytest.mark.parametrize("algorithm", STEPS)
@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_training_resumes_bit_for_bit(
    name: str, algorithm: str, tmp_path: Path
) -> None:
    settings = RLSettings.model_validate(SMALL | {"environment": name, "algorithm": algorithm})
    whole = train(settings, tmp_path / "whole")
    assert settings.iterations >= 2

    def stop(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "cut", stop)
    assert load(tmp_path / "cut").run.iteration == 1
    resumed = train(settings, tmp_path / "cut")
    assert torch.equal(resumed.state.weights, whole.state.weights)
    assert not torch.equal(whole.state.weights, whole.policy.initialise(0))
    for file in ("weights.safetensors", "run.json"):
        assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_training_on_all_tasks_raises_the_return(tmp_path: Path) -> None:
    settings = RLSettings(
        algorithm="joint", hidden=(16,), tasks=5, trajectories=5, episodes=500, outer_rate=0.02
    )
    trained = train(settings, tmp_path / "joint")
    random = trained._replace(state=State.start(trained.policy.initialise(0)))
    after, before = (
        measure(each, Purpose.EVALUATE, 10, 0, seed=1)[0].mean() for each in (trained, random)
    )
    assert after > before + 20


def test_an_update_raises_the_return_of_its_task() -> None:
    policy, family = policy_of("navigation", (16,)), FAMILIES["navigation"]
    rng = np.random.default_rng(0)
    goals = family.draw(rng, 4)
    weights = policy.initialise(0)
    sample = Sampler(policy, family, goals, 20, 0.99, rng)
    found, steps = sample(weights)
    adapted = torch.stack(
        [update(policy, weights, Batch(*(each[t] for each in steps)), 0.5) for t in range(4)]
    )
    better, _ = sample(adapted)
    assert better.returns.mean() > found.returns.mean()


def test_algorithms_are_compared_and_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    settings = RLSettings.model_validate(SMALL)
    said: set[str] = set()

    def observe(what: str, done: int, total: int) -> None:
        said.add(what)

    names: tuple[AlgorithmName, ...] = ("reptile", "maml", "random")
    rows = compare(settings, names, 2, tmp_path, observe)
    assert said == {f"{name}, seed {seed}" for name in names[:2] for seed in (0, 1)}
    means = [float(returns[2].mean()) for returns in rows[1].returns]
    score = rows[1].score(2)
    assert score.mean == pytest.approx(np.mean(means))
    assert score.interval == pytest.approx(12.706 * abs(means[0] - means[1]) / 2, rel=1e-4)
    assert "| random |" in (tmp_path / "result.md").read_text()
    assert (tmp_path / "result.html").read_text().count("<svg") == 2
    said.clear()
    again = compare(settings, names, 2, tmp_path, observe)
    assert said == set()
    assert [row.score(1) for row in again] == [row.score(1) for row in rows]


@pytest.mark.parametrize("name", NAMES)
def test_the_bundle_adapts_as_pytorch_does(name: str, tmp_path: Path) -> None:
    settings = RLSettings.model_validate(SMALL | {"environment": name, "algorithm": "reptile"})
    trained = train(settings, tmp_path / "policy")
    assert all(check.passed for check in export_policy(trained, tmp_path / "bundle"))
    update_graph = ort.InferenceSession(tmp_path / "bundle/update.onnx")
    act = ort.InferenceSession(tmp_path / "bundle/policy.onnx")
    policy, family = trained.policy, trained.family
    goals = family.draw(np.random.default_rng(5), 1)
    by_torch = trained.state.weights
    by_onnx = np.load(tmp_path / "bundle/initial.npy")
    for number in range(3):
        noise = [np.random.default_rng(number) for _ in range(2)]
        found = rollout(policy, by_torch[None], family, goals, 4, noise[0])
        theirs = rollout(policy, torch.from_numpy(by_onnx)[None], family, goals, 4, noise[1])
        assert theirs.returns == pytest.approx(found.returns, rel=1e-3)
        steps = batch(found, settings.discount)
        valid = steps.mask[0] > 0
        (outputs, *_) = act.run(
            None, {"weights": by_onnx, "observations": steps.observations[0].numpy()}
        )
        expected = policy.outputs(by_torch, steps.observations[0]).numpy()
        assert outputs == pytest.approx(expected, abs=1e-4)
        by_torch = update(policy, by_torch, Batch(*(each[0] for each in steps)), 0.1)
        feeds = {
            "weights": by_onnx,
            "observations": steps.observations[0][valid].numpy(),
            "actions": steps.actions[0][valid].numpy(),
            "advantages": steps.advantages[0][valid].numpy(),
            "learning_rate": np.array(0.1, np.float32),
        }
        (by_onnx,) = update_graph.run(["updated"], feeds)
        assert by_onnx == pytest.approx(by_torch.numpy(), abs=1e-4)


def test_the_client_learns_in_onnx_runtime_as_pytorch_does(tmp_path: Path, root: Path) -> None:
    settings = RLSettings.model_validate(SMALL | {"algorithm": "reptile"})
    trained = train(settings, tmp_path / "policy")
    export_policy(trained, tmp_path / "bundle")
    client = runpy.run_path(str(root / "clients/python/with_policy.py"))
    policy = client["Policy"](tmp_path / "bundle")
    goal = np.array([0.3, -0.2], np.float32)
    mean, steps = client["collect"](policy, policy.initial, goal, 6, np.random.default_rng(7))
    found = rollout(
        trained.policy,
        trained.state.weights[None],
        trained.family,
        goal[None],
        6,
        np.random.default_rng(7),
    )
    assert mean == pytest.approx(float(found.returns[0]), rel=1e-4)
    ours = batch(found, settings.discount)
    adapted = update(trained.policy, trained.state.weights, Batch(*(each[0] for each in ours)), 0.1)
    assert policy.update(policy.initial, steps) == pytest.approx(adapted.numpy(), abs=1e-5)
    program = (
        "import runpy, sys; sys.argv = ['with_policy.py', sys.argv[1]]; "
        f"runpy.run_path({str(root / 'clients/python/with_policy.py')!r}, run_name='__main__'); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "bundle")],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("return before and after") == 3


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one meta-iteration of maml takes 12"):
        train(RLSettings.model_validate(SMALL | {"episodes": 5}), tmp_path)
    with pytest.raises(InputError, match="no checkpoint of a policy"):
        load(tmp_path / "none")
    train(RLSettings.model_validate(SMALL), tmp_path / "run")
    with pytest.raises(InputError, match=r"other settings \(seed: 0, now 1\)"):
        train(RLSettings.model_validate(SMALL | {"seed": 1}), tmp_path / "run")
    (tmp_path / "run/weights.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="damaged, train again"):
        load(tmp_path / "run")


def test_the_commands_train_compare_and_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [
        word
        for key, value in SMALL.items()
        for word in ("-S", f"{key}={value}".replace("(4,)", "[4]"))
    ]

    def call(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["reptile", "rl", *words])
        with pytest.raises(SystemExit) as stop:
            cli.run()
        return int(stop.value.code or 0)

    assert (
        call("train", "runs/maml", "-S", "environment=navigation", "-S", "algorithm=maml", *small)
        == 0
    )
    assert call("export", "runs/maml", "runs/bundle") == 0
    assert (tmp_path / "runs/bundle/manifest.json").is_file()
    assert call("compare", "reptile", "maml", "random", "--seeds", "2", *small) == 0
    assert "| maml |" in capsys.readouterr().out
    assert call("compare", "mamal", *small) == 2
    assert call("train", "runs/other", "-S", "tasks=0") == 2
    error = capsys.readouterr().err
    assert "mamal: no such algorithm; there are reptile, fomaml" in error
    assert "tasks = 0" in error
