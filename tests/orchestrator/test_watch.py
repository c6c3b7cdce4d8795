"""The driver's eye on a sweep: what it ends, what it forgives, and what it tells."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from analysis.observations import ObservationId
from cluster.machines import UnfitNodeError, uniform
from orchestrator import sweep
from orchestrator import watch as watch_module
from orchestrator.attempts import Attempts
from orchestrator.planner import Plan, make_plan
from orchestrator.project import Project, create_project
from orchestrator.spec import parse_spec
from orchestrator.spec_running import Limits
from orchestrator.stop import Stop
from orchestrator.watch import (
    CALL_SECONDS,
    GRACE,
    GRACE_SECONDS,
    IDLE_SECONDS,
    LOOK_SECONDS,
    STALL_SECONDS,
    Watch,
)
from trainers.simulated import Simulated
from trainers.told import ProtocolError
from trainers.workspace import Scratch

EXPECTED = 100.0
"""Seconds of every trial."""
ROW = {"status": "complete", "loss": 2.0, "seconds": 1.0, "found": False}


class Grid:
    """What a watch tells of trials, and asks."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.retries = 1
        self.only_holds = False
        self.lacks = "the cluster has no nodes"
        self.kept_back: list[str] = []
        self.queue = SimpleNamespace(
            job=lambda key: SimpleNamespace(seconds=EXPECTED),
            kept_back=self.kept_back,
            let_go=self.kept_back.clear,
        )

    def started(self, *said: Any) -> None:
        self.told.append(("started", *said))

    def seen(self, *said: Any) -> None:
        self.told.append(("seen", *said))

    def row(self, key: str) -> None:
        self.told.append(("row", key))

    def measured(self, key: str) -> None:
        self.told.append(("measured", key))

    def hold_back(self, failed: Any) -> str | None:
        self.kept_back += ["x", "y"]
        return None

    def unfit(self, key: str) -> None:
        self.told.append(("unfit", key))

    def hold_gpu(self, key: str, gpu: str, seconds: float) -> str | None:
        self.told.append(("hold", key, gpu))
        return f"of {key}" if self.retries else None

    def may_fail(self, key: str) -> bool:
        return self.retries > 0

    def failed(self, key: str, kind: str, **more: Any) -> bool:
        self.told.append(("failed", key, kind))
        return self.retries > 0 and not more.get("mistaken")


class Progress:
    """What a person is told."""

    def __init__(self) -> None:
        self.troubles: list[str] = []
        self.over: list[tuple[str, str]] = []
        self.shown: list[tuple[str, str, list[str], bool]] = []
        self.news: list[str] = []

    def trouble(self, text: str) -> None:
        self.troubles.append(text)

    def measured(self, name: ObservationId, state: str, *said: Any) -> None:
        self.over.append((name[0], state))

    def failed(self, key: str) -> None:
        self.over.append((key, "failed"))

    def attempt_failed(self, key: str, reason: str, log: Sequence[str], *, again: bool) -> None:
        self.shown.append((key, reason, list(log), again))

    def say(self, text: str, **_: Any) -> None:
        self.news.append(text)

    def running(self, *said: Any) -> None: ...

    def waiting(self, key: str) -> None: ...


