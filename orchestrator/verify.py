"""Whether a project's files agree with each other, and stay within it. Reads all, changes nothing.

It finds what somebody changed, renamed, mixed up or planted, as far as files contradict each other.
Whoever can write to a project can still write a row that nothing contradicts: a measurement that
never took place looks like one that did. See docs/trust.md.
"""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from analysis.errors import InputError, first_line
from analysis.observations import LATER, SCHEMA, ObservationId, observation_ids
from analysis.wording import plural
from orchestrator import evaluations, ledger, models
from orchestrator.artifacts import DATABASE, places_outside
from orchestrator.artifacts import DIRECTORY as ARTIFACTS
from orchestrator.compaction import DIRECTORY as COMPACTED
from orchestrator.compaction import MARK, copies, read_copy
from orchestrator.exclusion import FILE as EXCLUSIONS
from orchestrator.exclusion import read_exclusions
from orchestrator.external import IN_KEY, key_of
from orchestrator.external import TRAINER as EXTERNAL
from orchestrator.project import Project
from orchestrator.records import LeftOut
from orchestrator.spec import code_of
from orchestrator.stopped import read_stopped
from trainers.trial import Trial

AT_ONCE = 500
"""Rows in memory at once, with their curves."""
HEADER_BYTES = 100_000_000
"""The longest header of a safetensors file, as its own reader has it."""
Moved = Callable[[int, int], None]


@dataclass
class Verified:
    """Problems of a project, and how much of it was compared."""

    project: str
    """Its URI."""
    rows: int = 0
    """Files in its ledger that are the row that their name says."""
    rows_checked: int = 0
    """Rows whose content was compared with the trial that a plan or a model has on record."""
    copied: int = 0
    """Rows in compacted copies that were compared with their own files."""
    models: int = 0
    problems: list[LeftOut] = field(default_factory=list)
    """Files that disagree with others or point outside of the project, each with the reason."""
    notes: list[str] = field(default_factory=list)
    """Sentences on matters that are no disagreement and that a person should know."""

    def to_json(self) -> dict[str, Any]:
        """Return the contract of `isoflop verify --json`."""
        return asdict(self)

    def problem(self, file: str, reason: str) -> None:
        """Note that a file of the project disagrees with another one, or points outside."""
        self.problems.append(LeftOut(file=file, reason=reason))


def verify(project: Project, moved: Moved = lambda done, all_: None) -> Verified:
    """Compare a project's files with each other.

    Parameters
    ----------
    project
        A directory's or an object store's.
    moved
        Called with how many rows are done, and of how many, as it goes on.
    """
    result = Verified(project=project.uri)
    trials = _plans(project, result)
    _records(project, result)
    losses = _rows(project, trials, result, moved)
    _models(project, losses, trials, result)
    if project.local is not None:
        _links(project.local, result)
        _database(project.local, result)
    unchecked = result.rows - result.rows_checked
    if unchecked:
        result.notes.append(
            f"{unchecked} of {result.rows} rows are of trials that no plan and no model has on "
            "record: that their keys are those of their content cannot be checked"
        )
    return result


def _plans(project: Project, result: Verified) -> dict[str, Trial]:
    """Check plans; returns their trials by keys that were made anew."""
    plans, left_out = project.survey_plans()
    result.problems += left_out
    for plan in plans:
        for phrase in code_of(plan.spec):
            result.notes.append(f"running the sweep {plan.name} executes {phrase}")
    _, odd = read_stopped(project.storage, [plan.name for plan in plans])
    result.problems += odd
    return {trial.key: trial for plan in plans for trial in plan.trials}


def _records(project: Project, result: Verified) -> None:
    result.problems += project.activity().left_out
    readers: dict[str, Callable[[], object]] = {
        EXCLUSIONS: lambda: read_exclusions(project.storage),
        evaluations.DIRECTORY: lambda: evaluations.read(project.storage),
    }
    for file, read in readers.items():
        try:
            read()
        except InputError as error:
            result.problem(file, str(error))


