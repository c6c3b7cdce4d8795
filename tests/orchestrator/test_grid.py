"""What Tune is handed, with the real queue: in which order, when, and how often again."""

import json
import pickle
import random
from dataclasses import replace

import pytest

from cluster.budget import Caps
from cluster.machines import Cluster, uniform
from cluster.placement import Placement
from cluster.queue import Job
from orchestrator.first_failures import FirstFailures
from orchestrator.grid import ASK_SECONDS, LOOK_SECONDS, SAME_FLOPS
from tests.orchestrator.grids import CORE, GPU, ORDER, TWO_GPUS, Tune, cluster_of, cores
from trainers.flops import flops_per_token


def test_the_longest_come_first_each_with_its_class() -> None:
    jobs = [Job(key="short", placement=GPU, seconds=5), Job(key="long", placement=CORE, seconds=9)]
    tune = Tune(jobs, uniform(gpus=1, cpus=4))
    first, second = (tune.grid.suggest(name) for name in ("1", "2"))
    assert (first["key"], second["key"]) == ("long", "short")
    assert json.loads(second["placement"]) == {
        "bundles": [{"CPU": 1.0, "GPU": 1.0}],
        "strategy": "STRICT_PACK",
        "node": "node 1",
        "line": "2",
    }


def test_the_next_of_a_class_is_handed_out_before_tune_ends_the_actor_of_the_last() -> None:
    """Tune keeps an actor only for a trial that it knows by then."""
    tune = Tune(cores(3), uniform(cpus=1))
    assert tune.ask_all() == ["a"]
    for key, follower in ("ab", "bc"):
        tune.grid.seen(key, "actor", "node 1", "group")
        tune.there = {"group"}
        tune.grid.measured(key)
        assert tune.ask_all() == [follower]
        tune.grid.on_trial_complete(tune.handed.pop(key), {})
        assert tune.ask_all() == []
    tune.grid.measured("c")
    assert tune.ask() == ""


def test_another_class_waits_until_the_room_is_free() -> None:
    """Ray would put it wherever there is room just now."""
    jobs = [Job(key=k, placement=GPU, seconds=9) for k in ("one", "two")]
    jobs.append(Job(key="core", placement=CORE, seconds=5))
    tune = Tune(jobs, uniform(nodes=2, gpus=1, cpus=1))
    assert tune.ask_all() == ["one", "two"]
    tune.grid.seen("one", "actor", "node 1", "group")
    tune.there = {"group"}
    tune.grid.measured("one")
    assert tune.ask() is None
    tune.grid.on_trial_complete(tune.handed.pop("one"), {})
    assert tune.ask() is None
    tune.now += ASK_SECONDS
    assert tune.ask() is None
    tune.there = set()
    tune.now += ASK_SECONDS
    assert tune.ask() == "core"


def test_tune_ends_an_actor_only_when_it_has_another_trial() -> None:
    """While it has none, it asks for one and does nothing else."""
    jobs = [Job(key="one", placement=GPU, seconds=9), Job(key="core", placement=CORE, seconds=5)]
    tune = Tune(jobs, uniform(gpus=1, cpus=1))
    assert tune.ask_all() == ["one"]
    tune.grid.seen("one", "actor", "node 1", "group")
    tune.there = {"group"}
    tune.end("one")
    assert tune.ask() == "core"


def test_while_nothing_fits_somebody_may_say_so() -> None:
    tune = Tune(cores(1), uniform(cpus=0))
    assert tune.ask() is None
    tune.now = 1.0
    assert tune.ask() is None
    assert tune.idle == [0.0, 1.0]


def test_a_trial_that_stops_although_nobody_wants_it_to_starts_again() -> None:
    """Its node sees no lease any more: the share is unmounted there."""
    tune = Tune(cores(1), uniform(cpus=1), restarts=1)
    for _ in range(2):
        assert tune.ask() == "a"
        tune.grid.on_trial_complete(tune.handed.pop("a"), {})
    assert tune.ask() == ""


