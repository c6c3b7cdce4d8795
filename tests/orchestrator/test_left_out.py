"""Nodes on which nothing is started for a while."""

from __future__ import annotations

from collections import Counter

import pytest

from cluster.machines import Cluster, Node
from cluster.queue import Job
from orchestrator.nodes import Nodes
from tests.orchestrator.grids import TWO_GPUS, Tune, cluster_of, cores


def _wide(n: int) -> list[Job]:
    """So many trials that take a node each, a the longest."""
    return [Job(key=chr(97 + i), placement=TWO_GPUS, seconds=3600.0 - i) for i in range(n)]


def _started(tune: Tune, key: str, node: str) -> None:
    tune.grid.started(key, f"actor {key}")
    tune.grid.seen(key, f"actor {key}", node, "")


def _ends_all_trials(tune: Tune, bad: str, *, hour: float = 3600.0) -> Counter[str]:
    """Run until nothing is left: `bad` ends each trial in 10 s, the others give rows in an hour."""
    failures: Counter[str] = Counter()
    ends: dict[str, float] = {}
    while True:
        for key in tune.ask_all():
            node = tune.grid.queue.where(key)
            assert node is not None
            tune.grid.started(key, f"actor {key} {tune.now}")
            ends[key] = tune.now + (10.0 if node == bad else hour)
        if not ends:
            return failures
        key = min(ends, key=lambda key: ends[key])
        tune.now = max(tune.now, ends.pop(key))
        if tune.grid.queue.where(key) == bad:
            failures[key] += 1
            tune.fail(key, "raised", hopeless=True)  # such as for want of a package
        else:
            tune.end(key)


@pytest.mark.parametrize("good", [1, 3])
def test_a_node_that_ends_all_trials_costs_each_one_try(good: int) -> None:
    """In seconds, what takes an hour elsewhere: so it would be given nearly all of them."""
    names = [f"good {i}" for i in range(good)]
    jobs = [Job(key=f"{i}", placement=TWO_GPUS, seconds=3600.0 - i) for i in range(60)]
    tune = Tune(jobs, cluster_of(*names, "bad"), retries=1)
    failures = _ends_all_trials(tune, "bad")
    assert failures
    assert set(failures.values()) == {1}
    assert tune.rows == {job.key for job in jobs}


def test_a_node_that_gives_no_row_while_another_does_is_left_out_for_a_while() -> None:
    tune = Tune(_wide(9), cluster_of("good", "bad"))
    good, bad = tune.ask_all()
    _started(tune, good, "good")
    for _ in range(2):
        _started(tune, bad, "bad")
        tune.fail(bad, "worker lost")
        tune.now += 10
        (bad,) = tune.ask_all()
    tune.end(good)
    (good,) = set(tune.ask_all())
    _started(tune, bad, "bad")
    assert tune.left_out == []
    tune.fail(bad, "raised")
    assert tune.left_out == ["bad"]
    tune.now += 10
    assert tune.ask_all() == []
    assert tune.grid.lacks == "1 node is left out for a while, and the others have no room"
    tune.now += 300
    (bad,) = tune.ask_all()
    _started(tune, bad, "bad")
    tune.fail(bad, "raised")
    assert tune.left_out == ["bad", "bad"]


def test_trials_that_fail_everywhere_fail_for_good_and_no_node_is_left_out() -> None:
    """As after a typo in a sweep: with a head beside the workers, as a cluster has."""
    head = Node(name="head", cpus=0)
    workers = cluster_of("x", "y").nodes
    tune = Tune(_wide(9), Cluster(nodes=(head, *workers)), retries=2)
    tries: Counter[str] = Counter()
    while keys := tune.ask_all():
        for key in keys:
            tries[key] += 1
            tune.fail(key, "raised")
        tune.now += 10
    assert (set(tries.values()), tune.left_out) == ({3}, [])


def test_what_no_other_node_could_hold_is_hopeless_at_once() -> None:
    """A head without GPUs is no other node."""
    nodes = (Node(name="head", cpus=8), *cluster_of("x").nodes)
    tune = Tune(_wide(1), Cluster(nodes=nodes))
    assert tune.ask_all() == ["a"]
    _started(tune, "a", "x")
    assert not tune.fail("a", "raised", hopeless=True)


def test_one_trial_that_fails_again_and_again_is_no_nodes_fault() -> None:
    tune = Tune(_wide(2), cluster_of("x", "y"), retries=20)
    a, b = tune.ask_all()
    assert tune.fail(a, "raised")
    tune.end(b)
    tune.now += 10
    nodes = set()
    while tune.ask_all() == [a]:
        nodes.add(tune.grid.queue.where(a))
        tune.fail(a, "raised")
        tune.now += 10
    assert (nodes, tune.left_out) == ({"x", "y"}, [])


