"""One trial in a Ray worker: trained, measured, in the ledger, and only then told to the driver.

Whatever stops it, the project's storage says what happened: a row, an attempt with its reason, or
an attempt that the next one of the trial finds open and explains.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from analysis.errors import InputError
from cluster.gang import GangError, train_in_gang
from cluster.machines import UnfitNodeError
from cluster.pace import shared_device
from cluster.rank import Sign
from orchestrator import lease, logs
from orchestrator.advance import Advance
from orchestrator.attempts import Attempts, Kind
from orchestrator.bad_gpus import HOLD_SECONDS, GpuFault, fault_of, own_gpus
from orchestrator.checkpoints import StoredWorkspace, directory_of
from orchestrator.connection import nodes
from orchestrator.gpu_checks import require_gpu, use_of
from orchestrator.ledger import Ledger
from orchestrator.order import Order
from orchestrator.proof import fingerprint, witness
from orchestrator.scratch import scratch
from orchestrator.storage import (
    LONGEST_WAIT,
    Outside,
    Result,
    Storage,
    open_storage,
    patiently,
    reason_of,
)
from orchestrator.watchdog import Watchdog
from trainers.registry import trainer
from trainers.template import GRANTED
from trainers.told import CommandError
from trainers.trial import Event, Measurement, Progress, Step, Trial

LOOK_SECONDS, FAR_LOOK_SECONDS = 1.0, 10.0
"""Between looks at the driver's lease, in a directory and in an object store."""
UNFIT_SECONDS = 60.0
"""That a node may take to see the project."""

Report = Callable[[dict[str, Any]], None]


class Interrupted(Exception):
    """The sweep wants no more of this trial for now."""


def observe(config: dict[str, Any]) -> None:
    """Tune's function: train the trial of `config["order"]`, unless the ledger has it."""
    from ray import tune

    order = Order.load(config["order"])
    _know_gpus(order)
    Work(order, lambda told: tune.report(_at() | told)).do()


