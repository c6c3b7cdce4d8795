"""How a source is read and counted: the values behind the command line's options."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import pyarrow as pa

from analysis.errors import InputError
from analysis.files import read_table
from analysis.foreign import Selection
from analysis.loss_units import LossUnit
from analysis.observations import FlopsConvention, ParamsConvention
from orchestrator.planner import FIT_ROLES, Role
from orchestrator.storage import is_uri, split


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Which rows and columns of a source are taken."""

    where: Mapping[str, str] = field(default_factory=dict)
    """Column = value, to select rows."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Which column is what, for a table that is not isoflop's own; keys of `foreign.NAMES`."""
    loss: str | None = None
    """The column to fit; by default the held-out loss."""
    loss_unit: LossUnit | None = None
    """Unit of the loss in a foreign table; by default the one that its name gives."""
    best_of: tuple[str, ...] = ()
    """Columns of which each cell of N and D keeps the setting of the lowest loss; several may stand
    in one item, with commas between them."""
    pool: bool = False
    """Whether rows are fitted together although a column tells rows of equal N and D apart."""
    all_points: bool = False
    """Whether every point of a training curve is fitted, not the last one of each run."""
    find_budgets: bool = True
    """Whether budgets are found where C comes in groups and nothing names them."""
    drop_largest: int = 0
    """Rows whose loss is at least the so manieth largest are left out."""
    roles: tuple[Role, ...] = FIT_ROLES
    """What an observation must have been planned as."""
    tracking_uri: str | None = None
    """MLflow's store, where the source is an experiment."""

    def __post_init__(self) -> None:
        for role in self.roles:
            if role not in get_args(Role):
                raise InputError(f"--roles {role}: the roles are {', '.join(get_args(Role))}")
        if self.drop_largest < 0:
            raise InputError(f"--drop-largest is {self.drop_largest}; it must be at least 0")
        if self.loss and self.columns.get("loss", self.loss) != self.loss:
            raise InputError(
                f"--loss is {self.loss!r} and --columns says loss={self.columns['loss']}: "
                "give one of them"
            )

    @property
    def selection(self) -> Selection:
        """Return the selection of rows of a foreign table."""
        return Selection(
            best_of=self.best_of,
            pool=self.pool,
            all_points=self.all_points,
            selected=frozenset(self.where),
            loss_unit=self.loss_unit,
        )

    def require_own(self, name: str) -> None:
        """Refuse what is for tables of others, where isoflop's own observations are read.

        Raises
        ------
        InputError
            With the option and the source's name.
        """
        for option, value in (
            ("--columns", self.columns),
            ("--best-of", self.best_of),
            ("--pool", self.pool),
            ("--all-points", self.all_points),
            ("--loss-unit", self.loss_unit),
        ):
            if value:
                raise InputError(
                    f"{option} is for tables of others; {name} has isoflop's own observations: "
                    "leave it out"
                )


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How N and C are counted, None as the source is first given, and how sure intervals are."""

    params: ParamsConvention | None = None
    flops: FlopsConvention | None = None
    level: float = 0.9

    def __post_init__(self) -> None:
        for name, value, known in (
            ("--params", self.params, get_args(ParamsConvention)),
            ("the convention of FLOPs", self.flops, get_args(FlopsConvention)),
        ):
            if value is not None and value not in known:
                raise InputError(f"{name} is {value!r}; it must be one of {', '.join(known)}")


@dataclass(frozen=True, kw_only=True)
class Conventions:
    """Under which conventions a source has numbers, the usual one first."""

    params: tuple[ParamsConvention, ...]
    flops: tuple[FlopsConvention, ...]
    same_flops: bool = False
    """Whether C is one and the same under all of `flops`."""

    @property
    def pairs(self) -> list[tuple[ParamsConvention, FlopsConvention]]:
        """Those that differ."""
        return [(n, c) for n in self.params for c in self.flops[: 1 if self.same_flops else None]]

    def choose(self, convention: Convention) -> tuple[ParamsConvention, FlopsConvention]:
        """The one asked for, else the usual one.

        Raises
        ------
        InputError
            If the source has no numbers under it.
        """
        params, flops = convention.params or self.params[0], convention.flops or self.flops[0]
        for name, value, have in (
            ("--params", params, self.params),
            ("--flops", flops, self.flops),
        ):
            if value not in have:
                raise InputError(
                    f"{name} is {value!r}, but this source has {', '.join(have)} only: leave it out"
                )
        return params, flops


def parse_where(items: Sequence[str]) -> dict[str, str]:
    """Conditions as a person writes them, COLUMN=VALUE.

    Raises
    ------
    InputError
        If one is something else, or a column is given two values.
    """
    found: dict[str, str] = {}
    for item in items:
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise InputError(f"--where {item}: write COLUMN=VALUE")
        if found.setdefault(name, value) != value:
            raise InputError(
                f"--where {name} is given as {found[name]} and as {value}, and no row is both: "
                "give one of them"
            )
    return found


def read_file(source: str) -> pa.Table:
    """A CSV or Parquet file, from an object store by way of this machine."""
    if not is_uri(source):
        return read_table(Path(source))
    storage, name = split(source)
    with tempfile.TemporaryDirectory(prefix="isoflop-") as directory:
        path = Path(directory) / name
        try:
            storage.download(name, path)
        except FileNotFoundError as error:
            raise InputError(f"there is no file {source}") from error
        return read_table(path)
