"""`isoflop status`: what the storage alone says, to a person and to a script."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator import status as status_module
from orchestrator.attempts import Attempt
from orchestrator.bad_gpus import GpuFault, GpuRecord
from orchestrator.lease import Lease, current, hold
from orchestrator.planner import Plan, make_plan
from orchestrator.project import Activity, Project, create_project, open_project
from orchestrator.spec import parse_spec
from orchestrator.status import show_status, status
from orchestrator.stopped import forget_stopped, note_stopped
from tests.orchestrator.workers import measurement
from tests.waiting import wait
from trainers.trial import Trial

Run = Callable[..., tuple[int, str, str]]
SPEC = {"name": "s", "trainer": "simulated", "budgets": [1e10], "sizes": 8}
KEYS = {
    *("project", "driver", "plans", "external", "rungs", "not_started", "running"),
    *("attempts_without_row", "left_out"),
}


@pytest.fixture
def project(location: str) -> Project:
    """Eight trials, in a directory, then in a bucket."""
    made = create_project(location)
    made.save_plan(_plan())
    return made


def _plan() -> Plan:
    return make_plan(parse_spec(SPEC, source=Path("s.toml")))


def _begin(project: Project, trial: Trial, driver: int) -> Attempt:
    return project.attempts.begin(trial, driver=driver, node="node-7", pid=1)


@contextmanager
def _at_work(project: Project) -> Iterator[tuple[Lease, list[Trial]]]:
    """A driver, with a row of each status, one trial that raised, one that hung, two that run."""
    trials = _plan().trials
    project.ledger.write(trials[0], measurement(trials[0]))
    project.ledger.write(trials[1], measurement(trials[1], status="diverged", loss=None))
    with hold(project.storage, "sweep s") as lease:
        for trial, kind, error in (
            (trials[2], "raised", "ValueError: [no] such rate"),
            (trials[3], "silent", "no sign of life for 600 s (limits.silent_seconds)"),
        ):
            attempt = _begin(project, trial, lease.generation)
            project.attempts.fail(
                attempt, kind=kind, error=error, traceback="T", log="L", step=1234
            )
        for trial in trials[3:5]:
            _begin(project, trial, lease.generation)
        running = {trials[4].key: {"fraction": 0.25, "loss": 3.125}}
        lease.note({"stopping": False, "running": running}, at_once=True)
        wait(lambda: current(project.storage).note)
        yield lease, trials


def test_every_observation_is_in_one_state(project: Project) -> None:
    with _at_work(project) as (_, trials):
        found = status(open_project(project.uri)).to_json()
    assert set(found) == KEYS
    assert found["plans"] == [
        {"name": "s", "complete": 1, "diverged": 1, "failed": 1, "running": 2, "waiting": 3}
    ]
    assert len(trials) == 1 + 1 + 1 + 2 + 3


def test_the_driver_and_what_runs_are_told(project: Project) -> None:
    with _at_work(project) as (_, trials):
        found = status(project).to_json()
    assert (found["driver"]["pid"], found["driver"]["purpose"]) == (os.getpid(), "sweep s")
    assert found["driver"]["stopping"] is False
    one, other = found["running"]
    assert (one["trial"], one["number"], one["node"]) == (trials[3].key, 2, "node-7")
    assert (one["fraction"], one["train_loss"]) == (None, None)  # not heard of at the last beat
    assert (other["trial"], other["number"]) == (trials[4].key, 1)
    assert (other["fraction"], other["train_loss"]) == (0.25, 3.125)


def test_what_ended_without_a_row_is_told_with_its_reason(project: Project) -> None:
    with _at_work(project) as (_, trials):
        raised, silent = status(project).to_json()["attempts_without_row"]
    assert (raised["trial"], raised["kind"], raised["step"]) == (trials[2].key, "raised", 1234)
    assert raised["error"] == "ValueError: [no] such rate"
    assert silent["kind"] == "silent"
    assert raised["started_at"] <= raised["ended_at"]
    assert not {"traceback", "log", "id"} & set(raised)  # long, and in attempts/


def test_what_was_not_started_is_told_until_the_next_run(project: Project, isoflop: Run) -> None:
    keys = [trial.key for trial in _plan().trials[3:]]
    note_stopped(project.storage, "s", "no module named 'x'", keys)
    (item,) = status(project).to_json()["not_started"]
    assert (item["plan"], item["reason"]) == ("s", "no module named 'x'")
    assert sorted(item["trials"]) == sorted(keys)
    out = " ".join(isoflop("status", project.uri)[1].split())
    assert (
        "! 5 trials of s were not started, since the first ones all failed alike (no module named "
        "'x'): mend what made them fail and run the same sweep again"
    ) in out
    assert [plan.name for plan in project.plans()] == ["s"]
    forget_stopped(project.storage, "s")
    assert status(project).to_json()["not_started"] == []


def test_a_driver_that_stops_says_so_and_one_that_ended_is_nobody(project: Project) -> None:
    with _at_work(project) as (lease, _):
        lease.note({"stopping": True}, at_once=True)
        wait(lambda: current(project.storage).note["stopping"])
        assert status(project).to_json()["driver"]["stopping"] is True
    found = status(project).to_json()
    assert (found["driver"], found["running"]) == (None, [])
    assert found["plans"][0]["running"] == 0


DIE = """
import os, sys
from orchestrator.lease import hold
from orchestrator.project import open_project
project = open_project(sys.argv[1])
(plan,) = project.plans()
with hold(project.storage, "a sweep") as lease:
    project.attempts.begin(plan.trials[0], driver=lease.generation, node="here", pid=os.getpid())
    os.kill(os.getpid(), 9)
