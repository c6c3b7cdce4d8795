"""Gangs on a real cluster of two nodes with two fake GPUs each, and with a real rendezvous."""

import dataclasses
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from analysis.errors import InputError
from cluster.gang import GRACE_SECONDS, GangError, train_in_gang
from cluster.machines import UnfitNodeError
from cluster.rank import Sign
from tests.waiting import wait
from trainers.registry import trainer
from trainers.simulated import Simulated, SimulatedSettings
from trainers.template import GRANTED, Command
from trainers.trial import Event, Measurement, Progress, Step, Trial
from trainers.workspace import Scratch, Workspace

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import tests

ON_ONE_NODE = [{"CPU": 2.0, "GPU": 2.0}]
ON_TWO_NODES = [{"CPU": 2.0, "GPU": 2.0}, {"CPU": 2.0, "GPU": 2.0}]
ONE_ON_EACH = [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}]
HELD_BY_THE_SWEEP = {"CPU": 8.0, "GPU": 4.0}


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    """Two raylets on this machine, two fake GPUs each."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    patch.setenv(GRANTED, "0")  # trainers stay on the CPU where there are real ones
    node = {"num_cpus": 4, "num_gpus": 2, "object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()
    patch.undo()


class Leader:
    """Stands where the Tune actor of a trial would."""

    def __init__(self) -> None:
        self._events: Iterator[Event] | None = None

    def train(self, trial: Trial, directory: Path, make: Callable[[str], Any]) -> list[Event]:
        return list(
            train_in_gang(trial, lambda tell: Scratch(directory, keeps_models=True), make=make)
        )

    def train_on_an_unfit_node(self, trial: Trial) -> list[Event | Sign]:
        return list(train_in_gang(trial, _unfit))

    def train_tardily(self, trial: Trial, make: Callable[[str], Any]) -> list[Event | Sign]:
        return list(train_in_gang(trial, _tardy, make=make))

    def train_and_stop(self, trial: Trial, directory: Path) -> list[Event]:
        events = train_in_gang(trial, lambda tell: Scratch(directory))
        seen = []
        for event in events:
            seen.append(event)
            if len(seen) > 5:
                break
        events.close()
        return seen

    def train_until_asked(self, trial: Trial, directory: Path) -> tuple[list[Any], float]:
        """Return the measurements up to the stop, and the seconds that the program took to end."""
        asked: list[float] = []

        def stopping() -> bool:
            asked.append(time.monotonic())
            return (directory / "begun").exists()

        events = train_in_gang(trial, lambda tell: Scratch(directory), stopping=stopping)
        seen = [next(events)]
        events.close()
        return seen, time.monotonic() - asked[-1]

    def train_and_close(self, trial: Trial, directory: Path, make: Callable[[str], Any]) -> float:
        """Seconds that it takes to end after a few events."""
        events = train_in_gang(trial, lambda tell: Scratch(directory), make=make)
        for _ in range(5):
            next(events)
        closing = time.monotonic()
        events.close()
        return time.monotonic() - closing

    def begin(self, trial: Trial, directory: Path, make: Callable[[str], Any]) -> Event:
        self._events = train_in_gang(trial, lambda tell: Scratch(directory), make=make)
        return next(self._events)

    def go_on(self) -> None:
        assert self._events is not None
        for _ in self._events:
            pass


def _unfit(tell: Callable[[str], None]) -> Scratch:
    raise UnfitNodeError("its GPU does not work")


@pytest.fixture
def leader(two_nodes: None) -> Iterator[Callable[..., Any]]:
    """Makes leaders in groups of the given bundles; afterwards nothing may be left reserved."""
    groups = []

    def make(bundles: list[dict[str, float]], **taken: float) -> Any:
        strategy = "STRICT_PACK" if len(bundles) == 1 else "STRICT_SPREAD"
        group = placement_group(bundles, strategy)
        ray.get(group.ready(), timeout=60)
        groups.append(group)
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        options = {"num_cpus": 0, **taken, "scheduling_strategy": place}
        return ray.remote(Leader).options(**options).remote()

    yield make
    for group in groups:
        remove_placement_group(group)
    wait(lambda: _free() == HELD_BY_THE_SWEEP)


def _free() -> dict[str, float]:
    available = ray.available_resources()
    return {name: available.get(name, 0.0) for name in HELD_BY_THE_SWEEP}


@pytest.fixture
def trial(make_trial) -> Trial:
    """A simulated one, of 20 ms a step."""
    return _told(make_trial(24, 4e10), noise=0.01)


def _told(trial: Trial, **told: float) -> Trial:
    settings = dataclasses.asdict(SimulatedSettings(**told))
    return dataclasses.replace(trial, trainer="simulated", settings=tuple(sorted(settings.items())))


def _simulated(name: str) -> Simulated:
    return Simulated()


class Reducing:
    """Meets the other ranks and adds up rank + 1: first where everybody sits, then for ever."""

    def __init__(self, *, rounds: int = 0, culprit: int = -1) -> None:
        self._rounds, self._culprit = rounds, culprit

    def train(self, trial: Trial, workspace: Workspace) -> Iterator[Event]:
        import torch
        import torch.distributed as dist

        rank = int(os.environ["RANK"])
        dist.init_process_group("gloo")
        total = torch.tensor([rank + 1.0])
        dist.all_reduce(total)
        places: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
        names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
        dist.all_gather_object(
            places,
            {name: os.environ[name] for name in names}
            | {
                "pid": os.getpid(),
                "node": ray.get_runtime_context().get_node_id(),
                "group": ray.get_runtime_context().get_placement_group_id(),
            },
        )
        workspace.directory.mkdir(exist_ok=True)
        (workspace.directory / f"{rank}.json").write_text(json.dumps(places))
        yield Progress(step=1, tokens=1, flops=1.0, train_loss=total.item())
        for i in range(self._rounds):
            if i == 3 and rank == self._culprit:
                raise ValueError(f"rank {rank} has had enough")
            dist.all_reduce(total)
            time.sleep(0.05)
            yield Step(i + 2)
        *_, measured = Simulated().train(trial, workspace)
        yield dataclasses.replace(measured, loss=places and float(len(places)))


def _places(directory: Path) -> list[dict[str, Any]]:
    places: list[dict[str, Any]] = json.loads((directory / "0.json").read_text())
    return places


def _wait_for_the_end_of(pids: list[int]) -> None:
    wait(lambda: not any(psutil.pid_exists(pid) for pid in pids))


@pytest.mark.slow
@pytest.mark.parametrize("bundles", [ON_ONE_NODE, ON_TWO_NODES])
def test_ranks_meet_in_the_trials_own_group(
    leader, trial: Trial, tmp_path: Path, bundles: list
) -> None:
    size = 2 * len(bundles)
    actor = leader(bundles)
    first, measured = ray.get(
        actor.train.remote(trial, tmp_path, lambda name: Reducing()), timeout=120
    )
    assert first.train_loss == size * (size + 1) / 2
    assert measured.loss == size
    places = _places(tmp_path)
    assert [place["RANK"] for place in places] == [str(rank) for rank in range(size)]
    assert [place["LOCAL_RANK"] for place in places] == ["0", "1"] * len(bundles)
    assert {place["LOCAL_WORLD_SIZE"] for place in places} == {"2"}
    assert len({place["node"] for place in places}) == len(bundles)
    assert len({place["group"] for place in places}) == 1
    assert len({(place["node"], place["CUDA_VISIBLE_DEVICES"]) for place in places}) == size
    assert {place["CUDA_VISIBLE_DEVICES"] for place in places} == {"0", "1"}


MEETS = """
import json, os, sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
if dist.get_rank() == 0:
    print(json.dumps({"step": 1, "train_loss": total.item()}))
    print(json.dumps({"loss": 1.0 + dist.get_world_size(), "tokens": int(sys.argv[1])}))
