"""Whether a sweep's learning rates hold: trials of its grid beside their probes.

A probe has the shape, tokens, batch and seed of a trial of the grid and another peak rate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from analysis.intervals import t_quantile
from analysis.observations import KIND_COLUMNS

PROBES = "probes of rate or batch, for no fit"
"""Why their rows are left out."""
SEEDS = ((4e10, 0.0079), (1.2e11, 0.0060), (3.6e11, 0.0046), (1.08e12, 0.0046), (1e18, 0.004))
"""FLOPs, and the standard deviation of ln L by seed there: as measured in mini's four budgets, and
the most of what is known from 1e18 FLOPs on, which is 0.1 to 0.4%."""
FALSE_ALARMS = 0.05
"""Share of sweeps whose rates hold of which some probe beats its rung by chance."""
LEAST_DOF = 4
"""Degrees of freedom from which a sweep's own seeds tell more of its noise than others' do."""
COLUMNS = (
    *KIND_COLUMNS,
    *("trial", "width", "depth", "heads", "tokens", "batch_tokens", "seed", "status", "loss"),
    *("loss_stderr", "params_non_embedding", "flops_exact", "probe_rate", "probe_batch"),
)
"""Of an observation, what is needed here."""
_SAME = (*KIND_COLUMNS, "width", "depth", "heads", "tokens", "batch_tokens", "seed")


@dataclass(frozen=True, kw_only=True)
class Probed:
    """One probe of a rung."""

    factor: float
    """Its rate over the rung's."""
    loss: float | None
    """nats/token; None where it diverged."""
    stderr: float | None
    """Of the held-out text, which says nothing of what another training would give."""


@dataclass(frozen=True, kw_only=True)
class SeedNoise:
    """How much trainings differ that differ in nothing but their seeds."""

    over: float = 1.0
    """Standard deviation of ln L over that of `SEEDS`."""
    dof: float = math.inf
    """Degrees of freedom of that; infinite where it is taken for known."""

    def chance(self, loss: float, flops: float, probes: int) -> float:
        """Nats by which one of so many probes has to beat its rung, so that it is no chance.

        Probe and rung are each one training, so that the difference has twice the variance of one;
        one-sided, and with Bonferroni's share of `FALSE_ALARMS` for each probe.
        """
        sure = t_quantile(self.dof, 1.0 - 2.0 * FALSE_ALARMS / probes)
        return sure * math.sqrt(2.0) * self.over * seed_sd(flops) * loss


def seed_sd(flops: float) -> float:
    """Standard deviation of ln L by seed, as far as it is known for trainings of so many FLOPs."""
    at, known = zip(*SEEDS, strict=True)
    return float(np.interp(math.log(flops), np.log(at), known))


@dataclass(frozen=True, kw_only=True)
class Rung:
    """A trial of the grid, and what other rates make of it."""

    width: int
    params: int
    """N, non-embedding."""
    tokens: int
    flops: float
    """Exact, of the trial."""
    loss: float
    """nats/token."""
    stderr: float | None
    chance: float
    """Nats by which a probe has to beat it: by less it may by chance."""
    probes: tuple[Probed, ...]
    """By rate, ascending."""

    @property
    def known(self) -> bool:
        """Whether any of its probes was measured, and not all diverged."""
        return any(probe.loss is not None for probe in self.probes)

    @property
    def better(self) -> Probed | None:
        """The best of the probes that beat the rung by more than chance, if any does."""
        found = [
            (probe.loss, probe)
            for probe in self.probes
            if probe.loss is not None and self.loss - probe.loss > self.chance
        ]
        return min(found, key=lambda item: item[0])[1] if found else None

    @property
    def undertuned(self) -> str | None:
        """What is wrong with the rung's rate, as a sentence; None where it holds."""
        best = self.better
        if best is None:
            return None
        return (
            f"the rung at width {self.width} is undertuned: {_name(best.factor)} the rate gives "
            f"{best.loss:.3f} nats against {self.loss:.3f} at {self.flops:.3g} FLOPs. That bends "
            "exponents: give the recipe other rates, or one of which isoflop tune finds them"
        )


def is_probe(table: pa.Table) -> pa.ChunkedArray:
    """Which rows of a table with `SCHEMA`'s columns are of probes."""
    return pc.or_(pc.is_valid(table["probe_rate"]), pc.is_valid(table["probe_batch"]))


