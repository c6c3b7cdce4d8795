"""An interrupted training ends as the uninterrupted one, bit for bit, whatever it resumes from."""

import dataclasses
import errno
import hashlib
import io
import itertools
import multiprocessing
import pickle
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers import states
from trainers.pretrain import CURVE_POINTS, Pretrain
from trainers.states import HASH_BYTES, Place, State, read_state, write_state
from trainers.trial import Measurement, Progress, Step, Trial
from trainers.workspace import Scratch

pytestmark = pytest.mark.slow


@dataclass
class _At(Scratch):
    """Checkpoints are due after these steps."""

    steps: frozenset[int] = frozenset()

    def due(self, step: int) -> bool:
        return step in self.steps


@pytest.fixture(scope="module")
def trial(make_trial) -> Trial:
    made = make_trial(12, 6e8)
    assert 2 * CURVE_POINTS < made.hyperparameters.steps < 1000
    return made


@pytest.fixture(scope="module")
def whole(trial: Trial, tmp_path_factory: pytest.TempPathFactory) -> Measurement:
    """The measurement of a training that nothing interrupts."""
    return _measured(Pretrain().train(trial, Scratch(tmp_path_factory.mktemp("whole"))))


def _measured(events: Iterator[Any]) -> Measurement:
    *_, last = events
    assert isinstance(last, Measurement)
    return last


def _result(measured: Measurement) -> tuple[object, ...]:
    """All that depends on the trial alone."""
    return (
        measured.status,
        measured.loss,
        measured.loss_stderr,
        measured.bits_per_byte,
        measured.curve,
    )


def _train_until(trial: Trial, directory: Path, step: int, steps: frozenset[int]) -> None:
    """One attempt that ends after `step`, with a checkpoint after each of `steps`."""
    events = Pretrain().train(trial, _At(directory, steps=steps))
    for event in events:
        if event == Step(step):
            break
    events.close()


@pytest.mark.parametrize(
    "where",
    ["first step", "between points", "point", "held-out point", "last but one", "last step"],
)
def test_a_training_goes_on_from_any_step(
    trial: Trial, whole: Measurement, tmp_path: Path, where: str
) -> None:
    steps = trial.hyperparameters.steps
    marks = [point.step for point in whole.curve]
    step = {
        "first step": 1,
        "between points": marks[9] + 1,
        "point": marks[10],
        "held-out point": next(p.step for p in whole.curve if p.heldout_loss is not None),
        "last but one": steps - 1,
        "last step": steps,
    }[where]
    assert (step in marks) == (where in ("point", "held-out point", "last step"))
    _train_until(trial, tmp_path, step, frozenset({step}))
    events = list(Pretrain().train(trial, Scratch(tmp_path)))
    assert [e.step for e in events if isinstance(e, Step)] == list(range(step + 1, steps + 1))
    measured = events[-1]
    assert _result(measured) == _result(whole)
    assert (measured.resumed_from, measured.steps) == (step, steps - step)


def test_many_interruptions_between_checkpoints_change_nothing(
    trial: Trial, whole: Measurement, tmp_path: Path
) -> None:
    """Also when the steps after a checkpoint are lost, and when the first attempt has none."""
    every = frozenset(range(0, 1000, 13))
    for step in (1, 5, 20, 21, 60):
        _train_until(trial, tmp_path, step, every)
    measured = _measured(Pretrain().train(trial, Scratch(tmp_path)))
    assert _result(measured) == _result(whole)
    assert measured.resumed_from == 52


def test_saving_does_not_change_the_result(
    trial: Trial, whole: Measurement, tmp_path: Path
) -> None:
    measured = _measured(Pretrain().train(trial, Scratch(tmp_path, every_steps=1)))
    assert _result(measured) == _result(whole)
    assert (measured.resumed_from, measured.steps) == (0, trial.hyperparameters.steps)


def test_every_step_is_reported_after_its_point(trial: Trial, tmp_path: Path) -> None:
    events = list(Pretrain().train(trial, Scratch(tmp_path)))
    steps = [event.step for event in events if isinstance(event, Step)]
    assert steps == list(range(1, trial.hyperparameters.steps + 1))
    for event, following in itertools.pairwise(events):
        if isinstance(event, Progress):
            assert following == Step(event.step)


def test_seconds_are_those_of_all_attempts(trial: Trial, tmp_path: Path) -> None:
    steps = trial.hyperparameters.steps
    start = time.perf_counter()
    _train_until(trial, tmp_path, steps, frozenset({steps}))
    first = time.perf_counter() - start
    start = time.perf_counter()
    measured = _measured(Pretrain().train(trial, Scratch(tmp_path)))
    second = time.perf_counter() - start
    assert first + second - 0.1 < measured.seconds < first + second
    assert 0 < measured.mfu < 1