dist.barrier()
dist.destroy_process_group()  # gloo aborts who still listens to one that has left
"""


@pytest.mark.slow
def test_somebody_elses_program_meets_itself_on_every_rank(
    leader, trial: Trial, tmp_path: Path
) -> None:
    (tmp_path / "meets.py").write_text(MEETS)
    command = Command(run=("{python}", "meets.py", "{tokens}"), directory=str(tmp_path))
    commanded = dataclasses.replace(trial, trainer="command", command=command, settings=())
    actor = leader(ONE_ON_EACH)
    first, measured = ray.get(
        actor.train.remote(commanded, tmp_path / "place", trainer), timeout=120
    )
    assert (first.train_loss, measured.loss) == (1 + 2, 3.0)


SILENT = """
import pathlib, signal, sys, time
def stop(*_):
    pathlib.Path(sys.argv[1], "state").write_text("whole")
    print('{"checkpoint": 7}')
    raise SystemExit
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[2], "begun").touch()
time.sleep(600)
"""


@pytest.mark.slow
def test_a_silent_program_on_several_ranks_hears_that_it_is_to_stop(
    leader, trial: Trial, tmp_path: Path
) -> None:
    (tmp_path / "silent.py").write_text(SILENT)
    run = ("{python}", "silent.py", "{checkpoint}", str(tmp_path))
    command = Command(run=run, directory=str(tmp_path))
    commanded = dataclasses.replace(trial, trainer="command", command=command, settings=())
    actor = leader(ONE_ON_EACH)
    seen, seconds = ray.get(actor.train_until_asked.remote(commanded, tmp_path), timeout=120)
    assert seen == [Sign()]
    assert seconds < 15
    assert [path.name for path in tmp_path.glob("*.checkpoint")] == ["000000000007.checkpoint"]


@pytest.mark.slow
def test_a_simulated_trial_is_the_same_on_four_ranks_and_reserves_nothing_twice(
    leader, trial: Trial, tmp_path: Path
) -> None:
    actor = leader(ON_TWO_NODES)
    running = actor.train.remote(trial, tmp_path, _simulated)
    while not ray.wait([running], timeout=0.05)[0]:
        assert _free() == {"CPU": 4.0, "GPU": 0.0}
    *_, gang = ray.get(running)
    *_, alone = Simulated().train(trial, Scratch(tmp_path))
    assert (gang.loss, gang.curve) == (alone.loss, alone.curve)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_rank_ends_all_and_says_which(
    leader, trial: Trial, tmp_path: Path, victim: int
) -> None:
    actor = leader(ONE_ON_EACH)
    ray.get(actor.begin.remote(trial, tmp_path, lambda name: Reducing(rounds=10_000)), timeout=120)
    pids = [place["pid"] for place in _places(tmp_path)]
    os.kill(pids[victim], signal.SIGKILL)
    message = rf"rank {victim} of 2 on node .*process {pids[victim]}\) died"
    with pytest.raises(GangError, match=message) as caught:
        ray.get(actor.go_on.remote(), timeout=60)
    assert caught.value.cause.lost
    assert "\n" not in str(caught.value.cause)
    _wait_for_the_end_of(pids)


@pytest.mark.slow
def test_a_rank_that_raises_ends_all_and_gives_its_traceback(
    leader, trial: Trial, tmp_path: Path
) -> None:
    actor = leader(ON_ONE_NODE)
    with pytest.raises(GangError, match="rank 1 of 2 on node") as caught:
        ray.get(
            actor.train.remote(trial, tmp_path, lambda name: Reducing(rounds=10_000, culprit=1)),
            timeout=120,
        )
    error = caught.value.cause
    assert not error.lost
    assert "raised ValueError: rank 1 has had enough" in str(error)
    assert "in train" in error.__notes__[0]
    pids = [place["pid"] for place in _places(tmp_path)]
    _wait_for_the_end_of(pids)


class Leaving:
    """Trains in `trainers.ranks`' group, which none can leave before all do: so it is with NCCL.

    Where there is a `culprit` it raises after a few rounds; the first of the others loses its
    connection earlier, and the last one never notices.
    """

    def __init__(self, culprit: int | None = None) -> None:
        self._culprit = culprit

    def train(self, trial: Trial, workspace: Workspace) -> Iterator[Event]:
        import torch
        import torch.distributed as dist

        from trainers.ranks import joined

        def leave() -> None:
            while True:
                time.sleep(1)

        with joined(torch.device("cpu")) as ranks:
            dist.destroy_process_group = leave
            (workspace.directory / f"{ranks.rank}.pid").write_text(str(os.getpid()))
            for i in range(10_000):
                ranks.sum_(torch.ones(()))
                workspace.due(i)
                yield Step(i + 1)
                time.sleep(0.02)
                if self._culprit is None or i < 20:
                    continue
                if ranks.rank == self._culprit:
                    time.sleep(0.5)
                    raise ValueError("has had enough")
                if ranks.rank == (self._culprit + 1) % ranks.count:
                    raise RuntimeError("[pair.cc:537] Connection closed by peer [10.0.0.2]:1234")
                time.sleep(600)


def _pids(directory: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(directory.glob("*.pid"))]


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 3])
def test_a_ranks_error_is_heard_with_its_own_cause_though_none_can_leave_the_group(
    leader, trial: Trial, tmp_path: Path, culprit: int
) -> None:
    actor = leader(ON_TWO_NODES)
    other = (culprit + 1) % 4
    with pytest.raises(GangError) as caught:
        ray.get(actor.train.remote(trial, tmp_path, lambda name: Leaving(culprit)), timeout=120)
    error = caught.value.cause
    assert re.fullmatch(
        rf"rank {culprit} of 4 on node .* raised ValueError: has had enough; "
        rf"rank {other} lost its connection",
        str(error),
    )
    assert not error.lost
    own, lost = error.__notes__
    assert ("has had enough" in own, "pair.cc" in lost) == (True, True)
    pids = _pids(tmp_path)
    assert len(pids) == 4
    _wait_for_the_end_of(pids)


@pytest.mark.slow
def test_a_gang_is_stopped_though_none_can_leave_the_group(
    leader, trial: Trial, tmp_path: Path
) -> None:
    """It ends at rank 0's next step, long before those who do not end are ended."""
    actor = leader(ON_ONE_NODE)
    seconds = ray.get(
        actor.train_and_close.remote(trial, tmp_path, lambda name: Leaving()), timeout=120
    )
    assert seconds < GRACE_SECONDS / 2
    pids = _pids(tmp_path)
    _wait_for_the_end_of(pids)


