"""What a trial needs: a core, a share of a GPU, GPUs of one node, or several whole nodes.

Few classes, since a Ray actor can be used again only by a trial that asks for exactly the same.
Pure: knows a cluster's numbers, not the cluster.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction

from cluster.effort import Effort
from cluster.gpus import variants
from cluster.machines import WORKER_BYTES, Cluster
from cluster.pace import Pace
from trainers.flops import params, trial_flops
from trainers.gpus import GpuType
from trainers.memory import CONTEXT_BYTES, HEADROOM, LEAST, NCCL_BYTES, Passes, training_memory
from trainers.simulated import SimulatedSettings
from trainers.trial import Trial

SHARES = (1 / 8, 1 / 4, 1 / 2)
"""Of one GPU."""
SHARE_GAIN = 1.1
"""Least factor in GPU-seconds for which a trial is put on a smaller share: what less is saved than
that, the errors of a forecast may take back, and a trial on a share takes longer."""
CUDA_SECONDS = 3.0
"""What a process takes to start CUDA and its libraries, which a core does without; own
allowance."""
PROCESS_BYTES = 0.6e9
"""Of a CPU worker before any tensor: Ray and torch."""
GPU_PROCESS_BYTES = 3e9
"""Main memory of a GPU worker before any tensor: Ray and torch take 0.6 GB, CUDA's libraries and
the compiler of kernels the rest (own allowance)."""
STATE_BYTES, WEIGHT_BYTES = 12, 4
"""Main memory for each parameter of a checkpoint while it is written, and of a stored model."""
PIN = 0.001
"""How much of a node's type a trial asks for that needs that type. Ray gives each node 1."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """What a trial asks Ray for. Equal ones are one class, whose trials use each other's actors."""

    gpus: float = 0.0
    """0 for cores alone; a share below 1; else GPUs on all nodes together."""
    memory_bytes: int = 0
    """Main memory that it asks for, on all nodes together."""
    nodes: int = 1
    """How many nodes the GPUs are on, the same number on each."""
    gpu_type: str | None = None
    """The type it needs, as Ray names it; None where any of the cluster will do."""
    bytes: float = field(default=0.0, compare=False)
    """Memory that it is expected to take on each GPU, or of the machine."""

    @property
    def gpus_per_node(self) -> float:
        """GPUs on each node."""
        return self.gpus / self.nodes

    @property
    def cpus(self) -> float:
        """Cores in all: one a GPU, and one at least."""
        return max(1.0, self.gpus)

    @property
    def bundles(self) -> tuple[dict[str, float], ...]:
        """Ray's bundles, the trial's own process in the first.

        With several GPUs that process leads: its bundle is empty, and one a node follows for the
        ranks.
        """
        pin = {f"accelerator_type:{self.gpu_type}": PIN} if self.gpu_type else {}
        if self.gpus <= 1:
            shared = {"GPU": self.gpus, "memory": self.memory_bytes}
            return ({"CPU": self.cpus} | {k: v for k, v in shared.items() if v} | pin,)
        each = self.gpus_per_node
        memory = {"memory": self.memory_bytes // self.nodes} if self.memory_bytes else {}
        bundle = {"CPU": each, "GPU": each} | memory | pin
        return ({}, *(dict(bundle) for _ in range(self.nodes)))

    @property
    def size(self) -> tuple[float, int, str]:
        """By which classes are sorted, the smallest first."""
        return self.gpus, self.memory_bytes, self.label

    @property
    def strategy(self) -> str:
        """Ray's strategy for the bundles."""
        return "STRICT_PACK" if self.nodes == 1 else "PACK"

    @property
    def label(self) -> str:
        """The class as people read it.

        Examples
        --------
        >>> [Placement(gpus=g, nodes=n).label for g, n in ((0, 1), (1 / 8, 1), (1, 1), (16, 2))]
        ['1 core', '1/8 GPU', '1 GPU', '2 x 8 GPUs']
        """
        if not self.gpus:
            large = self.memory_bytes > WORKER_BYTES
            return "1 core" + (f" and {_gb(self.memory_bytes)}" if large else "")
        nodes = f"{self.nodes} x " if self.nodes > 1 else ""
        number = f"{Fraction(self.gpus_per_node).limit_denominator(8)} GPU"
        several = "s" if self.gpus_per_node > 1 else ""
        return f"{nodes}{number}{several}" + (f" {self.gpu_type}" if self.gpu_type else "")


