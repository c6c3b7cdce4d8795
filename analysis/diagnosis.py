"""Whether a model of N parameters on D tokens is compute-optimal: verdict, waste, and its price.

Every verdict names the law that speaks it and how that law counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from analysis.approaches import distance_outside
from analysis.discrepancy import Discrepancy, quantile
from analysis.errors import InputError
from analysis.fitting import Fit
from analysis.headline import outside_ratios
from analysis.intervals import Interval, standard_errors, t_quantile
from analysis.laws import PUBLISHED, Law, log_loss
from analysis.observations import FloatArray, Observations
from analysis.optimum import FlopsPerToken, Optimum, log_optimal_params, optimum
from analysis.tradeoffs import needed_flops
from analysis.wording import CONVENTIONS, count

Verdict = Literal["undertrained", "overtrained", "compute-optimal"]

LARGEST = 1e30
"""Parameters or tokens that a run may have: a trillion trillion times what anybody trains with."""
OPTIMAL_EXCESS = 0.01
"""Up to this excess a run is compute-optimal. Under alpha + beta = .7 it is a size within 18% of
the optimal one, which is less than anybody knows N_opt to."""
PLAUSIBLE_RATIO = (0.01, 1e5)
"""Tokens per parameter beyond which a slip of units is likelier than a plan: GPT-3 has 1.7, and the
longest trained models 1e4 (Sardana et al. 2023, arXiv 2401.00448)."""
FEWEST = 1000.0
"""Parameters or tokens below which a number was likelier meant in millions or billions."""
MFU = 0.4
"""Share of peak FLOP/s that training reaches where nobody measured it. PaLM reached 46% (Chowdhery
et al. 2022, arXiv 2204.02311, Table 3), Llama 3 405B 38 to 43% (Grattafiori et al. 2024, arXiv
2407.21783, Table 4)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Basis:
    """What a verdict rests on: a law, its constants, and how it counts N and C."""

    name: str
    """Short and unique among the bases of one answer, such as `besiroglu-2024` or `hoffmann`."""
    cited: str
    """As in "by ...": whose law it is, and under which conventions."""
    law: Law
    theta: FloatArray
    """Its constants, laid out as `Law` says."""
    cost: FlopsPerToken
    """Training FLOPs per token as a function of N."""
    loss_unit: str = "nats/token"
    fit: Fit | None = None
    """Where the constants come from, if they were fitted here: then the excess has an interval."""
    measured: Observations | None = None
    """Observations to which the law was fitted, if it was fitted here."""
    discrepancy: Discrepancy | None = None
    """Error of the law beyond noise outside the measured budgets, if it was fitted here."""


def published_basis(name: str) -> Basis:
    """A paper's law, by its name in `PUBLISHED`; C = 6 N D.

    Raises
    ------
    InputError
        If there is no such law, or it is of one variable.
    """
    usable = {key: paper for key, paper in PUBLISHED.items() if paper.law.variables[1]}
    if name not in usable:
        raise InputError(
            f"{name} is neither a file or project nor a published law of N and D, which are "
            f"{', '.join(usable)}"
        )
    paper = usable[name]
    return Basis(
        name=name,
        cited=f"the law of {paper.cite} ({_counted(paper.params_convention, '6nd')})",
        law=paper.law,
        theta=paper.theta,
        cost=FlopsPerToken.six_n(),
    )


def fitted_basis(
    fit: Fit, obs: Observations, cost: FlopsPerToken, discrepancy: Discrepancy | None = None
) -> Basis:
    """A law as it was fitted to (some of) `obs`; `cost` under their convention of C."""
    counted = _counted(obs.params_convention, obs.flops_convention)
    n = fit.n if fit.n < len(obs) else obs.rows
    return Basis(
        name=fit.law.name,
        cited=f"the {fit.law.name} law fitted to {n} observations ({counted})",
        law=fit.law,
        theta=fit.theta,
        cost=cost,
        loss_unit=obs.loss_unit,
        fit=fit,
        measured=obs,
        discrepancy=discrepancy,
    )


