"""A sweep that things happen to, and what must hold of it whatever has happened."""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from analysis.observations import observation_ids
from orchestrator import lease
from orchestrator.planner import Plan, make_plan
from orchestrator.project import Project
from orchestrator.spec import read_spec
from orchestrator.storage import LocalStorage
from orchestrator.sync import sync
from orchestrator.tracking import store_of
from tests.faults.processes import (
    MARKER,
    Cluster,
    Driver,
    Steps,
    environment,
    kill_marked,
    marked,
    name_of,
)
from tests.waiting import wait
from trainers.flops import trial_flops
from trainers.registry import trainer
from trainers.trial import Measurement, Step, Trial
from trainers.workspace import Scratch

SIMULATED = """
name = "faults"
trainer = "simulated"
recipe = "llama-adamw"
budgets = [1e16, 3e16, 1e17, 3e17, 1e18]
sizes = 6
[shapes]
aspect = 64
head_width = 32
context = 1024
width_multiple = 32
"""
PRETRAINED = """
name = "faults"
[shapes]
depth = 2
heads = 2
context = 64
[[budgets]]
flops = 3e10
widths = [8, 12, 16]
[[budgets]]
flops = 5e10
widths = [8, 12, 16]
"""
CHECKPOINTS = "[checkpoints]\nevery_seconds = 0.1\nmax_overhead = 1.0\n"


@dataclass
class Sweep:
    """A project, its drivers, and the steps that were counted."""

    directory: Path
    steps: Steps
    spec: Path
    cluster: Cluster | None
    """None: each driver starts a Ray of its own."""
    marker: str = field(default_factory=lambda: uuid.uuid4().hex)
    drivers: list[Driver] = field(default_factory=list)
    inside: tuple[str, ...] = ()
    """What starts a command where the project is, if the tests are elsewhere."""
    seen_at: Path | None = None
    """Where the project is for the tests then."""
    _seen: dict[str, int] = field(default_factory=dict)
    """Rows by file name, with the time of their file."""

    @property
    def project(self) -> Project:
        # Not by `open_storage`, which resolves links: one below /proc leads into another namespace.
        return Project(LocalStorage(self.seen_at or self.directory / "project"))

    @cached_property
    def plan(self) -> Plan:
        return make_plan(read_spec(self.spec))

    def start(self, *options: object, as_json: bool = True, **more: str) -> Driver:
        """A driver; `more` is of its environment."""
        told = ["run", self.spec, "--project", self.directory / "project"]
        told += ["--json"] if as_json else []
        if self.cluster is not None:
            told += ["--address", self.cluster.address]
            more = {**self.cluster.environment, **more}
        self.drivers.append(self._isoflop(*told, *options, **more))
        return self.drivers[-1]

    def _isoflop(self, *told: object, **more: str) -> Driver:
        command = [*self.inside, sys.executable, "-P", "-m", "orchestrator", *map(str, told)]
        environ = environment(self.steps.directory, **{MARKER: self.marker}, **more)
        return Driver.start(self.directory, command, environ)

    def rows(self) -> dict[str, int]:
        """The ledger's files with their times; none that was there may have gone or changed."""
        ledger = self.project.local / "ledger"
        found = {p.name: p.stat().st_mtime_ns for p in ledger.glob("[!.]*.parquet")}
        changed = {name for name, at in self._seen.items() if found.get(name) != at}
        assert not changed
        self._seen = found
        return found

    def wait_for_rows(self, count: int, driver: Driver, seconds: float = 120) -> None:
        wait(lambda: len(self.rows()) >= count or not driver.alive, seconds, f"for {count} rows")
        assert driver.alive, driver.said

    def executed(self) -> list[tuple[int, float, str, int]]:
        """Steps of this sweep's trials, in order of time: pid, time, key, step."""
        own = {trial.key for trial in self.plan.trials}
        return [event for event in self.steps.all() if event[2] in own]

    def busy(self) -> dict[int, str]:
        """Processes that are in the middle of a trial that has a checkpoint, with its key."""
        last = {pid: (at, key, step) for pid, at, key, step in self.executed()}
        recent = {p: (key, step) for p, (at, key, step) in last.items() if time.time() - at < 0.5}
        measured = {key for key, _ in self.project.ledger.ids()}
        return {
            pid: key
            for pid, (key, step) in recent.items()
            if step > 1 and key not in measured and psutil.pid_exists(pid) and self.saved(key)
        }

    def hanging(self) -> set[str]:
        """Keys of trials that have begun and done no step for a second, without a row."""
        last = {key: (at, step) for _, at, key, step in self.executed()}
        measured = {key for key, _ in self.project.ledger.ids()}
        quiet = {key for key, (at, step) in last.items() if step and time.time() - at > 1}
        return quiet - measured

    def take_over(self) -> Callable[[], None]:
        """Take the project as a driver on another machine would; what gives it back."""
        storage = self.project.storage
        held = lease.current(storage)
        assert held is not None
        mine = replace(held, generation=held.generation + 1, id=self.marker, host="elsewhere")
        name = f"leases/{mine.generation}.json"
        assert storage.create(name, json.dumps(asdict(mine)).encode())
        released = json.dumps(asdict(replace(mine, released=True)))
        return lambda: storage.replace(name, released.encode())

    def sync(self) -> dict[str, Any]:
        """What `isoflop sync` does and finds."""
        if self.inside:
            return self._isoflop("sync", self.directory / "project", "--json").result()
        store = store_of(self.project)
        assert store is not None
        return asdict(sync(self.project, store))

    def saved(self, key: str) -> list[str]:
        """Names of a trial's checkpoints."""
        return self.project.storage.names(f"checkpoints/{key}")

    def recovered(self, since: float, keys: set[str] | None = None) -> float | None:
        """Seconds from `since` until an attempt at any of `keys`, or at any, begun later, steps."""
        fresh = set()
        for pid, at, key, step in self.executed():
            if at < since or (keys is not None and key not in keys):
                continue
            if step == 0:
                fresh.add((pid, key))
            elif (pid, key) in fresh:
                return at - since
        return None

    def repeated(self) -> float:
        """FLOPs of steps done more than once over the plan's FLOPs."""
        counts = Counter((key, step) for _, _, key, step in self.executed() if step)
        distinct = Counter(key for key, _ in counts)
        done: Counter[str] = Counter()
        for (key, _), n in counts.items():
            done[key] += n
        flops = {trial.key: trial_flops(trial) for trial in self.plan.trials}
        twice = sum(flops[key] * (done[key] - n) / n for key, n in distinct.items())
        return twice / sum(flops.values())

    def check(self, *, failed: int = 0) -> None:
        """What must hold of a sweep that has ended, whatever happened to it."""
        self.rows()
        self._check_ledger(failed)
        self._check_steps()
        self._check_attempts()
        self.check_mlflow()
        self.check_nothing_is_left()

    def _check_ledger(self, failed: int) -> None:
        """Each observation once, and as it is without any fault."""
        plan, table = self.plan, self.project.ledger.read()
        names = observation_ids(table)
        assert len(set(names)) == len(names) == len(plan.planned) - failed
        assert set(names) <= {p.id for p in plan.planned}
        rows = {row["trial"]: row for row in table.to_pylist()}
        expected = undisturbed([t for t in plan.trials if t.key in rows], self.directory)
        for key, measured in expected.items():
            row = rows[key]
            assert (row["loss"], row["status"]) == (measured.loss, measured.status)
            curve = [(p.step, p.train_loss, p.heldout_loss) for p in measured.curve]
            found = [(p["step"], p["train_loss"], p["heldout_loss"]) for p in row["curve"]]
            assert found == curve

    def _check_steps(self) -> None:
        """No step is done after its trial's row was written, and none is left out."""
        written = {name.rpartition("-")[0]: at / 1e9 for name, at in self.rows().items()}
        done = defaultdict(set)
        for _, at, key, step in self.executed():
            assert at < written.get(key, float("inf")) + 0.01, f"{key} was trained again"
            done[key].add(step)
        for trial in self.plan.trials:
            if trial.key in written and trial.trainer == "pretrain":
                assert done[trial.key] == set(range(trial.hyperparameters.steps + 1))

    def _check_attempts(self) -> None:
        """Every start of a trial but that which gave its row is on record, with its end."""
        starts = Counter(key for _, _, key, step in self.executed() if step == 0)
        measured = {key for key, _ in self.project.ledger.ids()}
        records = self.project.attempts.all()
        assert not [a for a in records if a.open]
        explained = Counter(a.trial for a in records)
        for key, n in starts.items():
            assert n - (key in measured) <= explained[key], f"{key} was started {n} times"

    def check_mlflow(self) -> None:
        """MLflow is what the ledger is, without being made so now."""
        done = self.sync()
        assert [done[name] for name in ("written", "half_written", "duplicates")] == [0, 0, 0]
        assert (done["differences"], done["unknown"]) == ([], [])

    def check_nothing_is_left(self, seconds: float = 20) -> None:
        """No process of a driver lives, nor one that trains in the cluster."""
        limit = time.monotonic() + seconds
        left = ["anything"]
        while left:
            assert time.monotonic() < limit, left
            time.sleep(0.05)
            found = marked(self.marker) + (self.cluster.workers() if self.cluster else [])
            left = [name_of(process) for process in found]

    def end(self) -> None:
        kill_marked(self.marker)


