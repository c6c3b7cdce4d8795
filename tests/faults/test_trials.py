"""Trials that misbehave, and sweeps that cannot start."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.faults.conftest import MakeSweep, Record
from tests.faults.processes import Cluster
from tests.faults.sweeps import undisturbed
from tests.waiting import wait

pytestmark = pytest.mark.slow


def test_trials_that_raise_diverge_hang_or_are_stopped_end_as_rows_or_as_failures(
    cluster: Cluster, make_sweep: MakeSweep, record: Record
) -> None:
    sweep = make_sweep(
        cluster,
        seconds=0.7,
        fail=0.2,
        diverge=0.2,
        hang=0.2,
        limits="silent_seconds = 2\nretries = 2",  # one that hung may be the one that is stopped
    )
    driver = sweep.start()
    sweep.wait_for_rows(2, driver)
    (pid, stopped), *_ = wait(lambda: [*sweep.busy().items()])
    os.kill(pid, signal.SIGSTOP)  # it cannot end itself
    at = time.time()
    assert driver.end() == 1, driver.said
    expected = undisturbed(sweep.plan.trials, sweep.directory)
    raising = {trial.key for trial in sweep.plan.trials} - expected.keys()
    assert raising
    assert {"diverged", "complete"} == {m.status for m in expected.values()}
    attempts = sweep.project.attempts.all()
    raised = [a for a in attempts if a.kind == "raised"]
    assert sorted(a.trial for a in raised) == sorted([*raising] * 3)
    assert {a.error for a in raised} == {
        f"RuntimeError: simulated failure of trial {key}" for key in raising
    }
    silent = [a for a in attempts if a.kind == "silent"]
    killed = [a for a in silent if "not even from its watchdog" in a.error]
    assert [a.trial for a in killed] == [stopped]
    hung = [a for a in silent if a not in killed]
    assert hung
    assert all("time.sleep" in a.traceback for a in hung)  # where it hung
    assert {a.kind for a in attempts} == {"raised", "silent"}
    sweep.check(failed=len(raising))
    record(sweep, "trials raise, diverge and hang", times=len(attempts))
    record(sweep, "worker stopped", seconds=sweep.recovered(at + 1, {stopped}))


def test_a_trial_that_needs_more_than_there_is_is_named_and_nothing_starts(
    cluster: Cluster, make_sweep: MakeSweep
) -> None:
    sweep = make_sweep(cluster, gpus=2)
    driver = sweep.start()
    assert driver.end() == 2
    assert "2 GPUs" in driver.said
    assert any(trial.key in driver.said for trial in sweep.plan.trials)
    assert sweep.executed() == []
    assert sweep.rows() == {}
    sweep.check_nothing_is_left()


@contextmanager
def _port(listening: bool) -> Iterator[int]:
    """A port where nobody listens, or where somebody does who never answers."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        if listening:
            one.listen()
        yield one.getsockname()[1]


@pytest.mark.parametrize("listening", [False, True], ids=["dead", "mute"])
def test_an_address_that_does_not_answer_is_told_within_20_s(
    cluster: Cluster, make_sweep: MakeSweep, listening: bool
) -> None:
    sweep = make_sweep(cluster)
    with _port(listening) as port:
        driver = sweep.start("--address", f"127.0.0.1:{port}")
        assert driver.end(40) == 2
        assert time.time() - driver.since < 20
    assert f"no Ray cluster answers at 127.0.0.1:{port}" in driver.said
    sweep.check_nothing_is_left()
