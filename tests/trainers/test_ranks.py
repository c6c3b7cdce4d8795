"""Several processes train as one: the same batches, the same curve, and each does its part."""

import dataclasses
import itertools
import math
import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.tensor import distribute_tensor
from torch.profiler import ProfilerActivity, profile

from trainers import compiling, optimizer, passes, transformer
from trainers.corpus import Markov, heldout_windows, load
from trainers.evaluation import evaluate
from trainers.flops import EVALUATION_TOKENS, PASS_TOKENS
from trainers.learner import Learner
from trainers.memory import Passes
from trainers.models import read_model
from trainers.pretrain import Pretrain
from trainers.ranks import joined
from trainers.sharded import sharded_model
from trainers.trial import Measurement, Step, Trial
from trainers.workspace import Scratch

FORKS = multiprocessing.get_context("forkserver")  # each rank is forked from one that has torch
FORKS.set_forkserver_preload(["trainers.pretrain", "trainers.sharded"])
CPU = torch.device("cpu")


class Found(NamedTuple):
    """What a process measures at a horizon."""

    loss: float
    stderr: float
    curve: list[float]
    resumed_from: int


def _found(row: Measurement) -> Found:
    curve = [point.train_loss for point in row.curve]
    return Found(row.loss, row.loss_stderr, curve, row.resumed_from)


def _measured(trial: Trial, own: Path, until: int | None = None, how: str = "whole") -> list[Found]:
    """Of this process, until it has done so many steps."""
    workspace, found = Scratch(own, every_steps=53, keeps_models=True), []
    for event in Pretrain(sharded=how == "sharded").train(trial, workspace):
        if isinstance(event, Measurement):
            found.append(_found(event))
        if isinstance(event, Step) and event.step == until:
            break
    return found


def _rank(where: dict[str, str], work: Callable[[], Any]) -> Any:
    os.environ |= where
    return work()