def _counted(params: str, flops: str) -> str:
    return f"N: {CONVENTIONS[params]}, C: {CONVENTIONS[flops]}"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What one law says of one (N, D)."""

    basis: str
    """Name of the basis."""
    cited: str
    """Whose law, under which conventions."""
    params: float
    """N, in parameters."""
    tokens: float
    """D, in tokens."""
    flops: float
    """C = c(N) D, in FLOPs: what it took."""
    loss: float
    """L at (N, D) by the law, in `loss_unit`."""
    loss_unit: str
    optimum: Optimum
    """The best that the same C buys."""
    needed_flops: float
    """The least C, in FLOPs, that buys the same loss."""
    needed: Optimum
    """What it buys it with."""
    excess: float
    """C / needed - 1: how much more it took than it needed. .99 for Gopher."""
    excess_interval: Interval | None
    """None where the constants have no known uncertainty."""
    verdict: Verdict
    extrapolations: tuple[str, ...] = ()
    """Sentences that name each part of the verdict that extrapolates beyond the measured D/N."""

    @property
    def wasted_flops(self) -> float:
        """C - needed, in FLOPs."""
        return self.flops - self.needed_flops

    @property
    def wasted(self) -> float:
        """The share of its own FLOPs that a better plan would have saved. .50 for Gopher."""
        return self.wasted_flops / self.flops


def diagnose(basis: Basis, params: float, tokens: float, level: float = 0.9) -> Diagnosis:
    """Judge N parameters on D tokens by one law.

    Parameters
    ----------
    basis
        The law.
    params
        N, in parameters, counted as the basis counts.
    tokens
        D, in tokens.
    level
        Nominal coverage of the interval of the excess.

    Raises
    ------
    InputError
        If N or D is not a positive number, or the law has no optimum.

    Notes
    -----
    Too few tokens for its size is `undertrained`, too many `overtrained`: of two models at equal
    loss that cost as much too much, the overtrained one is the cheaper to serve.

    Examples
    --------
    >>> found = diagnose(published_basis("besiroglu-2024"), 175e9, 300e9)  # GPT-3
    >>> found.verdict, round(found.excess, 2), round(found.wasted, 2)
    ('undertrained', 0.64, 0.39)
    """
    for name, value, unit in (("N", params, "parameters"), ("D", tokens, "tokens")):
        if not 0.0 < value <= LARGEST:
            raise InputError(
                f"{name} is {value:g}; it must be a positive number of {unit}, at most {LARGEST:g}"
            )
    law, theta, cost = basis.law, basis.theta, basis.cost
    flops = cost(params) * tokens
    needed = needed_flops(law, theta, params, tokens, cost)
    best = optimum(theta, flops, cost)
    # At the optimum itself rounding may put the need above what was spent.
    excess = max(flops / needed - 1.0, 0.0)
    return Diagnosis(
        basis=basis.name,
        cited=basis.cited,
        params=params,
        tokens=tokens,
        flops=flops,
        loss=float(np.exp(log_loss(theta, np.log(params), np.log(tokens)))),
        loss_unit=basis.loss_unit,
        optimum=best,
        needed_flops=min(needed, flops),
        needed=optimum(theta, min(needed, flops), cost),
        excess=excess,
        excess_interval=_excess_interval(basis, params, tokens, excess, level),
        verdict=_verdict(excess, params, best.params),
        extrapolations=_extrapolations(basis, params, tokens, best),
    )


def _extrapolations(basis: Basis, params: float, tokens: float, best: Optimum) -> tuple[str, ...]:
    if basis.measured is None:
        return ()
    plans = (
        (params, tokens, "this run"),
        (best.params, best.tokens, f"the {basis.name} law's optimum at its C"),
    )
    notes = (outside_ratios(basis.measured, n, d, whose) for n, d, whose in plans)
    return tuple(f"the verdict extrapolates in D/N: {note}" for note in notes if note)


def _verdict(excess: float, params: float, best: float) -> Verdict:
    if excess <= OPTIMAL_EXCESS:
        return "compute-optimal"
    return "undertrained" if params > best else "overtrained"


def _excess_interval(
    basis: Basis, params: float, tokens: float, excess: float, level: float
) -> Interval | None:
    """Interval of the excess, by the delta method twice.

    Near the optimum the excess is the square of how far N is off, ln(N / N_opt): its own gradient
    vanishes there and promises certainty. So the upper end is carried over from the interval of
    ln(N / N_opt) where that is the higher one. Nominal 90% intervals cover 88 to 96% (150 sweeps of
    28 points with .5% noise, N at .25, 1.3, 2 and 4 times the optimum, C the largest measured and
    16 times that), and always where the truth is no excess at all; at 1.2 times the optimum, 1%
    noise, 98% instead of the 83% that the excess' own delta method covers.

    What the law is off by beyond noise belongs into it: outside the measured budgets N_opt may lie
    elsewhere, nearer to this run or farther from it, and the excess is what it would be then.
    """
    fit, cost = basis.fit, basis.cost
    if fit is None:
        return None
    if not fit.sound:
        return Interval(excess, 0.0, math.inf, level)
    flops = cost(params) * tokens

    def quantities(theta: FloatArray) -> FloatArray:
        needed = needed_flops(fit.law, theta, params, tokens, cost)
        off = math.log(params) - log_optimal_params(theta, flops, cost)
        return np.array([math.log(flops) - math.log(needed), off])

    found = standard_errors(fit, quantities)
    over, off = found.values
    # Shape (2, 2): of both quantities, towards the lower and the upper end.
    half = np.array([[t_quantile(k, level) for k in row] for row in found.dof]) * found.stderr
    half = np.minimum(half, 50.0)

    def over_at(end: float) -> float:
        """The excess of a run as far off the optimum as `end`, as a logarithm."""
        n = math.exp(math.log(params) - off + end)
        return math.log(flops / needed_flops(fit.law, fit.theta, n, flops / cost(n), cost))

    by_law = _by_law(basis, flops, level)
    below, above = (math.hypot(part, by_law) for part in half[1])
    highest = max(over + half[0, 1], over_at(off - below), over_at(off + above))
    lowest = over - half[0, 0]
    if by_law > 0.0:
        nearest = max(off - below, 0.0) if off > 0.0 else min(off + above, 0.0)
        lowest = min(lowest, over_at(nearest))
    low = math.expm1(max(lowest, 0.0))
    return Interval(excess, low, math.expm1(min(highest, 700.0)), level)


def _by_law(basis: Basis, flops: float, level: float) -> float:
    """Half-width of ln N_opt for what the law is off by beyond noise; 0 where nothing is known."""
    if basis.discrepancy is None or basis.measured is None:
        return 0.0
    distance = distance_outside(basis.measured, flops)
    return quantile(level) * basis.discrepancy.at(distance).params


@dataclass(frozen=True, kw_only=True)
class Rate:
    """What a FLOP costs on some GPU."""

    gpu: str
    """Name of the type."""
    peak_flops: float
    """Dense peak of one GPU, in FLOP/s."""
    mfu: float = MFU
    """Share of the peak that training reaches."""
    dollars_per_gpu_hour: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.peak_flops) and self.peak_flops > 0.0):
            raise InputError(f"the peak of {self.gpu} is {self.peak_flops} FLOP/s; it is positive")
        if not 0.0 < self.mfu <= 1.0:
            raise InputError(f"the MFU is {self.mfu}; it is a share of the peak, above 0 to 1")
        price = self.dollars_per_gpu_hour
        if price is not None and not (math.isfinite(price) and price > 0.0):
            raise InputError(f"a GPU-hour costs {price} dollars; it must be a positive price")

    def gpu_hours(self, flops: float) -> float:
        """GPU-hours that `flops` take.

        Examples
        --------
        >>> rate = Rate(gpu="A100 80GB", peak_flops=312e12)
        >>> round(rate.gpu_hours(6 * 70e9 * 1.4e12))  # Chinchilla
        1308761
        """
        return flops / (self.peak_flops * self.mfu * 3600.0)

    def dollars(self, flops: float) -> float | None:
        """What `flops` cost; None without a price."""
        if self.dollars_per_gpu_hour is None:
            return None
        return self.gpu_hours(flops) * self.dollars_per_gpu_hour


def sentence(found: Diagnosis) -> str:
    """The verdict in words, with the law that speaks it."""
    run = f"{count(found.params)} parameters on {count(found.tokens)} tokens"
    best = f"{count(found.optimum.params)} parameters on {count(found.optimum.tokens)} tokens"
    spent = f"{found.flops:.3g} FLOPs"
    loss = f"{found.loss:.3f} {found.loss_unit}"
    opening = f"By {found.cited}, {run} are {found.verdict}:"
    if found.verdict == "compute-optimal":
        return (
            f"{opening} its {spent} are within {max(found.excess, 1e-4):.2%}{_uncertainty(found)} "
            f"of the least that buy its loss, {loss}; the best plan is {best}"
        )
    return (
        f"{opening} the same {spent} are best spent on {best}, and {found.needed_flops:.3g} FLOPs "
        f"buy the same loss, {loss}; it takes {_percent(found.excess)} more than "
        f"needed{_uncertainty(found)}, which wastes {found.wasted:.0%} of its FLOPs"
    )


def _uncertainty(found: Diagnosis) -> str:
    part = found.excess_interval
    if part is None:
        return ""
    return f" ({part.level:.0%} interval {_percent(part.low)} to {_percent(part.high)})"


def _percent(value: float) -> str:
    return f"{value:.0%}" if value < 1e4 else "∞"


def cautions(found: Sequence[Diagnosis]) -> tuple[str, ...]:
    """What weakens the verdicts, a sentence each."""
    notes = []
    n, d = found[0].params, found[0].tokens
    if min(n, d) < FEWEST or not PLAUSIBLE_RATIO[0] <= d / n <= PLAUSIBLE_RATIO[1]:
        notes.append(
            f"N is {n:.3g} and D is {d:.3g}, {d / n:.3g} tokens a parameter: are they in single "
            "parameters and tokens, as they must be?"
        )
    if len({item.verdict for item in found}) > 1:
        each = ", ".join(f"{item.basis}: {item.verdict}" for item in found)
        notes.append(f"the laws disagree ({each})")
    notes += found[0].extrapolations
    for item in found:
        part = item.excess_interval
        if part and item.verdict != "compute-optimal" and part.low <= OPTIMAL_EXCESS:
            notes.append(f"{item.basis} law: the data do not rule out that it is compute-optimal")
    return tuple(notes)


def diagnosis_json(
    found: Sequence[Diagnosis], rate: Rate | None = None, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Diagnoses of one (N, D) as JSON-ready values; the first is the answer, each is in `laws`."""
    first = found[0]
    return {
        "params": first.params,
        "tokens": first.tokens,
        "tokens_per_param": first.tokens / first.params,
        **_one_json(first),
        "laws": {item.basis: _one_json(item) for item in found},
        "money": _money_json(first, rate) if rate else None,
        "warnings": [*cautions(found), *notes],
    }


