"""What `torch.compile` makes of a model for a trial: one block, and a chunk of the loss.

A graph of the whole model has all its blocks one after another, and takes as long to compile as
there are blocks. All blocks of a model are one function of their weights, so that one is compiled
and serves all. What is between them is a few kernels.
"""

from __future__ import annotations

import os
import socket
from functools import partial

import torch

from trainers.compile_costs import compiling_pays
from trainers.flops import params, trial_flops
from trainers.gpus import known_type
from trainers.head_loss import ChunkLoss, chunk_loss
from trainers.passes import ComputeBlock, Prepared
from trainers.transformer import Block, Transformer
from trainers.trial import Trial

BACKEND = "inductor"
NO_COMPILATION = "TORCHDYNAMO_DISABLE"
"""Environment variable at which torch.compile leaves functions as they are (torch/_dynamo/
eval_frame.py)."""


def pays(trial: Trial, device: torch.device, gpus: int = 1) -> bool:
    """Return whether a trial is compiled: on a GPU, where that is expected to pay."""
    if device.type != "cuda" or os.environ.get(NO_COMPILATION) == "1":
        return False
    h, shape = trial.hyperparameters, trial.shape
    return compiling_pays(
        known_type(torch.cuda.get_device_name(device)),
        gpus,
        params_total=params(shape).total,
        flops=trial_flops(trial),
        steps=trial.total_steps,
        batch_tokens=h.batch_tokens,
        context=shape.context,
        depth=shape.depth,
        precision=h.precision,
    )


def compiled() -> tuple[ComputeBlock, ChunkLoss]:
    """Return a block's and a chunk's functions; torch compiles each where it is first called.

    What was compiled for earlier trials of this process is forgotten: torch compiles a function for
    eight shapes at most, and from then on runs it eagerly.
    """
    torch.compiler.reset()
    make = partial(torch.compile, dynamic=False, backend=BACKEND)
    return make(Block.forward), make(chunk_loss)


def make_eager(model: Transformer, error: Exception) -> str:
    """Go on without compiling, since it failed, and return a sentence on that for a person."""
    cause = getattr(error, "inner_exception", error)  # of torch's own, the compiler's
    reason = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
    for block in model.blocks:
        if isinstance(block, Prepared):
            block.compute = Block.forward
    model.chunk = chunk_loss
    return (
        f"torch.compile failed on {socket.gethostname()} ({reason}): its trials train without it, "
        "up to twice as long. It needs a C compiler and Python's headers on each machine that "
        "trains"
    )
