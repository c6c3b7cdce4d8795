"""Ctrl-C and SIGTERM, to the whole process group as a terminal sends them, on a Ray of our own."""

import signal
import time

import pytest

from tests.faults.conftest import MakeSweep, Record
from tests.faults.processes import Driver, wait
from tests.faults.sweeps import Sweep

pytestmark = pytest.mark.slow


def _interrupted(sweep: Sweep, driver: Driver, number: signal.Signals) -> set[str]:
    """Interrupt it in the middle of trials; the keys of those."""
    before = len(sweep.rows())
    sweep.wait_for_rows(before + 2, driver)
    wait(sweep.busy)
    at = time.time()
    driver.interrupt(number)
    assert driver.end(30) == 130, driver.said
    assert "interrupted; run the same command again to go on" in driver.said
    sweep.check_nothing_is_left()
    records = [a for a in sweep.project.attempts.all() if a.ended_at and a.kind == "interrupted"]
    return {a.trial for a in records if time.time() - at < 60}


def test_an_interrupt_leaves_checkpoints_from_which_no_step_is_repeated(
    make_sweep: MakeSweep, record: Record
) -> None:
    sweep = make_sweep(None, seconds=1)
    starts = []
    for number in (signal.SIGINT, signal.SIGTERM):
        driver = sweep.start()
        keys = _interrupted(sweep, driver, number)
        assert keys
        last = {key: step for _, _, key, step in sweep.executed()}
        measured = {key for key, _ in sweep.project.ledger.ids()}
        for key in keys - measured:
            assert int(sweep.saved(key)[-1]) == last[key]
        starts.append(driver)
    before = len(sweep.rows())
    driver = sweep.start()
    found = driver.result()
    assert (found["complete"], found["trained"]) == (30, 30 - before)
    assert {a.kind for a in sweep.project.attempts.all()} == {"interrupted"}
    sweep.check()
    assert sweep.repeated() == 0
    seconds = sweep.recovered(driver.since)
    record(sweep, "Ctrl-C, SIGTERM", times=2, seconds=seconds)


def test_a_second_interrupt_ends_it_at_once_and_leaves_no_process(
    make_sweep: MakeSweep, record: Record
) -> None:
    """A trial that hangs does not stop when it is told to."""
    sweep = make_sweep(None, seconds=0.5, hang=0.15, limits="silent_seconds = 8")
    driver = sweep.start()
    wait(lambda: sweep.hanging(), 60, "for a trial that hangs")
    driver.interrupt()
    time.sleep(1)
    assert driver.alive
    assert "Ctrl-C again ends it now" in driver.said
    driver.interrupt()
    at = time.monotonic()
    assert driver.end(10) == 130, driver.said
    assert time.monotonic() - at < 2
    sweep.check_nothing_is_left()
    driver = sweep.start()
    found = driver.result()
    assert (found["complete"], found["failed"]) == (30, 0)
    sweep.check()
    record(sweep, "Ctrl-C twice", seconds=sweep.recovered(driver.since))
