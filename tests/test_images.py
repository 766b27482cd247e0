"""The built images, run as a cluster would: an unknown user, a read-only root, no network."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pytest
import yaml
from object_store import BUCKET, ObjectStore, object_store
from training_task import FILES, SCRIPT, SETTINGS, write_prepared

from components.image import IMAGE as DEFAULT
from reptile import __version__
from reptile.learn.checkpoint import load_checkpoint
from reptile.learn.run_folder import is_whole
from reptile.runtime import FewShotModel
from reptile.settings import load_settings

ROOT = Path(__file__).parent.parent
ENGINE = shutil.which("docker") or shutil.which("podman") or ""
IMAGE = os.environ.get("IMAGE", DEFAULT)
SERVER = os.environ.get("SERVER_IMAGE", DEFAULT.replace("train", "serve"))
STRANGER = 12345  # a user that no file of the image knows
SMALL = (
    *("-S", "prepare.images_per_class=12", "-S", "prepare.cross_domain=[]"),
    *("-S", "train.engine=native", "-S", "train.meta_iterations=4", "-S", "train.meta_batch=2"),
    *("-S", "train.checkpoint_every=2", "-S", "train.validation_tasks=2"),
    *("-S", "train.model={name: conv4, filters: 8, downsampling: stride}"),
    *("-S", "beside.model={name: conv4, filters: 8, downsampling: stride}", "-S", "beside.ways=5"),
    *("-S", "beside.meta_iterations=4", "-S", "beside.checkpoint_every=2"),
    *("-S", "beside.validation_tasks=2"),
    *("-S", "evaluate.tasks=6", "-S", "evaluate.steps=5"),
    *("-S", "export.gate={accuracy: 0.0, above_random: -1.0, insist: true}"),
    *("-S", "verify.tasks=40", "-S", "verify.steps=5"),
)

pytestmark = [pytest.mark.images, pytest.mark.slow]


def engine(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(
        [ENGINE, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0 or not check, done.stdout
    return done.stdout


def confined(*command: str, options: tuple[str, ...] = (), image: str = IMAGE) -> str:
    return engine(
        *("run", "--rm", "--user", f"{STRANGER}:0", "--read-only", "--tmpfs", "/tmp"),
        *("--network", "none", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
        *options,
        image,
        *command,
    )


def as_root(*command: str, image: str = IMAGE) -> str:
    return engine("run", "--rm", "--user", "0", "--network", "none", image, *command)


@pytest.fixture(scope="module", autouse=True)
def images() -> None:
    """Make sure that there is an engine, and what it is to run."""
    if not ENGINE:
        pytest.skip("neither docker nor podman is installed")
    if not re.search(r"\d", engine("info", "--format", "{{.ServerVersion}}", check=False)):
        pytest.skip(f"{ENGINE} has no engine to talk to; start it")
    for name in (IMAGE, SERVER):
        found = engine("image", "inspect", name, check=False)
        if "No such image" in found or "not known" in found:
            pytest.skip(f"there is no image {name}; build it with `make images BASE_IMAGE=…`")


@pytest.fixture(params=[IMAGE, SERVER])
def image(request: pytest.FixtureRequest) -> str:
    return request.param


def settings_of(image: str) -> dict[str, Any]:
    return json.loads(engine("image", "inspect", image))[0]["Config"]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """All stages, with a second learner, on the starter data, which is mounted read-only."""
    data, results = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("artifacts")
    data.chmod(0o755)
    results.chmod(0o777)
    (data / "glyphs.zip").write_bytes(starter_data())
    for stage in ("prepare", "train", "train --beside", "evaluate", "export", "verify"):
        print(
            confined(
                *("reptile", *stage.split(), "--params", "/opt/reptile/params.yaml", *SMALL),
                options=(
                    *("--volume", f"{data}:/workspace/data:ro"),
                    *("--volume", f"{results}:/workspace/artifacts"),
                ),
            )
        )
    yield results
    shutil.rmtree(results)


def starter_data() -> bytes:
    store = ROOT / ".dvc/starter/files/md5"
    folder = re.search(r"md5: (\w{2})(\w+\.dir)", (ROOT / "data.dvc").read_text(encoding="utf-8"))
    assert folder
    (entry,) = json.loads((store / folder[1] / folder[2]).read_text(encoding="utf-8"))
    return (store / entry["md5"][:2] / entry["md5"][2:]).read_bytes()


def test_every_stage_runs_as_any_user_on_a_read_only_root(artifacts: Path) -> None:
    checkpoint = load_checkpoint(artifacts / "checkpoint")
    assert checkpoint.info.iteration == 4
    assert checkpoint.info.settings.engine == "native"  # which is an error where it cannot run
    verification = json.loads((artifacts / "verification.json").read_text(encoding="utf-8"))
    assert all(check["passed"] for check in verification["checks"])
    assert len(verification["checks"]) > 5
    written = {path.stat().st_uid for path in artifacts.rglob("*")}
    assert written == {STRANGER}


def test_a_bundle_made_in_the_image_works_outside_of_it(artifacts: Path) -> None:
    FewShotModel.load(artifacts / "bundle", threads=1).check()


def test_kernel_is_shipped_and_there_is_no_compiler() -> None:
    looked_for = ("c++", "g++", "gcc", "cc", "clang", "ld", "as", "make", "pip")
    assert (
        confined("sh", "-c", f"for c in {' '.join(looked_for)}; do command -v $c; done; true") == ""
    )
    script = (
        "from reptile.learn.engines.native.build import load_kernel; "
        "k = load_kernel(); print(k._name, bool(k.reptile_adapt))"
    )
    assert re.fullmatch(
        r"/opt/reptile/reptile/learn/engines/native/kernel-\w+-\w+\.so True\n",
        confined("python", "-c", script),
    )


def test_nothing_in_the_image_can_be_changed_by_who_runs_it(image: str) -> None:
    search = "find /opt /etc /usr -writable ! -type l 2> /dev/null | head -3; id -u"
    found = confined("sh", "-c", search, image=image)
    assert found == f"{STRANGER}\n"


def test_image_is_nobody_s_in_particular_and_says_what_it_is(image: str) -> None:
    settings = settings_of(image)
    user, _, group = settings["User"].partition(":")
    assert int(user) > 0
    assert group == "0"
    labels = {
        key.removeprefix("org.opencontainers.image."): value
        for key, value in settings["Labels"].items()
    }
    assert labels["version"] == __version__
    assert labels["licenses"] == "MIT"
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", labels["revision"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", labels["created"])
    assert labels["base.name"]


def test_nothing_that_the_build_was_given_for_itself_stays(image: str) -> None:
    history = engine("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    settings = settings_of(image)
    told = history + "\n".join(settings["Env"])
    assert not re.search(r"pip\.conf|PIP_|\.pem|INDEX|TOKEN|PASSWORD|://\S+:\S+@", told)
    assert as_root("sh", "-c", "ls -d /build /opt/tools 2> /dev/null; true", image=image) == ""
    base = settings["Labels"]["org.opencontainers.image.base.name"]
    if "No such image" in engine("image", "inspect", base, check=False):
        pytest.skip(f"the base {base} is not here to compare certificates with")
    # All but certifi's, which pip installed by its hash.
    names = r"\( -name '*.pem' -o -name '*.crt' -o -name pip.conf \)"
    listing = f"find / -xdev {names} -not -path '/opt/venv/*' -type f -exec sha256sum {{}} +"
    command = ("sh", "-c", f"{listing} | sort")
    certificates = as_root(*command, image=base)
    assert certificates
    assert as_root(*command, image=image) == certificates


def test_bill_of_materials_names_what_is_locked_and_the_project(image: str) -> None:
    bill = json.loads(confined("cat", "/opt/reptile/sbom.cdx.json", image=image))
    assert bill["bomFormat"] == "CycloneDX"
    parts = {part["name"].lower().replace("_", "-"): part["version"] for part in bill["components"]}
    stage = settings_of(image)["Labels"]["org.opencontainers.image.title"].removeprefix("reptile-")
    lock = (ROOT / f"requirements/{stage}-cpu.txt").read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", lock, re.MULTILINE))
    runtime = {name for name in parts if name.startswith("onnxruntime")}
    assert len(runtime) == 1
    wanted = {n.replace(".", "-"): v for n, v in locked.items() if n != "onnxruntime"}
    found = {n.replace(".", "-"): v for n, v in parts.items()}
    assert wanted.items() <= found.items()
    assert found["reptile-fewshot"] == __version__


def test_cluster_commands_start_in_the_image() -> None:
    assert "Six fields" in confined("python", "-m", "pipeline", "schedule", "--help")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_pipeline_delivers_in_containers_and_dvc_gives_the_same_bytes(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    settings = load_settings(clone / "params.yaml", SMALL[1::2])
    (clone / "params.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pipeline", "run-local", "--docker", "--image", IMAGE),
            *("--point", "5-way 1-shot frozen"),
        ],
        cwd=clone,
        env=os.environ | {"PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (clone / "artifacts/kubeflow").iterdir()
    FewShotModel.load(run / "export/bundle", threads=1).check()

    # DVC runs the code of the clone, for which there is no compiler: the kernel comes in the cache.
    cache, shipped = "/tmp/cache", "/opt/reptile/reptile/learn/engines/native/kernel-*.so"
    engine(
        *("run", "--rm", "--user", f"{os.getuid()}:{os.getgid()}", "--network", "none"),
        *("--env", f"XDG_CACHE_HOME={cache}", "--volume", f"{clone}:{clone}"),
        *("--workdir", str(clone), IMAGE, "sh", "-c"),
        f"mkdir -p -m 700 {cache}/reptile && cp {shipped} {cache}/reptile && dvc repro --pull",
    )
    for ours, theirs in {
        "prepare/prepared": "prepared",
        "train/checkpoint": "checkpoint",
        "train-beside/beside": "beside/checkpoint",
        "evaluate/evaluation": "evaluation",
        "export/bundle": "bundle",
        "export/bundles": "bundles",
    }.items():
        expected = contents(clone / "artifacts" / theirs)
        assert contents(run / ours) == expected != {}, ours


class Training:
    """The task `train` in containers that come and go, with work that outlives them."""

    def __init__(self, folder: Path, store: ObjectStore | None) -> None:
        self._folder, self._store, self._names = folder, store, list[str]()
        folder.chmod(0o777)
        write_prepared(folder / "prepared")
        self.work = f"s3://{BUCKET}/{folder.name}" if store else str(folder / "work")
        self.secret = store.mount(folder / "secret") if store else folder / "no-secret"

    def start(self) -> str:
        """Start the next container, whose outputs are in a folder of its own; return its name."""
        name = f"reptile-train-{os.getpid()}-{len(self._names)}"
        outputs = self._folder / name
        outputs.mkdir()
        outputs.chmod(0o777)
        (outputs / "prepared").symlink_to(self._folder / "prepared")
        self._names.append(name)
        engine(
            *("run", "--detach", "--name", name, "--user", f"{STRANGER}:0", "--read-only"),
            *("--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
            *("--network", "host" if self._store else "none"),
            *("--volume", f"{self._folder}:{self._folder}", IMAGE, "python", "-c", SCRIPT),
            *(str(outputs), SETTINGS.model_dump_json(), self.work, str(self.secret)),
        )
        return name

    def until_kept(self, name: str) -> None:
        """Wait for the first whole checkpoint."""
        until = time.monotonic() + 300
        while not self._kept():
            assert self._running(name), engine("logs", name)
            assert time.monotonic() < until, engine("logs", name)
            time.sleep(0.1)

    def ended(self, name: str) -> tuple[int, str]:
        """Wait for the container's end; return its exit code and log."""
        code = int(engine("wait", name))
        return code, engine("logs", name)

    def checkpoint(self, name: str) -> dict[str, bytes]:
        return {file: (self._folder / name / "checkpoint" / file).read_bytes() for file in FILES}

    def close(self) -> None:
        for name in self._names:
            engine("rm", "--force", name, check=False)

    def _kept(self) -> bool:
        if self._store:
            names = self._store.names(f"{self._folder.name}/")
            return any(name.endswith("sha256.json") for name in names)
        return any(is_whole(path) for path in Path(self.work).glob("*/iteration-*"))

    def _running(self, name: str) -> bool:
        return engine("inspect", "--format", "{{.State.Running}}", name) == "true\n"