@dataclass(frozen=True, kw_only=True)
class Unplaceable:
    """A trial that fits nowhere on a cluster."""

    trial: Trial
    shortfall: str
    """What it needs and what there is."""

    def __str__(self) -> str:
        trial = self.trial
        return (
            f"trial {trial.key} (width {trial.shape.width}, {trial_flops(trial):.3g} FLOPs) "
            f"{self.shortfall}"
        )


def place(
    trial: Trial, cluster: Cluster, pace: Pace | None = None, *, shares: bool = True
) -> Placement | Unplaceable:
    """Return the class in which `trial` fits with `HEADROOM` and takes least, or why there is none.

    Where it fits nowhere in full passes, the smallest in which smaller ones do, as the trainer
    finds by itself (`trainers.memory.fitting_passes`).
    Of several types of GPU any will do, unless one with more memory saves GPUs. It has a share of a
    GPU only if `shares` allows that and it takes fewer GPU-seconds there by `SHARE_GAIN`; and a
    core if it is trained in fp32 and ends no later there. What it takes is by `pace`, else by
    expectation.
    """
    if trial.trainer == "simulated":
        return _as_asked(trial, SimulatedSettings.of(trial).gpus, cluster)
    if trial.command is not None:
        return _as_asked(trial, trial.command.gpus, cluster)
    peak = PROCESS_BYTES + training_memory(trial.shape, trial.hyperparameters).peak
    if not cluster.gpus:
        return _one_core(trial, peak, cluster)
    types = _least_of_each_type(cluster)
    weakest = min(types.values(), key=lambda gpu: (gpu.memory_bytes, gpu.peak_flops))
    ways: list[tuple[GpuType, str | None]] = [(weakest, None)]
    ways += [(gpu, n) for n, gpu in types.items() if n and gpu.memory_bytes > weakest.memory_bytes]
    full = _on_any(trial, ways, cluster)
    fitting = full or _on_any(trial, ways, cluster, LEAST)
    if not fitting:
        return _too_large(trial, cluster)
    placement = min(fitting, key=lambda p: p.gpus)
    if placement.gpus > 1:
        return placement
    gpu = next(gpu for gpu, name in ways if name == placement.gpu_type)
    mps = cluster.shares_by_mps(placement.gpu_type)
    times = _OneGpu(Effort.of(trial), gpu, mps, pace or Pace())
    if shares and full and not cluster.is_exclusive(placement.gpu_type):
        placement = _on_a_share(placement, times)
    core = _one_core(trial, peak, cluster)
    on_gpu = CUDA_SECONDS + times.on_a_gpu(placement.gpus)
    if isinstance(core, Placement) and times.on_a_core() <= on_gpu:
        return core
    return placement


@dataclass(frozen=True)
class _OneGpu:
    """Expected seconds of one trial on one GPU, on shares of it, and on a core."""

    effort: Effort
    gpu: GpuType
    mps: bool
    pace: Pace

    def on_a_gpu(self, share: float = 1.0) -> float:
        """Seconds with compilation, if the other shares of the GPU are used as well."""
        return self.pace.on_gpus(self.effort, self.gpu, share, mps=self.mps).whole

    def on_a_core(self) -> float:
        """Seconds on a core; infinite in bf16, of which these are not known."""
        return self.pace.on_a_core(self.effort) if self.effort.precision == "fp32" else math.inf


def _on_a_share(whole: Placement, times: _OneGpu) -> Placement:
    """The share that takes fewest GPU-seconds, each by `SHARE_GAIN` fewer than the larger ones.

    While one trial compiles or launches kernels, others use the GPU.
    """
    placement, least = whole, times.on_a_gpu()
    for share in reversed(SHARES):
        takes = share * times.on_a_gpu(share)
        if whole.bytes <= share * _usable(times.gpu) and takes * SHARE_GAIN <= least:
            placement, least = replace(whole, gpus=share), takes
    return placement


