"""The simplest kind of model by hand, forward and backward, for one core in fp32.

Computes what `trainers.transformer` says in plain torch, for LayerNorm, ReLU, as many keys as
queries and short contexts. Without autograd, of which a step of width 24 would spend a tenth on
bookkeeping: what a pass back needs lies on a tape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from trainers.head_loss import sum_and_gradients

NORM_EPSILON = 1e-5

Matrices = tuple[Tensor, Tensor, Tensor, Tensor]
"""A block's: queries, keys and values; attention's output; up; down."""
Weights = tuple[Tensor, Tensor, Sequence[Matrices]]
"""Embedding, shape (vocabulary, width); head, shape (width, vocabulary); those of the blocks."""


def loss(
    inputs: Tensor,
    targets: Tensor,
    rotation: Tensor,
    heads: int,
    weights: Weights,
) -> Tensor:
    """Mean loss, nats/token.

    Parameters
    ----------
    inputs, targets
        Shape (batch, context).
    rotation
        Cosine and sine by position, shape (context, head width / 2, 2).
    heads
        Of a block's attention.
    weights
        All of the model's.
    """
    *tables, blocks = weights
    matrices = [matrix for block in blocks for matrix in block]
    # Torch leaves apply() of an autograd Function untyped.
    mean: Tensor = _Loss.apply(inputs, targets, rotation, heads, *tables, *matrices)  # type: ignore[no-untyped-call]
    return mean


def block(x: Tensor, rotation: Tensor, heads: int, matrices: Matrices) -> Tensor:
    """The residual stream after a block, shape (batch, context, width); without gradients."""
    qkv, out, up, down = matrices
    turns = torch.view_as_complex(rotation)
    flat, _ = _attended(x.flatten(0, 1), qkv, out, turns, heads)
    return _fed(flat, up, down)[0].view(x.shape)


class _Loss(torch.autograd.Function):
    """Everything between tokens and loss as one operation.

    In inference mode torch keeps no account of views and versions: 4% of a step at width 24. What
    leaves it are copies.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        targets: Tensor,
        rotation: Tensor,
        heads: int,
        embedding: Tensor,
        head: Tensor,
        *matrices: Tensor,
    ) -> Tensor:
        wanted, tape = any(ctx.needs_input_grad), []
        with torch.inference_mode():
            index, turns = inputs.flatten(), torch.view_as_complex(rotation)
            x = torch.embedding(embedding, index)
            for at in range(0, len(matrices), 4):
                qkv, out, up, down = matrices[at : at + 4]
                x, attention = _attended(x, qkv, out, turns, heads)
                x, feed_forward = _fed(x, up, down)
                tape += [attention, feed_forward]
            normed, *norm = _normed(x)
            total, *gradients = sum_and_gradients(normed, head, targets.flatten(), wanted)
            mean = total / len(index)
        if wanted:
            ctx.tape, ctx.last = tape, (index, x, norm, gradients)
            ctx.turns, ctx.heads = turns, heads
            ctx.tables, ctx.matrices = (embedding, head), matrices
        return mean.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        embedding, head = ctx.tables
        found = [torch.empty_like(matrix) for matrix in ctx.matrices]
        embedding_grad, head_grad = torch.zeros_like(embedding), torch.empty_like(head)
        index, x, norm, (grad, whole_head_grad) = ctx.last
        with torch.inference_mode():
            scale, back = grads[0] / len(index), ctx.turns.conj().resolve_conj()
            torch.mul(whole_head_grad, scale, out=head_grad)
            grad = _normed_backward(grad * scale, x, *norm)
            for at in range(len(found) - 4, -1, -4):
                qkv, out, up, down = ctx.matrices[at : at + 4]
                grad = _fed_backward(grad, ctx.tape.pop(), up, down, found[at + 2 : at + 4])
                grad = _attended_backward(
                    grad, ctx.tape.pop(), qkv, out, back, ctx.heads, found[at : at + 2]
                )
            embedding_grad.index_add_(0, index, grad)
        return None, None, None, None, embedding_grad, head_grad, *found


