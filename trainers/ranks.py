"""The processes that train one trial together, and what they tell each other.

As `cluster.gang` sets their environment, where each sees its own GPU alone. Each has the whole
model and an even share of every batch: data parallelism, with one message a step. What they tell
each other is numbers and JSON, never pickled objects: whoever reaches a rank's port could send it
code otherwise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from trainers.rendezvous import meet

PATIENCE = timedelta(days=30)
"""How long a process waits for the others in training, while the first one waits for the storage:
torch's 10 and 30 minutes would end them all. Who hangs is noticed by the leader's watchdog, who
dies by Ray. To meet at first they have `trainers.rendezvous.RENDEZVOUS_SECONDS`."""


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

    def from_first(self, value: Any) -> Any:
        """Return the first rank's value, everywhere, as JSON gives it back."""
        if self.count == 1:
            return value
        text = json.dumps(value).encode() if self.rank == 0 else b""
        length = int(self.copy_first_(torch.tensor(len(text))))
        data = torch.frombuffer(bytearray(text.ljust(length)), dtype=torch.uint8)
        return json.loads(self.copy_first_(data).numpy().tobytes())


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Meet the other processes, if there are any, and part from them at a clean end.

    After an error, or where the caller stops early, the process stays in the group and has to end:
    with NCCL a rank that leaves waits for all others to leave, and those may wait for it, so that
    its error would be heard by nobody.

    Raises
    ------
    RendezvousError
        If they do not meet.
    """
    count = int(os.environ.get("WORLD_SIZE") or 1)
    if count == 1:
        yield Ranks()
        return
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    rank = int(os.environ["RANK"])
    store = PrefixStore("training", meet())
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=PATIENCE)
    yield Ranks(rank, count)
    dist.destroy_process_group()
