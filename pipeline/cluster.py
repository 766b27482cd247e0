"""Runs and schedules on a cluster: start, follow, have exactly one, remove.

Not for the connection itself or the compiled pipeline, and nothing here prints.
"""

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from pathlib import Path
from typing import Any

import kfp_server_api as api

from pipeline.connection import (
    CALL_SECONDS,
    ClusterError,
    Connection,
    call,
    read_log,
    server_version,
)
from pipeline.cron import Cron
from pipeline.failure import Failure, failures
from pipeline.package import Package
from reptile import __version__
from reptile.errors import InputError

LOST_SECONDS = 300.0  # of waiting without one good answer from the cluster
_MARK = "made by `python -m pipeline schedule`; definition sha256:"


class Outcome(IntEnum):
    """How a run that was waited for ended; the value is the exit code.

    2 is a mistake in the command, 7 a cluster that refuses or fails.
    """

    SUCCEEDED = 0
    FAILED = 1
    REFUSED = 3  # by the gate
    CANCELLED = 4
    UNKNOWN = 5  # not ended when the waiting was


_OUTCOMES = {
    "SUCCEEDED": Outcome.SUCCEEDED,
    "SKIPPED": Outcome.SUCCEEDED,  # everything came from the cache
    "FAILED": Outcome.FAILED,
    "CANCELED": Outcome.CANCELLED,
}


@dataclass(frozen=True)
class RunOptions:
    """What runs and schedules have in common beside the pipeline; None is the cluster's default."""

    parameters: Mapping[str, Any]
    experiment: str
    pipeline_root: str | None = None
    service_account: str | None = None


@dataclass(frozen=True)
class Timetable:
    """When a schedule starts runs; `start` and `end` are aware times."""

    cron: Cron
    start: datetime | None = None
    end: datetime | None = None
    catch_up: bool = False

    def times(self, now: datetime, count: int) -> list[datetime]:
        """Return up to `count` coming times in UTC.

        Raises:
            InputError: there will be none.
        """
        after = max(now, self.start or now).astimezone(UTC)
        if self.end and self.end <= after:
            raise InputError(
                f"the schedule would never run: it ends at {self.end.isoformat()}, before "
                f"{after.isoformat(timespec='seconds')}; give a later --end"
            )
        times = [t for t in self.cron.times(after, count) if not self.end or t <= self.end]
        if not times and not self.catch_up:
            raise InputError(
                f"the schedule would never run: no time of cron {self.cron.expression!r} lies "
                f"before its end at {self.end}; give a later --end"
            )
        return times


