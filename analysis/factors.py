"""Factors that no law of N and D knows: columns by which rows of equal N and D differ.

A sweep of learning rates, a second architecture or repeated data put into one fit give one answer
with a tight interval, and a wrong one. Here such columns are found; what is done about them is for
`foreign.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.special import fdtrc

from analysis.observations import FloatArray, IntArray
from analysis.statuses import plain_leaf
from analysis.wording import written

CHANCE = 1e-3
"""Probability, over all columns of a table together, that one is named by chance alone."""
FAR = 0.005
"""Standard deviation in ln L that a factor makes from which a fit is refused. A sweep of ten rates
makes 2%, and moved N_opt by a quarter."""
LEAST_SHARE = 0.5
"""Share of the variance that columns must explain together for a fit to be refused."""
MOST_LEVELS = 50
"""Distinct values up to which a column is taken level by level."""
LARGEST = 50_000
"""Rows that are looked at; of more, cells drawn at random, but always the same."""
_FEW_LEVELS = 8  # up to which what a level does may also move with ln N
_SMALL_EFFECT = 5e-4  # standard deviation in ln L below which nothing is said
_RANGES = 0.97  # rank correlation from which a column only orders rows by N, D or C
_LEAST_ROWS = 12

HYPERPARAMETERS = re.compile(
    r"^(lr|.*learningrate|.*lr|lr.*|eta|bs|.*batch.*|wd|.*weightdecay|.*warmup.*|beta[12]?|betas|"
    r".*momentum|.*dropout|.*gradclip.*|clip.*|eps|epsilon|.*cooldown.*|.*decay(frac|fraction|steps)?"
    r"|initstd|init|zloss|labelsmoothing|optimi[sz]er)$"
)
"""Names, in small letters and digits alone, of what is tuned: of these the best value is taken."""
_NOT_FACTORS = re.compile(
    r".*(loss|perplexity|ppl|bpb|bitsperbyte|natsperbyte|accuracy|acc|entropy|error|stderr|score|"
    r"reward|seconds|secs|sec|second|duration|runtime|walltime|elapsed|throughput|mfu|flops|gradnorm|"
    r"timestamp|seed|heartbeat|time|createdat|created|updatedat|updated)|"
    r"(index|idx|row|unnamed\d*|rank|date|day|weight|replicate|replica|(peak|max|gpu)?memory(gb|mb)?)"
)
"""Names, in small letters and digits alone, of what was measured and of repetitions, which explain
and cause nothing."""


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A column by which rows of equal N and D differ by more than noise."""

    column: str
    cells: int
    """Cells of equal N and D whose rows differ in it; 0 where it was told between cells."""
    share: float
    """Share of the variance of ln L that it explains: within cells, else about a smooth surface in
    ln N and ln D."""
    effect: float
    """Standard deviation of ln L that it makes."""
    suggested: str | None
    """A value to select by, as a person would write it: one that as many rows have as any other,
    and of these the one of the lowest loss. None where no value has several rows."""
    tuned: bool
    """Whether its name is one of a hyperparameter, of which the best value is taken."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """All factors of one table."""

    within: tuple[Factor, ...]
    """Factors that tell rows of equal N and D apart, the strongest first."""
    between: tuple[Factor, ...]
    """Factors that tell cells apart about a smooth surface in ln N and ln D."""
    untold: tuple[str, ...]
    """Columns whose values lie in ranges of N, D, C or D/N of their own: nothing can tell what they
    do from what N and D do."""
    spread: float
    """Standard deviation of ln L among rows of equal N and D; 0 where there are none."""
    cells: int
    """Cells with several rows."""

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Factors within and between cells."""
        return self.within + self.between

    @property
    def deciding(self) -> tuple[Factor, ...]:
        """Factors that make a fit of all rows wrong by more than noise, if there are such."""
        for part in (self.within, self.between):
            share = sum(factor.share for factor in part)
            effect = math.sqrt(sum(factor.effect**2 for factor in part))
            if share >= LEAST_SHARE and effect >= FAR:
                return part
        return ()


