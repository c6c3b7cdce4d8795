"""How often intervals hold the truth: sweeps simulated from known laws, fitted as a user would.

    python -m benchmarks.coverage [--json] [--repetitions 1000] [--processes 2]

Each cell is a truth, a design and a kind of noise. Reported is how often the nominal 90% interval
of ln N_opt and ln L, at 100 times the top budget, holds the true value: by the headline forecast
as users are shown it, with the discrepancy that the sweep's own back-tests tell; by the part of it
that covers noise; and by Hoffmann's law alone. Each simulated law holds, so that discrepancy should
come out near zero.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import math
import multiprocessing
import sys
from dataclasses import asdict, dataclass, replace
from itertools import product

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from analysis.combined import combine, with_discrepancy
from analysis.discrepancy import Discrepancy
from analysis.fitting import fit, fit_each
from analysis.forecast import forecast
from analysis.heldout import discrepancy_of, predict
from analysis.laws import GENERALISED, HOFFMANN, KAPLAN, PUBLISHED, Law, log_loss
from analysis.observations import FloatArray, Observations
from analysis.optimum import FlopsPerToken, log_optimal_params, log_optimum_jacobian
from analysis.pair import Basis, Pair, gamma_test, recent

LEVEL, REACH, NOISE = 0.9, 100.0, 0.003
COST = FlopsPerToken.six_n()
TRUTHS: dict[str, tuple[Law, FloatArray]] = {
    "hoffmann": (HOFFMANN, PUBLISHED["besiroglu-2024"].theta),
    "gamma 0.6": (
        GENERALISED,
        GENERALISED.theta({"A": 3e3, "B": 2e4, "E": 1.6, "alpha": 0.5, "beta": 0.52, "gamma": 0.6}),
    ),
    "kaplan": (KAPLAN, PUBLISHED["kaplan-2020"].theta),
}


@dataclass(frozen=True)
class Design:
    """Budgets a factor 3 apart from 1e18 FLOPs, sizes in equal steps of ln N around a centre."""

    budgets: int
    sizes: int
    span: float
    """Factor between the largest and the smallest N of a budget."""
    centre: float = 1.0
    """Middle of the lowest budget's sizes over its N_opt."""
    drift: float = 1.0
    """By what factor that ratio changes from budget to budget."""


DESIGNS = {
    "symmetric": Design(5, 7, 16),
    "off-centre": Design(5, 7, 16, centre=3.0),
    "drifting": Design(5, 7, 16, centre=0.5, drift=1.5),
    "narrow": Design(5, 6, 5),
    "wide": Design(5, 7, 100),
    "few points": Design(3, 5, 16),
}
NOISES = ("normal", "heavy-tailed", "shared by budget")
CHECKED = 10
"""Replicates a cell that are fitted once more, alone, to see that solving together changed none."""


@dataclass(frozen=True)
class Cell:
    """Coverage in one cell; shares between 0 and 1."""

    truth: str
    design: str
    noise: str
    repetitions: int
    params: float
    loss: float
    """Coverage of the interval that users are shown."""
    noise_params: float
    noise_loss: float
    """Coverage of the part of the interval that is due to noise alone."""
    by_law: float
    """Share of repetitions whose back-tests tell of some discrepancy in N_opt or L."""
    default: float
    """Share of repetitions whose back-tests are too few or too noisy, which take the default."""
    hoffmann_params: float
    hoffmann_loss: float
    """By Hoffmann's law alone."""
    width_params: float
    width_loss: float
    """Median half-width of the headline's intervals, in ln N_opt and ln L."""
    open_ended: float
    """Share of repetitions without an end to an interval."""
    worst_difference: float
    """Largest relative difference of objectives between solving together and alone."""


def observations(law: Law, theta: FloatArray, design: Design) -> Observations:
    """The design's noise-free sweep of a truth."""
    flops = 1e18 * 3.0 ** np.arange(design.budgets)
    centre = np.exp([log_optimal_params(theta, float(c), COST) for c in flops])
    centre *= design.centre * design.drift ** np.arange(design.budgets)
    steps = np.exp(np.linspace(-0.5, 0.5, design.sizes) * np.log(design.span))
    n = np.outer(centre, steps).ravel()
    c = np.repeat(flops, design.sizes)
    d = c / (6.0 * n)
    return Observations(
        params=n,
        tokens=d,
        flops=c,
        loss=np.exp(log_loss(theta, np.log(n), np.log(d))),
        loss_stderr=np.full(len(n), np.nan),
        budget=c,
    )


