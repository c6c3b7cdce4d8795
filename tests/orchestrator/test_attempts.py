"""Attempts: every one open or explained, in a directory or a bucket."""

import json
import multiprocessing
import os
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.attempts import Attempt, Attempts
from orchestrator.checkpoints import StoredWorkspace
from orchestrator.planner import make_plan
from orchestrator.spec import parse_spec
from orchestrator.spec_running import Checkpoints
from orchestrator.storage import Storage, open_storage
from trainers.trial import Trial

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def trial() -> Trial:
    spec = {"name": "x", "trainer": "simulated", "budgets": [1e10], "sizes": 3}
    return make_plan(parse_spec(spec, source=Path("x.toml"))).trials[0]


def _begin(attempts: Attempts, trial: Trial, driver: int = 1) -> Attempt:
    return attempts.begin(trial, driver=driver, node="here", pid=os.getpid())


def test_an_attempt_is_open_from_its_beginning_and_forgotten_with_success(storage, trial) -> None:
    attempts = Attempts(storage)
    attempt = _begin(attempts, trial)
    assert attempts.of(trial.key) == attempts.all() == [attempt]
    assert attempt.open
    assert (attempt.number, attempt.observation) == (1, (trial.key, trial.tokens))
    assert storage.names("attempts") == [f"{trial.key}-1.json"]
    attempts.succeed(attempt)
    attempts.succeed(attempt)
    assert attempts.all() == []


def test_a_failed_attempt_keeps_its_reason(storage: Storage, trial: Trial) -> None:
    attempts = Attempts(storage)
    attempt = _begin(attempts, trial)
    told = {"error": "RuntimeError: x", "traceback": "Traceback ...", "log": "step 3", "step": 3}
    ended = attempts.fail(attempt, kind="raised", **told)
    (kept,) = attempts.all()
    assert kept == ended
    assert not kept.open
    assert {name: getattr(kept, name) for name in told} == told
    record = json.loads(storage.read(f"attempts/{trial.key}-1.json"))
    assert (record["trial"], record["kind"]) == (trial.key, "raised")
    assert record["started_at"] <= record["ended_at"]


def test_the_next_attempt_knows_how_many_ran_out_of_memory(
    storage: Storage, trial: Trial, tmp_path: Path
) -> None:
    """In whichever rank: the leader's sentence may name another error, its note has them all."""
    attempts, full = Attempts(storage), torch.OutOfMemoryError("CUDA out of memory.")
    workspace = StoredWorkspace(
        directory=tmp_path,
        storage=storage,
        key=trial.key,
        settings=Checkpoints(),
        stop=lambda: False,
    )
    counts = [workspace.out_of_memory()]
    gang = RuntimeError("rank 1 raised")
    gang.add_note("".join(traceback.format_exception(full)))
    for error in (full, ValueError("loss"), gang):
        attempts.fail(
            _begin(attempts, trial),
            kind="raised",
            error=f"{type(error).__name__}: {error}",
            traceback="".join(traceback.format_exception(error)),
        )
        _begin(attempts, trial)  # one that is open has run out of nothing
        counts.append(workspace.out_of_memory())
    assert counts == [0, 1, 1, 2]


def test_the_first_end_stays(storage: Storage, trial: Trial) -> None:
    attempts = Attempts(storage)
    attempt = _begin(attempts, trial)
    first = attempts.fail(attempt, kind="silent", error="said nothing for 60 s")
    assert attempts.fail(attempt, kind="worker lost", error="died") == first
    assert attempts.lost(trial, driver=1, kind="worker lost", error="died") == first
    assert attempts.all() == [first]


def test_success_is_no_failure_afterwards(storage: Storage, trial: Trial) -> None:
    """A driver may give up a worker that has just written its row."""
    attempts = Attempts(storage)
    attempt = _begin(attempts, trial)
    attempts.succeed(attempt)
    attempts.fail(attempt, kind="silent", error="x")
    assert attempts.all() == []


def test_the_next_attempt_closes_what_was_left_open(storage: Storage, trial: Trial) -> None:
    attempts = Attempts(storage)
    for driver in (1, 1, 2):
        _begin(attempts, trial, driver)
    kinds = [attempt.kind for attempt in attempts.of(trial.key)]
    assert kinds == ["worker lost", "driver lost", None]
    assert [attempt.number for attempt in attempts.of(trial.key)] == [1, 2, 3]
    assert [attempt.number for attempt in attempts.of(trial.key, driver=1)] == [1, 2]
    assert attempts.of(trial.key[:-1]) == []


def test_a_driver_closes_the_attempt_of_a_worker_that_died(storage, trial) -> None:
    attempts = Attempts(storage)
    attempt = _begin(attempts, trial)
    ended = attempts.lost(trial, driver=1, kind="node lost", error="gone", detail="Ray said")
    assert (ended.id, ended.kind, ended.traceback) == (attempt.id, "node lost", "Ray said")
    assert attempts.of(trial.key) == [ended]


