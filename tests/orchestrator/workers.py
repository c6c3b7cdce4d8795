"""A bench for workers: a project with a driver, and a trainer that does what a test wants."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import worker
from orchestrator.attempts import Attempts
from orchestrator.lease import Lease, current, hold
from orchestrator.ledger import Ledger
from orchestrator.order import Order
from orchestrator.planner import make_plan
from orchestrator.proof import nonce_name
from orchestrator.spec import parse_spec
from orchestrator.spec_running import Checkpoints
from orchestrator.storage import Storage
from orchestrator.worker import Work
from tests.waiting import wait
from trainers.registry import trainer
from trainers.trial import Event, Measurement, Progress, Step, Trial
from trainers.workspace import Scratch, Workspace, resume

STEPS = 6
NONCE = "a nonce"


def simulated(**settings: float) -> Trial:
    """A trial of the simulation."""
    spec = {"name": "x", "trainer": "simulated", "budgets": [1e10], "sizes": 3}
    return make_plan(parse_spec({**spec, "simulated": settings}, source=Path("x.toml"))).trials[0]


def measurement(trial: Trial, **changes: Any) -> Measurement:
    """What the simulation measures, changed."""
    *_, measured = trainer("simulated").train(trial, Scratch(Path("nowhere")))
    return replace(measured, **changes)


@dataclass
class Tiny:
    """A trainer of a few steps, with something to do for the test after one of them."""

    at: dict[int, Callable[[], object]] = field(default_factory=dict)
    measures: bool = True
    trained: list[int] = field(default_factory=list)
    closed: int = 0

    def train(self, trial: Trial, workspace: Workspace) -> Iterator[Event]:
        first = resume(workspace, lambda path: int(path.read_text())) or 0
        try:
            for step in range(first + 1, STEPS + 1):
                self.trained.append(step)
                print(f"step {step}")
                yield Progress(step=step, tokens=step, flops=float(step), train_loss=10.0 - step)
                self.at.get(step, lambda: None)()
                if workspace.due(step):
                    workspace.save(step, lambda path, step=step: path.write_text(str(step)))
                yield Step(step)
            if self.measures:
                yield measurement(trial, loss=2.5, resumed_from=first)
        finally:
            self.closed += 1


@dataclass
class Bench:
    """A project with a driver, and workers on its trial."""

    storage: Storage
    scratch: Path
    trial: Trial
    lease: Lease
    told: list[dict[str, Any]] = field(default_factory=list)
    tiny: Tiny = field(default_factory=Tiny)

    def order(self, **changes: Any) -> Order:
        self.storage.replace(nonce_name(self.lease.generation), NONCE.encode())
        made = Order(
            trial=self.trial,
            project=self.storage.uri,
            generation=self.lease.generation,
            nonce=NONCE,
            ranks=1,
            report_seconds=1e9,
            silent_seconds=60.0,
            checkpoints=Checkpoints(every_seconds="never"),
        )
        return replace(made, **changes)

    def run(self, tiny: Tiny, **changes: Any) -> None:
        self.tiny = tiny
        Work(self.order(**changes), self.told.append).do()

    @property
    def row(self) -> dict[str, Any] | None:
        return Ledger(self.storage).find((self.trial.key, self.trial.tokens))

    @property
    def attempts(self) -> Attempts:
        return Attempts(self.storage)

    def interrupt(self) -> None:
        """As the driver does it, and wait until it is on record."""
        self.lease.note({"stopping": True}, at_once=True)
        wait(lambda: current(self.storage).note.get("stopping"))


@contextmanager
def bench_at(storage: Storage, scratch: Path, patch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A bench on a storage, whose workers look and try again all the time."""
    storage.make()
    for name in ("LOOK_SECONDS", "FAR_LOOK_SECONDS"):
        patch.setattr(worker, name, 0.0)
    patch.setattr(worker, "LONGEST_WAIT", 0.1)
    patch.setattr(tempfile, "tempdir", str(scratch))
    with hold(storage, "a sweep") as lease:
        made = Bench(storage, scratch, simulated(), lease)
        patch.setattr(worker, "trainer", lambda name: made.tiny)
        yield made
