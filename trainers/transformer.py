"""The model: a pre-norm decoder-only transformer, read top to bottom.

What an `Architecture` leaves open is decided here in plain torch. Nothing knows of parallelism,
precision or optimisers; on one core, models of the simplest kind train in `trainers.one_core`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainers import one_core
from trainers.flops import LONG_CONTEXT
from trainers.head_loss import ChunkLoss, chunk_loss, head_loss, token_losses
from trainers.shape import Architecture, Shape


class Block(nn.Module):
    """Causal self-attention, then feed-forward, each added to the residual stream.

    Matrices that write to the stream have its units as columns, all others as well: so each matrix
    of a block has `width` columns.
    """

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        super().__init__()
        self.shape, self.simple = shape, _is_simple(shape.architecture)
        a, d, hidden = shape.architecture, shape.width, shape.hidden
        reading = a.input_std or a.input_gain * d**-0.5
        writing = a.output_std / math.sqrt(2 * shape.depth)
        inner = 2 * hidden if a.feed_forward == "swiglu" else hidden
        self.qkv = _drawn((d + 2 * shape.key_width, d), reading, generator)
        self.up = _drawn((inner, d), reading, generator)
        self.attention_out = _drawn((d, d), writing, generator)
        self.down = _drawn((hidden, d), writing, generator)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """Map the residual stream, shape (batch, context, width), to the next."""
        if self.simple and not torch.is_grad_enabled() and _on_one_core(x, x.shape[1]):
            return one_core.block(x, rotation, self.shape.heads, self.matrices)
        x = x + self.attention(normed(x, self.shape.architecture), rotation)
        return x + self.feed_forward(normed(x, self.shape.architecture))

    def attention(self, x: Tensor, rotation: Tensor) -> Tensor:
        """What attention adds to the stream."""
        shape, a = self.shape, self.shape.architecture
        qkv = F.linear(x, self.qkv).view(*x.shape[:2], -1, shape.head_width).transpose(1, 2)
        keys = shape.heads // a.queries_per_key
        q, k, v = torch.split(qkv, [shape.heads, keys, keys], dim=1)
        if a.qk_norm:
            q, k = (F.rms_norm(part, part.shape[-1:], eps=one_core.NORM_EPSILON) for part in (q, k))
        mixed = attended(turned(q, rotation), turned(k, rotation), v, a.queries_per_key)
        return mixed.transpose(1, 2).flatten(2) @ self.attention_out

    def feed_forward(self, x: Tensor) -> Tensor:
        """What the feed-forward layer adds to the stream."""
        inner = F.linear(x, self.up)
        match self.shape.architecture.feed_forward:
            case "relu":
                active = F.relu(inner)
            case "relu2":
                active = F.relu(inner).square()
            case "swiglu":
                gate, value = inner.chunk(2, -1)
                active = F.silu(gate) * value
        return active @ self.down

    @property
    def matrices(self) -> one_core.Matrices:
        """All that it has."""
        return self.qkv, self.attention_out, self.up, self.down


class Transformer(nn.Module):
    """A decoder-only transformer of `shape`, initialised from `seed`."""

    rotation: Tensor
    chunk: ChunkLoss
    """What takes the loss of a part of a pass, in training; see `trainers.compiling`."""

    def __init__(
        self, shape: Shape, seed: int, placed: Callable[[Block], Block] = lambda block: block
    ) -> None:
        """Draw all weights; each block is `placed` before the next one is drawn.

        So what places them can leave a part of each, and the whole is nowhere in memory.
        """
        super().__init__()
        self.shape, a = shape, shape.architecture
        generator = torch.Generator().manual_seed(seed)
        self.blocks = nn.ModuleList(placed(Block(shape, generator)) for _ in range(shape.depth))
        table = (shape.vocabulary, shape.width)
        self.embedding = _drawn(table, a.embedding_std, generator)
        self.head = None if a.tied else _drawn(table[::-1], a.head_std, generator)
        self.register_buffer("rotation", _rotation(shape), persistent=False)
        self.chunk = chunk_loss

    def forward(
        self,
        inputs: Tensor,
        targets: Tensor | None = None,
        reduction: str = "mean",
        counted: int | None = None,
    ) -> Tensor:
        """Logits of `inputs`, or the loss of `targets`.

        Parameters
        ----------
        inputs, targets
            Shape (batch, context).
        reduction
            `mean`, or `none` for the loss of every target.
        counted
            How many of the sequences, the first ones, have a part in the mean; all by default.

        Returns
        -------
        Logits, shape (batch, context, vocabulary); or the mean loss, nats/token; or all of them,
        shape (batch, context).
        """
        rotation = self.rotation[: inputs.shape[1]]
        mean = targets is not None and reduction == "mean" and counted is None
        if targets is not None and mean and (weights := self._by_hand(inputs)):
            return one_core.loss(inputs, targets, rotation, self.shape.heads, weights)
        x = F.embedding(inputs, self.embedding)
        for block in self.blocks:
            x = block(x, rotation)
        x = normed(x, self.shape.architecture)
        head = self.embedding.t() if self.head is None else self.head
        if targets is None:
            return x @ head
        flat, index = x.flatten(0, 1), targets.flatten()
        if reduction == "mean":
            tokens = None if counted is None else counted * targets.shape[1]
            return head_loss(flat, head, index, tokens, self.chunk)
        return token_losses(flat, head, index).view(targets.shape)

    def _by_hand(self, inputs: Tensor) -> one_core.Weights | None:
        """All weights where one core trains them by hand; None where it does not.

        Not if somebody has wrapped the blocks, to shard them for one.
        """
        blocks = [block for block in self.blocks if type(block) is Block and block.simple]
        if self.head is None or len(blocks) < self.shape.depth:
            return None
        if not _on_one_core(self.embedding, inputs.shape[1]):
            return None
        return self.embedding, self.head, [block.matrices for block in blocks]

    def loss(self, windows: Tensor, counted: int | None = None) -> Tensor:
        """Mean loss in nats/token on windows of shape (batch, context + 1). For training.

        Of the first `counted` of them, where others only fill up the batch.
        """
        loss: Tensor = self(windows[:, :-1], windows[:, 1:], counted=counted)
        return loss

    @torch.no_grad()
    def token_losses(self, windows: Tensor) -> Tensor:
        """Loss in nats of every target, shape (batch, context). For evaluation."""
        losses: Tensor = self(windows[:, :-1], windows[:, 1:], "none")
        return losses


def normed(x: Tensor, architecture: Architecture) -> Tensor:
    """Each token's units normalised, without gain."""
    norm = F.layer_norm if architecture.norm == "layer" else F.rms_norm
    return norm(x, x.shape[-1:], eps=one_core.NORM_EPSILON)


