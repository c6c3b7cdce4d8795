"""The model: a plain pre-norm decoder-only transformer, read top to bottom.

LayerNorm without gain, rotary embeddings, ReLU feed-forward of 4 x the width, untied head, no
biases. Nothing here knows of parallelism or optimisers. Three pieces carry their own backward pass,
which makes a step 4% (width 96) to 13% (width 24) faster on one core than autograd's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.flops import LONG_CONTEXT, MLP_RATIO
from trainers.trial import Shape

ROTARY_BASE = 1000.0
EMBEDDING_STD = 0.5
NORM_EPSILON = 1e-5
INPUT_GAIN = 0.7
"""Standard deviation of QKV and up-projection x sqrt(width)."""


class Block(nn.Module):
    """Causal self-attention, then feed-forward, each added to the residual stream.

    Output projections start at zero, so that a block starts as the identity: a non-zero start was
    measured worse at small scale.
    """

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        d, hidden, std = shape.width, MLP_RATIO * shape.width, INPUT_GAIN * shape.width**-0.5
        self.heads = shape.heads
        self.qkv = nn.Parameter(torch.randn(3 * d, d, generator=generator) * std)
        self.attention_out = nn.Parameter(torch.zeros(d, d))
        self.up = nn.Parameter(torch.randn(hidden, d, generator=generator) * std)
        self.down = nn.Parameter(torch.zeros(hidden, d))

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor, batch: int) -> Tensor:
        """Map the residual stream, shape (batch x context, width), to the next."""
        if mask.shape[0] > LONG_CONTEXT:
            x = self._fused_attention(x, rotation, batch)
        else:
            # Torch leaves apply() of an autograd Function untyped, here and below.
            x = _Attention.apply(x, self.qkv, self.attention_out, rotation, mask, self.heads)  # type: ignore[no-untyped-call]
        fed: Tensor = _FeedForward.apply(x, self.up, self.down)  # type: ignore[no-untyped-call]
        return fed

    def _fused_attention(self, x: Tensor, rotation: Tensor, batch: int) -> Tensor:
        z = _by_head(_normed(x), self.qkv, 3 * self.heads)
        z = z.view(3, self.heads * batch, x.shape[0] // batch, -1)
        q, k = _turn_(z[:2].clone(), rotation).unsqueeze(1)
        mixed = F.scaled_dot_product_attention(q, k, z[2:], is_causal=True, scale=1.0)
        return torch.addmm(x, _merged(mixed, x.shape[0]), self.attention_out)


class Transformer(nn.Module):
    """A decoder-only transformer of `shape`, initialised from `seed`."""

    rotation: Tensor
    mask: Tensor

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        self.blocks = nn.ModuleList(Block(shape, generator) for _ in range(shape.depth))
        table = torch.randn(shape.vocabulary, shape.width, generator=generator)
        self.embedding = nn.Parameter(table * EMBEDDING_STD)
        self.head = nn.Parameter(torch.zeros(shape.width, shape.vocabulary))
        self.register_buffer("rotation", _rotation(shape), persistent=False)
        future = torch.full((shape.context, shape.context), -math.inf).triu(1)
        self.register_buffer("mask", future, persistent=False)

    def hidden(self, inputs: Tensor) -> Tensor:
        """Final normalised states of `inputs`, shape (batch, context): (batch x context, width)."""
        batch, context = inputs.shape
        x = F.embedding(inputs.reshape(-1), self.embedding)
        for block in self.blocks:
            x = block(x, self.rotation[:context], self.mask[:context, :context], batch)
        return _normed(x)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits, shape (batch, context, vocabulary)."""
        return (self.hidden(inputs) @ self.head).view(*inputs.shape, -1)

    def loss(self, windows: Tensor) -> Tensor:
        """Mean loss in nats/token on windows of shape (batch, context + 1). For training."""
        hidden = self.hidden(windows[:, :-1])
        loss: Tensor = _HeadCrossEntropy.apply(hidden, self.head, windows[:, 1:].reshape(-1))  # type: ignore[no-untyped-call]
        return loss

    @torch.no_grad()
    def token_losses(self, windows: Tensor) -> Tensor:
        """Loss in nats of every target, shape (batch, context). For evaluation."""
        logits = self.hidden(windows[:, :-1]) @ self.head
        targets = windows[:, 1:]
        return F.cross_entropy(logits, targets.reshape(-1), reduction="none").view(targets.shape)