class Work:
    """One order being carried out."""

    def __init__(self, order: Order, report: Report) -> None:
        self.order, self.trial, self.report = order, order.trial, report
        self.storage = _storage(order.project)
        self.ledger, self.attempts = Ledger(self.storage), Attempts(self.storage)
        self.row: Mapping[str, Any] | None = None
        """The row of the last horizon in the ledger, or the measurement that became it."""
        self.found = False
        """Whether that row was in the ledger before this attempt."""
        self.whole = False
        """Whether this attempt trained the trial from its beginning to its end."""
        self.fault: GpuFault | None = None
        """The GPU that ended this attempt, if one did."""
        self.will = DriversWill(self.storage, order.generation)

    def do(self) -> None:
        """Have the row in the ledger, and report it last of all."""
        try:
            self._require_fit()
            left = [tokens for tokens in self.trial.measured_at if not self._known(tokens)]
            if left and self.will.stop():
                raise Interrupted("the sweep was interrupted before this trial began")
            if left:
                self._attempt(self.trial.only(left))
        except Interrupted:
            self.report({"status": "interrupted"})
            return
        except Exception as error:
            # Before the attempt, too, a GPU may show what it is.
            fault = self.fault or fault_of(error, None, gpus=own_gpus, node=socket.gethostname())
            if fault is not None:
                self._hold(fault)
                return
            self.report({})  # where it was, which it may not have told yet
            raise
        finally:
            _tidy()
        assert self.row is not None, (
            f"{self.trial.trainer} ended without measuring {self.trial.key}"
        )
        self.report(self._told(self.row) | {"whole": self.whole})

    def _hold(self, fault: GpuFault) -> None:
        """Tell the driver which GPU failed, and keep it from other trials for a while.

        The driver ends this process earlier if it does not want that, or once nothing is left.
        """
        self.report({"gpu_fault": vars(fault)})
        until = time.monotonic() + HOLD_SECONDS
        while time.monotonic() < until and not self.will.stop():
            time.sleep(LOOK_SECONDS)

    def _known(self, tokens: int) -> bool:
        """Whether the ledger has the row of a horizon, which is then told of unless it is last."""
        row = self._find(tokens)
        if row is not None:
            self._measured(row, found=True)
        return row is not None

    def _find(self, tokens: int) -> dict[str, Any] | None:
        name = self.trial.key, tokens
        return self._patiently("read the ledger", lambda: self.ledger.find(name))

    def _measured(self, row: Mapping[str, Any], *, found: bool = False) -> None:
        self.row, self.found = row, found
        if row["tokens"] != self.trial.tokens:
            self.report({"horizon": row["tokens"]} | self._told(row))

    def _told(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the driver is told of a row: it may read the rest in the ledger."""
        told = {name: row[name] for name in ("status", "loss", "seconds")}
        return told | {"found": self.found}

    def _require_fit(self) -> None:
        """See that this node can work on the sweep.

        One that cannot is left out for a while: in the meantime a person may mend or drain it.

        Raises
        ------
        UnfitNodeError
            If it still cannot after a while.
        """
        until = time.monotonic() + UNFIT_SECONDS
        while True:
            try:
                if fingerprint() != self.order.sources:
                    raise InputError(f"{socket.gethostname()} has another isoflop than the driver")
                _witnessed(self.order)
                self._require_gpu()
                return
            except (InputError, OSError) as error:
                why = error if isinstance(error, InputError) else reason_of(error)
                message = f"{socket.gethostname()} cannot work on the sweep: {why}"
                if self.will.stop():
                    raise Interrupted(message) from error
                if time.monotonic() > until:
                    raise UnfitNodeError(message) from error
                self._tell(message)
                time.sleep(min(LONGEST_WAIT, UNFIT_SECONDS / 4))

    def _require_gpu(self) -> None:
        """See that the GPU works that this process was given; a gang's ranks see to theirs."""
        if self.order.ranks == 1:
            _require_gpu(self.order)

    def _attempt(self, trial: Trial) -> None:
        """One attempt at what is left of the trial, from its record to its rows."""
        with scratch() as directory:
            self._attempt_in(directory, trial)

    def _attempt_in(self, directory: Path, trial: Trial) -> None:
        order = self.order
        host, pid = socket.gethostname(), os.getpid()
        attempt = self._patiently(
            "record an attempt",
            lambda: self.attempts.begin(self.trial, driver=order.generation, node=host, pid=pid),
        )
        log = self.log = directory / "log.txt"
        self.step = 0
        self.workspace = _workspace(order, directory, self.storage, self.will.stop)

        def fail(kind: Kind, error: str, where: str | None = None) -> None:
            try:
                self.attempts.fail(
                    attempt,
                    kind=kind,
                    error=error,
                    traceback=where,
                    log=logs.tail(log),
                    resumed_from=self.workspace.resumed_from,
                    step=self.step,
                )
            except OSError as trouble:  # it stays open: the trial's next attempt explains it
                self._tell(f"cannot record how an attempt ended: {reason_of(trouble)}")

        watchdog = Watchdog(order.silent_seconds, lambda error, at: fail("silent", error, at))
        try:
            # What the storage takes is no silence of the trial's.
            self.workspace.paused = self.will.paused = watchdog.paused
            self.workspace.tell = self._say
            with _printing_to(log), watchdog:
                self._train(trial, watchdog)
            self._patiently("remove the attempt", lambda: self.attempts.succeed(attempt))
            if order.checkpoints.removes(self.trial):
                with suppress(OSError):  # the driver tries again at the sweep's end
                    self.storage.remove_all(directory_of(self.trial.key))
        except Interrupted as error:
            fail("interrupted", str(error))
            raise
        except UnfitNodeError as error:  # of a rank's node
            fail("node lost", str(error))
            raise
        except Exception as error:
            lost = isinstance(error, GangError) and error.lost
            plain = lost or isinstance(error, InputError | CommandError)  # sentences for people
            text = str(error) if plain else f"{type(error).__name__}: {error}"
            self.fault = fault_of(error, logs.tail(log), gpus=own_gpus, node=host)
            if self.fault is not None:
                text += f" (GPU {self.fault.gpu})"
            fail("worker lost" if lost else "raised", text, traceback.format_exc())
            raise

    def _train(self, trial: Trial, watchdog: Watchdog) -> None:
        """Run the trainer to its measurements, and write them down."""
        # A trainer's `train` is a generator: closing it ends what it started.
        events = cast(Generator[Event | Sign, None, None], self._events(trial))
        try:
            with closing(events):
                self._follow(trial, events, watchdog)
        except OSError as error:
            if self.will.known:  # it waited for the storage and was not to wait any longer
                raise Interrupted(str(error)) from error
            raise

    def _follow(self, trial: Trial, events: Iterable[Event | Sign], watchdog: Watchdog) -> None:
        loss, reported = None, time.monotonic()
        advance = Advance(self.trial, trial)
        for event in events:
            watchdog.heard()
            advance.heard(event)
            if isinstance(event, Measurement):
                event = self._on_its_share(event)
                self.whole = event.resumed_from == 0 and trial == self.trial
                with watchdog.paused():
                    write = partial(self.ledger.write, self.trial, event)
                    first = self._patiently("write the row", write)
                    if first:
                        logs.keep(self.storage, (trial.key, event.tokens), logs.tail(self.log))
                    self._measured(vars(event) if first else self._find(event.tokens) or {})
                continue
            if isinstance(event, Progress):
                self.step, loss = max(self.step, event.step), event.train_loss
                continue
            if isinstance(event, Step):
                self.step = max(self.step, event.step)
            else:
                for trouble in event.troubles:
                    self._say(trouble)
            self._require_wanted()
            if time.monotonic() - reported > self.order.report_seconds:
                with watchdog.paused():
                    self.report({"fraction": advance.fraction, "train_loss": loss})
                reported = time.monotonic()

    def _on_its_share(self, measured: Measurement) -> Measurement:
        """The measurement, with the share of a GPU that it was measured on in its device's name."""
        if self.trial.trainer == "simulated" or not 0 < self.order.gpus < 1:
            return measured
        device = shared_device(self.order.gpus, measured.device, mps=self.order.mps)
        return replace(measured, device=device)

    def _events(self, trial: Trial) -> Iterator[Event | Sign]:
        if self.order.ranks > 1:
            make = partial(_rank_workspace, self.order)
            return train_in_gang(trial, make, stopping=self.will.stop)
        if trial.trainer == "pretrain" and 0 < self.order.gpus < 1:
            from trainers.gpu_share import keep_to_share

            keep_to_share(self.order.gpus)
        return trainer(trial.trainer).train(trial, self.workspace)

    def _require_wanted(self) -> None:
        """Stop if it is time to. A trainer in this process has just been told, and has saved."""
        if self.will.stop() if self.order.ranks > 1 else self.will.known:
            raise Interrupted("the sweep was interrupted")

    def _patiently(self, what: str, action: Callable[[], Result]) -> Result:
        """Do something with the storage, however long that fails: what is measured is precious."""
        try:
            return patiently(
                action,
                tell=lambda error: self._tell(f"cannot {what}: {reason_of(error)}"),
                unless=self.will.stop,
            )
        except Outside:
            raise
        except OSError as error:
            raise Interrupted(f"cannot {what}: {error}") from error

    def _say(self, trouble: str) -> None:
        """Have a person know of something that does not stop the trial."""
        self.report({"trouble": trouble})

    def _tell(self, trouble: str) -> None:
        """Have a person know what does not work now and is tried again."""
        self._say(f"{trouble}; trying again")


class DriversWill:
    """Whether the driver still wants this worker's trial, by its lease, looked at now and then.

    It does not once it was interrupted, or once another driver has taken the project over: this
    process is an orphan then.
    """

    def __init__(self, storage: Storage, generation: int) -> None:
        self._storage, self._generation = storage, generation
        self._every = FAR_LOOK_SECONDS if storage.local is None else LOOK_SECONDS
        self._looked = -self._every
        self.known = False
        """Whether it is known that the trial should stop."""
        self.paused: Callable[[], AbstractContextManager[None]] = nullcontext
        """Within which the storage may take its time."""

    def stop(self) -> bool:
        """Whether the trial should stop. Cheap: mostly it only reads the clock."""
        if not self.known and time.monotonic() - self._looked >= self._every:
            self._looked = time.monotonic()
            try:
                with self.paused():
                    latest = lease.latest(self._storage)
            except OSError:
                return False
            if latest is None:  # nor is the driver's: the project is away, and says nothing
                return False
            self.known = (
                latest.released
                or latest.generation != self._generation
                or bool(latest.note.get("stopping"))
            )
        return self.known


def _workspace(
    order: Order, directory: Path, storage: Storage, stop: Callable[[], bool]
) -> StoredWorkspace:
    return StoredWorkspace(
        directory=directory,
        storage=storage,
        key=order.trial.key,
        settings=order.checkpoints,
        stop=stop,
    )


def _rank_workspace(order: Order, tell: Callable[[str], None]) -> StoredWorkspace:
    """The workspace in a rank's process. The leader hears of an interrupt and passes it on.

    While it waits for the storage, the rank's signs of life keep the leader's watchdog quiet.

    Raises
    ------
    UnfitNodeError
        If its GPU does not work.
    """
    if order.gpus:
        _know_gpus(order)
        try:
            _require_gpu(order)
        except InputError as error:
            message = f"{socket.gethostname()} cannot work on the sweep: {error}"
            raise UnfitNodeError(message) from error
    directory = _LIFELONG.enter_context(scratch())
    made = _workspace(order, directory, _witnessed(order), lambda: False)
    made.tell = tell
    return made


_LIFELONG = ExitStack()
"""Of a rank's process, which is killed in the end: the next trial on its node tidies up."""


def _know_gpus(order: Order) -> None:
    """Tell trainers in this process, before any of them imports torch, which GPUs are theirs.

    A process is used again only by trials that are given the same.
    """
    each = order.gpus / order.ranks
    os.environ[GRANTED] = f"{each:g}"
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(_compile_threads(each)))


