"""Tables of runs made by a known law, with the defects of the world planted in them.

Each is what somebody might hand in: a design, noise, columns under usual names, in any of Arrow's
types, and on top of it hyperparameters, training curves, failed runs or other units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from analysis.laws import GENERALISED, HOFFMANN, loss
from analysis.observations import FloatArray
from analysis.optimum import FlopsPerToken, optimum

Columns = dict[str, np.ndarray]

TRUTHS = {
    "besiroglu": (
        HOFFMANN,
        {"A": 482.0, "B": 2085.4, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658},
    ),
    "steeper in D": (HOFFMANN, {"A": 120.0, "B": 9000.0, "E": 1.6, "alpha": 0.28, "beta": 0.44}),
    "gamma .7": (
        GENERALISED,
        {"A": 1.2e3, "B": 6e3, "E": 1.7, "alpha": 0.42, "beta": 0.43, "gamma": 0.7},
    ),
}
NAMES = {
    "params": ("params", "N", "n_params", "Model Size"),
    "tokens": ("tokens", "D", "train_tokens", "num_tokens"),
    "loss": ("loss", "val_loss", "Final Loss", "eval_loss"),
}
DEFECTS = ("factor", "curves", "failed", "units", "duplicates")


@dataclass
class Planted:
    """A table and what is true of it."""

    table: pa.Table
    law: object
    theta: FloatArray
    defects: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    """Columns that are not to be taken as they stand; a refusal or warning must name one."""
    top_flops: float = 0.0

    def truth(self, flops: float) -> tuple[float, float]:
        """N_opt and L there."""
        best = optimum(self.theta, flops, FlopsPerToken.six_n())
        return best.params, best.loss


def design(rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """N and D of a sweep: budgets, a grid of sizes and tokens, or runs here and there."""
    kind = rng.choice(["isoflop", "isoflop", "grid", "scattered"])
    base = 10 ** rng.uniform(17, 19)
    if kind == "isoflop":
        budgets, sizes = int(rng.integers(4, 7)), int(rng.integers(5, 9))
        flops = np.repeat(base * rng.choice([2.0, 3.0, 4.0]) ** np.arange(budgets), sizes)
        steps = np.exp(np.linspace(-0.5, 0.5, sizes) * np.log(rng.uniform(8, 60)))
        n = np.sqrt(flops / (6 * rng.uniform(10, 40))) * np.tile(steps, budgets)
        return n, flops / (6 * n)
    if kind == "grid":
        sizes, lengths = int(rng.integers(5, 8)), int(rng.integers(4, 7))
        n = np.sqrt(base / 120) * np.geomspace(0.4, rng.uniform(6, 20), sizes)
        d = base / 6 / np.sqrt(base / 120) * np.geomspace(0.4, rng.uniform(8, 30), lengths)
        return np.repeat(n, lengths), np.tile(d, sizes)
    count = int(rng.integers(36, 90))
    flops = base * np.exp(rng.uniform(0, np.log(100), count))
    n = np.sqrt(flops / 120) * np.exp(rng.uniform(-1.4, 1.4, count))
    return n, flops / (6 * n)


def planted(seed: int, defects: set[str] | None = None, *, digitised: bool = False) -> Planted:
    """A random table; `defects` are drawn too unless given.

    `digitised` has the noise of points read off a figure: 1 to 3%, with heavy tails, three digits.
    """
    rng = np.random.default_rng(seed)
    law, constants = list(TRUTHS.values())[rng.integers(len(TRUTHS))]
    theta = law.theta(constants)
    if defects is None:
        defects = {name for name in DEFECTS if rng.random() < 0.3}
    n, d = design(rng)
    n, d = np.round(n), np.round(d)
    noise = 10 ** rng.uniform(-3, -2.3)
    columns: Columns = {"params": n, "tokens": d}
    log_effect = np.zeros(len(n))
    names: set[str] = set()
    if rng.random() < 0.3:  # replicates
        columns, log_effect = _repeated(columns, log_effect, int(rng.integers(2, 4)), "seed")
    if "factor" in defects:
        columns, log_effect, name = _factor(rng, columns, log_effect)
        names.add(name)
    own = noise * rng.standard_normal(len(log_effect))
    if digitised:
        own = rng.uniform(0.01, 0.03) / np.sqrt(3) * rng.standard_t(3, len(log_effect))
    columns["loss"] = loss(theta, columns["params"], columns["tokens"]) * np.exp(log_effect + own)
    if digitised:
        columns = {
            key: np.array([float(f"{value:.3g}") for value in part])
            for key, part in columns.items()
        }
    top = float(6 * (n * d).max())
    shuffled = rng.random() < 0.5
    if "failed" in defects:
        names |= _failed(rng, columns)
    if "curves" in defects:
        columns, more, ordered = _curves(rng, columns, noise)
        names |= more
        shuffled &= not ordered
    _extras(rng, columns)
    table_names = {key: str(rng.choice(options)) for key, options in NAMES.items()}
    if "units" in defects:
        names.add(_units(rng, columns, table_names))
    order = rng.permutation(len(columns["loss"])) if shuffled else np.arange(len(columns["loss"]))
    if "duplicates" in defects:
        order = np.append(order, rng.choice(order, int(rng.integers(1, 5))))
    table = pa.table(
        {
            table_names.get(key, key): _typed(rng, values[order], key)
            for key, values in columns.items()
        }
    )
    return Planted(table, law, theta, defects, names, top)


def _repeated(
    columns: Columns, effect: FloatArray, times: int, name: str
) -> tuple[Columns, FloatArray]:
    rows = len(effect)
    columns = {key: np.repeat(values, times) for key, values in columns.items()}
    columns[name] = np.tile(np.arange(times), rows)
    return columns, np.repeat(effect, times)


def _factor(
    rng: np.random.Generator, columns: Columns, effect: FloatArray
) -> tuple[Columns, FloatArray, str]:
    """Add a column that the law does not know, and what it does to ln L."""
    kind = rng.choice(["rate", "word", "flag", "number"])
    rows = len(effect)
    if kind == "rate":
        name = str(rng.choice(["lr", "learning_rate", "config.lr", "batch_size", "weight_decay"]))
        count = int(rng.integers(3, 9))
        columns = {key: np.repeat(part, count) for key, part in columns.items()}
        if rng.random() < 0.3:  # drawn at random, as random searches do
            columns[name] = np.exp(rng.uniform(np.log(5e-4), np.log(8e-3), rows * count))
        else:
            columns[name] = np.tile(np.geomspace(5e-4, 8e-3, count), rows)
        log_n = np.log(columns["params"])
        best = np.log(2e-3) - 0.15 * (log_n - log_n.mean()) + rng.uniform(-0.5, 0.5)
        width = rng.uniform(0.01, 0.05)
        penalty = width * (np.log(columns[name]) - best) ** 2
        return columns, np.repeat(effect, count) + penalty, name
    levels: list[object]
    if kind == "word":
        name = str(rng.choice(["arch", "dataset", "optimizer", "tokenizer"]))
        levels = ["one", "two", "three"][: int(rng.integers(2, 4))]
    elif kind == "flag":
        name, levels = str(rng.choice(["moe", "use_qk_norm", "tied"])), [False, True]
    else:
        name = str(rng.choice(["unique_tokens", "repeats", "depth_multiplier"]))
        levels = [1.0, 2.0, 8.0][: int(rng.integers(2, 4))]
    size = rng.uniform(0.01, 0.08)
    does = size * np.arange(len(levels)) / (len(levels) - 1)
    if rng.random() < 0.6:  # in every cell
        columns = {key: np.repeat(part, len(levels)) for key, part in columns.items()}
        columns[name] = np.tile(np.array(levels), rows)
        return columns, np.repeat(effect, len(levels)) + np.tile(does, rows), name
    if rng.random() < 0.4:  # in some cells
        again = np.flatnonzero(rng.random(rows) < rng.uniform(0.2, 0.6))
        kept = np.concatenate([np.arange(rows), again])
        columns = {key: part[kept] for key, part in columns.items()}
        columns[name] = np.array(levels)[[0] * rows + [len(levels) - 1] * len(again)]
        return columns, np.append(effect, effect[again] + size), name
    drawn = rng.integers(len(levels), size=rows)
    columns[name] = np.array(levels)[drawn]
    return columns, effect + does[drawn], name


def _failed(rng: np.random.Generator, columns: Columns) -> set[str]:
    """Let some runs stop before their end, with the loss that they had then."""
    rows = len(columns["loss"])
    stopped = rng.random(rows) < rng.uniform(0.05, 0.2)
    name = str(rng.choice(["status", "State", "state"]))
    good, bad = [("FINISHED", "FAILED"), ("finished", "crashed"), ("COMPLETED", "TIMEOUT")][
        rng.integers(3)
    ]
    columns["loss"] = columns["loss"] * np.where(stopped, np.exp(rng.uniform(0.02, 0.2, rows)), 1.0)
    columns[name] = np.where(stopped, bad, good)
    return {name}


def _curves(
    rng: np.random.Generator, columns: Columns, noise: float
) -> tuple[Columns, set[str], bool]:
    """Give each run the points before its last, above the law since their rate has not decayed."""
    rows = len(columns["loss"])
    points = int(rng.integers(4, 9))
    share = np.geomspace(rng.uniform(0.05, 0.2), 1.0, points)
    last = np.tile(np.arange(points) == points - 1, rows)
    final = {key: np.repeat(part, points) for key, part in columns.items()}
    above = np.where(last, 0.0, rng.uniform(0.03, 0.08))
    jitter = np.where(last, 0.0, 0.3 * noise) * rng.standard_normal(len(last))
    slope = rng.uniform(0.08, 0.14)
    fall = -slope * np.log(np.tile(share, rows))
    final["loss"] = final["loss"] * np.exp(fall + above + jitter)
    whole = final["tokens"]
    final["tokens"] = np.round(whole * np.tile(share, rows))
    names = {"tokens"}
    by_column = rng.random() < 0.7
    if by_column:
        name = str(rng.choice(["run", "run_id", "run_name", "trial_id"]))
        final[name] = np.repeat([f"r{i:04d}" for i in range(rows)], points)
        names.add(name)
    if not by_column or rng.random() < 0.5:
        name = str(rng.choice(["step", "iter", "global_step"]))
        final[name] = np.round(final["tokens"] / 2e4)
        names.add(name)
    return final, names, not by_column


def _extras(rng: np.random.Generator, columns: Columns) -> None:
    """Add columns that every table has and that explain nothing."""
    rows = len(columns["loss"])
    makers: dict[str, Callable[[], np.ndarray]] = {
        "host": lambda: rng.choice(["node-1", "node-2", "node-3"], rows),
        "gpus": lambda: rng.choice([8, 16], rows),
        "seconds": lambda: (
            columns["params"] * columns["tokens"] / 1e14 * rng.uniform(0.9, 1.1, rows)
        ),
        "width": lambda: np.round(np.sqrt(columns["params"] / 24)),
        "notes": lambda: rng.choice(["", "", "rerun"], rows),
        "train_loss": lambda: columns["loss"] * np.exp(0.01 * rng.standard_normal(rows)),
        "created": lambda: rng.uniform(1.7e9, 1.8e9, rows),
        "warmup": lambda: np.round(columns["tokens"] / 100),
        "index": lambda: np.arange(rows),
        "model": lambda: np.array([f"{n / 1e6:.0f}M" for n in columns["params"]]),
    }
    if not {"step", "iter", "global_step"} & set(columns):  # of runs that are finished
        makers["step"] = lambda: np.round(columns["tokens"] / 5e5)
    for name in rng.permutation(list(makers))[: int(rng.integers(0, 6))]:
        columns[str(name)] = makers[str(name)]()


def _units(rng: np.random.Generator, columns: Columns, names: dict[str, str]) -> str:
    """Put a column into another unit, and say which."""
    kind = rng.choice(["params", "tokens", "perplexity"])
    if kind == "perplexity":
        names["loss"] = str(rng.choice(["perplexity", "val_ppl"]))
        columns["loss"] = np.exp(columns["loss"])
        return names["loss"]
    columns[kind] = columns[kind] / {"params": 1e6, "tokens": 1e9}[kind]
    return names[kind]


def _typed(rng: np.random.Generator, values: np.ndarray, key: str) -> pa.ChunkedArray:
    """A column in one of the types that hold it."""
    array = pa.array(values.tolist())
    kinds: list[pa.DataType]
    if pa.types.is_string(array.type):
        kinds = [pa.string(), pa.large_string(), pa.string_view(), pa.binary()]
        kinds += [pa.dictionary(pa.int32(), pa.string())]
    elif pa.types.is_floating(array.type):
        kinds = [pa.float64(), pa.float64(), pa.string()]
    elif pa.types.is_integer(array.type):
        kinds = [pa.int64(), pa.int32(), pa.float64()]
    else:
        kinds = [array.type]
    kind = kinds[rng.integers(len(kinds))]
    cut = int(rng.integers(0, len(values)))
    if pa.types.is_dictionary(kind):
        parts = [part.dictionary_encode() for part in (array.slice(0, cut), array.slice(cut))]
        return pa.chunked_array([part for part in parts if len(part)])
    return pa.chunked_array([array.slice(0, cut).cast(kind), array.slice(cut).cast(kind)])