def _attended(
    x: Tensor, qkv: Tensor, out: Tensor, turns: Tensor, heads: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Add causal self-attention of normalised x to x, all heads as one batch of plain products.

    Products put heads before tokens, so that queries, keys and values need no rearranging: 0.1 ms a
    block at width 96.
    """
    tokens, context = len(x), len(turns)
    normed, mean, rstd = _normed(x)
    z = _by_head(normed, qkv, 3 * heads).view(3, heads * tokens // context, context, -1)
    _turn_(z[:2], turns)
    q, k, v = z.unbind()
    weights = torch.softmax(torch.baddbmm(_future(context), q, k.mT), -1)
    mixed = _merged(torch.bmm(weights, v), tokens)
    return torch.addmm(x, mixed, out), (x, mean, rstd, normed, q, k, v, weights, mixed)


def _attended_backward(
    grad: Tensor,
    tape: tuple[Tensor, ...],
    qkv: Tensor,
    out: Tensor,
    back: Tensor,
    heads: int,
    found: Sequence[Tensor],
) -> Tensor:
    """The gradient of x; those of the matrices are written into `found`."""
    x, mean, rstd, normed, q, k, v, weights, mixed = tape
    mixed_grad = _by_head(grad, out, heads).view(v.shape)
    scores_grad = torch._softmax_backward_data(torch.bmm(mixed_grad, v.mT), weights, -1, x.dtype)
    z_grad = torch.empty((3, *v.shape))
    q_grad, k_grad, v_grad = z_grad.unbind()
    torch.bmm(scores_grad, k, out=q_grad)
    torch.bmm(scores_grad.mT, q, out=k_grad)
    torch.bmm(weights.mT, mixed_grad, out=v_grad)
    _turn_(z_grad[:2], back)
    merged = _merged(z_grad, len(x))
    torch.mm(merged.t(), normed, out=found[0])
    torch.mm(mixed.t(), grad, out=found[1])
    return _normed_backward(merged @ qkv, x, mean, rstd).add_(grad)


def _fed(x: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Add feed-forward of normalised x to x, with its widest buffers changed in place.

    At width 96 and 512 tokens these are 0.8 MB, most of a core's cache; out of place, ReLU and its
    mask would each need another.
    """
    normed, mean, rstd = _normed(x)
    active = torch.relu_(normed @ up.t())
    return torch.addmm(x, active, down), (x, mean, rstd, normed, active)


def _fed_backward(
    grad: Tensor, tape: tuple[Tensor, ...], up: Tensor, down: Tensor, found: Sequence[Tensor]
) -> Tensor:
    x, mean, rstd, normed, active = tape
    inner = grad @ down.t()
    torch.ops.aten.threshold_backward.grad_input(inner, active, 0, grad_input=inner)
    torch.mm(inner.t(), normed, out=found[0])
    torch.mm(active.t(), grad, out=found[1])
    return _normed_backward(inner @ up, x, mean, rstd).add_(grad)


def _normed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised rows, their means and reciprocal deviations.

    With gains of 1 and offsets of 0, for which torch's kernel is vectorised: 31 for 52 µs at width
    96, and the same to the bit.
    """
    ones, zeros = _affine(x.shape[1])
    return torch.native_layer_norm(x, x.shape[1:], ones, zeros, NORM_EPSILON)


def _normed_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    wanted = [True, False, False]
    x_grad: Tensor = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[1:], mean, rstd, None, None, wanted
    )[0]
    return x_grad


def _turn_(x: Tensor, turns: Tensor) -> Tensor:
    """Turn pairs of the last axis of x, shape (..., context, head width), in place."""
    torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(turns)
    return x


def _by_head(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Rows of x times those of the weight, (heads, tokens, head width), heads cut from its rows."""
    return torch.bmm(x.expand(heads, -1, -1), weight.view(heads, -1, x.shape[1]).mT)


def _merged(x: Tensor, tokens: int) -> Tensor:
    """Lay heads, shape (..., heads x batch, context, head width), side by side for each token."""
    return x.view(-1, tokens, x.shape[-1]).transpose(0, 1).reshape(tokens, -1)


@lru_cache(maxsize=4)
def _affine(width: int) -> tuple[Tensor, Tensor]:
    return torch.ones(width), torch.zeros(width)


@lru_cache(maxsize=4)
def _future(context: int) -> Tensor:
    return torch.full((context, context), -math.inf).triu(1)
