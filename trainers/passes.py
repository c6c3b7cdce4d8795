"""A batch's gradient, in as many passes as memory allows.

Of several ranks all go through as many, since those that share out a model meet in each.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trainers.device import room
from trainers.memory import NCCL_BYTES, Passes, fitting_passes
from trainers.ranks import Ranks
from trainers.shape import Shape
from trainers.transformer import Block
from trainers.trial import Hyperparameters


def passes_on(
    device: torch.device,
    shape: Shape,
    hyperparameters: Hyperparameters,
    ranks: Ranks = Ranks(),  # noqa: B008 - a value
    *,
    sharded: bool = False,
) -> Passes:
    """The passes that fit on this device, and on that of each other rank."""
    there = room(device)
    buffers = NCCL_BYTES if ranks.count > 1 else 0.0  # not there before the first message
    least = None if there is None else ranks.least(there) - buffers
    return fitting_passes(shape, hyperparameters, least, gpus=ranks.count, sharded=sharded)


def prepared(block: Block, passes: Passes) -> Block:
    """A block as passes need it: it may keep its input alone, and compute the rest again.

    Changed from outside, as for parallelism: losses and gradients are the same to the bit.
    """
    if passes.recomputed:
        block.__class__ = _Recomputed
    return block


class _Recomputed(Block):
    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        # Nothing is drawn in a block, so there is no random state to keep.
        computed: Tensor = checkpoint(
            super().forward, x, rotation, use_reentrant=False, preserve_rng_state=False
        )
        return computed


def accumulate(
    loss: Callable[[Tensor], Tensor],
    windows: Tensor,
    passes: Passes,
    sequences: int | None = None,
    after_pass: Callable[[], None] = lambda: None,
    *,
    ranks: int = 1,
) -> Tensor:
    """Add the gradient of the mean loss on `windows`, in passes.

    A rank that has fewer sequences than the others makes up for it by a pass that counts nothing.

    Parameters
    ----------
    loss
        The mean loss of windows.
    windows
        Shape (sequences, context + 1).
    passes
        How large they may be.
    sequences
        Of the whole batch, of which this is a part; all by default.
    after_pass
        Called after every pass's gradient is there.
    ranks
        Over which the batch is shared out evenly.

    Returns
    -------
    The mean loss, nats/token; of a part, its share of the batch's.
    """
    whole = sequences or len(windows)
    total = torch.zeros((), device=windows.device)
    for number in range(math.ceil(whole / (ranks * passes.sequences))):
        part = windows[number * passes.sequences : (number + 1) * passes.sequences]
        mean = loss(part if len(part) else windows[:1])
        if len(part) < whole:
            mean = mean * (len(part) / whole)
        # Torch leaves backward() untyped.
        mean.backward()  # type: ignore[no-untyped-call]
        after_pass()
        total += mean.detach()
    return total
