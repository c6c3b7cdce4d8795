"""A model whose parameters, gradients and optimiser state are shared out over ranks: FSDP2.

For models that do not fit on one GPU, nor a few times in a node's main memory. Torch gathers a
block's weights when it is their turn; what is here is the optimiser over the shards. Its state is
written and read whole by the first rank, in the format of `trainers.optimizer`, so that a training
goes on with any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trainers.memory import Passes
from trainers.optimizer import Layout, adamw_step, muon_update, orthogonalises_in_bf16
from trainers.passes import ComputeBlock, prepared
from trainers.ranks import Ranks
from trainers.shape import Shape
from trainers.transformer import Block, Transformer
from trainers.trial import Hyperparameters


def sharded_model(
    shape: Shape,
    seed: int,
    hyperparameters: Hyperparameters,
    device: torch.device,
    ranks: Ranks,
    passes: Passes,
    compute: ComputeBlock | None = None,
) -> Transformer:
    """The same model as of one rank, of which this rank has its shards, on the device.

    Drawn in main memory and shared out block by block: beyond the shards no more than one block, or
    the embedding and the head, are anywhere at once, which is less than training takes.
    """
    half = hyperparameters.precision == "bf16"
    share = partial(
        fully_shard,
        mesh=init_device_mesh(device.type, (ranks.count,)),
        mp_policy=MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32
        ),
    )

    def placed(block: Block) -> Block:
        share(prepared(block, passes, compute))
        return block

    model = Transformer(shape, seed, placed)
    share(model)
    return model


class ShardedOptimizer:
    """As `trainers.optimizer.Optimizer`, of a `sharded_model`, each rank for its shards."""

    def __init__(self, model: Transformer, hyperparameters: Hyperparameters, ranks: Ranks) -> None:
        self._h, self._ranks, self._model = hyperparameters, ranks, model
        self._layout = Layout(model)
        self._parameters: list[Any] = list(self._layout.parameters)
        """DTensors, which torch does not type."""
        self._mesh = self._parameters[0].device_mesh
        self._rates = self._layout.rates(hyperparameters)
        self._first = [torch.zeros_like(p) for p in self._parameters]
        self._second = [torch.zeros_like(p) for p in self._parameters]
        self._steps = torch.zeros((), device=model.embedding.device)
        self._half = orthogonalises_in_bf16(model.embedding.device, hyperparameters)
        sizes = {i: p.numel() for i, p in enumerate(self._parameters) if self._rates[i][1]}
        self._dealt = dealt(sizes, ranks.count)
        """The rank that orthogonalises each of Muon's parameters."""

    @torch.no_grad()
    def step(self, schedule: float) -> None:
        """See `Optimizer.step`."""
        # FSDP gives the mean over ranks of what each has of the batch's mean: their sum is wanted.
        gradients = [_local(p.grad).mul_(self._ranks.count) for p in self._parameters]
        squares = torch.stack([g.square().sum() for g in gradients]).sum()
        norm = self._ranks.sum_(squares).sqrt()
        factor = (self._h.clip / (norm + 1e-12)).clamp(max=1.0)
        self._steps += 1
        directions = {}
        for i, (p, gradient) in enumerate(zip(self._parameters, gradients, strict=True)):
            gradient.mul_(factor)
            rate, muon = self._rates[i]
            if muon:
                momentum = _local(self._first[i])
                momentum.lerp_(gradient, 1 - self._h.momentum)
                directions[i] = gradient.lerp_(momentum, self._h.momentum)  # Nesterov
            else:
                moments = _local(self._first[i]), _local(self._second[i])
                adamw_step(_local(p), gradient, *moments, self._steps, rate * schedule, self._h)
            p.grad = None
        self._muon_step(directions, schedule)

    def _muon_step(self, directions: Mapping[int, Tensor], schedule: float) -> None:
        """Orthogonalise each matrix whole, on the rank that it is dealt to; others get their rows.

        A rank has no more whole matrices at once than its part of all, and one more.
        """
        rank, own = self._ranks.rank, {}
        for i, direction in directions.items():
            whole = _whole(self._parameters[i], direction)
            if self._dealt[i] == rank:
                own[i] = whole
            del whole
        for i, whole in own.items():  # all ranks at once: there is no message in between
            own[i] = muon_update(whole, self._layout.rows(i), half=self._half)
        for i in directions:
            p = self._parameters[i]
            update = own.pop(i) if i in own else _local(p).new_empty(p.shape)
            shares = distribute_tensor(
                update, self._mesh, p.placements, src_data_rank=self._dealt[i]
            )
            _local(p).add_(_local(shares), alpha=-self._rates[i][0] * schedule)

    def before_pass(self, meet: bool) -> None:
        """Have ranks sum the gradients of this pass, with those that each kept of earlier ones."""
        cast(FSDPModule, self._model).set_requires_gradient_sync(meet)

    def collect(self) -> None:
        """Torch sums shards in fp32 already."""

    def discard(self) -> None:
        """See `Optimizer.discard`: of a pass in which ranks met, which leaves them shards alone."""
        for p in self._parameters:
            p.grad = None

    def model_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Optimizer.model_weights`: gathered one by one, so every rank must go through it."""
        dtype = torch.bfloat16 if self._h.precision == "bf16" else torch.float32
        for name, parameter in zip(self._layout.names, self._parameters, strict=True):
            yield name, _whole(parameter, _local(parameter.detach())).to(dtype)

    def state(self) -> dict[str, Tensor]:
        """See `Optimizer.state`: each rank has its shards."""
        shards = {
            name: torch.cat([_local(tensor.detach()).reshape(-1).cpu() for tensor in tensors])
            for name, tensors in self._state().items()
        }
        return shards | {"steps": self._steps.cpu().clone()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See `Optimizer.restore`."""
        for name, tensors in self._state().items():
            shards = map(_local, tensors)
            for shard, kept in zip(shards, _cut(state[name], tensors), strict=True):
                shard.copy_(kept)
        self._steps.copy_(state["steps"])
        # An evaluation leaves embedding and head gathered, and the next pass would take those.
        cast(FSDPModule, self._model).reshard()

    @torch.no_grad()
    def gathered(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Optimizer.gathered`: one tensor after another, so every rank must call it."""
        found: dict[str, Tensor] = {}
        for name, tensors in self._state().items():
            first = self._ranks.rank == 0
            together = torch.empty(sum(t.numel() for t in tensors)) if first else None
            start = 0
            for tensor, kept in zip(tensors, _cut(state[name], tensors), strict=True):
                whole = _whole(tensor, kept.to(self._steps.device))
                if together is not None:
                    together[start : start + tensor.numel()] = whole.reshape(-1)
                start += tensor.numel()
            if together is not None:
                found[name] = together
        return found | {"steps": state["steps"]} if found else {}

    @torch.no_grad()
    def scattered(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Optimizer.scattered`: so every rank must call it."""
        found, device = {}, self._steps.device
        for name, tensors in self._state().items():
            shards, start = [], 0
            for tensor in tensors:
                if self._ranks.rank == 0:
                    part = state[name][start : start + tensor.numel()].to(device)
                else:
                    part = torch.empty(tensor.numel(), device=device)
                start += tensor.numel()
                own = distribute_tensor(part.view(tensor.shape), self._mesh, tensor.placements)
                shards.append(_local(own).reshape(-1).cpu())
            found[name] = torch.cat(shards)
        steps = self._ranks.from_first(float(state.get("steps", self._steps)))
        return found | {"steps": torch.tensor(steps)}

    def _state(self) -> dict[str, list[Any]]:
        return {"weights": self._parameters, "first": self._first, "second": self._second}