class _Harmful:
    """Unpickled without care, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def _damage(kind: str, path: Path, other: Path) -> None:
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(path.read_bytes()[:-200])
        case "half":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "noise":
            path.write_bytes(b"\x00\xff\x80no checkpoint" * 50)
        case "foreign":
            path.write_bytes(other.read_bytes())
        case "one bit":
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        case "older format":
            with path.open("rb") as file:
                file.seek(HASH_BYTES)
                content = torch.load(file, weights_only=True)
            older = io.BytesIO()
            torch.save({**content, "version": 0}, older)
            path.write_bytes(_hashed(older.getvalue()))
        case "harmful":
            harm = pickle.dumps(_Harmful(path.with_name("harm")), protocol=2)
            path.write_bytes(_hashed(harm))


def _hashed(content: bytes) -> bytes:
    """What has all the signs of a whole checkpoint."""
    return hashlib.sha256(content).digest() + content


@pytest.mark.parametrize(
    "kind",
    ["empty", "truncated", "half", "noise", "foreign", "one bit", "older format", "harmful"],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    trial: Trial, whole: Measurement, tmp_path: Path, kind: str
) -> None:
    other = dataclasses.replace(trial, seed=7)
    _train_until(other, tmp_path / "other", 30, frozenset({30}))
    _train_until(trial, tmp_path / "own", 30, frozenset({20, 30}))
    workspace = Scratch(tmp_path / "own")
    newest, _ = workspace.checkpoints()
    _damage(kind, newest, next(Scratch(tmp_path / "other").checkpoints()))
    with pytest.warns(UserWarning, match="set aside"):
        measured = _measured(Pretrain().train(trial, workspace))
    assert measured.resumed_from == 20
    assert _result(measured) == _result(whole)
    assert not (tmp_path / "own" / "harm").exists()


def _small(path: Path, numbers: int = 1000) -> None:
    """A checkpoint of trial k with so many weights."""
    here = Place(position=1, decaying_to=None, total=0.0, curve=())
    state = State(
        here=here, trunk=None, done=1, told=(0, 0.0, 0.0), ahead=(), seconds=1, training_seconds=1
    )
    write_state(state, {"here": {"weights": torch.zeros(numbers)}}, path, key="k")


class _Failing(io.FileIO):
    """A file on a disk that cannot be read from some byte on."""

    def readinto(self, buffer: Any) -> int:
        if self.tell() >= 1024:
            raise OSError(errno.EIO, "Input/output error")
        return super().readinto(memoryview(buffer)[:512])


def test_a_disk_that_fails_now_says_nothing_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while it is verified nor, if it was read once, while it is loaded."""
    path = tmp_path / "small"
    _small(path)
    told = path.read_bytes()[:HASH_BYTES]
    monkeypatch.setattr(Path, "open", lambda self, mode: io.BufferedReader(_Failing(self)))
    with pytest.raises(OSError, match="Input/output error"):
        read_state(path, key="k")
    monkeypatch.setattr(states, "_hash", lambda file: told)
    with pytest.raises(OSError, match="Input/output error"):
        read_state(path, key="k")


def _read_in_little_memory(path: Path, answers: Any) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (20 << 20),) * 2)
    try:
        read_state(path, key="k")
    except BaseException as error:
        answers.put(repr(error))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system has no /proc")
def test_too_little_memory_now_says_nothing_of_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "large"
    _small(path, 16 << 20)
    forks = multiprocessing.get_context("fork")
    answers = forks.SimpleQueue()
    child = forks.Process(target=_read_in_little_memory, args=(path, answers))
    child.start()
    child.join(60)
    assert answers.get().startswith("MemoryError")


def test_divergence_found_after_a_checkpoint_is_the_same(trial: Trial, tmp_path: Path) -> None:
    wild = dataclasses.replace(trial.hyperparameters, head_rate=1e38)
    diverging = dataclasses.replace(trial, hyperparameters=wild)
    once = _measured(Pretrain().train(diverging, Scratch(tmp_path / "whole")))
    assert once.status == "diverged"
    _train_until(diverging, tmp_path, 1, frozenset({1}))
    again = _measured(Pretrain().train(diverging, Scratch(tmp_path)))
    assert again.resumed_from == 1
    assert (again.reason, again.loss) == (once.reason, once.loss)
    assert [p.step for p in again.curve] == [p.step for p in once.curve]


@dataclass
class _Full(Scratch):
    """Its disk is full."""

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        write(Path("/dev/full"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_named(trial: Trial, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        list(Pretrain().train(trial, _Full(tmp_path, every_steps=1)))


def test_a_checkpoint_holds_no_more_than_the_state(trial: Trial, tmp_path: Path) -> None:
    """Weights and two moments in fp32; a view saved as it is would take its whole buffer along."""
    _train_until(trial, tmp_path, 10, frozenset({10}))
    shape = trial.shape
    count = 12 * shape.depth * shape.width**2 + 2 * shape.vocabulary * shape.width
    size = next(Scratch(tmp_path).checkpoints()).stat().st_size
    assert 12 * count < size < 12 * count + 10_000