def test_a_node_that_cannot_work_on_the_sweep_gets_no_more_trials() -> None:
    jobs = [Job(key=k, placement=GPU, seconds=s) for k, s in (("a", 9), ("b", 8), ("c", 7))]
    tune = Tune(jobs, cluster_of("x", "y", gpus=1), restarts=0)
    assert tune.ask_all() == ["a", "b"]
    tune.grid.started("b", "actor b")
    tune.grid.seen("b", "actor b", "y", "")
    tune.grid.on_trial_complete(tune.handed.pop("b"), error=True)
    tune.grid.unfit("b")
    tune.now += ASK_SECONDS
    assert tune.ask_all() == []
    tune.end("a")
    asked = tune.grid.suggest("again")
    assert (asked["key"], json.loads(asked["placement"])["node"]) == ("b", "x")


def test_what_a_trial_leaves_of_a_cap_lets_in_another_at_its_end() -> None:
    jobs = [Job(key=k, placement=GPU, seconds=s) for k, s in (("a", 3600), ("b", 3000))]
    tune = Tune(jobs, uniform(gpus=1), caps=Caps(gpu_hours=1.5))
    assert tune.ask_all() == ["b"]
    tune.grid.started("b", "actor")
    tune.now = 1000.0
    tune.end("b")
    assert tune.ask_all() == ["a"]


def test_the_cluster_is_asked_to_grow_while_trials_wait() -> None:
    tune = Tune(cores(2), uniform(cpus=1))
    for key in "ab":
        tune.now += LOOK_SECONDS
        assert tune.ask_all() == [key]
        tune.now += LOOK_SECONDS
        assert tune.ask_all() == []
        tune.end(key)
    assert tune.wished == [True, True, True, False]


def test_a_trial_whose_actor_dies_after_its_row_is_over() -> None:
    tune = Tune(cores(1), uniform(cpus=1))
    assert tune.ask() == "a"
    tune.grid.measured("a")
    tune.grid.on_trial_complete(tune.handed.pop("a"), error=True)
    assert tune.ask() == ""


def test_nothing_is_handed_out_beyond_the_slots() -> None:
    tune = Tune(cores(9), uniform(cpus=8), slots=3)
    assert tune.ask_all() == list("abc")
    tune.end("b")
    assert tune.ask_all() == list("d")


def test_it_waits_for_the_last_to_end_and_then_is_done() -> None:
    tune = Tune(cores(2), uniform(cpus=2))
    assert tune.ask_all() == list("ab")
    tune.end("a")
    assert tune.ask() is None
    tune.end("b")
    assert tune.ask() == ""


@pytest.mark.parametrize("kind", ["raised", "silent", "slow"])
def test_a_trial_to_blame_is_tried_again_as_often_as_retries_say(kind: str) -> None:
    tune = Tune(cores(6), uniform(cpus=1), retries=2)
    assert tune.ask_all() == ["a"]
    for _ in range(2):
        assert tune.fail("a", kind)
        assert tune.ask_all() == ["a"]  # in its own place again, before the shorter ones
    assert not tune.fail("a", kind)
    assert tune.ask_all() == ["b"]


def test_losses_count_against_restarts_and_not_against_retries() -> None:
    tune = Tune(cores(1), uniform(cpus=1), retries=0, restarts=2)
    again = []
    for kind in ("worker lost", "node lost", "worker lost"):
        assert tune.ask() == "a"
        again.append(tune.fail("a", kind))
    assert again == [True, True, False]
    tune = Tune(cores(1), uniform(cpus=1), retries=0, restarts=2)
    assert tune.ask() == "a"
    assert not tune.fail("a", "raised")


def test_losses_are_forgiven_while_a_trial_gets_further() -> None:
    """On spot machines a long trial loses its node often, each time after another checkpoint."""
    tune = Tune(cores(1), uniform(cpus=1), restarts=1)
    for step in (0, 10, 20):
        assert tune.ask() == "a"
        assert tune.fail("a", "node lost", step=step)
    assert tune.ask() == "a"
    assert not tune.fail("a", "node lost", step=20)