@pytest.mark.parametrize(("interrupted", "kind"), [(True, "interrupted"), (False, "worker lost")])
def test_what_a_driver_leaves_open_at_its_end_is_explained_by_that_end(
    storage: Storage, trial: Trial, interrupted: bool, kind: str
) -> None:
    """What Ctrl-C found too slow to stop is no failure of the trial's."""
    attempts = Attempts(storage)
    attempts.begin(trial, driver=1, node="n", pid=1)
    attempts.settle(set(), driver=1, interrupted=interrupted)
    (attempt,) = attempts.all()
    assert (attempt.open, attempt.kind) == (False, kind)


def test_a_worker_that_died_before_it_could_begin_is_on_record_too(storage, trial) -> None:
    attempts = Attempts(storage)
    before = attempts.fail(_begin(attempts, trial), kind="raised", error="x")
    ended = attempts.lost(trial, driver=1, kind="worker lost", error="died", after=before.number)
    assert ended.number == 2
    assert [a.kind for a in attempts.of(trial.key)] == ["raised", "worker lost"]


def test_what_an_attempt_said_itself_is_not_said_again(storage: Storage, trial: Trial) -> None:
    attempts = Attempts(storage)
    ended = attempts.fail(_begin(attempts, trial), kind="raised", error="x")
    assert attempts.lost(trial, driver=1, kind="worker lost", error="died", after=0) == ended
    assert attempts.all() == [ended]


def _race(uri: str, trial: Trial, results) -> None:
    results.put(_begin(Attempts(open_storage(uri)), trial).number)


def test_attempts_that_begin_at_once_have_numbers_of_their_own(storage, trial) -> None:
    results = FORK.Queue()
    racers = [FORK.Process(target=_race, args=(storage.uri, trial, results)) for _ in range(6)]
    for racer in racers:
        racer.start()
    assert sorted(results.get(timeout=60) for _ in racers) == [1, 2, 3, 4, 5, 6]
    for racer in racers:
        racer.join()


class _LosesAnswers:
    """A storage whose creations arrive, but are answered as refused: a retry found the first."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def __getattr__(self, name: str):
        return getattr(self._storage, name)

    def create(self, name: str, data: bytes, *, durable: bool = True) -> bool:
        self._storage.create(name, data)
        return False


def test_a_lost_answer_leaves_no_attempt_without_an_owner(storage: Storage, trial: Trial) -> None:
    attempts = Attempts(_LosesAnswers(storage))
    attempt = _begin(attempts, trial)
    assert attempts.all() == [attempt]


@pytest.mark.parametrize("text", ['{"trial": ', "[1]", '{"trial": "abc", "failed_at": "2026"}'])
def test_a_damaged_or_foreign_record_is_left_out_and_named(
    tmp_path: Path, trial: Trial, text: str
) -> None:
    attempts = Attempts(open_storage(tmp_path))
    attempt = _begin(attempts, trial)
    (tmp_path / "attempts" / "abc-1.json").write_text(text)
    readable, (odd,) = attempts.survey()
    assert readable == attempts.all() == [attempt]
    assert odd.file == "attempts/abc-1.json"
    assert f"{tmp_path}/attempts/abc-1.json is no record" in odd.reason


@pytest.mark.parametrize("text", ["{}", "[", '{"trial": 1}'])
def test_a_trial_is_begun_and_ended_beside_a_damaged_record_of_it(
    storage: Storage, trial: Trial, text: str
) -> None:
    storage.create(f"attempts/{trial.key}-1.json", text.encode())
    attempts = Attempts(storage)
    attempt = _begin(attempts, trial)
    assert attempt.number == 2
    attempts.fail(attempt, kind="raised", error="x")
    assert [a.kind for a in attempts.of(trial.key)] == ["raised"]


def test_a_record_that_names_another_file_is_nobodys(tmp_path: Path, trial: Trial) -> None:
    """Else a driver would remove or write whatever file outside of attempts/ the record names."""
    storage = open_storage(tmp_path / "p")
    storage.make()
    attempts = Attempts(storage)
    attempt = _begin(attempts, trial)
    victim = tmp_path / "theirs-1.json"
    victim.write_text("precious")
    record = json.loads(storage.read(f"attempts/{trial.key}-1.json"))
    record |= {"trial": "../../theirs", "tokens": 7}
    storage.create("attempts/theirs-1.json", json.dumps(record).encode())
    attempts.settle({("../../theirs", 7)}, driver=1, interrupted=False)
    assert victim.read_text() == "precious"
    assert [a.id for a in attempts.all()] == [attempt.id]


def test_a_later_version_may_say_more(storage: Storage, trial: Trial) -> None:
    attempts = Attempts(storage)
    attempt = _begin(attempts, trial)
    name = f"attempts/{trial.key}-1.json"
    record = json.loads(storage.read(name)) | {"mood": "good"}
    storage.replace(name, json.dumps(record).encode())
    assert attempts.all() == [replace(attempt)]