class Eye:
    """A watch, and Tune as it calls it."""

    def __init__(
        self, project: Project, plan: Plan, limits: Limits, *, measured: bool = False
    ) -> None:
        self.now = 1000.0
        self.killed: list[str] = []
        self.finished: list[str] = []
        self.grid, self.progress = Grid(), Progress()
        self.notes: list[dict[str, Any]] = []
        lease = SimpleNamespace(
            lost=threading.Event(), generation=1, note=lambda note, **_: self.notes.append(note)
        )
        self.keys = [trial.key for trial in plan.trials]
        self.errors: dict[str, BaseException] = {}
        self.watch = Watch(
            project=project,
            trials={trial.key: trial for trial in plan.trials},
            stop=Stop(lease),
            grid=self.grid,
            progress=self.progress,
            begun=lambda: None,
            finished=lambda name: self.finished.append(name[0]),
            limits=limits,
            measured=measured,
        )

    def _trial(self, key: str) -> Any:
        actor = SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: f"actor of {key}"), key=key)
        state = SimpleNamespace(ray_actor=actor)
        return SimpleNamespace(config={"key": key}, temporary_state=state, trial_id=f"of {key}")

    def start(self, *keys: str) -> None:
        for key in keys:
            self.watch.on_trial_start(0, [], self._trial(key))

    def report(self, key: str, **result: Any) -> None:
        self.watch.on_trial_result(0, [], self._trial(key), result)

    def row(self, key: str) -> None:
        self.report(key, **ROW, whole=True)

    def end(self, key: str) -> None:
        self.row(key)
        self.watch.on_trial_complete(0, [], self._trial(key))

    def fail(self, key: str, error: BaseException) -> None:
        self.errors[key] = error
        self.watch.on_trial_error(0, [], self._trial(key))

    def fail_as(self, name: str, key: str, error: BaseException) -> None:
        """Fail a trial that Tune calls `name`: those before it may only keep a GPU."""
        self.errors[key] = error
        trial = self._trial(key)
        trial.trial_id = name
        self.watch.on_trial_error(0, [], trial)

    def wait(self, seconds: float, *, reporting: tuple[str, ...] = ()) -> None:
        """Time goes by, in looks."""
        until = self.now + seconds
        while self.now < until:
            self.now += LOOK_SECONDS
            for key in reporting:
                self.report(key, fraction=0.5, train_loss=3.0)
            self.watch.on_step_end(0, [])


@pytest.fixture
def plan() -> Plan:
    spec = {"name": "s", "trainer": "simulated", "budgets": [1e10], "sizes": 5}
    return make_plan(parse_spec(spec, source=Path("s.toml")))


@pytest.fixture
def make_eye(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Eye]:
    def make(**more: Any) -> Eye:
        made = Eye(create_project(tmp_path / "project"), plan, Limits(silent_seconds=50.0), **more)
        clock = SimpleNamespace(monotonic=lambda: made.now)
        monkeypatch.setattr(watch_module, "time", clock)
        monkeypatch.setattr(watch_module.ray, "kill", lambda actor: made.killed.append(actor.key))
        monkeypatch.setattr(
            watch_module, "_error_of", lambda trial: made.errors[trial.config["key"]]
        )
        made.watch._stepped = made.watch._looked = made.watch._busy = made.now
        return made

    return make


@pytest.fixture
def eye(make_eye: Callable[[], Eye]) -> Eye:
    return make_eye()


def _paced(eye: Eye) -> str:
    """Three trials have taken what was expected; the key of another."""
    *timed, other = eye.keys[:4]
    eye.start(*timed)
    eye.wait(EXPECTED, reporting=tuple(timed))
    for key in timed:
        eye.end(key)
    return other


def test_a_straggler_is_ended_while_it_has_another_try(eye: Eye) -> None:
    slow = _paced(eye)
    eye.start(slow)
    eye.wait(4.9 * EXPECTED, reporting=(slow,))
    assert eye.killed == []
    eye.wait(0.2 * EXPECTED, reporting=(slow,))
    assert eye.killed == [slow]
    eye.fail(slow, RuntimeError("killed"))
    assert ("failed", slow, "slow") in eye.grid.told
    (attempt,) = eye.watch._attempts.all()
    assert (attempt.kind, attempt.trial) == ("slow", slow)
    assert "100 s were expected" in attempt.error
    eye.start(slow)  # once is enough: it may be the trial that is slow
    eye.wait(9 * EXPECTED, reporting=(slow,))
    assert eye.killed == [slow]


def test_a_straggler_on_its_last_try_is_let_be(eye: Eye) -> None:
    slow = _paced(eye)
    eye.grid.retries = 0
    eye.start(slow)
    eye.wait(9 * EXPECTED, reporting=(slow,))
    assert eye.killed == []


def test_who_waits_for_the_storage_is_not_slow(eye: Eye) -> None:
    waiting = _paced(eye)
    eye.start(waiting)
    for _ in range(90):
        eye.wait(10.0)
        eye.report(waiting, trouble="cannot write the row: No space left on device")
    assert eye.killed == []
    eye.row(waiting)
    assert eye.finished[-1] == waiting


