"""The server holds to its own OpenAPI document, by schemathesis' reading of it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from machines import Made

from benchmarks.server import Server

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "allow_header_conformance",
    "use_after_free",
    "unsupported_method",
)


def check_document(bundle: Path, folder: Path, examples: int) -> None:
    options = {
        "--checks": ",".join(CHECKS),
        "--max-examples": str(examples),
        "--seed": "0",
        "--workers": "1",
        "--warnings": "off",
        "--suppress-health-check": "all",
        "--generation-database": "none",
    }
    told = [part for option in options.items() for part in option]
    with Server(bundle, "--tasks", str(folder / "tasks"), "-S", "max_tasks=50") as server:
        place = f"{server.url}/openapi.json"
        ran = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", place, "--no-color", *told],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
        assert "Traceback" not in server.log
        print(*ran.stdout.splitlines()[-12:], sep="\n")


def test_the_server_keeps_to_its_document(exported: Path, tmp_path: Path) -> None:
    check_document(exported, tmp_path, 5)


@pytest.mark.slow
def test_the_server_keeps_to_its_document_for_long(exported: Path, tmp_path: Path) -> None:
    check_document(exported, tmp_path, 100)


@pytest.mark.slow
def test_the_server_of_a_table_keeps_to_its_document(
    machines: Callable[[str], Made], tmp_path: Path
) -> None:
    check_document(machines("bayes").folder, tmp_path, 100)