@pytest.fixture(params=["folder", "store"])
def training(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Training]:
    with object_store() if request.param == "store" else nullcontext() as store:
        made = Training(tmp_path, store)
        yield made
        made.close()


def test_training_that_is_killed_or_stopped_in_a_container_gives_the_same_bytes(
    training: Training,
) -> None:
    whole = training.start()
    code, log = training.ended(whole)
    assert code == 0, log
    assert "resuming" not in log

    killed = training.start()
    training.until_kept(killed)
    engine("exec", killed, "sh", "-c", "kill -9 $(cat /proc/1/task/1/children)")
    code, log = training.ended(killed)
    assert code == 0, log
    assert "killed by SIGKILL" in log
    assert "(restart 1 of 3)" in log
    assert "resuming" in log

    stopped = training.start()
    training.until_kept(stopped)
    engine("stop", stopped)
    code, log = training.ended(stopped)
    assert code == 143, log
    assert re.search(r"stopped after meta-iteration \d+ of 600", log)
    follower = training.start()
    code, log = training.ended(follower)
    assert code == 0, log
    assert "resuming" in log

    expected = training.checkpoint(whole)
    assert training.checkpoint(killed) == expected
    assert training.checkpoint(follower) == expected


def test_the_server_has_no_torch_and_no_compiler() -> None:
    script = (
        "import importlib.util as u; "
        "print([n for n in ('torch', 'onnxscript', 'kfp', 'dvc', 'scipy') if u.find_spec(n)])"
    )
    assert confined("python", "-c", script, image=SERVER) == "[]\n"
    looked_for = "for c in c++ g++ gcc cc ld as pip; do command -v $c; done; true"
    assert confined("sh", "-c", looked_for, image=SERVER) == ""