def rungs(grid: pa.Table, every: pa.Table) -> tuple[Rung, ...]:
    """Rows of `grid` that have probes of the rate among `every`, both with `COLUMNS`; by N and D.

    Probes that were not measured yet are no part of it, nor are rungs that diverged. Noise is that
    of seeds: as the rows themselves tell it, where enough of them differ by their seed alone.
    """
    marked = every.filter(is_probe(every)).select(COLUMNS).to_pylist()
    by_trial: dict[tuple[Any, ...], dict[float, Probed]] = {}
    for row in marked:
        if row["probe_batch"] == 1.0 and row["probe_rate"] != 1.0:
            loss = row["loss"] if row["status"] == "complete" else None
            factor = row["probe_rate"]
            probe = Probed(factor=factor, loss=loss, stderr=row["loss_stderr"] if loss else None)
            by_trial.setdefault(_name_of(row), {})[factor] = probe
    if not by_trial:
        return ()
    rows = [row for row in _complete(grid).to_pylist() if _name_of(row) in by_trial]
    probed = sum(len(by_trial[_name_of(row)]) for row in rows)
    seeds = _seeds(every)
    found = [
        Rung(
            width=row["width"],
            params=row["params_non_embedding"],
            tokens=row["tokens"],
            flops=row["flops_exact"],
            loss=row["loss"],
            stderr=row["loss_stderr"],
            chance=seeds.get(_kind_of(row), SeedNoise()).chance(
                row["loss"], row["flops_exact"], probed
            ),
            probes=tuple(probe for _, probe in sorted(by_trial[_name_of(row)].items())),
        )
        for row in rows
    ]
    return tuple(sorted(found, key=lambda rung: (rung.params, rung.tokens)))


def _complete(table: pa.Table) -> pa.Table:
    """Rows that are no probe's and have a loss."""
    kept = pc.and_(pc.invert(is_probe(table)), pc.equal(table["status"], "complete"))
    return table.filter(kept).select(COLUMNS)


def _seeds(every: pa.Table) -> dict[tuple[Any, ...], SeedNoise]:
    """By kind, how much trainings differ by seed, where enough were trained with several.

    Programs that ignore their seed tell nothing. The horizons of a trunk share most of what its
    seed does: together they are one repetition.
    """
    same: dict[tuple[Any, ...], list[tuple[float, str]]] = {}
    for row in _complete(every).to_pylist():
        if row["seed"] is None or row["flops_exact"] is None:  # somebody else's, of little known
            continue
        place = _kind_of(row), tuple(row[name] for name in _SAME if name != "seed")
        value = math.log(row["loss"]) / seed_sd(row["flops_exact"])
        same.setdefault(place, []).append((value, row["trial"]))
    repeated: dict[tuple[Any, ...], dict[frozenset[str], list[float]]] = defaultdict(dict)
    for (kind, _), found in same.items():
        values, trials = zip(*found, strict=True)
        repeated[kind].setdefault(frozenset(trials), []).append(float(np.var(values)) * len(values))
    noise = {}
    for kind, by_trials in repeated.items():
        squares = sum(float(np.mean(sums)) for sums in by_trials.values())
        dof = sum(len(trials) - 1 for trials in by_trials)
        if dof >= LEAST_DOF and squares > 0.0:
            noise[kind] = SeedNoise(over=math.sqrt(squares / dof), dof=dof)
    return noise


def undertuned(found: Sequence[Rung]) -> tuple[str, ...]:
    """What is wrong with rungs, a sentence each."""
    return tuple(said for rung in found if (said := rung.undertuned))


def verdict(found: Sequence[Rung]) -> str | None:
    """That the rates hold, where they do; None where some do not, or nothing was measured."""
    wrong = undertuned(found)
    found = [rung for rung in found if rung.known]
    if not found or wrong:
        return None
    factors = sorted({probe.factor for rung in found for probe in rung.probes})
    widths = list(dict.fromkeys(str(rung.width) for rung in found))
    within = max(rung.chance for rung in found)
    return (
        f"rates hold: {' and '.join(map(_name, factors))} the rate is no better at width"
        f"{'s' * (len(widths) > 1)} {_listed(widths)}, to within {within:.3f} nats"
    )


def rungs_json(found: Sequence[Rung]) -> list[dict[str, Any]]:
    """Rungs with their probes, JSON-ready."""
    return [
        {
            "width": rung.width,
            "params_non_embedding": rung.params,
            "tokens": rung.tokens,
            "flops": rung.flops,
            "loss": rung.loss,
            "loss_stderr": rung.stderr,
            "chance": rung.chance,
            "undertuned": rung.better is not None if rung.known else None,
            "probes": [
                {"rate": probe.factor, "loss": probe.loss, "loss_stderr": probe.stderr}
                for probe in rung.probes
            ],
        }
        for rung in found
    ]


def _name(factor: float) -> str:
    return {0.5: "half", 2.0: "double"}.get(factor, f"{factor:g} times")


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _name_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a probe shares with its rung."""
    return tuple(row[name] for name in _SAME)


def _kind_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KIND_COLUMNS)
