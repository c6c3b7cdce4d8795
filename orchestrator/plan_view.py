"""What a person sees of a plan: its trials, where they run, and what they cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.text import Text

from analysis.numerals import PF_DAY
from analysis.wording import count, plural
from cluster.budget import HOUR
from cluster.machines import unknown_types
from orchestrator.estimate import Cost, Estimate, class_counts
from orchestrator.family import corpus_caution
from orchestrator.layout import Sharing
from orchestrator.planner import Plan, Planned
from orchestrator.probes import cautions, probe_cost
from orchestrator.tables import plain_table, show_table
from trainers.flops import params, trial_flops

DAY = 86_400
"""Seconds."""
LISTED = 8
"""Widths of a budget that are listed; of more, the ends."""
SHOWN = 5
"""Trials that do not fit, named one by one; the others are counted, and all are in the JSON."""


def show_plan(console: Console, found: Estimate) -> None:
    """The trials of a plan, a row a budget; where they run, and what they cost."""
    plan = found.plan
    table = plain_table(
        "C, FLOPs",
        "trials",
        "widths",
        "N, non-embedding",
        "D",
        "on",
        f"MFU, {found.precision}",
        "time of one",
        "FLOPs",
    )
    grid = [p for p in plan.planned if p.role != "probe"]
    for budget in sorted({p.budget for p in grid}):
        planned = list({p.id: p for p in grid if p.budget == budget}.values())
        trials = [p.trial for p in planned]
        placed = [found.placed[t.key] for t in trials if t.key in found.placed]
        held = sum(t.key in found.schedule.held for t in trials)
        table.add_row(
            f"{budget:.3g}",
            f"{len(trials) - held} of {len(trials)}" if held else str(len(trials)),
            _widths(sorted({t.shape.width for t in trials})),
            _range([float(params(t.shape).non_embedding) for t in trials], count),
            _range([float(p.tokens) for p in planned], count),
            _classes(class_counts(placed)),
            _range([item.mfu for item in placed if item.mfu], lambda share: f"{share:.0%}"),
            _range([_seconds(found, p) for p in planned if p.trial.key in found.placed], duration),
            f"{sum(p.flops_spent for p in planned):.3g}",
        )
    show_table(console, f"{plan.name}: {plan.counted}", table)
    total = f"{plan.flops:.4g} FLOPs in all, {plan.flops / PF_DAY:.3g} PF-days"
    if found.schedule.held:
        total += f"; {found.cost.flops:.3g} FLOPs within the limits"
    console.print(total)
    _show_costs(console, found)


def _probes(plan: Plan) -> str | None:
    """What its probes are and take; None where it has none."""
    found = probe_cost(plan)
    if not found.trials:
        return None
    widths = " and ".join(map(str, found.widths))
    return (
        f"{found.trials} trials at half and double the rate, of width {widths} at "
        f"{found.budget:.3g} FLOPs: {found.flops:.3g} FLOPs, {found.share:.1%} of all"
    )


def _seconds(found: Estimate, planned: Planned) -> float:
    """Of a trial, or of what a horizon of a trunk takes beyond those before it."""
    return (
        found.placed[planned.trial.key].seconds * planned.flops_spent / trial_flops(planned.trial)
    )


def _show_costs(console: Console, found: Estimate) -> None:
    """What the plan takes on the cluster, and what of it does not come about there."""
    schedule, cost = found.schedule, found.cost
    basis = "as measured in this project" if found.measured else "expected"
    if cost.gpu_hours and not found.measured:
        basis = f"expected in {found.precision}, from published MFUs"
    probes = _probes(found.plan)
    lines = [("Probes", probes)] if probes else []
    lines += [
        ("On", str(found.cluster)),
        ("Classes", _classes(class_counts(found.placed.values()))),
    ]
    if found.unlimited.gpu_hours:
        text = _price(found, cost)
        if schedule.held:
            text += f"; {_price(found, found.unlimited)} without limits"
        lines.append(("Cost", text))
    lines += [("Shares", _sharing(found))] if found.sharing or found.with_mps else []
    compiling = sum(i.compile_seconds for k, i in found.placed.items() if k in schedule.starts)
    if compiling:
        spent = sum(i.seconds for k, i in found.placed.items() if k in schedule.starts)
        share = f"{duration(compiling)} of the trials' {duration(spent)}"
        lines.append(("Compiling", f"{share}, before they train"))
    if schedule.ends:
        least = f"no schedule takes less than {duration(schedule.bound)}"
        lines.append(
            ("Makespan", f"{duration(schedule.makespan)} {basis}, {schedule.order}; {least}")
        )
        lines.append(("Idle", f"{schedule.idle:.1%} of the {_machines(found)}"))
    if cost.checkpoint_bytes:
        kept = f"{size(cost.checkpoint_bytes)} of checkpoints"
        if found.plan.spec.checkpoints.removes(found.plan.planned[0].trial):
            kept = f"at most {kept}, each trial's until it is measured"
        lines.append(("Storage", kept))
    for name, text in lines:
        console.print(Text.assemble((f"{name:<10}", "bold"), text))
    doubts = [corpus_caution(found.plan.spec), unknown_types(found.cluster)]
    for caution in (*cautions(found.plan), *filter(None, doubts)):
        console.print(Text(f"! {caution}", style="yellow"))
    for cap, n in Counter(schedule.held.values()).items():
        trials = f"{n} trial{'s' * (n > 1)}"
        console.print(Text(f"! limits.{cap}: {trials} would be held back by it", style="yellow"))
    for item in found.unplaceable[:SHOWN]:
        console.print(Text(f"! {item}", style="red"))
    more = len(found.unplaceable) - SHOWN
    if more > 0:
        do = "do" if more > 1 else "does"
        console.print(Text(f"! and {more} more {do} not fit", style="red"))


def _sharing(found: Estimate) -> str:
    """What sharing GPUs saves by the forecast, now and if MPS ran on the nodes."""
    how = "with MPS" if found.cluster.shares_by_mps(None) else "without MPS"
    sharing, with_mps = found.sharing, found.with_mps
    if sharing is not None and sharing.used:
        text = f"{_saved(sharing)}, {how}"
    else:
        text = f"none, since they would save nothing {how}"
    return text + (f"; with MPS, {_saved(with_mps)}" if with_mps else "")


def _saved(sharing: Sharing) -> str:
    trials = f"{sharing.trials} trial{'s' * (sharing.trials != 1)}"
    hours, whole = sharing.gpu_seconds / HOUR, sharing.gpu_seconds_unshared / HOUR
    return (
        f"{trials} on shares take {_digits(hours)} in place of {_digits(whole)} GPU-hours, "
        f"{duration(sharing.makespan)} in place of {duration(sharing.makespan_unshared)}"
    )


def _widths(widths: Sequence[int]) -> str:
    if len(widths) > LISTED:
        return f"{widths[0]} to {widths[-1]}"
    return " ".join(map(str, widths))


def _digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _price(found: Estimate, cost: Cost) -> str:
    hours, rate = f"{_digits(cost.gpu_hours)} GPU-hours", found.plan.spec.cluster.price_per_gpu_hour
    return hours if cost.money is None else f"{hours}, {cost.money:,.0f} at {rate:g} a GPU-hour"


def _machines(found: Estimate) -> str:
    if found.cost.gpu_hours:
        return plural(found.cluster.gpus, "GPU")
    return f"{found.cluster.cpus:g} cores"


def _classes(counts: Mapping[str, int]) -> str:
    """How many trials are of each class."""
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{n} on {label}" for label, n in counts.items())


def _range(values: Sequence[float], show: Callable[[float], str]) -> str:
    """The least and the greatest as one cell."""
    if not values:
        return "–"
    ends = list(dict.fromkeys(show(value) for value in (min(values), max(values))))
    return " to ".join(ends)


def duration(seconds: float) -> str:
    """A time as people say it, three digits.

    Examples
    --------
    >>> [duration(s) for s in (0.5, 59, 90, 7200, 3e5)]
    ['0.5 s', '59 s', '1.5 min', '2 h', '3.47 days']
    """
    for unit, name in ((DAY, "days"), (3600, "h"), (60, "min")):
        if seconds >= unit * (2 if name == "days" else 1):
            return f"{float(f'{seconds / unit:.3g}'):g} {name}"
    return f"{float(f'{seconds:.3g}'):g} s"


def size(number: float) -> str:
    """A number of bytes, three digits.

    Examples
    --------
    >>> [size(n) for n in (1.5e6, 2e9, 3.456e12)]
    ['1.5 MB', '2 GB', '3.46 TB']
    """
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= unit:
            return f"{float(f'{number / unit:.3g}'):g} {name}"
    return f"{number / 1e3:.3g} kB"