def test_what_can_never_work_is_not_tried_again() -> None:
    tune = Tune(cores(1), uniform(cpus=1), retries=9)
    assert tune.ask() == "a"
    assert not tune.fail("a", "raised", hopeless=True)
    assert tune.ask() == ""


def test_a_sweep_that_stops_hands_out_nothing_and_tries_nothing_again() -> None:
    tune = Tune(cores(9), uniform(cpus=2))
    assert tune.ask_all() == list("ab")
    tune.stop.interrupted = True
    assert tune.ask() == ""
    assert not tune.fail("a", "worker lost")


def test_a_node_that_joins_is_used_from_the_next_look_on() -> None:
    """A trial of two GPUs waits for a machine that has them."""
    jobs = [
        Job(key="wide", placement=TWO_GPUS, seconds=9),
        Job(key="one", placement=GPU, seconds=5),
    ]
    tune = Tune(jobs, cluster_of("small", gpus=1))
    assert tune.ask_all() == ["one"]
    tune.cluster = Cluster(nodes=(*cluster_of("small", gpus=1).nodes, *cluster_of("large").nodes))
    tune.now = LOOK_SECONDS - 0.1
    assert tune.ask() is None
    tune.now = LOOK_SECONDS
    assert tune.ask_all() == ["wide"]


def test_a_node_that_left_holds_no_room() -> None:
    """Both trials of two GPUs, one node left: the second comes when the first has ended."""
    jobs = [Job(key=k, placement=TWO_GPUS, seconds=s) for k, s in (("a", 9), ("b", 5))]
    wide = Job(key="c", placement=Placement(gpus=4.0, nodes=2), seconds=1)
    tune = Tune([*jobs, wide], cluster_of("x", "y"))
    assert tune.ask_all() == ["a", "b"]
    for key, node in (("a", "x"), ("b", "y")):
        tune.grid.started(key, f"actor {key}")
        tune.grid.seen(key, f"actor {key}", node, "")
    tune.cluster = cluster_of("x")
    tune.now = LOOK_SECONDS
    assert tune.fail("a", "slow")
    assert tune.fail("b", "node lost")
    assert tune.ask() == "a"
    assert tune.grid.queue.next(tune.now) is None  # b has no room
    tune.end("a")
    tune.cluster = cluster_of("x", "y")
    tune.now += LOOK_SECONDS
    assert tune.ask_all() == ["b"]
    tune.end("b")
    assert tune.ask_all() == ["c"]


def test_ray_is_told_on_which_node_there_is_room() -> None:
    """Two of one GPU on the first node, so that a node stays whole for the one of two GPUs."""
    jobs = [Job(key=k, placement=GPU, seconds=s) for k, s in (("a", 9), ("b", 8))]
    jobs.append(Job(key="wide", placement=TWO_GPUS, seconds=1))
    tune = Tune(jobs, cluster_of("x", "y"))
    asked = [json.loads(tune.grid.suggest(str(i))["placement"])["node"] for i in range(3)]
    assert asked == ["x", "x", "y"]


@pytest.mark.parametrize(("nodes", "expected"), [(("x", "x"), ["wide"]), (("x", "y"), [])])
def test_where_actors_are_decides_what_fits(nodes: tuple[str, str], expected: list[str]) -> None:
    """Two trials of one GPU leave two on one node, or one on each."""
    jobs = [Job(key=k, placement=GPU, seconds=s) for k, s in (("a", 100), ("b", 90))]
    jobs.append(Job(key="wide", placement=TWO_GPUS, seconds=50))
    tune = Tune(jobs, cluster_of("x", "y"))
    assert [tune.ask(), tune.ask()] == ["a", "b"]
    for key, node in zip("ab", nodes, strict=True):
        tune.grid.started(key, f"actor {key}")
        tune.grid.seen(key, f"actor {key}", node, "")
    assert tune.ask_all() == expected


