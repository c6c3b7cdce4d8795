"""Observations from somebody else's table: which column is what, and which rows are fitted.

Tables are rarely what they seem. Whether runs finished is told in `statuses.py`, points of training
curves in `curve_points.py`, hyperparameters and kinds in `factors.py`, units in `units.py` and
`loss_units.py`; files are read in `files.py`. Nothing is converted or guessed in silence.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.arrow_types import counts_rows, labels, require_distinct_names
from analysis.cells import cells
from analysis.curve_points import ask_for_runs, find_curves, without_end
from analysis.errors import InputError
from analysis.factors import Factor, Factors, find_factors, is_hyperparameter
from analysis.files import listed, numbers
from analysis.loss_units import LossUnit, convert, loss_unit, shown
from analysis.observations import FloatArray, IntArray, Observations
from analysis.statuses import finished, plain_leaf, plain_name
from analysis.units import above_vocabulary, doubts, require_falling
from analysis.wording import plural, where_option, written

NAMES = {
    "params": "n params parameters nparams nparameters numparams modelsize modelparams paramcount",
    "tokens": "d tokens ntokens numtokens trainingtokens traintokens tokenstrained datasettokens",
    "flops": "c flops flop trainingflops trainingflop trainflops totalflops compute "
    "trainingcompute",
    "loss": "l loss heldoutloss validationloss valloss evalloss testloss finalloss finalvalloss",
    "loss_stderr": "lossstderr lossse lossstandarderror",
    "budget": "budget budgetflops flopbudget flopsbudget nominalbudget nominalflops computebudget",
    "weight": "weight weights",
    "trunk": "trunk trunkid",
    "run": "",
}
"""What each column may be called, in small letters and digits alone, where nobody says."""

_SCORES = re.compile(r"loss|perplexity|ppl|bpb|bitsper|natsper|acc|score")
"""Matches names of losses and of other scores that are mistaken for losses."""
_LABELS = ("trunk", "run")
_SYMBOLS = {"n": "params", "d": "tokens", "c": "flops", "l": "loss"}
_TRIO = ("params", "tokens", "flops")
_LETTERS = {"params": "N", "tokens": "D", "flops": "C", "loss": "L"}


_MANY, _KINDS = 5, 20  # rows of one value, and values, that make a column of words name kinds
_UNEXPLAINED = 0.01  # spread of ln L in cells that is more than runs of two seeds differ by
_COARSE = 1e-3  # loss above the best possible from which a coarse grid of values is told of
_EDGE = 0.25  # share of cells whose best value may be the first or last tried before it is said


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A person's choice among the rows of somebody else's table."""

    best_of: tuple[str, ...] = ()
    """Columns of which each cell of N and D keeps the setting of the lowest loss; several may stand
    in one item, with commas between them."""
    pool: bool = False
    """Fit rows of equal N and D together, whatever other columns tell them apart by."""
    all_points: bool = False
    """Keep every point of a training curve, not the last one of each run."""
    selected: frozenset[str] = frozenset()
    """Columns that rows were selected by already, which tell nothing apart any more."""
    loss_unit: LossUnit | None = None
    """The unit of the loss, where its name does not say it."""


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """What somebody else's table says."""

    obs: Observations
    excluded: Mapping[str, int]
    """Rows left out, by reason."""
    notes: tuple[str, ...]
    """What was assumed and what is doubtful, a sentence each."""
    factors: tuple[Factor, ...] = ()
    """Columns that explain small differences among rows, or large ones that were pooled."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Rows:
    """The rows that are left at some step, and what was noticed on the way."""

    table: pa.Table
    values: Mapping[str, FloatArray]
    """Numbers by key of `NAMES`, shape (n,) each."""
    known: Mapping[str, str]
    """Names of the columns that hold N, D, C and the loss."""
    taken: frozenset[str]
    """Columns already used for something else, which cannot be factors."""
    place: IntArray
    """Number of each row in the table that was read, from 0."""
    trunk: IntArray | None = None
    """Label of the run that a row shares its noise with, where runs have several rows."""
    excluded: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def keep(self, kept: NDArray[np.bool_], reason: str) -> _Rows:
        """The rows where `kept` is true; the others are counted by the reason."""
        out = int(np.sum(~kept))
        if out == 0:
            return self
        return replace(
            self,
            table=self.table.filter(pa.array(kept)),
            values={key: value[kept] for key, value in self.values.items()},
            place=self.place[kept],
            trunk=None if self.trunk is None else self.trunk[kept],
            excluded={**self.excluded, reason: out},
        )

    def noted(self, *notes: str, taken: Collection[str] = ()) -> _Rows:
        """The same rows with further notes, and columns that are no factors."""
        return replace(self, notes=self.notes + notes, taken=self.taken | frozenset(taken))


def parse_columns(items: Sequence[str]) -> dict[str, str]:
    """Which column is what, as a person writes it: `params=Model Size,loss=loss`.

    Raises
    ------
    InputError
        If a part is no KEY=COLUMN, its key is unknown, or a key is given twice.

    Examples
    --------
    >>> parse_columns(['N=Model Size,C="Training FLOP"', "loss=loss"])
    {'params': 'Model Size', 'flops': 'Training FLOP', 'loss': 'loss'}
    """
    found: dict[str, str] = {}
    # A comma ends a column's name only where another KEY= follows.
    parts = re.split(r",(?=[^,=]+=)", ",".join(items)) if items else []
    for part in parts:
        key, equals, name = (text.strip() for text in part.partition("="))
        key = _SYMBOLS.get(key.lower(), key.lower())
        if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'":
            name = name[1:-1]
        if not equals or not name or name.endswith(","):
            raise InputError(f"--columns {part.strip()!r}: write KEY=COLUMN, such as params=size")
        if key not in NAMES:
            raise InputError(f"--columns {part.strip()!r}: the keys are {', '.join(NAMES)}")
        if found.setdefault(key, name) != name:
            raise InputError(f"--columns gives {key} twice, as {found[key]!r} and {name!r}")
    return found


def recognise(table: pa.Table, columns: Mapping[str, str]) -> dict[str, str]:
    """Complete `columns` by common names.

    Where two of N, D and C are given the third is not looked for.

    Raises
    ------
    InputError
        If L or two of N, D and C are neither given nor recognised, or two columns could be one.
    """
    found = dict(columns)
    for name in found.values():
        if name not in table.column_names:
            raise InputError(f"there is no column {name!r}; the columns are {listed(table)}")
    require_distinct_names(table, found.values())
    taken = set(found.values())
    settled = _TRIO if sum(key in found for key in _TRIO) >= 2 else ()
    for key, names in NAMES.items():
        # A standard error of one loss says nothing of another that somebody chose.
        if key in found or key in settled or (key == "loss_stderr" and "loss" in columns):
            continue
        known = names.split()
        free = [column for column in table.column_names if column not in taken]
        candidates = [column for column in free if plain_name(column) in known]
        # Of exported settings and results, such as summary.val_loss, the last part is the name.
        candidates = candidates or [column for column in free if plain_leaf(column) in known]
        require_distinct_names(table, candidates)
        if len(candidates) > 1:
            either = " or ".join(shlex.quote(f"{key}={name}") for name in candidates)
            raise InputError(f"several columns could be {key}: say which with --columns {either}")
        if candidates:
            found[key] = candidates[0]
    _require(table, found)
    return found


def _require(table: pa.Table, found: Mapping[str, str]) -> None:
    have = [key for key in _TRIO if key in found or (key == "flops" and "budget" in found)]
    if "loss" in found and len(have) >= 2:
        return
    if len(have) >= 2:
        likely = [name for name in table.column_names if _SCORES.search(plain_name(name))]
        example = shlex.quote(f"loss={likely[0]}") if likely else "loss=..."
        what, option = "the loss", f"--columns {example}"
    else:
        lacking = [key for key in _TRIO if key not in have]
        letters = [_LETTERS[key] for key in lacking]
        what = " or ".join(letters) if have else "N, D or C, of which two are needed"
        needed = [f"{key}=..." for key in lacking[: 2 - len(have)]]
        needed += [] if "loss" in found else ["loss=..."]
        option = f"--columns {','.join(needed)}"
    raise InputError(
        f"cannot tell which column is {what}: say so with {option}; the columns are {listed(table)}"
    )


def foreign(
    table: pa.Table, columns: Mapping[str, str], selection: Selection | None = None
) -> Foreign:
    """View a table as (N, D, C, L), N as given, C as given or, where it is not, by 6ND.

    Parameters
    ----------
    table
        Any columns, of the plain types of `arrow_types.plain_types`.
    columns
        Which of them is what, keys as in `NAMES`; those missing are recognised by common names.
        Of N, D and C, a third that is not there is from C = 6ND; without C, a nominal budget is C.
    selection
        What to do about runs of several rows, and rows of one N and D.

    Raises
    ------
    InputError
        If columns are missing or hold no numbers, or an N, D, C or L is not positive, or no row is
        left; or if the rows are not what a law of N and D can be fitted to: a score that rises, a
        perplexity, or rows of equal N and D that a column tells apart by more than noise.

    Notes
    -----
    Exact repetitions of a row count once. A missing number leaves its row out. Of the points of a
    training curve the last one counts.
    """
    selection = selection or Selection()
    known = recognise(table, columns)
    ended = finished(table, {*known.values(), *selection.selected, *selection.best_of})
    values = {key: numbers(table, name) for key, name in known.items() if key not in _LABELS}
    unit = loss_unit(known["loss"], table.schema.field(known["loss"]), selection.loss_unit)
    rows = _Rows(
        table=table,
        values=values,
        known=known,
        taken=frozenset(known.values()) | selection.selected | ended.columns,
        place=np.arange(table.num_rows),
    )
    rows = replace(rows.noted(*ended.notes), excluded={})
    rows = replace(rows.keep(ended.kept, ""), excluded=ended.excluded)
    rows = _complete(rows)
    _require_positive(rows)
    rows = replace(rows, values=convert(unit, known["loss"], rows.values))
    n, d, c = _trio(rows.values)
    rows = replace(rows, values={**rows.values, "params": n, "tokens": d, "flops": c})
    rows = _last_points(rows, selection)
    rows = _best(rows, selection)
    require_falling(
        rows.values["params"], rows.values["tokens"], rows.values["loss"], known["loss"]
    )
    factors = _factors(rows, selection)
    if not selection.pool:
        _require_no_factor(factors, rows)
    return _foreign(rows, columns, unit, factors)


def _foreign(rows: _Rows, columns: Mapping[str, str], unit: LossUnit, factors: Factors) -> Foreign:
    known, values = rows.known, rows.values
    n, d, c, losses = (values[key] for key in ("params", "tokens", "flops", "loss"))
    read = {"flops": known["budget"], **known} if "budget" in known else known
    notes = [
        *_assumed(known, columns, rows.table),
        *rows.notes,
        *doubts(n, d, c, losses, read),
        *above_vocabulary(losses, rows.table, known["loss"], unit),
        *_factor_warnings(factors),
        *_kinds(rows.table, factors.untold),
    ]
    nan = np.full(len(n), np.nan)
    obs = Observations(
        params=n,
        tokens=d,
        flops=c,
        loss=losses,
        loss_stderr=values.get("loss_stderr", nan),
        budget=values.get("budget", nan),
        params_convention="given" if "params" in known else "derived",
        flops_convention="given" if "flops" in known or "budget" in known else "6nd",
        weight=values.get("weight", np.ones(len(n))),
        trunk=np.arange(len(n), dtype=np.int64) if rows.trunk is None else rows.trunk,
        loss_unit=shown(unit, known["loss"]),
    )
    return Foreign(obs=obs, excluded=rows.excluded, notes=tuple(notes), factors=factors.factors)


def _complete(rows: _Rows) -> _Rows:
    """Keep the rows that have all numbers and repeat no other row."""
    known, values = rows.known, rows.values
    total = len(rows.place)
    needed = _TRIO if {"params", "tokens"} <= set(known) or "flops" in known else (*_TRIO, "budget")
    for key in (*needed, "loss", "weight"):
        if key in rows.values:
            present = np.isfinite(rows.values[key])
            rows = rows.keep(present, f"missing or not a finite number in {known[key]!r}")
        if key == needed[-1]:
            rows = _with_ends(rows)
    values = rows.values
    if len(rows.place):
        first = _first_of_equals(rows.table, list(values.values()))
        rows = rows.keep(first, "exact duplicate of another row")
    if len(rows.place) == 0:
        raise InputError(f"no row of {total} is complete: {', '.join(rows.excluded)}")
    return rows


def _with_ends(rows: _Rows) -> _Rows:
    """Keep the rows of runs whose last point has a loss, where a column names runs."""
    progress = rows.values.get("tokens", rows.values.get("flops"))
    if "trunk" in rows.known or progress is None or len(rows.place) == 0:
        return rows
    measured = np.isfinite(rows.values["loss"])
    cut = without_end(rows.table, progress, measured, rows.taken, rows.known.get("run"))
    # What has no loss itself is counted as that.
    return rows.keep(~(cut & measured), "of a run whose last point has no loss")


def _last_points(rows: _Rows, selection: Selection) -> _Rows:
    """Keep the last point of each training curve, or all points with the noise of their run."""
    if "trunk" in rows.known:  # which says that its rows are decayed horizons
        trunk = labels(rows.table[rows.known["trunk"]], blank_alone=True)
        return replace(rows, trunk=trunk)
    values = rows.values
    curves = find_curves(
        rows.table, values["params"], values["tokens"], values["loss"],
        rows.taken, run=rows.known.get("run"),
    )  # fmt: skip
    if curves is None:
        return rows.noted(*ask_for_runs(rows.table, values["params"], rows.taken))
    rows = rows.noted(taken=curves.columns)
    points, runs = len(curves.run), curves.runs
    if runs == points:
        return rows
    if selection.all_points or curves.last.all():
        biased = (
            ": points before the end of a run are not decayed, unless its rate is, so that L is "
            "biased upwards and N_opt with it"
            if selection.all_points
            else ""
        )
        note = f"{points} rows belong to {runs} runs, by {curves.by}, and share their noise{biased}"
        return replace(rows.noted(note), trunk=curves.run)
    note = (
        f"rows are points of {plural(runs, 'training curve')}, told apart by {curves.by}: the last "
        f"point of each run is fitted; --all-points keeps all {points}"
    )
    return rows.noted(note).keep(curves.last, "earlier point of a training curve")


def _best(rows: _Rows, selection: Selection) -> _Rows:
    """Keep the rows of the setting that has the lowest loss in each cell of N and D."""
    names = _named(selection.best_of, rows)
    if not names:
        return rows
    for name in names:
        if re.search(r"seed|replica", plain_leaf(name)):
            raise InputError(
                f"--best-of {name}: runs that differ in {name!r} differ by noise, and the lowest "
                "loss among them is too low; leave it out, and all of them are fitted"
            )
    cell = cells(rows.values["params"], rows.values["tokens"])
    setting = np.zeros(len(cell), dtype=np.int64)
    for name in names:
        codes = labels(rows.table[name], blank_alone=False)
        setting = np.unique(setting * (int(codes.max()) + 1) + codes, return_inverse=True)[1]
    pair = np.unique(cell * (int(setting.max()) + 1) + setting, return_inverse=True)[1]
    first = np.full(int(pair.max()) + 1, len(pair))
    np.minimum.at(first, pair, np.arange(len(pair)))
    settings = np.bincount(cell[first])
    several, every = int(np.sum(settings > 1)), len(settings)
    label = ", ".join(repr(name) for name in names)
    if several == 0:
        raise InputError(
            f"--best-of {','.join(names)}: no rows of equal N and D differ in {label}, so that "
            "there is no best to take; select rows with --where"
        )
    mean = np.bincount(pair, np.log(rows.values["loss"])) / np.bincount(pair)
    order = np.lexsort((mean, cell[first]))
    lowest = order[np.concatenate([[True], np.diff(cell[first][order]) != 0])]
    kept = np.isin(pair, lowest)
    notes = [note for name in names if (note := _edges(rows, name, cell, kept))]
    notes += [note for name in names if (note := _coarse(rows, name, cell))]
    if several < every:
        notes.append(
            f"{label} differs in {several} of {every} cells of N and D only: the others keep what "
            "they have"
        )
    # Of kinds the best may be another one in another cell, and is asked about again.
    taken = [name for name in names if is_hyperparameter(name)]
    return rows.noted(*notes, taken=taken).keep(
        kept, f"not the best {label} of its cell of N and D"
    )


def _named(items: Sequence[str], rows: _Rows) -> list[str]:
    """Return the columns that --best-of names, with commas between them or in their names."""
    others = _others(rows)
    names = []
    for item in items:
        parts = [item] if item in others else [part.strip() for part in item.split(",")]
        for name in parts:
            if name not in others:
                choice = f"; choose among {listed(rows.table.select(others))}" if others else ""
                raise InputError(
                    f"--best-of {item}: there is no column {name!r} besides N, D, C and L{choice}"
                )
        names += parts
    return list(dict.fromkeys(names))


def _coarse(rows: _Rows, name: str, cell: IntArray) -> str | None:
    """Say how far the best of a coarse grid of values lies above the best possible."""
    kind = rows.table[name].type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return None
    value = numbers(rows.table, name)
    if not (np.isfinite(value).all() and (value > 0).all()):
        return None
    z = np.log(value)
    step = np.diff(np.unique(np.round(z, 6)))
    if len(step) < 2 or len(step) > 50:
        return None
    # A parabola in ln of the value, with a bottom and a height of its own in each cell.
    size = np.bincount(cell)
    middle = z - (np.bincount(cell, z) / size)[cell]
    bend = middle**2 - (np.bincount(cell, middle**2) / size)[cell]
    y = np.log(rows.values["loss"])
    y = y - (np.bincount(cell, y) / size)[cell]
    slope = np.bincount(cell, middle * y) / np.maximum(np.bincount(cell, middle**2), 1e-300)
    tilt = np.bincount(cell, middle * bend) / np.maximum(np.bincount(cell, middle**2), 1e-300)
    bend, y = bend - tilt[cell] * middle, y - slope[cell] * middle
    total = float(bend @ bend)
    if total <= 1e-12:
        return None
    # Where the optimum lies anywhere between two values, the nearer misses it by step^2 / 12.
    above = max(float(bend @ y) / total, 0.0) * float(np.median(step)) ** 2 / 12.0
    if above < _COARSE:
        return None
    return (
        f"{name!r} was tried in steps of a factor {float(np.exp(np.median(step))):.2g}, so that "
        f"the best of a cell lies about {above:.1%} above the lowest loss that a finer search "
        "would reach, here more and there less: intervals do not know of it"
    )


def _edges(rows: _Rows, name: str, cell: IntArray, kept: NDArray[np.bool_]) -> str | None:
    """Say that the best value is often the first or the last that was tried."""
    kind = rows.table[name].type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return None
    value = numbers(rows.table, name)
    known = np.isfinite(value)
    size = int(cell.max()) + 1
    low, high = np.full(size, np.inf), np.full(size, -np.inf)
    np.minimum.at(low, cell[known], value[known])
    np.maximum.at(high, cell[known], value[known])
    open_range = low < high
    best = kept & known & open_range[cell]
    at_end = best & ((value == low[cell]) | (value == high[cell]))
    tried, ended = len(np.unique(cell[best])), len(np.unique(cell[at_end]))
    if tried == 0 or ended <= _EDGE * tried:
        return None
    return (
        f"the best {name!r} is the smallest or largest that was tried in {ended} of {tried} cells "
        "of N and D: the loss there may not be the lowest that a better value would reach"
    )


def _factors(rows: _Rows, selection: Selection) -> Factors:
    values = rows.values
    n, d = values["params"], values["tokens"]
    return find_factors(rows.table, cells(n, d), n, d, values["loss"], rows.taken)


def _require_no_factor(factors: Factors, rows: _Rows) -> None:
    """Refuse rows that a column tells apart by far more than noise.

    Raises
    ------
    InputError
        With the columns, what they explain, and the three ways out.
    """
    part = factors.deciding
    if not part:
        return
    within = part == factors.within
    best = ",".join(factor.column for factor in part if factor.tuned == part[0].tuned)
    ways = []
    if within:
        ways.append(f"take the best of each cell of N and D with --best-of {shlex.quote(best)}")
    if part[0].suggested is not None:
        selecting = f"select rows with {where_option(part[0].column, part[0].suggested)}"
        ways.insert(len(ways) if part[0].tuned else 0, selecting)
    differ = (
        f"rows of equal N and D differ by {factors.spread:.1%} in their loss"
        if within
        else "losses differ by more than N and D explain"
    )
    explain = ", and ".join(
        f"column {factor.column!r} explains {factor.share:.0%} of that variance"
        + (f", in {factor.cells} of {factors.cells} such cells" if factor.cells else "")
        for factor in part
    )
    raise InputError(
        f"{differ}, and {explain}. A law of N and D knows nothing of it, so that one fit of all "
        f"rows would be wrong: {', '.join([*ways, 'or fit all rows together with --pool'])}"
    )


def _factor_warnings(factors: Factors) -> list[str]:
    """Warn of each column that explains differences, where the fit goes on all the same."""
    if factors.spread > _UNEXPLAINED and not factors.factors:
        return [
            f"rows of equal N and D differ by {factors.spread:.1%} in their loss, and no column "
            "explains it: do they differ in something that is not in the table?"
        ]
    return [
        (
            f"rows of equal N and D differ by column {factor.column!r}, which moves their loss by "
            f"{factor.effect:.2%} (standard deviation, {factor.cells} cells)"
            if factor.cells
            else f"column {factor.column!r} moves the loss by {factor.effect:.2%} (standard "
            "deviation) beyond what N and D explain"
        )
        + _ways(factor)
        for factor in factors.factors
    ]


def _ways(factor: Factor) -> str:
    """Say what can be done about a small difference."""
    ways = []
    if factor.suggested is not None:
        ways.append(f"select rows with {where_option(factor.column, factor.suggested)}")
    if factor.cells:
        ways.append(f"take the best with --best-of {shlex.quote(factor.column)}")
    return f": to leave it out, {' or '.join(ways)}" if ways else ""


def _others(rows: _Rows) -> list[str]:
    """Return the columns that are not N, D, C or L and share their name with no other."""
    names = rows.table.column_names
    return [n for n in names if names.count(n) == 1 and n not in rows.known.values()]


def _first_of_equals(table: pa.Table, values: Sequence[FloatArray]) -> np.ndarray:
    """Which rows are the first of their content, over all columns, shape (n,)."""
    # Hashes of the numbers find the few rows that may be equal; only those are compared in full.
    mixed = np.zeros(table.num_rows, dtype=np.uint64)
    for value in values:
        mixed ^= np.ascontiguousarray(value).view(np.uint64)
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    ordered = np.sort(mixed)
    first = np.ones(table.num_rows, dtype=bool)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if len(repeated) == 0:
        return first
    at = np.flatnonzero(np.isin(mixed, repeated))
    flat = [
        i
        for i, field in enumerate(table.schema)
        if not (pa.types.is_nested(field.type) or counts_rows(table.column(i)))
    ]
    few = table.select(flat).take(pa.array(at))
    keys = [f"{i}" for i in range(few.num_columns)]  # names may repeat in somebody's table
    few = few.rename_columns(keys).append_column("row", pa.array(at))
    firsts = few.group_by(keys).aggregate([("row", "min")])["row_min"].to_numpy()
    first[at] = False
    first[firsts] = True
    return first


def _require_positive(rows: _Rows) -> None:
    for key, value in rows.values.items():
        signed = key in ("weight", "loss_stderr")
        bad = value < 0 if signed else value <= 0
        if bad.any():
            first = int(np.argmax(bad))
            row, name = int(rows.place[first]) + 1, rows.known[key]
            raise InputError(
                f"in {bad.sum()} of {plural(len(value), 'row')} {_LETTERS.get(key, key)} "
                f"({name!r}) is {'negative' if signed else 'not positive'}, the first is "
                f"{value[first]:g} in row {row}: correct or remove them"
            )


def _trio(values: Mapping[str, FloatArray]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """N, D and C, the missing one from C = 6ND; C of a row of a budget is that budget."""
    n, d = values.get("params"), values.get("tokens")
    c = values.get("flops", values.get("budget"))
    if n is not None and d is not None:
        by_sixes = 6.0 * n * d
        return n, d, by_sixes if c is None else np.where(np.isfinite(c), c, by_sixes)
    assert c is not None, "two of N, D and C are known"
    if n is not None:
        return n, c / (6.0 * n), c
    assert d is not None, "two of N, D and C are known"
    return c / (6.0 * d), d, c


def _assumed(known: Mapping[str, str], columns: Mapping[str, str], table: pa.Table) -> list[str]:
    """Say which columns were recognised by their names, and what was derived from others."""
    by_name = [f"{_LETTERS.get(k, k)} is {name!r}" for k, name in known.items() if k not in columns]
    notes = [f"columns known by their names: {', '.join(by_name)}"] if by_name else []
    if "flops" not in known and "budget" in known and len({"params", "tokens"} & set(known)) == 2:
        notes.append(f"C is taken to be the nominal budget, {known['budget']!r}")
    flops = known.get("flops", known.get("budget"))
    if "params" not in known:
        alike = _like_params(table, known)
        either = " or ".join(f"--columns {shlex.quote(f'params={name}')}" for name in alike)
        notes.append(
            f"N is C/(6D), by {flops!r} and {known['tokens']!r}, since no column is known to hold "
            "it" + (f"; {', '.join(map(repr, alike))} may: choose with {either}" if alike else "")
        )
    return notes


def _like_params(table: pa.Table, known: Mapping[str, str]) -> list[str]:
    """Return unread columns of numbers whose names suggest that they hold N."""
    return [
        name
        for name in table.column_names
        if re.search(r"param|modelsize|nonembed", plain_name(name))
        and name not in known.values()
        and (pa.types.is_integer(table[name].type) or pa.types.is_floating(table[name].type))
    ]


def _kinds(table: pa.Table, names: Sequence[str]) -> list[str]:
    """Say of columns of words with few values that their runs may be of several kinds.

    Asked are those columns whose values nothing can tell from N and D.
    """
    notes = []
    for name in names:
        values = pc.value_counts(pc.drop_null(table[name])).to_pylist()
        flag = {item["values"] for item in values} in ({0, 1}, {False, True})
        if not (flag or pa.types.is_string(table[name].type)):
            continue
        often = [written(item["values"]) for item in values if item["counts"] >= _MANY]
        if len(often) > 1 and len(values) <= _KINDS:
            notes.append(
                f"{name!r} has {len(values)} values ({', '.join(often)}), each in a range of N, D "
                "or C of its own: are these runs of one kind? If not, select with "
                + where_option(name, often[0])
            )
    return notes
