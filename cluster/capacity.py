"""How long a trial takes, expected or as measured, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from cluster.gpus import variants
from cluster.machines import UNKNOWN_GPU, Cluster
from cluster.placement import LAUNCH_SECONDS_PER_BLOCK, Placement
from trainers.corpus import HELDOUT_WINDOWS
from trainers.flops import params, pass_sequences, trial_flops
from trainers.gpus import GpuType, known_type
from trainers.simulated import SimulatedSettings
from trainers.trial import Precision, Trial

ACTOR_SECONDS = 2.5
"""From asking Ray for an actor of a new class to its first step: its placement group, and a new
process, whose imports take most of it."""
RANKS_SECONDS = 1.6
"""From there to the first step of a gang, whose ranks are new processes each time."""
LEAVE_SECONDS = 0.1
"""From the end of a trial to Ray's having the room of its actor again."""
GAP_SECONDS = 0.1
"""Between two trials of one class that follow each other in one actor."""

CPU_SECONDS_PER_BLOCK_STEP = 0.94e-3
CPU_SECONDS_PER_BLOCK_STEP_CUBIC = 2.25e-9
CPU_SECONDS_PER_TOKEN = 2.74e-6
CPU_FLOPS_PER_SECOND = 68e9
"""Fitted to 28 trials of widths 12 to 128 on one core: within 10% rms. Overhead of a step, its
Newton-Schulz (x width^3), work of a token that no matmul does, and the matmuls."""

MFU_TOP = 0.66
MFU_SLOPE = 0.65
MFU_HALF_PARAMS = 40e6
MFU_REFERENCE_FLOPS = 312e12
MFU_TOP_EXPONENT = 0.28
MFU_HALF_EXPONENT = 0.6
"""See `expected_mfu`."""

CPU = "CPU"
"""What paces call any device that is no GPU: one core."""


def expected_mfu(total_params: float, peak_flops: float) -> float:
    """Share of a GPU's peak FLOP/s that training reaches, before anything was measured.

    MFU = top / (1 + (half / N)^0.65), N total parameters. On an A100 in bf16 top is 0.66 and half
    40e6; at r times its 312e12 FLOP/s half is times r^0.6, and top, for r > 1, over r^0.28, as
    memory does not keep up. Fitted by hand to the benchmark tables of MosaicML's llm-foundry (bf16,
    2048 tokens of context, 125M to 7B parameters on A100 80GB and H100): within 5% of them. Other
    types, models below 1e8 and fp32, whose peak is 2 to 30 times lower, are extrapolated; the one
    published time in fp32 that is known is 13% shorter (`tests/cluster/test_capacity.py`). The
    ledger's own measurements take its place.

    Examples
    --------
    >>> [round(expected_mfu(n, 989e12), 3) for n in (1e7, 1e8, 1.3e9)]  # H100, bf16
    [0.098, 0.256, 0.411]
    >>> [round(expected_mfu(n, 67e12), 3) for n in (1e7, 1e8, 1.3e9)]  # H100, fp32
    [0.281, 0.507, 0.624]
    """
    stronger = peak_flops / MFU_REFERENCE_FLOPS
    half = MFU_HALF_PARAMS * stronger**MFU_HALF_EXPONENT
    top = MFU_TOP / max(1.0, stronger) ** MFU_TOP_EXPONENT
    return float(top / (1 + (half / total_params) ** MFU_SLOPE))


@dataclass(frozen=True, kw_only=True)
class Effort:
    """What of a training decides how long it takes."""

    params_total: float
    flops: float
    """Exact."""
    tokens: float
    """Trained on, by the branches of a trunk too."""
    batch_tokens: float
    width: int
    depth: int
    context: int
    precision: Precision

    @staticmethod
    def of(trial: Trial) -> Effort:
        """That of a trial."""
        return Effort(
            params_total=params(trial.shape).total,
            flops=trial_flops(trial),
            tokens=trial.total_steps * trial.hyperparameters.batch_tokens,
            batch_tokens=trial.hyperparameters.batch_tokens,
            width=trial.shape.width,
            depth=trial.shape.depth,
            context=trial.shape.context,
            precision=trial.hyperparameters.precision,
        )

    def on_gpus(self, gpu: GpuType, gpus: float = 1.0) -> float:
        """Expected seconds on so many GPUs; a share is as fast as its GPU, which it cannot fill.

        Training takes what its FLOPs take at the expected MFU, or what its launches take; the
        held-out windows are evaluated once, forward only.
        """
        whole = max(1.0, gpus)
        peak = gpu.training_flops(self.precision)
        speed = peak * expected_mfu(self.params_total, peak) * whole
        sequences = self.batch_tokens / self.context / whole
        passes = math.ceil(sequences / pass_sequences(self.context))
        steps = self.tokens / self.batch_tokens
        launching = steps * passes * self.depth * LAUNCH_SECONDS_PER_BLOCK
        evaluated = HELDOUT_WINDOWS * self.context / 3
        return max(self.flops / speed, launching) + self.flops / self.tokens * evaluated / speed

    def on_a_core(self) -> float:
        """Expected seconds on one core of the machine of the fit."""
        block_steps = self.tokens / self.batch_tokens * self.depth
        return (
            CPU_SECONDS_PER_BLOCK_STEP * block_steps
            + CPU_SECONDS_PER_BLOCK_STEP_CUBIC * self.width**3 * block_steps
            + CPU_SECONDS_PER_TOKEN * self.tokens
            + self.flops / CPU_FLOPS_PER_SECOND
        )


