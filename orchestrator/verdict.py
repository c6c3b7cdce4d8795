"""What a person sees of a diagnosis: the verdict, what would have been better, and its price."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from analysis.diagnosis import (
    MFU,
    Diagnosis,
    Rate,
    cautions,
    diagnose,
    fitted_basis,
    sentence,
)
from analysis.errors import InputError
from analysis.fitting import Method
from analysis.headline import headline
from analysis.heldout import discrepancy_of, predictions
from analysis.pair import fit_basis
from analysis.wording import count, plural
from orchestrator.source import Observed
from trainers.gpus import gpu_type


def rate_of(
    gpu: str | None, dollars_per_gpu_hour: float | None = None, mfu: float = MFU
) -> Rate | None:
    """What a FLOP costs on a type of GPU; None where neither type nor price is given.

    Raises
    ------
    InputError
        If there is a price but no type, no such type, or a number that cannot be.
    """
    if gpu is None:
        if dollars_per_gpu_hour is not None:
            raise InputError("a price of GPU-hours needs the type of the GPU: add --gpu, e.g. H100")
        return None
    found = gpu_type(gpu)
    return Rate(
        gpu=found.name,
        peak_flops=found.peak_flops,
        mfu=mfu,
        dollars_per_gpu_hour=dollars_per_gpu_hour,
    )


def diagnose_observed(
    observed: Observed, method: Method, level: float, params: float, tokens: float
) -> tuple[list[Diagnosis], tuple[str, ...]]:
    """What both laws, fitted as a forecast's N_opt is, say of a run; the leading one first.

    Returns
    -------
    The diagnoses, and what weakens them, a sentence each.

    Raises
    ------
    InputError
        If nothing can be fitted, or N or D is not positive.
    """
    obs, cost = observed.obs, observed.cost
    basis = fit_basis(obs, method)
    leading = basis.recent.leading
    fits = [leading, *(item for item in basis.recent.fits if item is not leading)]
    beyond = discrepancy_of(predictions(obs, cost, method=method))
    found = [
        diagnose(fitted_basis(item, obs, cost, beyond), params, tokens, level) for item in fits
    ]
    ahead = headline(
        obs, found[0].flops, cost, level, method=method, basis=basis, discrepancy=beyond
    )
    # Of the optimum's D/N the diagnosis itself speaks.
    notes = (note for note in ahead.notes if note != ahead.ratio_note)
    left = (
        f"{plural(n, 'observation')} not in the fit: {why}" for why, n in observed.excluded.items()
    )
    return found, (*observed.notes, *notes, *left)


def show_diagnosis(
    console: Console,
    found: Sequence[Diagnosis],
    rate: Rate | None = None,
    notes: Sequence[str] = (),
) -> None:
    """The verdict of each law in words; of the first one, the run beside what would be better.

    Parameters
    ----------
    console
        Where to print.
    found
        Diagnoses of one (N, D), the law to act on first.
    rate
        What a FLOP costs, if that is known.
    notes
        What else weakens the answer, a sentence each.
    """
    first = found[0]
    console.print(Text(sentence(first)))
    console.print()
    console.print(_plans(first, rate))
    if rate is not None:
        console.print(Text(_money(first, rate)))
    for item in found[1:]:
        console.print()
        console.print(Text(sentence(item)))
    for note in (*cautions(found), *notes):
        console.print(Text(f"! {note}", style="yellow"))


def _plans(item: Diagnosis, rate: Rate | None) -> Table:
    priced = rate is not None and rate.dollars_per_gpu_hour is not None
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    money = ["GPU-hours"] if rate else []
    for column in ("N", "D", "D/N", "C, FLOPs", "L", *money, *(["dollars"] if priced else [])):
        table.add_column(column, justify="right")
    plans = (
        ("this run", item.params, item.tokens, item.flops, item.loss),
        (
            "best at equal C",
            *(item.optimum.params, item.optimum.tokens, item.flops, item.optimum.loss),
        ),
        (
            "least C at equal L",
            *(item.needed.params, item.needed.tokens, item.needed_flops, item.loss),
        ),
    )
    for name, n, d, c, loss in plans:
        cells = [count(n), count(d), f"{d / n:.3g}", f"{c:.3g}", f"{loss:.4f}"]
        if rate:
            cells.append(count(rate.gpu_hours(c)))
            dollars = rate.dollars(c)
            cells += [count(dollars)] if dollars is not None else []
        table.add_row(name, *cells)
    return table


def _money(item: Diagnosis, rate: Rate) -> str:
    hours = f"{count(rate.gpu_hours(item.wasted_flops))} GPU-hours"
    dollars = rate.dollars(item.wasted_flops)
    cost = f", {count(dollars)} dollars," if dollars is not None else ""
    return (
        f"On {rate.gpu} at {rate.mfu:.0%} of {rate.peak_flops / 1e12:.4g} TFLOP/s, {hours}{cost} "
        "could have been saved"
    )
