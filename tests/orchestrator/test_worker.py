"""One trial in a worker: what is in the storage and what the driver hears, whatever happens.

The trainer and Tune's report are the test's own; lease, ledger, attempts and checkpoints are real.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.gang import GangError
from cluster.machines import UnfitNodeError
from cluster.rank import MakeWorkspace, Sign
from orchestrator import logs, worker
from orchestrator.lease import current, hold
from orchestrator.ledger import Ledger
from orchestrator.order import Order
from orchestrator.spec_running import Checkpoints
from orchestrator.storage import LocalStorage, Storage
from orchestrator.watchdog import EXIT_STATUS
from orchestrator.worker import Work
from tests.orchestrator.workers import STEPS, Bench, Tiny, bench_at, measurement, simulated
from trainers.corpus import Markov
from trainers.registry import trainer
from trainers.trial import Event, Step, Trial


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with bench_at(LocalStorage(tmp_path / "project"), tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def anywhere(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """In a directory, then in a bucket."""
    with bench_at(storage, tmp_path, monkeypatch) as made:
        yield made


def test_the_row_is_in_the_ledger_before_the_driver_hears_of_it(anywhere: Bench) -> None:
    during: list[tuple[Any, bool]] = []
    look = {3: lambda: during.append((anywhere.row, anywhere.attempts.all()[0].open))}
    anywhere.tiny = Tiny(at=look)
    heard: list[tuple[dict[str, Any], float, list[str]]] = []

    def report(told: dict[str, Any]) -> None:
        assert anywhere.row is not None
        heard.append((told, anywhere.row["loss"], anywhere.storage.names("attempts")))

    Work(anywhere.order(), report).do()
    assert during == [(None, True)]  # no row, but an attempt that says who is at it
    ((told, loss, attempts),) = heard
    assert (told["status"], told["loss"], loss) == ("complete", 2.5, 2.5)
    assert attempts == []
    assert list(anywhere.scratch.glob("isoflop-*")) == []


def test_a_measured_trial_keeps_the_end_of_its_log_and_where_it_began(anywhere: Bench) -> None:
    long = {2: lambda: print("x" * logs.TAIL)}
    anywhere.run(Tiny(at=long))
    name = logs.file_name((anywhere.trial.key, anywhere.trial.tokens))
    kept = anywhere.storage.read(name).decode()
    assert len(kept) == logs.TAIL
    assert kept.endswith("x\n" + "".join(f"step {step}\n" for step in range(3, STEPS + 1)))
    row = anywhere.row
    assert (row["resumed_from"], row["loss_step"]) == (0, anywhere.trial.hyperparameters.steps)


def test_a_row_whose_log_cannot_be_kept_stays(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = LocalStorage.create

    def full(self: Storage, name: str, data: bytes, **more: Any) -> bool:
        if name.startswith("logs/"):
            raise OSError(28, "No space left on device")
        return create(self, name, data, **more)

    monkeypatch.setattr(LocalStorage, "create", full)
    bench.run(Tiny())
    assert [told["status"] for told in bench.told] == ["complete"]
    assert bench.storage.names("logs") == []


def test_what_is_in_the_ledger_is_reported_and_not_trained(bench: Bench) -> None:
    measured = measurement(bench.trial, loss=3.5, status="diverged")
    Ledger(bench.storage).write(bench.trial, measured)
    tiny = Tiny()
    bench.run(tiny)
    assert tiny.trained == []
    assert [(t["status"], t["loss"]) for t in bench.told] == [("diverged", 3.5)]
    assert bench.attempts.all() == []


def test_a_running_trial_says_how_far_it_is(bench: Bench) -> None:
    steps = bench.trial.hyperparameters.steps
    bench.run(Tiny(), report_seconds=0.0)
    told = [(round(t["fraction"] * steps), t["train_loss"]) for t in bench.told[:-1]]
    assert sorted(set(told)) == [(step, 10.0 - step) for step in range(1, STEPS + 1)]


def test_reports_of_a_running_trial_are_rare(bench: Bench) -> None:
    """Each waits for the driver."""
    bench.run(Tiny(), report_seconds=1e9)
    assert [t["status"] for t in bench.told] == ["complete"]


def _raise(error: BaseException, *_: object) -> None:
    sys.stderr.write("last words\n")
    raise error


def test_a_trial_that_raises_leaves_its_reason(anywhere: Bench) -> None:
    tiny = Tiny(at={3: partial(_raise, ZeroDivisionError("no such rate"))})
    with pytest.raises(ZeroDivisionError):
        anywhere.run(tiny)
    (attempt,) = anywhere.attempts.all()
    assert (attempt.kind, attempt.step) == ("raised", 3)
    assert attempt.error == "ZeroDivisionError: no such rate"
    assert "in _raise" in attempt.traceback
    assert attempt.log == "step 1\nstep 2\nstep 3\nlast words\n"
    assert anywhere.row is None
    assert anywhere.told == [{}]  # where it was
    assert list(anywhere.scratch.glob("isoflop-*")) == []


def test_of_a_long_log_the_tail_is_kept(bench: Bench) -> None:
    def fail() -> None:
        print("x" * 100_000 + "the end", end="")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bench.run(Tiny(at={1: fail}))
    (attempt,) = bench.attempts.all()
    assert len(attempt.log) == logs.TAIL
    assert attempt.log.endswith("the end")


def test_an_interrupt_before_a_trial_starts_nothing(bench: Bench) -> None:
    bench.interrupt()
    tiny = Tiny()
    bench.run(tiny)
    assert bench.told == [{"status": "interrupted"}]
    assert tiny.trained == []
    assert bench.attempts.all() == []


def test_an_interrupt_writes_a_checkpoint_from_which_the_next_attempt_goes_on(
    anywhere: Bench,
) -> None:
    first, second = Tiny(at={4: anywhere.interrupt}), Tiny()
    anywhere.run(first)
    assert anywhere.told == [{"status": "interrupted"}]
    assert (first.trained, first.closed) == ([1, 2, 3, 4], 1)
    (attempt,) = anywhere.attempts.all()
    assert (attempt.kind, attempt.step) == ("interrupted", 4)
    anywhere.lease.note({"stopping": False})
    anywhere.lease.release()
    with hold(anywhere.storage, "a sweep") as anywhere.lease:
        anywhere.run(second)
    assert second.trained == [5, 6]
    assert anywhere.told[-1]["status"] == "complete"
    assert [a.kind for a in anywhere.attempts.all()] == ["interrupted"]


@pytest.mark.parametrize("end", ["released", "taken over"])
def test_an_orphan_stops(bench: Bench, end: str) -> None:
    """Its driver has gone, or another one has come."""

    def go() -> None:
        if end == "released":
            bench.lease.release()
            return
        later = replace(current(bench.storage), generation=bench.lease.generation + 1, id="other")
        bench.storage.create(f"leases/{later.generation}.json", json.dumps(later.__dict__).encode())

    tiny = Tiny(at={2: go})
    bench.run(tiny)
    assert tiny.trained == [1, 2]
    assert bench.told == [{"status": "interrupted"}]
    assert bench.row is None


def test_an_orphan_leaves_the_next_drivers_attempt_alone(bench: Bench) -> None:
    """It closes its own record alone, which the other has closed before it."""

    def take_over() -> None:
        bench.lease.release()
        bench.attempts.begin(bench.trial, driver=99, node="there", pid=1)

    bench.run(Tiny(at={2: take_over}))
    one, other = bench.attempts.all()
    assert (one.number, one.kind) == (1, "driver lost")
    assert (other.number, other.driver, other.open) == (2, 99, True)


def test_the_row_of_an_orphan_counts_once(bench: Bench) -> None:
    """Two workers measure the same: the first row stays, and both report it."""
    first = measurement(bench.trial, loss=1.25)
    bench.run(Tiny(at={STEPS: lambda: Ledger(bench.storage).write(bench.trial, first)}))
    assert bench.row["loss"] == 1.25
    assert bench.told[-1]["loss"] == 1.25


def test_a_trainer_that_measures_nothing_is_named(bench: Bench) -> None:
    with pytest.raises(AssertionError, match=f"ended without measuring {bench.trial.key}"):
        bench.run(Tiny(measures=False))
    assert bench.row is None


def test_a_worker_that_sees_another_project_trains_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "UNFIT_SECONDS", 0.2)
    tiny = Tiny()
    with pytest.raises(UnfitNodeError, match=r"does not see the same .*project as the driver"):
        bench.run(tiny, nonce="another nonce")
    assert tiny.trained == []
    assert bench.storage.names("attempts") == []


def test_a_worker_of_another_isoflop_says_so_until_it_is_mended_or_given_up(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "UNFIT_SECONDS", 0.2)
    with pytest.raises(UnfitNodeError, match="has another isoflop than the driver"):
        bench.run(Tiny(), sources="of another")
    assert "has another isoflop" in bench.told[0]["trouble"]
    assert bench.storage.names("attempts") == []


def test_a_worker_that_is_not_fit_hears_an_interrupt(bench: Bench) -> None:
    bench.interrupt()
    bench.run(Tiny(), nonce="another nonce")
    assert bench.told == [{"status": "interrupted"}]


@pytest.mark.parametrize(
    ("lost", "kind", "error"),
    [(True, "worker lost", "rank 3 died"), (False, "raised", "GangError: rank 3 died")],
)
def test_a_gang_that_loses_a_rank_is_not_to_blame(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, lost: bool, kind: str, error: str
) -> None:
    def gang(trial: Trial, workspace: MakeWorkspace, **_: Any) -> Iterator[Event]:
        yield Step(1)
        error = GangError("rank 3 died")
        error.lost = lost
        raise error

    monkeypatch.setattr(worker, "train_in_gang", gang)
    with pytest.raises(GangError):
        Work(bench.order(ranks=8), bench.told.append).do()
    (attempt,) = bench.attempts.all()
    assert (attempt.kind, attempt.error, attempt.step) == (kind, error, 1)


def test_a_gang_that_waits_for_the_storage_lives_tells_why_and_hears_an_interrupt(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signs of life alone come, for longer than a trial may be silent, which would end us."""
    stopped = []

    def gang(trial: Trial, workspace: MakeWorkspace, **_: Any) -> Iterator[Event | Sign]:
        yield Step(1)
        try:
            for i in range(8):
                time.sleep(0.2)
                yield Sign(
                    troubles=("cannot store the model: away; trying again",) if i == 1 else ()
                )
            bench.interrupt()
            yield Sign()
        finally:
            stopped.append(trial.key)

    monkeypatch.setattr(worker, "train_in_gang", gang)
    order = bench.order(ranks=8, silent_seconds=1.0, report_seconds=0.5)
    Work(order, bench.told.append).do()
    running = [told for told in bench.told if "fraction" in told]
    assert 2 <= len(running) <= 3  # the driver, too, hears that it lives
    assert [told for told in bench.told if told not in running] == [
        {"trouble": "cannot store the model: away; trying again"},
        {"status": "interrupted"},
    ]
    assert stopped == [bench.trial.key]


