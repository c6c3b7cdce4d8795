"""Nodes on which nothing is started for a while."""

from __future__ import annotations

from cluster.queue import Job
from tests.orchestrator.grids import TWO_GPUS, Tune, cluster_of, cores


def _wide(n: int) -> list[Job]:
    """So many trials that take a node each, a the longest."""
    return [Job(key=chr(97 + i), placement=TWO_GPUS, seconds=3600.0 - i) for i in range(n)]


def _started(tune: Tune, key: str, node: str) -> None:
    tune.grid.started(key, f"actor {key}")
    tune.grid.seen(key, f"actor {key}", node, "")


def test_a_node_that_ends_all_trials_is_left_out_and_eats_none_of_them() -> None:
    """One that fails in seconds what takes an hour on the other would be given all of them."""
    tune = Tune(_wide(9), cluster_of("good", "bad"), retries=2)
    good, bad = tune.ask_all()
    _started(tune, good, "good")
    failures = 0
    while not tune.left_out:
        _started(tune, bad, "bad")
        assert tune.fail(bad, "raised", hopeless=True)  # such as for want of a package
        failures += 1
        tune.now += 10
        (bad,) = tune.ask_all() or [""]
    assert (tune.left_out, failures, bad) == (["bad"], 3, "")
    tune.now += 300
    assert tune.ask_all() == ["b"]  # which the failures there have not cost a try


def test_a_trial_that_fails_everywhere_fails_for_good() -> None:
    tune = Tune(cores(3), cluster_of("x", "y", "z"), retries=1)
    for key, node in zip(tune.ask_all(), "xyz", strict=True):
        _started(tune, key, node)
    tries = 1
    while tune.fail("a", "raised"):
        tune.now += 1
        tries += "a" in tune.ask_all()
        _started(tune, "a", "x" if tries % 2 else "y")
    assert tries <= 2 + 3


def test_a_node_alone_is_never_left_out_for_failures() -> None:
    tune = Tune(cores(6), cluster_of("x"), retries=5)
    assert tune.ask_all()
    _started(tune, "a", "x")
    while tune.fail("a", "raised"):
        tune.now += 1
        assert "a" in tune.ask_all()
        _started(tune, "a", "x")
    assert tune.left_out == []


def test_a_sweep_whose_only_node_is_unfit_waits_and_tries_it_again() -> None:
    tune = Tune(cores(1), cluster_of("x"))
    assert tune.ask_all() == ["a"]
    _started(tune, "a", "x")
    tune.grid.on_trial_complete(tune.handed.pop("a"), error=True)
    tune.grid.unfit("a")
    tune.now += 60
    assert tune.ask_all() == []
    assert "no node can work on the sweep" in tune.grid.lacks
    tune.now += 300
    assert tune.ask_all() == ["a"]