@pytest.mark.parametrize(("actor", "expected"), [("actor a", []), ("actor z", ["wide"])])
def test_an_actor_that_is_used_again_is_where_it_was(actor: str, expected: list[str]) -> None:
    """Nothing is heard of d, but its actor has told once that it is on x, or that it is on y."""
    jobs = [Job(key=k, placement=GPU, seconds=100 - i) for i, k in enumerate("abcd")]
    jobs.append(Job(key="wide", placement=TWO_GPUS, seconds=50))
    tune = Tune(jobs, cluster_of("x", "y"), slots=3)
    assert tune.ask_all() == ["a", "b", "c"]
    tune.grid.seen("b", "actor z", "y", "")
    for key, node in (("a", "x"), ("b", "y"), ("c", "x")):
        tune.grid.started(key, f"actor {key}")
        tune.grid.seen(key, f"actor {key}", node, "")
    tune.end("a")
    assert tune.ask_all() == ["d"]
    tune.grid.started("d", actor)
    tune.end("c")
    assert tune.ask_all() == expected


@pytest.mark.parametrize("seed", range(20))
def test_whatever_fails_every_trial_ends_and_none_runs_twice_at_once(seed: int) -> None:
    """Trials of three classes start late, end, fail and are lost at random; nodes come and go."""
    rng = random.Random(seed)
    classes = (CORE, GPU, TWO_GPUS)
    jobs = [
        Job(key=f"{i}", placement=rng.choice(classes), seconds=rng.uniform(1, 100))
        for i in range(40)
    ]
    tune = Tune(jobs, cluster_of("x", "y"), retries=1, restarts=2)
    ended: dict[str, int] = {}
    tries: dict[str, int] = {}
    for _ in range(10_000):
        tune.now += rng.uniform(0, 3)
        tune.cluster = cluster_of(*rng.choice([("x",), ("x", "y"), ("x", "y", "z")]))
        key = tune.ask()
        if key == "":
            break
        if key is not None:
            tries[key] = tries.get(key, 0) + 1
            continue
        if not tune.handed:  # every node is left out for a while
            continue
        key = rng.choice(sorted(tune.handed))
        if rng.random() < 0.5:
            actor = f"actor {rng.randrange(5)}"
            tune.grid.started(key, actor)
            tune.grid.seen(key, actor, rng.choice("xyz"), rng.choice(["", "group"]))
            tune.there = {"group"} if rng.random() < 0.5 else set()
            continue
        kind = rng.choice(["end", "row", "row", "died", "raised", "worker lost", "left"])
        if kind == "end":
            tune.end(key)
        elif kind == "row":  # and then perhaps another takes over its actor before the end
            tune.grid.measured(key)
            follower = tune.ask()
            if follower:
                tries[follower] = tries.get(follower, 0) + 1
            tune.grid.on_trial_complete(tune.handed.pop(key), {})
        elif kind == "died":
            tune.grid.measured(key)
            tune.grid.on_trial_complete(tune.handed.pop(key), error=True)
        elif kind == "left":
            tune.grid.on_trial_complete(tune.handed.pop(key), {})
            ended[key] = ended.get(key, 0) + (not tune.grid._leaving[key].again)
            continue
        elif tune.fail(key, kind):
            continue
        ended[key] = ended.get(key, 0) + 1
    assert key == ""
    assert {k: n for k, n in ended.items() if n} == dict.fromkeys((job.key for job in jobs), 1)
    assert max(tries.values()) <= 1 + 1 + 2


def test_tune_may_pickle_it() -> None:
    grid = Tune(cores(1), uniform(cpus=1)).grid
    assert vars(pickle.loads(pickle.dumps(grid))) == {}


def test_a_mistake_is_not_tried_again_anywhere() -> None:
    jobs = [Job(key="a", placement=GPU, seconds=9)]
    tune = Tune(jobs, cluster_of("x", "y", gpus=1), retries=5)
    assert tune.ask() == "a"
    assert not tune.fail("a", "raised", mistaken=True)
    assert tune.ask() == ""