def test_a_process_that_says_nothing_any_more_is_ended_from_here(eye: Eye) -> None:
    key = eye.keys[0]
    eye.start(key)
    eye.wait(GRACE * 50 + GRACE_SECONDS)
    assert eye.killed == []
    eye.wait(2.0)
    assert eye.killed == [key]


def test_one_long_call_of_an_object_store_is_no_silence(
    make_eye: Callable[[], Eye], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's own watchdog pauses meanwhile, of which the driver hears nothing."""
    monkeypatch.setattr(Project, "local", None)
    eye = make_eye()
    eye.start(eye.keys[0])
    eye.wait(GRACE * 50 + GRACE_SECONDS + CALL_SECONDS)
    assert eye.killed == []
    eye.wait(2.0)
    assert eye.killed == [eye.keys[0]]


def test_a_driver_that_stood_still_blames_nobody(eye: Eye) -> None:
    key = eye.keys[0]
    eye.start(key)
    eye.now += 1000 * STALL_SECONDS
    eye.watch.on_step_end(0, [])
    eye.wait(10.0)
    assert eye.killed == []


def test_a_worker_that_dies_after_its_row_failed_at_nothing(eye: Eye) -> None:
    key = eye.keys[0]
    eye.start(key)
    eye.row(key)
    eye.fail(key, RuntimeError("died"))
    assert eye.grid.told[-2:] == [("measured", key), ("row", key)]
    assert (eye.progress.over, eye.finished) == ([(key, "complete")], [key])
    assert eye.watch._attempts.all() == []


def test_a_horizons_row_speaks_for_its_node_while_the_trunk_goes_on(eye: Eye) -> None:
    key = eye.keys[0]
    eye.start(key)
    eye.report(key, horizon=1000, **ROW)
    assert eye.grid.told[-1] == ("row", key)
    assert (eye.progress.over, eye.finished) == ([(key, "complete")], [key])
    eye.fail(key, RuntimeError("died"))
    assert eye.grid.told[-1] == ("failed", key, "raised")  # for its last row is not there yet
    eye.start(key)
    before = len(eye.grid.told)
    eye.report(key, horizon=1000, **ROW | {"found": True})  # in the ledger, by the next attempt
    assert eye.grid.told[before:] == []  # whose node did nothing for it
    assert (eye.progress.over, eye.finished) == ([(key, "complete")], [key])


def test_a_row_of_an_attempt_that_could_not_tell_of_it_is_told_by_the_next(eye: Eye) -> None:
    key = eye.keys[0]
    eye.start(key)
    before = len(eye.grid.told)
    eye.report(key, **ROW | {"found": True}, whole=False)
    assert eye.grid.told[before:] == [("measured", key)]
    assert eye.finished == [key]


def test_a_node_that_cannot_work_is_named_and_left_out(eye: Eye) -> None:
    key = eye.keys[0]
    eye.start(key)
    eye.fail(key, UnfitNodeError("node-7 cannot work on the sweep: no project"))
    assert eye.grid.told[-1] == ("unfit", key)
    assert eye.progress.troubles == [
        "node-7 cannot work on the sweep: no project: nothing more is started there for 5 minutes"
    ]
    assert [a.kind for a in eye.watch._attempts.all()] == ["node lost"]


def test_it_is_told_that_no_trial_has_a_worker(eye: Eye) -> None:
    eye.wait(IDLE_SECONDS)
    assert eye.progress.troubles == []
    eye.wait(2.0)
    assert eye.progress.troubles[0] == ("no trial has a worker: the cluster has no nodes; waiting")
    assert eye.notes[-1] == {"stopping": False, "running": {}}


def test_a_loss_that_is_no_number_does_not_break_what_the_lease_says(eye: Eye) -> None:
    """It would be no JSON, and `isoflop status --json` reads it."""
    eye.start(eye.keys[0])
    eye.report(eye.keys[0], fraction=0.5, train_loss=math.nan)
    eye.wait(2 * LOOK_SECONDS)
    running = eye.notes[-1]["running"]
    assert running == {eye.keys[0]: {"fraction": 0.5, "loss": None}}


def _attempt(eye: Eye, key: str, error: str, log: str | None) -> None:
    """Record how an attempt ended, as a worker does."""
    trial = eye.watch._trials[key]
    attempt = eye.watch._attempts.begin(trial, driver=1, node="n", pid=1)
    eye.watch._attempts.fail(attempt, kind="raised", error=error, log=log)


def test_a_failure_is_shown_once_a_trial_with_the_log_of_the_first_of_its_cause(eye: Eye) -> None:
    first, second, third, *_ = eye.keys
    log = "\n".join(f"line {i}" for i in range(20)) + "\n\nImportError: no x\n"
    for key, error in ((first, "exited with 1"), (second, "exited with 1"), (third, "killed")):
        for _ in range(2):  # a second attempt is no news
            eye.start(key)
            _attempt(eye, key, error, log)
            eye.fail(key, RuntimeError("as Tune has it"))
    tail = [*(f"line {i}" for i in range(15, 20)), "ImportError: no x"]
    assert eye.progress.shown == [
        (first, "exited with 1", tail, True),
        (second, None, [], True),
        (third, "killed", tail, True),
    ]


def test_a_protocol_error_is_not_tried_again_and_three_alike_stop_the_rest(eye: Eye) -> None:
    for n, key in enumerate(eye.keys[:3], 1):
        eye.start(key)
        error = f"its result is that of step {n}"
        _attempt(eye, key, error, f"log of {key}")
        eye.fail(key, ProtocolError(error))
        assert eye.progress.over[-1] == (key, "failed")
    assert eye.watch.first_failures.reason == "its result is that of step 1"
    assert eye.grid.kept_back == ["x", "y"]
    assert eye.progress.news == ["the first trials all failed alike: the other 2 are not started"]


def test_rows_of_earlier_runs_let_the_rest_start_whatever_fails(
    make_eye: Callable[..., Eye],
) -> None:
    eye = make_eye(measured=True)
    for key in eye.keys[:4]:
        eye.start(key)
        _attempt(eye, key, "ended without a result", "")
        eye.fail(key, ProtocolError("ended without a result"))
    assert eye.watch.first_failures.reason is None
    assert (eye.grid.kept_back, eye.progress.news) == ([], [])


@pytest.mark.parametrize("rows", [0, 1])
def test_a_run_knows_whether_earlier_ones_gave_rows(
    rows: int, tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of `train` but Ray, in whose place three trials fail alike."""
    project = create_project(tmp_path / "project")
    for trial in plan.trials[:rows]:
        *_, measured = Simulated().train(trial, Scratch(tmp_path))
        assert project.ledger.write(trial, measured)

    def tune(grid: Any, watch: Watch, directory: Path) -> None:
        for trial in plan.trials[rows : rows + 3]:
            watch.first_failures.failed(trial.key, "ended without a result")

    monkeypatch.setattr(sweep, "connected", lambda address: nullcontext())
    monkeypatch.setattr(sweep, "_machines", lambda *_, **__: uniform(cpus=1))
    monkeypatch.setattr(sweep, "_shared", lambda project, lease: nullcontext("nonce"))
    monkeypatch.setattr(sweep, "_tune", tune)
    lease = SimpleNamespace(lost=threading.Event(), generation=1, note=lambda *_, **__: None)
    end = sweep.train(project, plan, lease, MagicMock(), lambda name: None)
    assert end.common_reason == (None if rows else "ended without a result")


def test_a_sweep_for_gpus_says_that_there_are_none(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of `train` but Ray, on one core."""
    cluster = plan.spec.cluster.model_copy(update={"gpu": "H100"})
    planned = replace(plan, spec=plan.spec.model_copy(update={"cluster": cluster}))
    monkeypatch.setattr(sweep, "connected", lambda address: nullcontext())
    monkeypatch.setattr(sweep, "_machines", lambda *_, **__: uniform(cpus=1))
    monkeypatch.setattr(sweep, "_shared", lambda project, lease: nullcontext("nonce"))
    monkeypatch.setattr(sweep, "_tune", lambda *_: None)
    lease = SimpleNamespace(lost=threading.Event(), generation=1, note=lambda *_, **__: None)
    progress = MagicMock()
    project = create_project(tmp_path / "project")
    sweep.train(project, planned, lease, progress, lambda name: None)
    lines = [call.args[0] for call in progress.say.call_args_list]
    assert "the sweep file is for H100 GPUs and none is here: trials train on cores" in lines


def test_what_a_program_says_last_tells_causes_apart(eye: Eye) -> None:
    eye.grid.retries = 0
    for key, module in zip(eye.keys, ("a", "b", "c", "d"), strict=False):
        eye.start(key)
        _attempt(eye, key, "exited with 1", f"step 1\nNo module named {module!r}")
        eye.fail(key, RuntimeError("as Tune has it"))
    assert eye.watch.first_failures.reason is None


def test_trials_that_were_asked_to_end_are_said_to_be(eye: Eye) -> None:
    eye.start(*eye.keys[:2])
    eye.watch._stop.interrupted = True
    eye.watch.look()
    assert eye.progress.news == [
        "stopping: 2 trials are asked to write a checkpoint and end; Ctrl-C again ends it now"
    ]


def test_an_end_that_cannot_be_recorded_now_is_recorded_later(
    eye: Eye, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = eye.keys[0]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    eye.start(key)
    with monkeypatch.context() as patch:
        patch.setattr(Attempts, "lost", full)
        eye.fail(key, RuntimeError("boom"))
    assert "No space left" in eye.progress.troubles[0]
    assert eye.watch._attempts.all() == []
    eye.wait(2.0)
    assert [a.kind for a in eye.watch._attempts.all()] == ["raised"]


FAULT = {"gpu": "3", "node": "here", "error": "CUDA error: uncorrectable ECC error encountered"}


def test_a_gpu_that_ended_a_trial_is_held_and_its_worker_is_no_trial_any_more(eye: Eye) -> None:
    key = eye.keys[0]
    eye.start(key)
    eye.report(key, gpu_fault=FAULT)
    assert eye.grid.told[-1] == ("hold", key, "GPU 3 of here")
    (news,) = eye.progress.news
    assert news.startswith("GPU 3 of here is not used until ")
    assert FAULT["error"] in news
    eye.wait(300.0)  # in silence
    assert (eye.killed, eye.grid.told[-1][0]) == ([], "hold")
    assert [gpu["gpu"] for gpu in eye.notes[-1]["held_gpus"]] == ["3"]
    eye.watch.on_trial_complete(0, [], eye._trial(key))
    eye.wait(2.0)
    assert "held_gpus" not in eye.notes[-1]
    assert eye.watch.gpus.summary() == [
        f"GPU 3 of here ended 1 trial: have it checked ({FAULT['error']})"
    ]


def test_a_gpu_that_is_not_to_be_held_is_an_end_like_any_other(eye: Eye) -> None:
    key = eye.keys[0]
    eye.grid.retries = 0
    eye.start(key)
    eye.report(key, gpu_fault=FAULT)
    assert eye.killed == [key]
    eye.fail(key, RuntimeError("killed"))
    assert eye.grid.told[-1] == ("failed", key, "raised")
    (attempt,) = eye.watch._attempts.all()
    assert attempt.error == f"{FAULT['error']} (GPU 3 of here)"


def test_gpus_are_free_again_once_a_trial_that_many_ended_is_given_up(eye: Eye) -> None:
    key = eye.keys[0]
    for gpu in "345":
        eye.start(key)
        eye.report(key, gpu_fault={**FAULT, "gpu": gpu})
    assert (eye.killed, len(eye.progress.news)) == ([], 3)
    eye.grid.retries = 0
    eye.start(key)
    eye.report(key, gpu_fault={**FAULT, "gpu": "6"})
    eye.fail_as("another attempt", key, RuntimeError("killed"))
    assert eye.killed == [key] * 4


def test_a_sweep_ends_once_nothing_is_left_but_gpus_that_are_held(eye: Eye) -> None:
    assert not eye.watch.over()
    eye.grid.only_holds = True
    assert eye.watch.over()
