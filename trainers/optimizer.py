"""Muon for block matrices beside fused AdamW, over flat buffers.

The model's parameters are re-pointed into one contiguous buffer, its gradients into another: then
the global norm is one kernel, AdamW runs over whole groups, and all matrices of one shape are
orthogonalised in one batched product, 1.2 to 2 times faster at these sizes than one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainers.transformer import Block, Transformer
from trainers.trial import Hyperparameters

MOMENTUM = 0.9
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Jordan et al. (2024), Muon: the quintic that inflates small singular values fastest."""
MLP_RATE = 2.0
"""sqrt(rows / columns) of the feed-forward matrices, Muon's own scale for matrices that are not
square."""


class Optimizer:
    """One training run's optimiser: owns the flat buffers, clips, steps, clears gradients."""

    def __init__(self, model: Transformer, hyperparameters: Hyperparameters) -> None:
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        square = [p for block in blocks for p in (block.qkv, block.attention_out)]
        tall = [p for block in blocks for p in (block.up, block.down)]
        self._h = hyperparameters
        self._width = model.shape.width
        ordered = [*square, *tall, model.embedding, model.head]
        self.weights, self.gradients = _flatten(ordered)
        ends = _ends([square, tall, [model.embedding], [model.head]])
        self._square, self._tall = slice(0, ends[0]), slice(ends[0], ends[1])
        self._matrices = slice(0, ends[1])
        groups = [
            {"params": [self._view(ends[1], ends[2])], "peak": hyperparameters.embedding_rate},
            {"params": [self._view(ends[2], ends[3])], "peak": hyperparameters.head_rate},
        ]
        if hyperparameters.optimizer == "muon":
            self._momentum = torch.zeros_like(self.weights[self._matrices])
        else:
            peak = hyperparameters.matrix_rate
            groups.append({"params": [self._view(0, ends[1])], "peak": peak})
        self._adamw = torch.optim.AdamW(
            groups,
            betas=(hyperparameters.beta1, hyperparameters.beta2),
            eps=hyperparameters.epsilon,
            weight_decay=hyperparameters.weight_decay,
            fused=True,
        )

    @torch.no_grad()
    def step(self, schedule: float) -> None:
        """Apply the gradients at `schedule` times the peak rates, then clear them."""
        gradient = self.gradients
        gradient.mul_((self._h.clip / (gradient.norm() + 1e-12)).clamp(max=1.0))
        for group in self._adamw.param_groups:
            group["lr"] = group["peak"] * schedule
        self._adamw.step()
        if self._h.optimizer == "muon":
            self._muon_step(self._h.matrix_rate * schedule)
        gradient.zero_()

    def _muon_step(self, rate: float) -> None:
        gradient = self.gradients[self._matrices]
        self._momentum.lerp_(gradient, 1 - MOMENTUM)
        update = gradient.lerp(self._momentum, MOMENTUM)  # Nesterov
        d = self._width
        for part, rows, factor in ((self._square, d, 1.0), (self._tall, 4 * d, MLP_RATE)):
            matrices = update[part].view(-1, rows, d)
            self.weights[part].view(-1, rows, d).add_(
                orthogonalised(matrices), alpha=-rate * factor
            )

    def _view(self, start: int, end: int) -> nn.Parameter:
        parameter = nn.Parameter(self.weights[start:end])
        parameter.grad = self.gradients[start:end]
        return parameter


def orthogonalised(matrices: Tensor) -> Tensor:
    """Replace each matrix of a batch by nearly its closest orthogonal one.

    Parameters
    ----------
    matrices
        Shape (n, rows, columns) with rows >= columns. Singular values above 1% of the Frobenius
        norm end in about [0.7, 1.2]; smaller ones grow 480-fold.
    """
    linear, cubic, quintic = NEWTON_SCHULZ
    x: Tensor = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-12)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x.mT, x)
        gram = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
        x = torch.baddbmm(x, x, gram, beta=linear)
    return x


def _flatten(parameters: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
    """Move parameters and their gradients into two contiguous buffers, in the given order."""
    weights = torch.cat([p.detach().reshape(-1) for p in parameters])
    gradients = torch.zeros_like(weights)
    start = 0
    for p in parameters:
        end = start + p.numel()
        p.data = weights[start:end].view(p.shape)
        p.grad = gradients[start:end].view(p.shape)
        start = end
    return weights, gradients


def _ends(groups: Sequence[Sequence[nn.Parameter]]) -> list[int]:
    sizes = [sum(math.prod(p.shape) for p in group) for group in groups]
    return [sum(sizes[: i + 1]) for i in range(len(sizes))]