def test_of_what_waits_the_smallest_may_be_tried_while_the_rest_is_held_back() -> None:
    tune = Tune(cores(5), uniform(cpus=2), retries=0)
    sizes = dict(zip("abcde", (48, 40, 32, 24, 16), strict=True))
    for key, width in sizes.items():
        shape = replace(ORDER.trial.shape, width=width)
        order = tune.grid._orders[key]
        tune.grid._orders[key] = replace(order, trial=replace(order.trial, shape=shape))
    assert tune.ask_all() == ["a", "b"]
    assert not tune.fail("a", "raised")
    assert tune.grid.hold_back({"a", "b"}) == "e"
    assert tune.ask() == "e"
    assert tune.ask() is None  # b and e run
    assert tune.grid.queue.kept_back == {"c", "d"}
    assert not tune.fail("b", "raised")
    assert tune.ask() is None
    tune.end("e")
    tune.grid.queue.let_go()
    assert tune.ask_all() == ["c", "d"]


def test_a_sweep_ends_while_the_rest_is_held_back() -> None:
    """With equal sizes there is no smaller trial to try before the rest is given up."""
    tune = Tune(cores(3), uniform(cpus=1), retries=0)
    assert tune.ask() == "a"
    assert not tune.fail("a", "raised")
    assert tune.grid.hold_back({"a"}) is None
    assert tune.ask() == ""
    assert tune.grid.queue.kept_back == {"b", "c"}


def _sizes(tune: Tune, **sizes: tuple[int, int]) -> None:
    """Have the trials such widths and steps."""
    for key, (width, steps) in sizes.items():
        order = tune.grid._orders[key]
        shape = replace(order.trial.shape, width=width)
        recipe = replace(order.trial.hyperparameters, steps=steps)
        trial = replace(order.trial, shape=shape, hyperparameters=recipe)
        tune.grid._orders[key] = replace(order, trial=trial)


def _top_budget_fails() -> tuple[Tune, FirstFailures]:
    """A sweep of equal widths, whose three trials of the top budget have failed alike."""
    tune = Tune(cores(7), uniform(cpus=1), retries=0)
    small, large = dict.fromkeys("defg", (16, 100)), dict.fromkeys("abc", (16, 400))
    _sizes(tune, **small, **large)
    first = FirstFailures(tune.grid.hold_back, tune.grid.queue.let_go)
    for key in "abc":
        assert tune.ask() == key
        assert not tune.fail(key, "raised")
        first.failed(key, "exited with 1: the corpus has no more tokens")
    return tune, first


def test_failures_at_the_top_budget_only_leave_the_rest_running() -> None:
    """Their cause grows with tokens: of equal widths the small budget may be spared."""
    tune, first = _top_budget_fails()
    assert first.reason is None
    assert tune.ask_all() == ["d"]
    tune.end("d")
    first.measured()
    for key in "efg":
        assert tune.ask() == key
        tune.end(key)
    assert tune.ask() == ""
    assert tune.rows == set("defg")


def test_a_small_budget_that_fails_alike_gives_the_rest_up() -> None:
    tune, first = _top_budget_fails()
    assert tune.ask() == "d"
    assert not tune.fail("d", "raised")
    first.failed("d", "exited with 1: the corpus has no more tokens")
    assert first.reason == "exited with 1: the corpus has no more tokens"
    assert tune.ask() == ""
    assert tune.grid.queue.kept_back == set("efg")


def test_of_one_budget_the_narrowest_is_tried() -> None:
    """FLOPs of one budget differ as steps are rounded, which is no size."""
    tune = Tune(cores(4), uniform(cpus=1), retries=0)
    _sizes(tune, a=(32, 400), b=(64, 100), c=(48, 160), d=(16, 1000))
    flops = {
        key: flops_per_token(order.trial.shape) * order.trial.tokens
        for key, order in tune.grid._orders.items()
    }
    assert tune.ask() == "a"
    assert not tune.fail("a", "raised")
    assert min("bcd", key=lambda key: flops[key]) == "c"
    assert max(flops[key] for key in "bcd") < SAME_FLOPS * flops["c"]
    assert tune.grid.hold_back({"a"}) == "d"