def scatter(noise: str, obs: Observations, rng: np.random.Generator, size: int) -> FloatArray:
    """Deviations of ln L, shape (size, n): .3% each; with shifts .3% more for all of a budget."""
    shape = (size, len(obs))
    if noise == "heavy-tailed":  # t with 3 degrees of freedom, scaled to the same variance
        return np.asarray(NOISE / np.sqrt(3.0) * rng.standard_t(3.0, shape))
    own = NOISE * rng.standard_normal(shape)
    if noise == "normal":
        return own
    budget = np.unique(obs.budget, return_inverse=True)[1]
    shared: FloatArray = NOISE * rng.standard_normal((size, budget.max() + 1))[:, budget]
    return own + shared


def pairs(obs: Observations, losses: FloatArray, checked: int = 0) -> tuple[list[Pair], float]:
    """Both laws fitted to each set of losses, and how far `fit` alone would differ.

    The latter for the first `checked` sets.
    """
    hoffmann, generalised = (fit_each(law, obs, losses) for law in (HOFFMANN, GENERALISED))
    worst = 0.0
    for law, found in ((HOFFMANN, hoffmann), (GENERALISED, generalised)):
        for r in range(min(checked, len(losses))):
            alone = fit(law, Observations(**{**vars(obs), "loss": losses[r]})).objective
            worst = max(worst, abs(found[r].objective / alone - 1.0))
    both = [
        Pair(hoffmann=one, generalised=two, test=gamma_test(one, two), note=None)
        for one, two in zip(hoffmann, generalised, strict=True)
    ]
    return both, worst


def bases(obs: Observations, losses: FloatArray) -> tuple[list[list[Basis]], float]:
    """Return the basis of a headline for each set of losses, from two budgets to all of them.

    Returns
    -------
    A list for each number of budgets from two on, and how far `fit` alone would differ.
    """
    budgets = obs.budgets()
    made, worst = [], 0.0
    for k in range(2, len(budgets) + 1):
        first = obs.budget <= budgets[k - 1]
        checked = CHECKED if first.all() else 0
        everything, off = pairs(obs.select(first), losses[:, first], checked)
        worst = max(worst, off)
        kept = first & (obs.budget >= recent(obs.select(first)).budgets()[0])
        if kept.sum() == first.sum():
            made.append([Basis(recent=pair, all=pair) for pair in everything])
            continue
        last = pairs(obs.select(kept), losses[:, kept])[0]
        both = zip(last, everything, strict=True)
        made.append([Basis(recent=near, all=far) for near, far in both])
    return made, worst


def discrepancy(obs: Observations, losses: FloatArray, below: list[Basis]) -> Discrepancy:
    """Estimate the discrepancy of one set of losses by predicting each budget from those below."""
    budgets = obs.budgets()
    made = []
    for basis, top, budget in zip(below, budgets[1:], budgets[2:], strict=False):
        rows = obs.budget == budget
        held = replace(obs.select(rows), loss=losses[rows])
        made.append(predict(basis, held, COST, float(top)))
    return discrepancy_of([item for item in made if item])


