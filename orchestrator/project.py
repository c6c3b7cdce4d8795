"""A project: one directory with one ledger and any number of plans."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from analysis.errors import InputError
from analysis.observations import ObservationId
from orchestrator.ledger import Ledger, read_json, write_text
from orchestrator.planner import Plan, Planned, Role
from orchestrator.spec import to_toml

PROJECTS = Path("projects")
"""Where new projects go, below the working directory."""


@dataclass(frozen=True)
class Project:
    """Paths and contents of a project directory."""

    path: Path

    @property
    def ledger(self) -> Ledger:
        """Its observations."""
        return Ledger(self.path)

    @property
    def figures(self) -> Path:
        """Where its pictures are."""
        return self.path / "figures"

    @property
    def report(self) -> Path:
        """Its report, one HTML page."""
        return self.path / "report.html"

    @property
    def proposal(self) -> Path:
        """Its proposal, a sweep file."""
        return self.path / "next.toml"

    def plans(self) -> list[Plan]:
        """Its plans, oldest first."""
        paths = sorted(self._plans.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return [Plan.from_dict(read_json(path)) for path in paths]

    def save_plan(self, plan: Plan) -> None:
        """Keep a plan, new, unchanged or extended.

        Raises
        ------
        InputError
            If a plan of that name asks for something that this one does not.
        """
        path = self._plans / f"{plan.name}.json"
        if path.exists():
            old = Plan.from_dict(read_json(path))
            lost = {p.id for p in old.planned} - {p.id for p in plan.planned}
            if lost:
                raise InputError(
                    f"project {self.path} has another sweep called {plan.name!r}, with {len(lost)} "
                    "observations that this one does not ask for: give this one another name, or "
                    "another --project"
                )
        text = json.dumps(plan.to_dict(), indent=1)
        if path.exists() and path.read_text() == text:
            return
        write_text(path, text)
        comment = f"The sweep {plan.name}, as it was run in this project."
        write_text(path.with_suffix(".toml"), to_toml(plan.spec, comment))

    def budgets(self) -> dict[ObservationId, float]:
        """Nominal FLOP budget of every planned observation: that of the first plan to ask."""
        plans = reversed(self.plans())
        return {p.id: p.budget for plan in plans for p in plan.planned}

    def roles(self) -> dict[ObservationId, frozenset[Role]]:
        """In which roles plans ask for every planned observation."""
        found: dict[ObservationId, frozenset[Role]] = {}
        for p in (p for plan in self.plans() for p in plan.planned):
            found[p.id] = found.get(p.id, frozenset()) | {p.role}
        return found

    def outcomes(self, plan: Plan) -> dict[ObservationId, str]:
        """State of every observation of a plan: complete, diverged, failed or waiting."""
        measured = self.ledger.ids()
        table = self.ledger.read({p.id for p in plan.planned} & measured)
        state = dict(zip(observation_ids(table), table["status"].to_pylist(), strict=True))
        failed = {(r["trial"], r["tokens"]) for r in self.ledger.failures()}
        return {
            p.id: state.get(p.id) or ("failed" if p.id in failed else "waiting")
            for p in plan.planned
        }

    @property
    def _plans(self) -> Path:
        return self.path / "plans"


def observation_ids(table: pa.Table) -> list[ObservationId]:
    """Names of the rows of a table, in its order."""
    return list(zip(table["trial"].to_pylist(), table["tokens"].to_pylist(), strict=True))


def open_project(path: Path) -> Project:
    """An existing project.

    Raises
    ------
    InputError
        If there is none at `path`.
    """
    if not is_project(path):
        raise InputError(
            f"there is no project at {path} (no plans/ in it): run a sweep into it first"
        )
    return Project(path.resolve())


def is_project(path: Path) -> bool:
    """Whether a directory is a project."""
    return (path / "plans").is_dir()


def create_project(path: Path) -> Project:
    """A new or existing project that can be written.

    Raises
    ------
    InputError
        If the directory cannot be made or written.
    """
    probe = path / ".writable"
    try:
        (path / "plans").mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"cannot write to the project directory {path} ({error.strerror}): "
            "choose another with --project"
        ) from error
    return Project(path.resolve())


def directory_for(sweep_file: Path, name: str) -> Path:
    """The project that a sweep file lies in, or in the plans/ of; else a new one."""
    parent = sweep_file.resolve().parent
    for directory in (parent, parent.parent):
        if is_project(directory):
            return directory
    return PROJECTS / name


@contextmanager
def locked(project: Project) -> Iterator[None]:
    """Keep other drivers out of a project; a lock ends with its process, however that ends.

    Raises
    ------
    InputError
        If another driver is at work in it.
    """
    with (project.path / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise InputError(
                f"another isoflop ({file.read().strip()}) is running in {project.path}: "
                "wait for it, or use another --project"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def counts(outcomes: dict[ObservationId, str]) -> Counter[str]:
    """How many observations are in each state."""
    return Counter(outcomes.values())


def missing(project: Project, plan: Plan) -> list[Planned]:
    """What a plan asks for that has not been measured."""
    measured = project.ledger.ids()
    return [p for p in plan.planned if p.id not in measured]
