"""What deploy/build-image asks of the engine; that the engine then does it is for test_images."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from reptile import __version__

ROOT = Path(__file__).parent.parent.parent
PASSWORD = "correct-horse"
ENGINE = """#!/bin/sh
# Writes down what it is asked for, and what it would be sent.
if [ "$1" = build ]; then
  for context; do :; done
  printf '%s\\n' "$@" >> asked
  (cd "$context" && find . -type f | sort) > sent
  cat "$context/requirements/build.pip.conf" > configured 2> /dev/null
  echo "$context" > context
else
  echo '{}'
fi
"""


def build(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    engine = folder / "engine"
    # The script changes to the project's folder, where nothing is to be left.
    engine.write_text(ENGINE.replace("> asked", f"> {folder}/asked"))
    for name in ("sent", "configured", "context"):
        engine.write_text(engine.read_text().replace(f"> {name}", f"> {folder}/{name}"))
    engine.chmod(0o755)
    return subprocess.run(
        [str(ROOT / "deploy/build-image")],
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "ENGINE": str(engine)} | settings,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def tagged() -> str:
    """A tag of its own, whose bill of materials is removed again."""
    return f"test-{os.getpid()}"


@pytest.fixture(autouse=True)
def tidy(tagged: str) -> object:
    yield
    for path in (ROOT / "artifacts/images").glob(f"*-{tagged}.cdx.json"):
        path.unlink()


def test_an_index_and_certificates_reach_the_build_but_no_argument_and_no_clone(
    tmp_path: Path, tagged: str
) -> None:
    (tmp_path / "pip.conf").write_text(
        f"[global]\nindex-url = https://me:{PASSWORD}@pypi.example\n"
    )
    (tmp_path / "ca.pem").write_text("a certificate\n")
    given = {"PIP_CONF": str(tmp_path / "pip.conf"), "CA_FILE": str(tmp_path / "ca.pem")}
    done = build(tmp_path, TAG=tagged, **given)
    assert done.returncode == 0, done.stderr
    assert PASSWORD in (tmp_path / "configured").read_text()
    assert PASSWORD not in (tmp_path / "asked").read_text() + done.stdout + done.stderr
    sent = (tmp_path / "sent").read_text().splitlines()
    assert {"./requirements/build.pip.conf", "./requirements/build.pem"} <= set(sent)
    assert not Path((tmp_path / "context").read_text().strip()).exists()
    assert not list(ROOT.glob("requirements/build.p*"))


def test_only_what_the_image_is_made_of_is_sent(tmp_path: Path, tagged: str) -> None:
    assert build(tmp_path, TAG=tagged).returncode == 0
    sent = {Path(line).parts[0] for line in (tmp_path / "sent").read_text().splitlines()}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert sent == allowed | {"Containerfile"}
    text = (ROOT / "Containerfile").read_text()
    copied = {
        word.split("/")[0]
        for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
        for word in line.split()
    }
    assert copied == allowed


def test_the_engine_is_told_what_the_image_is(tmp_path: Path, tagged: str) -> None:
    base = "registry.example.org/python@sha256:12"
    assert build(tmp_path, TAG=tagged, ORT="gpu", BASE_IMAGE=base).returncode == 0
    asked = (tmp_path / "asked").read_text().splitlines()
    both = {f"reptile-train-gpu:{tagged}", f"reptile-serve-gpu:{tagged}"}
    assert both <= set(asked) and {"train", "serve"} <= set(asked)
    assert {"ORT=gpu", f"BASE_IMAGE={base}"} <= set(asked)
    assert f"VERSION={__version__}" in asked
    assert any(re.fullmatch(r"CREATED=\d{4}-\d\d-\d\dT[\d:]{8}Z", word) for word in asked)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ORT": "tpu"}, "ORT=tpu"),
        ({"IMAGES": "train web"}, "IMAGES=train web"),
        ({"CA_FILE": "/no/such.pem"}, "/no/such.pem"),
    ],
)
def test_a_mistake_ends_the_build_before_it_begins(
    tmp_path: Path, settings: dict[str, str], said: str
) -> None:
    done = build(tmp_path, **settings)
    assert done.returncode != 0
    assert said in done.stderr
    assert not (tmp_path / "asked").exists()
