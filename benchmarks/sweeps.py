"""Our own sweeps for `benchmarks.orchestration`, which calls each in a process of its own.

Trials are simulated: they take the time that they are told, and none of the processor's. Whoever
imports this has called `orchestrator.connection.prepare`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.lease import hold
from orchestrator.mirror import Mirror
from orchestrator.planner import Plan, make_plan
from orchestrator.progress import Board, Progress
from orchestrator.project import Project, create_project, open_project
from orchestrator.runs import TRIAL_TAG, name_of
from orchestrator.spec import parse_spec
from orchestrator.sweep import train
from orchestrator.sync import differences
from orchestrator.tracking import Tracker, store_of

NAME = "benchmark"
BUDGETS = [1e10, 3e10, 1e11, 3e11, 1e12]
SIZES = 5
POINTS = 50
"""Of every curve."""
SLOTS = 2
PATIENCE_SECONDS = 120.0
"""For MLflow to catch up, at the end."""
COMMAND = "from orchestrator.cli import main; main()"


class Timed(Progress):
    """The board of a sweep, which notes when the first trial started."""

    first: float | None = None
    """`time.time()` then."""

    def running(self, key: str, fraction: float = 0.0, loss: float | None = None) -> None:
        """A trial has started, or has come so far."""
        if self.first is None:
            self.first = time.time()
        super().running(key, fraction, loss)


def plan_of(trials: int, seconds: float) -> Plan:
    """So many simulated trials, each of `seconds`; `trials` is a multiple of 25."""
    data = {
        "name": NAME,
        "trainer": "simulated",
        "budgets": BUDGETS,
        "sizes": SIZES,
        "seeds": list(range(trials // (len(BUDGETS) * SIZES))),
        "simulated": {"points": POINTS, "seconds": seconds},
        "limits": {"slots": SLOTS},
    }
    return make_plan(parse_spec(data, source=Path("benchmark.toml")))


def full(trials: int, seconds: float, directory: str) -> dict[str, Any]:
    """What `isoflop run` does before it draws conclusions; from the first start on.

    Returns
    -------
    Seconds until all is trained and until MLflow equals the ledger, the driver's peak memory, the
    slots' utilisation, and how MLflow differs from the ledger (checked afterwards).
    """
    project, plan = create_project(directory), plan_of(trials, seconds)
    with Path(os.devnull).open("w") as nowhere, hold(project.storage, NAME) as lease:
        project.save_plan(plan)
        progress = Timed(Board(plan), Console(file=nowhere))
        with Mirror(project, plan.name) as tracking:
            with progress:
                train(project, plan, lease, progress, tracking.finished)
            trained = time.time()
            caught_up = tracking.catch_up(PATIENCE_SECONDS)
            equal = time.time()
    megabytes = peak_megabytes()
    assert progress.first is not None
    return {
        "trials": trials,
        "trained_seconds": trained - progress.first,
        "seconds": equal - progress.first,
        "driver_mb": megabytes,
        "utilisation": utilisation(project),
        "caught_up": caught_up,
        "rows": len(project.ledger.ids()),
        "differences": _differences(project),
    }


def restart(directory: str, left: int) -> dict[str, Any]:
    """`isoflop run` in a finished project from which `left` observations were removed.

    Returns
    -------
    Seconds from the start of the process to the first step of a new trial, and to its end.
    """
    project = open_project(directory)
    _forget(project, left)
    before = project.ledger.ids()
    assert project.local is not None
    spec = project.local / "plans" / f"{NAME}.toml"
    command = [sys.executable, "-c", COMMAND, "run", str(spec), "--project", directory, "--json"]
    started = time.time()
    done = subprocess.run(command, capture_output=True, check=False)
    ended = time.time()
    if done.returncode:
        raise RuntimeError(done.stderr.decode()[-2000:])
    found = json.loads(done.stdout)
    fresh = project.ledger.read(project.ledger.ids() - before).to_pylist()
    first = min(row["finished_at"].timestamp() - row["seconds"] for row in fresh)
    return {
        "trained": found["trained"],
        "seconds": first - started,
        "whole_seconds": ended - started,
    }


def utilisation(project: Project) -> float:
    """Busy slot time over slots x wall, from the first trial's start to the last one's end."""
    rows = project.ledger.read(columns=("finished_at", "seconds")).to_pylist()
    ends = [row["finished_at"].timestamp() for row in rows]
    starts = [end - row["seconds"] for end, row in zip(ends, rows, strict=True)]
    return float(sum(row["seconds"] for row in rows) / (SLOTS * (max(ends) - min(starts))))


def peak_megabytes() -> float:
    """Of this process, by the kernel's own account."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM")


def _forget(project: Project, count: int) -> None:
    """Take rows, their MLflow runs and all copies away: as if it had been killed before them."""
    store = store_of(project)
    assert project.local is not None
    assert store is not None
    gone = set(sorted(project.ledger.ids())[:: len(project.ledger.ids()) // count][:count])
    for key, tokens in gone:
        (project.local / "ledger" / f"{key}-{tokens}.parquet").unlink()
    for copy in (project.local / "compacted").glob("*"):
        with suppress(FileNotFoundError):
            copy.unlink()
    tracker = Tracker(project, store)
    for run in tracker.search(TRIAL_TAG):
        if name_of(run) in gone:
            tracker.client.delete_run(run.info.run_id)


def _differences(project: Project) -> list[str]:
    store = store_of(project)
    assert store is not None
    return differences(project, Tracker(project, store))
