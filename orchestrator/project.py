"""A project: one storage with one ledger and any number of plans."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from analysis.errors import InputError
from analysis.observations import ObservationId, observation_ids
from orchestrator import lease
from orchestrator.attempts import BLAMED, BLAMELESS, Attempt, Attempts
from orchestrator.changes import changes
from orchestrator.ledger import Ledger
from orchestrator.planner import KeptPlan, Plan, Planned, Role, parse_plan
from orchestrator.records import LeftOut, timestamp
from orchestrator.spec import to_toml
from orchestrator.storage import Storage, is_uri, open_storage, prove

PROJECTS = Path("projects")
"""Where new projects go, below the working directory."""
MARK = "project.json"
"""What makes a storage a project: object stores have no empty directories."""
REPORT, PROPOSAL, FIGURES = "report.html", "next.toml", "figures"
_PLANS = "plans"
DIRECTORIES = (
    *("attempts", "checkpoints", "compacted", "evaluations", FIGURES, "leases", "ledger", "logs"),
    *("mlartifacts", "models", _PLANS),
)
"""Every directory of a project."""


@dataclass(frozen=True, kw_only=True)
class Drafts:
    """Where to write what people read of a project, on this machine."""

    directory: Path

    @property
    def report(self) -> Path:
        """One HTML page."""
        return self.directory / REPORT

    @property
    def proposal(self) -> Path:
        """A sweep file."""
        return self.directory / PROPOSAL

    @property
    def figures(self) -> Path:
        """A directory of pictures."""
        return self.directory / FIGURES


@dataclass(frozen=True, kw_only=True)
class Activity:
    """Who works in a project, and on what, at one moment."""

    driver: lease.LeaseRecord | None
    """Who drives it, if anybody alive does."""
    attempts: tuple[Attempt, ...]
    """Those that run and those that gave no row, oldest first."""
    left_out: tuple[LeftOut, ...] = ()
    """Records of attempts and of the driver that could not be used."""

    @property
    def running(self) -> list[Attempt]:
        """Those of the driver that is at work."""
        if self.driver is None:
            return []
        return [a for a in self.attempts if a.open and a.driver == self.driver.generation]

    @property
    def over(self) -> list[Attempt]:
        """Those without a row that run no more; open ones were left by a driver that is gone."""
        running = {a.id for a in self.running}
        return [a for a in self.attempts if a.id not in running]


@dataclass(frozen=True)
class Project:
    """A project's contents, wherever it lies."""

    storage: Storage

    @property
    def uri(self) -> str:
        """What people call it: a URI, or the absolute path of its directory."""
        return self.storage.uri

    @property
    def name(self) -> str:
        """The last part of its URI."""
        return self.storage.name

    @property
    def local(self) -> Path | None:
        """Its directory, where it is one."""
        return self.storage.local

    @property
    def ledger(self) -> Ledger:
        """Its observations."""
        return Ledger(self.storage)

    @property
    def attempts(self) -> Attempts:
        """Its attempts that run, or that gave no observation."""
        return Attempts(self.storage)

    @property
    def report(self) -> str:
        """Where its report is, for people."""
        return self.storage.place(REPORT)

    @property
    def proposal(self) -> str:
        """Where its proposal, a sweep file, is, for people."""
        return self.storage.place(PROPOSAL)

    @contextmanager
    def drafts(self) -> Iterator[Drafts]:
        """Where to write report, proposal and figures.

        In the project's own directory; of one in an object store in a temporary one, from which
        everything is uploaded when the block ends without an error.
        """
        if self.local is not None:
            yield Drafts(directory=self.local)
            return
        with tempfile.TemporaryDirectory(prefix="isoflop-") as name:
            directory = Path(name)
            yield Drafts(directory=directory)
            for path in sorted(path for path in directory.rglob("*") if path.is_file()):
                self.storage.upload(path, path.relative_to(directory).as_posix())

    def proposal_text(self) -> str | None:
        """What its proposal says, if there is one."""
        found = self.storage.read_many([PROPOSAL]).get(PROPOSAL)
        return None if found is None else found.decode(errors="replace")

    def plans(self) -> list[Plan]:
        """Its plans that can be read, the one that was changed last at the end."""
        return self.survey_plans()[0]

    def survey_plans(self) -> tuple[list[Plan], list[LeftOut]]:
        """Return its plans, the one that was changed last at the end, and those left out.

        Nothing is imported for it: see `parse_plan`.
        """
        names = {
            f"{_PLANS}/{name}": name.removesuffix(".json")
            for name in self.storage.names(_PLANS)
            if name.endswith(".json")
        }
        kept, left_out = [], []
        for file, data in self.storage.read_many(names).items():
            try:
                kept.append(parse_plan(names[file], self.storage.place(file), data))
            except InputError as error:
                left_out.append(LeftOut(file=file, reason=str(error)))
        return [item.plan for item in sorted(kept, key=lambda item: item.saved_at)], left_out

    def save_plan(self, plan: Plan, *, extend: bool = False, told: str | None = None) -> None:
        """Keep a plan: a new one, or one that asks for the same as the one of its name.

        Parameters
        ----------
        plan
            What to keep. Its file has the sweep beside it, as TOML that runs.
        extend
            Whether it may ask for more than the one of its name.
        told
            What its file says of itself, where it is not the sweep that was run.

        Raises
        ------
        InputError
            If there is one of its name that was begun and asks for something else. It says what
            differs.
        """
        kept = self._kept(plan.name)
        if kept is not None:
            before = kept.plan
            found = changes(before, plan)
            if (found.gone or (found.new and not extend)) and self._begun(before):
                raise InputError(_refusal(self, plan, found.sentence, only_new=not found.gone))
            if _plain(before) == _plain(plan):
                return
        record = {**_plain(plan), "saved_at": timestamp()}
        name = f"{_PLANS}/{plan.name}"
        self.storage.replace(f"{name}.json", json.dumps(record, indent=1).encode())
        comment = told or f"The sweep {plan.name}, as it was run in this project."
        self.storage.replace(f"{name}.toml", to_toml(plan.spec, comment).encode())

    def _begun(self, plan: Plan) -> bool:
        """Whether a plan has come to anything: until then nobody minds another one.

        Attempts of which each failed by itself are nothing: a mended program is another plan.
        """
        ids = {p.id for p in plan.planned}
        keys = {key for key, _ in ids}
        return bool(ids & self.ledger.ids()) or any(
            a.trial in keys and a.kind not in BLAMED for a in self.attempts.all()
        )

    def _kept(self, plan: str) -> KeptPlan | None:
        name = f"{_PLANS}/{plan}.json"
        data = self.storage.read_many([name]).get(name)
        return None if data is None else parse_plan(plan, self.storage.place(name), data)

    def activity(self) -> Activity:
        """Who works in it now, as far as storage tells."""
        attempts, left_out = self.attempts.survey()
        try:
            holder = lease.current(self.storage)
        except InputError as error:
            holder = None
            left_out.append(LeftOut(file=lease.DIRECTORY, reason=str(error)))
        alive = holder is not None and lease.is_alive(holder)
        return Activity(
            attempts=tuple(attempts),
            driver=holder if alive else None,
            left_out=tuple(left_out),
        )

    def outcomes(
        self, plan: Plan, activity: Activity | None = None, rows: pa.Table | None = None
    ) -> dict[ObservationId, str]:
        """State of every observation of a plan, by the `activity` now and the ledger's `rows`.

        `complete` or `diverged` where it is in the ledger, else `running`; `failed` if its last
        attempt ended by itself or in the loss of its worker, and `waiting` if there was none, or
        one that ended with its driver.
        """
        if rows is None:
            columns = ("trial", "tokens", "status")
            rows = self.ledger.survey({p.id for p in plan.planned}, columns).table
        state = dict(zip(observation_ids(rows), rows["status"].to_pylist(), strict=True))
        activity = activity or self.activity()
        running = {a.trial for a in activity.running}
        tried = {}
        for key, last in _last(activity.attempts).items():
            if key in running:
                tried[key] = "running"
            elif not last.open and last.kind not in BLAMELESS:
                tried[key] = "failed"
        return {p.id: state.get(p.id) or tried.get(p.id[0], "waiting") for p in plan.planned}


