"""The real kfp.Client against a server that checks each request and holds what was asked of it."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import Result, only, submitted
from kubeflow_server import RECORDED, KubeflowServer, recorded_refusal

from pipeline import cluster

NIGHTLY = ("schedule", "nightly", "0 0 2 * * *", "-P", "data_revision=4f2c")


# Runs


def test_a_run_is_what_was_asked_for(
    run: Callable[..., Result], server: KubeflowServer, compiled: Path
) -> None:
    result = run(
        *submitted("--name", "first", "--experiment", "trials", "--service-account", "trainer"),
        *("--pipeline-root", "s3://bucket/root", "-P", "seed=3"),
    )
    made = only(server.runs)
    assert result.code == 0
    assert f"{server.address}/#/runs/details/{made['run_id']}" in result.out
    assert made["display_name"] == "first"
    assert made["service_account"] == "trainer"
    assert made["runtime_config"] == {
        "parameters": {"data_revision": "4f2c", "seed": 3},
        "pipeline_root": "s3://bucket/root",
    }
    assert server.experiments[made["experiment_id"]]["display_name"] == "trials"
    assert only(server.uploads) == compiled.read_bytes()
    assert only(server.pipelines)["display_name"] == "small"


def test_two_runs_share_experiment_and_version(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    for _ in range(2):
        assert run(*submitted()).code == 0
    assert len(server.runs) == 2
    assert len(server.experiments) == len(server.pipelines) == len(server.versions) == 1


def test_the_right_experiment_is_found_on_a_later_page(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    for number in range(7):
        assert run(*submitted("--experiment", f"trial {number}")).code == 0
    assert run(*submitted("--experiment", "trial 6")).code == 0
    assert len(server.experiments) == 7


@pytest.mark.parametrize(
    ("states", "shown", "code"),
    [
        ("PENDING RUNNING SUCCEEDED", "pending running succeeded", 0),
        ("RUNNING FAILED", "running failed", 1),
        # kfp's own wait would never end here
        ("RUNNING CANCELING CANCELED", "running cancelling cancelled", 4),
        ("RUNTIME_STATE_UNSPECIFIED SKIPPED", "accepted skipped", 0),
    ],
)
def test_the_exit_code_is_the_outcome(
    run: Callable[..., Result], server: KubeflowServer, states: str, shown: str, code: int
) -> None:
    server.states = [state for state in states.split() for _ in range(2)]
    result = run(*submitted("--wait"))
    assert result.code == code
    assert re.findall(r"^[\d:]{8} (\w+)$", result.out, re.MULTILINE) == shown.split()


def test_waiting_ends_at_the_deadline_and_the_run_goes_on(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    server.states = ["RUNNING"]
    result = run(*submitted("--wait", "--timeout", "0.2"))
    assert result.code == 5
    assert f"/#/runs/details/{only(server.runs)['run_id']}" in result.error
    assert "run_service_terminate_run" not in server.log


def test_the_deadline_holds_for_a_server_that_does_not_answer(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    released = threading.Event()
    server.before["run_service_get_run"] = lambda: released.wait(20)
    start = time.monotonic()
    result = run(*submitted("--wait", "--timeout", "0.5"))
    assert (result.code, time.monotonic() - start < 10) == (5, True)
    released.set()


def test_passing_failures_do_not_end_the_wait(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    server.faults["run_service_get_run"] = [503, 502, 0, 500, 429]
    assert run(*submitted("--wait")).code == 0


def test_a_refusal_ends_the_wait(run: Callable[..., Result], server: KubeflowServer) -> None:
    server.faults["run_service_get_run"] = [0, 403]
    result = run(*submitted("--wait"))
    assert result.code == 5
    assert "403" in result.error
    assert "the run goes on" in result.error


def test_lost_contact_ends_the_wait(
    run: Callable[..., Result], server: KubeflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "LOST_SECONDS", 0.1)
    server.faults["run_service_get_run"] = [0, *[503] * 1000]
    server.states = ["RUNNING"]
    result = run(*submitted("--wait"))
    assert result.code == 5
    assert "503" in result.error
    assert "the run goes on" in result.error


def test_interrupting_the_wait_leaves_the_run(
    server: KubeflowServer, compiled: Path, root: Path
) -> None:
    server.states = ["RUNNING"]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pipeline", *submitted("--wait", "--poll", "0.05")),
            *("--host", server.address, "--pipeline", str(compiled)),
        ],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    while "running" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(2)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 130
    assert f"/#/runs/details/{only(server.runs)['run_id']}" in error
    assert "Traceback" not in error
    assert "run_service_terminate_run" not in server.log


# Parameters


def test_values_are_typed_by_the_pipelines_definitions(
    run: Callable[..., Result], server: KubeflowServer, tmp_path: Path
) -> None:
    inputs = tmp_path / "inputs.yaml"
    inputs.write_text("{data_revision: '0', rate: 1e-3, selector: {gpu: a100}, seed: 9}")
    pairs = ["seed=7", "deep=true", "shots=[1, 2]", "data_revision=12=e4"]
    assert run("submit", "--inputs", str(inputs), *(f"--param={p}" for p in pairs)).code == 0
    assert only(server.runs)["runtime_config"]["parameters"] == {
        "data_revision": "12=e4",
        "rate": 0.001,
        "selector": {"gpu": "a100"},
        "seed": 7,
        "deep": True,
        "shots": [1, 2],
    }


@pytest.mark.parametrize(
    ("pair", "way_out"),
    [
        ("sed=1", "data_revision, deep, rate, seed, selector, shots, train_settings"),
        ("seed=1.5", "whole number"),
        ("seed=true", "whole number"),
        ("rate=NaN", "finite"),
        ("rate=fast", "finite"),
        ("deep=yes", "true or false"),
        ("shots=1,5", "JSON"),
        ("selector=[]", "JSON"),
        ("seed", "NAME=VALUE"),
    ],
)
def test_a_wrong_parameter_is_refused_before_the_cluster_is_asked(
    run: Callable[..., Result], server: KubeflowServer, pair: str, way_out: str
) -> None:
    result = run(*submitted("-P", pair))
    assert result.code == 2
    assert way_out in result.error
    assert server.log == []


def test_a_missing_parameter_is_named(run: Callable[..., Result], server: KubeflowServer) -> None:
    result = run("submit")
    assert (result.code, server.log) == (2, [])
    assert "data_revision" in result.error


def test_text_that_yaml_reads_as_a_number_must_be_quoted(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    inputs = tmp_path / "inputs.yaml"
    inputs.write_text("data_revision: 0777")
    assert "quotes" in run("submit", "--inputs", str(inputs)).error


def test_a_setting_of_an_unknown_section_is_refused(run: Callable[..., Result]) -> None:
    """This small pipeline takes settings of training alone; those of the others have no input."""
    result = run(*submitted("--set", "train.seed=4"))
    assert result.code == 2
    assert "prepare_settings" in result.error


@pytest.mark.parametrize("cache", [True, False])
def test_caching_is_set_for_every_task_also_in_conditions(
    run: Callable[..., Result], server: KubeflowServer, compiled: Path, cache: bool
) -> None:
    assert run(*submitted("--cache" if cache else "--no-cache")).code == 0
    spec = only(server.specs)
    graphs = [spec["root"], *spec["components"].values()]
    tasks = [task for g in graphs for task in g.get("dag", {}).get("tasks", {}).values()]
    options = [task.pop("cachingOptions") for task in tasks if "cachingOptions" in task]
    assert [o.get("enableCache", False) for o in options] == [cache, cache]
    as_compiled = yaml.safe_load(compiled.read_text())
    for graph in [as_compiled["root"], *as_compiled["components"].values()]:
        for task in graph.get("dag", {}).get("tasks", {}).values():
            task.pop("cachingOptions", None)
    assert spec == as_compiled


@pytest.mark.parametrize("text", ["", "a: 1", "[", "pipelineInfo: {name: x}"])
def test_a_file_that_is_no_pipeline_is_refused(
    run: Callable[..., Result], tmp_path: Path, text: str
) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(text)
    with pytest.raises(Exception, match="python -m pipeline compile"):
        from pipeline.package import load_package

        load_package(path)


# Schedules


def test_a_schedule_is_what_was_asked_for(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    result = run(*NIGHTLY, "--start", "2099-01-31T02:00:00+01:00", "--end", "2100-01-01")
    made = only(server.schedules)
    assert result.code == 0
    assert "At 02:00 every day, UTC; next 2099-01-31 02:00:00, 2099-02-01" in result.out
    assert made["display_name"] == "nightly"
    assert made["mode"] == "ENABLE"
    assert made["no_catchup"] is True
    assert made["max_concurrency"] == "1"
    assert made["trigger"]["cron_schedule"] == {
        "cron": "0 0 2 * * *",
        "start_time": "2099-01-31T02:00:00+01:00",
        "end_time": "2100-01-01T00:00:00+00:00",
    }
    version = only(server.versions)
    assert made["pipeline_version_reference"] == {
        "pipeline_id": version["pipeline_id"],
        "pipeline_version_id": version["pipeline_version_id"],
    }


def test_the_same_schedule_twice_leaves_one_untouched(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    assert "created" in run(*NIGHTLY).out
    before = dict(only(server.schedules))
    result = run(*NIGHTLY)
    assert (result.code, only(server.schedules)) == (0, before)
    assert "unchanged" in result.out
    assert server.log.count("recurring_run_service_create_recurring_run") == 1
    assert len(server.versions) == 1


@pytest.mark.parametrize(
    "change",
    [
        ("schedule", "nightly", "0 30 2 * * *", "-P", "data_revision=4f2c"),
        (*NIGHTLY, "-P", "seed=2"),
        (*NIGHTLY, "--catch-up"),
        (*NIGHTLY, "--no-cache"),
        (*NIGHTLY, "--end", "2099-01-01"),
        (*NIGHTLY, "--experiment", "other"),
        (*NIGHTLY, "--service-account", "trainer"),
    ],
    ids=lambda change: " ".join(change[2:]),
)
def test_a_change_replaces_the_schedule(
    run: Callable[..., Result], server: KubeflowServer, change: tuple[str, ...]
) -> None:
    run(*NIGHTLY)
    old = only(server.schedules)["recurring_run_id"]
    result = run(*change)
    assert (result.code, "replaced" in result.out) == (0, True)
    new = only(server.schedules)
    assert new["recurring_run_id"] != old
    assert (new["mode"], new["status"]) == ("ENABLE", "ENABLED")
    assert max(server.awake) == 1  # never two that would run at the same time
    assert "unchanged" in run(*change).out


def test_replacing_and_removing_leave_a_run_in_progress(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    for change in ((*NIGHTLY, "-P", "seed=2"), ("unschedule", "nightly")):
        run(*NIGHTLY)
        server.runs["r"] = {"recurring_run_id": only(server.schedules)["recurring_run_id"]}
        assert run(*change).code == 0
        assert "r" in server.runs
        run("unschedule", "nightly")


def test_a_refused_change_leaves_the_old_schedule_awake(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    run(*NIGHTLY)
    before = dict(only(server.schedules))
    server.faults["recurring_run_service_create_recurring_run"] = [400]
    assert run(*NIGHTLY, "-P", "seed=2").code == 7
    assert only(server.schedules) == before


@pytest.mark.parametrize(
    "step",
    [
        "recurring_run_service_disable_recurring_run",
        "recurring_run_service_enable_recurring_run",
        "recurring_run_service_delete_recurring_run",
    ],
)
def test_an_interrupted_change_is_completed_by_the_next_attempt(
    run: Callable[..., Result], server: KubeflowServer, step: str
) -> None:
    run(*NIGHTLY)
    server.faults[step] = [403]
    result = run(*NIGHTLY, "-P", "seed=2")
    assert result.code == 7
    assert "run the same command again" in result.error
    assert len(server.schedules) == 2
    assert run(*NIGHTLY, "-P", "seed=2").code == 0
    assert only(server.schedules)["mode"] == "ENABLE"
    assert only(server.schedules)["runtime_config"]["parameters"]["seed"] == 2
    assert max(server.awake) == 1


def test_a_paused_schedule_is_made_anew_so_that_it_does_not_run_at_once(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    run(*NIGHTLY)
    paused = only(server.schedules)
    paused |= {"mode": "DISABLE", "status": "DISABLED"}
    assert "replaced" in run(*NIGHTLY).out
    assert only(server.schedules)["recurring_run_id"] != paused["recurring_run_id"]
    assert only(server.schedules)["mode"] == "ENABLE"


def test_a_start_that_has_passed_is_not_sent_unless_to_catch_up(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    """The scheduler would run the latest time since the start at once, even without catching up."""
    run(*NIGHTLY, "--start", "2020-01-01")
    assert "start_time" not in only(server.schedules)["trigger"]["cron_schedule"]
    assert "unchanged" in run(*NIGHTLY, "--start", "2020-01-01").out
    run(*NIGHTLY, "--start", "2020-01-01", "--catch-up")
    assert only(server.schedules)["trigger"]["cron_schedule"]["start_time"].startswith("2020-01-01")
    assert only(server.schedules)["no_catchup"] is False


def test_a_schedule_is_found_among_many(run: Callable[..., Result], server: KubeflowServer) -> None:
    for number in range(9):
        run("schedule", f"nightly {number}", "0 0 2 * * *", "-P", "data_revision=1")
    assert "unchanged" in run("schedule", "nightly 8", "0 0 2 * * *", "-P", "data_revision=1").out
    assert run("unschedule", "nightly 4").code == 0
    left = sorted(schedule["display_name"] for schedule in server.schedules.values())
    assert left == [f"nightly {number}" for number in range(9) if number != 4]


def test_all_pages_of_schedules_of_one_name_are_read(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    run(*NIGHTLY)
    one = only(server.schedules)
    for number in range(6):  # as races between machines would leave them
        server.schedules[f"s{number}"] = one | {"recurring_run_id": f"s{number}"}
    assert "unchanged" in run(*NIGHTLY).out
    assert len(server.schedules) == 1


def test_a_schedule_made_by_hand_is_not_replaced(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    run(*NIGHTLY)
    by_hand = only(server.schedules)
    by_hand["description"] = "by hand"
    result = run(*NIGHTLY)
    assert result.code == 2
    assert by_hand["recurring_run_id"] in result.error
    assert only(server.schedules) is by_hand


@pytest.mark.parametrize(
    ("arguments", "way_out"),
    [
        (("0 2 * * *",), "'0 0 2 * * *'"),
        (("0 0 2 * * *", "--end", "2020-01-01"), "later --end"),
        (("0 0 2 1 2 *", "--start", "2098-03-01", "--end", "2099-01-01"), "later --end"),
        (("0 0 2 * * *", "--start", "tomorrow"), "2027-01-31T02:00Z"),
        (("0 0 2 30 2 *",), "five years"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused_before_the_cluster_is_asked(
    run: Callable[..., Result], server: KubeflowServer, arguments: tuple[str, ...], way_out: str
) -> None:
    result = run("schedule", "nightly", *arguments, "-P", "data_revision=1")
    assert result.code == 2
    assert way_out in result.error
    assert server.log == []


def test_unschedule_twice_is_no_error(run: Callable[..., Result], server: KubeflowServer) -> None:
    run(*NIGHTLY)
    assert run("unschedule", "nightly") == (0, "schedule nightly removed\n", "")
    assert server.schedules == {}
    assert run("unschedule", "nightly") == (0, "there is no schedule nightly\n", "")


def test_unschedule_refuses_to_choose(run: Callable[..., Result], server: KubeflowServer) -> None:
    run(*NIGHTLY)
    server.schedules["twin"] = only(server.schedules) | {"recurring_run_id": "twin"}
    result = run("unschedule", "nightly")
    assert (result.code, len(server.schedules)) == (2, 2)
    assert "twin" in result.error and "--all" in result.error
    assert run("unschedule", "nightly", "--all").code == 0
    assert server.schedules == {}


def test_a_delete_whose_answer_was_lost_counts(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    run(*NIGHTLY)
    server.before["recurring_run_service_delete_recurring_run"] = server.schedules.clear
    assert run("unschedule", "nightly").code == 0


# Errors of the API


@pytest.mark.parametrize(
    ("status", "way_out"),
    [
        (400, "upstream connect error"),
        (401, "--token-file"),
        (403, "--namespace"),
        (404, "deleted"),
        (409, "another name"),
        (500, "try again"),
    ],
)
def test_a_refusal_is_one_line_with_a_way_out(
    run: Callable[..., Result], server: KubeflowServer, status: int, way_out: str
) -> None:
    server.faults["run_service_create_run"] = [status] * 9
    result = run(*submitted())
    assert result.code == 7
    assert result.error.count("\n") == 1
    assert way_out in result.error
    assert server.runs == {}


@pytest.mark.parametrize(
    ("status", "name", "reason"),
    [
        (400, "create-run-missing-parameter", "parameter data_revision is not optional"),
        (400, "create-run-wrong-type", "input parameter points requires type list"),
        # 500, and yet the mistake is the request's, so nothing can have been done
        (500, "create-run-unknown-version", "PipelineVersion 00000000-0000-0000-0000-000000000000"),
    ],
)
def test_a_recorded_refusal_shows_its_reason_and_no_chain_of_causes(
    run: Callable[..., Result], server: KubeflowServer, status: int, name: str, reason: str
) -> None:
    server.refusals["run_service_create_run"] = recorded_refusal(status, name)
    result = run(*submitted())
    assert result.code == 7
    assert reason in result.error
    assert f"refuses the request ({status})" in result.error
    assert len(result.error) < 420
    assert server.log.count("run_service_create_run") == 1


def test_the_reason_of_a_refused_schedule_is_shown(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    name = "recurring_run_service_create_recurring_run"
    server.refusals[name] = recorded_refusal(400, "create-recurring-bad-cron")
    assert "End of range (61) above maximum (59): 61" in run(*NIGHTLY).error


def test_what_only_reads_is_tried_again(run: Callable[..., Result], server: KubeflowServer) -> None:
    server.faults["experiment_service_list_experiments"] = [503, 503, 502]
    server.faults["recurring_run_service_list_recurring_runs"] = [503]
    assert run(*NIGHTLY).code == 0
    assert len(server.schedules) == 1


def test_what_makes_something_is_not_tried_again(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    """After a 503 the run may exist; a second attempt could start it twice."""
    server.faults["run_service_create_run"] = [503]
    assert run(*submitted()).code == 7
    assert server.log.count("run_service_create_run") == 1


def test_an_upload_by_somebody_else_at_the_same_time_is_used(
    run: Callable[..., Result], server: KubeflowServer, compiled: Path
) -> None:
    assert run(*submitted()).code == 0
    taken = dict(server.versions)
    server.versions.clear()
    server.before["upload_pipeline_version"] = lambda: server.versions.update(taken)
    assert run(*submitted()).code == 0
    assert server.versions == taken


@pytest.mark.parametrize("status", [200, 302, 404])
def test_a_host_that_is_not_kubeflow_is_recognised(
    run: Callable[..., Result], server: KubeflowServer, status: int
) -> None:
    server.html = status
    for arguments in (submitted(), NIGHTLY, ("unschedule", "nightly")):
        result = run(*arguments)
        assert result.code == 7
        assert "Kubeflow Pipelines" in result.error
    assert server.runs == server.schedules == {}


def test_an_unreachable_host_is_named(run: Callable[..., Result]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        host = f"http://127.0.0.1:{closed.getsockname()[1]}"
    result = run(*submitted(), host=host)
    assert result.code == 7
    assert f"{host} cannot be reached" in result.error


def test_without_a_host_or_a_cluster_the_way_out_is_given(run: Callable[..., Result]) -> None:
    result = run(*submitted(), host=None)
    assert result.code == 7
    assert "--host" in result.error


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("in_cluster")
def test_in_a_cluster_the_address_that_kfp_finds_is_used_without_a_warning(
    run: Callable[..., Result], server: KubeflowServer
) -> None:
    """Kfp has it without a scheme, of which urllib3 warns with each request."""
    result = run(*submitted(), host=None)
    assert (result.code, result.error) == (0, "")
    assert len(server.runs) == 1


# Version


@pytest.mark.parametrize("version", ["2.15.0", "v2.15.2", "2.17.0", "3.0.0-rc.1"])
def test_a_server_that_is_new_enough_is_used_without_a_word(
    run: Callable[..., Result], server: KubeflowServer, version: str
) -> None:
    server.version = version
    assert run(*submitted())[::2] == (0, "")


@pytest.mark.parametrize("version", ["2.14.4", "v2.5.0", "1.8.22"])
@pytest.mark.parametrize("command", [submitted(), NIGHTLY])
def test_a_server_that_is_too_old_is_refused_before_anything_is_sent(
    run: Callable[..., Result], server: KubeflowServer, version: str, command: tuple[str, ...]
) -> None:
    server.version = version
    result = run(*command)
    assert result.code == 7
    assert f"version {version}" in result.error
    assert "2.15 or later" in result.error
    assert set(server.log) == {"healthz_service_get_healthz"}


def test_a_pipeline_with_a_security_context_needs_a_later_server(
    run: Callable[..., Result], server: KubeflowServer, compiled: Path, tmp_path: Path
) -> None:
    pods = {"exec-train": {"securityContext": {"runAsNonRoot": True}}}
    platform = {"platforms": {"kubernetes": {"deploymentSpec": {"executors": pods}}}}
    path = tmp_path / "restricted.yaml"
    path.write_text(f"{compiled.read_text()}---\n{yaml.safe_dump(platform)}")
    server.version = "2.15.2"
    result = run(*submitted("--pipeline", str(path)))
    assert (result.code, server.runs) == (7, {})
    assert "2.16 or later" in result.error


@pytest.mark.parametrize("command", [submitted(), NIGHTLY])
def test_a_server_that_does_not_say_its_version_is_used_with_a_word(
    run: Callable[..., Result], server: KubeflowServer, command: tuple[str, ...]
) -> None:
    server.version = json.loads((RECORDED / "healthz.json").read_text())["tag_name"]
    result = run(*command)
    assert result.code == 0
    assert result.error == (
        "the server does not say its version (unknown); the pipeline needs Kubeflow Pipelines "
        "2.15 or later\n"
    )


# Namespace and credentials


def test_the_namespace_goes_with_every_request_that_takes_one(
    compiled: Path, run: Callable[..., Result]
) -> None:
    server = KubeflowServer(multi_user=True)
    try:
        for arguments in (submitted(), NIGHTLY, ("unschedule", "nightly")):
            assert run(*arguments, "--namespace", "team", host=server.address).code == 0
        assert only(server.experiments)["namespace"] == "team"
        assert run(*NIGHTLY, "--namespace", "others", host=server.address).code == 7
    finally:
        server.close()
    assert server.broken == []


@pytest.mark.parametrize("by_file", [True, False])
def test_the_token_goes_into_the_header_and_nowhere_else(
    run: Callable[..., Result],
    server: KubeflowServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    by_file: bool,
) -> None:
    server.token = "s3cr3t"
    more: tuple[str, ...] = ()
    if by_file:
        (tmp_path / "token").write_text("s3cr3t\n")
        more = ("--token-file", str(tmp_path / "token"))
    else:
        monkeypatch.setenv("KF_PIPELINES_TOKEN", "s3cr3t")
    result = run(*submitted("--wait", *more))
    assert result.code == 0
    assert "s3cr3t" not in result.out + result.error
    for request in server.heard:
        line, _, headers = request.partition("\n")
        assert "s3cr3t" not in line
        assert headers.count("s3cr3t") == 1
        assert "authorization: Bearer s3cr3t" in headers


def test_a_replaced_token_is_read_anew(
    run: Callable[..., Result], server: KubeflowServer, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("old")
    server.token = "old"
    server.states = ["RUNNING", "RUNNING", "SUCCEEDED"]

    def replace() -> None:
        (tmp_path / "token").write_text("new")
        server.token = "new"

    server.before["run_service_get_run"] = replace
    assert run(*submitted("--wait", "--token-file", str(tmp_path / "token"))).code == 0


def test_a_wrong_token_is_not_shown(
    run: Callable[..., Result], server: KubeflowServer, tmp_path: Path
) -> None:
    server.token = "right"
    (tmp_path / "token").write_text("wr0ng")
    result = run(*submitted("--token-file", str(tmp_path / "token")))
    assert result.code == 7
    assert "401" in result.error and "wr0ng" not in result.error


@pytest.mark.parametrize("text", ["", "two words", "two\nlines", "caf\u00e9"])
def test_a_token_that_cannot_be_one_is_refused_without_showing_it(
    run: Callable[..., Result], server: KubeflowServer, tmp_path: Path, text: str
) -> None:
    (tmp_path / "token").write_text(text)
    result = run(*submitted("--token-file", str(tmp_path / "token")))
    assert (result.code, server.log) == (2, [])
    assert not text or text.split()[-1] not in result.error


@pytest.mark.parametrize(
    ("host", "way_out"),
    [
        ("http://kubeflow.example", "https"),
        ("http://127.0.0.1.example", "https"),
        ("https://user:s3cr3t@kubeflow.example", "--token-file"),
        ("https://kubeflow.example/#/runs", "plain address"),
        ("ftp://kubeflow.example", "https://"),
        ("https://", "https://"),
    ],
)
def test_a_token_is_not_sent_in_the_clear(
    run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    way_out: str,
) -> None:
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "s3cr3t")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("no connection must be tried")

    monkeypatch.setattr(socket, "create_connection", never)
    result = run(*submitted(), host=host)
    assert result.code == 2
    assert way_out in result.error
    assert "s3cr3t" not in result.error


def test_a_missing_certificate_is_named(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run(*submitted("--ca-cert", str(tmp_path / "ca.pem")))
    assert result.code == 2
    assert "ca.pem" in result.error


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate with openssl")
def test_a_certificate_is_checked_against_the_given_authority(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = tmp_path / "ca.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=kubeflow"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    monkeypatch.setenv("KF_PIPELINES_TOKEN", "s3cr3t")
    server = KubeflowServer(certificate=(certificate, key))
    try:
        refused = run(*submitted(), host=server.address)
        assert (refused.code, server.heard) == (7, [])
        assert "--ca-cert" in refused.error
        assert run(*submitted("--ca-cert", str(certificate)), host=server.address).code == 0
    finally:
        server.close()
