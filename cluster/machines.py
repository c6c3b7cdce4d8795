"""The machines of a cluster, as numbers: what Ray says of them, or a person who plans for them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import psutil

from cluster.gpus import ray_name, reported_type
from cluster.nvidia import GpuReport
from trainers.gpus import UNKNOWN_TYPE, GpuType, gpu_type, known_type

WORKER_BYTES = 1.5e9
"""Memory to allow a CPU worker: Ray and torch take 0.6 GB of it, a mini trial the rest."""
CPUS_PER_GPU = 8
"""Of a planned node, unless told: one for each of the eight trials that can share a GPU."""
UNKNOWN = "of unknown type"
_ASSUMED = "own assumption: no less than the T4, the weakest type in the table"


def unknown_gpu(name: str = UNKNOWN, memory_bytes: float | None = None) -> GpuType:
    """A type that is not in the table: as fast as a T4, and with its memory unless that is known.

    Examples
    --------
    >>> unknown_gpu("NVIDIA X1", 24e9).memory_bytes, unknown_gpu().memory_bytes
    (24000000000.0, 16000000000.0)
    """
    least = gpu_type(UNKNOWN_TYPE)
    return replace(
        least, name=name, source=_ASSUMED, memory_bytes=memory_bytes or least.memory_bytes
    )


UNKNOWN_GPU = unknown_gpu()
"""What is assumed of GPUs of which nothing is known."""
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
    """Which GPUs they are, where the node or a person has said it: Ray tells no form or memory."""
    reported: bool = False
    """Whether the node itself has said which GPUs they are."""
    mps: bool = False
    """Whether processes share a GPU by MPS, so that their kernels may run at once."""
    exclusive: bool = False
    """Whether a GPU refuses a second process."""
    memory_bytes: float = float("inf")

    @property
    def gpu(self) -> GpuType:
        """The type of its GPUs, as far as it is known."""
        return self.told or known_type(self.gpu_type) or unknown_gpu(self.gpu_type or UNKNOWN)

    @property
    def unknown(self) -> bool:
        """Whether it has GPUs of a type that is not in the table."""
        return self.gpus > 0 and self.gpu.source == _ASSUMED


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

    def shares_by_mps(self, gpu_type: str | None) -> bool:
        """Whether MPS runs wherever a trial on a share of that type may be sent."""
        return all(node.mps for node in self.of_type(gpu_type))

    @property
    def with_mps(self) -> Cluster:
        """The same machines, if MPS ran on all of them."""
        return Cluster(nodes=tuple(replace(n, mps=True, exclusive=False) for n in self.nodes))

    def is_exclusive(self, gpu_type: str | None) -> bool:
        """Whether a trial on a share of that type may meet a GPU that refuses it."""
        return any(node.exclusive for node in self.of_type(gpu_type))

    def __str__(self) -> str:
        counts = Counter(map(_described, self.nodes))
        parts = [f"{n} node{'s' * (n > 1)} of {text}" for text, n in counts.items()]
        return ", ".join(parts) or "no nodes"


def _described(node: Node) -> str:
    cores = f"{node.cpus:g} core{'s' * (node.cpus != 1)}"
    if not node.gpus:
        return cores
    gpus = f"{node.gpus} GPU{'s' * (node.gpus > 1)} {node.gpu.name}"
    notes = [f"taken for {'T4s' if node.gpus > 1 else 'a T4'}"] if node.unknown else []
    if node.gpu.memory_bytes != _usual_memory(node.gpu):
        notes.append(f"{node.gpu.memory_bytes / 1e9:.3g} GB each")
    notes += ["MPS"] if node.mps else []
    notes += ["one process each"] if node.exclusive else []
    noted = f" ({', '.join(notes)})" if notes else ""
    return f"{gpus}{noted} and {cores}"


def _usual_memory(gpu: GpuType) -> float:
    return (known_type(gpu.name) or UNKNOWN_GPU).memory_bytes


def unknown_types(cluster: Cluster) -> str | None:
    """What is assumed of GPUs whose type is not in the table, and what to set; None without any."""
    nodes = [node for node in cluster.nodes if node.unknown]
    if not nodes:
        return None
    names = sorted({node.gpu.name for node in nodes} - {UNKNOWN})
    which = f" ({', '.join(names)})" if names else ""
    least = min(node.gpu.memory_bytes for node in nodes)
    memory = least == UNKNOWN_GPU.memory_bytes and not all(node.reported for node in nodes)
    return (
        f"the type of some GPUs is not known{which}: the speed of a T4 is assumed"
        + (f", and {least / 1e9:g} GB of memory" if memory else "")
        + ", so times are likely too long and shares too few; set [cluster] gpu to a known type"
        + (", or gpu_memory to the GB of each" if memory else "")
    )


def uniform(
    *,
    nodes: int = 1,
    gpus: int = 0,
    gpu_type: str | None = None,
    cpus: float | None = None,
    gpu_memory: float | None = None,
    mps: bool = False,
) -> Cluster:
    """A cluster of equal nodes, each of so many GPUs, with so many bytes, and cores.

    Examples
    --------
    >>> print(uniform(nodes=8, gpus=8, gpu_type="H100"))
    8 nodes of 8 GPUs H100 SXM and 64 cores
    """
    cores = max(1, CPUS_PER_GPU * gpus) if cpus is None else cpus
    known = known_type(gpu_type)
    node = Node(
        name="",
        cpus=cores,
        gpus=gpus,
        gpu_type=ray_name(known) if known else None,
        told=_as_named(gpu_type, gpu_memory) if gpus and (gpu_type or gpu_memory) else None,
        mps=mps,
    )
    return Cluster(nodes=tuple(replace(node, name=f"node {i + 1}") for i in range(nodes)))


def _as_named(gpu_type: str | None, gpu_memory: float | None) -> GpuType:
    """The type that a person means, known or not, with the memory that they give."""
    known = known_type(gpu_type)
    if known is None:
        return unknown_gpu(gpu_type or UNKNOWN, gpu_memory)
    return known if gpu_memory is None else replace(known, memory_bytes=gpu_memory)


def as_told(cluster: Cluster, gpu_type: str | None, gpu_memory: float | None = None) -> Cluster:
    """The cluster, with what a person says of GPUs where Ray and the nodes leave that open.

    A type that is known is that of the nodes that Ray gives its name, and of those to which Ray
    gives none. An unknown type, or its memory in bytes alone, is that of nodes of unknown type. A
    node that has reported its GPUs itself knows better.

    Examples
    --------
    >>> node = Node(name="a", cpus=8, gpus=1, gpu_type="A100")
    >>> [as_told(Cluster(nodes=(node,)), name).nodes[0].gpu.name for name in ("A100 80GB", "T4")]
    ['A100 80GB', 'A100 40GB']
    """
    if gpu_type is None and gpu_memory is None:
        return cluster
    gpu, in_table = _as_named(gpu_type, gpu_memory), known_type(gpu_type) is not None

    def is_meant(node: Node) -> bool:
        if node.reported or not node.gpus:
            return False
        return node.gpu_type in (None, ray_name(gpu)) if in_table else node.unknown

    return Cluster(nodes=tuple(replace(n, told=gpu) if is_meant(n) else n for n in cluster.nodes))


def cluster_from_ray(
    nodes: Iterable[Mapping[str, Any]], reports: Mapping[str, GpuReport] | None = None
) -> Cluster:
    """The cluster of the nodes that are alive, by `ray.nodes()` and by what they say themselves.

    `reports` has what some nodes, by their id, say of their GPUs.
    """
    alive = [node for node in nodes if node["Alive"]]
    return Cluster(
        nodes=tuple(
            _node(item, (reports or {}).get(_name(item))) for item in sorted(alive, key=_name)
        )
    )


def _node(item: Mapping[str, Any], report: GpuReport | None) -> Node:
    has = item["Resources"]
    types = [name.removeprefix(_TYPE_RESOURCE) for name in has if name.startswith(_TYPE_RESOURCE)]
    gpus = int(has.get("GPU", 0))
    node = Node(
        name=_name(item),
        cpus=has.get("CPU", 0.0),
        gpus=gpus,
        gpu_type=types[0] if types and gpus else None,
        memory_bytes=has.get("memory", float("inf")),
    )
    if report is None or not gpus:
        return node
    gpu = reported_type(report.name, report.memory_bytes)
    return replace(
        node,
        told=gpu or unknown_gpu(report.name, report.memory_bytes),
        reported=report.memory_bytes is not None,
        mps=report.mps,
        exclusive=report.exclusive,
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