def budgets(plans: Sequence[Plan]) -> dict[ObservationId, float]:
    """Nominal FLOP budget of every planned observation: that of the first plan to ask."""
    return {p.id: p.budget for plan in reversed(plans) for p in plan.planned}


def roles(plans: Iterable[Plan]) -> dict[ObservationId, frozenset[Role]]:
    """In which roles plans ask for every planned observation."""
    asked: dict[ObservationId, frozenset[Role]] = {}
    for p in (p for plan in plans for p in plan.planned):
        asked[p.id] = asked.get(p.id, frozenset()) | {p.role}
    return asked


def _last(attempts: Iterable[Attempt]) -> dict[str, Attempt]:
    """The last attempt at each trial, by their numbers: clocks of machines differ."""
    return {a.trial: a for a in sorted(attempts, key=lambda a: a.number)}


def _plain(plan: Plan) -> dict[str, Any]:
    """A plan as it comes back from JSON, which knows no tuples."""
    return dict(json.loads(json.dumps(plan.to_dict())))


def _refusal(project: Project, plan: Plan, difference: str, *, only_new: bool) -> str:
    remedy = "run it with --extend to add them" if only_new else "give this one another name"
    return (
        f"project {project.uri} has another sweep called {plan.name!r}: this one {difference}; "
        f"{remedy}, or use another --project"
    )