@pytest.mark.slow
def test_a_rank_on_an_unfit_node_says_so_as_an_error_of_the_node(leader, trial: Trial) -> None:
    """So that the node is left out, and the trial is not blamed."""
    actor = leader(ON_ONE_NODE)
    with pytest.raises(UnfitNodeError, match="its GPU does not work"):
        ray.get(actor.train_on_an_unfit_node.remote(trial), timeout=120)


@pytest.mark.slow
def test_the_death_of_the_leader_ends_all_ranks(leader, trial: Trial, tmp_path: Path) -> None:
    actor = leader(ON_ONE_NODE)
    ray.get(actor.begin.remote(trial, tmp_path, lambda name: Reducing(rounds=10_000)), timeout=120)
    pids = [place["pid"] for place in _places(tmp_path)]
    ray.kill(actor)
    _wait_for_the_end_of(pids)


@pytest.mark.slow
def test_closing_the_generator_leaves_a_checkpoint_to_go_on_from(
    leader, make_trial, tmp_path: Path
) -> None:
    long = _told(make_trial(24, 4e10), seconds=4.0)
    actor = leader(ON_ONE_NODE)
    seen = ray.get(actor.train_and_stop.remote(long, tmp_path), timeout=60)
    assert not any(isinstance(event, Measurement) for event in seen)
    *_, measured = ray.get(actor.train.remote(long, tmp_path, _simulated), timeout=60)
    last = max(event.step for event in seen)
    assert last <= measured.resumed_from < long.hyperparameters.steps
    *_, whole = Simulated().train(long, Scratch(tmp_path / "whole"))
    assert (measured.loss, measured.curve) == (whole.loss, whole.curve)


