"""A stand-in for the API of Kubeflow Pipelines, which holds state and checks what it is sent.

Paths, query parameters and types are read from the installed `kfp_server_api`; anything that these
do not know is answered by 418, which no test expects. Refusals, failed runs and logs are as a real
one answered (`kubeflow/README.md`).
"""

import inspect
import json
import re
import ssl
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import kfp_server_api as api
import yaml

RECORDED = Path(__file__).parent / "kubeflow"
LOG = re.compile(r"/apis/v1alpha1/runs/([^/]+)/nodes/([^/]+)/log")
HEALTH = "healthz_service_get_healthz"
PAGE = 2  # small, so that a few things fill several pages


class RefusedError(Exception):
    """A refusal; without `body`, as the API's gateway sends it (uploads have their own form)."""

    def __init__(self, status: int, message: str, body: dict[str, Any] | None = None):
        super().__init__(message)
        self.status = status
        self.body = body or {"code": status, "message": message, "details": []}


def recorded_run(name: str) -> dict[str, Any]:
    """Return state and tasks of a run of a real Kubeflow."""
    answer: dict[str, Any] = json.loads((RECORDED / f"run-{name}.json").read_text())
    return answer


def recorded_log(name: str) -> str:
    """Return what a real Kubeflow gives as the log of a pod."""
    return (RECORDED / f"log-{name}.txt").read_text()


def recorded_refusal(status: int, name: str) -> RefusedError:
    """Return how a real Kubeflow refused a request."""
    answer = json.loads((RECORDED / f"{name}.json").read_text())
    return RefusedError(status, answer["message"], answer)


def replay(last: dict[str, Any], seconds: int = 10) -> list[dict[str, Any]]:
    """Return a run as it was every so many seconds, up to its end.

    Kubeflow listed the children of a node as they came to be; here that is seen to for the attempts
    of a pod alone, of which the recorded runs have two at most.
    """
    nodes = last["run_details"]["task_details"]
    times = [
        {key: datetime.fromisoformat(node[key]) for key in ("start_time", "end_time")}
        for node in nodes
    ]
    second = [
        t["start_time"]
        for t, n in zip(times, nodes, strict=True)
        if n.get("display_name") == "executor(1)"
    ]
    now = min(t["start_time"] for t in times)
    looks = []
    while now < max(t["end_time"] for t in times):
        seen = []
        for node, time in zip(nodes, times, strict=True):
            if time["start_time"] > now or "state" not in node:
                continue
            node = dict(node)
            if time["end_time"] > now:
                node |= {"state": "RUNNING", "end_time": "0001-01-01T00:00:00Z"}
            if node.get("display_name") == "executor" and "child_tasks" in node:
                begun = 1 + sum(start <= now for start in second)
                node["child_tasks"] = node["child_tasks"][:begun]
            seen.append(node)
        looks.append({"state": "RUNNING", "run_details": {"task_details": seen}})
        now += timedelta(seconds=seconds)
    return [*looks, last]


def node_id(workflow: str, full_name: str) -> str:
    """Return what Argo calls a node: the name of its workflow and a hash of its full name."""
    value = 2166136261
    for character in full_name:
        value = (value ^ ord(character)) * 16777619 % 2**32
    return f"{workflow}-{value}"


def refused_by_the_gate() -> tuple[dict[str, Any], str]:
    """Return the recorded refusal and its log, as if `refuse` had been called `gate`, as now."""
    run = recorded_run("refused")
    nodes = [
        n
        for n in run["run_details"]["task_details"]
        if not n.get("display_name", "").startswith("gate")
    ]
    text = json.dumps(nodes).replace('"refuse', '"gate')
    parent = "reptile-llrqs(0).root(0).exit-handler-1(0).condition-branches-3(0).condition-6(0)"
    for ending in ("", "(0)", "-driver", "-driver(0)", "(0).executor", "(0).executor(0)"):
        old, new = (node_id("reptile-llrqs", f"{parent}.{t}{ending}") for t in ("refuse", "gate"))
        text = text.replace(f'"{old}"', f'"{new}"')
    run["run_details"]["task_details"] = json.loads(text)
    log = recorded_log("refused").replace("`refuse`", "`gate`").replace('"refuse"', '"gate"')
    return run, log.replace("not exported: ", "refused by the gate: ")


class ContractError(Exception):
    pass


