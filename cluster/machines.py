"""The machines of a cluster, as numbers: what Ray says of them, or a person who plans for them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil

from cluster.gpus import ray_name
from trainers.gpus import GpuType, gpu_type, known_type

WORKER_BYTES = 1.5e9
"""Memory to allow a CPU worker: Ray and torch take 0.6 GB of it, a mini trial the rest."""
CPUS_PER_GPU = 8
"""Of a planned node, unless told: one for each of the eight trials that can share a GPU."""
UNKNOWN_GPU = replace(
    gpu_type("T4"),
    name="of unknown type",
    source="own assumption: no less than the T4, the weakest type in the table",
)
"""What is assumed of GPUs whose type nobody told."""
_TYPE_RESOURCE = "accelerator_type:"
"""Ray's name of the resource that says which GPUs a node has."""


class UnfitNodeError(Exception):
    """A node cannot work on the sweep: another project or isoflop, or a GPU that does not work."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine of a cluster."""

    name: str
    """Its address, or how Ray names it."""
    cpus: float
    """Cores that trials may take."""
    gpus: int = 0
    gpu_type: str | None = None
    """As Ray names it, since a trial that needs this type asks Ray for it by that name."""
    told: GpuType | None = None
    """Which GPUs they are, where a person has said it: Ray tells neither form nor memory."""
    memory_bytes: float = float("inf")

    @property
    def gpu(self) -> GpuType:
        """What is known of its GPUs."""
        return self.told or known_type(self.gpu_type) or UNKNOWN_GPU


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Machines that are there at one moment."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        """Cores in all."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        """GPUs in all."""
        return sum(node.gpus for node in self.nodes)

    def of_type(self, gpu_type: str | None) -> list[Node]:
        """Nodes with GPUs of that type; of any type for None."""
        return [n for n in self.nodes if n.gpus and gpu_type in (None, n.gpu_type)]

    def __str__(self) -> str:
        counts = Counter(map(_described, self.nodes))
        parts = [f"{n} node{'s' * (n > 1)} of {text}" for text, n in counts.items()]
        return ", ".join(parts) or "no nodes"


def _described(node: Node) -> str:
    cores = f"{node.cpus:g} core{'s' * (node.cpus != 1)}"
    if not node.gpus:
        return cores
    gpus = f"{node.gpus} GPU{'s' * (node.gpus > 1)} {node.gpu.name}"
    if node.gpu is UNKNOWN_GPU:
        gpus += f", taken for {'T4s' if node.gpus > 1 else 'a T4'},"
    return f"{gpus} and {cores}"


def uniform(
    *,
    nodes: int = 1,
    gpus: int = 0,
    gpu_type: str | None = None,
    cpus: float | None = None,
) -> Cluster:
    """A cluster of equal nodes, each of so many GPUs and cores.

    Examples
    --------
    >>> print(uniform(nodes=8, gpus=8, gpu_type="H100"))
    8 nodes of 8 GPUs H100 SXM and 64 cores
    """
    cores = max(1, CPUS_PER_GPU * gpus) if cpus is None else cpus
    told = known_type(gpu_type)
    name = ray_name(told) if told else None
    node = Node(name="", cpus=cores, gpus=gpus, gpu_type=name, told=told)
    return Cluster(nodes=tuple(replace(node, name=f"node {i + 1}") for i in range(nodes)))


def as_told(cluster: Cluster, gpu_type: str | None) -> Cluster:
    """The cluster, with GPUs of the type that a person names where Ray's name leaves that open.

    Examples
    --------
    >>> node = Node(name="a", cpus=8, gpus=1, gpu_type="A100")
    >>> [as_told(Cluster(nodes=(node,)), name).nodes[0].gpu.name for name in ("A100 80GB", "T4")]
    ['A100 80GB', 'A100 40GB']
    """
    told = known_type(gpu_type)
    if told is None:
        return cluster
    nodes = (replace(n, told=told) if n.gpu_type == ray_name(told) else n for n in cluster.nodes)
    return Cluster(nodes=tuple(nodes))


def cluster_from_ray(nodes: Iterable[Mapping[str, Any]]) -> Cluster:
    """What `ray.nodes()` says of the nodes that are alive."""
    alive = [node for node in nodes if node["Alive"]]
    return Cluster(nodes=tuple(_node(item) for item in sorted(alive, key=_name)))


def _node(item: Mapping[str, Any]) -> Node:
    has = item["Resources"]
    types = [name.removeprefix(_TYPE_RESOURCE) for name in has if name.startswith(_TYPE_RESOURCE)]
    gpus = int(has.get("GPU", 0))
    return Node(
        name=_name(item),
        cpus=has.get("CPU", 0.0),
        gpus=gpus,
        gpu_type=types[0] if types and gpus else None,
        memory_bytes=has.get("memory", float("inf")),
    )


def _name(item: Mapping[str, Any]) -> str:
    """Its identity: several nodes of a local cluster share one address."""
    return str(item.get("NodeID") or item["NodeManagerAddress"])


def this_machine() -> Cluster:
    """The cores of this machine, as far as its memory goes, and none of its GPUs."""
    total = float(psutil.virtual_memory().total)
    return Cluster(nodes=(Node(name="this machine", cpus=cpu_slots(), memory_bytes=total),))


def cpu_slots() -> int:
    """Trials that this machine trains at once: one a core, as far as its memory goes."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, int(psutil.virtual_memory().total / WORKER_BYTES)))
