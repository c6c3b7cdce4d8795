"""The loss of an output head without the logits of all tokens at once.

Kept whole, those of a pass over a vocabulary of 50,000 would take more memory than all else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainers.flops import CHUNK_LOGITS


def head_loss(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of hidden @ head, nats/token.

    Parameters
    ----------
    hidden
        Shape (tokens, width).
    head
        Shape (width, vocabulary).
    targets
        Shape (tokens,).
    """
    # Torch leaves apply() of an autograd Function untyped.
    loss: Tensor = _HeadLoss.apply(hidden, head, targets)  # type: ignore[no-untyped-call]
    return loss


class _HeadLoss(torch.autograd.Function):
    """Takes the gradients in the forward pass, where the probabilities are.

    So backward needs no second exponential and no zero-filled buffer: at vocabulary 256 and width
    24 the head is a third of the step.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        total, *gradients = sum_and_gradients(hidden, head, targets, wanted)
        if wanted:
            ctx.save_for_backward(*gradients)
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None]:
        hidden_grad, head_grad = ctx.saved_tensors
        scale = grads[0] / len(hidden_grad)
        return hidden_grad * scale, head_grad * scale, None


def sum_and_gradients(
    hidden: Tensor, head: Tensor, targets: Tensor, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the losses with its gradients by `hidden` and `head`, where they are wanted."""
    count = max(1, CHUNK_LOGITS // head.shape[1])
    total, hidden_grad, head_grad = _chunk(hidden[:count], head, targets[:count], wanted)
    if len(targets) <= count:
        return total, hidden_grad, head_grad
    if wanted:
        hidden_grad = torch.cat([hidden_grad, torch.empty_like(hidden[count:])])
        head_grad = head_grad.float()  # in bf16 the error would grow with the number of chunks
    for start in range(count, len(targets), count):
        end = start + count
        more = _chunk(hidden[start:end], head, targets[start:end], wanted)
        total += more[0]
        if wanted:
            hidden_grad[start:end] = more[1]
            head_grad += more[2]
    return total, hidden_grad, head_grad.to(head.dtype)


def _chunk(
    hidden: Tensor, head: Tensor, targets: Tensor, wanted: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of some tokens' losses, and its gradients, empty unless they are wanted."""
    index = targets[:, None]
    probabilities = torch.softmax(hidden @ head, 1, dtype=torch.float32)
    chosen = probabilities.gather(1, index)
    # The clamp keeps a hopeless token's loss finite; its gradient is exact all the same.
    total = -chosen.clamp_min(1e-30).log().sum()
    if not wanted:
        return total, hidden[:0], head[:0]
    logits_grad = probabilities.scatter_(1, index, chosen - 1).to(hidden.dtype)
    return total, logits_grad @ head.t(), (hidden.t() @ logits_grad).to(head.dtype)