class _Column(NamedTuple):
    name: str
    codes: IntArray
    """Level of each row, -1 where it has none or too many are."""
    levels: int
    values: FloatArray | None
    """Numbers, NaN where missing; None for words."""
    texts: tuple[str, ...]
    """The levels as a person would write them; none where they are too many."""
    tuned: bool


def find_factors(
    table: pa.Table, cell: IntArray, params: FloatArray, tokens: FloatArray, loss: FloatArray,
    taken: Collection[str],
) -> Factors:  # fmt: skip
    """Find the columns that explain why rows of equal N and D differ.

    Parameters
    ----------
    table
        The rows, with all their columns, of the plain types of `arrow_types.plain_types`.
    cell
        Cell of each row, as `cells` labels them, shape (n,).
    params, tokens, loss
        N in parameters, D in tokens and L, positive, shape (n,).
    taken
        Columns that are no factors: N, D, C, L, what was selected by, what the best was taken of.

    Notes
    -----
    Where cells have several rows, ln L about its mean over the cell is regressed on each column, as
    levels or, for numbers, as a parabola whose bottom moves with ln N; an F test tells which one
    explains more than chance. The strongest is kept, and the others are asked about what it leaves,
    until none is left. Rows that share no cell are compared about a cubic surface of ln L in ln N
    and ln D, level by level; columns that only order rows by N, D, C or D/N are not asked there,
    since the law may be what they show.
    """
    count = np.bincount(cell)
    several = int(np.sum(count > 1))
    if len(loss) > LARGEST:  # as many whole cells as make that many rows
        drawn = np.random.default_rng(0).permutation(len(count))
        wanted = np.zeros(len(count), dtype=bool)
        wanted[drawn[np.cumsum(count[drawn]) <= LARGEST]] = True
        rows = wanted[cell]
        table, cell = table.filter(pa.array(rows)), cell[rows]
        params, tokens, loss = params[rows], tokens[rows], loss[rows]
    columns = [
        column
        for name in dict.fromkeys(table.column_names)
        if name not in taken and table.column_names.count(name) == 1
        for column in _columns(table, name)
    ]
    y = np.log(loss)
    shared = np.bincount(cell)[cell] > 1
    spread = 0.0
    within: list[Factor] = []
    between: list[Factor] = []
    untold: list[str] = []
    if shared.any():
        rows = np.flatnonzero(shared)
        label = np.unique(cell[rows], return_inverse=True)[1]
        centred = y[rows] - (np.bincount(label, y[rows]) / np.bincount(label))[label]
        spread = float(np.sqrt(centred @ centred / max(len(rows) - label.max() - 1, 1)))
        log_n = np.log(params[rows])
        within = _stepwise(columns, rows, label, centred, log_n)
    if columns and len(y) >= _LEAST_ROWS:
        known = {factor.column for factor in within}
        others = [column for column in columns if column.name not in known]
        ordered = [_ordered(column, params, tokens) for column in others]
        untold = [c.name for c, is_ordered in zip(others, ordered, strict=True) if is_ordered]
        asked = [c for c, is_ordered in zip(others, ordered, strict=True) if not is_ordered]
        between = _between(asked, params, tokens, y)
    return Factors(
        within=tuple(within),
        between=tuple(between),
        untold=tuple(untold),
        spread=spread,
        cells=several,
    )


def is_hyperparameter(name: str) -> bool:
    """Whether a column is, by its name, of something that is tuned, such as `config.lr`."""
    return HYPERPARAMETERS.match(plain_leaf(name)) is not None


