"""Workers, drivers and nodes that die while a sweep runs on a cluster of several raylets."""

import random
import time
from functools import partial

import psutil
import pytest

from tests.faults.conftest import MakeSweep, Record
from tests.faults.processes import Cluster
from tests.faults.sweeps import PRETRAINED, SIMULATED, Sweep
from tests.waiting import wait

pytestmark = pytest.mark.slow

DRIVER_KILLS = 5
MORE = SIMULATED.replace("sizes = 6", "sizes = 8")
"""40 trials."""


def _busy(sweep: Sweep) -> dict[int, str]:
    """The processes in the middle of a trial, as soon as there are any."""
    return wait(sweep.busy, what="for a trial with a checkpoint")


def _kinds(sweep: Sweep) -> list[str]:
    return sorted(attempt.kind for attempt in sweep.project.attempts.all())


def test_a_killed_worker_costs_the_steps_since_its_checkpoint_and_a_second_driver_nothing(
    cluster: Cluster, make_sweep: MakeSweep, record: Record
) -> None:
    sweep = make_sweep(cluster, seconds=0.7)
    driver = sweep.start()
    sweep.wait_for_rows(3, driver)
    (pid, key), *_ = _busy(sweep).items()
    psutil.Process(pid).kill()
    killed = time.time()
    second = sweep.start()
    assert second.end() == 2
    assert f"another isoflop (process {driver.process.pid} on " in second.said
    found = driver.result()
    assert (found["trials"], found["complete"], found["trained"]) == (30, 30, 30)
    (attempt,) = sweep.project.attempts.all()
    assert (attempt.trial, attempt.kind, attempt.pid) == (key, "worker lost", pid)
    sweep.check()
    assert sweep.repeated() < 0.02
    record(sweep, "worker killed", seconds=sweep.recovered(killed, {key}))


def test_a_driver_killed_five_times_goes_on_where_its_workers_were(
    cluster: Cluster, make_sweep: MakeSweep, record: Record
) -> None:
    """Once while it starts, then at random moments of the training."""
    sweep = make_sweep(cluster, spec=MORE, seconds=1)
    moments = random.Random(20)
    waits = []
    for kill in range(DRIVER_KILLS):
        driver = sweep.start()
        if kill > 0:
            waits.append(wait(partial(sweep.recovered, driver.since)))
        time.sleep(moments.uniform(0.1, 2.0))
        assert driver.alive, driver.said
        driver.kill()
        sweep.rows()
    # Its workers may yet end a trial before they are ended themselves; a tick takes 0.02 s.
    wait(lambda: time.time() - max(at for _, at, _, _ in sweep.executed()) > 3)
    before = len(sweep.rows())
    assert 0 < before < 40
    found = sweep.start().result()
    assert (found["complete"], found["trained"]) == (40, 40 - before)
    assert set(_kinds(sweep)) <= {"driver lost", "worker lost", "interrupted"}
    sweep.check()
    assert sweep.repeated() < 0.2
    record(sweep, "driver killed", times=DRIVER_KILLS, seconds=sum(waits) / len(waits))


def _busy_on(raylet: psutil.Process, sweep: Sweep) -> set[str]:
    """Keys of the trials with a checkpoint that a node trains, as soon as there are any."""

    def keys() -> set[str]:
        there = {child.pid for child in raylet.children()}
        return {key for pid, key in sweep.busy().items() if pid in there}

    return wait(keys, what="for a trial on the node")


def _killed(raylet: psutil.Process, cluster: Cluster, sweep: Sweep) -> set[str]:
    """Kill a node; the keys of the trials that this cut off."""
    busy = _busy_on(raylet, sweep)
    cluster.kill(raylet)
    return busy - {key for key, _ in sweep.project.ledger.ids()}  # which ended in time after all


def test_killed_nodes_are_survived_and_one_that_joins_is_used(
    cluster: Cluster, make_sweep: MakeSweep, record: Record
) -> None:
    """First one of two, then the other one, so that all goes on where there was nothing before."""
    sweep = make_sweep(cluster, seconds=1)
    driver = sweep.start()
    first, second = cluster.nodes
    lost = _killed(first, cluster, sweep)
    sweep.wait_for_rows(len(sweep.rows()) + 3, driver)
    lost |= _killed(second, cluster, sweep)
    killed = time.time()
    assert _busy_on(cluster.add(), sweep)
    found = driver.result()
    assert (found["complete"], found["failed"]) == (30, 0)
    attempts = sweep.project.attempts.all()
    assert lost
    assert {a.trial for a in attempts} >= lost
    assert {a.kind for a in attempts} <= {"node lost", "worker lost"}
    sweep.check()
    record(sweep, "nodes killed, another joins", times=2, seconds=sweep.recovered(killed))


def test_a_driver_that_lost_its_project_stops_and_its_workers_do_no_harm(
    cluster: Cluster, make_sweep: MakeSweep, record: Record
) -> None:
    """As after a partition: another machine took the first driver for dead."""
    sweep = make_sweep(cluster, seconds=1)
    driver = sweep.start()
    sweep.wait_for_rows(3, driver)
    _busy(sweep)
    give_back = sweep.take_over()
    assert driver.end() == 1
    assert "another driver took the project over" in driver.said
    sweep.check_nothing_is_left()
    before = sweep.rows()
    orphaned = {a.trial for a in sweep.project.attempts.all()}
    assert orphaned
    assert set(_kinds(sweep)) == {"interrupted"}
    give_back()
    again = sweep.start()
    found = again.result()
    assert found["trained"] == 30 - len(before)
    sweep.check()
    assert sweep.repeated() == 0
    record(sweep, "project taken over", seconds=sweep.recovered(again.since))


def test_real_training_is_bit_for_bit_the_same_after_all_of_it(
    cluster: Cluster, make_sweep: MakeSweep, record: Record
) -> None:
    """Worker killed, driver killed, interrupted, node killed: one after the other in one sweep."""
    sweep = make_sweep(cluster, spec=PRETRAINED)
    driver = sweep.start()
    (pid, key), *_ = _busy(sweep).items()
    psutil.Process(pid).kill()
    killed = time.time()
    wait(lambda: sweep.recovered(killed, {key}))
    driver.kill()
    driver = sweep.start()
    wait(partial(sweep.recovered, driver.since))
    _busy(sweep)
    driver.interrupt()
    assert driver.end() == 130, driver.said
    driver = sweep.start()
    wait(partial(sweep.recovered, driver.since))
    pids = _busy(sweep).keys()
    homes = [n for n in cluster.nodes if pids & {c.pid for c in n.children()}]
    cluster.kill(homes[0])
    found = driver.result()
    assert (found["complete"], found["failed"]) == (6, 0)
    assert {"worker lost", "interrupted"} <= set(_kinds(sweep))
    sweep.check()
    record(sweep, "all four, pretraining", times=4)
