"""Artifacts of a project's own MLflow store: all of them lie below the project.

MLflow keeps their places as absolute URIs in its database. In a copy of a project they lead into
the original, and whoever can write to the project can have them lead anywhere: files would be
written there by a sweep, and read from there by MLflow's UI. They are made to lead into the project
before MLflow opens the database. A store that a person names with --tracking-uri is left as it is.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from analysis.errors import InputError
from analysis.wording import plural
from orchestrator.project import Project

DATABASE, DIRECTORY = "mlflow.db", "mlartifacts"
_PLACES = (
    ("runs", "artifact_uri"),
    ("experiments", "artifact_location"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("workspaces", "default_artifact_root"),
    ("workspaces", "trace_archival_location"),
)
"""Tables and columns of MLflow 3.17's schema that name places of files; absent ones are skipped."""
_TRACES = ("trace_tags", "value", "mlflow.artifactLocation")
"""The place of a trace's files is the value of a tag with this key."""
_RUN = re.compile("[0-9a-f]{32}")


def artifacts_uri(directory: Path) -> str:
    """Return the URI below which the artifacts of a project in that directory lie."""
    return (directory / DIRECTORY).as_uri()


def artifact_name(run: str, path: Path) -> str:
    """Return the name in a project of a file that belongs to an MLflow run.

    Raises
    ------
    InputError
        If the run's id is none of MLflow's, and might lead out of the project.
    """
    if not _RUN.fullmatch(run):
        raise InputError(
            f"MLflow's database has a run called {run!r}, which is no id of MLflow's: move "
            f"{DATABASE} away, and isoflop sync makes a new one"
        )
    kind = "figures/" if path.suffix == ".png" else ""
    return f"{DIRECTORY}/{run}/artifacts/{kind}{path.name}"


def places_outside(root: Path) -> list[str]:
    """Return the places in a project's database that `keep_inside` would have to move into it.

    The database is only read, and the places are worded for a person.

    Raises
    ------
    sqlite3.Error
        If it is damaged or in use.
    """
    uri = f"{(root / DATABASE).as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True)) as database:
        database.execute("PRAGMA trusted_schema = OFF")
        # MLflow makes an experiment 0 below the working directory, which isoflop never uses.
        return [
            f"{table}.{column} {place!r}"
            for table, column, row, place in _outside(database, root)
            if (table, row) != ("experiments", 0)
        ]


def keep_inside(project: Project) -> str | None:
    """Have every place that the project's own MLflow database names lie in the project.

    Returns a sentence for the user if places of runs were changed, else None.

    Raises
    ------
    InputError
        If the database or a file of the artifacts is a link out of the project, or a place cannot
        be changed.
    OSError
        If the database is damaged or in use.
    """
    root = project.local
    if root is None:
        return None
    _refuse_links(root)
    if not (root / DATABASE).exists() or not _is_sqlite(root / DATABASE):
        return None  # for `tracking`, which refuses it
    try:
        return _moved(root / DATABASE, root)
    except sqlite3.Error as error:
        raise OSError(f"{root / DATABASE} cannot be read as MLflow's database: {error}") from error


def can_write(root: Path) -> bool:
    """Return whether a project's database can be written, and SQLite's journal beside it."""
    return os.access(root, os.W_OK) and os.access(root / DATABASE, os.W_OK)


def copy_inside(root: Path, copy: Path) -> None:
    """Copy the database of a project, and have every place in the copy lie in the project.

    Raises
    ------
    InputError, OSError
        As `keep_inside` does.
    """
    _refuse_links(root)
    uri = f"{(root / DATABASE).as_uri()}?mode=ro"
    try:
        with (
            closing(sqlite3.connect(uri, uri=True)) as source,
            closing(sqlite3.connect(copy)) as to,
        ):
            source.backup(to)
        _moved(copy, root)
    except sqlite3.Error as error:
        raise OSError(f"{root / DATABASE} cannot be read as MLflow's database: {error}") from error


def _moved(path: Path, root: Path) -> str | None:
    with closing(sqlite3.connect(path, timeout=30.0)) as database, database:
        outside = list(_outside(database, root))
        for table, column, row, _ in outside:
            home = artifacts_uri(root)
            if table == "runs":
                (run,) = database.execute("SELECT run_uuid FROM runs WHERE rowid = ?", [row])
                home = f"{home}/{run[0]}/artifacts"
            statement = f"UPDATE {table} SET {column} = ? WHERE rowid = ?"
            database.execute(statement, [home, row])
        left = next(_outside(database, root), None)
        if left is not None:
            raise InputError(
                f"{path} says in its table {left[0]} that files lie at {left[3]}, "
                "outside of the project, and this cannot be mended: move it away, and isoflop sync "
                "makes a new one"
            )
    runs = [uri for table, _, _, uri in outside if table == "runs"]
    if not runs:
        return None
    return (
        f"the MLflow artifacts of {plural(len(runs), 'run')} lay outside of the project, such as "
        f"at {runs[0]}, as they do in a copy: they are now written to and looked for in "
        f"{root / DIRECTORY}"
    )


def _outside(database: sqlite3.Connection, root: Path) -> Iterator[tuple[str, str, int, str]]:
    """Table, column, row and content of every place that is not below the project's artifacts."""
    there = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    for table, column, tag in (*((t, c, None) for t, c in _PLACES), _TRACES):
        if table not in there:
            continue
        columns = {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
        if column not in columns:
            continue
        statement = f"SELECT rowid, {column} FROM {table} WHERE {column} IS NOT NULL"
        rows = database.execute(
            statement if tag is None else f"{statement} AND key = ?", [] if tag is None else [tag]
        )
        for row, uri in rows.fetchall():
            if uri != "" and not _is_inside(str(uri), root / DIRECTORY):
                yield table, column, row, str(uri)


def _is_inside(uri: str, directory: Path) -> bool:
    """Whether a URI is of a file in a directory, by its letters; links are looked for elsewhere."""
    parts = urlsplit(uri)
    if parts.scheme != "file" or parts.netloc or parts.query or parts.fragment:
        return False
    path = url2pathname(parts.path)
    normal = os.path.normpath(path)
    return "\0" not in path and Path(normal).is_relative_to(directory)


def _refuse_links(root: Path) -> None:
    """Refuse a database or artifacts that are links: SQLite and MLflow would follow them."""
    paths = [*root.glob(f"{DATABASE}*"), root / DIRECTORY]  # with its journal
    for directory, directories, files in os.walk(root / DIRECTORY):
        paths += [Path(directory, name) for name in (*directories, *files)]
    for path in paths:
        if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
            raise InputError(
                f"{path} is a symbolic link to {path.resolve()}, outside of the project: remove "
                "it, or name an MLflow store elsewhere with --tracking-uri"
            )


def _is_sqlite(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(16) == b"SQLite format 3\0"