def _columns(table: pa.Table, name: str) -> list[_Column]:
    """Return the column as a candidate in a list of one, or an empty list."""
    plain = plain_leaf(name)
    tuned = is_hyperparameter(name)
    if _NOT_FACTORS.fullmatch(plain) and not tuned:
        return []
    column = table[name]
    kind = column.type
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if not (number or pa.types.is_string(kind) or pa.types.is_boolean(kind)):
        return []
    if pa.types.is_string(kind):
        text = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.equal(text, ""), None, text)
    encoded = pc.dictionary_encode(column.combine_chunks())
    codes = pc.fill_null(pc.cast(encoded.indices, pa.int64()), -1).to_numpy(zero_copy_only=False)
    size = np.bincount(codes[codes >= 0], minlength=len(encoded.dictionary))
    if np.sum(size > 0) + (codes < 0).any() < 2:
        return []
    many = len(size) > MOST_LEVELS
    texts = () if many else tuple(written(value) for value in encoded.dictionary.to_pylist())
    values = None
    if number:
        values = pc.cast(column, pa.float64(), safe=False).to_numpy()
        if np.sum(size > 0) > len(codes) / 2 and not tuned:
            return []  # measured, or a number of the row
    if many:
        if not tuned or values is None:
            return []
        codes = np.full(len(codes), -1, dtype=np.int64)
    return [_Column(name, codes, len(size), values, texts, tuned)]


class _Explained(NamedTuple):
    p: float
    share: float
    effect: float
    fitted: FloatArray
    cells: int


def _stepwise(
    columns: Sequence[_Column], rows: IntArray, label: IntArray, y: FloatArray, log_n: FloatArray
) -> list[Factor]:
    """Select columns that explain `y` within cells, each given those before it."""
    left = list(columns)
    factors: list[Factor] = []
    total, used = float(y @ y), 0
    freedom = len(rows) - (int(label.max()) + 1)
    if total <= 1e-16 * len(y):
        return []
    rest = y
    while left:
        tried = [(c, _within(c, rows, label, rest, log_n, freedom - used, total)) for c in left]
        known = [(c, e) for c, e in tried if e and e.p < CHANCE / len(columns)]
        known = [(c, e) for c, e in known if e.effect >= _SMALL_EFFECT]
        if not known:
            break
        best = max(e.share for _, e in known)
        # Of columns that say the same, the one that somebody tuned.
        near = [(c, e) for c, e in known if e.share >= 0.9 * best]
        column, explained = max(near, key=lambda pair: (pair[0].tuned, pair[1].share))
        factors.append(_factor(column, explained, column.codes[rows], y))
        rest = rest - explained.fitted
        used += min(column.levels - 1, 3) if column.values is not None else column.levels - 1
        left = [c for c in left if c is not column]
    return factors


def _factor(column: _Column, explained: _Explained, codes: IntArray, y: FloatArray) -> Factor:
    """Describe a factor; `codes` and `y` are the levels of the rows and what it explains."""
    known = codes >= 0
    size = np.bincount(codes[known], minlength=1)
    total = np.bincount(codes[known], y[known], minlength=1)
    mean = np.where(size == size.max(), total / np.maximum(size, 1), np.inf)
    several = column.texts and size.max() > 1
    return Factor(
        column=column.name,
        cells=explained.cells,
        share=explained.share,
        effect=explained.effect,
        suggested=column.texts[int(np.argmin(mean))] if several else None,
        tuned=column.tuned,
    )


def _within(
    column: _Column, rows: IntArray, label: IntArray, y: FloatArray, log_n: FloatArray,
    freedom: int, total: float,
) -> _Explained | None:  # fmt: skip
    """Return how much of `y`, centred by cell, a column explains by its most certain model."""
    models = []
    codes = column.codes[rows]
    if (codes >= 0).any():  # within a cell a blank stands for a default that nobody wrote down
        codes = np.where(codes >= 0, codes, column.levels)
        models.append(_by_levels(codes, label, y))
        if column.levels <= _FEW_LEVELS:
            models.append(_by_levels(codes, label, y, log_n))
    if column.values is not None and column.levels >= 4:
        models.append(_by_curve(column.values[rows], label, y, log_n))
    best = None
    for model in models:
        if model is None:
            continue
        fitted, rank, cells_ = model
        spare = freedom - rank
        saved = float(fitted @ fitted)
        residual = y - fitted
        left = float(residual @ residual)
        if spare < 1 or rank < 1 or saved <= 0.0:
            continue
        statistic = (saved / rank) / max(left / spare, 1e-16)
        p = float(fdtrc(rank, spare, statistic))
        differing = np.sqrt(saved / len(y))
        item = _Explained(p, saved / total, float(differing), fitted, cells_)
        if best is None or item.p < best.p or (item.p == best.p and item.share > best.share):
            best = item
    return best


