"""A trial's model with its optimiser, on this device, alone or together with other ranks.

What a step is, a loss and a state; when there is one is the business of `trainers.pretrain`.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainers import compiling
from trainers.corpus import HeldoutWindows
from trainers.device import synchronise
from trainers.evaluation import evaluate
from trainers.flops import params
from trainers.head_loss import chunk_loss
from trainers.optimizer import Optimizer
from trainers.passes import accumulate, passes_on, prepared
from trainers.ranks import Ranks
from trainers.transformer import Block, Transformer
from trainers.trial import Trial

SHARED_BYTES = 20
"""Bytes per parameter of a model that every rank has whole: weight, its rounded copy, gradients,
two moments."""
SHARED_PART = 0.4
"""Part of a GPU's memory above which a model is shared out over the ranks."""


class Learner:
    """A model that learns. All ranks must call the same methods in the same order."""

    def __init__(
        self,
        trial: Trial,
        device: torch.device,
        ranks: Ranks,
        *,
        sharded: bool | None = None,
        halvings: int = 0,
        tell: Callable[[str], None] = warnings.warn,
    ) -> None:
        """Draw the model and place it.

        Parameters
        ----------
        trial, device, ranks
            What is trained, where and by whom.
        sharded
            Whether each of several ranks has its shards of the model, or all; None: as its size
            demands.
        halvings
            How many times to halve the passes that should fit: attempts that ran out of memory.
        tell
            Gets a sentence for a person where compiling fails.
        """
        h, shape = trial.hyperparameters, trial.shape
        self._context = shape.context
        self._share = math.ceil(h.batch_tokens / shape.context / ranks.count)
        """Sequences of a batch that are this rank's, or one more."""
        self._device, self._ranks, self._tell = device, ranks, tell
        large = _is_large(trial, device, ranks) if sharded is None else sharded
        self._sharded = large and ranks.count > 1
        self._passes = passes_on(device, shape, h, ranks, sharded=self._sharded, halvings=halvings)
        self._compiles = compiling.pays(trial, device, ranks.count)
        compute, chunk = compiling.compiled() if self._compiles else (None, chunk_loss)
        if self._sharded:
            from trainers.sharded import ShardedOptimizer, sharded_model

            model = sharded_model(shape, trial.seed, h, device, ranks, self._passes, compute)
            self._optimizer: Optimizer | ShardedOptimizer = ShardedOptimizer(model, h, ranks)
        else:
            placed = partial(prepared, passes=self._passes, compute=compute)
            model = Transformer(shape, trial.seed, placed).to(device)
            self._optimizer = Optimizer(model, h, ranks)
        model.chunk = chunk
        self._model = model
        self.compile_seconds = 0.0
        """Seconds taken so far by what was compiled, and by nothing else."""

    @property
    def compiles(self) -> bool:
        """Whether steps are compiled."""
        return self._compiles

    def prepare(self) -> None:
        """Compile what a step needs, so that none takes longer; nothing is learnt from it.

        By a pass over a few zeros, whose gradient is dropped. Where compiling fails, training goes
        on without, and the time that was lost counts as training: a training that has seconds of
        compiling was compiled. Not where a model is shared out, whose ranks must all compute alike.
        """
        if not self._compiles:
            return
        clock = time.perf_counter()
        try:
            while self._tried(zeros := self._zeros(), len(zeros) * self._ranks.count) is None:
                self._free()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # torch, Triton and compilers raise anything
            if self._sharded:
                raise
            self._tell(compiling.make_eager(self._model, error))
            self._compiles = False
        self._free()
        synchronise(self._device)
        if self._compiles:
            self.compile_seconds += time.perf_counter() - clock

    def step(self, batch: NDArray[np.int64], rate: float) -> Tensor:
        """One optimiser step, `rate` as a fraction of the peak, on this rank's share of a batch.

        Where memory runs out before the optimiser has its turn, the batch is begun anew in passes
        of half as many sequences, and so is all that follows. Not where a model is shared out,
        whose ranks have met in passes already: there the next attempt takes half.

        Returns that share of the batch's mean loss, nats/token.
        """
        share = self._moved(batch[self._ranks.rank :: self._ranks.count])
        while (loss := self._tried(share, len(batch))) is None:
            self._free()
            self.prepare()
        self._optimizer.step(rate)
        return loss

    def _zeros(self) -> Tensor:
        """Windows of one pass."""
        shape = (self._passes.sequences, self._context + 1)
        return torch.zeros(shape, dtype=torch.int64, device=self._device)

    def _free(self) -> None:
        """Forget the gradients of passes since the last step, and give back what they took."""
        self._optimizer.discard()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _moved(self, windows: NDArray[np.int64]) -> Tensor:
        """Windows on the device; a GPU fetches them while the process goes on."""
        tensor = torch.from_numpy(np.ascontiguousarray(windows))
        if self._device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _tried(self, share: Tensor, sequences: int) -> Tensor | None:
        """The loss, the gradient being there; None where memory ran out and passes are smaller.

        Outside of it nothing holds what the failed pass had: no traceback, and no frame of it.
        """
        try:
            return self._gradient(share, sequences)
        except torch.OutOfMemoryError:
            smaller = None if self._sharded else self._passes.smaller
            if smaller is None:
                raise
        smaller = smaller.even(self._share) if smaller.filled else smaller
        warnings.warn(
            f"memory ran out in passes of {self._passes.sequences} sequences: this trial goes on "
            f"in passes of {smaller.sequences}"
            + (", whose blocks are computed again" if smaller.recomputed else ""),
            stacklevel=3,
        )
        self._passes = smaller
        if smaller.recomputed:
            for block in self._model.blocks:
                if isinstance(block, Block):
                    prepared(block, smaller, getattr(block, "compute", None))
        return None

    def _gradient(self, share: Tensor, sequences: int) -> Tensor:
        return accumulate(
            self._model.loss,
            share,
            self._passes,
            sequences,
            self._optimizer.collect,
            ranks=self._ranks.count,
            before_pass=self._before_pass,
        )

    def _before_pass(self, last: bool) -> None:
        self._optimizer.before_pass(last or not self._passes.summed)

    def evaluate(self, windows: HeldoutWindows) -> tuple[float, float | None]:
        """See `trainers.evaluation.evaluate`. On a GPU in pieces as large as a pass.

        As large as the smallest rank's: windows are shared out by pieces, and a rank on which
        memory ran out has smaller passes than others.
        """
        sequences = None
        if self._device.type == "cuda":
            sequences = int(self._ranks.least(self._passes.sequences))
        return evaluate(self._model, windows, self._device, self._ranks, sequences=sequences)

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