def test_the_server_adapts_predicts_is_healthy_and_keeps_its_tasks(
    artifacts: Path, tmp_path: Path
) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    tasks.chmod(0o777)
    name = f"reptile-serve-{os.getpid()}"
    start = (
        *("run", "--detach", "--name", name, "--user", f"{STRANGER}:0", "--read-only"),
        *("--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
        *("--health-interval", "1s", "--publish", "127.0.0.1::8080"),
        *("--volume", f"{artifacts}/bundle:/bundle:ro", "--volume", f"{tasks}:/tasks"),
        SERVER,
    )
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28)).tolist()
    try:
        engine(*start)
        created = ask(name, "/tasks", {"images": images, "labels": ["a", "a", "b", "b"]})
        predict = f"/tasks/{created['id']}/predict"
        answer = ask(name, predict, {"images": images})
        assert {p["label"] for p in answer["predictions"]} <= {"a", "b"}
        until = time.monotonic() + 60
        while health(name) != "healthy":
            assert time.monotonic() < until, engine("logs", name)
            time.sleep(0.5)
        engine("stop", name)
        code = "{{.State.ExitCode}}"
        assert engine("inspect", "--format", code, name) == "0\n", engine("logs", name)
        engine("start", name)
        assert ask(name, predict, {"images": images}) == answer
    finally:
        engine("rm", "--force", name, check=False)


def health(container: str) -> str:
    return engine("inspect", "--format", "{{.State.Health.Status}}", container).strip()


def ask(container: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Post to a container once it is ready."""
    address = engine("port", container, "8080").splitlines()[0]
    url, until = f"http://{address}", time.monotonic() + 60
    while True:
        try:
            with urlopen(f"{url}/v2/health/ready", timeout=5):
                break
        except OSError:
            assert time.monotonic() < until, engine("logs", container)
            time.sleep(0.2)
    request = Request(url + path, json.dumps(body).encode(), {"content-type": "application/json"})
    with urlopen(request, timeout=60) as response:
        return json.load(response)