class Cluster:
    """One namespace of one installation of Kubeflow Pipelines."""

    def __init__(self, connection: Connection):
        self._client = connection.client
        self.namespace = connection.namespace
        self._site = os.environ.get("KF_PIPELINES_UI_ENDPOINT") or connection.host

    def link(self, run_id: str) -> str:
        """Return the address of a run in the browser, or its id if there is no known site."""
        return f"{self._site.rstrip('/')}/#/runs/details/{run_id}" if self._site else run_id

    def version(self) -> str:
        """Return the version that the server says it has, "unknown" where it says none."""
        return server_version(self._client)

    def list_all(self) -> None:
        """Ask for one of everything that runs and schedules need, to see whether one may.

        Raises:
            ClusterError: one may not.
        """
        for listing in (
            self._client.experiments.experiment_service_list_experiments,
            self._client.pipelines.pipeline_service_list_pipelines,
            self._client.runs.run_service_list_runs,
            self._client.recurring_runs.recurring_run_service_list_recurring_runs,
        ):
            call(listing, page_size=1, namespace=self.namespace)

    def submit(self, package: Package, options: RunOptions, name: str) -> str:
        """Start a run; return its id."""
        run = api.V2beta1Run(
            display_name=name,
            experiment_id=self._experiment(options.experiment),
            pipeline_version_reference=self._upload(package),
            runtime_config=_runtime(options),
            service_account=options.service_account,
        )
        made = call(self._client.runs.run_service_create_run, repeatable=False, run=run)
        return str(made.run_id)

    def follow(self, run_id: str, seconds: float | None, every: float) -> Iterator[Any]:
        """Yield the run whenever it was looked at, until it has ended or time is up.

        `kfp.Client.wait_for_run_completion` does not know that a cancelled run has ended.

        Raises:
            ClusterError: no good answer for five minutes, or a refusal.
        """
        heard = time.monotonic()
        end = math.inf if seconds is None else heard + seconds
        pause = every
        while True:
            left = min(CALL_SECONDS, end - time.monotonic())
            try:
                run = call(
                    self._client.runs.run_service_get_run,
                    run_id=run_id,
                    attempts=1,
                    seconds=max(1, math.ceil(left)),
                )
            except ClusterError as error:
                if not error.passing or time.monotonic() - heard > LOST_SECONDS:
                    raise
                pause = min(2 * pause, max(60.0, every))
            else:
                heard, pause = time.monotonic(), every
                yield run
                if run.state in _OUTCOMES:
                    return
            if time.monotonic() >= end:
                return
            time.sleep(max(0.0, min(pause, end - time.monotonic())))

    def run(self, run_id: str) -> Any:
        """Return a run as the API gives it."""
        return call(self._client.runs.run_service_get_run, run_id=run_id)

    def failures(self, run: Any, endings: Mapping[str, str]) -> list[Failure]:
        """Return the failed tasks of a run, with the ends of their logs and of their pods."""
        return failures(run, lambda node: read_log(self._client, run.run_id, node), endings)

    def schedule(
        self, name: str, package: Package, options: RunOptions, timetable: Timetable, now: datetime
    ) -> str:
        """Have exactly one schedule of that name, with that definition; say what was done.

        Raises:
            InputError: a schedule of that name was made by other means.
            ClusterError: the API refused or failed; said so if the schedule is half replaced.
        """
        version = self._upload(package)
        experiment = self._experiment(options.experiment)
        # Schedules cannot be changed, only paused, so what the description says stays true.
        definition = {
            "version": version.pipeline_version_id,
            "experiment": experiment,
            "parameters": dict(options.parameters),
            "pipeline_root": options.pipeline_root,
            "service_account": options.service_account,
            "cron": timetable.cron.expression,
            "start": timetable.start and timetable.start.astimezone(UTC).isoformat(),
            "end": timetable.end and timetable.end.astimezone(UTC).isoformat(),
            "catch_up": timetable.catch_up,
        }
        text = json.dumps(definition, sort_keys=True)
        mark = _MARK + hashlib.sha256(text.encode()).hexdigest()
        old = self._schedules(name)
        foreign = [s for s in old if _MARK not in (s.description or "")]
        if foreign:
            raise InputError(
                f"schedule {name!r} exists and was not made by this command "
                f"({_listing(foreign)}); take another name, or `unschedule` it first"
            )
        same = [s for s in old if mark in s.description and s.status == "ENABLED"]
        if same:
            self._remove(s for s in old if s is not same[0])
            return "unchanged"

        # The new schedule is made asleep: had the cluster refused it, the old one would go on. At
        # no time are both awake. A schedule that wakes also runs the latest time that passed since
        # it was made, so a time that falls between the two switches is not missed; one that falls
        # between making the new and switching off the old, two requests in a row, would run twice,
        # which the pipeline bears (same inputs, same bytes) better than a missing night.
        start = timetable.start
        if start and start <= now and not timetable.catch_up:
            start = None  # a start that has passed would run the latest time before now at once
        made = call(
            self._client.recurring_runs.recurring_run_service_create_recurring_run,
            repeatable=False,
            recurring_run=api.V2beta1RecurringRun(
                display_name=name,
                description=f"{timetable.cron.words}, UTC; {mark}",
                experiment_id=experiment,
                pipeline_version_reference=version,
                runtime_config=_runtime(options),
                service_account=options.service_account,
                trigger=api.V2beta1Trigger(
                    cron_schedule=api.V2beta1CronSchedule(
                        cron=timetable.cron.expression, start_time=start, end_time=timetable.end
                    )
                ),
                mode="DISABLE" if old else "ENABLE",
                max_concurrency="1",
                no_catchup=not timetable.catch_up,
            ),
        )
        if not old:
            return "created"
        runs = self._client.recurring_runs
        try:
            for schedule in old:
                call(
                    runs.recurring_run_service_disable_recurring_run,
                    recurring_run_id=schedule.recurring_run_id,
                )
            call(
                runs.recurring_run_service_enable_recurring_run,
                recurring_run_id=made.recurring_run_id,
            )
            self._remove(old)
        except ClusterError as error:
            raise ClusterError(
                f"schedule {name!r} is half replaced, run the same command again: {error}",
                error.status,
            ) from None
        return "replaced"

    def unschedule(self, name: str, *, every: bool = False) -> int:
        """Remove the schedule of that name; return how many were removed.

        Raises:
            InputError: there are several, and not `every` one is to go.
        """
        schedules = self._schedules(name)
        if len(schedules) > 1 and not every:
            raise InputError(
                f"there are {len(schedules)} schedules {name!r} ({_listing(schedules)}); "
                "give --all to remove them all"
            )
        self._remove(schedules)
        return len(schedules)

    def _schedules(self, name: str) -> list[Any]:
        return self._named(
            self._client.recurring_runs.recurring_run_service_list_recurring_runs,
            "recurring_runs",
            name,
            namespace=self.namespace,
        )

    def _remove(self, schedules: Iterable[Any]) -> None:
        for schedule in schedules:
            try:
                call(
                    self._client.recurring_runs.recurring_run_service_delete_recurring_run,
                    recurring_run_id=schedule.recurring_run_id,
                    # Otherwise Kubernetes ends the schedule's unfinished runs with it.
                    propagation_policy="ORPHAN",
                )
            except ClusterError as error:
                if error.status != 404:  # gone already, perhaps by an attempt with a lost answer
                    raise

    def _experiment(self, name: str) -> str:
        experiments = self._client.experiments
        found = _ensured(
            lambda: self._named(
                experiments.experiment_service_list_experiments,
                "experiments",
                name,
                namespace=self.namespace,
            ),
            lambda: call(
                experiments.experiment_service_create_experiment,
                repeatable=False,
                experiment=api.V2beta1Experiment(display_name=name, namespace=self.namespace),
            ),
        )
        return str(found.experiment_id)

    def _upload(self, package: Package) -> api.V2beta1PipelineVersionReference:
        """Return the version with this very text; upload it if the cluster has none."""
        pipelines = self._client.pipelines
        pipeline = _ensured(
            lambda: self._named(
                pipelines.pipeline_service_list_pipelines,
                "pipelines",
                package.name,
                namespace=self.namespace,
            ),
            lambda: call(
                pipelines.pipeline_service_create_pipeline,
                repeatable=False,
                pipeline=api.V2beta1Pipeline(
                    display_name=package.name,
                    description=package.description,
                    namespace=self.namespace,
                ),
            ),
        ).pipeline_id
        name = package.version
        version = _ensured(
            lambda: self._named(
                pipelines.pipeline_service_list_pipeline_versions,
                "pipeline_versions",
                name,
                pipeline_id=pipeline,
            ),
            lambda: self._upload_version(package, name, pipeline),
        )
        return api.V2beta1PipelineVersionReference(
            pipeline_id=pipeline, pipeline_version_id=version.pipeline_version_id
        )

    def _upload_version(self, package: Package, name: str, pipeline: str) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pipeline.yaml"
            path.write_bytes(package.text)
            return call(
                self._client.pipeline_uploads.upload_pipeline_version,
                str(path),
                repeatable=False,
                name=name,
                description=f"Compiled by reptile-fewshot {__version__}; SHA-256 {package.sha256}",
                pipelineid=pipeline,
            )

    def _named(self, listing: Callable[..., Any], field: str, name: str, **where: Any) -> list[Any]:
        """Return everything of that very name, from all pages."""
        predicate = {"operation": "EQUALS", "key": "display_name", "string_value": name}
        found, page = [], ""
        while True:
            answer = call(
                listing,
                page_token=page,
                page_size=100,
                filter=json.dumps({"predicates": [predicate]}),
                **where,
            )
            found += [item for item in getattr(answer, field) or () if item.display_name == name]
            page = answer.next_page_token
            if not page:
                return found


def _ensured(find: Callable[[], list[Any]], make: Callable[[], Any]) -> Any:
    """Return what is found, or else made; somebody else may be making it at the same time."""
    found = find()
    if found:
        return found[0]
    try:
        return make()
    except ClusterError as error:
        found = find() if error.status in (409, 500) else []  # uploads say 500 for a taken name
        if not found:
            raise
        return found[0]


def _runtime(options: RunOptions) -> api.V2beta1RuntimeConfig:
    return api.V2beta1RuntimeConfig(
        parameters=dict(options.parameters), pipeline_root=options.pipeline_root
    )


def _listing(schedules: list[Any]) -> str:
    return ", ".join(f"{s.recurring_run_id} made {s.created_at}" for s in schedules)


def outcome(state: str | None) -> Outcome:
    """Return how a run in this state of the API has ended."""
    return _OUTCOMES.get(state or "", Outcome.UNKNOWN)