@pytest.mark.slow
def test_two_ranks_pretrain_what_one_process_does(leader, make_trial, tmp_path: Path) -> None:
    from trainers.models import read_model
    from trainers.pretrain import Pretrain
    from trainers.registry import trainer

    trial = make_trial(16, 3e9)
    h = dataclasses.replace(trial.hyperparameters, batch_tokens=5 * 64, steps=30)
    trial = dataclasses.replace(trial, hyperparameters=h)
    actor = leader(ON_ONE_NODE)
    *_, found = ray.get(actor.train.remote(trial, tmp_path / "two", trainer), timeout=120)
    *_, alone = Pretrain().train(trial, Scratch(tmp_path / "one"))
    assert found.loss == pytest.approx(alone.loss, rel=1e-5)
    assert [p.train_loss for p in found.curve] == pytest.approx(
        [p.train_loss for p in alone.curve], rel=1e-5
    )
    (model,) = (tmp_path / "two" / "models").iterdir()
    assert read_model(model, "the model").loss == found.loss


@pytest.mark.slow
def test_more_ranks_than_sequences_are_refused_and_quoted(
    leader, make_trial, tmp_path: Path
) -> None:
    from trainers.registry import trainer

    trial = make_trial(16, 1e9)
    assert trial.hyperparameters.batch_tokens == trial.shape.context
    actor = leader(ON_ONE_NODE)
    with pytest.raises(InputError, match="has 1 sequences a step, which 2 processes cannot share"):
        ray.get(actor.train.remote(trial, tmp_path, trainer), timeout=60)