def _together(ranks: int, work: Callable[[], Any]) -> list[Any]:
    """What every rank gives."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": f"{ranks}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    told = [(shared | {"RANK": f"{rank}"}, work) for rank in range(ranks)]
    with FORKS.Pool(ranks) as pool:
        return pool.starmap_async(_rank, told, chunksize=1).get(60)


def _train(
    trial: Trial, own: Path, ranks: int, until: int | None = None, how: str = "whole"
) -> list[list[Found]]:
    """What every rank measures, until all have done so many steps."""
    return _together(ranks, partial(_measured, trial, own, until, how))


@pytest.fixture
def trial(make_trial) -> Trial:
    """Of 20 steps of 10 sequences, which four ranks cannot share evenly."""
    made = make_trial(16, 3e9)
    changed = dataclasses.replace(made.hyperparameters, batch_tokens=640, steps=20)
    return dataclasses.replace(made, hyperparameters=changed)


@pytest.fixture
def make(make_trial) -> Callable[..., Trial]:
    """Makes trials on a chain of symbols, which has a short held-out part.

    Not for Muon, which turns the rounding of such poor gradients into directions.
    """

    def made(
        *, sequences: int, context: int = 64, width: int = 16, depth: int = 2, **changed: Any
    ) -> Trial:
        trial = make_trial(width, 3e9, source=Markov(tokens=600_000, symbols=16, order=1))
        values = {"batch_tokens": sequences * context, "warmup_steps": 3, "optimizer": "adamw"}
        h = dataclasses.replace(trial.hyperparameters, **values, **changed)
        shape = dataclasses.replace(trial.shape, context=context, depth=depth)
        return dataclasses.replace(trial, hyperparameters=h, shape=shape)

    return made


def _as(one: Found) -> Found:
    """The same but for rounding, whatever it was resumed from."""
    near = partial(pytest.approx, rel=1e-5)
    return Found(near(one.loss), pytest.approx(one.stderr, rel=1e-4), near(one.curve), None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "how", "optimizer"),
    [
        (2, "whole", "muon"),
        (4, "whole", "adamw"),
        (2, "sharded", "adamw"),
        (4, "sharded", "muon"),
    ],
)
def test_the_curve_does_not_depend_on_the_number_of_ranks(
    trial: Trial, tmp_path: Path, ranks: int, how: str, optimizer: str
) -> None:
    h = dataclasses.replace(trial.hyperparameters, optimizer=optimizer)
    trial = dataclasses.replace(trial, hyperparameters=h)
    (one,) = _measured(trial, tmp_path / "one")
    several = _train(trial, tmp_path / "several", ranks, how=how)
    for (found,) in several:
        assert found[:3] == _as(one)[:3]
    assert several.count(several[0]) == ranks
    kept = read_model(tmp_path / f"several/models/{trial.tokens}.safetensors", "the model")
    windows = heldout_windows(load(trial.corpus.source), trial.shape.context)
    assert evaluate(kept.model, windows, CPU)[0] == pytest.approx(one.loss, rel=1e-5)
    assert kept.loss == several[0][0].loss


@pytest.mark.slow
def test_ranks_with_less_to_do_take_part_all_the_same(make, tmp_path: Path) -> None:
    """Those that share out a model meet in every pass: it would not end if one had fewer.

    Of 327 sequences one rank has 164, two passes, the other 163, one; and the nine pieces of the
    held-out set are not even either.
    """
    trial = make(sequences=327, context=100, width=8, depth=1, steps=2)
    assert trial.hyperparameters.batch_tokens > 2 * PASS_TOKENS - 200
    windows = heldout_windows(load(trial.corpus.source), 100).windows
    assert math.ceil(len(windows) / (EVALUATION_TOKENS // 100)) % 2 == 1
    (one,) = _measured(trial, tmp_path / "one")
    for (found,) in _train(trial, tmp_path / "two", 2, how="sharded"):
        assert found[:3] == _as(one)[:3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "how"), [(1, 2, "whole"), (1, 2, "sharded"), (2, 1, "sharded")]
)
def test_any_number_of_ranks_goes_on_from_what_others_saved(
    make, tmp_path: Path, before: int, after: int, how: str
) -> None:
    """Within a branch, from between two points of its curve, and back to the trunk after it."""
    trial = make(sequences=4, steps=90, schedule="wsd", decay_fraction=0.2, final_fraction=0.0)
    batch = trial.hyperparameters.batch_tokens
    trial = dataclasses.replace(trial, horizons=(60 * batch, 90 * batch))
    events = list(Pretrain().train(trial, Scratch(tmp_path / "one")))
    first, _ = alone = [event for event in events if isinstance(event, Measurement)]
    assert [point.step for point in first.curve][-7:-3] == [51, 52, 54, 56]
    _train(trial, tmp_path / "two", before, until=55, how=how)
    for found in _train(trial, tmp_path / "two", after, how=how):
        assert [row.resumed_from for row in found] == [53, 53]
        assert [row[:3] for row in found] == [_as(_found(row))[:3] for row in alone]


def _orthogonalised(trial: Trial, how: str) -> tuple[dict[str, Any], int]:
    """Weights after three steps by gradients that are the same on any number of ranks.

    And how many numbers this rank orthogonalised.
    """
    counted = []
    with joined(CPU) as ranks, pytest.MonkeyPatch.context() as patch:
        exact = optimizer._orthogonal_factors
        patch.setattr(
            optimizer, "_orthogonal_factors", lambda x: counted.append(x.numel()) or exact(x)
        )
        learner = Learner(trial, CPU, ranks, sharded=how == "sharded")
        draw = torch.Generator().manual_seed(0)
        for _ in range(3):
            for p in learner._optimizer._parameters:
                whole = torch.randn(p.shape, generator=draw)
                # Of two ranks each has half: their sum is the whole to the bit.
                p.grad = whole / ranks.count
                if how == "sharded":
                    p.grad = distribute_tensor(whole / ranks.count, p.device_mesh, p.placements)
            learner._optimizer.step(1.0)
        return learner.weights(), sum(counted)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "sharded"])
@pytest.mark.parametrize("depth", [3, 4])
def test_ranks_share_out_what_muon_orthogonalises(make, how: str, depth: int) -> None:
    """No matrix twice, and the weights are those of one rank: to the bit where each has all."""
    trial = make(sequences=4, width=32, depth=depth, steps=3)
    h = dataclasses.replace(trial.hyperparameters, optimizer="muon", matrix_rate=0.1)
    trial = dataclasses.replace(trial, hyperparameters=h)
    alone, whole = _orthogonalised(trial, "whole")
    (first, one), (_, other) = _together(2, partial(_orthogonalised, trial, how))
    assert one + other == whole
    assert max(one, other) <= 0.7 * whole
    for name, weight in alone.items():
        if how == "whole":
            assert torch.equal(first[name], weight), name
        else:
            torch.testing.assert_close(first[name], weight, rtol=1e-4, atol=1e-6)


def _blockwise(trial: Trial, compiled: bool) -> tuple[list[float], int]:
    """Losses of three steps of a sharded model, and how many graphs were compiled for them."""
    with joined(CPU) as ranks, pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "BACKEND", "aot_eager")
        patch.setattr(compiling, "pays", lambda *_: compiled)
        patch.setattr(transformer, "_on_one_core", lambda *_: False)
        patch.setattr(passes, "room", lambda device: 1e12)
        patch.setattr("trainers.memory.pass_sequences", lambda context: 2)
        learner = Learner(trial, CPU, ranks, sharded=True)
        counters.clear()
        learner.prepare()
        draw = torch.Generator().manual_seed(0)
        shape = 7, trial.shape.context + 1
        windows = [torch.randint(0, 16, shape, generator=draw).numpy() for _ in range(3)]
        losses = [ranks.sum_(learner.step(batch, 1.0)).item() for batch in windows]
        return losses, counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_blocks_of_a_model_that_is_shared_out_are_compiled_one_by_one(make) -> None:
    """Four sequences of seven on one rank, three on the other, in passes of two: to the bit."""
    trial = make(sequences=7, width=32, depth=3, steps=3)
    (compiled, graphs), (others, _) = _together(2, partial(_blockwise, trial, True))
    (eager, none), _ = _together(2, partial(_blockwise, trial, False))
    assert compiled == others == eager
    assert (1 < graphs <= 6, none) == (True, 0)


def _reductions(trial: Trial, summed: bool) -> tuple[list[float], int]:
    """Losses of three steps of two passes each, and how often gradients were reduced."""
    with joined(CPU) as ranks:
        learner = Learner(trial, CPU, ranks, sharded=True)
        learner._passes = Passes(sequences=1, summed=summed)
        windows = torch.zeros(4, trial.shape.context + 1, dtype=torch.int64).random_(
            0, 16, generator=torch.Generator().manual_seed(0)
        )
        losses = []
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(3):
                losses.append(ranks.sum_(learner.step(windows.numpy(), 1.0)).item())
        return losses, sum("reduce_scatter" in e.name for e in profiler.events())


@pytest.mark.slow
def test_ranks_that_share_out_a_model_sum_gradients_once_a_step(make) -> None:
    trial = make(sequences=4, width=32, steps=3)
    (once, few), _ = _together(2, partial(_reductions, trial, True))
    (each, many), _ = _together(2, partial(_reductions, trial, False))
    assert once == pytest.approx(each, rel=1e-6)
    assert 0 < 2 * few == many


def _shared_out(trial: Trial) -> dict[str, Any]:
    """What a rank has of a model and of its state, and what the first one gathers of it."""
    with joined(CPU) as ranks:
        h, shape = trial.hyperparameters, trial.shape
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            sharded_model(shape, trial.seed, h, CPU, ranks, Passes(sequences=1))
        taken = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.nbytes()]
        learner = Learner(trial, CPU, ranks, sharded=True)
        own = learner.state()
        whole = learner.gathered(own)
        back = learner.scattered(whole)
        return {
            "most": max(itertools.accumulate(taken)),
            "own": own["weights"].numel(),
            "whole": dict(whole),
            "back": all(torch.equal(own[name], back[name]) for name in own),
        }


@pytest.mark.slow
def test_a_model_that_is_shared_out_is_nowhere_whole_but_where_it_is_saved(make) -> None:
    """Three ranks, which cannot share 64 rows evenly: the weights are those of one all the same.

    Each holds its third, and of eight blocks the one that is being drawn.
    """
    trial = make(sequences=4, width=64, depth=8, steps=2)
    with joined(CPU) as ranks:
        alone = Learner(trial, CPU, ranks).state()
    count = alone["weights"].numel()
    first, *others = every = _together(3, partial(_shared_out, trial))
    assert sum(rank["own"] for rank in every) == count
    assert all(count / 3.2 < rank["own"] < count / 2.8 for rank in every)
    assert all(4 * count / 3.2 < rank["most"] < 4 * count * 0.6 for rank in every)
    assert first["whole"].keys() == alone.keys()
    assert all(torch.equal(first["whole"][name], alone[name]) for name in alone)
    assert all(rank["back"] for rank in every)
    assert [rank["whole"] for rank in others] == [{}, {}]


class Harmful:
    """What makes a directory where it is unpickled."""

    def __init__(self, made: Path) -> None:
        self._made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._made,)


def _attacked(made: Path) -> str:
    """The first rank sends code, as `broadcast_object_list` would send an object."""
    with joined(CPU) as ranks:
        if ranks.rank == 0:
            code = pickle.dumps(Harmful(made))
            ranks.copy_first_(torch.tensor([len(code)]))
            ranks.copy_first_(torch.frombuffer(bytearray(code), dtype=torch.uint8))
            return "sent"
        try:
            return str(ranks.from_first(None))
        except ValueError:
            return "refused"


@pytest.mark.slow
def test_no_rank_runs_code_that_another_sends(tmp_path: Path) -> None:
    assert _together(2, partial(_attacked, tmp_path / "made")) == ["sent", "refused"]
    assert list(tmp_path.iterdir()) == []
