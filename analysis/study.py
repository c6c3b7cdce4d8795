"""Everything that the observations of one kind say, in one value: for people, figures and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.approaches import IsoflopFit, isoflop
from analysis.cells import cells as label_cells
from analysis.discrepancy import Discrepancy
from analysis.envelope import Curve, EnvelopeFit, envelope
from analysis.errors import InputError
from analysis.factors import Factor
from analysis.fitting import LEAST_SQUARES, Fit, Method, fit
from analysis.forecast import Forecast, forecast
from analysis.headline import Headline, headline
from analysis.heldout import (
    BackTest,
    Heldout,
    back_tests,
    discrepancy_of,
    leave_one_out,
    predictions,
    roll_forward,
)
from analysis.lack_of_fit import lack_of_fit, strays
from analysis.laws import GENERALISED, HOFFMANN, KAPLAN
from analysis.observations import Observations
from analysis.optimum import FlopsPerToken, optimum
from analysis.pair import Basis, GammaTest, fit_basis
from analysis.rungs import Rung
from analysis.uncertainty import IntervalKind, LawIntervals, law_intervals

NEXT_STEP = (2.0, 10.0)
"""Least and largest ratio of the next budget to the top one, where not given."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """Approaches, fits, held-out errors and the forecast at the next budget."""

    obs: Observations
    excluded: Mapping[str, int]
    """Observations left out, by reason."""
    notes: tuple[str, ...]
    """What was noticed while reading the observations."""
    level: float
    """Nominal coverage of all intervals."""
    method: Method
    cost: FlopsPerToken
    envelope: EnvelopeFit
    """Approach 1."""
    isoflop: IsoflopFit
    """Approach 2."""
    fits: tuple[Fit, ...]
    """Approach 3, by every law that could be fitted."""
    refusals: Mapping[str, str]
    """Laws that could not be fitted, with the reason."""
    at_top: tuple[Forecast, ...]
    """What each law says at the top budget, in the order of `fits`."""
    intervals: tuple[LawIntervals, ...]
    """How well each law's constants and exponents are known, in the order of `fits`."""
    gamma: GammaTest | None
    """Whether the generalised law is needed; None where it could not be fitted."""
    heldout: tuple[Heldout, ...]
    """The largest budgets, each predicted from those below it, largest first."""
    back_tests: tuple[BackTest, ...]
    """The intervals that forecasts of those budgets would have had, in the order of `heldout`."""
    discrepancy: Discrepancy
    """Error of the law beyond noise, estimated from all back-tests."""
    left_out: tuple[Heldout, ...]
    """Every budget, predicted from all others, smallest first."""
    next: Headline | None
    """The forecast at the next budget; None where there is none."""
    next_refusal: str | None
    """Why the laws that were fitted give no forecast at the next budget, else None."""
    rungs: tuple[Rung, ...] = ()
    """Observations that were probed at other learning rates."""
    cells: int = 0
    """Distinct cells of N and D among the rows behind `obs`."""
    factors: tuple[Factor, ...] = ()
    """Columns that explain differences among rows of equal N and D."""

    @property
    def top_flops(self) -> float:
        """C of the largest budget, in FLOPs under the convention of `obs`."""
        return _top(self.obs, self.isoflop)

    @property
    def by_law(self) -> tuple[float | None, ...]:
        """N_opt at each vertex's C by the law that leads the fits to all rows, in parameters.

        Beside a vertex it shows by how much a parabola misreads the optimum: high where alpha is
        above beta, low where it is below, in proportion to 1 / gamma (centred grids of 16x, alpha
        gamma = .3, beta gamma = .175: 2.6% at gamma = 1, 5.0% at .5, 6.8% at .35). None for each
        vertex where there is no forecast.
        """
        vertices = self.isoflop.vertices
        if self.next is None:
            return (None,) * len(vertices)
        theta = self.next.all.leading.theta
        return tuple(optimum(theta, vertex.flops, self.cost).params for vertex in vertices)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What weakens the answer, a sentence each."""
        found = list(self.notes)
        found += [
            f"{name} law: {reason}" for name, reason in self.refusals.items() if name != KAPLAN.name
        ]
        found += self.isoflop.faults
        laws = [item for item in self.fits if item.law.name != KAPLAN.name]
        for item in laws:  # Kaplan's is shown for comparison: nothing rests on it
            misfit = lack_of_fit(item, self.obs, self.isoflop)
            found += [f"{item.law.name} law: {s}" for s in (item.reason, item.warning, misfit) if s]
        if self.next is None and (stray := strays(laws, self.obs)):  # else its notes say so
            found.append(stray)
        found += [
            f"{item.law.name} law: {known.note}"
            for item, known in zip(self.fits, self.intervals, strict=True)
            if known.note
        ]
        found += [self.next_refusal] if self.next_refusal else []
        return tuple(dict.fromkeys([*found, *(self.next.notes if self.next else ())]))


def study(
    obs: Observations,
    *,
    cost: FlopsPerToken,
    level: float = 0.9,
    method: Method = LEAST_SQUARES,
    excluded: Mapping[str, int] | None = None,
    notes: Sequence[str] = (),
    next_flops: float | None = None,
    curves: Sequence[Curve] | None = None,
    heldout: int | None = None,
    intervals: IntervalKind = "t",
    rungs: Sequence[Rung] = (),
    cells: int | None = None,
    factors: Sequence[Factor] = (),
) -> Study:
    """Fit everything to `obs`.

    Parameters
    ----------
    obs
        Observations of one kind; parabolas and held-out errors need nominal budgets.
    cost
        Training FLOPs a token as a function of N, under the convention of `obs`.
    level
        Nominal coverage of intervals.
    method
        How laws are fitted.
    excluded, notes
        What was left out before, by reason, and what was noticed, to be reported.
    next_flops
        Budget of the forecast; by default the top one times the ratio of the last two.
    curves
        Undecayed training curves for the envelope, instead of decayed horizons.
    heldout
        Top budgets to hold out one after the other; by default up to three. With 0 none is, nor is
        each in turn.
    intervals
        Of which kind those of the laws' constants and exponents are.
    rungs
        Observations that were probed at other learning rates, to be reported.
    cells
        Distinct cells of N and D, where `obs` is what many rows were pooled into.
    factors
        Columns that explain differences among rows of equal N and D, to be reported.

    Raises
    ------
    InputError
        If there is no forecast at `next_flops`, or as `law_intervals` and `roll_forward` do. A law
        that cannot be fitted is a refusal with its reason, not an error; so is a default next
        budget without a forecast.
    """
    valleys = isoflop(obs, level)
    basis, fits, refusals = _fits(obs, method)
    made = predictions(obs, cost, method=method) if basis else ()
    discrepancy = discrepancy_of(made)
    ahead, refusal = None, None
    try:
        flops = next_flops or next_budget(obs)
        if basis:
            ahead = headline(
                obs, flops, cost, level, method=method, basis=basis, discrepancy=discrepancy
            )
    except InputError as error:
        if next_flops:
            raise
        refusal = str(error)
    at_top = tuple(forecast(item, _top(obs, valleys), cost, level) for item in fits)
    known = zip(fits, at_top, strict=True)
    below = {item.budget: item.basis for item in made}
    rolled = roll_forward(obs, top=heldout, method=method, bases=below)
    return Study(
        obs=obs,
        excluded=excluded or {},
        notes=tuple(notes),
        level=level,
        method=method,
        cost=cost,
        envelope=envelope(obs, level, curves),
        isoflop=valleys,
        fits=fits,
        refusals=refusals,
        at_top=at_top,
        intervals=tuple(law_intervals(item, obs, said, cost, intervals) for item, said in known),
        gamma=basis.all.test if basis else None,
        heldout=rolled,
        back_tests=back_tests(obs, made, cost, top=len(rolled), level=level),
        discrepancy=discrepancy,
        left_out=() if heldout == 0 else leave_one_out(obs, method=method),
        next=ahead,
        next_refusal=refusal,
        rungs=tuple(rungs),
        cells=int(label_cells(obs.params, obs.tokens).max()) + 1 if cells is None else cells,
        factors=tuple(factors),
    )


def _fits(
    obs: Observations, method: Method
) -> tuple[Basis | None, tuple[Fit, ...], dict[str, str]]:
    """Every law that can be fitted, and why the others cannot."""
    refusals: dict[str, str] = {}
    fits: list[Fit] = []
    basis = None
    try:
        basis = fit_basis(obs, method)
        fits += basis.all.fits
        if basis.all.note:
            refusals["generalised"] = basis.all.note
    except InputError as error:
        refusals[HOFFMANN.name] = str(error)
    try:
        fits.append(fit(KAPLAN, obs, method=method))
    except InputError as error:
        refusals[KAPLAN.name] = str(error)
    if basis is None:
        for law in (GENERALISED, KAPLAN):
            refusals.setdefault(law.name, "fitted only beside the hoffmann law, which is refused")
        fits.clear()
    return basis, tuple(fits), refusals


def _top(obs: Observations, valleys: IsoflopFit) -> float:
    return valleys.vertices[-1].flops if valleys.vertices else float(obs.flops.max())


def next_budget(obs: Observations) -> float:
    """C of the next budget, as far above the top one's as the top budget is above the one before.

    In FLOPs under the convention of `obs`.
    """
    budgets = obs.budgets()
    ratio = float(budgets[-1] / budgets[-2]) if len(budgets) > 1 else NEXT_STEP[0]
    return float(_top(obs, isoflop(obs)) * np.clip(ratio, *NEXT_STEP))


def require_laws(found: Study) -> None:
    """Refuse a study in which no law could be fitted.

    Raises
    ------
    InputError
        With the reason of the first law.
    """
    if not found.fits:
        doubt = f" (noticed in reading: {'; '.join(found.notes)})" if found.notes else ""
        raise InputError(next(iter(found.refusals.values())) + doubt)
