"""What a run needs of a cluster, looked at before it: one finding for each, in one sentence."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import yaml

from pipeline.cluster import Cluster
from pipeline.connection import ClusterError, check_version
from pipeline.kube import NAMESPACE, Kubernetes
from pipeline.package import Package
from pipeline.preflight import check_parameters, fitting, parse_image, training_request
from pipeline.registry import UnknownError, has_image
from reptile.errors import InputError

_ARGO = "workflow-controller-configmap"
_WRITABLE = {"ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"}
# What `submit` and `schedule` make, by Kubeflow's names of the rights where it has several users.
_MADE = ("experiments", "pipelines", "runs", "jobs")


class Finding(NamedTuple):
    """What was looked at, and how it is; what is `wrong` fails a run."""

    what: str
    state: Literal["ok", "weak", "wrong", "unknown"]
    sentence: str


_S3 = frozenset({"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"})
_KEYS = {"data_secret": _S3, "work_secret": _S3}
"""The keys that a store in S3 needs, or may need; other stores and accounts need others or none."""


def findings(
    cluster: Cluster | ClusterError,
    kube: Kubernetes | None,
    package: Package,
    parameters: Mapping[str, Any],
) -> Iterator[Finding]:
    """Look at everything that a run with these parameters needs.

    Args:
        cluster: or why it cannot be reached.
        kube: None if there is neither a cluster around nor a kubeconfig.
        package: the compiled pipeline.
        parameters: of the run, as far as they are given.
    """
    values = package.values(parameters)
    if isinstance(cluster, ClusterError):
        yield Finding("server", "wrong", _sentence(cluster))
    else:
        yield _server(cluster, package.backend)
        yield _rights(cluster, kube)
    yield _parameters(package, parameters)
    if "image" in values:
        yield _image(values["image"])
    if kube is None:
        yield Finding(
            "Kubernetes",
            "unknown",
            "There is no kubeconfig here, so nodes, volume, secrets and Argo were not looked at.",
        )
        return
    yield _nodes(kube, package, parameters)
    if "work_volume" in values and "://" not in values["work"]:
        yield _claim(kube, values["work_volume"])
    for name in sorted(name for name in values if name.endswith("_secret")):
        yield _secret(kube, values[name], _KEYS.get(name, frozenset()))
    yield _argo(kube)


def _server(cluster: Cluster, needed: tuple[int, int]) -> Finding:
    try:
        version = cluster.version()
        remark = check_version(version, needed)
    except ClusterError as error:
        return Finding("server", "wrong", _sentence(error))
    if remark:
        return Finding("server", "unknown", _sentence(remark))
    return Finding("server", "ok", f"It has version {version}.")


def _rights(cluster: Cluster, kube: Kubernetes | None) -> Finding:
    try:
        cluster.list_all()
    except ClusterError as error:
        return Finding("rights", "wrong", _sentence(error))
    seen = "This account may list experiments, pipelines, runs and schedules"
    if cluster.namespace is None:
        return Finding("rights", "ok", f"{seen}; with one user, it may also make them.")
    if kube is None:
        return Finding("rights", "unknown", f"{seen}; whether it may make them is not known.")
    try:
        lacking = [r for r in _MADE if not kube.may("create", r, "pipelines.kubeflow.org")]
    except ClusterError as error:
        return Finding("rights", "unknown", f"{seen}; {error}.")
    if lacking:
        return Finding(
            "rights",
            "wrong",
            f"{seen}, but the account of the kubeconfig may not create {', '.join(lacking)} of "
            f"pipelines.kubeflow.org in namespace {kube.namespace}.",
        )
    return Finding("rights", "ok", f"{seen}, and make them.")


def _parameters(package: Package, parameters: Mapping[str, Any]) -> Finding:
    try:
        check_parameters(package, parameters)
    except InputError as error:
        return Finding("parameters", "wrong", _sentence(error))
    return Finding("parameters", "ok", "Image, secrets and lists are given as a run needs them.")


def _image(text: str) -> Finding:
    try:
        there = has_image(parse_image(text))
    except (InputError, UnknownError) as error:
        return Finding("image", "unknown", _sentence(error))
    if there:
        return Finding("image", "ok", f"{text} can be pulled from here.")
    return Finding("image", "wrong", f"Its registry has no {text}; push it, or mend --param image.")


def _nodes(kube: Kubernetes, package: Package, parameters: Mapping[str, Any]) -> Finding:
    try:
        request = training_request(package, parameters)
        nodes = kube.nodes()
    except InputError as error:
        return Finding("nodes", "wrong", _sentence(error))
    except ClusterError as error:
        return Finding("nodes", "unknown", _sentence(error))
    count, why = fitting(request, nodes)
    if why:
        return Finding("nodes", "wrong", _sentence(why))
    return Finding(
        "nodes", "ok", f"{count} of {len(nodes)} could hold training's {request} when empty."
    )


def _claim(kube: Kubernetes, name: str) -> Finding:
    try:
        claim = kube.claim(name)
    except ClusterError as error:
        return _unread("volume", error)
    modes, phase = claim.spec.access_modes or [], claim.status.phase
    if not _WRITABLE & set(modes):
        return Finding(
            "volume", "wrong", f"Claim {name} cannot be written to ({', '.join(modes)})."
        )
    if phase == "Pending":
        return Finding(
            "volume",
            "weak",
            f"Claim {name} is not bound yet, which is right only if its storage class waits for "
            "the first pod.",
        )
    if phase != "Bound":
        return Finding("volume", "wrong", f"Claim {name} is {phase.lower()}, not bound.")
    return Finding("volume", "ok", f"Claim {name} is bound, {', '.join(modes)}.")


def _secret(kube: Kubernetes, name: str, wanted: frozenset[str]) -> Finding:
    what = f"secret {name}"
    try:
        keys = kube.secret_keys(name)
    except ClusterError as error:
        if error.status == 404:  # all of the pipeline's secrets may be missing
            return Finding(what, "weak", f"It is not there, so a run does without {name}.")
        return Finding(what, "unknown", _sentence(error))
    lacking = sorted(wanted - keys)
    if lacking:
        return Finding(what, "weak", f"It has no {', '.join(lacking)}, which a run does without.")
    return Finding(what, "ok", f"It has {', '.join(sorted(keys)) or 'no keys'}.")


def _argo(kube: Kubernetes) -> Finding:
    """Say what Argo retries: what its defaults say goes for all that the pipeline retries."""
    try:
        policy = _retry_policy(kube.config_map(_ARGO, NAMESPACE))
    except (ClusterError, yaml.YAMLError) as error:
        return Finding("retries", "unknown", _sentence(str(error).partition("\n")[0]))
    way_out = "deploy/argo has the setting for both"
    if policy == "Always":
        return Finding(
            "retries", "ok", "Argo retries a process that failed and a pod that is lost."
        )
    if policy == "OnError":
        return Finding(
            "retries", "weak", f"Argo retries a lost pod and not a failed process; {way_out}."
        )
    return Finding(
        "retries",
        "weak",
        f"Argo retries a failed process and not a lost pod ({policy or 'no policy'}); {way_out}.",
    )


def _retry_policy(data: Mapping[str, str]) -> str:
    """Return the policy in Argo's defaults, "" for none; a strategy of templates goes first."""
    whole = yaml.safe_load(data.get("config", "")) or {}
    defaults = whole.get("workflowDefaults") or yaml.safe_load(data.get("workflowDefaults", ""))
    spec = (defaults or {}).get("spec") or {}
    for place in (spec.get("templateDefaults"), spec):
        policy = ((place or {}).get("retryStrategy") or {}).get("retryPolicy")
        if policy:
            return str(policy)
    return ""


def _unread(what: str, error: ClusterError) -> Finding:
    return Finding(what, "wrong" if error.status == 404 else "unknown", _sentence(error))


def _sentence(text: object) -> str:
    words = str(text).rstrip(".")
    return f"{words}." if words.startswith("http") else f"{words[:1].upper()}{words[1:]}."