_known: dict[str, Measurement] = {}


def undisturbed(trials: Iterable[Trial], directory: Path) -> dict[str, Measurement]:
    """What trials give that nothing ever interrupts, trained here; none for those that raise."""

    def measure(trial: Trial) -> None:
        workspace = Scratch(directory / "undisturbed" / trial.key)
        if dict(trial.settings).get("hang"):  # only the first attempt hangs
            workspace.every_steps = 1
            for event in trainer(trial.trainer).train(trial, workspace):
                if isinstance(event, Step):
                    break
        *_, _known[trial.key] = trainer(trial.trainer).train(trial, workspace)

    def try_to(trial: Trial) -> None:
        with suppress(RuntimeError):
            measure(trial)

    # Simulated trials sleep, so all at once; real ones, whose threads torch sets, one by one.
    unknown = [trial for trial in trials if trial.key not in _known]
    with ThreadPoolExecutor(64 if unknown and unknown[0].trainer == "simulated" else 1) as pool:
        list(pool.map(try_to, unknown))
    return {trial.key: _known[trial.key] for trial in trials if trial.key in _known}


def describe(sweep: Sweep) -> dict[str, Any]:
    """What a sweep's faults cost, for the table."""
    outcomes = sweep.project.outcomes(sweep.plan)
    files = (sweep.project.local or Path()) / "ledger"
    rows = [pq.read_table(path).to_pylist() for path in files.glob("[!.]*.parquet")]
    names = Counter((row["trial"], row["tokens"]) for file in rows for row in file)
    return {
        "lost": sum(name not in names and state != "failed" for name, state in outcomes.items()),
        "doubled": sum(n - 1 for n in names.values()),
        "repeated": sweep.repeated(),
    }
