"""GPUs that end trials which others would not: how a worker knows one, and how long it is held.

On one node there is no other to turn to, and Ray gives the GPU that is free first to the next
trial: a bad one, which ends trials in seconds, would be given nearly all of them. So the worker
that met it keeps it for a while, doing nothing, and its trial starts again on another GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from analysis.errors import first_line
from cluster.gang import GangError

HOLD_SECONDS = 600.0
"""How long a GPU that failed is kept from other trials, before it is tried again."""
MOST_HELD = 0.5
"""Largest part of a cluster's GPUs that is held at once: where more fail, it is not the GPUs."""
_FAULT = re.compile(
    r"""
      uncorrectable\ ECC | \bECC\ error | fallen\ off\ the\ bus | \bGPU\ is\ lost | NVRM:\ Xid
    | (?: CUDA | HIP | CUDA\ driver ) \ error: \ (?!
          out\ of\ memory | device-side\ assert | no\ kernel\ image | invalid\ \w+ )
    | unhandled\ (?:cuda|hip)\ error | ncclUnhandledCudaError  # of NCCL's, others are the network's
    | CUBLAS_STATUS_(?:EXECUTION_FAILED|INTERNAL_ERROR|NOT_INITIALIZED)
    | CUDNN_STATUS_(?:EXECUTION_FAILED|INTERNAL_ERROR|NOT_INITIALIZED)
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""How CUDA, its libraries and AMD's say that a GPU failed. What a program does wrong on any GPU
(too much memory, an index out of range, a build for another architecture) is not among it."""


@dataclass(frozen=True, kw_only=True)
class GpuFault:
    """A GPU that ended a trial."""

    gpu: str
    """Its number on its node, as Ray and nvidia-smi count; several of them with commas between."""
    node: str
    """The node's name or address."""
    error: str
    """The line that says so."""

    def __str__(self) -> str:
        return f"GPU {self.gpu} of {self.node}"


def fault_line(text: str) -> str | None:
    """Return the first line of an error or a log that blames the GPU; None where none does.

    Examples
    --------
    >>> fault_line("RuntimeError: CUDA error: uncorrectable ECC error encountered")
    'RuntimeError: CUDA error: uncorrectable ECC error encountered'
    >>> fault_line("torch.AcceleratorError: CUDA error: out of memory")
    >>> fault_line("CUDA error: device-side assert triggered")
    >>> fault_line("NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus.") is None
    False
    >>> fault_line("KeyError: no row with xid=42")
    """
    return next((line.strip() for line in text.splitlines() if _FAULT.search(line)), None)


def fault_of(
    error: Exception, log: str | None, *, gpus: Callable[[], str], node: str
) -> GpuFault | None:
    """Return which GPU ended a trial, if one did.

    Parameters
    ----------
    error, log
        What the trial raised, and the end of what it printed, where a program says why it exits.
    gpus, node
        What gives those of this process; of a gang, those of the rank that failed are taken.
    """
    line = fault_line(first_line(error, named=True)) or fault_line(f"{error}\n{log or ''}")
    if line is None:
        return None
    if isinstance(error, GangError) and error.home is not None:
        gpu, node = error.home.gpu, error.home.address
    else:
        gpu = gpus()
    return GpuFault(gpu=gpu, node=node, error=line) if gpu else None


def own_gpus() -> str:
    """Return the numbers of the GPUs that Ray gave this process, with commas between."""
    import ray

    return ",".join(map(str, ray.get_runtime_context().get_accelerator_ids().get("GPU", [])))


@dataclass(frozen=True, kw_only=True)
class HeldGpu:
    """A GPU that a worker keeps from others."""

    fault: GpuFault
    until: str
    """UTC, ISO format."""

    def __str__(self) -> str:
        return (
            f"{self.fault} is not used until {self.until[11:16]} UTC, since a trial failed on it "
            f"({self.fault.error})"
        )


class GpuRecord:
    """What a driver knows of the GPUs that failed in its run."""

    def __init__(self) -> None:
        self._held: dict[str, HeldGpu] = {}  # by Tune's name of the trial whose worker has it
        self._failures: dict[tuple[str, str], list[str]] = {}

    def failed(self, fault: GpuFault) -> None:
        """Count a trial that a GPU ended."""
        self._failures.setdefault((fault.node, fault.gpu), []).append(fault.error)

    def hold(self, name: str, fault: GpuFault) -> HeldGpu:
        """Note that the worker of Tune's trial `name` keeps a GPU from now on."""
        until = datetime.fromtimestamp(datetime.now(UTC).timestamp() + HOLD_SECONDS, UTC)
        self._held[name] = HeldGpu(fault=fault, until=until.isoformat(timespec="seconds"))
        return self._held[name]

    def holds(self, name: str) -> bool:
        """Return whether Tune's trial `name` only keeps a GPU."""
        return name in self._held

    def let_go(self, name: str) -> None:
        """Note that a worker has gone, and its GPU is free."""
        self._held.pop(name, None)

    def note(self) -> list[dict[str, str]]:
        """Return the GPUs that are held, as a driver's lease tells others of them."""
        return [{"until": held.until, **vars(held.fault)} for held in self._held.values()]

    def summary(self) -> list[str]:
        """Return a line for a person on each GPU that ended trials in this run."""
        return [
            f"GPU {gpu} of {node} ended {len(errors)} trial{'s' * (len(errors) > 1)}: have it "
            f"checked ({errors[-1]})"
            for (node, gpu), errors in sorted(self._failures.items())
        ]


def held_gpus(note: dict[str, object]) -> list[HeldGpu]:
    """Return the GPUs that a driver holds, by the note of its lease."""
    records = note.get("held_gpus")
    names = ("gpu", "node", "error")
    return [
        HeldGpu(fault=GpuFault(**{n: str(r.get(n)) for n in names}), until=str(r.get("until")))
        for r in (records if isinstance(records, list) else [])
        if isinstance(r, dict)
    ]
