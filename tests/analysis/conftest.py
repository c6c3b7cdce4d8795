"""Sweeps of known truths, and published studies, for every test of the room."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from analysis.laws import Law, loss
from analysis.observations import FloatArray, Observations
from analysis.optimum import FlopsPerToken

Sweep = Callable[..., Observations]
MINI_GRID = {
    4e10: (12, 16, 20, 24, 32, 48, 64),
    1.2e11: (16, 24, 32, 40, 48, 64, 96),
    3.6e11: (20, 24, 32, 40, 48, 64, 96),
    1.08e12: (32, 40, 48, 64, 80, 96, 128),
}
"""Widths at each budget of the mini recipe."""
WIDTHS = np.array([12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256.0])


def _observed(
    law: Law,
    constants: Mapping[str, float],
    params: FloatArray,
    tokens: FloatArray,
    flops: FloatArray,
    budget: FloatArray,
    noise: float,
    seed: int,
) -> Observations:
    exact = loss(law.theta(constants), params, tokens)
    scatter = np.random.default_rng(seed).standard_normal(len(exact))
    return Observations(
        params=params,
        tokens=tokens,
        flops=flops,
        loss=exact * np.exp(noise * scatter),
        loss_stderr=np.full(len(exact), np.nan),
        budget=budget,
    )


@pytest.fixture(scope="session")
def sweep() -> Sweep:
    """An IsoFLOP sweep of a known truth, C = 6 N D, grids around a ratio D/N."""

    def make(
        law: Law,
        constants: Mapping[str, float],
        *,
        noise: float = 0.0,
        seed: int = 0,
        base: float = 1e18,
        budgets: int = 4,
        sizes: int = 7,
        step: float = 4.0,
        span: float = 16.0,
        centre: float = 20.0,
        at: Sequence[float] | None = None,
        replicates: int = 1,
    ) -> Observations:
        chosen = base * step ** np.arange(budgets) if at is None else np.array(at)
        flops = np.repeat(chosen, sizes * replicates)
        grid = np.exp(np.linspace(-0.5, 0.5, sizes) * np.log(span))
        params = np.sqrt(flops / (6 * centre)) * np.tile(np.repeat(grid, replicates), len(chosen))
        tokens = flops / (6 * params)
        return _observed(law, constants, params, tokens, flops, flops, noise, seed)

    return make


def mini_flops(width: FloatArray) -> FloatArray:
    """FLOPs a token of the mini shapes: depth 2, context 64, 256 symbols; N = 24 width^2."""
    return np.asarray(6 * (24 * width**2 + 256 * width) + 780 * width)


@pytest.fixture(scope="session")
def mini_cost() -> FlopsPerToken:
    """FLOPs a token of the mini shapes as a function of N."""
    return FlopsPerToken(24 * WIDTHS**2, mini_flops(WIDTHS))


@pytest.fixture(scope="session")
def mini_sweep() -> Sweep:
    """The mini recipe's own grid, with its exact FLOPs per token, under a known truth."""

    def make(
        law: Law,
        truth: Mapping[str, float],
        *,
        noise: float = 0.0,
        seed: int = 0,
        grid: Mapping[float, Sequence[float]] = MINI_GRID,
    ) -> Observations:
        budget = np.repeat(list(grid), [len(widths) for widths in grid.values()])
        width = np.concatenate([np.array(w, dtype=float) for w in grid.values()])
        tokens = np.round(budget / mini_flops(width))
        flops = tokens * mini_flops(width)
        return _observed(law, truth, 24 * width**2, tokens, flops, budget, noise, seed)

    return make


@pytest.fixture(scope="session")
def chinchilla_points(chinchilla_csv: Path) -> Sweep:
    """Hoffmann et al.'s points as Besiroglu et al. 2024 digitised them, largest losses left out."""

    def read(drop_largest: int = 5) -> Observations:
        with chinchilla_csv.open() as lines:
            rows = list(csv.DictReader(lines))
        n, c, losses = (
            np.array([float(row[name]) for row in rows])
            for name in ("Model Size", "Training FLOP", "loss")
        )
        nan = np.full(len(rows), np.nan)
        every = Observations(
            params=n, tokens=c / (6 * n), flops=c, loss=losses, loss_stderr=nan, budget=nan
        )
        return every.without_largest(drop_largest)

    return read


@pytest.fixture(scope="session")
def reference_study(isoflop_csv: Path) -> Sweep:
    """The observations of a published study, outliers left out."""

    def read(study: str) -> Observations:
        with isoflop_csv.open() as lines:
            rows = [r for r in csv.DictReader(lines) if r["study"] == study]
        kept = [row for row in rows if row["outlier"] == "false"]
        n, d, c, losses = (
            np.array([float(row[name]) for row in kept])
            for name in ("params", "tokens", "budget_flops", "loss")
        )
        nan = np.full(len(kept), np.nan)
        return Observations(params=n, tokens=d, flops=c, loss=losses, loss_stderr=nan, budget=c)

    return read
