"""The loss of an output head without the logits of all tokens at once.

Kept whole, those of a pass over a vocabulary of 50,000 would take more memory than all else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.flops import ALIGNED_SYMBOLS, CHUNK_LOGITS

ChunkLoss = Callable[[Tensor, Tensor, Tensor, int, bool], tuple[Tensor, Tensor, Tensor]]
"""See `chunk_loss`."""


def head_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    counted: int | None = None,
    chunk: ChunkLoss | None = None,
) -> Tensor:
    """Mean cross-entropy of hidden @ head, nats/token.

    Parameters
    ----------
    hidden
        Shape (tokens, width).
    head
        Shape (width, vocabulary).
    targets
        Shape (tokens,).
    counted
        How many of the tokens, the first ones, have a part in it; all by default.
    chunk
        `chunk_loss`, or that as it was compiled.
    """
    number = len(targets) if counted is None else counted
    # Torch leaves apply() of an autograd Function untyped.
    loss: Tensor = _HeadLoss.apply(hidden, head, targets, number, chunk or chunk_loss)  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    """Takes the gradients in the forward pass, where the probabilities are.

    So backward needs no second exponential and no zero-filled buffer: at vocabulary 256 and width
    24 the head is a third of the step.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, counted: int, chunk: ChunkLoss
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        # Compiled code is for inputs that need a gradient, or for such that do not.
        hidden, head = hidden.detach(), head.detach()
        if counted < len(targets):  # zeros, which have no part in the head's gradient
            hidden = torch.cat([hidden[:counted], torch.zeros_like(hidden[counted:])])
        total, *gradients = sum_and_gradients(hidden, head, targets, wanted, counted, chunk)
        if wanted:
            ctx.save_for_backward(*gradients)
            ctx.counted = counted
        return total / max(1, counted)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_grad, head_grad = ctx.saved_tensors
        scale = grads[0] / max(1, ctx.counted)
        hidden_grad = hidden_grad * scale
        hidden_grad[ctx.counted :] = 0
        return hidden_grad, head_grad * scale, None, None, None


def sum_and_gradients(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    wanted: bool,
    counted: int | None = None,
    chunk: ChunkLoss | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the first losses with its gradients by `hidden` and `head`, where wanted.

    Of tokens that do not count `hidden` is zero.
    """
    symbols, chunk = head.shape[1], chunk or chunk_loss
    end = len(targets) if counted is None else counted
    head = _aligned(hidden, head)
    count = _chunk_tokens(hidden, head.shape[1])
    losses, hidden_grad, head_grad = chunk(hidden[:count], head, targets[:count], symbols, wanted)
    total = losses[:end].sum()
    if len(targets) > count:
        if wanted:
            hidden_grad = torch.cat([hidden_grad, torch.empty_like(hidden[count:])])
            head_grad = head_grad.float()  # in bf16 the error would grow with the number of chunks
        for start in range(count, len(targets), count):
            part = slice(start, start + count)
            more = chunk(hidden[part], head, targets[part], symbols, wanted)
            total += more[0][: max(0, end - start)].sum()
            if wanted:
                hidden_grad[part] = more[1]
                head_grad += more[2]
    return total, hidden_grad, head_grad[:, :symbols].to(head.dtype)


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every token of hidden @ head, nats, shape (tokens,); without gradients."""
    if not _on_gpu(hidden):
        return F.cross_entropy((hidden @ head).float(), targets, reduction="none")
    symbols, head = head.shape[1], _aligned(hidden, head)
    found, count = [], _chunk_tokens(hidden, head.shape[1])
    for part in range(0, len(targets), count):
        logits = _logits(hidden[part : part + count], head, symbols).float()
        found.append(F.cross_entropy(logits, targets[part : part + count], reduction="none"))
    return torch.cat(found)


def chunk_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, symbols: int, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of some tokens, shape (tokens, 1), and their sum's gradients, empty unless wanted.

    Columns of the head from `symbols` on are no symbols: nothing is likely to be one.
    """
    index = targets[:, None]
    probabilities = torch.softmax(_logits(hidden, head, symbols), 1, dtype=torch.float32)
    chosen = probabilities.gather(1, index)
    # The clamp keeps a hopeless token's loss finite; its gradient is exact all the same.
    losses = -chosen.clamp_min(1e-30).log()
    if not wanted:
        return losses, hidden[:0], head[:0]
    logits_grad = probabilities.scatter_(1, index, chosen - 1).to(hidden.dtype)
    return losses, logits_grad @ head.t(), (hidden.t() @ logits_grad).to(head.dtype)


def _logits(hidden: Tensor, head: Tensor, symbols: int) -> Tensor:
    logits = hidden @ head
    if symbols < head.shape[1]:
        logits[:, symbols:] = -torch.inf
    return logits


def _on_gpu(hidden: Tensor) -> bool:
    """Whether tables and chunks are laid out for a GPU; a core's results would be other bits."""
    return hidden.is_cuda


def _aligned(hidden: Tensor, head: Tensor) -> Tensor:
    """The head with columns of zeros up to a multiple of `ALIGNED_SYMBOLS`, on a GPU.

    A copy, made again in every pass: parameters, their count and what is exported are without. At
    50,257 symbols it takes a fiftieth of the time of the products with it.
    """
    lacking = -head.shape[1] % ALIGNED_SYMBOLS
    return F.pad(head, (0, lacking)) if lacking and _on_gpu(hidden) else head


def _chunk_tokens(hidden: Tensor, columns: int) -> int:
    """Tokens of a chunk: as many as `CHUNK_LOGITS` allow.

    On a GPU fewer where all chunks are as long then, since each length is compiled apart.
    """
    tokens, most = len(hidden), max(1, CHUNK_LOGITS // columns)
    if tokens <= most or not _on_gpu(hidden):
        return most
    chunks = -(-tokens // most)
    even = (tokens // n for n in range(chunks, 2 * chunks + 1) if tokens % n == 0)
    return next(even, most)