def dealt(sizes: Mapping[int, float], ranks: int) -> dict[int, int]:
    """Which rank does each piece of work: the largest first, to whom has least so far.

    >>> dealt({0: 3.0, 1: 1.0, 2: 3.0, 3: 1.0}, 2)
    {0: 0, 2: 1, 1: 0, 3: 1}
    """
    loads, found = [0.0] * ranks, {}
    for i in sorted(sizes, key=lambda i: -sizes[i]):
        found[i] = loads.index(min(loads))
        loads[found[i]] += sizes[i]
    return found


def _local(tensor: Any) -> Tensor:
    """The shard of this rank, in place."""
    shard: Tensor = tensor.to_local()
    return shard


def _cut(flat: Tensor, tensors: Sequence[Any]) -> list[Tensor]:
    """The shards of this rank that lie one after another in `flat`."""
    shapes = [_local(tensor).shape for tensor in tensors]
    parts = torch.split(flat, [shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


@torch.no_grad()
def _whole(like: Any, shard: Tensor) -> Tensor:
    """The tensor of which every rank has a shard, shared out as `like` is."""
    whole: Tensor = DTensor.from_local(
        shard,
        like.device_mesh,
        like.placements,
        shape=like.shape,
        stride=like.stride(),
        run_check=False,
    ).full_tensor()
    return whole