def _rows(
    project: Project, trials: Mapping[str, Trial], result: Verified, moved: Moved
) -> dict[ObservationId, float | None]:
    """Check the ledger's files and their copies; returns the losses of the rows."""
    copied = _copies(project, result)
    columns = SCHEMA.names if copied else _CHECKED
    names = [n for n in project.storage.names(ledger.DIRECTORY) if n.endswith(".parquet")]
    losses: dict[ObservationId, float | None] = {}
    for start in range(0, len(names), AT_ONCE):
        moved(start, len(names))
        tables = [*_read(project, names[start : start + AT_ONCE], columns, result)]
        if not tables:
            continue
        table = pa.concat_tables(tables)
        for row in table.select(_CHECKED).to_pylist():
            name = row["trial"], row["tokens"]
            losses[name] = row["loss"]
            _check_row(row, trials.get(name[0]), result)
        for copy in copied:
            copy.compare(table, result)
    moved(len(names), len(names))
    result.rows = len(losses)
    for copy in copied:
        copy.check_marks(project, losses.keys(), result)
    return losses


def _read(
    project: Project, names: list[str], columns: list[str], result: Verified
) -> Iterator[pa.Table]:
    read = project.storage.read_many(f"{ledger.DIRECTORY}/{name}" for name in names)
    for file, data in read.items():
        place, name = project.storage.place(file), ledger.row_of(file)
        try:
            if name is None:
                raise InputError(f"{place} is no file of a ledger: move it elsewhere")
            yield ledger.read_row(place, data, name, columns)
        except InputError as error:
            result.problem(file, str(error))


_CHECKED = [name for name in SCHEMA.names if name in {"trial", "tokens", *ledger.OF_TRIAL, *IN_KEY}]
"""Columns that are compared with a trial or a key."""


def _check_row(row: dict[str, Any], trial: Trial | None, result: Verified) -> None:
    """Compare a row with its trial, or with its key if it is external."""
    file = ledger.file_name((row["trial"], row["tokens"]))
    if row["trainer"] == EXTERNAL:
        result.rows_checked += 1
        key = key_of(row)
        if key != row["trial"]:
            result.problem(file, f"{file}: the key of its content is {key}; it was changed")
    elif trial is not None:
        result.rows_checked += 1
        for name, value in ledger.of_trial(trial, row["tokens"]).items():
            earlier = row[name] is None and name in LATER
            if row[name] != value and not earlier:
                result.problem(
                    file,
                    f"{file}: {name} is {row[name]}, and {value} in the trial of its key: it was "
                    "changed, or the key is another trial's",
                )
                return
        if row["tokens"] not in trial.measured_at and not trial.horizons:
            result.problem(file, f"{file}: its trial is measured at {trial.tokens} tokens")


@dataclass
class _Copy:
    """One compacted copy, on its way to be compared."""

    file: str
    rows: pa.Table
    marks: dict[ObservationId, str | None]
    at: dict[ObservationId, int]

    def compare(self, table: pa.Table, result: Verified) -> None:
        """Compare rows, as their own files have them, with the copied ones."""
        names = [name for name in observation_ids(table) if name in self.at]
        own = [i for i, name in enumerate(observation_ids(table)) if name in self.at]
        theirs = self.rows.take(pa.array([self.at[name] for name in names], pa.int64()))
        ours = table.take(pa.array(own, pa.int64()))
        result.copied += len(names)
        if ours.equals(theirs):
            return
        pairs = zip(names, ours.to_pylist(), theirs.to_pylist(), strict=True)
        for name, row, copy in pairs:
            wrong = [column for column in row if repr(row[column]) != repr(copy[column])]
            if wrong:
                result.problem(
                    self.file,
                    f"{self.file}: {', '.join(wrong)} of {name[0]} at {name[1]} tokens are not "
                    "those of the row's own file: remove the copy",
                )

    def check_marks(
        self, project: Project, rows: Mapping[ObservationId, object] | Any, result: Verified
    ) -> None:
        """Find copied rows that the ledger lacks, and those of files that are others now."""
        for name in self.marks:
            if name not in rows:
                result.problem(
                    self.file,
                    f"{self.file}: it has {name[0]} at {name[1]} tokens, and the ledger does not",
                )
        there = {ledger.file_name(name).partition("/")[2]: name for name in rows}
        now = project.storage.marks(ledger.DIRECTORY, there.keys())
        changed = sum(self.marks.get(there[file], mark) != mark for file, mark in now.items())
        if changed:
            result.notes.append(
                f"{self.file}: {changed} of its rows do not carry the mark of their own file, as "
                "when a project was copied from another storage: these files are read instead"
            )