def _by_levels(
    codes: IntArray, label: IntArray, y: FloatArray, log_n: FloatArray | None = None
) -> tuple[FloatArray, int, int] | None:
    """Least squares on levels within cells: fitted values, rank, and cells that have several.

    With `log_n` what a level does moves with ln N.
    """
    k = int(codes.max()) + 1
    number = np.zeros((int(label.max()) + 1, k))
    np.add.at(number, (label, codes), 1.0)
    several = (number > 0).sum(axis=1) > 1
    if not several.any():
        return None
    size = number.sum(axis=1)
    if log_n is None:
        normal = np.diag(number.sum(axis=0)) - (number / size[:, None]).T @ number
        right = np.bincount(codes, y, minlength=k).astype(np.float64)
        effect, rank = _solve(normal, right)
        return effect[codes] - (number @ effect / size)[label], rank, int(several.sum())
    dummies = (codes[:, None] == np.arange(k)).astype(np.float64)
    design = np.concatenate([dummies, dummies * (log_n - log_n.mean())[:, None]], axis=1)
    for j in range(design.shape[1]):
        design[:, j] -= (np.bincount(label, design[:, j]) / size)[label]
    effect, rank = _solve(design.T @ design, design.T @ y)
    return design @ effect, rank, int(several.sum())


def _by_curve(
    values: FloatArray, label: IntArray, y: FloatArray, log_n: FloatArray
) -> tuple[FloatArray, int, int] | None:
    """Least squares on a parabola whose bottom moves with ln N, within cells."""
    known = np.isfinite(values)
    if known.sum() < 8:
        return None
    z = _scaled(values[known])
    if z is None:
        return None
    design = np.stack([z, z * z, z * (log_n[known] - log_n[known].mean())], axis=1)
    cell = np.unique(label[known], return_inverse=True)[1]
    size = np.bincount(cell)
    for j in range(design.shape[1]):
        design[:, j] -= (np.bincount(cell, design[:, j]) / size)[cell]
    several = np.bincount(cell, design[:, 0] ** 2) > 1e-12
    if not several.any():
        return None
    target = y[known] - (np.bincount(cell, y[known]) / size)[cell]
    effect, rank = _solve(design.T @ design, design.T @ target)
    fitted = np.zeros(len(y))
    fitted[known] = design @ effect
    return fitted, rank, int(several.sum())


def _solve(normal: NDArray[np.float64], right: FloatArray) -> tuple[FloatArray, int]:
    """Least-squares solution and rank of the normal equations."""
    size, vectors = np.linalg.eigh(normal)
    kept = size > 1e-9 * max(float(size[-1]), 1e-300)
    part = vectors[:, kept]
    return np.asarray(part @ ((part.T @ right) / size[kept])), int(kept.sum())


