"""One bad GPU among several of a node: it costs some tries, and no trial."""

from __future__ import annotations

import heapq
from collections import Counter

import pytest

from cluster.gang import GangError
from cluster.machines import uniform
from cluster.placement import Placement
from cluster.queue import Job, Queue
from cluster.rank import Home
from orchestrator.bad_gpus import HOLD_SECONDS, GpuFault, GpuRecord, fault_of, held_gpus
from tests.orchestrator.grids import GPU, Tune

HOUR = 3600.0
ECC = "RuntimeError: CUDA error: uncorrectable ECC error encountered"


def _run(tune: Tune, bad: set[int], gpus: int = 8) -> Counter[str]:
    """Run until nothing is left, and return how often each trial failed.

    Ray gives a trial the free GPU of the lowest number. The bad ones fail what they get after ten
    seconds; the others take as long as was expected.
    """
    free, on = list(range(gpus)), {}
    ends: list[tuple[float, str]] = []
    holds: dict[str, int] = {}
    failures: Counter[str] = Counter()
    while True:
        for key in tune.ask_all():
            on[key] = heapq.heappop(free)
            tune.grid.started(key, f"actor {key} {tune.now}")
            lasts = 10.0 if on[key] in bad else tune.grid.queue.job(key).seconds
            heapq.heappush(ends, (tune.now + lasts, key))
        if not ends or tune.grid.only_holds:
            return failures
        at, key = heapq.heappop(ends)
        tune.now = max(tune.now, at)
        if key in holds:
            tune.grid.on_trial_complete(key, {})
            heapq.heappush(free, holds.pop(key))
            tune.now += 1.0
        elif on[key] in bad:
            failures[key] += 1
            name = tune.grid.hold_gpu(key, f"GPU {on[key]}", HOLD_SECONDS)
            if name is None:
                heapq.heappush(free, on.pop(key))
                tune.fail(key, "raised")
            else:
                assert tune.handed.pop(key) == name
                holds[name] = on.pop(key)
                heapq.heappush(ends, (tune.now + HOLD_SECONDS, name))
        else:
            heapq.heappush(free, on.pop(key))
            tune.end(key)


@pytest.mark.parametrize("bad", [{0}, {3}, {1, 6}])
@pytest.mark.parametrize("hours", [0.05, 1.0])
def test_a_gpu_that_fails_every_trial_after_ten_seconds_loses_none(
    bad: set[int], hours: float
) -> None:
    jobs = [Job(key=f"{i:02}", placement=GPU, seconds=hours * HOUR - i) for i in range(64)]
    tune = Tune(jobs, uniform(gpus=8))
    failures = _run(tune, bad)
    assert failures
    assert tune.rows == {job.key for job in jobs}


def test_shares_of_a_bad_gpu_are_held_one_by_one() -> None:
    share = Placement(gpus=1 / 4)
    jobs = [Job(key=f"{i:02}", placement=share, seconds=1000.0 - i) for i in range(16)]
    tune = Tune(jobs, uniform(gpus=2))
    keys = tune.ask_all()
    assert len(keys) == 8
    for key in keys[:4]:
        tune.grid.started(key, f"actor {key}")
        assert tune.grid.hold_gpu(key, "GPU 0", HOLD_SECONDS) == tune.handed.pop(key)
    assert tune.grid.hold_gpu(keys[4], "GPU 1", HOLD_SECONDS) is None  # half are held
    assert tune.ask_all() == []
    tune.end(keys[5])
    assert tune.ask_all() == [keys[0]]


def test_a_trial_that_many_gpus_fail_is_given_up() -> None:
    """It is to blame itself, as with an access beyond an array's end."""
    tune = Tune([Job(key="a", placement=GPU, seconds=HOUR)], uniform(gpus=16), retries=2)
    for gpu in ("0", "1", "0", "2"):
        assert tune.ask_all() == ["a"]
        tune.grid.started("a", f"actor {tune.now}")
        assert tune.grid.hold_gpu("a", gpu, HOLD_SECONDS) == tune.handed.pop("a")
    assert tune.ask_all() == ["a"]
    tune.grid.started("a", "another")
    assert tune.grid.hold_gpu("a", "3", HOLD_SECONDS) is None
    assert not tune.fail("a", "raised")
    assert tune.ask_all() == []
    assert tune.grid.only_holds


