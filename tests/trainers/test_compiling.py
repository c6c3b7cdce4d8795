"""What a trial compiles: few graphs, for every trial of a process, before its first step."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from trainers import compiling, passes, transformer
from trainers.decoders import LLAMA
from trainers.learner import Learner
from trainers.memory import Passes
from trainers.passes import accumulate
from trainers.pretrain import Pretrain
from trainers.ranks import Ranks
from trainers.recipes import named
from trainers.shape import Shape
from trainers.transformer import Transformer
from trainers.trial import CorpusId, Measurement, RecipeId, Trial
from trainers.workspace import Scratch

CPU = torch.device("cpu")
GRAPHS = 6
"""Most that a trial may compile."""
SEQUENCES, PASSES = 5, 3
"""Of a batch that passes of two sequences go through: the last one has a single sequence."""


class Counting:
    """A backend that counts the graphs that it is given, and how often they run."""

    def __init__(self, takes: float = 0.0) -> None:
        self.graphs = self.calls = 0
        self._takes = takes

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        self.graphs += 1
        time.sleep(self._takes)
        run = lookup_backend("aot_eager")(graph, inputs)

        def counted(*args: torch.Tensor) -> object:
            self.calls += 1
            return run(*args)

        return counted


def _trial(width: int, depth: int, context: int = 16, steps: int = 3) -> Trial:
    shape = Shape(
        width=width, depth=depth, heads=2, vocabulary=64, context=context, architecture=LLAMA
    )
    h = named("llama-adamw", {"precision": "fp32"}).resolve(shape, 1e6)
    h = dataclasses.replace(h, batch_tokens=SEQUENCES * context, steps=steps, warmup_steps=1)
    nowhere = CorpusId(name="", hash="", heldout_hash="", train_tokens=1, source=None)
    return Trial(
        trainer="pretrain",
        trainer_version=1,
        shape=shape,
        hyperparameters=h,
        corpus=nowhere,
        recipe=RecipeId(name="", hash=""),
        seed=0,
    )


def _batch(trial: Trial, seed: int = 0) -> np.ndarray:
    size = (SEQUENCES, trial.shape.context + 1)
    return np.random.default_rng(seed).integers(0, trial.shape.vocabulary, size)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks and the passes that a GPU runs, these of two sequences."""
    monkeypatch.setattr(transformer, "_on_one_core", lambda *_: False)
    monkeypatch.setattr(passes, "room", lambda device: 1e12)
    monkeypatch.setattr("trainers.memory.pass_sequences", lambda context: 2)


