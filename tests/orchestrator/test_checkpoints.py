"""A trial's checkpoints in a directory and in a bucket: when, how many, and what failures do."""

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import checkpoints
from orchestrator.checkpoints import StoredWorkspace, remove
from orchestrator.ledger import Ledger
from orchestrator.planner import make_plan
from orchestrator.spec import parse_spec
from orchestrator.spec_running import Checkpoints
from orchestrator.storage import LocalStorage, Storage
from trainers.registry import trainer
from trainers.trial import Measurement, Probe, Step, Trial
from trainers.workspace import UnreadableError, Workspace, resume

Make = Callable[..., StoredWorkspace]


class Clock:
    """Time, as a test wants it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(checkpoints, "time", made)
    return made


def _maker(storage: Storage, tmp_path: Path) -> Make:
    """Makes workspaces, each of an attempt with a scratch directory of its own."""
    storage.make()
    number = iter(range(100))

    def make(*, key: str = "k", stop: Callable[[], bool] = lambda: False, **settings: object):
        directory = tmp_path / f"scratch{next(number)}"
        directory.mkdir()
        return StoredWorkspace(
            directory=directory,
            storage=storage,
            key=key,
            settings=Checkpoints(**settings),
            stop=stop,
        )

    return make


@pytest.fixture
def make(storage: Storage, tmp_path: Path) -> Make:
    return _maker(storage, tmp_path)


@pytest.fixture
def make_local(tmp_path: Path) -> Make:
    """For what does not touch the storage."""
    return _maker(LocalStorage(tmp_path / "project"), tmp_path)


def _save(workspace: Workspace, *steps: int) -> None:
    for step in steps:
        workspace.save(step, lambda path, step=step: path.write_text(f"state {step}"))


def _read(path: Path) -> int:
    word, _, step = path.read_text().partition(" ")
    if word != "state" or not step:
        raise UnreadableError("it is cut short")
    return int(step)


def test_the_next_attempt_finds_the_newest_on_another_machine(make: Make) -> None:
    _save(make(), 9, 10, 11)
    other = make()
    assert [path.read_text() for path in other.checkpoints()] == ["state 11", "state 10"]
    third, foreign = make(), make(key="other")
    assert resume(third, _read) == third.resumed_from == 11
    assert resume(foreign, _read) is foreign.resumed_from is None


def test_so_many_are_kept_as_the_settings_say(make: Make, storage: Storage) -> None:
    workspace = make(keep=3)
    _save(workspace, 8, 9, 10, 11, 100_000)
    names = storage.names("checkpoints/k")
    assert [int(name) for name in names] == [10, 11, 100_000]
    assert list(workspace.directory.iterdir()) == []  # what was uploaded takes no room here


def test_one_that_cannot_be_read_is_set_aside_and_the_one_before_is_taken(
    make: Make, storage: Storage
) -> None:
    _save(make(), 1, 2)
    newest = storage.names("checkpoints/k")[-1]
    storage.replace(f"checkpoints/k/{newest}", b"sta")
    workspace = make()
    with pytest.warns(UserWarning, match="of k at step 2 is set aside: it is cut short"):
        assert resume(workspace, _read) == workspace.resumed_from == 1
    assert storage.names("checkpoints/k/unreadable") == [newest]
    assert resume(make(), _read) == 1
    _save(make(key="other"), 1)
    remove(storage, ["k", "none"])
    assert storage.names("checkpoints/k") == storage.names("checkpoints/k/unreadable") == []
    assert len(storage.names("checkpoints/other")) == 1


def test_none_is_due_before_its_time(make_local: Make, clock: Clock) -> None:
    workspace = make_local(every_seconds=300.0)
    clock.now += 299
    assert not workspace.due(1)
    clock.now += 1
    assert workspace.due(2)
    _save(workspace, 2)
    clock.now += 299
    assert not workspace.due(3)
    clock.now += 1
    assert workspace.due(4)


def test_one_is_due_when_a_multiple_of_the_steps_is_reached_or_passed(
    make_local: Make, clock: Clock
) -> None:
    """Trainers of quick steps ask after a few of them."""
    workspace = make_local(every_steps=10, every_seconds="never", max_overhead=1.0)
    due = []
    for step in (3, 9, 10, 11, 19, 24, 25, 41, 50):
        if workspace.due(step):
            due.append(step)
            _save(workspace, step)
    assert due == [10, 24, 41, 50]


def test_never_is_never(make_local: Make, clock: Clock) -> None:
    workspace = make_local(every_seconds="never")
    clock.now += 1e9
    assert not workspace.due(10**6)


def test_saving_takes_no_more_of_the_time_than_it_may(make_local: Make, clock: Clock) -> None:
    """One that took 2 s pays for 100 s at 2%, whatever the settings ask for meanwhile."""
    workspace = make_local(every_steps=1, every_seconds=1.0, max_overhead=0.02)

    def slow(path: Path) -> None:
        path.touch()
        clock.now += 2

    assert workspace.due(1)
    workspace.save(1, slow)
    clock.now += 99
    assert not workspace.due(2)
    clock.now += 1
    assert workspace.due(3)


def test_a_multiple_that_is_passed_while_none_may_be_written_is_made_up_for(
    make_local: Make, clock: Clock
) -> None:
    workspace = make_local(every_steps=10, every_seconds="never", max_overhead=0.01)

    def slow(path: Path) -> None:
        path.touch()
        clock.now += 1

    workspace.save(10, slow)
    assert not workspace.due(20)
    clock.now += 100
    assert workspace.due(21)


def test_one_is_due_at_once_when_the_sweep_stops(make_local: Make) -> None:
    stopping: list[bool] = []
    workspace = make_local(every_seconds="never", stop=lambda: bool(stopping))
    assert not workspace.due(1)
    stopping.append(True)
    assert workspace.due(2)


class _Full(LocalStorage):
    """A disk without room, for as long as it is."""

    full = True

    def upload(self, path: Path, name: str) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().upload(path, name)


def test_of_what_is_measured_only_trunks_that_may_be_extended_stay(make_trial) -> None:
    once = make_trial(16, 1e9)
    h = replace(once.hyperparameters, schedule="wsd", decay_fraction=0.2)
    trunk = replace(once, hyperparameters=h, horizons=(once.tokens,))
    probe = replace(trunk, probe=Probe(rate=0.5))
    usual = Checkpoints()
    assert [usual.removes(trial) for trial in (once, trunk, probe)] == [True, False, True]
    for after, removes in (("keep", False), ("remove", True)):
        told = Checkpoints(after=after)
        assert {told.removes(trial) for trial in (once, trunk, probe)} == {removes}


def test_a_storage_that_fails_is_told_and_is_tried_again_when_due(
    tmp_path: Path, clock: Clock
) -> None:
    storage = _Full(tmp_path / "project")
    workspace = _maker(storage, tmp_path)(every_seconds=60.0)
    with pytest.warns(UserWarning, match="cannot store checkpoints: No space left"):
        _save(workspace, 1)
    assert storage.names("checkpoints/k") == []
    assert list(workspace.directory.iterdir()) == []
    assert not workspace.due(2)
    clock.now += 60
    assert workspace.due(3)
    storage.full = False
    _save(workspace, 3)
    assert [int(name) for name in storage.names("checkpoints/k")] == [3]


class _Away(LocalStorage):
    """A file server that is away for the first few times that it is asked."""

    left = 3

    def names(self, directory: str, prefix: str = "") -> list[str]:
        self._perhaps()
        return super().names(directory, prefix)

    def download(self, name: str, path: Path) -> None:
        self._perhaps()
        super().download(name, path)

    def _perhaps(self) -> None:
        if self.left:
            self.left -= 1
            raise OSError(errno.ESTALE, "Stale file handle")


def test_a_storage_that_is_away_is_waited_for_to_read_but_not_after_an_interrupt(
    tmp_path: Path,
) -> None:
    """Its failure is no failure of the trial."""
    storage = _Away(tmp_path / "project")
    make, told = _maker(storage, tmp_path), []
    storage.left = 0
    _save(make(), 1)
    workspace = make()
    workspace.tell, storage.left = told.append, 2
    assert resume(workspace, _read) == 1
    assert told == ["cannot read checkpoints: Stale file handle; trying again"] * 2
    storage.left = 10**9
    with pytest.raises(OSError, match="Stale file handle"):
        resume(make(stop=lambda: True), _read)


def test_a_checkpoint_that_goes_while_it_is_looked_for_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An orphan of the last driver's may write and clear away meanwhile."""
    storage = LocalStorage(tmp_path / "project")
    workspace = _maker(storage, tmp_path)()
    _save(workspace, 1, 2)
    listed = storage.names("checkpoints/k")
    storage.remove(f"checkpoints/k/{listed[-1]}")
    monkeypatch.setattr(storage, "names", lambda directory: listed)
    assert resume(workspace, _read) == 1


