"""What makes a run fail or hang that can be seen before anything is sent.

By the names of the pipeline's parameters: one that a pipeline does not have is not looked at.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from pipeline.connection import ClusterError
from pipeline.kube import Kubernetes, Node
from pipeline.package import Package
from reptile.errors import InputError

# [host[:port]/]path[:tag][@digest], as container registries have it.
_IMAGE = re.compile(
    r"(?:(?P<host>localhost(?::\d+)?|[\w.-]+\.[\w.-]+(?::\d+)?|[\w.-]+:\d+)/)?"
    r"(?P<path>[a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_SECRET = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
PINNED = "REGISTRY/reptile-train@sha256:DIGEST"


@dataclass(frozen=True)
class Image:
    """A reference to an image; `host` is "" for Docker's registry."""

    host: str
    path: str
    tag: str
    digest: str


@dataclass(frozen=True)
class Request:
    """What one pod of training asks a node for."""

    resources: Mapping[str, str]  # quantity by resource
    selector: Mapping[str, str]
    tolerations: Sequence[Mapping[str, Any]]

    def __str__(self) -> str:
        return ", ".join(f"{name} {quantity}" for name, quantity in self.resources.items())


def check_run(
    package: Package,
    parameters: Mapping[str, Any],
    kube: Kubernetes | None,
    *,
    force: bool = False,
) -> None:
    """Refuse a run that cannot succeed, as far as that can be seen from here.

    Args:
        package: the compiled pipeline.
        parameters: of the run.
        kube: asked for its nodes, if it is there and lets this account read them.
        force: allow an image that may change, and requests that no node can hold yet.

    Raises:
        InputError: it cannot succeed.
    """
    check_parameters(package, parameters, force=force)
    request = training_request(package, parameters)
    if kube is None or force or not request.resources:
        return
    try:
        nodes = kube.nodes()
    except ClusterError:
        return
    _, why = fitting(request, nodes)
    if why:
        raise InputError(
            f"training would wait for ever: {why} (nodes of {kube.host}); change the request, or "
            "give --force if nodes are added on demand"
        )


def check_parameters(
    package: Package, parameters: Mapping[str, Any], *, force: bool = False
) -> None:
    """Refuse values with which no run can succeed; `force` allows an image that may change.

    Raises:
        InputError: no image, an image that is not pinned, an empty secret name or loop.
    """
    values = package.values(parameters)
    if "image" in values:
        image = parse_image(values["image"])
        if not (image.digest or force or image.tag not in ("", "latest")):
            which = (
                f"image {values['image']} may be another one tomorrow"
                if "image" in parameters
                else f"no image is given, and {values['image']} is in no registry"
            )
            raise InputError(
                f"{which}; give --param image={PINNED}, or --force where every node has the image"
            )
    for name, default in package.defaults.items():
        if name.endswith("_secret") and default and not _SECRET.fullmatch(values[name]):
            raise InputError(
                f"parameter {name}: {values[name]!r} is not the name of a secret; leave it out for "
                f"{default}"
            )
    given = [values[name] for name in ("data_secret", "git_secret") if name in values]
    if len(given) == 2 and given[0] == given[1] != "":
        raise InputError(
            f"parameters data_secret and git_secret are both {given[0]}: a pod can mount a "
            "secret once; make two of it"
        )
    for name in sorted(package.loops):
        if values.get(name) == []:
            raise InputError(
                f"parameter {name} is an empty list, of which no run comes to its end; give at "
                "least one item"
            )


def parse_image(text: str) -> Image:
    """Return the parts of a reference to an image.

    Raises:
        InputError: it is not one.
    """
    match = _IMAGE.fullmatch(text)
    if not match:
        raise InputError(f"parameter image: {text!r} is not an image; give {PINNED}")
    return Image(**{name: value or "" for name, value in match.groupdict().items()})


def training_request(package: Package, parameters: Mapping[str, Any]) -> Request:
    """Return what a pod of training asks for, by the run's parameters.

    Raises:
        InputError: a quantity is not one.
    """
    values = package.values(parameters)
    resources: dict[str, str] = {name: values[name] for name in ("cpu", "memory") if name in values}
    if values.get("accelerators", "0") != "0":
        resources[values["accelerator"]] = values["accelerators"]
    for name, quantity in resources.items():
        try:
            parse_quantity(quantity)
        except ValueError:
            raise InputError(
                f"{name}: {quantity!r} is not a quantity of Kubernetes, such as 4 or 8Gi"
            ) from None
    return Request(resources, values.get("node_selector") or {}, values.get("tolerations") or ())


def fitting(request: Request, nodes: Sequence[Node]) -> tuple[int, str]:
    """Return how many nodes could hold the pod if they were empty, and if none, why."""
    if not nodes:
        return 0, "no node takes pods"
    chosen = [node for node in nodes if request.selector.items() <= node.labels.items()]
    if not chosen:
        return 0, f"no node has the labels {dict(request.selector)}"
    allowed = [node for node in chosen if all(_tolerated(t, request) for t in node.taints)]
    if not allowed:
        taint = next(taint for taint in chosen[0].taints if not _tolerated(taint, request))
        return 0, f"no node is without a taint such as {taint.key}, which the run must tolerate"
    lacks = [name for name in request.resources if all(_most(node, name) == 0 for node in allowed)]
    if lacks:
        return 0, f"no node has any {lacks[0]}"
    count = sum(_holds(node, request) for node in allowed)
    largest = ", ".join(
        f"{name} {max((n.allocatable.get(name, '0') for n in allowed), key=parse_quantity)}"
        for name in request.resources
    )
    return count, "" if count else f"no node has all of {request}; the most that any has: {largest}"


def _most(node: Node, resource: str) -> Decimal:
    return Decimal(parse_quantity(node.allocatable.get(resource, "0")))


def _holds(node: Node, request: Request) -> bool:
    return all(_most(node, r) >= parse_quantity(q) for r, q in request.resources.items())


def _tolerated(taint: Any, request: Request) -> bool:
    """Return whether a pod may be put on a node in spite of a taint, as the scheduler decides."""
    return taint.effect == "PreferNoSchedule" or any(
        toleration.get("effect") in (None, "", taint.effect)
        and (
            toleration.get("key") in (None, "", taint.key)
            if toleration.get("operator") == "Exists"
            else (toleration.get("key"), toleration.get("value") or "")
            == (taint.key, taint.value or "")
        )
        for toleration in request.tolerations
    )