def _copies(project: Project, result: Verified) -> list[_Copy]:
    usable = []
    names = [f"{COMPACTED}/{name}" for name in copies(project.storage)]
    for file, data in project.storage.read_many(names).items():
        try:
            rows = read_copy(project.storage.place(file), data)
        except InputError as error:
            result.notes.append(f"not used: {error}")
            continue
        ids = observation_ids(rows)
        if len(set(ids)) < len(ids):
            result.problem(file, f"{file}: it has a row twice: remove it")
            continue
        marks = dict(zip(ids, rows[MARK].to_pylist(), strict=True))
        at = {name: i for i, name in enumerate(ids)}
        usable.append(_Copy(file, rows.drop_columns([MARK]), marks, at))
    return usable


def _models(
    project: Project,
    losses: Mapping[ObservationId, float | None],
    trials: Mapping[str, Trial],
    result: Verified,
) -> None:
    """Compare what each model says of itself with its name and its row."""
    for bare in project.storage.names(models.DIRECTORY):
        file = f"{models.DIRECTORY}/{bare}"
        if not bare.endswith(".safetensors"):
            result.problem(file, f"{file} is no model: move it elsewhere")
            continue
        try:
            record = _metadata(project, file)
            trial = Trial.from_dict(json.loads(record["trial"]))
            name, loss = (trial.key, int(record["tokens"])), float(record["loss"])
        except FileNotFoundError:  # removed since it was listed
            continue
        except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            result.models += 1
            result.problem(file, f"{file} is damaged, or no model of this version ({why})")
            continue
        result.models += 1
        if models.file_name(name) != file or record.get("key") != trial.key:
            result.problem(file, f"{file}: it is the model of {name[0]} at {name[1]} tokens")
        elif name in losses and losses[name] != loss:
            result.problem(
                file, f"{file}: its loss is {loss}, and {losses[name]} in the ledger's row"
            )


def _metadata(project: Project, file: str) -> dict[str, Any]:
    """Return the metadata of a safetensors file, of which only the header is read."""
    size = int.from_bytes(project.storage.beginning(file, 8), "little")
    if not 2 <= size <= HEADER_BYTES:
        raise ValueError(f"a header of {size} bytes")
    header = json.loads(project.storage.beginning(file, 8 + size)[8:])
    return dict(header["__metadata__"])


def _links(directory: Path, result: Verified) -> None:
    """Find links that lead out of a directory, what is no file, and who else can write to it."""
    root = directory.resolve()
    if stat.S_IMODE(root.stat().st_mode) & (stat.S_IWGRP | stat.S_IWOTH):
        result.notes.append(
            f"others than its owner can write to {directory}: what they could do is in "
            "docs/trust.md; chmod go-w takes it from them"
        )
    for where, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(where) / name
            file = path.relative_to(root).as_posix()
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # a temporary file of a sweep that runs
                continue
            if stat.S_ISLNK(mode):
                target = path.resolve()
                if not target.is_relative_to(root):
                    result.problem(file, f"{file} is a symbolic link to {target}: remove it")
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                result.problem(file, f"{file} is neither a file nor a directory: remove it")


def _database(directory: Path, result: Verified) -> None:
    """Find where MLflow's database has artifacts outside of the project."""
    path = directory / DATABASE
    if not path.is_file() or path.is_symlink():  # `_links` tells of a link
        return
    try:
        places = places_outside(directory)
    except sqlite3.Error as error:
        result.problem(DATABASE, f"{DATABASE} cannot be read ({error}): move it away, and sync")
        return
    if places:
        result.problem(
            DATABASE,
            f"{DATABASE}: {plural(len(places), 'place')} of files outside of the project's "
            f"{ARTIFACTS}, such as {places[0]}: isoflop sync {directory} makes them lead into it",
        )