def _compile_threads(gpus: float) -> int:
    """Return how many processes may compile kernels for this one, which holds so many GPUs.

    By default torch starts 32 for each process that compiles.
    """
    if gpus < 1:
        return 1
    import ray

    here = ray.get_runtime_context().get_node_id()
    resources = next(n["Resources"] for n in nodes() if n["NodeID"] == here)
    return max(1, int(resources.get("CPU", 1) / max(1, resources.get("GPU", 1))))


def _require_gpu(order: Order) -> None:
    """See that this process's GPU works.

    Raises
    ------
    InputError
        If it does not work.
    """
    use = use_of(order.trial.trainer)
    if not order.gpus or use is None:
        return
    if order.trial.deterministic:
        from trainers.device import require_reproducible_products

        require_reproducible_products()
    require_gpu(use)


@cache
def _storage(project: str) -> Storage:
    """The project's storage: connected once, since each trial runs in a thread of its own."""
    return open_storage(project)


def _witnessed(order: Order) -> Storage:
    """The project's storage, once this process has seen the driver's nonce in it."""
    _witness(order.project, order.nonce, order.generation)
    return _storage(order.project)


@cache
def _witness(project: str, nonce: str, generation: int) -> None:
    witness(_storage(project), nonce, generation)


@cache
def _at() -> dict[str, str]:
    """On which node and in which placement group this is, in Ray's words."""
    import ray

    context = ray.get_runtime_context()
    return {"node": context.get_node_id(), "group": str(context.get_placement_group_id())}


@contextmanager
def _printing_to(path: Path) -> Iterator[None]:
    """Send what the trainer prints to a file."""
    with path.open("w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        yield


def _tidy() -> None:
    """Leave the process as the next trial should find it."""
    gc.collect()
    _freeze()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@cache
def _freeze() -> None:
    """Have the collector pass over what the process has imported: 100 of 110 ms a collection."""
    gc.freeze()
