"""What a ledger has measured of how long trials take, in place of what is expected of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from statistics import median
from typing import Any

from analysis.observations import SCHEMA
from cluster.effort import Effort, expected_compile_seconds
from cluster.gpus import variants
from cluster.machines import unknown_gpu
from trainers.compile_costs import EAGER_FACTOR
from trainers.gpus import GpuType, known_type

CPU = "CPU"
"""Name of any device that is no GPU: one core."""
PACE_COLUMNS = tuple(
    name
    for name in (
        *("device", "seconds", "compile_seconds", "flops_exact", "flops_spent", "tokens"),
        *("batch_tokens", "params_total", "width", "depth", "context", "precision"),
    )
    if name in SCHEMA.names
)
"""Columns of a ledger that `Pace.from_rows` reads; curves are most of it, and irrelevant here."""

_BY_MPS = " by MPS"

Class = tuple[str, float]
"""Type of the device, and the share of it that a trial has; 1 for whole ones."""


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds that a training takes."""

    compiling: float
    """Seconds before its first step; 0 where compiling would take longer than it saves."""
    training: float

    @property
    def whole(self) -> float:
        """Both together."""
        return self.compiling + self.training


@dataclass(frozen=True)
class Pace:
    """How much longer trials took than expected, by class and size; nothing known by default."""

    measured: Mapping[Class, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    """By class, (ln N, seconds over those expected), ascending. Without compilation."""
    compiled: tuple[tuple[int, float], ...] = ()
    """(depth, seconds of compilation) of rows of all GPUs, ascending: it is the host's work."""

    @staticmethod
    def from_rows(rows: Iterable[Mapping[str, Any]]) -> Pace:
        """Measure it by a ledger's rows, as `Observations` has them.

        Simulated rows say nothing. A row's `seconds` do not count its `compile_seconds`; where
        these are 0, training was not compiled. Where there are none, as in rows of other programs,
        nothing is known of it.
        """
        measured: dict[Class, list[tuple[float, float]]] = {}
        compiled: list[tuple[int, float]] = []
        for row in rows:
            device, seconds = row.get("device"), row.get("seconds")
            if not device or device == "simulated" or not seconds or not row.get("batch_tokens"):
                continue
            compiling = row.get("compile_seconds")
            effort = _effort_of_row(row)
            count, name, mps = split_device(device)
            if CPU in name:
                which, expected = (CPU, 1.0), effort.on_a_core()
            else:
                gpu = known_type(name) or unknown_gpu(name)
                which = (gpu.name, min(1.0, count))
                expected = effort.on_gpus(gpu, count, mps=mps)
                if compiling:
                    compiled.append((row["depth"], compiling))
                elif compiling == 0.0:
                    expected *= EAGER_FACTOR
            ratio = math.log(effort.params_total), seconds / expected
            measured.setdefault(which, []).append(ratio)
        return Pace({c: tuple(sorted(r)) for c, r in measured.items()}, tuple(sorted(compiled)))

    def factor(self, gpu: GpuType | None, total_params: float, share: float = 1.0) -> float:
        """Seconds over those expected at the nearest size in ln N; the median of equally near ones.

        Of a core where `gpu` is None. Rows of the same share count before those of other shares of
        the same type, and these before types that Ray cannot tell from it; 1 where there are none.
        """
        names = [CPU] if gpu is None else [gpu.name, *(item.name for item in variants(gpu))]
        ratios = self.measured.get((names[0], min(1.0, share)), ())
        for name in names:
            ratios = ratios or tuple(
                sorted(r for c, several in self.measured.items() if c[0] == name for r in several)
            )
        return _nearest(ratios, math.log(total_params), 1.0)

    def on_gpus(
        self, effort: Effort, gpu: GpuType, gpus: float = 1.0, *, mps: bool = False
    ) -> Times:
        """Times of a training on so many GPUs, or on a share of one, compiled where that pays."""
        training = self.other_on_gpus(effort, gpu, gpus, mps=mps)
        if not effort.is_compiled(gpu, gpus):
            return Times(compiling=0.0, training=EAGER_FACTOR * training)
        return Times(compiling=self.compile_seconds(effort.depth), training=training)

    def other_on_gpus(
        self, effort: Effort, gpu: GpuType, gpus: float = 1.0, *, mps: bool = False
    ) -> float:
        """Seconds of a training by another program than isoflop's, as if it was compiled."""
        expected = effort.on_gpus(gpu, gpus, mps=mps)
        return expected * self.factor(gpu, effort.params_total, gpus)

    def on_a_core(self, effort: Effort) -> float:
        """Seconds of a training on one core."""
        return effort.on_a_core() * self.factor(None, effort.params_total)

    def compile_seconds(self, depth: int) -> float:
        """Seconds of compilation on a GPU: as measured at the nearest depth, else as expected."""
        return _nearest(self.compiled, depth, expected_compile_seconds(depth))


def split_device(device: str) -> tuple[float, str, bool]:
    """How many GPUs, or which share of one, a row was measured on, their name, and whether by MPS.

    Examples
    --------
    >>> for device in ("8 x NVIDIA H100 80GB HBM3", "1/4 x NVIDIA L4 by MPS", "NVIDIA L4"):
    ...     split_device(device)
    (8.0, 'NVIDIA H100 80GB HBM3', False)
    (0.25, 'NVIDIA L4', True)
    (1.0, 'NVIDIA L4', False)
    """
    number, times, name = device.partition(" x ")
    if not times or not all(part.isdecimal() for part in number.split("/")):
        number, name = "1", device
    return float(Fraction(number)), name.removesuffix(_BY_MPS), name.endswith(_BY_MPS)


def shared_device(share: float, device: str, *, mps: bool) -> str:
    """The device of a row that was measured on a share of a GPU, as `split_device` reads it.

    Examples
    --------
    >>> shared_device(0.25, "NVIDIA L4", mps=True)
    '1/4 x NVIDIA L4 by MPS'
    """
    return f"{Fraction(share).limit_denominator(8)} x {device}{_BY_MPS if mps else ''}"


def _nearest(pairs: tuple[tuple[float, float], ...], at: float, default: float) -> float:
    """Median of the values whose place is nearest to `at`; the default where there are none."""
    if not pairs:
        return default
    nearest = min(abs(place - at) for place, _ in pairs)
    return median(value for place, value in pairs if abs(place - at) <= nearest + 1e-9)


def _effort_of_row(row: Mapping[str, Any]) -> Effort:
    """What a row's seconds were for: of a trunk, what a horizon takes beyond those before it."""
    flops = row["flops_exact"] if row.get("flops_spent") is None else row["flops_spent"]
    return Effort(
        params_total=row["params_total"],
        flops=flops,
        tokens=row["tokens"] * flops / row["flops_exact"],
        batch_tokens=row["batch_tokens"],
        width=row["width"],
        depth=row["depth"],
        context=row["context"],
        precision=row.get("precision") or "fp32",
    )
