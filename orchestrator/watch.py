"""The driver's eye on a sweep: passes Tune's events on, ends what hangs, tells what is running."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import ray
from ray import cloudpickle
from ray.exceptions import RayActorError, RayTaskError
from ray.tune import Callback, Stopper

from analysis.errors import InputError, first_line, last_line
from analysis.observations import ObservationId
from cluster.machines import UnfitNodeError
from orchestrator.attempts import Attempt, Attempts, Kind
from orchestrator.bad_gpus import HOLD_SECONDS, GpuFault, GpuRecord
from orchestrator.checkpoints import directory_of
from orchestrator.first_failures import FirstFailures, gist
from orchestrator.grid import Grid
from orchestrator.lease import current
from orchestrator.nodes import LEFT_OUT
from orchestrator.options import INTERRUPTED
from orchestrator.progress import Progress, log_lines
from orchestrator.project import Project
from orchestrator.spec_running import Limits
from orchestrator.stop import Stop
from orchestrator.storage import reason_of
from trainers.told import ProtocolError
from trainers.trial import Trial

LOOK_SECONDS = 1.0
"""Between looks for what hangs."""
GRACE = 1.5
GRACE_SECONDS = 15.0
"""A worker ends itself, with its stack on record, when it has been silent for the time allowed;
after so many times that and so many seconds more it is killed from here."""
CALL_SECONDS = 120.0
"""That one call of an object store may take, of which the worker's own watchdog knows."""
LEAST_SLOW_SECONDS = 60.0
"""A trial that has run for less is never called slow."""
STOP_SECONDS = 120.0
"""After an interrupt, for trials to end; what takes longer is ended."""
IDLE_SECONDS = 30.0
"""Without any trial that runs, from which on a person is told what is waited for."""
STALL_SECONDS = 10.0
"""Between two of Tune's steps, from which on this process was stopped or held up itself."""
TIMED = 3
"""Trials that must have ended before one is called slow."""
WORKER_DIED = "the worker process died"
CREATION = "creation task"
NODE_DIED = "died because its node"
"""What Ray says in an error of an actor whose node it lost."""


@dataclass
class _Run:
    """A trial that has an actor."""

    actor: Any
    since: float
    heard: float
    fraction: float = 0.0
    loss: float | None = None
    measured: bool = False
    """Whether its row is in the ledger."""
    doomed: tuple[Kind, str] | None = None
    """Why it was killed from here."""


@dataclass(frozen=True)
class _Loss:
    """The end of an attempt, as the driver knows it."""

    key: str
    kind: Kind
    error: str
    detail: str
    after: int
    """The number of the attempt before it."""