@pytest.mark.slow
def test_a_leader_that_holds_a_gpu_is_refused(leader, trial: Trial, tmp_path: Path) -> None:
    actor = leader(ON_ONE_NODE, num_gpus=1)
    with pytest.raises(InputError, match="holds 1 GPU of its group, which a rank needs"):
        ray.get(actor.train.remote(trial, tmp_path, _simulated), timeout=60)


class Storing:
    """Takes its time to store a checkpoint, for the time of several questions."""

    def train(self, trial: Trial, workspace: Workspace) -> Iterator[Event]:
        yield Step(1)
        workspace.save(1, lambda path: path.write_text("1"))
        *_, measured = Simulated().train(trial, workspace)
        yield measured


class Tardy(Scratch):
    """A workspace whose storage takes five seconds."""

    tell: Callable[[str], None]

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        self.tell("cannot store checkpoints: it is away")
        time.sleep(5)
        super().save(step, write)


def _tardy(tell: Callable[[str], None]) -> Tardy:
    made = Tardy(Path(tempfile.mkdtemp()))
    made.tell = tell
    return made


@pytest.mark.slow
def test_a_gang_that_waits_for_its_storage_gives_signs_of_life(leader, trial: Trial) -> None:
    actor = leader(ON_ONE_NODE)
    events = ray.get(actor.train_tardily.remote(trial, lambda name: Storing()), timeout=120)
    signs = [event for event in events if isinstance(event, Sign)]
    assert 2 <= len(signs) <= 4
    assert [t for sign in signs for t in sign.troubles] == ["cannot store checkpoints: it is away"]
    assert (events[0], type(events[-1])) == (Step(1), Measurement)


def _observe(config: dict[str, Any]) -> None:
    from ray import tune

    *_, measured = train_in_gang(config["trial"], lambda tell: Scratch(config["directory"]))
    tune.report({"loss": measured.loss})


@pytest.mark.slow
def test_tunes_actor_leads_from_an_empty_first_bundle(
    two_nodes: None, trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray import tune

    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")
    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    factory = tune.PlacementGroupFactory([{}, *ONE_ON_EACH], strategy="STRICT_SPREAD")
    trials = [dataclasses.replace(trial, seed=seed) for seed in range(2)]
    config = {"trial": tune.grid_search(trials), "directory": tmp_path}
    results = tune.Tuner(
        tune.with_resources(_observe, factory),
        param_space=config,
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(storage_path=str(tmp_path / "tune"), verbose=0),
    ).fit()
    expected = [list(Simulated().train(t, Scratch(tmp_path)))[-1].loss for t in trials]
    assert sorted(result.metrics["loss"] for result in results) == sorted(expected)