"""


def test_a_driver_that_was_killed_runs_nothing(project: Project) -> None:
    command = [sys.executable, "-c", DIE, project.uri]
    assert subprocess.run(command, timeout=60, check=False).returncode == -9
    assert current(project.storage) is not None
    found = status(project).to_json()
    assert (found["driver"], found["running"]) == (None, [])
    (left,) = found["attempts_without_row"]
    assert (left["node"], left["kind"], left["ended_at"]) == ("here", None, None)
    assert found["plans"][0]["waiting"] == 8
    with hold(project.storage, "another"):
        found = status(project).to_json()
    assert (found["driver"]["purpose"], found["running"]) == ("another", [])


def test_it_is_read_from_anywhere_and_changes_nothing(project: Project, isoflop: Run) -> None:
    with _at_work(project):
        directories = ("", "plans", "attempts", "leases", "ledger", "checkpoints")
        before = {d: project.storage.names(d) for d in directories}
        code, out, err = isoflop("status", project.uri, "--json")
        assert {d: project.storage.names(d) for d in directories} == before
    assert (code, err) == (0, "")
    assert set(json.loads(out)) == KEYS


def test_a_person_sees_it_in_120_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = create_project(tmp_path / "project")
    project.save_plan(_plan())
    with _at_work(project):
        found = status(project)
    monkeypatch.setattr(status_module, "_seconds_since", lambda time: 3725.0 if time else 0.0)
    since, ended = "2026-11-22T08:00:00+00:00", "2026-11-22T09:30:00+00:00"
    driver = replace(found.activity.driver, pid=4242, host="head", since=since)
    attempts = tuple(a if a.open else replace(a, ended_at=ended) for a in found.activity.attempts)
    activity = Activity(driver=driver, attempts=attempts)
    shown = replace(found, project="s3://ours/p", activity=activity)
    with io.StringIO() as out:
        show_status(Console(file=out, width=120), shown)
        text = out.getvalue()
    for letter, trial in zip("abcdefgh", _plan().trials, strict=True):
        text = text.replace(trial.key, letter * len(trial.key))
    assert [line.rstrip() for line in text.splitlines()] == SEEN.splitlines()


SEEN = """\
plan  observations  complete  diverged  failed  running  waiting
s                8         1         1       1        2        3

driven by process 4242 on head, sweep s since 2026-11-22 08:00 UTC; last sign of life 3725 s ago
running trial     C, FLOPs  width  done  train loss      for  on      attempt
dddddddddddddddd     1e+10     20     –           –  1:02:05  node-7        2
eeeeeeeeeeeeeeee     1e+10     24   25%      3.1250  1:02:05  node-7        1

attempt without a row          C, FLOPs  width  where                        why
cccccccccccccccc 1     raised     1e+10     16  2026-11-22 09:30 UTC node-7  ValueError: [no] such rate, at step 1,234
dddddddddddddddd 1     silent     1e+10     20  2026-11-22 09:30 UTC node-7  no sign of life for 600 s
                                                                             (limits.silent_seconds), at step 1,234
tracebacks and logs: s3://ours/p/attempts/
"""  # noqa: E501 - as wide as the terminal


def test_a_gpu_that_the_driver_holds_is_named(project: Project, isoflop: Run) -> None:
    with _at_work(project) as (lease, _):
        record = GpuRecord()
        held = record.hold("trial 7", GpuFault(gpu="3", node="node-7", error="CUDA error: [x] ECC"))
        lease.note({"running": {}, "held_gpus": record.note()}, at_once=True)
        wait(lambda: "held_gpus" in current(project.storage).note)
        code, out, _ = isoflop("status", project.uri)
    assert code == 0
    assert f"! {held}" in " ".join(out.split())
