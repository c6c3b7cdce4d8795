"""The watchdog, in processes that it ends."""

import subprocess
import sys

import pytest

from orchestrator.watchdog import EXIT_STATUS

TRIAL = """
import sys, time
from orchestrator.watchdog import Watchdog

def tell(error, stack):
    print(error, flush=True)
    print(stack, flush=True)
    {telling}

def a_step_that_hangs(seconds):
    time.sleep(seconds)

with Watchdog({seconds}, tell) as watchdog:
    {body}
print("ended by itself", flush=True)
"""


def _run(body: str, *, seconds: float | None = 1.0, telling: str = "pass") -> tuple[int, str]:
    """Exit status and output of a process whose trial does `body`."""
    code = TRIAL.format(body=body, seconds=seconds, telling=telling)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    return done.returncode, done.stdout


def test_a_silent_trial_ends_its_process_and_says_where_it_hung() -> None:
    code, told = _run("watchdog.heard(); a_step_that_hangs(20)")
    assert code == EXIT_STATUS
    assert told.startswith("no sign of life for 1 s (limits.silent_seconds)\n")
    assert "in a_step_that_hangs" in told
    assert "ended by itself" not in told


def test_it_ends_its_process_even_if_nobody_can_be_told() -> None:
    """A damaged record of an attempt is an error for people, which nobody here would see."""
    code, told = _run("a_step_that_hangs(20)", telling="raise ValueError('damaged')")
    assert code == EXIT_STATUS
    assert "no sign of life" in told


@pytest.mark.parametrize(
    "body",
    [
        "[(time.sleep(0.1), watchdog.heard()) for _ in range(20)]",
        "with watchdog.paused(): time.sleep(2)",
        "with watchdog.paused(): time.sleep(0.9)\n    time.sleep(0.5)",
        "with watchdog.paused():\n        with watchdog.paused(): pass\n        time.sleep(2)",
    ],
)
def test_who_gives_signs_of_life_or_waits_for_others_is_left_alone(body: str) -> None:
    assert _run(body) == (0, "ended by itself\n")


def test_a_trial_that_may_be_silent_for_ever_has_no_watch() -> None:
    assert _run("time.sleep(2)", seconds=None) == (0, "ended by itself\n")


def test_it_watches_no_longer_than_the_trial_lasts() -> None:
    """The process goes on to the next trial; here it would be ended while it waits."""
    assert _run("pass\ntime.sleep(2)") == (0, "ended by itself\n")