def open_project(location: str | Path) -> Project:
    """An existing project.

    Raises
    ------
    InputError
        If there is none at `location`, or it cannot be read.
    """
    storage = open_storage(location)
    if not is_project(storage):
        raise InputError(f"there is no project at {storage.uri}: run a sweep into it first")
    return Project(storage)


def is_project(storage: Storage) -> bool:
    """Whether it has the mark of one, or plans, as a project of before the mark."""
    return storage.exists(MARK) or bool(storage.names(_PLANS))


def in_project(path: Path) -> bool:
    """Return whether a path, as it is written, is below what may be a project (see `is_project`).

    Directories that cannot be read are none.
    """
    return any(
        os.path.isfile(parent / MARK) or any(parent.glob(f"{_PLANS}/*"))
        for parent in path.absolute().parents
    )


def create_project(location: str | Path) -> Project:
    """A new or existing project that can be written, and was: see `storage.prove`.

    Raises
    ------
    InputError
        If nothing can be written there, or not as a ledger must be, or a directory of the project
        is a link that leads out of it.
    """
    storage = open_storage(location)
    require_no_way_out(storage)
    prove(storage)
    storage.create(MARK, json.dumps({"created_at": timestamp()}).encode())
    return Project(storage)


def require_no_way_out(storage: Storage) -> None:
    """See that no directory of a project is a link that leads out of it.

    Nothing is written through such a link, which a sweep would otherwise meet when it has trained.

    Raises
    ------
    Outside
        If one is; it names the link.
    """
    for directory in DIRECTORIES:
        storage.require_inside(directory)


def directory_for(sweep_file: str | Path, name: str) -> str | Path:
    """The project that a sweep file lies in, or in the plans/ of; else a new one."""
    if is_uri(sweep_file):
        parent = str(sweep_file).rpartition("/")[0]
        candidates: list[str | Path] = [parent, parent.rpartition("/")[0]]
    else:
        path = Path(sweep_file).resolve()
        candidates = [path.parent, path.parent.parent]
    for place in candidates:
        if is_project(open_storage(place)):
            return place
    return PROJECTS / name


def counts(outcomes: dict[ObservationId, str]) -> Counter[str]:
    """How many observations are in each state."""
    return Counter(outcomes.values())


def missing(project: Project, plan: Plan) -> list[Planned]:
    """What a plan asks for that has not been measured."""
    measured = project.ledger.ids()
    return [p for p in plan.planned if p.id not in measured]
