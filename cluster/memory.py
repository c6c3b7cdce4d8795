"""Memory that training takes on each GPU, counted from what the trainer keeps and when.

Follows `trainers.transformer` and `trainers.optimizer` line by line: the peak is the largest of a
few moments, each a sum of tensors alive at once. The allocator's rounding and holes are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainers.flops import (
    EVALUATION_TOKENS,
    LONG_CONTEXT,
    MLP_RATIO,
    PRECISION,
    params,
    pass_sequences,
)
from trainers.trial import Hyperparameters, Shape

FLOAT = {"fp32": 4}[PRECISION]
"""Bytes of everything but indices."""
INDEX = 8
"""Bytes of a token's index."""
CONTEXT_BYTES = 0.8e9
"""A process's own on a GPU before any tensor: CUDA's context, its kernels and cuBLAS's workspaces.
Own allowance for data-centre GPUs; every share of a GPU pays it again."""
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


def training_memory(shape: Shape, hyperparameters: Hyperparameters, *, gpus: int = 1) -> Memory:
    """Memory of training on each of `gpus` GPUs, without `CONTEXT_BYTES`.

    Parameters
    ----------
    shape, hyperparameters
        The model, its batch and its optimiser.
    gpus
        Over which parameters, gradients and optimiser state are sharded, and the batch is split.

    Notes
    -----
    For one GPU checked against torch's allocator. For several it is reckoned: every GPU holds its
    part of the state, and the weights and gradients of one block, or of a table if that is larger,
    gathered whole for the one at work and the one fetched ahead. Of a batch that takes several
    passes, the gradients stay from pass to pass.
    """
    count = params(shape)
    whole = hyperparameters.batch_tokens / gpus
    n = min(whole, pass_sequences(shape.context) * shape.context)
    gathered = _gathered(shape) if gpus > 1 else 0.0
    parts = FLOAT * count.total / gpus  # all parameters, once, of one GPU
    fixed = 4 * parts + gathered + FLOAT * shape.context**2  # weights, gradient, two moments; mask
    gradients = parts if n < whole else 0.0  # of earlier passes
    inputs = INDEX * (whole + 2 * n)  # windows of the batch; a pass's inputs and targets
    block, within = _block(shape)
    width, depth, symbols = shape.width, shape.depth, shape.vocabulary
    blocks = FLOAT * count.non_embedding / gpus
    table = FLOAT * symbols * width / gpus
    activations = FLOAT * n * depth * block + inputs
    muon = FLOAT * MUON_COPIES * depth * width**2 / gpus
    return Memory(
        forward=fixed + gradients + activations + FLOAT * n * (2 * width + 2 * symbols),
        backward=fixed
        + max(
            max(gradients, table + blocks / depth) + activations + FLOAT * n * within,
            max(gradients, table + blocks) + FLOAT * n * (block + within) + inputs,
        ),
        optimizer=fixed + parts + (muon if hyperparameters.optimizer == "muon" else 0.0) + inputs,
        evaluation=fixed + _evaluation(shape) + inputs,
    )


def _block(shape: Shape) -> tuple[float, float]:
    """Floats a token that one block keeps for backward, and that its backward adds to them.

    Kept: the inputs of both halves and these normalised; queries, keys, values; what attention
    gives; the hidden units; and two statistics of each norm. Short contexts also keep the weights
    of every head; the fused kernel keeps turned copies of queries and keys, its result and its
    logarithms instead.
    """
    d, weights = shape.width, shape.heads * shape.context
    feed_forward = (2 + MLP_RATIO) * d
    in_feed_forward = (3 + MLP_RATIO) * d
    if shape.context > LONG_CONTEXT:
        return 9 * d + shape.heads + feed_forward + 4, in_feed_forward
    in_attention = max(10 * d + weights, 2 * d + 2 * weights) - feed_forward
    return 6 * d + weights + feed_forward + 4, max(in_feed_forward, in_attention)


def _evaluation(shape: Shape) -> float:
    """Bytes of the widest moment of an evaluation batch, which keeps nothing for backward."""
    d, weights = shape.width, shape.heads * shape.context
    attention = 9 * d if shape.context > LONG_CONTEXT else max(5 * d + 2 * weights, 7 * d + weights)
    widest = max(attention, (4 + MLP_RATIO) * d, 2 * shape.vocabulary)
    return FLOAT * max(EVALUATION_TOKENS, shape.context) * widest


def _gathered(shape: Shape) -> float:
    block = params(shape).non_embedding / shape.depth
    return 2 * 2 * FLOAT * max(block, shape.vocabulary * shape.width)