def cell(task: tuple[str, str, str, int]) -> Cell:
    """Simulate one cell."""
    truth, design, noise, repetitions = task
    law, theta = TRUTHS[truth]
    obs = observations(law, theta, DESIGNS[design])
    seed = (list(TRUTHS).index(truth), list(DESIGNS).index(design), NOISES.index(noise))
    rng = np.random.default_rng(seed)
    losses = obs.loss * np.exp(scatter(noise, obs, rng, repetitions))
    flops = REACH * float(obs.flops.max())
    true = np.exp(log_optimum_jacobian(theta, flops, COST)[0][[0, 2]])
    made, worst = bases(obs, losses)
    held, widths, told = [], [], []
    for r, basis in enumerate(made[-1]):
        known = discrepancy(obs, losses[r], [item[r] for item in made[:-1]])
        by_noise = combine(basis, flops, COST, LEVEL)
        shown = with_discrepancy(by_noise, known, math.log(REACH))
        alone = forecast(basis.all.hoffmann, flops, COST, LEVEL)
        parts = [(item.params, item.loss) for item in (shown, by_noise, alone)]
        held.append(
            [p.low <= t <= p.high for pair in parts for p, t in zip(pair, true, strict=True)]
        )
        widths.append([_half_width(p.low, p.high) for p in parts[0]])
        default = known.source == "default"
        told.append([not default and known.params + known.loss > 0.0, default])
    share = np.mean(held, axis=0)
    width = np.median(widths, axis=0)
    by_law, by_default = np.mean(told, axis=0)
    return Cell(
        truth=truth,
        design=design,
        noise=noise,
        repetitions=repetitions,
        params=float(share[0]),
        loss=float(share[1]),
        noise_params=float(share[2]),
        noise_loss=float(share[3]),
        by_law=float(by_law),
        default=float(by_default),
        hoffmann_params=float(share[4]),
        hoffmann_loss=float(share[5]),
        width_params=float(width[0]),
        width_loss=float(width[1]),
        open_ended=float(np.mean(~np.isfinite(widths).all(axis=1))),
        worst_difference=worst,
    )


def _half_width(low: float, high: float) -> float:
    return 0.5 * float(np.log(high / low)) if low > 0.0 else np.inf


def main() -> None:
    """Run every cell and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--repetitions", type=int, default=1000, help="a cell")
    parser.add_argument("--truth", action="append", choices=list(TRUTHS), help="only these")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    tasks = [
        (*names, options.repetitions) for names in product(options.truth or TRUTHS, DESIGNS, NOISES)
    ]
    console = Console(stderr=True)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        running = pool.imap(cell, tasks)
        cells = list(track(running, "cells", total=len(tasks), console=console))
    error = float(np.sqrt(LEVEL * (1 - LEVEL) / options.repetitions))
    summary = _summary(cells, error)
    if options.json:
        json.dump({**summary, "cells": [asdict(item) for item in cells]}, sys.stdout, indent=1)
        print()
    else:
        _show(cells, summary)


def _summary(cells: list[Cell], error: float) -> dict[str, object]:
    hoffmann = [item for item in cells if item.truth == "hoffmann"]
    others = [item for item in cells if item.truth != "hoffmann"]

    def ends(values: list[float]) -> dict[str, float] | None:
        if not values:
            return None
        return {"low": min(values), "mean": float(np.mean(values)), "high": max(values)}

    return {
        "level": LEVEL,
        "reach": REACH,
        "monte_carlo_error": error,
        "hoffmann_truth_hoffmann_law": ends(
            [v for item in hoffmann for v in (item.hoffmann_params, item.hoffmann_loss)]
        ),
        "headline": ends([v for item in cells for v in (item.params, item.loss)]),
        "headline_noise_alone": ends(
            [v for item in cells for v in (item.noise_params, item.noise_loss)]
        ),
        "hoffmann_truth_headline": ends([v for item in hoffmann for v in (item.params, item.loss)]),
        "other_truths_headline": ends([v for item in others for v in (item.params, item.loss)]),
        "worst_difference": max(item.worst_difference for item in cells),
    }


def _show(cells: list[Cell], summary: dict[str, object]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("truth", "design", "noise"):
        table.add_column(name)
    columns = ("N_opt", "L", "noise N_opt", "L", "hoffmann N_opt", "L", "half-width N_opt", "L")
    for name in (*columns, "law", "default"):
        table.add_column(name, justify="right")
    for item in cells:
        by_noise = (item.noise_params, item.noise_loss)
        shares = (item.params, item.loss, *by_noise, item.hoffmann_params, item.hoffmann_loss)
        widths = (f"{item.width_params:.3f}", f"{item.width_loss:.2%}")
        rest = (f"{item.by_law:.0%}", f"{item.default:.0%}")
        told = (*(f"{s:.1%}" for s in shares), *widths, *rest)
        table.add_row(item.truth, item.design, item.noise, *told)
    console = Console(width=150)
    console.print(table)
    for name, value in summary.items():
        console.print(f"{name}: {value}")


if __name__ == "__main__":
    main()
