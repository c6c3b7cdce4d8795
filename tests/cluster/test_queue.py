"""The policy by which trials start: hand-computed schedules, and what may never happen."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.budget import Caps
from cluster.machines import Cluster, Node, uniform
from cluster.placement import Placement
from cluster.queue import Job, Queue

CORE = Placement()


def _job(key: str, gpus: float, seconds: float, *, nodes: int = 1, flops: float = 0.0) -> Job:
    where = Placement(gpus=gpus, nodes=nodes)
    return Job(key=key, placement=where, seconds=seconds, flops=flops)


def _all(queue: Queue, now: float) -> list[str]:
    """All that start now."""
    return list(iter(lambda: queue.next(now), None))


def test_the_longest_start_first_and_ties_go_by_key() -> None:
    jobs = [Job(key=k, placement=CORE, seconds=s) for k, s in (("b", 5), ("c", 9), ("a", 5))]
    queue = Queue(jobs, uniform(cpus=2))
    assert _all(queue, 0.0) == ["c", "a"]
    queue.ended("a", 5.0)
    assert _all(queue, 5.0) == ["b"]
    assert queue.waiting == 0


def test_side_by_side_trials_take_no_more_memory_than_their_node_has() -> None:
    """Of 20 GB each: none on the node of 8 GB, six on that of 128, and the next when one ends."""
    placement = Placement(memory_bytes=20_000_000_000)
    jobs = [Job(key=f"{i}", placement=placement, seconds=9.0 - i) for i in range(8)]
    small, large = (Node(name=f"{gb}", cpus=16, memory_bytes=gb * 1e9) for gb in (8, 128))
    queue = Queue(jobs, Cluster(nodes=(small, large)))
    started = _all(queue, 0.0)
    assert started == list("012345")
    assert {queue.where(key) for key in started} == {"128"}
    queue.ended("3", 4.0)
    assert _all(queue, 4.0) == ["6"]


def test_a_trial_whose_node_is_not_told_yet_is_taken_to_be_where_it_was_sent() -> None:
    """Also when all is laid out anew, for what is told of others or since a node joined."""
    nodes = [Node(name=name, cpus=8, gpus=1) for name in "xyz"]
    queue = Queue([_job(key, 1, 9) for key in "abc"], Cluster(nodes=tuple(nodes)))
    assert _all(queue, 0.0) == ["a", "b", "c"]
    sent = {key: str(queue.where(key)) for key in "abc"}
    assert queue.avoid("a", sent["a"])
    queue.lost("a", 1.0)
    queue.ended("b", 2.0)
    assert _all(queue, 2.0) == ["a"]
    assert queue.where("a") == sent["b"]
    queue.started("a", [], 3.0)
    assert queue.where("a") == sent["b"]
    queue.started("c", [sent["c"]], 3.0)
    queue.move(Cluster(nodes=(*nodes[::-1], Node(name="w", cpus=8, gpus=1))))
    assert (queue.where("a"), queue.where("c")) == (sent["b"], sent["c"])


def test_a_trial_avoids_nodes_while_another_could_hold_it() -> None:
    nodes = [Node(name=name, cpus=8, gpus=gpus) for name, gpus in (("x", 1), ("y", 1), ("z", 0))]
    queue = Queue([_job("a", 1, 9), _job("b", 1, 8), _job("c", 1, 7)], Cluster(nodes=tuple(nodes)))
    assert _all(queue, 0.0) == ["a", "b"]
    bad, good = (str(queue.where(key)) for key in "ab")
    assert queue.avoid("a", bad)
    queue.lost("a", 1.0)
    assert _all(queue, 1.0) == ["c"]  # which passes a: that waits for b's node
    queue.ended("c", 2.0)
    assert _all(queue, 2.0) == []
    assert queue.relay("b", 3.0) == "a"
    assert queue.where("a") == good
    assert not queue.avoid("a", good)  # z has no GPU
    queue.lost("a", 4.0)
    assert _all(queue, 4.0) == ["a"]


def test_a_wide_trial_holds_a_reservation_that_short_ones_may_use() -> None:
    """One node of 4: `two` runs until 10, and then `wide` starts. From 1.75 on, 8 s may pass it."""
    jobs = [_job("two", 2, 10), _job("wide", 4, 9), _job("long", 1, 8.5), _job("short", 1, 8)]
    queue = Queue(jobs, uniform(gpus=4))
    assert queue.next(0.0) == "two"
    assert _all(queue, 1.75) == ["short"]
    queue.ended("two", 10.0)
    assert _all(queue, 10.0) == []  # short is late, and wide still comes before long
    queue.ended("short", 11.0)
    assert _all(queue, 11.0) == ["wide"]


def test_a_wide_trial_does_not_starve_while_narrow_ones_keep_coming() -> None:
    """Three GPUs are busy, in turn, until 10, 11 and 12 when a fourth joins, which `wide` needs."""
    first = [_job(f"first {i}", 1, 10 + i) for i in range(3)]
    later = [_job(f"narrow {i}", 1, 9) for i in range(9)]
    queue = Queue([*first, *later, _job("wide", 4, 9.5)], uniform(gpus=3))
    assert _all(queue, 0.0) == ["first 2", "first 1", "first 0"]
    queue.move(uniform(gpus=4))
    assert _all(queue, 2.0) == ["narrow 0"]  # which ends before there is room
    for i in range(3):
        queue.ended(f"first {i}", 10.0 + i)
        if i == 1:
            queue.ended("narrow 0", 11.0)
        started = _all(queue, 10.0 + i)
        assert started == (["wide"] if i == 2 else [])


def test_a_long_trial_passes_where_nothing_is_reserved() -> None:
    """Node a is free at 60 and b at 100: `wide` waits for a, and `long` takes what is left of b."""
    jobs = [_job("on b", 3, 100), _job("on a", 3, 60), _job("wide", 4, 50), _job("long", 1, 40)]
    queue = Queue(jobs, uniform(nodes=2, gpus=4))
    assert [queue.next(0.0), queue.next(0.0)] == ["on b", "on a"]
    assert _all(queue, 50.0) == ["long"]
    queue.ended("on a", 60.0)
    assert _all(queue, 60.0) == ["wide"]


def test_shares_are_packed_so_that_whole_gpus_stay_whole() -> None:
    quarters = [_job(f"{i}", 1 / 4, 10) for i in range(5)]  # on two GPUs
    queue = Queue([*quarters, _job("two", 2, 5)], uniform(gpus=4))
    assert _all(queue, 0.0) == [*"01234", "two"]


def test_a_share_does_not_straddle_two_gpus() -> None:
    jobs = [*(_job(k, 3 / 4, 10) for k in "ab"), _job("half", 1 / 2, 5)]
    assert _all(Queue(jobs, uniform(gpus=2)), 0.0) == ["a", "b"]  # a quarter is free on each


def test_several_whole_nodes_are_taken_together() -> None:
    queue = Queue([_job("one", 1, 10), _job("both", 8, 9, nodes=2)], uniform(nodes=2, gpus=4))
    assert _all(queue, 0.0) == ["one"]
    queue.ended("one", 10.0)
    assert _all(queue, 10.0) == ["both"]
    assert queue.next(11.0) is None


def test_cores_run_out_too() -> None:
    """Two cores for eight GPUs: two trials at once."""
    queue = Queue([_job(k, 1, 10) for k in "abc"], uniform(gpus=8, cpus=2))
    assert _all(queue, 0.0) == ["a", "b"]


def test_a_type_that_is_asked_for_is_given() -> None:
    nodes = (
        Node(name="a", cpus=8, gpus=1, gpu_type="L4"),
        Node(name="b", cpus=8, gpus=1, gpu_type="H100"),
    )
    pinned = Placement(gpus=1, gpu_type="H100")
    jobs = [Job(key=k, placement=pinned, seconds=5) for k in "xy"]
    queue = Queue(jobs, Cluster(nodes=nodes))
    assert _all(queue, 0.0) == ["x"]


def test_no_more_trials_than_slots() -> None:
    queue = Queue([_job(k, 1, 10) for k in "abc"], uniform(gpus=8), slots=2)
    assert _all(queue, 0.0) == ["a", "b"]
    queue.ended("b", 1.0)
    assert _all(queue, 1.0) == ["c"]


def test_a_lost_trial_takes_its_place_again() -> None:
    queue = Queue([_job("long", 1, 9), _job("mid", 1, 5), _job("short", 1, 2)], uniform(gpus=1))
    assert _all(queue, 0.0) == ["long"]
    queue.lost("long", 4.0)
    assert _all(queue, 4.0) == ["long"]
    queue.ended("long", 13.0)
    assert _all(queue, 13.0) == ["mid"]


def test_nodes_that_join_are_used_and_nodes_that_leave_are_not() -> None:
    two = uniform(nodes=2, gpus=1)
    queue = Queue([_job(k, 1, 10) for k in "abcd"], Cluster(nodes=two.nodes[:1]))
    assert _all(queue, 0.0) == ["a"]
    queue.started("a", ["node 1"], 0.0)
    queue.move(two)
    assert _all(queue, 1.0) == ["b"]
    queue.started("b", ["node 2"], 0.0)
    queue.move(Cluster(nodes=two.nodes[1:]))
    queue.lost("a", 2.0)
    assert _all(queue, 2.0) == []
    queue.ended("b", 11.0)
    assert _all(queue, 11.0) == ["a"]


def test_what_no_node_can_hold_now_holds_up_nobody() -> None:
    """Its nodes may join later; until then a reservation would be for ever."""
    queue = Queue([_job("wide", 8, 100), _job("small", 1, 1)], uniform(gpus=4))
    assert _all(queue, 0.0) == ["small"]
    queue.move(uniform(gpus=8))
    queue.ended("small", 1.0)
    assert _all(queue, 1.0) == ["wide"]


def test_where_a_trial_runs_corrects_the_guess() -> None:
    """Two halves were taken to share a GPU; Ray put them on two, so no whole one is left."""
    cluster = uniform(nodes=2, gpus=1)
    queue = Queue([*(_job(k, 1 / 2, 10) for k in "ab"), _job("whole", 1, 5)], cluster)
    assert [queue.next(0.0), queue.next(0.0)] == ["a", "b"]
    queue.started("a", ["node 1"], 0.0)
    queue.started("b", ["node 2"], 0.0)
    assert _all(queue, 0.0) == []
    queue.ended("b", 1.0)
    assert _all(queue, 1.0) == ["whole"]


def test_the_next_of_a_class_follows_where_one_ends() -> None:
    queue = Queue([_job(k, 1, 10) for k in "abc"], uniform(nodes=2, gpus=1))
    assert _all(queue, 0.0) == ["a", "b"]
    queue.started("b", ["node 1"], 0.0)
    queue.started("a", ["node 2"], 0.0)
    assert queue.relay("a", 10.0) == "c"
    assert queue.where("c") == "node 2"
    assert (queue.running, queue.waiting) == ({"b", "c"}, 0)
    assert queue.relay("b", 10.0) is None
    assert queue.running == {"b", "c"}  # until its process has gone
    queue.ended("b", 10.1)
    assert queue.running == {"c"}


def test_a_follower_is_where_its_process_is() -> None:
    """Also when what is known of another trial has everything laid out anew."""
    queue = Queue([_job(k, 1, 10) for k in "abcd"], uniform(nodes=2, gpus=2))
    assert _all(queue, 0.0) == ["a", "b", "c", "d"]
    for key, node in zip("abcd", (2, 1, 2, 1), strict=True):
        queue.started(key, [f"node {node}"], 0.0)
    queue.lost("b", 5.0)
    assert queue.relay("a", 10.0) == "b"
    queue.started("d", ["node 1"], 10.0)
    assert queue.where("b") == "node 2"


def test_a_follower_does_not_take_the_room_that_is_kept_for_a_wide_one() -> None:
    """There is room beside it, but that is elsewhere."""
    narrow = [_job(f"n{i}", 1, 1000 - i) for i in range(20)]
    queue = Queue(
        [_job("wide", 4, 5000), *narrow], uniform(nodes=2, gpus=4), order="widest first", slots=3
    )
    queue.move(uniform(nodes=1, gpus=3))
    assert _all(queue, 0.0) == ["n0", "n1", "n2"]
    for key in ("n0", "n1", "n2"):
        queue.started(key, ["node 1"], 0.0)
    queue.move(uniform(nodes=2, gpus=4))
    now, started = 0.0, None
    while started is None and now < 9000:
        now += 1000.0
        for key in sorted(queue.running):
            if queue.relay(key, now) is None:
                queue.ended(key, now)
        started = now if "wide" in _all(queue, now) else None
    assert started is not None
    assert started <= 3000


def test_one_of_another_class_waits_until_the_process_of_the_last_has_gone() -> None:
    """The shorter one of the same class does not pass the longer one of another."""
    jobs = [_job("a", 1, 10), _job("wide", 2, 8), _job("half", 1 / 2, 9), _job("b", 1, 5)]
    queue = Queue(jobs, uniform(gpus=1))
    assert _all(queue, 0.0) == ["a"]
    assert queue.relay("a", 10.0) is None
    assert _all(queue, 10.0) == []
    queue.ended("a", 10.1)
    assert _all(queue, 10.1) == ["half"]


def test_what_a_trial_took_is_charged_once_and_lets_in_others_at_its_end() -> None:
    caps = Caps(gpu_hours=20 / 3600)
    queue = Queue([_job(k, 1, s) for k, s in (("a", 12), ("b", 9))], uniform(gpus=1), caps=caps)
    assert (_all(queue, 0.0), queue.held) == (["b"], {"a": "gpu_hours"})
    queue.started("b", [], 0.0)
    assert queue.relay("b", 8.0) == "a"  # a second less than expected
    queue.ended("a", 20.0)
    assert (queue.running, queue.held) == (frozenset(), {})


@pytest.mark.parametrize(
    ("caps", "held"),
    [
        (Caps(flops=6), {"dear": "flops"}),
        (Caps(flops=2), {"dear": "flops", "mid": "flops"}),
        (Caps(gpu_hours=6), {"dear": "gpu_hours"}),
        (Caps(money=6, price_per_gpu_hour=2), {"dear": "money", "mid": "money"}),
        (Caps(money=6), {}),  # without a price
        (Caps(deadline=4 * 3600), {"dear": "deadline"}),
        (Caps(flops=14), {}),
    ],
)
def test_caps_hold_back_the_dearest(caps: Caps, held: dict[str, str]) -> None:
    """1, 4 and 9 FLOPs, and as many GPU-hours in one, two and three GPUs."""
    jobs = [
        _job("cheap", 1, 3600, flops=1),
        _job("mid", 2, 2 * 3600, flops=4),
        _job("dear", 2, 4.5 * 3600, flops=9),
    ]
    queue = Queue(jobs, uniform(gpus=8), caps=caps)
    started = _all(queue, 0.0)
    assert queue.held == held
    assert sorted(started) == sorted({"cheap", "mid", "dear"} - set(held))


def test_what_was_saved_lets_in_another_and_what_was_wasted_keeps_it_out() -> None:
    hour = 3600.0
    jobs = [_job("a", 1, hour), _job("b", 1, hour), _job("c", 1, 1.5 * hour)]
    for took, started in ((0.25 * hour, ["c"]), (1.25 * hour, [])):
        queue = Queue(jobs, uniform(gpus=8), caps=Caps(gpu_hours=3))
        assert _all(queue, 0.0) == ["a", "b"]
        assert queue.held == {"c": "gpu_hours"}
        queue.ended("a", took)
        assert _all(queue, took) == started


def test_a_deadline_is_kept_as_time_goes_by() -> None:
    jobs = [_job("long", 1, 10), _job("mid", 1, 6), _job("short", 1, 3)]
    queue = Queue(jobs, uniform(gpus=1), caps=Caps(deadline=14))
    assert _all(queue, 0.0) == ["long"]
    queue.ended("long", 10.0)
    assert _all(queue, 10.0) == ["short"]
    assert queue.held == {"mid": "deadline"}


PLACEMENTS = st.sampled_from(
    [CORE, *(Placement(gpus=g) for g in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)), Placement(gpus=8, nodes=2)]
)


@settings(max_examples=60, deadline=None)
@given(
    work=st.lists(st.tuples(PLACEMENTS, st.floats(0.1, 50), st.floats(0.2, 3)), max_size=30),
    order=st.sampled_from(["longest first", "largest first", "widest first"]),
)
def test_nothing_is_oversubscribed_and_everything_runs_though_times_are_wrong(work, order) -> None:
    """Expected times are wrong, by up to five times; what runs is added up apart from the queue."""
    cluster = uniform(nodes=2, gpus=4, cpus=6)
    jobs = [Job(key=f"{i:02}", placement=p, seconds=s) for i, (p, s, _) in enumerate(work)]
    queue = Queue(jobs, cluster, order=order)
    ends: dict[str, float] = {}
    done: set[str] = set()
    now = 0.0
    while True:
        for key in _all(queue, now):
            _, expected, factor = work[int(key)]
            ends[key] = now + expected * factor
        running = [work[int(key)][0] for key in ends if key not in done]
        shares = sum(p.gpus for p in running if p.gpus < 1)
        assert sum(p.gpus for p in running if p.gpus >= 1) + math.ceil(shares) <= 8
        assert sum(p.cpus for p in running) <= 12
        waiting = ends.keys() - done
        if not waiting:
            break
        key = min(waiting, key=lambda k: (ends[k], k))
        now = ends[key]
        done.add(key)
        queue.ended(key, now)
    assert len(done) == len(work)
    assert queue.waiting == 0


def test_a_lost_trial_costs_its_flops_once() -> None:
    jobs = [Job(key=k, placement=Placement(), seconds=10.0, flops=1e10) for k in "abcd"]
    queue = Queue(jobs, uniform(cpus=1), caps=Caps(flops=4e10))
    first = queue.next(0.0)
    assert first is not None
    queue.lost(first, 1.0)
    now, ran = 1.0, []
    while (key := queue.next(now)) is not None:
        now += 10.0
        ran.append(key)
        queue.ended(key, now)
    assert sorted(ran) == ["a", "b", "c", "d"]
    assert queue.held == {}


def test_waiting_for_others_jobs_costs_no_gpu_hours() -> None:
    one = Placement(gpus=1.0)
    jobs = [Job(key=k, placement=one, seconds=3600.0) for k in "ab"]
    queue = Queue(jobs, uniform(gpus=1), caps=Caps(gpu_hours=2.5))
    assert queue.next(0.0) == "a"
    queue.started("a", ["node 1"], 18_000.0)
    queue.ended("a", 21_600.0)
    assert queue.next(21_600.0) == "b"


def test_what_is_kept_back_starts_neither_by_itself_nor_by_a_cap_that_opens() -> None:
    jobs = [_job(key, 1, seconds) for key, seconds in (("a", 3000.0), ("b", 1800.0), ("c", 900.0))]
    queue = Queue(jobs, uniform(gpus=1), caps=Caps(gpu_hours=1.0))
    assert queue.next(0.0) == "b"
    assert (set(queue.held), queue.waiting_keys) == ({"a"}, {"c"})
    queue.keep_back()
    queue.started("b", [], 0.0)
    queue.ended("b", 1.0)  # it took next to nothing, which the cap lets others have
    assert (queue.kept_back, queue.waiting_keys) == ({"c"}, {"a"})
    queue.keep_back({"a"})
    assert _all(queue, 1.0) == ["a"]
    queue.let_go()  # what the cap promised to the other is no longer there for it
    assert (queue.kept_back, set(queue.held), queue.waiting) == (set(), {"c"}, 0)
    queue.started("a", [], 1.0)
    queue.ended("a", 2.0)
    assert _all(queue, 2.0) == ["c"]