def _least_of_each_type(cluster: Cluster) -> dict[str | None, GpuType]:
    """The GPU of least memory by Ray's name, since a trial may be sent to any node of that name."""
    types: dict[str | None, GpuType] = {}
    for node in cluster.of_type(None):
        least = types.setdefault(node.gpu_type, node.gpu)
        if (node.gpu.memory_bytes, node.gpu.peak_flops) < (least.memory_bytes, least.peak_flops):
            types[node.gpu_type] = node.gpu
    return types


def _on_any(
    trial: Trial,
    ways: list[tuple[GpuType, str | None]],
    cluster: Cluster,
    passes: Passes | None = None,
) -> list[Placement]:
    found = (_on_gpus(trial, gpu, name, cluster, passes) for gpu, name in ways)
    return [placement for placement in found if placement is not None]


def _on_gpus(
    trial: Trial, gpu: GpuType, name: str | None, cluster: Cluster, passes: Passes | None
) -> Placement | None:
    """The smallest class of whole GPUs that fits."""
    for gpus, nodes in _classes(cluster, name):
        if gpus < 1:
            continue
        if gpus * trial.shape.context > trial.hyperparameters.batch_tokens:
            break  # a sequence is not split
        taken = _bytes(trial, gpus, passes)
        if taken <= _usable(gpu) * min(1.0, gpus):
            memory = nodes * _main_memory(trial, gpus / nodes, cluster, name)
            return Placement(
                gpus=gpus, nodes=nodes, gpu_type=name, memory_bytes=memory, bytes=taken
            )
    return None


def _bytes(trial: Trial, gpus: float, passes: Passes | None) -> float:
    shape, h, gpus = trial.shape, trial.hyperparameters, max(1, int(gpus))
    own = CONTEXT_BYTES + (NCCL_BYTES if gpus > 1 else 0.0)
    return own + training_memory(shape, h, gpus=gpus, passes=passes).peak


def _main_memory(trial: Trial, gpus: float, cluster: Cluster, gpu_type: str | None) -> int:
    """Return the main memory to ask for on each node, in bytes.

    The first rank gathers the whole state for a checkpoint, that of a trunk beside its branch's.
    """
    places = 2 if trial.hyperparameters.schedule == "wsd" else 1
    each = (places * STATE_BYTES + WEIGHT_BYTES) * params(trial.shape).total
    most = max(node.memory_bytes for node in cluster.of_type(gpu_type))
    return int(min(_power_of_two(max(1, int(gpus)) * GPU_PROCESS_BYTES + each), most))


def _power_of_two(size: float) -> float:
    """Return the next power of two of GB, in bytes, so that there are few classes."""
    return 1e9 * 2.0 ** max(0, math.ceil(math.log2(size / 1e9)))


def _usable(gpu: GpuType) -> float:
    """Bytes of a GPU that training may take."""
    return (1 - HEADROOM) * gpu.memory_bytes


def _classes(cluster: Cluster, gpu_type: str | None = None) -> Iterator[tuple[float, int]]:
    """(GPUs, nodes) of every class that the cluster has room for, smallest first."""
    counts = sorted(n.gpus for n in cluster.of_type(gpu_type) if n.cpus >= max(1, n.gpus))
    if not counts:
        return
    if not cluster.is_exclusive(gpu_type):
        yield from ((share, 1) for share in SHARES)
    most = counts[-1]
    whole = {1 << i for i in range(most.bit_length())} | {most}
    yield from ((float(n), 1) for n in sorted(whole))
    nodes = 2
    while nodes <= counts.count(most):
        yield float(nodes * most), nodes
        nodes *= 2