def turned(x: Tensor, rotation: Tensor) -> Tensor:
    """Pairs of neighbours of the last axis of x, (..., context, head width), times `rotation`."""
    a, b = x.view(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = rotation.to(x.dtype).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def attended(q: Tensor, k: Tensor, v: Tensor, queries_per_key: int) -> Tensor:
    """Causal attention of heads, shape (batch, heads, context, head width), not scaled again."""
    shared = queries_per_key > 1
    if shared and _repeats_keys(q):
        k, v = (part.repeat_interleave(queries_per_key, 1) for part in (k, v))
        shared = False
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        scale=1.0,  # it is in the rotation
        enable_gqa=shared,
    )


def _repeats_keys(x: Tensor) -> bool:
    """Whether each head is given keys and values of its own, copies where heads share them.

    In fp32 a GPU's fused kernels have no heads that share: torch would take plain products, which
    keep the context^2 weights of every head.
    """
    return x.is_cuda and x.dtype == torch.float32


def _is_simple(a: Architecture) -> bool:
    """Whether `trainers.one_core` has such blocks."""
    plain = not a.qk_norm and a.queries_per_key == 1
    return plain and a.norm == "layer" and a.feed_forward == "relu"


def _on_one_core(x: Tensor, context: int) -> bool:
    """Whether this is fp32 on a CPU, in contexts whose weights a core's cache holds."""
    here = x.device.type == "cpu" and x.dtype == torch.float32 and context <= LONG_CONTEXT
    return here and not torch.is_autocast_enabled("cpu")


def _drawn(size: tuple[int, int], std: float, generator: torch.Generator) -> nn.Parameter:
    """A matrix of normal numbers; nothing is drawn for one that starts at zero."""
    if not std:
        return nn.Parameter(torch.zeros(size))
    return nn.Parameter(torch.randn(size, generator=generator) * std)


def _rotation(shape: Shape) -> Tensor:
    """Cosine and sine of the rotary angles, shape (context, head width / 2, 2).

    Of length head_width^-1/4: turning queries and keys also scales their products.
    """
    width, base = shape.head_width, shape.architecture.rotary_base
    frequencies = base ** (-torch.arange(0, width, 2).float() / width)
    angles = torch.arange(shape.context).float()[:, None] * frequencies
    return torch.view_as_real(torch.polar(torch.full_like(angles, width**-0.25), angles))
