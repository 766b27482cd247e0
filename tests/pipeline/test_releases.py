"""The compiled pipeline against the types of each release of Kubeflow Pipelines, as pip has them.

A backend refuses a document with a field that its types do not have.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import COMPILED
from pipeline.package import load_package

RELEASES = ("2.14.6", "2.15.0", "2.16.0", "2.17.0")
# In a process of its own, since types of two releases cannot be loaded into one; and as packages
# without their `__init__`, which import the whole of kfp.
READ = """
import sys, types
from pathlib import Path
import yaml
from google.protobuf import json_format

folder, document = map(Path, sys.argv[1:])
for name in ("kfp", "kfp.kubernetes", "kfp.pipeline_spec"):
    module = types.ModuleType(name)
    module.__path__ = [str(folder / name.replace(".", "/"))]
    sys.modules[name] = module
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec, PlatformSpec

pipeline, platform = yaml.safe_load_all(document.read_text())
try:
    json_format.ParseDict(pipeline, PipelineSpec())
    json_format.ParseDict(platform, PlatformSpec())
    for pod in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        json_format.ParseDict(pod, KubernetesExecutorConfig())
except json_format.ParseError as error:
    print(error)
else:
    print("fits")
"""


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_the_release_that_is_asked_for_is_the_first_whose_types_hold_the_pipeline(
    release: str, tmp_path: Path
) -> None:
    packages = [f"{name}=={release}" for name in ("kfp-pipeline-spec", "kfp-kubernetes")]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    installed = subprocess.run([*pip, str(tmp_path), *packages], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"pip cannot install {' '.join(packages)}")
    read = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path), str(COMPILED)],
        capture_output=True,
        text=True,
        check=True,
    )
    major, minor, _ = map(int, release.split("."))
    fits = (major, minor) >= load_package(COMPILED).backend
    assert (read.stdout == "fits\n") == fits, read.stdout


def test_the_releases_that_are_tried_lie_on_both_sides_of_the_minimum() -> None:
    tried = [tuple(map(int, release.split(".")[:2])) for release in RELEASES]
    assert tried[0] < load_package(COMPILED).backend
    assert load_package(COMPILED).backend in tried