def test_a_sweep_whose_only_node_is_unfit_waits_and_tries_it_again() -> None:
    tune = Tune(cores(1), cluster_of("x"))
    assert tune.ask_all() == ["a"]
    _started(tune, "a", "x")
    tune.grid.on_trial_complete(tune.handed.pop("a"), error=True)
    tune.grid.unfit("a")
    tune.now += 60
    assert tune.ask_all() == []
    assert tune.grid.lacks == "1 node is left out for a while"
    tune.now += 300
    assert tune.ask_all() == ["a"]


def _nodes() -> tuple[Nodes, list[float], list[str]]:
    now, told = [0.0], []
    return Nodes(lambda: now[0], lambda node, why: told.append(f"{node} {why}")), now, told


def _accuse(nodes: Nodes, node: str, keys: str) -> None:
    for key in keys:
        nodes.ended(node, key)


def test_a_node_is_back_once_its_trials_fail_on_a_sound_one_too() -> None:
    nodes, now, told = _nodes()
    _accuse(nodes, "y", "a")
    now[0] = 10.0
    nodes.row("x")
    _accuse(nodes, "y", "bc")
    assert nodes.out == {"y"}
    assert told == ["y ended 3 trials and gave no row: nothing more is started there for 5 minutes"]
    nodes.ended("x", "a")
    assert nodes.out == {"y"}  # x may be bad by now
    nodes.row("x")
    assert nodes.out == frozenset()
    _accuse(nodes, "y", "a")  # of which it is known now that it fails everywhere
    assert nodes.out == frozenset()
    now[0] = 20.0
    nodes.row("x")
    _accuse(nodes, "y", "d")
    assert (nodes.out, len(told)) == ({"y"}, 2)


def test_a_node_that_was_unfit_before_is_left_out_for_what_it_ends_later() -> None:
    nodes, now, told = _nodes()
    nodes.unfit("y")
    now[0] = 400.0
    assert nodes.out == frozenset()
    _accuse(nodes, "y", "a")
    now[0] = 410.0
    nodes.row("x")
    _accuse(nodes, "y", "bcde")
    assert (nodes.out, len(told)) == ({"y"}, 1)
    nodes.unfit("y")
    nodes.row("y")  # by a trial that was under way
    assert nodes.out == {"y"}  # for it says so itself


def test_a_node_is_not_accused_of_what_a_sound_one_could_not_do_before() -> None:
    nodes, now, told = _nodes()
    _accuse(nodes, "x", "abc")
    now[0] = 10.0
    nodes.row("x")
    _accuse(nodes, "y", "abc")
    now[0] = 20.0
    nodes.row("x")
    _accuse(nodes, "y", "abcd")
    assert (nodes.out, told) == (frozenset(), [])


@pytest.mark.parametrize("before", [True, False])
def test_bad_nodes_do_not_clear_one_another(before: bool) -> None:
    """Whether or not they had worked `before`."""
    nodes, now, _ = _nodes()
    for node in ("y", "z"):
        if before:
            nodes.row(node)
        _accuse(nodes, node, "abc")
    assert nodes.out == frozenset()  # a row may come yet
    now[0] = 10.0
    nodes.row("x")
    _accuse(nodes, "y", "d")
    _accuse(nodes, "z", "d")
    assert nodes.out == {"y", "z"}


def test_a_row_brings_a_node_back_for_good() -> None:
    nodes, now, _ = _nodes()
    _accuse(nodes, "x", "abc")
    now[0] = 10.0
    nodes.row("y")
    _accuse(nodes, "x", "d")
    assert nodes.out == {"x"}
    nodes.row("x")
    now[0] = 20.0
    _accuse(nodes, "x", "efg")  # no row came from elsewhere since
    assert nodes.out == frozenset()


def test_the_last_node_that_gave_rows_is_never_left_out() -> None:
    nodes, now, _ = _nodes()
    for node in ("x", "y"):
        nodes.row(node)
    now[0] = 1.0
    _accuse(nodes, "x", "a")
    _accuse(nodes, "y", "e")
    now[0] = 2.0
    nodes.row("y")
    _accuse(nodes, "x", "bc")
    assert nodes.out == {"x"}
    _accuse(nodes, "y", "efghi")
    assert nodes.out == {"x"}
    now[0] = 303.0
    assert nodes.out == frozenset()
