"""Ctrl-C, which a terminal sends to the whole process group, and SIGTERM, on a Ray of our own."""

import time
from collections.abc import Callable
from datetime import datetime

import pytest

from tests.faults.conftest import MakeSweep, Record
from tests.faults.processes import Driver
from tests.faults.sweeps import Sweep
from tests.waiting import wait

pytestmark = pytest.mark.slow


def _interrupted(sweep: Sweep, driver: Driver, interrupt: Callable[[Driver], None]) -> set[str]:
    """Interrupt it in the middle of trials; the keys of those."""
    before = len(sweep.rows())
    sweep.wait_for_rows(before + 2, driver)
    wait(sweep.busy)
    at = time.time()
    interrupt(driver)
    assert driver.end(60) == 130, driver.said
    assert "run the same command again to go on" in driver.said
    sweep.check_nothing_is_left()
    ended = [a for a in sweep.project.attempts.all() if a.kind == "interrupted"]
    return {a.trial for a in ended if datetime.fromisoformat(a.ended_at).timestamp() > at}


def test_an_interrupt_leaves_checkpoints_from_which_no_step_is_repeated(
    make_sweep: MakeSweep, record: Record
) -> None:
    sweep = make_sweep(None, seconds=4)  # a busy machine takes two of them to pass an interrupt on
    for interrupt in (Driver.interrupt, Driver.terminate):
        driver = sweep.start()
        keys = _interrupted(sweep, driver, interrupt)
        assert keys
        last = {key: step for _, _, key, step in sweep.executed()}
        measured = {key for key, _ in sweep.project.ledger.ids()}
        for key in keys - measured:
            assert int(sweep.saved(key)[-1]) == last[key]
    before = len(sweep.rows())
    driver = sweep.start()
    found = driver.result()
    assert (found["complete"], found["trained"]) == (30, 30 - before)
    assert {a.kind for a in sweep.project.attempts.all()} == {"interrupted"}
    sweep.check()
    assert sweep.repeated() == 0
    seconds = sweep.recovered(driver.since)
    record(sweep, "Ctrl-C, SIGTERM", times=2, seconds=seconds)


SILENT = """
import pathlib, sys, time
print("first words")
pathlib.Path(sys.argv[1], "begun").touch()
time.sleep(600)
"""


def test_a_program_that_prints_nothing_hears_of_an_interrupt_at_once(
    make_sweep: MakeSweep,
) -> None:
    """Its log is kept, and the view does not claim that it writes a checkpoint."""
    spec = """
name = "faults"
trainer = "command"
recipe = "mini-adamw"
budgets = [6e9, 1.2e10]
sizes = 3
span = 4
corpus = { kind = "declared", name = "x", version = "1", vocabulary = 256, tokens = 30_000_000 }
[command]
run = ["{python}", "silent.py", "PLACE", "{width}", "{tokens}"]
files = ["silent.py"]
"""
    sweep = make_sweep(None, spec=spec)
    sweep.spec.write_text(sweep.spec.read_text().replace("PLACE", str(sweep.directory)))
    (sweep.directory / "silent.py").write_text(SILENT)
    for interrupt in (Driver.interrupt, Driver.terminate):
        (sweep.directory / "begun").unlink(missing_ok=True)
        driver = sweep.start()
        wait((sweep.directory / "begun").exists, 60)
        time.sleep(2)
        at = time.monotonic()
        interrupt(driver)
        assert driver.end(60) == 130, driver.said
        assert time.monotonic() - at < 15
        assert "asked to end; Ctrl-C again ends it now" in driver.said
        sweep.check_nothing_is_left()
    ended = sweep.project.attempts.all()
    assert {a.kind for a in ended} == {"interrupted"}
    assert {a.log for a in ended} <= {"first words\n", None}  # of one that had hardly begun
    assert "first words\n" in {a.log for a in ended}


def test_a_second_interrupt_ends_it_at_once_and_leaves_no_process(
    make_sweep: MakeSweep, record: Record
) -> None:
    """A trial that hangs does not stop when it is told to."""
    sweep = make_sweep(None, seconds=0.5, hang=0.25, limits="silent_seconds = 8")
    driver = sweep.start()
    wait(lambda: sweep.hanging(), what="for a trial that hangs")
    driver.interrupt()
    time.sleep(1)
    assert driver.alive
    assert "Ctrl-C again ends it now" in driver.said
    driver.interrupt()
    assert driver.end(10) == 130, driver.said
    sweep.check_nothing_is_left()
    driver = sweep.start()
    found = driver.result()
    assert (found["complete"], found["failed"]) == (30, 0)
    sweep.check()
    record(sweep, "Ctrl-C twice", seconds=sweep.recovered(driver.since))