def _routes() -> list[tuple[str, re.Pattern[str], str, set[str], str]]:
    """Method, path, name, query parameters and answer of all functions of the installed package."""
    routes = []
    for service in vars(api.api).values():
        for name, function in inspect.getmembers(service, inspect.isfunction):
            if not name.endswith("_with_http_info"):
                continue
            source = inspect.getsource(function)
            path, method = re.findall(r"'(/apis/[^']*)', '([A-Z]+)'", source)[0]
            pattern = re.compile(re.sub(r"\{([\w.]+)\}", r"([^/:]+)", path))
            query = set(re.findall(r"query_params\.append\(\('(\w+)'", source))
            kind = re.findall(r"response_type='([^']*)'", source)[0]
            routes.append((method, pattern, name.removesuffix("_with_http_info"), query, kind))
    return routes


ROUTES = _routes()


def checked(value: Any, kind: str, where: str) -> Any:
    """Return `value` if it is what JSON of the API's type `kind` may be."""
    if value is None or kind == "object":
        return value
    if match := re.fullmatch(r"list\[(.*)\]", kind):
        return [checked(item, match[1], where) for item in value]
    if match := re.fullmatch(r"dict\(str, (.*)\)", kind):
        return {key: checked(item, match[1], where) for key, item in value.items()}
    if kind == "datetime":
        if datetime.fromisoformat(value).tzinfo is None:
            raise ContractError(f"{where}: {value} has no time zone")
        return value
    if kind in ("str", "int", "bool"):
        if type(value).__name__ != kind:
            raise ContractError(f"{where}: {value!r} is not {kind}")
        return value
    model = getattr(api.models, kind)
    if hasattr(model, "allowable_values"):
        if value not in model.allowable_values:
            raise ContractError(f"{where}: {value!r} is none of {model.allowable_values}")
        return value
    fields = {model.attribute_map[name]: type_ for name, type_ in model.openapi_types.items()}
    if unknown := set(value) - set(fields):
        raise ContractError(f"{where}: {kind} has no {unknown}")
    return {name: checked(item, fields[name], f"{where}.{name}") for name, item in value.items()}