def _between(
    columns: Sequence[_Column], params: FloatArray, tokens: FloatArray, y: FloatArray
) -> list[Factor]:
    """Select the column whose levels or values lie apart the most about a smooth surface."""
    factors = []
    surface = _surface(params, tokens)
    basis = np.linalg.qr(surface)[0]
    rest = y - basis @ (basis.T @ y)
    total = float(rest @ rest)
    freedom = len(y) - basis.shape[1]
    if freedom < 4 or total <= 1e-14 * len(y):
        return []
    log_n = np.log(params)
    for column in columns:
        for design in (_level_design(column), _curve_design(column, log_n)):
            if design is None:
                continue
            design = design - basis @ (basis.T @ design)
            effect, rank = _solve(design.T @ design, design.T @ rest)
            fitted = design @ effect
            saved, spare = float(fitted @ fitted), freedom - rank
            if spare < 4 or rank < 1:
                continue
            statistic = (saved / rank) / max((total - saved) / spare, 1e-16)
            p = float(fdtrc(rank, spare, statistic))
            size_of_it = math.sqrt(saved / len(y))
            if p < CHANCE / (2 * len(columns)) and size_of_it >= _SMALL_EFFECT:
                explained = _Explained(p, saved / total, size_of_it, fitted, 0)
                factors.append(_factor(column, explained, column.codes, rest))
    return sorted(factors, key=lambda factor: -factor.share)[:1]


def _level_design(column: _Column) -> FloatArray | None:
    """Columns of levels that have several rows, but for the first; None where there are too few."""
    size = np.bincount(column.codes[column.codes >= 0], minlength=1)
    often = np.flatnonzero(size >= 2)
    if len(often) < 2 or len(often) > max(len(column.codes) // 4, 2):
        return None
    return np.asarray(column.codes[:, None] == often[None, 1:], dtype=np.float64)


def _curve_design(column: _Column, log_n: FloatArray) -> FloatArray | None:
    """Columns of a parabola whose bottom moves with ln N; None for words and few values."""
    if column.values is None or column.levels < 4 or not np.isfinite(column.values).all():
        return None
    z = _scaled(column.values)
    return None if z is None else np.stack([z, z * z, z * (log_n - log_n.mean())], axis=1)


def _scaled(values: FloatArray) -> FloatArray | None:
    """Values, as logarithms where they span more than a factor of 2, of mean 0 and deviation 1."""
    z = np.log(values) if values.min() > 0 and values.max() / values.min() > 2.0 else values
    scale = float(z.std())
    return None if scale == 0.0 else np.asarray((z - z.mean()) / scale)


def _surface(params: FloatArray, tokens: FloatArray) -> FloatArray:
    """A cubic in ln N and ln D, a parabola where rows are few; shape (n, 10 or 6)."""
    u, v = ((x - x.mean()) / max(x.std(), 1e-9) for x in (np.log(params), np.log(tokens)))
    degree = 3 if len(u) >= 40 else 2
    terms = [u**i * v**j for i in range(degree + 1) for j in range(degree + 1 - i)]
    return np.stack(terms, axis=1)


def _ordered(column: _Column, params: FloatArray, tokens: FloatArray) -> bool:
    """Whether a column only orders rows by N, D, C or D/N, as a size's label or a rate's rule."""
    axes = (params, tokens, params * tokens, tokens / params)
    if column.values is not None:
        known = np.isfinite(column.values)
        if known.sum() < 3 or np.ptp(column.values[known]) == 0.0:
            return True
        own = _ranks(column.values[known])
        ranks = (_ranks(axis[known]) for axis in axes)
        if any(abs(float(np.corrcoef(own, rank)[0, 1])) > _RANGES for rank in ranks):
            return True
    known = column.codes >= 0
    return bool(known.any()) and any(_apart(column.codes[known], axis[known]) for axis in axes)


def _ranks(values: FloatArray) -> IntArray:
    """The place of each value among the distinct ones, from 0."""
    return np.unique(values, return_inverse=True)[1]


def _apart(codes: IntArray, axis: FloatArray) -> bool:
    """Whether levels lie in ranges of an axis that do not overlap."""
    order = np.lexsort((axis, codes))
    first = np.concatenate([[True], np.diff(codes[order]) > 0])
    start = np.flatnonzero(first)
    low = axis[order][start]
    high = axis[order][np.concatenate([start[1:] - 1, [len(order) - 1]])]
    rank = np.argsort(low)
    return bool(np.all(high[rank][:-1] <= low[rank][1:] * (1 + 1e-9)))
