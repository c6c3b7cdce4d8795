"""What compiling a training for a GPU costs and saves, and whether it pays.

Own allowances, none measured on a GPU yet. Whether a training is compiled goes by them alone, so
that trainer and forecasts, all attempts and all ranks decide alike. What it then takes is by a
ledger's rows, in forecasts.
"""

from __future__ import annotations

import math

from trainers.expected_mfu import expected_mfu
from trainers.flops import pass_sequences
from trainers.gpus import UNKNOWN_TYPE, GpuType, gpu_type
from trainers.trial import Precision

COMPILE_SECONDS = 15.0
"""Seconds to compile one block and one chunk of the loss, forward and backward, in one process."""
EAGER_FACTOR = 1.5
"""Time of training that is not compiled, over that of training that is: compiling is taken to save
a third. A training that would take longer to compile than that saves is not compiled."""
LAUNCH_SECONDS_PER_BLOCK = 0.4e-3
"""Least seconds of a pass through a block: a step of the model and its optimiser launches 37 to 41
kernels a block (counted by a TorchDispatchMode, eagerly), at about 10 microseconds each."""


def compiling_pays(
    gpu: GpuType | None,
    gpus: float,
    *,
    params_total: float,
    flops: float,
    steps: float,
    batch_tokens: float,
    context: int,
    depth: int,
    precision: Precision,
) -> bool:
    """Return whether compiling a training is expected to save more time than it takes.

    Parameters
    ----------
    gpu
        Its type by its datasheet; None where there is none.
    gpus
        Number of them, at least 1.
    params_total
        Number of the model's parameters.
    flops, steps
        Training FLOPs and optimiser steps of the whole training, so that all of its attempts
        compute alike.
    batch_tokens, context, depth, precision
        Those of the training.
    """
    passes = math.ceil(math.ceil(batch_tokens / context / gpus) / pass_sequences(context))
    launching = steps * passes * depth * LAUNCH_SECONDS_PER_BLOCK
    peak = (gpu or gpu_type(UNKNOWN_TYPE)).training_flops(precision)
    compiled = max(launching, flops / gpus / (expected_mfu(params_total, peak) * peak))
    return (EAGER_FACTOR - 1) * compiled > COMPILE_SECONDS
