"""Whatever strangers send, the server answers with no fault of its own, keeps to its bounds, and
answers everybody else as before."""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hostile_requests import Attacker, Target
from wire import Case, Reply, Verdict, attack_all

from benchmarks.server import Footprint, Server

SECRET = "canary.txt"  # the name of a file
CANARY = "canary-7d1f"  # what is in it
CONNECTIONS = 32
SEED = 5
MIB = 1 << 20
MOST_AT_ONCE = 1024 * MIB
MOST_KEPT = 400 * MIB  # what malloc does not give back of the largest bodies, and the tasks
MOST_GROWTH = 100 * MIB  # from the first half of the attacks to the second
POOLS = 4  # threads that start when they are first needed


@pytest.fixture
def attacked(exported: Path, tmp_path: Path) -> Iterator[tuple[Server, Target]]:
    """A server with one task, and a file beside its folders that nobody may read."""
    for folder in (exported.parent, tmp_path):
        (folder / SECRET).write_text(CANARY)
    options = ("--tasks", str(tmp_path / "tasks"), "-S", "max_tasks=50", "-S", "body_seconds=5")
    with Server(exported, *options) as server:
        manifest = json.loads((exported / "manifest.json").read_bytes())
        shape, ways = tuple(manifest["task"]["image_shape"]), manifest["task"]["ways"]
        yield server, Target(adapt(server, shape), shape, ways, SECRET)


def adapt(server: Server, shape: tuple[int, ...]) -> str:
    images = np.random.default_rng(1).integers(0, 256, (4, *shape)).tolist()
    answer = server.request("POST", "/tasks", {"images": images, "labels": ["a", "a", "b", "b"]})
    assert answer.status == 201, answer
    return str(answer.json()["id"])


def predict(server: Server, target: Target) -> list[dict[str, float]]:
    images = np.random.default_rng(2).integers(0, 256, (8, *target.shape)).tolist()
    answer = server.request("POST", f"/tasks/{target.task}/predict", {"images": images})
    assert answer.status == 200, answer
    return [one["probabilities"] for one in answer.json()["predictions"]]


def complaint(case: Case, reply: Reply) -> str | None:
    """Say what is wrong with a reply."""
    text = reply.body.decode(errors="replace")
    if reply.status < 0:
        return "hangs"
    if reply.status == 0:
        return "no answer" if case.answered else None
    if reply.status >= 500 and not (reply.status == 503 and "retry-after" in reply.headers):
        return f"{reply.status} {text[:200]}"
    if CANARY in text or "root:x:" in text or "Traceback" in text:
        return f"gives away {text[:200]}"
    if reply.status == 429 and not reply.headers.get("retry-after", "").isdecimal():
        return "429 without Retry-After"
    if case.statuses and reply.status not in case.statuses:
        return f"{reply.status} instead of {sorted(case.statuses)}: {text[:200]}"
    if reply.status >= 400 and not case.malformed:
        try:
            ((key, message),) = json.loads(text).items()
        except ValueError:
            return f"{reply.status} is no JSON object with one error: {text[:200]}"
        if key != "error" or not isinstance(message, str) or not 5 < len(message) < 2000:
            return f"{reply.status} is no short error: {text[:200]}"
    return None


def check_attacks(server: Server, target: Target, seed: int, numbers: range) -> Counter[int]:
    """Send attacks; nothing may fail, stay behind, or change an answer to others."""
    attacker = Attacker(target, seed)

    def attack(numbers: range) -> list[Verdict]:
        cases = map(attacker.case, numbers)
        return asyncio.run(attack_all(server.port, cases, CONNECTIONS, complaint))

    found = attack(range(-50, 0))  # so that everything has been used once
    right, before = predict(server, target), server.footprint
    start, middle = time.monotonic(), len(numbers) // 2
    found += attack(numbers[:middle])
    halfway = server.footprint
    found += attack(numbers[middle:])
    seconds = time.monotonic() - start

    assert server.process.poll() is None, server.log[-3000:]
    # At once, and the same, but for the rounding of a task that was asked often.
    for found_now, was in zip(predict(server, target), right, strict=True):
        assert found_now == pytest.approx(was, abs=1e-5)
    wrong = [f"{one.name}: {one.complaint}" for one in found if one.complaint]
    assert not wrong, f"{len(wrong)} of {len(found)}:\n" + "\n".join(wrong[:20])
    assert not re.findall(r".*(?:Traceback|Exception in ASGI).*", server.log)
    after = settled(server, before)
    statuses = Counter(one.status for one in found)
    print(f"{len(found)} in {seconds:.0f} s: {dict(sorted(statuses.items()))}")
    print(before, halfway, after, sep="\n")
    assert after.files <= before.files
    assert after.threads <= before.threads + POOLS
    assert after.peak < MOST_AT_ONCE
    assert after.resident < before.resident + MOST_KEPT
    assert after.resident < halfway.resident + MOST_GROWTH
    return statuses


def settled(server: Server, before: Footprint) -> Footprint:
    """Return the footprint once connections that were dropped are gone, or after a while."""
    until = time.monotonic() + 15
    while (now := server.footprint).files > before.files and time.monotonic() < until:
        time.sleep(0.1)
    return now


def test_attacks_do_no_harm(attacked: tuple[Server, Target]) -> None:
    statuses = check_attacks(*attacked, SEED, range(600))
    assert statuses.keys() >= {200, 201, 400, 404, 405}  # the attacks reach what they aim at


@pytest.mark.slow
def test_twenty_thousand_attacks_do_no_harm(attacked: tuple[Server, Target]) -> None:
    assert check_attacks(*attacked, SEED + 1, range(20_000)).total() > 20_000
