"""The processes that train one trial together, and what they tell each other.

As `cluster.gang` sets their environment, where each sees its own GPU alone. Each has the whole
model and an even share of every batch: data parallelism, with one message a step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")

PATIENCE = timedelta(days=30)
"""Of a process that waits for the others, while the first one waits for the storage: torch's 10 and
30 minutes would end them all. Who hangs is noticed by the leader's watchdog, who dies by Ray."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is."""

    rank: int = 0
    count: int = 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up everybody's tensor, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def gathered(self, tensor: Tensor) -> Tensor:
        """Everybody's tensors of one shape, in the order of ranks, one after another."""
        if self.count == 1:
            return tensor
        every = tensor.new_empty((self.count * len(tensor), *tensor.shape[1:]))
        dist.all_gather_into_tensor(every, tensor.contiguous())
        return every

    def copy_first_(self, tensor: Tensor) -> Tensor:
        """Give everybody the first rank's tensor, in place."""
        if self.count > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def least(self, number: float) -> float:
        """The smallest of everybody's numbers."""
        if self.count == 1:
            return number
        found = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return found.item()

    def from_first(self, value: Value) -> Value:
        """The first rank's value, everywhere."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Meet the other processes, if there are any, and part from them at the end."""
    count = int(os.environ.get("WORLD_SIZE") or 1)
    if count == 1:
        yield Ranks()
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), count)
    finally:
        dist.destroy_process_group()
