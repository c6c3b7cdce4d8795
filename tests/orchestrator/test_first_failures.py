"""Which failures hold the rest of a sweep back, and what lets it go on."""

import pytest

from orchestrator.first_failures import FEW, FirstFailures, gist


class Sweep:
    """A sweep that records which trials are held back and released."""

    def __init__(self, witness: str | None = None) -> None:
        self.done: list[object] = []
        self.witness = witness
        self.first = FirstFailures(self._hold, lambda: self.done.append("let go"))

    def _hold(self, failed: object) -> str | None:
        self.done.append(sorted(failed))
        return self.witness

    def fail(self, *keys: str, why: str = "exited with 1") -> str | None:
        for key in keys:
            self.first.failed(key, why)
        return self.first.reason


def test_a_few_trials_that_fail_alike_hold_back_the_rest() -> None:
    sweep = Sweep()
    assert FEW == 3
    assert sweep.fail("a", "b") is None
    assert sweep.done == []
    assert sweep.fail("c") == "exited with 1"
    assert sweep.done == [["a", "b", "c"]]
    assert sweep.fail("d") == "exited with 1"  # one that was running
    assert sweep.done == [["a", "b", "c"]]


def test_the_smallest_of_the_rest_is_tried_first() -> None:
    """Memory that lacks to the large ones may suffice for it."""
    sweep = Sweep(witness="small")
    assert sweep.fail("a", "b", "c", "d") is None
    assert sweep.fail("small") == "exited with 1"


@pytest.mark.parametrize("witness", ["small", None])
def test_a_row_lets_the_rest_go_whatever_fails_after_it(witness: str | None) -> None:
    sweep = Sweep(witness)
    sweep.fail("a", "b", "c")
    sweep.first.measured()
    assert sweep.done == [["a", "b", "c"], "let go"]
    assert sweep.first.reason is None
    assert sweep.fail("d", "e", "f", "small") is None
    assert len(sweep.done) == 2


def test_a_cause_that_differs_in_its_number_is_another_one() -> None:
    sweep = Sweep()
    sweep.fail("a", "b", why="train.py exited with 1")
    assert sweep.fail("c", "d", "e", why="train.py exited with 137") is None
    assert sweep.done == []


def test_a_row_before_any_failure_is_enough() -> None:
    sweep = Sweep()
    sweep.first.measured()
    assert sweep.fail(*"abcdef") is None
    assert sweep.done == []


def test_failures_of_two_causes_are_none_of_all() -> None:
    sweep = Sweep()
    sweep.fail("a", "b")
    assert sweep.fail("c", why="no such file") is None
    assert sweep.fail("d", "e", "f") is None
    assert sweep.done == []
    other = Sweep(witness="small")
    other.fail("a", "b", "c")
    assert other.fail("small", why="no such file") is None
    assert other.done == [["a", "b", "c"], "let go"]


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("exited with 1: step 10", "exited with 1: step 2,500", True),
        ("failure of trial 0f3a5c7788aa1122", "failure of trial 1234567890abcdef", True),
        ("loss 3.25e-7 at /tmp/x-12", "loss nan at /tmp/x-12", False),
        ("exited with 1: No module named 'a'", "exited with 1: No module named 'b'", False),
        ("was killed by SIGKILL", "was killed by SIGABRT", False),
        ("was killed by signal 35", "was killed by signal 36", False),
        ("exited with 1", "exited with 137", False),
        ("exited with 1: step 9", "exited with 1: step 10", True),
        ("CalledProcessError: exit status 1", "CalledProcessError: exit status 2", False),
        (
            "no /dev/shm/isoflop-scratch-kly22q98/command-0/scratch/vocab.json",
            "no /dev/shm/isoflop-scratch-_x_yzabc/command-0/scratch/vocab.json",
            True,
        ),
        ("cannot open '/tmp/tmpab12cd34/x.bin'", "cannot open '/tmp/tmp_zyxwvut/x.bin'", True),
        ("cannot open '/tmp/tmpab12cd34/x.bin'", "cannot open '/tmp/tmpab12cd34/y.bin'", False),
    ],
)
def test_alike_is_equal_but_for_numbers_and_keys(one: str, other: str, alike: bool) -> None:
    assert (gist(one) == gist(other)) == alike