def test_what_a_rank_is_told_of_the_storage_goes_to_its_leader(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workspace is made in the rank's process, where nobody sees a warning."""
    made, told = [], []

    def gang(trial: Trial, workspace: MakeWorkspace, **_: Any) -> Iterator[Event]:
        made.append(workspace(told.append))
        yield measurement(trial)

    monkeypatch.setattr(worker, "train_in_gang", gang)
    Work(bench.order(ranks=2), bench.told.append).do()
    away = OSError(5, "Input/output error")
    monkeypatch.setattr(made[0].storage, "upload", partial(_raise, away))
    made[0].save(3, lambda path: path.write_text("3"))
    assert told == ["cannot store checkpoints: Input/output error; trying again"]


@pytest.mark.slow
def test_a_trunk_that_goes_on_says_how_far_it_is_in_what_is_left(
    bench: Bench, make_trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of horizons of 10, 20 and 40 steps the last takes 24: 16 are trunk that others went."""
    monkeypatch.setattr(worker, "trainer", trainer)
    made = make_trial(8, 1e9, source=Markov(tokens=150_000, symbols=16, order=1))
    h = replace(
        made.hyperparameters,
        schedule="wsd",
        decay_fraction=0.2,
        final_fraction=0.0,
        batch_tokens=512,
        steps=40,
        warmup_steps=2,
    )
    for horizons, steps, whole in (((10, 20), 22, True), ((40,), 24, False)):
        bench.told.clear()
        bench.trial = replace(made, hyperparameters=h, horizons=tuple(512 * n for n in horizons))
        Work(bench.order(report_seconds=0.0), bench.told.append).do()
        told = [t["fraction"] for t in bench.told if "fraction" in t]
        assert len(told) == steps
        # Until a point of its curve is heard of, it takes a step of a branch for one of the trunk.
        assert told[2:] == pytest.approx([n / steps for n in range(3, steps + 1)], abs=0.05)
        rows = [t for t in bench.told if "status" in t]
        assert [t["found"] for t in rows] == [False] * len(horizons)
        assert bench.told[-1]["whole"] is whole
        bench.told.clear()
        Work(bench.order(), bench.told.append).do()
        assert [t["found"] for t in bench.told] == [True] * len(horizons)
        assert bench.told[-1]["whole"] is False


HANG = """
import sys
from orchestrator.worker import Order, Work
Work(Order.load(sys.argv[1]), print).do()
"""


def test_a_trial_that_hangs_leaves_where_and_its_next_attempt_goes_on(bench: Bench) -> None:
    """The simulation hangs half-way, once, after a checkpoint."""
    bench.trial = simulated(hang=1.0)
    order = bench.order(silent_seconds=1.0)
    command = [sys.executable, "-c", HANG, order.dump()]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert done.returncode == EXIT_STATUS
    (attempt,) = bench.attempts.all()
    assert attempt.kind == "silent"
    assert "no sign of life for 1 s" in attempt.error
    assert "trainers/simulated.py" in attempt.traceback
    assert "in train" in attempt.traceback
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "'status': 'complete'" in again.stdout
    assert [a.kind for a in bench.attempts.all()] == ["silent"]


def test_an_order_goes_through_text(bench: Bench) -> None:
    order = bench.order(checkpoints=Checkpoints(every_steps=7, keep=3), silent_seconds=None)
    assert Order.load(order.dump()) == order


@pytest.mark.parametrize(
    ("gpus", "mps", "device"),
    [
        (1 / 4, True, "1/4 x {} by MPS"),
        (1 / 8, False, "1/8 x {}"),
        (1.0, False, "{}"),
        (0.0, False, "{}"),
    ],
)
def test_a_row_says_on_which_share_of_a_gpu_it_was_measured(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, gpus: float, mps: bool, device: str
) -> None:
    """So that what was slower there than alone is known for a share's pace."""
    trained: list[float] = []
    monkeypatch.setattr("trainers.gpu_share.keep_to_share", trained.append)
    monkeypatch.setattr("orchestrator.worker.require_gpu", lambda *_, **__: None)
    bench.trial = replace(bench.trial, trainer="pretrain", settings=())
    bench.run(Tiny(), gpus=gpus, mps=mps)
    assert bench.row is not None
    plain = measurement(bench.trial, loss=2.5, resumed_from=0).device
    assert bench.row["device"] == device.format(plain)
    assert trained == [gpus] * (0 < gpus < 1)