class _Attention(torch.autograd.Function):
    """x + causal self-attention of normalised x, all heads as one batch of plain products.

    Products put heads before tokens, so that queries, keys and values need no rearranging: 0.1 ms a
    block at width 96.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, qkv: Tensor, out: Tensor, rotation: Tensor, mask: Tensor, heads: int
    ) -> Tensor:
        tokens, context = x.shape[0], mask.shape[0]
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[1:], None, None, NORM_EPSILON)
        z = _by_head(normed, qkv, 3 * heads).view(3, heads * tokens // context, context, -1)
        _turn_(z[:2], rotation)
        q, k, v = z
        weights = torch.softmax(torch.baddbmm(mask, q, k.mT), -1)
        mixed = _merged(torch.bmm(weights, v), tokens)
        ctx.save_for_backward(x, mean, rstd, normed, qkv, out, rotation, z, weights, mixed)
        ctx.heads = heads
        return torch.addmm(x, mixed, out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, mean, rstd, normed, qkv, out, rotation, z, weights, mixed = ctx.saved_tensors
        (grad,) = grads
        q, k, v = z
        mixed_grad = _by_head(grad, out, ctx.heads).view(v.shape)
        scores_grad = torch._softmax_backward_data(
            torch.bmm(mixed_grad, v.mT), weights, -1, x.dtype
        )
        z_grad = torch.empty_like(z)
        torch.bmm(scores_grad, k, out=z_grad[0])
        torch.bmm(scores_grad.mT, q, out=z_grad[1])
        torch.bmm(weights.mT, mixed_grad, out=z_grad[2])
        _turn_(z_grad[:2], rotation.conj())
        merged = _merged(z_grad, x.shape[0])
        x_grad = _normed_backward(merged @ qkv, x, mean, rstd).add_(grad)
        return x_grad, merged.t() @ normed, mixed.t() @ grad, None, None, None


class _FeedForward(torch.autograd.Function):
    """x + feed-forward of normalised x, with its widest buffers changed in place.

    At width 96 and 512 tokens these are 0.8 MB, most of a core's cache; out of place, ReLU and its
    mask would each need another.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[1:], None, None, NORM_EPSILON)
        active = torch.relu_(normed @ up.t())
        ctx.save_for_backward(x, mean, rstd, normed, up, down, active)
        return torch.addmm(x, active, down)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, mean, rstd, normed, up, down, active = ctx.saved_tensors
        (grad,) = grads
        inner = grad @ down.t()
        torch.ops.aten.threshold_backward.grad_input(inner, active, 0, grad_input=inner)
        x_grad = _normed_backward(inner @ up, x, mean, rstd).add_(grad)
        return x_grad, inner.t() @ normed, active.t() @ grad


class _HeadCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of hidden @ head, keeping the probabilities of the forward pass.

    Backward needs no second exponential and no zero-filled buffer: at vocabulary 256 and width 24
    the head is a third of the step.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        probabilities = torch.softmax(hidden @ head, 1)
        index = targets[:, None]
        chosen = probabilities.gather(1, index)
        probabilities.scatter_(1, index, chosen - 1)  # now the gradient of the logits
        ctx.save_for_backward(probabilities, hidden, head)
        # The clamp keeps a hopeless token's loss finite; its gradient is exact all the same.
        return -chosen.clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        logits_grad, hidden, head = ctx.saved_tensors
        scale = grads[0] / logits_grad.shape[0]
        return (logits_grad @ head.t()).mul_(scale), (hidden.t() @ logits_grad).mul_(scale), None


def _normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:], eps=NORM_EPSILON)


def _normed_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    wanted = [True, False, False]
    x_grad: Tensor = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[1:], mean, rstd, None, None, wanted
    )[0]
    return x_grad


def _rotation(shape: Shape) -> Tensor:
    """Rotary angles as complex numbers, shape (context, head width / 2).

    Of length head_width^-1/4: turning queries and keys also scales their products.
    """
    head_width = shape.width // shape.heads
    frequencies = ROTARY_BASE ** (-torch.arange(0, head_width, 2).float() / head_width)
    angles = torch.arange(shape.context).float()[:, None] * frequencies
    return torch.polar(torch.full_like(angles, head_width**-0.25), angles)


def _turn_(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn pairs of the last axis of x, shape (..., context, head width), in place."""
    torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(rotation)
    return x


def _by_head(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Rows of x times those of the weight, (heads, tokens, head width), heads cut from its rows."""
    return torch.bmm(x.expand(heads, -1, -1), weight.view(heads, -1, x.shape[1]).mT)


def _merged(x: Tensor, tokens: int) -> Tensor:
    """Lay heads, shape (..., heads x batch, context, head width), side by side for each token."""
    return x.view(-1, tokens, x.shape[-1]).transpose(0, 1).reshape(tokens, -1)
