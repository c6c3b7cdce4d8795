"""Parameters and FLOPs of a shape under each published convention, and the pieces they come in.

The optimiser's own FLOPs are not counted in C, by any convention: Newton-Schulz adds about
600 width^3 a step at depth 2.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainers.shape import Shape
from trainers.trial import Trial

LONG_CONTEXT = 256
"""Tokens above which attention goes through torch's fused kernel: it does not keep the context^2
weights of every head, but at context 64 it is 0.2 to 0.4 ms a block slower than plain products."""
PASS_TOKENS = 16_384
"""Most tokens of one forward and backward pass; gradients of a larger batch accumulate. At width
512 a block's products of so many take 5 ms at an H100's fp32 peak, ten times as long as to launch
them."""
EVALUATION_TOKENS = 4096
"""Tokens of an evaluation batch: larger ones fall out of a core's cache."""
CHUNK_LOGITS = 1 << 27
"""Logits that exist at once: 0.5 GB in fp32."""
ALIGNED_SYMBOLS = 64
"""A GPU's copy of the output head has a multiple of so many symbols: rows that are no multiple of
128 bytes miss the fast kernels of tensor cores (NVIDIA, Matrix Multiplication Background User's
Guide, "Tensor Core Requirements")."""


@dataclass(frozen=True, kw_only=True)
class Params:
    """Parameters of one shape, counted three ways."""

    non_embedding: int
    """Block matrices only: 12 depth width^2 with as many keys as queries and a plain feed-forward
    layer of 4 x the width (Kaplan et al. 2020, Table 1)."""
    matmul: int
    """With the output head: every parameter that multiplies an activation."""
    total: int
    """With the embedding too, where the head is another table; Hoffmann et al. (2022) report
    totals."""


def params(shape: Shape) -> Params:
    """Count the parameters of the model of `shape` (no biases, no norm gains).

    >>> params(Shape(width=24, depth=2, heads=2, vocabulary=256, context=64))
    Params(non_embedding=13824, matmul=19968, total=26112)
    """
    attention = 2 * shape.width + 2 * shape.key_width
    ways = 3 if shape.architecture.feed_forward == "swiglu" else 2
    blocks = shape.depth * shape.width * (attention + ways * shape.hidden)
    table = shape.vocabulary * shape.width
    tables = 1 if shape.architecture.tied else 2
    return Params(non_embedding=blocks, matmul=blocks + table, total=blocks + tables * table)


def flops_per_token(shape: Shape) -> float:
    """Exact training FLOPs a token: 3 x forward, causal attention, embedding look-ups free.

    Forward is 2 N_matmul + 4 depth width (context + 1) / 2: a token attends to half of the context
    on average. Kaplan et al. (2020), section 2.1, without the mask: 2 N + 2 depth context width.
    """
    attention = 4 * shape.depth * shape.width * (shape.context + 1) / 2
    return 3 * (2 * params(shape).matmul + attention)


def pass_sequences(context: int) -> int:
    """Most sequences of one pass: whole ones, and at least one.

    >>> pass_sequences(1024), pass_sequences(100_000)
    (16, 1)
    """
    return max(1, PASS_TOKENS // context)


def trial_flops(trial: Trial) -> float:
    """Exact training FLOPs of `trial` up to its last horizon, all branches included."""
    h = trial.hyperparameters
    return flops_per_token(trial.shape) * trial.total_steps * h.batch_tokens