def test_a_trial_of_several_nodes_holds_none_of_them() -> None:
    wide = Job(key="a", placement=Placement(gpus=4.0, nodes=2), seconds=HOUR)
    tune = Tune([wide], uniform(nodes=4, gpus=2))
    assert tune.ask_all() == ["a"]
    tune.grid.started("a", "actor")
    assert tune.grid.hold_gpu("a", "GPU 0", HOLD_SECONDS) is None


def test_room_that_is_set_apart_stays_taken_though_the_cluster_changes() -> None:
    jobs = [Job(key=key, placement=GPU, seconds=100.0) for key in "ab"]
    queue = Queue(jobs, uniform(gpus=2))
    assert {queue.next(0.0), queue.next(0.0)} == {"a", "b"}
    queue.started("a", ["node 1"], 0.0)
    queue.set_apart("a", "the bad one", 600.0, 10.0)
    assert (queue.next(10.0), queue.running, queue.waiting) == (None, {"b"}, 1)
    queue.move(uniform(gpus=2, cpus=32))
    assert queue.next(11.0) is None
    queue.ended("b", 20.0)
    assert queue.next(20.0) == "a"
    queue.ended("the bad one", 610.0)
    queue.lost("a", 620.0)
    assert queue.next(620.0) == "a"


@pytest.mark.parametrize(
    ("error", "log", "expected"),
    [
        (RuntimeError(f"{ECC}\nCUDA kernel errors might be"), None, ECC),
        (RuntimeError("exited with 1"), f"step 3\n{ECC}\n", ECC),
        (RuntimeError("HIP error: unspecified launch failure"), None, "unspecified launch"),
        (RuntimeError("NCCL error in: x.cpp, unhandled cuda error, NCCL"), None, "unhandled cuda"),
        (RuntimeError("NCCL error: remote process exited or there was a network"), None, None),
        (RuntimeError("CUDA error: out of memory"), None, None),
        (RuntimeError("CUDA error: device-side assert triggered"), None, None),
        (RuntimeError("CUDA error: no kernel image is available for execution"), None, None),
        (ValueError("loss is nan"), "step 3", None),
        (RuntimeError("exited with 1"), "NVRM: Xid (PCI:0000:3b:00): 48, DBE", "Xid (PCI"),
        (KeyError("xid"), "transaction xid=42 is not there", None),
    ],
)
def test_what_a_gpu_did_is_told_from_what_a_program_did(
    error: Exception, log: str | None, expected: str | None
) -> None:
    fault = fault_of(error, log, gpus=lambda: "3", node="here")
    assert (fault is None) == (expected is None)
    if fault is not None:
        assert expected in fault.error
        assert str(fault) == "GPU 3 of here"
    assert fault_of(error, log, gpus=lambda: "", node="here") is None  # it had none


def test_of_a_gang_the_gpu_of_the_rank_that_failed_is_named() -> None:
    error = GangError("rank 1 raised RuntimeError: CUDA error: unspecified launch failure")
    error.home = Home(node="id", address="10.0.0.2", pid=1, port=2, gpu="5")
    assert str(fault_of(error, None, gpus=lambda: "", node="here")) == "GPU 5 of 10.0.0.2"


def test_a_lease_tells_which_gpus_are_held_and_the_end_which_failed() -> None:
    record, fault = GpuRecord(), GpuFault(gpu="3", node="here", error=ECC)
    for _ in range(2):
        record.failed(fault)
    held = record.hold("trial 7", fault)
    assert record.holds("trial 7")
    assert held_gpus({"held_gpus": record.note()}) == [held]
    assert f"GPU 3 of here is not used until {held.until[11:16]} UTC" in str(held)
    assert record.summary() == [f"GPU 3 of here ended 2 trials: have it checked ({ECC})"]
    record.let_go("trial 7")
    assert (record.note(), held_gpus({})) == ([], [])