@pytest.fixture
def counting(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> Counting:
    """Every trial is compiled, and that is counted."""
    backend = Counting()
    monkeypatch.setattr(compiling, "BACKEND", backend)
    monkeypatch.setattr(compiling, "pays", lambda *_: True)
    return backend


def test_the_twelfth_shape_of_a_process_runs_compiled_like_the_first(counting: Counting) -> None:
    """As many graphs whatever the depth, all of them made before the first step."""
    graphs = []
    for number in range(12):
        trial = _trial(16 + 4 * number, depth=1 + number % 4, context=8 + number)
        before = counting.graphs
        learner = Learner(trial, CPU, Ranks())
        learner.prepare()
        graphs.append(counting.graphs - before)
        for step in range(2):
            calls, made = counting.calls, counting.graphs
            learner.step(_batch(trial, step), 0.1)
            assert counting.graphs == made
            # Forward and backward of each block, and the chunk, which has no backward.
            assert counting.calls - calls >= PASSES * (trial.shape.depth + 1)
    assert set(graphs) == {graphs[0]}
    assert 1 < graphs[0] <= GRAPHS


def test_compiling_changes_no_bit(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    trial, losses = _trial(24, depth=3), []
    for compiled in (True, False):
        monkeypatch.setattr(compiling, "pays", lambda *_, way=compiled: way)
        learner = Learner(trial, CPU, Ranks())
        learner.prepare()
        losses.append([learner.step(_batch(trial, n), 0.5).item() for n in range(4)])
        assert (learner.compile_seconds > 0) == compiled
    assert losses[0] == losses[1]
    assert counting.calls > 0


def test_evaluation_compiles_nothing(counting: Counting) -> None:
    """It computes as whoever reads the model's file does."""
    learner = Learner(_trial(16, depth=2), CPU, Ranks())
    learner.prepare()
    made, calls = counting.graphs, counting.calls
    learner._model.token_losses(torch.zeros(3, 17, dtype=torch.int64))
    assert (counting.graphs, counting.calls) == (made, calls)


@pytest.mark.slow
def test_compiling_counts_as_neither_training_nor_silence(
    make_trial, tmp_path: Path, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two graphs or more that take 0.6 s each."""
    backend, watched = Counting(takes=0.6), []
    monkeypatch.setattr(compiling, "BACKEND", backend)
    monkeypatch.setattr(compiling, "pays", lambda *_: True)
    trial = make_trial(16, 1e9)
    h = dataclasses.replace(trial.hyperparameters, batch_tokens=320, steps=4)

    class Watched(Scratch):
        def paused(self):
            watched.append(backend.graphs)
            return super().paused()

    started = time.perf_counter()
    changed = dataclasses.replace(trial, hyperparameters=h)
    *_, row = Pretrain().train(changed, Watched(tmp_path))
    took = time.perf_counter() - started
    assert isinstance(row, Measurement)
    assert row.compile_seconds >= 0.6 * backend.graphs >= 1.2
    assert row.seconds + row.compile_seconds <= took
    assert watched[0] == 0


def test_where_compiling_fails_training_goes_on_and_says_so(
    as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        raise RuntimeError("Failed to find C compiler")

    trial = _trial(16, depth=2)
    expected = Learner(trial, CPU, Ranks()).step(_batch(trial), 0.5)
    monkeypatch.setattr(compiling, "BACKEND", broken)
    monkeypatch.setattr(compiling, "pays", lambda *_: True)
    told: list[str] = []
    learner = Learner(trial, CPU, Ranks(), tell=told.append)
    learner.prepare()
    assert learner.step(_batch(trial), 0.5) == expected
    (message,) = told
    assert "torch.compile failed on" in message
    assert "Failed to find C compiler" in message
    assert learner.compile_seconds == 0  # a training that has any was compiled


def test_what_failed_to_compile_is_told_by_the_workspace_and_counts_as_training(
    make_trial, tmp_path: Path, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So its row says nothing of the time that compiling takes, and is taken for an eager one."""

    def broken(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        time.sleep(0.5)
        raise RuntimeError("Failed to find C compiler")

    class Told(Scratch):
        def tell(self, message: str, /) -> None:
            told.append(message)

    told: list[str] = []
    monkeypatch.setattr(compiling, "BACKEND", broken)
    monkeypatch.setattr(compiling, "pays", lambda *_: True)
    trial = make_trial(16, 1e9)
    h = dataclasses.replace(trial.hyperparameters, batch_tokens=320, steps=4)
    *_, row = Pretrain().train(dataclasses.replace(trial, hyperparameters=h), Told(tmp_path))
    assert isinstance(row, Measurement)
    assert row.compile_seconds == 0
    assert row.seconds >= 0.5
    assert ["Failed to find C compiler" in message for message in told] == [True]


def test_a_horizon_that_was_compiled_for_an_earlier_one_is_not_taken_for_eager(
    make_trial, tmp_path: Path, counting: Counting
) -> None:
    trial = make_trial(16, 1e9)
    h = dataclasses.replace(
        trial.hyperparameters,
        batch_tokens=320,
        steps=20,
        warmup_steps=2,
        schedule="wsd",
        decay_fraction=0.2,
    )
    trial = dataclasses.replace(trial, hyperparameters=h, horizons=(10 * 320, 20 * 320))
    rows = [
        event
        for event in Pretrain().train(trial, Scratch(tmp_path))
        if isinstance(event, Measurement)
    ]
    assert [row.compile_seconds is None for row in rows] == [False, True]
    assert rows[0].compile_seconds


def test_nothing_is_compiled_where_torch_is_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial would be taken for a compiled one otherwise."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv(compiling.NO_COMPILATION, "1")
    long = _trial(64, depth=8, steps=100_000)
    assert not compiling.pays(long, torch.device("cuda"))


def test_only_trials_that_are_long_enough_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """By steps and size, on an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    gpu = torch.device("cuda")
    long = _trial(64, depth=8, steps=100_000)
    assert compiling.pays(long, gpu)
    assert not compiling.pays(_trial(64, depth=8, steps=1000), gpu)
    assert not compiling.pays(long, CPU)
    # A large model pays by its products, however few its steps.
    assert compiling.pays(_trial(4096, depth=32, context=2048, steps=100), gpu)


@pytest.mark.parametrize("share", [1, 5, 16, 17, 26, 37, 100])
@pytest.mark.parametrize("most", [1, 2, 16])
def test_passes_are_as_few_and_as_even_as_can_be(share: int, most: int) -> None:
    even = Passes(sequences=most).even(share)
    count = -(-share // even.sequences)
    assert even.filled
    assert even.sequences <= most
    assert count == -(-share // most)
    assert count * even.sequences - share < count


def test_sequences_that_fill_up_a_pass_have_no_part_in_it() -> None:
    """Loss and gradients are those of the batch's own five, in passes of one size."""
    shape = _trial(24, depth=2).shape
    windows = torch.from_numpy(_batch(_trial(24, depth=2)))
    found, sizes = [], []
    for way in (Passes(sequences=2, filled=True), Passes(sequences=5)):
        model = Transformer(shape, 0)

        def loss(part: torch.Tensor, counted: int | None = None, m=model, way=way) -> torch.Tensor:
            sizes.append((way.filled, len(part)))
            return m.loss(part, counted)

        mean = accumulate(loss, windows, way)
        found.append([mean, *(p.grad for p in model.parameters())])
    assert [size for filled, size in sizes if filled] == [2, 2, 2]
    for ours, whole in zip(*found, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-8)


def test_a_rank_without_sequences_adds_nothing() -> None:
    model = Transformer(_trial(16, depth=1).shape, 0)
    windows = torch.zeros(1, 17, dtype=torch.int64)
    way = Passes(sequences=1, filled=True)
    mean = accumulate(model.loss, windows, way, 4, ranks=2)
    one = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (model.loss(windows) / 4).backward()
    assert mean == pytest.approx(model.loss(windows).item() / 4)
    for ours, whole in zip(one, model.parameters(), strict=True):
        torch.testing.assert_close(ours, whole.grad)
