"""Muon for block matrices beside fused AdamW, over flat buffers.

The model's parameters are re-pointed into one contiguous buffer, and gradients are gathered in
another: then the global norm is one kernel, ranks sum their gradients in one message, AdamW runs
over whole groups, and all matrices of one shape are orthogonalised in one batched product, 1.2 to 4
times faster than one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainers.ranks import Ranks
from trainers.shape import Shape
from trainers.transformer import Block, Transformer
from trainers.trial import Hyperparameters

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Jordan et al. (2024), Muon: the quintic that inflates small singular values fastest."""


class Layout:
    """In which order parameters lie in a checkpoint, and what each is to an optimiser."""

    def __init__(self, model: Transformer) -> None:
        blocks = [block for block in model.blocks if isinstance(block, Block)]
        self.groups: list[list[nn.Parameter]] = [
            [p for block in blocks for p in (block.qkv, block.attention_out)],
            [p for block in blocks for p in (block.up, block.down)],
            [model.embedding],
            [] if model.head is None else [model.head],
        ]
        """Attention's matrices, those of the feed-forward layers, embedding, untied head."""
        self.parameters = [p for group in self.groups for p in group]
        known = {id(p): name for name, p in model.named_parameters()}
        self.names = [known[id(p)] for p in self.parameters]
        """In the model."""
        self._shape = model.shape

    def rates(self, h: Hyperparameters) -> list[tuple[float, bool]]:
        """Peak rate of each parameter, and whether it is Muon's."""
        muon = h.optimizer == "muon"
        matrix, embedding, head = (
            (h.matrix_rate, muon),
            (h.embedding_rate, False),
            (h.head_rate, False),
        )
        peaks = (matrix, matrix, embedding, head)
        return [peak for peak, group in zip(peaks, self.groups, strict=True) for _ in group]

    def rows(self, index: int) -> list[int]:
        """Rows of the matrices that a block's parameter is made of, such as queries and keys."""
        shape, p = self._shape, self.parameters[index]
        if any(p is other for other in self.groups[0]):
            whole = p.shape[0] > shape.width
            keys = shape.key_width
            return [shape.width, keys, keys] if whole else [shape.width]
        return [shape.hidden] * (p.shape[0] // shape.hidden)


class Optimizer:
    """One training run's optimiser: owns the flat buffers, clips, steps, clears gradients.

    Weights, gradients and moments are fp32. In bf16 the model has a rounded copy of the weights,
    renewed every step, and gradients of several passes are summed in fp32.
    """

    def __init__(
        self,
        model: Transformer,
        hyperparameters: Hyperparameters,
        ranks: Ranks = Ranks(),  # noqa: B008 - a value
    ) -> None:
        self._h, self._ranks = hyperparameters, ranks
        h, layout = hyperparameters, Layout(model)
        self._parameters, self._names = layout.parameters, layout.names
        self.weights = _flat(self._parameters)
        self._rounded = self.weights.bfloat16() if h.precision == "bf16" else None
        _point(self._parameters, self.weights if self._rounded is None else self._rounded)
        self._gradients, self._first, self._second = torch.zeros(
            3, len(self.weights), device=self.weights.device
        )
        ends = _ends(layout.groups)
        self._matrices = slice(0, ends[1])
        self._kinds = _kinds(model.shape, ends[0])
        self._adamw = [(slice(ends[1], ends[2]), h.embedding_rate)]
        if model.head is not None:
            self._adamw.append((slice(ends[2], ends[3]), h.head_rate))
        if h.optimizer == "adamw":
            self._adamw.append((self._matrices, h.matrix_rate))
        self._steps = torch.zeros((), device=self.weights.device)
        self._half = orthogonalises_in_bf16(self.weights.device, h)

    @torch.no_grad()
    def step(self, schedule: float) -> None:
        """Apply the gradients at `schedule` times the peak rates, then clear them."""
        gradient = self._gradients
        if self._rounded is None:
            torch.cat(self._parts(), out=gradient)
        self._ranks.sum_(gradient)
        gradient.mul_((self._h.clip / (gradient.norm() + 1e-12)).clamp(max=1.0))
        self._steps += 1
        for part, peak in self._adamw:
            self._adamw_step(part, peak * schedule)
        if self._h.optimizer == "muon":
            self._muon_step(self._h.matrix_rate * schedule)
        self._clear()

    @torch.no_grad()
    def collect(self) -> None:
        """Take a pass's gradients from the parameters, where sums of them would be rounded."""
        if self._rounded is not None:
            self._gradients += torch.cat(self._parts())
            self._drop()

    def before_pass(self, meet: bool) -> None:
        """Do nothing: ranks that have the whole model sum their gradients once a step."""

    def discard(self) -> None:
        """Forget the gradients of passes since the last step."""
        self._drop()
        if self._rounded is not None:
            self._gradients.zero_()

    def model_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every matrix by its name, as the model computes with it."""
        yield from zip(self._names, self._parameters, strict=True)

    def _parts(self) -> list[Tensor]:
        return [p.grad.view(-1) for p in self._parameters if p.grad is not None]

    def _drop(self) -> None:
        for p in self._parameters:
            p.grad = None

    def _clear(self) -> None:
        """After a step: nothing of its gradients is left, and the model has the new weights."""
        self.discard()
        if self._rounded is not None:
            self._rounded.copy_(self.weights)

    def state(self) -> dict[str, Tensor]:
        """Weights, moments and step count: copies in main memory, all that a checkpoint needs.

        Of several ranks the first alone has them, and the others nothing.
        """
        if self._ranks.rank > 0:
            return {}
        return {
            # Copied also where they are there already: moments are views of one larger buffer,
            # and torch.save would write all of it.
            name: torch.empty_like(tensor, device="cpu").copy_(tensor)
            for name, tensor in self._state().items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` gave. The buffers stay where they are in memory."""
        for name, tensor in self._state().items():
            if state:
                tensor.copy_(state[name])
            self._ranks.copy_first_(tensor)
        self._clear()

    def gathered(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What every rank's `state` is together, on the first one; nothing on the others."""
        return state

    def scattered(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Each rank's part of what `gathered` gave the first one: what `restore` takes."""
        return state

    def _state(self) -> dict[str, Tensor]:
        return {
            "weights": self.weights,
            "first": self._first,
            "second": self._second,
            "steps": self._steps,
        }

    def _adamw_step(self, part: slice, rate: float) -> None:
        moments = self._first[part], self._second[part]
        adamw_step(self.weights[part], self._gradients[part], *moments, self._steps, rate, self._h)

    def _muon_step(self, rate: float) -> None:
        gradient, momentum = self._gradients[self._matrices], self._first[self._matrices]
        momentum.lerp_(gradient, 1 - self._h.momentum)
        update = gradient.lerp_(momentum, self._h.momentum)  # Nesterov
        for kind in self._kinds:
            weights, direction = kind.of(self.weights), kind.of(update)
            own = _dealt(kind.count, self._ranks)
            _orthogonal_step(weights[own], direction[own], rate, half=self._half)
            if self._ranks.count > 1:
                self._gather_(weights, own)

    def _gather_(self, matrices: Tensor, own: slice) -> None:
        """Give every rank the matrices of the others, each of which has changed its `own`."""
        most = math.ceil(len(matrices) / self._ranks.count)
        part = matrices.new_zeros((most, *matrices.shape[1:]))
        part[: own.stop - own.start] = matrices[own]
        matrices.copy_(self._ranks.gathered(part)[: len(matrices)])


def _dealt(count: int, ranks: Ranks) -> slice:
    """Which of so many matrices of one shape are this rank's to orthogonalise."""
    most = math.ceil(count / ranks.count)
    return slice(min(count, ranks.rank * most), min(count, (ranks.rank + 1) * most))


def _orthogonal_step(weights: Tensor, direction: Tensor, rate: float, *, half: bool) -> None:
    """Muon's step of matrices of one shape, in place, shape (n, rows, columns)."""
    if not len(weights):
        return
    if weights.shape[1] < weights.shape[2]:
        weights, direction = weights.mT, direction.mT
    rows, columns = weights.shape[1:]
    scale = -rate * math.sqrt(rows / columns)
    if half:
        weights.add_(orthogonalised(direction, half=True), alpha=scale)
    else:
        weights.baddbmm_(*_orthogonal_factors(direction), alpha=scale)


def adamw_step(
    weights: Tensor,
    gradients: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
    rate: float,
    h: Hyperparameters,
) -> None:
    """The kernel of torch.optim.AdamW, without the 0.05 ms of bookkeeping around it."""
    torch._fused_adamw_(
        [weights],
        [gradients],
        [first],
        [second],
        [],
        [steps],
        lr=rate,
        beta1=h.beta1,
        beta2=h.beta2,
        weight_decay=h.weight_decay,
        eps=h.epsilon,
        amsgrad=False,
        maximize=False,
    )


def muon_update(direction: Tensor, rows: Sequence[int], *, half: bool = False) -> Tensor:
    """Muon's update at rate 1 of one parameter, made of matrices of so many rows each."""
    updates = []
    for matrix in torch.split(direction, list(rows)):
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()
        update = orthogonalised(tall[None], half=half)[0].to(direction.dtype)
        update *= math.sqrt(tall.shape[0] / tall.shape[1])
        updates.append(update if tall is matrix else update.t())
    return torch.cat(updates)


@dataclass(frozen=True)
class _Kind:
    """Matrices of one shape in the flat buffer: `count` of them, `stride` apart."""

    start: int
    stride: int
    count: int
    rows: int
    columns: int

    def of(self, buffer: Tensor) -> Tensor:
        """A view of them, shape (count, rows, columns)."""
        strides = (self.stride, self.columns, 1)
        return buffer.as_strided(
            (self.count, self.rows, self.columns), strides, buffer.storage_offset() + self.start
        )


def _kinds(shape: Shape, attention_end: int) -> list[_Kind]:
    """The block matrices by shape, queries, keys and values apart, gates too.

    Kinds that lie together in the buffer are one: with as many keys as queries there are two.
    """
    d, keys, hidden = shape.width, shape.key_width, shape.hidden
    ups = 2 if shape.architecture.feed_forward == "swiglu" else 1
    kinds: list[_Kind] = []
    for start, rows in ((0, [d, keys, keys, d]), (attention_end, [hidden] * (ups + 1))):
        chunk = sum(rows) * d
        if len(set(rows)) == 1:
            count = len(rows) * shape.depth
            kinds.append(_Kind(start, rows[0] * d, count, rows[0], d))
            continue
        at = start
        for n in rows:
            kinds.append(_Kind(at, chunk, shape.depth, n, d))
            at += n * d
    return kinds


def orthogonalised(matrices: Tensor, *, half: bool = False) -> Tensor:
    """Replace each matrix of a batch by nearly its closest orthogonal one.

    Parameters
    ----------
    matrices
        Shape (n, rows, columns) with rows >= columns. Singular values above 1% of the Frobenius
        norm end in about [0.7, 1.2]; smaller ones grow 480-fold.
    half
        Whether in bf16, and so the result.
    """
    if half:
        return _orthogonalised_in_bf16(matrices)
    return torch.bmm(*_orthogonal_factors(matrices))


def orthogonalises_in_bf16(device: torch.device, h: Hyperparameters) -> bool:
    """Whether Newton-Schulz is computed in bf16: on a GPU, where the products of the model are.

    A GPU does it 15 times as fast as in fp32, where it would take longer than the model. Of a model
    in fp32 it takes the same part of a step in fp32.
    """
    return device.type == "cuda" and h.precision == "bf16"


def _orthogonalised_in_bf16(matrices: Tensor) -> Tensor:
    """`orthogonalised` as Jordan et al. (2024) compute it: 1% of an update's norm is rounding.

    At a condition number of 1e4 it is 9%, for torch's Muon 11%.

    The long way, on X itself. Along the shorter one of `_orthogonal_factors` rounding would make
    small eigenvalues of G negative, which each step takes further away.
    """
    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    x = (matrices / (norm + 1e-12)).bfloat16()
    linear, cubic, quintic = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x.mT, x)
        gram = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
        x = torch.baddbmm(x, x, gram, beta=linear)
    orthogonal: Tensor = x
    return orthogonal


def _orthogonal_factors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches whose product is `orthogonalised`, so that a caller can fuse that product.

    Newton-Schulz is X <- X P with P = a + b G + c G^2 and G = X^T X. For a tall X the product of
    the P is carried along instead, and G <- P G P: 25 products of columns^3 instead of 45 at 4 x as
    many rows as columns. That costs accuracy, up to 5e-4 of the update's norm at condition numbers
    to 1e8 (9e-6 the long way; torch's Muon, in bfloat16, 4e-2).
    """
    gram = torch.bmm(x.mT, x)
    squared_norm = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] + 1e-24
    gram /= squared_norm
    polynomial = _polynomial(gram)
    right = polynomial * squared_norm.rsqrt()
    for _ in range(NEWTON_SCHULZ_STEPS - 1):
        if x.shape[1] > x.shape[2]:
            gram = torch.bmm(torch.bmm(gram, polynomial), polynomial)
            polynomial = _polynomial(gram)
            right = torch.bmm(right, polynomial)
        else:
            x = torch.bmm(x, right)
            right = _polynomial(torch.bmm(x.mT, x))
    return x, right


def _polynomial(gram: Tensor) -> Tensor:
    linear, cubic, quintic = NEWTON_SCHULZ
    polynomial = torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic)
    polynomial.diagonal(dim1=1, dim2=2).add_(linear)
    return polynomial


def _flat(parameters: Sequence[nn.Parameter]) -> Tensor:
    """All parameters in one contiguous buffer, in the given order."""
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def _point(parameters: Sequence[nn.Parameter], buffer: Tensor) -> None:
    """Make the parameters views of their parts of a buffer."""
    start = 0
    for p in parameters:
        end = start + p.numel()
        p.data = buffer[start:end].view(p.shape)
        start = end


def _ends(groups: Sequence[Sequence[nn.Parameter]]) -> list[int]:
    sizes = [sum(math.prod(p.shape) for p in group) for group in groups]
    return [sum(sizes[: i + 1]) for i in range(len(sizes))]