def _one_json(item: Diagnosis) -> dict[str, Any]:
    part = item.excess_interval
    return {
        "law": item.cited,
        "verdict": item.verdict,
        "sentence": sentence(item),
        "flops": item.flops,
        "loss": item.loss,
        "optimum": _optimum_json(item.optimum),
        "needed_flops": item.needed_flops,
        "needed": _optimum_json(item.needed),
        "excess": _finite(item.excess),
        "excess_interval": [part.low, _finite(part.high)] if part else None,
        "level": part.level if part else None,
        "wasted": item.wasted,
        "wasted_flops": item.wasted_flops,
    }


def _optimum_json(best: Optimum) -> dict[str, float]:
    return {
        "params": best.params,
        "tokens": best.tokens,
        "tokens_per_param": best.tokens / best.params,
        "loss": best.loss,
    }


def _money_json(item: Diagnosis, rate: Rate) -> dict[str, Any]:
    return {
        "gpu": rate.gpu,
        "peak_flops_per_second": rate.peak_flops,
        "mfu": rate.mfu,
        "dollars_per_gpu_hour": rate.dollars_per_gpu_hour,
        "gpu_hours": rate.gpu_hours(item.flops),
        "wasted_gpu_hours": rate.gpu_hours(item.wasted_flops),
        "dollars": rate.dollars(item.flops),
        "wasted_dollars": rate.dollars(item.wasted_flops),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
