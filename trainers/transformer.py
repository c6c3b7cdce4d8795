"""The model: a plain pre-norm decoder-only transformer, read top to bottom.

LayerNorm without gain, rotary embeddings, ReLU feed-forward of 4 x the width, untied head, no
biases. Nothing here knows of devices, parallelism or optimisers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers.flops import MLP_RATIO
from trainers.trial import Shape

ROTARY_BASE = 1000.0
EMBEDDING_STD = 0.5
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

    def forward(self, x: Tensor, rotation: Tensor, batch: int) -> Tensor:
        """Map the residual stream, shape (batch x context, width), to the next."""
        tokens, d = x.shape
        context = tokens // batch
        z = F.linear(_normed(x), self.qkv).view(batch, context, 3, self.heads, d // self.heads)
        q, k = _rotate(z[:, :, :2], rotation).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, z[:, :, 2].transpose(1, 2), is_causal=True)
        x = torch.addmm(x, mixed.transpose(1, 2).reshape(tokens, d), self.attention_out)
        return torch.addmm(x, F.relu(F.linear(_normed(x), self.up)), self.down)


class Transformer(nn.Module):
    """A decoder-only transformer of `shape`, initialised from `seed`."""

    rotation: Tensor

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        self.blocks = nn.ModuleList(Block(shape, generator) for _ in range(shape.depth))
        table = torch.randn(shape.vocabulary, shape.width, generator=generator)
        self.embedding = nn.Parameter(table * EMBEDDING_STD)
        self.head = nn.Parameter(torch.zeros(shape.width, shape.vocabulary))
        self.register_buffer("rotation", _rotation(shape), persistent=False)

    def hidden(self, inputs: Tensor) -> Tensor:
        """Final normalised states of `inputs`, shape (batch, context): (batch x context, width)."""
        batch, context = inputs.shape
        x = F.embedding(inputs.reshape(-1), self.embedding)
        for block in self.blocks:
            x = block(x, self.rotation[:context], batch)
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
    return F.layer_norm(x, (x.shape[-1],))


def _rotation(shape: Shape) -> Tensor:
    """Rotary angles as unit complex numbers, shape (context, 1, 1, head width / 2)."""
    head_width = shape.width // shape.heads
    frequencies = ROTARY_BASE ** (-torch.arange(0, head_width, 2).float() / head_width)
    angles = torch.arange(shape.context).float()[:, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)[:, None, None]


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn pairs of the last axis of x, shape (batch, context, 2, heads, head width)."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rotation).view(x.shape)
