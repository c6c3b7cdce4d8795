"""One trunk beside separate runs to each of its horizons, on real text; for `benchmarks.training`.

Horizons of 1, 2, 4 and 8 by the recipe `mini` at a tiny width. A separate run is what a sweep would
train instead: a cosine with batch and rates by its own D. The trunk has those of the D between its
horizons. Cosines with those do worse: by 0.018 nats a token, by 0.025 if they decay to zero.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainers.corpus import Stdlib, load
from trainers.pretrain import Pretrain
from trainers.recipes import identity, named
from trainers.registry import trainer_version
from trainers.shape import Shape
from trainers.trial import CorpusId, Hyperparameters, Measurement, Trial
from trainers.workspace import Scratch

HORIZONS = (1, 2, 4, 8)
DECAY = 0.2
WARMUP = 0.1
"""Of the shortest horizon: `mini`'s share of a run."""


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """What is compared."""

    width: int = 16
    shortest: int = 125_000
    """About the first horizon, tokens."""
    seeds: int = 4

    def compared(self) -> dict[str, Any]:
        """Cost over that of separate runs, and how the losses differ, nats/token.

        `seed_sd` is the standard deviation between seeds of a separate run's loss, pooled over
        horizons; `loss_difference` is the mean of trunk minus separate run, and `difference_stderr`
        its standard error by the seeds. `branch_correlation` is that of two branches of a trunk,
        over seeds, and `separate_correlation` that of two separate runs of one seed, which share
        their initial weights and the order of their text.
        """
        runs = [self._losses_and_flops(seed) for seed in range(self.seeds)]
        trunks, separate = (np.array([r[i] for r in runs]) for i in (0, 1))
        spent = np.array([r[2] for r in runs]).sum(axis=0)
        differences = trunks - separate
        by_seed = differences.mean(axis=1)
        return {
            "horizons": HORIZONS,
            "seeds": self.seeds,
            "cost_ratio": float(spent[0] / spent[1]),
            "loss_difference": float(differences.mean()),
            "difference_stderr": float(by_seed.std(ddof=1) / self.seeds**0.5),
            "seed_sd": float(np.sqrt(separate.var(axis=0, ddof=1).mean())),
            "branch_correlation": _correlation(trunks),
            "separate_correlation": _correlation(separate),
            "losses_trunk": trunks.mean(axis=0).tolist(),
            "losses_separate": separate.mean(axis=0).tolist(),
            "differences": differences.mean(axis=0).tolist(),
        }

    def _losses_and_flops(self, seed: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Losses by horizon of the trunk and of separate runs, and the FLOPs of both."""
        h, steps = self._hyperparameters()
        horizons = tuple(h.batch_tokens * steps * n for n in HORIZONS)
        trunk = measured(self._trial(h, seed, horizons))
        rules, shape = named("mini"), self._shape
        separate = [measured(self._trial(rules.resolve(shape, d), seed))[0] for d in horizons]
        flops = np.array([sum(m.flops_spent or 0.0 for m in rows) for rows in (trunk, separate)])
        return _losses(trunk), _losses(separate), flops

    def _hyperparameters(self) -> tuple[Hyperparameters, int]:
        """The trunk's, and the steps of its shortest horizon."""
        h = named("mini").resolve(self._shape, HORIZONS[-1] ** 0.5 * self.shortest)
        steps = round(self.shortest / h.batch_tokens)
        h = dataclasses.replace(
            h,
            schedule="wsd",
            decay_fraction=DECAY,
            final_fraction=0.0,
            warmup_steps=max(1, round(WARMUP * steps)),
            steps=steps * HORIZONS[-1],
        )
        return h, steps

    @property
    def _shape(self) -> Shape:
        symbols = load(Stdlib()).vocabulary
        return Shape(width=self.width, depth=2, heads=2, vocabulary=symbols, context=64)

    def _trial(self, h: Hyperparameters, seed: int, horizons: tuple[int, ...] = ()) -> Trial:
        return pretraining(self._shape, h, seed=seed, horizons=horizons)


def pretraining(
    shape: Shape, h: Hyperparameters, *, seed: int = 0, horizons: tuple[int, ...] = ()
) -> Trial:
    """A trial on the text of `mini`."""
    source = Stdlib()
    corpus = load(source)
    return Trial(
        trainer="pretrain",
        trainer_version=trainer_version("pretrain"),
        shape=shape,
        hyperparameters=h,
        corpus=CorpusId(
            name=corpus.name,
            hash=corpus.hashes[0],
            heldout_hash=corpus.hashes[1],
            train_tokens=corpus.train_tokens,
            source=source,
        ),
        recipe=identity("mini", named("mini")),
        seed=seed,
        horizons=horizons,
    )


def measured(trial: Trial) -> list[Measurement]:
    """What a trial gives at its horizons."""
    with tempfile.TemporaryDirectory(prefix="isoflop-trunk-") as directory:
        events = Pretrain().train(trial, Scratch(Path(directory)))
        return [event for event in events if isinstance(event, Measurement)]


def _correlation(losses: NDArray[Any]) -> float:
    """Of two columns, over the rows: pooled over all pairs, by their mean variance."""
    off = losses - losses.mean(axis=0)
    covariance = off.T @ off
    own = float(np.trace(covariance))
    return float((covariance.sum() - own) / own / (losses.shape[1] - 1))


def _losses(rows: list[Measurement]) -> NDArray[Any]:
    return np.array([np.nan if row.loss is None else row.loss for row in rows])
