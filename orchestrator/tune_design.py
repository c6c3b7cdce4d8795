"""Which models of a sweep are tuned, and at which rates and batches each is probed next.

Probes of a model lie on a lattice of factors of two around its recipe's rate and batch: first the
nine around the recipe, then whatever lacks around the best one so far, until that is surrounded.
What lies past an edge that the optimum is on all the same is told by the fit (`tune_laws`).
Runs that are complete, rather than halved early: a schedule that decays to zero tells its loss at
the end only. A lattice, rather than a sampler's draws: all probes of a round train at once, the
same ones are asked for again after an interruption, and a quadratic form wants its points around
the minimum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.design import spread
from analysis.errors import InputError
from orchestrator.family import corpus_id
from orchestrator.planner import Plan, Planned, most_tokens, trial_of, trunks_wanted
from orchestrator.spec import SweepSpec
from trainers.flops import params, trial_flops
from trainers.recipe import Recipe, probed
from trainers.shape import Shape
from trainers.template import Command
from trainers.trial import CorpusId, Probe, Trial

Point = tuple[int, int]
"""Octaves of rate and of batch from the recipe's."""

BLOCK = tuple(sorted(((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)), key=lambda p: p != (0, 0)))
"""A point and those around it."""
SHARE = 0.25
"""Of a sweep's FLOPs that tuning takes at most, if nothing else is said and sizes allow it."""
MOST_OFF = 0.5
"""Octaves by which whole sequences may move a batch from where it should be."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model to tune, on so many tokens."""

    base: Trial
    """As its recipe would train it."""
    recipe: Recipe
    """A larger batch than leaves its least steps is not probed."""

    @property
    def shape(self) -> Shape:
        """Of all its probes."""
        return self.base.shape

    @property
    def flops(self) -> float:
        """Of one probe, exact, up to a step."""
        return trial_flops(self.base)

    def trial(self, point: Point) -> Trial | None:
        """The probe at a point; None where no batch of whole sequences is near it."""
        rate, batch = 2.0 ** point[0], 2.0 ** point[1]
        trial = probed(self.base, Probe(rate=rate, batch=batch), self.recipe)
        h = trial.hyperparameters
        off = math.log2(h.batch_tokens / (batch * self.base.hyperparameters.batch_tokens))
        return trial if abs(off) < MOST_OFF and h.steps >= self.recipe.min_steps else None


def next_points(model: Model, losses: Mapping[Point, float], most: int) -> list[Point]:
    """Points to probe after these; none where the best one is surrounded, or `most` are probed."""
    best = best_of(losses)
    around = [(best[0] + i, best[1] + j) for i, j in BLOCK]
    found = [p for p in around if p not in losses and model.trial(p) is not None]
    return found[: most - len(losses)]


def best_of(losses: Mapping[Point, float]) -> Point:
    """The point of the least loss, and the recipe's own where there is none.

    A probe that diverged has an infinite loss; of several the one of the lowest rate is the best.
    """
    return min(losses, key=lambda point: (losses[point], point), default=(0, 0))


def models(
    spec: SweepSpec,
    grid: Plan,
    *,
    sizes: int,
    ratios: Sequence[float],
    trials: int,
    spend: float | None,
) -> list[Model]:
    """Sizes of a sweep's grid, from its smallest one up to what the FLOPs allow.

    Parameters
    ----------
    spec, grid
        The sweep and its plan.
    sizes
        How many.
    ratios
        D/N of each size.
    trials
        Probes of a model, at most.
    spend
        FLOPs of all probes, at most; by default a quarter of the sweep's, or what its smallest
        sizes take.

    Raises
    ------
    InputError
        If there are too few sizes, or the FLOPs allow too few.
    """
    corpus, command = corpus_id(spec), spec.command.command() if spec.command else None
    recipe = spec.recipe.rules
    least, most = recipe.min_steps * spec.shapes.context, most_tokens(spec, corpus)
    shapes = sorted({t.shape for t in grid.trials}, key=lambda s: params(s).non_embedding)
    able = [
        [Model(base=_base(spec, shape, ratio, corpus, command), recipe=recipe) for ratio in ratios]
        for shape in shapes
        if _trainable(shape, ratios, least, most)
    ]
    if len(able) < sizes:
        raise InputError(
            f"of the sweep's {len(shapes)} sizes {len(able)} can be trained on "
            f"{' and '.join(f'{ratio:g}' for ratio in ratios)} tokens a parameter, and {sizes} are "
            "to be tuned: give fewer --sizes, other --tokens-per-param, or more text"
        )
    allowed = SHARE * grid.flops if spend is None else spend
    chosen, cost = _affordable(able, sizes, trials, allowed)
    if spend is not None and cost > spend:
        raise InputError(
            f"--spend {spend:g}: {trials} probes of each of the smallest {sizes} sizes"
            f"{' and each D/N' if len(ratios) > 1 else ''} take {cost:.3g} FLOPs: spend that, or "
            "give fewer --sizes or --trials"
        )
    return [model for same_size in chosen for model in same_size]


def _affordable(
    able: Sequence[list[Model]], sizes: int, trials: int, allowed: float
) -> tuple[list[list[Model]], float]:
    """The widest range of sizes whose probes cost no more than allowed, or the smallest; its cost.

    Of `able`, models by size, ascending.
    """
    n = np.array([params(same[0].shape).non_embedding for same in able], dtype=np.float64)
    for top in range(len(able) - 1, sizes - 2, -1):
        chosen = [able[i] for i in spread(n[: top + 1], n[0], n[top], sizes)]
        cost = trials * sum(model.flops for same in chosen for model in same)
        if cost <= allowed:
            break
    return chosen, cost


def _trainable(shape: Shape, ratios: Sequence[float], least: float, most: float) -> bool:
    n = params(shape).non_embedding
    return all(least <= ratio * n <= most for ratio in ratios)


def _base(
    spec: SweepSpec, shape: Shape, ratio: float, corpus: CorpusId, command: Command | None
) -> Trial:
    tokens = ratio * params(shape).non_embedding
    trial = trial_of(spec, shape, tokens, corpus, spec.seeds[0], command)
    return replace(trial, horizons=(trial.tokens,)) if trunks_wanted(spec) else trial


def planned(
    name: str, spec: SweepSpec, wanted: Sequence[Model], points: Sequence[Sequence[Point]]
) -> Plan:
    """What asks for these probes of these models, in no fit."""
    pairs = zip(wanted, points, strict=True)
    trials = [(model, model.trial(point)) for model, chosen in pairs for point in chosen]
    return Plan(
        name=name,
        spec=spec,
        planned=tuple(
            Planned(trial=trial, tokens=trial.tokens, budget=model.flops, role="probe")
            for model, trial in trials
            if trial is not None
        ),
    )