class KubeflowServer:
    """State and behaviour; `faults` are (name of function, status, how often)."""

    def __init__(self, *, multi_user: bool = False, certificate: tuple[Path, Path] | None = None):
        self.multi_user = multi_user
        self.experiments: dict[str, dict[str, Any]] = {}
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.uploads: dict[str, bytes] = {}  # by version
        self.specs: dict[str, Any] = {}  # the same, read
        self.runs: dict[str, dict[str, Any]] = {}
        self.schedules: dict[str, dict[str, Any]] = {}
        self.states = ["PENDING", "RUNNING", "SUCCEEDED"]  # of a run, one a look; the last stays
        self.details: dict[str, Any] = {}
        self.looks: list[dict[str, Any]] = []  # instead of both: a run, one a look; the last stays
        self.refusals: dict[str, RefusedError] = {}  # by name of function
        self.logs: dict[str, str] = {}  # of all runs, by node
        self.version = "2.17.0"
        self.token: str | None = None
        self.html: int | None = None  # answer everything with a web page of this status
        self.faults: dict[str, list[int]] = {}
        self.log: list[str] = []
        self.heard: list[str] = []  # whole request lines and headers
        self.broken: list[str] = []  # contracts
        self.awake: list[int] = []  # number of enabled schedules after each request
        self.before: dict[str, Callable[[], object]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # hangs up
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        if certificate:
            self.address = self.address.replace("http:", "https:")
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # one write an answer: two would wait for each other's acknowledgement

            def log_message(self, *_: Any) -> None:
                pass

            def _any(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                kind, status = "application/json", 200
                answer: Any
                try:
                    answer = server.answer(self, body)
                    json.dumps(answer)
                except RefusedError as error:
                    status, answer = error.status, error.body
                except Exception as error:  # a defect of the request, or of this stand-in
                    server.broken.append(f"{self.command} {self.path}: {error!r}")
                    status, answer = 418, {"message": repr(error)}
                data = json.dumps(answer).encode()
                if isinstance(answer, str):
                    kind, data = "text/plain", answer.encode()
                if server.html:
                    kind, status, data = "text/html", server.html, b"<html>Sign in</html>"
                self.send_response(status)
                self.send_header("Content-Type", kind)
                if 300 <= status < 400:
                    self.send_header("Location", "https://login.example/?next=/")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        for verb in ("GET", "POST", "DELETE", "PUT", "PATCH"):
            setattr(Handler, f"do_{verb}", Handler._any)
        return Handler

    def answer(self, request: BaseHTTPRequestHandler, body: bytes) -> Any:
        self.heard.append(f"{request.requestline}\n{request.headers}")
        parts = urlsplit(request.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if log := LOG.fullmatch(parts.path):
            self._authorize(request)
            return self.logs.get(log[2], recorded_log("unknown"))
        here: list[Any] = [
            (m, *route)
            for verb, path, *route in ROUTES
            if verb == request.command and (m := path.fullmatch(parts.path))
        ]
        if not here:
            raise RefusedError(404, "")
        match, name, known, kind = here[0]
        if unknown := set(query) - known:
            raise ContractError(f"{name} has no query parameter {unknown}")
        self.log.append(name)
        self._authorize(request)
        if self.faults.get(name):
            status = self.faults[name].pop(0)
            if status:
                raise RefusedError(status, "upstream connect error")
        if name in self.refusals:
            raise self.refusals[name]
        if name in self.before:
            self.before.pop(name)()
        content = body
        if request.headers["Content-Type"] == "application/json" and body:
            content = json.loads(body)
        elif body:
            content = self._file(request, body)
        function: Callable[..., Any] = getattr(self, name)
        result = function(*map(unquote, match.groups()), content, query)
        self.awake.append(sum(s["mode"] == "ENABLE" for s in self.schedules.values()))
        return result if name == HEALTH else checked(result, kind, f"answer of {name}")

    def _authorize(self, request: BaseHTTPRequestHandler) -> None:
        if self.token and request.headers["Authorization"] != f"Bearer {self.token}":
            raise RefusedError(401, "unauthenticated")

    def _file(self, request: BaseHTTPRequestHandler, body: bytes) -> bytes:
        message = BytesParser().parsebytes(
            f"Content-Type: {request.headers['Content-Type']}\r\n\r\n".encode() + body
        )
        parts: Any = message.get_payload()
        (part,) = parts
        if part.get_param("name", header="content-disposition") != "uploadfile":
            raise ContractError("the file's field is uploadfile")
        return bytes(part.get_payload(decode=True))

    def _namespace(self, namespace: str | None) -> None:
        if not self.multi_user and namespace:
            raise RefusedError(400, "Namespace should not be provided in single-user mode.")
        if self.multi_user and namespace != "team":
            raise RefusedError(403, f"not allowed in {namespace}")

    def _page(self, items: dict[str, Any], field: str, query: dict[str, str]) -> Any:
        text = query.get("filter", '{"predicates": []}')
        wanted = checked(json.loads(text), "V2beta1Filter", "filter")["predicates"]
        for predicate in wanted:
            if (predicate["operation"], predicate["key"]) != ("EQUALS", "display_name"):
                raise ContractError(f"this stand-in does not filter by {predicate}")
        found = [
            item
            for item in items.values()
            if all(item["display_name"] == predicate["string_value"] for predicate in wanted)
        ]
        start, bound = 0, ""
        if token := query.get("page_token"):
            start, bound = json.loads(token)
            if bound != text:
                raise RefusedError(400, "page token does not match the filter")
        end = start + min(PAGE, int(query.get("page_size", "20")))
        answer: dict[str, Any] = {field: found[start:end], "total_size": len(found)}
        if end < len(found):
            answer["next_page_token"] = json.dumps([end, text])
        return answer

    def _made(self, body: Any, kind: str, key: str, **more: Any) -> dict[str, Any]:
        made = checked(body, kind, "body") | {
            key: str(uuid.uuid4()),
            "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
        }
        return made | more

    def healthz_service_get_healthz(self, _: Any, query: Any) -> Any:
        # Recorded: kfp_server_api does not know the first two.
        known = {"multi_user": self.multi_user, "pipeline_store": "database"}
        return {"commit_sha": "unknown", "tag_name": self.version} | known

    def experiment_service_list_experiments(self, _: Any, query: dict[str, str]) -> Any:
        self._namespace(query.get("namespace"))
        return self._page(self.experiments, "experiments", query)

    def experiment_service_create_experiment(self, body: Any, _: Any) -> Any:
        self._namespace(body.get("namespace"))
        if any(e["display_name"] == body["display_name"] for e in self.experiments.values()):
            raise RefusedError(409, "already exists")
        made = self._made(body, "V2beta1Experiment", "experiment_id")
        self.experiments[made["experiment_id"]] = made
        return made

    def pipeline_service_list_pipelines(self, _: Any, query: dict[str, str]) -> Any:
        self._namespace(query.get("namespace"))
        return self._page(self.pipelines, "pipelines", query)

    def pipeline_service_create_pipeline(self, body: Any, _: Any) -> Any:
        self._namespace(body.get("namespace"))
        made = self._made(body, "V2beta1Pipeline", "pipeline_id")
        self.pipelines[made["pipeline_id"]] = made
        return made

    def pipeline_service_list_pipeline_versions(self, pipeline: str, _: Any, query: Any) -> Any:
        here = {k: v for k, v in self.versions.items() if v["pipeline_id"] == pipeline}
        return self._page(here, "pipeline_versions", query)

    def upload_pipeline_version(self, content: bytes, query: dict[str, str]) -> Any:
        if query["pipelineid"] not in self.pipelines:
            raise RefusedError(404, "no such pipeline")
        if any(v["display_name"] == query["name"] for v in self.versions.values()):
            message = "Failed to create a pipeline version"
            raise RefusedError(409, message, {"error_message": message, "error_details": message})
        made = self._made({}, "V2beta1PipelineVersion", "pipeline_version_id") | {
            "pipeline_id": query["pipelineid"],
            "display_name": query["name"],
            "description": query.get("description", ""),
        }
        self.versions[made["pipeline_version_id"]] = made
        self.uploads[made["pipeline_version_id"]] = content
        self.specs[made["pipeline_version_id"]] = next(yaml.safe_load_all(content))
        return made

    def _runnable(self, body: dict[str, Any]) -> None:
        if body["experiment_id"] not in self.experiments:
            raise RefusedError(404, "no such experiment")
        reference = body["pipeline_version_reference"]
        version = self.versions[reference["pipeline_version_id"]]
        if version["pipeline_id"] != reference["pipeline_id"]:
            raise ContractError("version and pipeline do not belong together")
        spec = self.specs[version["pipeline_version_id"]]
        known = spec["root"]["inputDefinitions"]["parameters"]
        given = body["runtime_config"]["parameters"]
        if unknown := set(given) - set(known):
            raise ContractError(f"the pipeline has no parameters {unknown}")
        types: dict[str, Any] = {
            "STRING": str,
            "NUMBER_INTEGER": int,
            "NUMBER_DOUBLE": (int, float),
            "BOOLEAN": bool,
            "LIST": list,
            "STRUCT": dict,
        }
        for name, value in given.items():
            if not isinstance(value, types[known[name]["parameterType"]]):
                raise ContractError(f"{name} is of the wrong type")

    def run_service_create_run(self, body: Any, _: Any) -> Any:
        made = self._made(body, "V2beta1Run", "run_id", state="PENDING")
        self._runnable(made)
        self.runs[made["run_id"]] = made
        return made

    def run_service_list_runs(self, _: Any, query: dict[str, str]) -> Any:
        self._namespace(query.get("namespace"))
        return self._page(self.runs, "runs", query)

    def run_service_get_run(self, run: str, _: Any, query: Any) -> Any:
        if run not in self.runs:
            missing = f"ResourceNotFoundError: Run {run} not found"
            raise RefusedError(404, f"Failed to get a run: Failed to fetch run {run}: {missing}")
        if self.looks:
            return self.runs[run] | (self.looks.pop(0) if len(self.looks) > 1 else self.looks[0])
        self.runs[run]["state"] = self.states[0]
        if len(self.states) > 1:
            self.states.pop(0)
        return self.runs[run] | self.details

    def recurring_run_service_list_recurring_runs(self, _: Any, query: dict[str, str]) -> Any:
        self._namespace(query.get("namespace"))
        return self._page(self.schedules, "recurringRuns", query)

    def recurring_run_service_create_recurring_run(self, body: Any, _: Any) -> Any:
        made = self._made(body, "V2beta1RecurringRun", "recurring_run_id")
        self._runnable(made)
        made["status"] = {"ENABLE": "ENABLED", "DISABLE": "DISABLED"}[made["mode"]]
        self.schedules[made["recurring_run_id"]] = made
        return made

    def recurring_run_service_enable_recurring_run(self, schedule: str, _: Any, query: Any) -> Any:
        self.schedules[schedule] |= {"mode": "ENABLE", "status": "ENABLED"}
        return {}

    def recurring_run_service_disable_recurring_run(self, schedule: str, _: Any, query: Any) -> Any:
        self.schedules[schedule] |= {"mode": "DISABLE", "status": "DISABLED"}
        return {}

    def recurring_run_service_delete_recurring_run(self, schedule: str, _: Any, query: Any) -> Any:
        if schedule not in self.schedules:
            raise RefusedError(404, "no such recurring run")
        del self.schedules[schedule]
        if query.get("propagation_policy") != "ORPHAN":  # as Kubernetes does with what is owned
            self.runs = {
                k: r for k, r in self.runs.items() if r.get("recurring_run_id") != schedule
            }
        return {}