PACE_COLUMNS = (
    "device", "seconds", "flops_exact", "flops_spent", "tokens", "batch_tokens", "params_total",
    "width", "depth", "context", "precision",
)  # fmt: skip
"""What `Pace.from_rows` reads of a ledger; curves are most of it, and say nothing of time."""


@dataclass(frozen=True)
class Pace:
    """How much longer trials took than expected, by device and size; nothing known by default."""

    measured: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    """By device, (ln N, seconds over those expected), ascending."""

    @staticmethod
    def from_rows(rows: Iterable[Mapping[str, Any]]) -> Pace:
        """Measure it by a ledger's rows, as `Observations` has them; simulated ones say nothing."""
        found: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            device, seconds = row.get("device"), row.get("seconds")
            if not device or device == "simulated" or not seconds or not row.get("batch_tokens"):
                continue
            effort = _effort_of_row(row)
            gpu = known_type(device)
            if gpu is None and CPU not in device:
                continue
            expected = effort.on_gpus(gpu, _count(device)) if gpu else effort.on_a_core()
            ratio = (math.log(effort.params_total), seconds / expected)
            found.setdefault(gpu.name if gpu else CPU, []).append(ratio)
        return Pace({device: tuple(sorted(ratios)) for device, ratios in found.items()})

    def factor(self, gpu: GpuType | None, total_params: float) -> float:
        """Seconds over those expected at the nearest size in ln N; the median of equally near ones.

        Of a core where `gpu` is None. On a type that was not measured, as on those that Ray cannot
        tell from it; 1 where there are none.
        """
        ratios = self.measured.get(gpu.name if gpu else CPU, ())
        if gpu and not ratios:
            ratios = tuple(r for v in variants(gpu) for r in self.measured.get(v.name, ()))
        if not ratios:
            return 1.0
        n = math.log(total_params)
        nearest = min(abs(size - n) for size, _ in ratios)
        near = [ratio for size, ratio in ratios if abs(size - n) <= nearest + 1e-9]
        return median(near)


def _count(device: str) -> float:
    """GPUs of a row, as in "8 x NVIDIA H100 80GB HBM3"."""
    number = device.partition(" x ")[0]
    return float(number) if number.isdecimal() else 1.0


def _effort_of_row(row: Mapping[str, Any]) -> Effort:
    """Of what its seconds were for: of a trunk, what a horizon takes beyond those before it."""
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


def seconds(
    trial: Trial, placement: Placement, cluster: Cluster, pace: Pace | None = None
) -> float:
    """Wall seconds that `trial` is expected to take where it is placed, its actor being there."""
    if trial.trainer == "simulated":
        return SimulatedSettings.of(trial).seconds
    effort, pace = Effort.of(trial), pace or Pace()
    if not placement.gpus:
        return effort.on_a_core() * pace.factor(None, effort.params_total)
    gpu = slowest(placement, cluster)
    return effort.on_gpus(gpu, placement.gpus) * pace.factor(gpu, effort.params_total)


def mfu(trial: Trial, placement: Placement, cluster: Cluster, pace: Pace | None = None) -> float:
    """Share of the peak, in its precision, of the GPUs it holds that `trial` is expected to reach.

    Of the whole GPU where it has a share of one. 0 where it has no GPU or does not compute.
    """
    if not placement.gpus or trial.trainer == "simulated":
        return 0.0
    gpu = slowest(placement, cluster)
    peak = gpu.training_flops(trial.hyperparameters.precision) * max(1.0, placement.gpus)
    return trial_flops(trial) / seconds(trial, placement, cluster, pace) / peak


def slowest(placement: Placement, cluster: Cluster) -> GpuType:
    """The slowest type that `placement` may be given."""
    types = [node.gpu for node in cluster.of_type(placement.gpu_type)]
    return min(types, key=lambda gpu: (gpu.peak_flops, gpu.fp32_flops), default=UNKNOWN_GPU)


def estimated_seconds(trial: Trial) -> float:
    """Wall seconds of `trial` on one CPU core. Elsewhere right only in proportion."""
    if trial.trainer == "simulated":
        return SimulatedSettings.of(trial).seconds
    return Effort.of(trial).on_a_core()
