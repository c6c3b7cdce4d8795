"""A batch's gradient, in as many passes as memory allows.

Of several ranks all go through as many, since those that share out a model meet in each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

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
    halvings: int = 0,
) -> Passes:
    """The passes that fit on this device, and on that of each other rank; halved so many times."""
    there = room(device)
    buffers = NCCL_BYTES if ranks.count > 1 else 0.0  # not there before the first message
    least = None if there is None else ranks.least(there) - buffers
    return fitting_passes(
        shape, hyperparameters, least, gpus=ranks.count, sharded=sharded, halvings=halvings
    )


ComputeBlock = Callable[[Block, Tensor, Tensor], Tensor]
"""What a block does in training: `Block.forward`, or that as it was compiled."""


def prepared(block: Block, passes: Passes, compute: ComputeBlock | None = None) -> Block:
    """A block as passes need it: it may keep its input alone, and compute the rest again.

    Changed from outside, as for parallelism: losses and gradients are the same to the bit. Where it
    learns, it may `compute` as it was compiled; where it is evaluated it is as it was written.
    """
    if passes.recomputed or compute is not None:
        block.__class__ = Prepared
        changed = cast(Prepared, block)
        changed.compute = compute or Block.forward
        changed.recomputed = passes.recomputed
    return block


class Prepared(Block):
    """A block that learns in another way than it was written."""

    compute: ComputeBlock
    """A function, not a method: a block that refers to itself would outlive its trial."""
    recomputed: bool

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """See `Block.forward`."""
        if not torch.is_grad_enabled():
            return super().forward(x, rotation)
        if not self.recomputed:
            return self.compute(self, x, rotation)
        # Nothing is drawn in a block, so there is no random state to keep.
        computed: Tensor = checkpoint(
            self.compute, self, x, rotation, use_reentrant=False, preserve_rng_state=False
        )
        return computed


def accumulate(
    loss: Callable[..., Tensor],
    windows: Tensor,
    passes: Passes,
    sequences: int | None = None,
    after_pass: Callable[[], None] = lambda: None,
    *,
    ranks: int = 1,
    before_pass: Callable[[bool], None] = lambda last: None,
) -> Tensor:
    """Add the gradient of the mean loss on `windows`, in passes.

    A rank that has fewer sequences than the others makes up for it by a pass that counts nothing.
    Passes that are to be filled up are so with copies of a sequence, which do not count either: the
    gradient is that of the windows alone.

    Parameters
    ----------
    loss
        The mean loss of windows; where some fill up a pass, it is told how many of them count.
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
    before_pass
        Called before every pass, with whether it is the last one.

    Returns
    -------
    The mean loss, nats/token; of a part, its share of the batch's.
    """
    whole, size = sequences or len(windows), passes.sequences
    total = torch.zeros((), device=windows.device)
    number = math.ceil(whole / (ranks * size))
    for at in range(number):
        before_pass(at == number - 1)
        part = windows[at * size : (at + 1) * size]
        if passes.filled and len(part) < size:
            filler = windows[:1].expand(size - len(part), -1)
            mean = loss(torch.cat([part, filler]), len(part))
        else:
            mean = loss(part if len(part) else windows[:1])
        if len(part) < whole:
            mean = mean * (len(part) / whole)
        # Torch leaves backward() untyped.
        mean.backward()  # type: ignore[no-untyped-call]
        after_pass()
        total += mean.detach()
    return total
