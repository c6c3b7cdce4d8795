"""A trial's model with its optimiser, on this device, alone or together with other ranks.

What a step is, a loss and a state; when there is one is the business of `trainers.pretrain`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainers.corpus import HeldoutWindows
from trainers.evaluation import evaluate
from trainers.flops import params
from trainers.optimizer import Optimizer
from trainers.passes import accumulate, passes_on, prepared
from trainers.ranks import Ranks
from trainers.transformer import Transformer
from trainers.trial import Trial

SHARED_BYTES = 20
"""Of a parameter that every rank has whole: weight, its rounded copy, gradients, two moments."""
SHARED_PART = 0.4
"""Of a GPU's memory: what takes more is shared out over the ranks."""


class Learner:
    """A model that learns. All ranks must call the same methods in the same order."""

    def __init__(
        self, trial: Trial, device: torch.device, ranks: Ranks, *, sharded: bool | None = None
    ) -> None:
        """Of several ranks each has its shards of the model, or all; None: as its size demands."""
        h, shape = trial.hyperparameters, trial.shape
        self._device, self._ranks = device, ranks
        large = _is_large(trial, device, ranks) if sharded is None else sharded
        large = large and ranks.count > 1
        self._passes = passes_on(device, shape, h, ranks, sharded=large)
        if large:
            from trainers.sharded import ShardedOptimizer, sharded_model

            model = sharded_model(shape, trial.seed, h, device, ranks, self._passes)
            self._optimizer: Optimizer | ShardedOptimizer = ShardedOptimizer(model, h, ranks)
        else:
            placed = partial(prepared, passes=self._passes)
            model = Transformer(shape, trial.seed, placed).to(device)
            self._optimizer = Optimizer(model, h, ranks)
        self._model = model
        self._loss = torch.compile(model.loss) if device.type == "cuda" else model.loss

    def step(self, batch: NDArray[np.int64], rate: float) -> Tensor:
        """One optimiser step, `rate` as a fraction of the peak, on this rank's share of a batch.

        Returns that share of the batch's mean loss, nats/token.
        """
        share = torch.from_numpy(batch[self._ranks.rank :: self._ranks.count]).to(self._device)
        loss = accumulate(
            self._loss,
            share,
            self._passes,
            len(batch),
            self._optimizer.collect,
            ranks=self._ranks.count,
        )
        self._optimizer.step(rate)
        return loss

    def evaluate(self, windows: HeldoutWindows) -> tuple[float, float | None]:
        """See `trainers.evaluation.evaluate`."""
        return evaluate(self._model, windows, self._device, self._ranks)

    def weights(self) -> dict[str, Tensor]:
        """The model's weights by name, in main memory, on the first rank; nothing on others."""
        first, found = self._ranks.rank == 0, {}
        for name, weight in self._optimizer.model_weights():
            if first:
                found[name] = weight.detach().to("cpu")
        return found

    def state(self) -> Mapping[str, Tensor]:
        """What this rank needs to go back to where it is: copies in main memory."""
        return self._optimizer.state()

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what `state` gave."""
        self._optimizer.restore(state)

    def gathered(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What all ranks' states are together, on the first; the same for any number of them."""
        return self._optimizer.gathered(state)

    def scattered(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The state of this rank from what `gathered` gave the first one."""
        return self._optimizer.scattered(state)


def _is_large(trial: Trial, device: torch.device, ranks: Ranks) -> bool:
    if device.type != "cuda":
        return False
    there = ranks.least(torch.cuda.get_device_properties(device).total_memory)
    return SHARED_BYTES * params(trial.shape).total > SHARED_PART * there
