"""Predicts the time of a training from its numbers: FLOPs, launches, compiling, shares of a GPU.

Pure arithmetic on one training and one type of device. Where a trial is placed, and what a ledger
has measured instead, are the business of other modules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainers.compile_costs import COMPILE_SECONDS, LAUNCH_SECONDS_PER_BLOCK, compiling_pays
from trainers.corpus import HELDOUT_WINDOWS
from trainers.expected_mfu import expected_mfu, filled
from trainers.flops import params, pass_sequences, trial_flops
from trainers.gpus import GpuType
from trainers.trial import Precision, Trial

COMPILE_SECONDS_PER_BLOCK = 0.3
"""Seconds that each block adds to `COMPILE_SECONDS`, though one function serves all blocks: own
allowance, between the 0 of that and 25 s for 14 more blocks, measured on a busy core."""

MPS_OVERLAP = 0.25
"""Share, in logarithms, of the gap between a model's MFU and that of the largest models that the
kernels of other processes can fill under MPS. 0 is no overlap, as without MPS; 1 is a perfect one.
Own assumption: gaps of memory bandwidth stay, those of idle multiprocessors are filled."""

CPU_SECONDS_PER_BLOCK_STEP = 0.94e-3
CPU_SECONDS_PER_BLOCK_STEP_CUBIC = 2.25e-9
CPU_SECONDS_PER_TOKEN = 2.74e-6
CPU_FLOPS_PER_SECOND = 68e9
"""Fitted to 28 trials of widths 12 to 128 on one core: within 10% rms. Overhead of a step, its
Newton-Schulz (x width^3), work of a token that no matmul does, and the matmuls."""


def expected_compile_seconds(depth: int) -> float:
    """Expected seconds to compile a training of so many blocks on a GPU, before any was measured.

    Examples
    --------
    >>> [expected_compile_seconds(depth) for depth in (4, 12)]
    [16.2, 18.6]
    """
    return COMPILE_SECONDS + COMPILE_SECONDS_PER_BLOCK * depth


def share_speed(share: float, busy: float) -> float:
    """Speed on a share of a GPU over that of the whole GPU, if the other shares are used as well.

    A trial that keeps the GPU busy for less than its share of the time gets all that it asks for.

    Examples
    --------
    >>> [share_speed(1 / 4, busy) for busy in (1 / 8, 1 / 4, 1 / 2, 1)]
    [1.0, 1.0, 0.5, 0.25]
    """
    return min(1.0, share / busy)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """The properties of a training that decide how long it takes."""

    params_total: float
    flops: float
    """Exact training FLOPs."""
    tokens: float
    """Tokens trained on, by the branches of a trunk too."""
    batch_tokens: float
    width: int
    depth: int
    context: int
    precision: Precision

    @staticmethod
    def of(trial: Trial) -> Effort:
        """Return the effort of a trial."""
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

    def on_gpus(self, gpu: GpuType, gpus: float = 1.0, *, mps: bool = False) -> float:
        """Expected seconds on so many GPUs, or on a share of one, without compilation.

        Training takes what its FLOPs take at the expected MFU, or what its launches take; the
        held-out windows are evaluated once, forward only. `mps` says whether the GPU's processes
        share it by MPS, which matters to shares alone.
        """
        whole = max(1.0, gpus)
        training = max(self._computing(gpu, whole), self._launching(whole))
        evaluated = HELDOUT_WINDOWS * self.context / 3
        alone = training + evaluated / self.tokens * self._computing(gpu, whole)
        return alone if gpus >= 1 else alone / share_speed(gpus, self.busy(gpu, mps=mps))

    def busy(self, gpu: GpuType, *, mps: bool = False) -> float:
        """Share of one GPU's time that training keeps others from, above 0 and at most 1.

        The kernels of a small model end before the next is launched: the GPU waits for the process.
        Without MPS kernels of two processes never run at once, so that wait is all that others can
        use. With MPS they also use the multiprocessors that a small kernel leaves idle
        (`MPS_OVERLAP`).
        """
        computing = self._computing(gpu, 1.0)
        share = computing / max(computing, self._launching(1.0))
        if not mps:
            return share
        part = filled(self.params_total, gpu.training_flops(self.precision))
        return float(share * part**MPS_OVERLAP)

    def is_compiled(self, gpu: GpuType, gpus: float = 1.0) -> bool:
        """Whether the trainer compiles this training, by the rule that it follows itself."""
        return compiling_pays(
            gpu,
            max(1.0, gpus),
            params_total=self.params_total,
            flops=self.flops,
            steps=self.tokens / self.batch_tokens,
            batch_tokens=self.batch_tokens,
            context=self.context,
            depth=self.depth,
            precision=self.precision,
        )

    def on_a_core(self) -> float:
        """Expected seconds on one core of the machine of the fit."""
        block_steps = self.tokens / self.batch_tokens * self.depth
        return (
            CPU_SECONDS_PER_BLOCK_STEP * block_steps
            + CPU_SECONDS_PER_BLOCK_STEP_CUBIC * self.width**3 * block_steps
            + CPU_SECONDS_PER_TOKEN * self.tokens
            + self.flops / CPU_FLOPS_PER_SECOND
        )

    def _computing(self, gpu: GpuType, gpus: float) -> float:
        """Seconds of computing on so many whole GPUs, at the expected MFU."""
        peak = gpu.training_flops(self.precision)
        return self.flops / (peak * expected_mfu(self.params_total, peak) * gpus)

    def _launching(self, gpus: float) -> float:
        """Seconds that a process takes to launch all kernels, on so many whole GPUs."""
        passes = math.ceil(self.batch_tokens / self.context / gpus / pass_sequences(self.context))
        steps = self.tokens / self.batch_tokens
        return steps * passes * self.depth * LAUNCH_SECONDS_PER_BLOCK