@pytest.fixture(scope="module")
def trial() -> Trial:
    spec = {"name": "x", "trainer": "simulated", "budgets": [1e10], "sizes": 3}
    return make_plan(parse_spec(spec, source=Path("x.toml"))).trials[0]


def test_a_horizon_is_measured_once_the_ledger_has_its_row(
    make: Make, trial: Trial, storage: Storage
) -> None:
    workspace, other = make(key=trial.key), make(key="other")
    *_, measurement = trainer("simulated").train(trial, workspace)
    assert not workspace.measured(trial.tokens)
    Ledger(storage).write(trial, measurement)
    assert workspace.measured(trial.tokens)
    assert not workspace.measured(2 * trial.tokens)
    assert not other.measured(trial.tokens)


def test_a_trial_that_was_cut_off_ends_as_if_it_had_not_been(make: Make, trial: Trial) -> None:
    whole = list(trainer("simulated").train(trial, make(key="whole")))
    steps = [event.step for event in whole if isinstance(event, Step)]
    cut = steps[len(steps) // 2]
    for event in trainer("simulated").train(trial, make(every_steps=1, max_overhead=1)):
        if event == Step(cut):
            break
    rest = list(trainer("simulated").train(trial, make()))
    measured, expected = rest[-1], whole[-1]
    assert isinstance(measured, Measurement)
    assert isinstance(expected, Measurement)
    assert (measured.loss, measured.curve) == (expected.loss, expected.curve)
    assert 0 < measured.resumed_from <= cut
    assert measured.resumed_from + measured.steps == expected.steps
    assert min(e.step for e in rest if isinstance(e, Step)) > measured.resumed_from


def test_a_training_that_begins_anew_keeps_its_own_and_what_went_further(make: Make) -> None:
    """A finished trunk gets an earlier horizon: its checkpoints, at later steps, are of no use."""
    _save(make(), 500, 700)
    anew = make()
    assert resume(anew, _read, usable=lambda step: step < 500) is None
    assert anew.resumed_from is None
    _save(anew, 100, 200, 300)
    again = make()
    assert resume(again, _read, usable=lambda step: step < 500) == 300
    assert again.resumed_from == 300
    assert [int(name) for name in again._names()] == [200, 300, 500, 700]
    _save(again, 800)
    assert [int(name) for name in again._names()] == [700, 800]


def test_a_checkpoint_of_no_use_does_not_count_as_the_last(make: Make) -> None:
    _save(make(), 500)
    anew = make(every_steps=50, every_seconds="never")
    assert resume(anew, _read, usable=lambda step: False) is None
    assert not anew.due(49)
    assert anew.due(50)
