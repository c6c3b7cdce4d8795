"""Memory that training takes on each GPU, counted from what the trainer keeps and when.

Follows `trainers.transformer` and `trainers.optimizer` line by line: the peak is the largest of a
few moments, each a sum of tensors alive at once. The allocator's rounding and holes are not in it.
In what passes a trial is trained where memory is short follows from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from trainers.flops import (
    ALIGNED_SYMBOLS,
    CHUNK_LOGITS,
    EVALUATION_TOKENS,
    params,
    pass_sequences,
)
from trainers.shape import Shape
from trainers.trial import Hyperparameters

FLOAT, HALF = 4, 2
"""Bytes of a number in fp32 and in bf16."""
INDEX = 8
"""Bytes of a token's index."""
CONTEXT_BYTES = 0.8e9
"""A process's own on a GPU before any tensor: CUDA's context, its kernels and cuBLAS's workspaces.
Own allowance for data-centre GPUs; every share of a GPU pays it again."""
NCCL_BYTES = 1.0e9
"""NCCL's buffers on a GPU that trains with others, beside `CONTEXT_BYTES`. Own allowance: 24
channels of a ring and a tree, four connections each, of about 9 MB (NCCL_BUFFSIZE, by default 4
MiB, and the buffers of its protocols LL and LL128)."""
HEADROOM = 0.1
"""Of a GPU's memory, left to the allocator: blocks are rounded, and holes stay between them."""
MUON_COPIES = 24
"""Matrices of width^2 a block that Newton-Schulz holds at once: of each of the four square ones, X
before and after, its Gram matrix and the polynomial of the first and of the last step."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes alive at the moments of training that can be its peak."""

    forward: float
    """Every activation, with the logits and their softmax."""
    backward: float
    """Within the last block, or within the first, when nearly all gradients are there."""
    optimizer: float
    evaluation: float

    @property
    def peak(self) -> float:
        """The largest of them."""
        return max(self.forward, self.backward, self.optimizer, self.evaluation)


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How a GPU goes through its share of a batch."""

    sequences: int
    """Most of one pass."""
    recomputed: bool = False
    """Whether a block keeps its input alone, and computes the rest again in the backward pass."""
    filled: bool = False
    """Whether a pass of fewer sequences is filled up with some that do not count: all have one
    shape then, so that it is compiled once."""
    summed: bool = False
    """Whether a rank sums its gradients of a sharded model over its passes, before ranks sum theirs
    once a step; otherwise they do in every pass."""

    @property
    def smaller(self) -> Passes | None:
        """Passes of half as many sequences; None where there are none that take less memory."""
        if self.sequences > 1:
            return replace(self, sequences=(self.sequences + 1) // 2, summed=False)
        return None if self.recomputed else replace(self, recomputed=True, summed=False)

    def even(self, share: int) -> Passes:
        """As few passes through `share` sequences, all as large as they need to be, and filled."""
        passes = math.ceil(share / self.sequences)
        return replace(self, sequences=math.ceil(share / passes), filled=True)


LEAST = Passes(sequences=1, recomputed=True)
"""In which training takes least memory."""


def fitting_passes(
    shape: Shape,
    hyperparameters: Hyperparameters,
    room: float | None,
    *,
    gpus: int = 1,
    sharded: bool = True,
    halvings: int = 0,
) -> Passes:
    """The largest passes in which training takes at most `room` bytes on each GPU.

    Fewer sequences a pass cost little, computing blocks again a third more: so that is for where
    not even one sequence fits otherwise. The least if none fit. Then halved so many times. On a GPU
    all passes are as large. If `room` is None, as on a core, they are full ones and a rest: no
    graph is compiled there, and sums in another order would be other bits.
    """
    share = -(-hyperparameters.batch_tokens // (shape.context * gpus))
    most = min(pass_sequences(shape.context), share)
    if room is None:
        return _halved(Passes(sequences=most, summed=sharded and gpus > 1), halvings)

    def fits(passes: Passes) -> bool:
        taken = training_memory(shape, hyperparameters, gpus=gpus, sharded=sharded, passes=passes)
        return taken.peak <= room

    halves = [most >> n for n in range(most.bit_length())]
    ways = [Passes(sequences=n, recomputed=r) for r in (False, True) for n in halves]
    evened = (way.even(share) for way in ways)
    chosen = _halved(next(filter(fits, evened), LEAST), halvings)
    chosen = chosen.even(share)
    summed = replace(chosen, summed=sharded and gpus > 1)
    return summed if fits(summed) else chosen


def _halved(passes: Passes, times: int) -> Passes:
    for _ in range(times):
        passes = passes.smaller or passes
    return passes


def training_memory(
    shape: Shape,
    hyperparameters: Hyperparameters,
    *,
    gpus: int = 1,
    sharded: bool = True,
    passes: Passes | None = None,
) -> Memory:
    """Memory of training on each of `gpus` GPUs, without `CONTEXT_BYTES`.

    Parameters
    ----------
    shape, hyperparameters
        The model, its batch and its optimiser.
    gpus
        Over which the batch is split.
    sharded
        Whether parameters, gradients and optimiser state are split over them too.
    passes
        In which each goes through its share of the batch; full ones by default.

    Notes
    -----
    For one GPU checked against torch's allocator. For several it is reckoned: every GPU holds its
    part of the state, and the weights and gradients of one block, or of a table if that is larger,
    gathered whole for the one at work and the one fetched ahead. To draw the weights takes less,
    since they are shared out block by block. Of a batch that takes several passes, the gradients
    stay from pass to pass.
    """
    count, half = params(shape), hyperparameters.precision == "bf16"
    passes = passes or Passes(sequences=pass_sequences(shape.context))
    whole = hyperparameters.batch_tokens / gpus
    n = min(whole, passes.sequences * shape.context)
    act, shards = HALF if half else FLOAT, gpus if sharded else 1
    parts = FLOAT * count.total / shards  # all parameters, once, of one GPU
    fixed = 4 * parts  # weights, gradient, two moments
    if passes.summed and n < whole:
        fixed += FLOAT * count.total - parts  # the gradient of all parameters, of one rank
    if shards > 1:
        fixed += _gathered(shape) * act / FLOAT
    elif half:
        fixed += HALF * count.total  # the rounded copy
    gradients = parts if n < whole and not half else 0.0  # of earlier passes
    inputs = INDEX * (whole + 2 * n)  # windows of the batch; a pass's inputs and targets
    block, within = _block(shape)
    if not half and shape.architecture.queries_per_key > 1:
        block += 2 * (shape.width - shape.key_width)  # keys and values, copied for each head
    width, depth, symbols = shape.width, shape.depth, shape.vocabulary
    blocks = act * count.non_embedding / shards
    table = act * symbols * width / shards
    kept = block
    if passes.recomputed:  # the input of each, and all of the one at work
        kept, within = width, within + block - width
    activations = act * n * depth * kept + inputs
    muon = FLOAT * MUON_COPIES * depth * width**2 / shards
    # In the head's loss: logits, if rounded also as they were, and probabilities.
    logits = min(n, CHUNK_LOGITS / symbols) * symbols * (2 * FLOAT + (HALF if half else 0))
    summed = FLOAT * symbols * width / shards if half and n * symbols > CHUNK_LOGITS else 0.0
    headed = act * 4 * n * width + logits + table + summed
    if symbols % ALIGNED_SYMBOLS:  # the head with more columns, and its gradient
        headed += 2 * act * symbols * width
    return Memory(
        forward=fixed + gradients + activations + headed,
        backward=fixed
        + max(
            max(gradients, table + blocks / depth) + activations + act * n * within,
            max(gradients, table + blocks) + act * n * (kept + within) + inputs,
        ),
        optimizer=fixed + parts + (muon if hyperparameters.optimizer == "muon" else 0.0) + inputs,
        evaluation=fixed + _evaluation(shape, act) + inputs,
    )


def _block(shape: Shape) -> tuple[float, float]:
    """Numbers a token that one block keeps for backward, and that its backward adds to them.

    Kept: the inputs of both halves and these normalised; queries, keys and values, the first two
    also turned; what attention gives and its logarithms; what leads to the hidden units; and a
    statistic or two of each norm.
    """
    d, keys, hidden = shape.width, shape.key_width, shape.hidden
    kept = {"relu": 1, "relu2": 2, "swiglu": 4}[shape.architecture.feed_forward] * hidden
    added = {"relu": 2, "relu2": 3, "swiglu": 4}[shape.architecture.feed_forward] * hidden
    return 7 * d + 3 * keys + shape.heads + kept + 4, max(d + added, 6 * d + 3 * keys)


def _evaluation(shape: Shape, act: int) -> float:
    """Bytes of the widest moment of an evaluation batch, which keeps nothing for backward."""
    d, keys, hidden = shape.width, shape.key_width, shape.hidden
    inner = {"relu": 2, "relu2": 2, "swiglu": 4}[shape.architecture.feed_forward] * hidden
    losses = act * d + 2 * FLOAT * shape.vocabulary
    widest = max(act * max(6 * d + 3 * keys, 4 * d + inner), losses)
    return max(EVALUATION_TOKENS, shape.context) * widest


def _gathered(shape: Shape) -> float:
    block = params(shape).non_embedding / shape.depth
    return 2 * 2 * FLOAT * max(block, shape.vocabulary * shape.width)