class Over(Stopper):
    """Tells Tune when to end what never got an actor, or does not stop."""

    def __init__(self, watch: Watch) -> None:
        self._watch: Watch | None = watch

    def __getstate__(self) -> dict[str, Any]:
        return {"_watch": None}  # Tune pickles it, and uses the original

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Trials end by themselves."""
        return False

    def stop_all(self) -> bool:
        """Whether it is over."""
        return self._watch is not None and self._watch.over()


def quit_now(before: Callable[[], None]) -> None:
    """End this process, and the Ray that it may have started, `before` which one thing is done."""
    os.write(2, b"\x1b[?25h\n")  # the cursor, which the live view hides
    before()
    # Left alone, Ray's agents look for their head for another minute. What has a session of its own
    # is the writer of MLflow, which ends by itself.
    with suppress(psutil.Error, OSError):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error, OSError):
                if os.getsid(child.pid) == os.getsid(0):
                    child.kill()
    os._exit(INTERRUPTED)


class Watch(Callback):
    """Tune's callbacks, all in the driver's main thread."""

    def __init__(
        self,
        *,
        project: Project,
        trials: Mapping[str, Trial],
        stop: Stop,
        grid: Grid,
        progress: Progress,
        begun: Callable[[], None],
        finished: Callable[[ObservationId], None],
        limits: Limits,
        measured: bool = False,
    ) -> None:
        """Watch `trials`; `measured` is whether earlier runs have given rows of their sweep."""
        self._stop = stop
        self._trials = trials
        self._storage = project.storage
        self._grace = GRACE_SECONDS + (CALL_SECONDS if project.local is None else 0.0)
        self._attempts = Attempts(project.storage)
        self._lease = stop.lease
        self._grid = grid
        self._progress = progress
        self._begun, self._finished = begun, finished
        self._limits = limits
        self.first_failures = FirstFailures(grid.hold_back, grid.queue.let_go)
        """Whether the rest of the sweep is held back."""
        if measured:
            self.first_failures.measured()
        self._shown: dict[
            str, set[str]
        ] = {}  # trials whose failure was shown, by the gist of its cause
        self.gpus = GpuRecord()
        """GPUs that ended trials, and those that are held."""
        self._holders: dict[str, list[Any]] = {}  # workers that keep a GPU, by the trial it ended
        self._runs: dict[str, _Run] = {}
        self._paces: list[float] = []
        self._moved: set[str] = set()
        self._stepped = self._looked = self._busy = time.monotonic()
        self._told = False
        self._unwritten: list[_Loss] = []
        self._rows: set[ObservationId] = set()
        self._last: dict[str, int] = {}
        for attempt in self._attempts.all():
            self._last[attempt.trial] = max(attempt.number, self._last.get(attempt.trial, 0))

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks; consoles and threads cannot be

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial got its actor."""
        key, now = trial.config["key"], time.monotonic()
        actor = trial.temporary_state.ray_actor
        self._runs[key] = _Run(actor, now, now)
        self._grid.started(key, _name(actor))
        self._progress.running(key)
        self._begun()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial reported that it lives, how far it is, what is wrong or how it ended."""
        key = trial.config["key"]
        run, now = self._runs[key], time.monotonic()
        if "trouble" in result:  # what the storage takes does not make a trial slow
            run.since += now - run.heard
        run.heard = now
        if "node" in result:
            self._grid.seen(key, _name(run.actor), result["node"], result["group"])
        if "gpu_fault" in result:
            self._faulted(key, run, GpuFault(**result["gpu_fault"]))
        elif "trouble" in result:
            self._progress.trouble(result["trouble"])
        elif "horizon" in result:
            self._measured((key, result["horizon"]), result)
        elif "fraction" in result:
            run.fraction, run.loss = result["fraction"], result["train_loss"]
            self._progress.running(key, run.fraction, run.loss)
        elif result.get("status") == "interrupted":
            self._progress.waiting(key)
            if not self._stop.wanted:
                self._ask_for_the_lease()
        elif "status" in result:
            run.measured = True
            self._grid.measured(key)
            # Of what was found, resumed or cut short the time says nothing.
            if result["whole"] and result["status"] == "complete":
                self._paces.append((run.heard - run.since) / max(self._expected(key), 1e-9))
            self._measured((key, self._trials[key].tokens), result)

    def _faulted(self, key: str, run: _Run, fault: GpuFault) -> None:
        """A GPU ended a trial, whose worker waits with it: have it wait on, or end it."""
        self.gpus.failed(fault)
        name = None if self._stop.wanted else self._grid.hold_gpu(key, str(fault), HOLD_SECONDS)
        if name is None:
            run.doomed = "raised", f"{fault.error} ({fault})"
            ray.kill(run.actor)
            return
        del self._runs[key]
        self._holders.setdefault(key, []).append(run.actor)
        self._progress.say(f"{self.gpus.hold(name, fault)}: its trial starts again on another")
        self._progress.waiting(key)

    def _measured(self, name: ObservationId, result: dict[str, Any]) -> None:
        """A row is in the ledger; one that an attempt found there may have been told of before."""
        if not result["found"]:
            self._grid.row(name[0])
            self.first_failures.measured()
        if name in self._rows:
            return
        self._rows.add(name)
        self._progress.measured(name, result["status"], result["loss"], result["seconds"])
        self._finished(name)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's function has returned."""
        if self.gpus.holds(trial.trial_id):  # its key may run again by now
            self.gpus.let_go(trial.trial_id)
            return
        self._runs.pop(trial.config["key"], None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial raised, or its actor is gone."""
        if self.gpus.holds(trial.trial_id):
            self.gpus.let_go(trial.trial_id)
            return
        key = trial.config["key"]
        run = self._runs.pop(key, None)
        if run is not None and run.measured:  # it died of nothing that matters any more
            return
        error = _error_of(trial)
        kind, text = _diagnosis(error) if run is None or run.doomed is None else run.doomed
        loss = _Loss(key, kind, text, str(error), self._last.get(key, 0))
        known = self._write(loss)
        kind = (known and known.kind) or kind
        if isinstance(error, UnfitNodeError):
            self._progress.trouble(f"{text}: {LEFT_OUT}")
            self._grid.unfit(key)
            self._progress.waiting(key)
            return
        mistaken = isinstance(error, ProtocolError)
        hopeless = isinstance(error, InputError) and not isinstance(error, OSError)
        again = self._grid.failed(
            key, kind, step=self._checkpoint(key), hopeless=hopeless, mistaken=mistaken
        )
        if kind in ("raised", "silent"):
            reason, log = (known and known.error) or text, (known and known.log) or ""
            # Of a crash the last line says more than its status.
            cause = reason if mistaken or not log else f"{reason}: {last_line(log)}"
            self._show(key, reason, cause, log, again=again)
            if not again and not self._stop.wanted:
                self._judge(key, cause)
        if again:
            self._progress.waiting(key)
        else:
            self._progress.failed(key)
            holders = self._holders.pop(key, [])
            for actor in holders if len(holders) > 1 else ():  # it fails on any GPU
                ray.kill(actor)

    def _show(self, key: str, reason: str, cause: str, log: str, *, again: bool) -> None:
        """Tell a person of a trial's first failure, with the log of the first of its cause."""
        if any(key in keys for keys in self._shown.values()):
            return
        first = gist(cause) not in self._shown
        self._shown.setdefault(gist(cause), set()).add(key)
        self._progress.attempt_failed(
            key, reason if first else None, log_lines(log) if first else (), again=again
        )

    def _judge(self, key: str, cause: str) -> None:
        """See whether what ended the first trials would end the others, too."""
        before = self.first_failures.reason
        self.first_failures.failed(key, cause)
        n = len(self._grid.queue.kept_back)
        if before is None and self.first_failures.reason is not None and n:
            self._progress.say(
                f"the first trials all failed alike: the other {n} are not started", style="red"
            )

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune has done something, or waited a tenth of a second."""
        self.look()

    def look(self) -> None:
        """See that what runs gets on, and that a person and the lease know of it. Often cheap."""
        now = time.monotonic()
        if now - self._stepped > STALL_SECONDS:  # this process stood still, not its workers
            for run in self._runs.values():
                run.heard += now - self._stepped
                run.since += now - self._stepped
        self._stepped = now
        if self._stop.wanted and not self._told:
            self._tell()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        self._busy = now if self._runs else self._busy
        if now - self._busy > IDLE_SECONDS and not self._stop.wanted:
            self._progress.trouble(f"no trial has a worker: {self._grid.lacks}; waiting")
        for key, run in self._runs.items():
            doom = self._doom(key, run, now)
            if doom is not None and run.doomed is None:
                run.doomed = doom
                ray.kill(run.actor)
        self._lease.note(self._note())
        self.record()

    def over(self) -> bool:
        """Whether Tune should end what it still has: all that could stop by itself has stopped.

        Or all that is left are workers that keep a GPU from trials which do not come any more.
        """
        return self._grid.only_holds or (
            self._stop.wanted and (not self._runs or self._stop.seconds > STOP_SECONDS)
        )

    def record(self) -> None:
        """Explain what could not be explained before, if that is possible now."""
        waiting, self._unwritten = self._unwritten, []
        for loss in waiting:
            self._write(loss)

    def _tell(self) -> None:
        """Have every trial write a checkpoint and stop."""
        self._told = True
        self._lease.note(self._note(), at_once=True)
        n = len(self._runs)
        noun = "trial is" if n == 1 else "trials are"
        what = f"{n} {noun} asked to {_how_to_end(self._trials)}" if n else "no trial is running"
        self._progress.say(f"stopping: {what}; Ctrl-C again ends it now")

    def _write(self, loss: _Loss) -> Attempt | None:
        """Put the end of an attempt on record; None where that cannot be done now."""
        try:
            known = self._attempts.lost(
                self._trials[loss.key],
                driver=self._lease.generation,
                kind=loss.kind,
                error=loss.error,
                detail=loss.detail,
                after=loss.after,
            )
        except (OSError, InputError) as trouble:
            said = reason_of(trouble) if isinstance(trouble, OSError) else str(trouble)
            self._progress.trouble(f"cannot record how an attempt ended: {said}; trying again")
            self._unwritten.append(loss)
            return None
        self._last[loss.key] = max(known.number, self._last.get(loss.key, 0))
        return known

    def _checkpoint(self, key: str) -> int:
        """The step of a trial's newest checkpoint; 0 where there is none, or none can be seen."""
        try:
            names = self._storage.names(directory_of(key))
        except OSError:
            return 0
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def _note(self) -> dict[str, Any]:
        """What the lease says of this driver: its workers and `isoflop status` read it."""
        runs = {
            key: {"fraction": run.fraction, "loss": run.loss if _is_finite(run.loss) else None}
            for key, run in self._runs.items()
        }
        held = self.gpus.note()
        return {"stopping": self._stop.wanted, "running": runs} | (
            {"held_gpus": held} if held else {}
        )

    def _ask_for_the_lease(self) -> None:
        """Whether it is still ours, which a worker may find out some seconds before the next beat.

        Until then each trial would be started only to stop at once.
        """
        with suppress(OSError):
            latest = current(self._storage)
            if latest is None or latest.generation != self._lease.generation:
                self._lease.lost.set()

    def _doom(self, key: str, run: _Run, now: float) -> tuple[Kind, str] | None:
        """Why a trial should be killed, if it should."""
        silent, permitted = now - run.heard, self._limits.silent_seconds
        if permitted is not None and silent > GRACE * permitted + self._grace:
            return "silent", f"no sign of life for {silent:.0f} s, not even from its watchdog"
        factor, took = self._limits.slow_factor, now - run.since
        if run.measured or factor is None or len(self._paces) < TIMED:
            return None
        if key in self._moved or not self._grid.may_fail(key):
            return None
        expected = statistics.median(self._paces) * self._expected(key)
        if took > max(factor * expected, LEAST_SLOW_SECONDS):
            self._moved.add(key)
            return "slow", (
                f"took {took:.0f} s where {expected:.0f} s were expected (limits.slow_factor = "
                f"{factor:g}): it goes on from its newest checkpoint, in another process"
            )
        return None

    def _expected(self, key: str) -> float:
        return self._grid.queue.job(key).seconds


def _how_to_end(trials: Mapping[str, Trial]) -> str:
    """Return what the sweep's trials are asked to do on an interrupt, as a verb phrase."""
    command = any(trial.command is not None for trial in trials.values())
    return "end" if command else "write a checkpoint and end"


def _error_of(trial: Any) -> BaseException:
    """What ended a trial, as Tune keeps it in this machine's directory of the trial."""
    if trial.pickled_error_file and Path(trial.pickled_error_file).exists():
        with Path(trial.pickled_error_file).open("rb") as file:
            return cast(BaseException, cloudpickle.load(file))
    return RuntimeError(Path(trial.error_file).read_text())


def _diagnosis(error: Any) -> tuple[Kind, str]:
    """What an error of Tune's says of the end of a trial."""
    if isinstance(error, UnfitNodeError):
        return "node lost", str(error.cause if isinstance(error, RayTaskError) else error)
    if not isinstance(error, RayActorError):
        return "raised", first_line(error, named=True)
    if NODE_DIED in str(error):
        return "node lost", "its node is gone"
    if CREATION in str(error):
        return "worker lost", f"its worker could not start: {last_line(error)}"
    return "worker lost", WORKER_DIED


def _is_finite(loss: float | None) -> bool:
    return loss is not None and math.isfinite(loss)


def _name(actor: Any) -> str:
    return str(actor._actor_id.hex())