def _one_core(trial: Trial, taken: float, cluster: Cluster) -> Placement | Unplaceable:
    nodes = [node for node in cluster.nodes if node.cpus >= 1]
    if not nodes:
        return Unplaceable(trial=trial, shortfall="needs 1 CPU, and no node has one")
    most = max(node.memory_bytes for node in nodes)
    if taken > most:
        needed, there = _apart(taken, most)
        shortfall = f"needs {needed} of memory; the largest node has {there}"
        return Unplaceable(trial=trial, shortfall=shortfall)
    asked = _power_of_two(taken) if taken else 0.0  # or all that a node has
    return Placement(memory_bytes=int(min(asked, most)), bytes=taken)


def _as_asked(trial: Trial, gpus: float, cluster: Cluster) -> Placement | Unplaceable:
    """The GPUs that a trial asks for by itself: so many, or the next share of one.

    A program that is started once a GPU may give another result on another number of them.
    """
    if not gpus:
        return _one_core(trial, 0.0, cluster)
    classes = list(_classes(cluster))
    counts = [count for count, _ in classes]
    if not counts or gpus > counts[-1]:
        return Unplaceable(trial=trial, shortfall=_too_few(gpus, cluster))
    if gpus == int(gpus) and gpus <= max(count for count, nodes in classes if nodes == 1):
        return Placement(gpus=gpus)
    count, nodes = classes[bisect.bisect_left(counts, gpus)]
    if gpus < 1 or count == gpus:
        return Placement(gpus=count, nodes=nodes)
    fewer = counts[bisect.bisect_left(counts, gpus) - 1]
    shortfall = f"asks for {gpus:g} GPUs, which is neither a part of one node nor all of equal ones"
    return Unplaceable(trial=trial, shortfall=f"{shortfall}: ask for {fewer:g} or {count:g}")


def _too_large(trial: Trial, cluster: Cluster) -> Unplaceable:
    """Why a trial does not fit, in the terms of the largest class that could take it."""
    sequences = trial.hyperparameters.batch_tokens // trial.shape.context
    classes = [gpus for gpus, _ in _classes(cluster) if gpus <= sequences]
    if not classes:
        return Unplaceable(trial=trial, shortfall=_too_few(1, cluster))
    most = classes[-1]
    largest = max((node.gpu for node in cluster.of_type(None)), key=_usable)
    taken, usable = _apart(_bytes(trial, most, LEAST), _usable(largest))
    each = f"each of {most:g} GPUs" if most > 1 else "1 GPU"
    bound = f", and its batch of {sequences} splits no further" if most == sequences else ""
    shortfall = (
        f"needs {taken} on {each}{bound}; of the {_gb(largest.memory_bytes)} of the cluster's, "
        f"{usable} may be used ({HEADROOM:.0%} is kept free){_larger(largest)}"
    )
    return Unplaceable(trial=trial, shortfall=shortfall)


def _larger(gpu: GpuType) -> str:
    """What to do where Ray's name of a type leaves open whether it has more memory."""
    found = max(variants(gpu), key=_usable)
    if found.memory_bytes <= gpu.memory_bytes:
        return ""
    return f'; if they are {found.name}, say so in the sweep: [cluster] gpu = "{found.name}"'


def _too_few(gpus: float, cluster: Cluster) -> str:
    """Why no class has so many GPUs."""
    cores = [node.cpus for node in cluster.nodes if node.gpus]
    if cluster.gpus < gpus or not cores:
        return f"needs {gpus:g} GPU{'s' * (gpus > 1)}, and there are {cluster.gpus}"
    return (
        f"needs {gpus:g} GPU{'s' * (gpus > 1)} and a core for each, and the cluster, of {cluster}, "
        "has no equal nodes for them"
    )


def _gb(size: float, digits: int = 3) -> str:
    return f"{float(f'{size / 1e9:.{digits}g}'):.15g} GB"  # 1310, not 1.31e+03


def _apart(size: float, other: float) -> tuple[str, str]:
    """Two sizes that differ, with the digits that it takes to tell them apart."""
    shown = ((_gb(size, digits), _gb(other, digits)) for digits in range(3, 13))
    return next(((a, b) for a, b in shown if a != b), (_gb(size), _gb(other)))
