"""Who takes part in `benchmarks.fit`, and in which turns; rivals themselves are in `rivals.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.bootstrap import bootstrap
from analysis.fitting import Fit, Method, fit
from analysis.laws import HOFFMANN
from analysis.observations import Observations
from benchmarks import rivals
from benchmarks.rivals import FloatArray, Found, Indices, Points

HUBER = Method(objective="huber", delta=rivals.DELTA)
POINT_ROUNDS = 5
"""As many as the package's grid has levels of E, one a round."""
SAMPLED_STARTS = 150
FITS = 20
"""Fits a round of those that take milliseconds."""
REPLICATE_ROUNDS = 5
REPLICATES = 4000
"""Of ours, a turn: what intervals are made of."""
COMPARED = 1000
"""How many of them the rivals fit too."""
SLOW_REPLICATES = 100
SEED = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Entrant:
    """One way to fit, and what it does when its turn comes."""

    name: str
    turn: Callable[[int], Sequence[Any]]
    """Does the share of round i."""
    share: float
    """Units of work a round: starts, fits or replicates."""
    whole: int = 1
    """Units that make one fit or replicate."""
    note: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """What an entrant took and found."""

    entrant: Entrant
    seconds: float
    """CPU seconds a whole fit or replicate; extrapolated where `entrant.note` says so."""
    over_ours: float
    """The ratio to ours."""
    results: list[Any]


def turns(entrants: Sequence[Entrant], rounds: int) -> list[Measured]:
    """Every round all take turns, the first of them, ours, anew before each of the others.

    A shared core's speed drifts by a half within a minute, and some turns take seconds: each is
    compared with ours just before.
    """
    ours, *others = entrants
    ours.turn(0)  # a first call's imports and allocations would count in so short a turn
    results: list[list[Any]] = [[] for _ in entrants]
    seconds, beside = np.zeros(len(others)), np.zeros(len(others))
    for i in range(rounds):
        for k, other in enumerate(others):
            start = time.process_time()
            results[0] += ours.turn(i)
            middle = time.process_time()
            results[k + 1] += other.turn(i)
            beside[k] += middle - start
            seconds[k] += time.process_time() - middle
    beside *= ours.whole / (rounds * ours.share)
    mean = float(beside.mean())
    found = [Measured(entrant=ours, seconds=mean, over_ours=1.0, results=results[0])]
    for k, other in enumerate(others):
        one = float(seconds[k]) * other.whole / (rounds * other.share)
        over = one / float(beside[k])
        found.append(Measured(entrant=other, seconds=one, over_ours=over, results=results[k + 1]))
    return found


def point_entrants(obs: Observations, points: Points, full: bool) -> list[Entrant]:
    """Ours first."""
    starts = rivals.published_starts()
    count = len(starts) if full else SAMPLED_STARTS
    order = np.random.default_rng(SEED).permutation(len(starts))[:count]
    shares = np.array_split(order, POINT_ROUNDS)

    def published(name: str, run: Callable[[Points, FloatArray], Found]) -> Entrant:
        return Entrant(
            name=f"published, {name} gradient",
            turn=lambda i: [run(points, starts[shares[i]])],
            share=count / POINT_ROUNDS,
            whole=len(starts),
            note=_sample(count, len(starts)),
        )

    entrants = [
        Entrant(
            name="isoflop",
            turn=lambda _: [fit(HOFFMANN, obs, method=HUBER) for _ in range(FITS)],
            share=FITS,
        ),
        published("numerical", rivals.numerical_point),
        published("analytic", rivals.analytic_point),
        Entrant(
            name="isoflop, squares of ln L",
            turn=lambda _: [fit(HOFFMANN, obs) for _ in range(FITS)],
            share=FITS,
            note="for comparison with the next",
        ),
        Entrant(
            name="grid and Nelder-Mead",
            turn=lambda _: [rivals.projected_point(points) for _ in range(FITS)],
            share=FITS,
            note="minimises squares of L: another objective, hence another answer",
        ),
    ]
    if rivals.installed("chinchilla") is not None:
        entrants += [package_entrant(points, full, tuned) for tuned in (False, True)]
    return entrants


def _sample(count: int, whole: int) -> str:
    return f"{count} starts" if count == whole else f"{count} of {whole} starts, time extrapolated"


def package_entrant(points: Points, full: bool, tuned: bool) -> Entrant:
    """The package with the starts of its own README; of the other constants every second level."""
    grid = rivals.PACKAGE_GRID
    levels = slice(None, None, 1 if full else 2)
    others = {name: values[levels] for name, values in grid.items() if name != "E"}
    share = int(np.prod([len(values) for values in others.values()]))
    whole = int(np.prod([len(values) for values in grid.values()]))

    def turn(i: int) -> list[Found]:
        return [rivals.package_point(points, {"E": grid["E"][i : i + 1], **others}, tuned=tuned)]

    how = "summed, in doubles" if tuned else "as it comes"
    return Entrant(
        name=f"chinchilla {rivals.installed('chinchilla')}, {how}",
        turn=turn,
        share=share,
        whole=whole,
        note=_sample(share * POINT_ROUNDS, whole),
    )


def resamples(n: int) -> list[Indices]:
    """The rows of a replicate, with repetition: the first that `analysis.bootstrap` draws."""
    rng = np.random.default_rng(SEED)
    counts = rng.multinomial(n, np.full(n, 1.0 / n), size=REPLICATES)
    return [np.repeat(np.arange(n), count) for count in counts[:COMPARED]]


def replicate_entrants(
    obs: Observations, ours: Fit, points: Points, draws: Sequence[Indices]
) -> list[Entrant]:
    """Ours first, all replicates a turn; of the others a share, on resampled rows."""
    start = as_published(ours.theta)
    plain, white = np.eye(5), rivals.whitening(points, start)

    def rival(name: str, run: Callable[[Points], Found], count: int, note: str) -> Entrant:
        share = count // REPLICATE_ROUNDS
        return Entrant(
            name=name,
            turn=lambda i: [run(points.rows(rows)) for rows in draws[i * share : (i + 1) * share]],
            share=share,
            note=note,
        )

    def tight(name: str, layout: FloatArray, note: str) -> Entrant:
        return rival(name, lambda p: rivals.tight_replicate(p, start, layout), COMPARED, note)

    entrants = [
        Entrant(
            name="isoflop",
            turn=lambda _: [bootstrap(ours, obs, replicates=REPLICATES, seed=SEED)],
            share=REPLICATES,
            note=f"{REPLICATES} replicates",
        ),
        tight("L-BFGS-B", plain, "theta as published"),
        tight("L-BFGS-B, whitened", white, "theta in units of its curvature at the point fit"),
        rival(
            "BFGS, numerical gradient",
            lambda p: rivals.numerical_replicate(p, start),
            SLOW_REPLICATES,
            f"{SLOW_REPLICATES} replicates, from the point fit",
        ),
    ]
    if rivals.installed("autograd") is not None:
        note = f"{SLOW_REPLICATES} replicates, autograd, from Hoffmann's constants"
        entrants.append(
            rival("BFGS, as published", rivals.published_replicate, SLOW_REPLICATES, note)
        )
    return entrants


def as_published(theta: FloatArray) -> FloatArray:
    """Our theta, which holds E itself, in the rivals' layout; shape (..., 5)."""
    found = theta[..., :5].copy()
    found[..., 2] = np.log(found[..., 2])
    return found
