"""A worker and the GPUs that Ray gave it: on the fakes of a machine without any."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.errors import InputError
from cluster.machines import UnfitNodeError
from cluster.rank import Sign
from orchestrator import gpu_checks, worker
from orchestrator.storage import LocalStorage
from tests.orchestrator.workers import Bench, Tiny, bench_at, measurement
from trainers.command import Commanded
from trainers.device import this_device
from trainers.template import GRANTED, Command
from trainers.trial import Event, Measurement, Trial
from trainers.workspace import Scratch, Workspace


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    gpu_checks._required.cache_clear()
    monkeypatch.setattr(worker, "UNFIT_SECONDS", 0.0)
    for name in (GRANTED, "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with bench_at(LocalStorage(tmp_path / "project"), tmp_path, monkeypatch) as made:
        yield made
    gpu_checks._required.cache_clear()


@pytest.mark.parametrize(
    ("gpus", "name"), [(1.0, "pretrain"), (0.125, "pretrain"), (1.0, "command")]
)
def test_a_gpu_that_does_not_work_makes_the_node_unfit_and_nothing_trains(
    bench: Bench, gpus: float, name: str
) -> None:
    """A trial that holds a GPU would train on the CPU, and its row would say so to nobody."""
    if torch.cuda.is_available():
        pytest.skip("there is one that works")
    bench.trial = replace(bench.trial, trainer=name)
    with pytest.raises(UnfitNodeError) as refused:
        bench.run(Tiny(), gpus=gpus)
    said = str(refused.value)
    assert "a trial was given a GPU here" in said
    assert "no NVIDIA driver" in said
    assert name == "command" or f"torch {torch.__version__}" in said
    assert bench.tiny.trained == []
    assert bench.row is None
    assert bench.attempts.all() == []  # it is no fault of the trial


@pytest.mark.parametrize(("gpus", "name"), [(0.0, "pretrain"), (2.0, "simulated")])
def test_where_no_gpu_is_given_or_needed_none_is_looked_for(
    bench: Bench, gpus: float, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_checks, "probe", None)
    bench.trial = replace(bench.trial, trainer=name)
    bench.run(Tiny(), gpus=gpus)
    assert bench.row is not None


class Telling(Tiny):
    """A trainer that has something to say to a person."""

    def train(self, trial: Trial, workspace: Workspace) -> Iterator[Event]:
        workspace.tell("torch.compile failed")
        yield from super().train(trial, workspace)


def test_what_a_trainer_tells_is_told_and_its_trial_trains(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where nothing can be compiled."""
    monkeypatch.setattr(worker, "require_gpu", lambda _: None)
    bench.trial = replace(bench.trial, trainer="pretrain")
    bench.run(Telling(), gpus=1.0)
    assert [report for report in bench.told if "trouble" in report] == [
        {"trouble": "torch.compile failed"}
    ]
    assert bench.row is not None


def test_what_a_gangs_rank_tells_is_told_as_it_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gang(trial: Trial, make: Any, **_: Any) -> Iterator[Any]:
        yield Sign(troubles=("torch.compile failed",))
        yield measurement(trial)

    monkeypatch.setattr(worker, "train_in_gang", gang)
    bench.run(Tiny(), gpus=2.0, ranks=2)
    assert {"trouble": "torch.compile failed"} in bench.told


def test_a_reproducible_trial_has_its_workspace_chosen_before_the_first_product(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch looks at it once a process: training would be refused later."""
    name, seen = "CUBLAS_WORKSPACE_CONFIG", []
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    monkeypatch.setattr(worker, "require_gpu", lambda _: seen.append(os.environ.get(name)))
    for deterministic in (False, True):
        bench.trial = replace(
            bench.trial, trainer="pretrain", deterministic=deterministic, seed=int(deterministic)
        )
        bench.run(Tiny(), gpus=1.0)
    assert seen == [None, ":4096:8"]


def test_a_gangs_rank_on_a_node_that_is_unfit_is_no_fault_of_the_trial(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gang(trial: Trial, make: Any, **_: Any) -> Iterator[Any]:
        make(bench.told.append)
        yield

    if torch.cuda.is_available():
        pytest.skip("there is a GPU that works")
    monkeypatch.setattr(worker, "train_in_gang", gang)
    bench.trial = replace(bench.trial, trainer="pretrain")
    with pytest.raises(UnfitNodeError, match="a trial was given a GPU here"):
        bench.run(Tiny(), gpus=2.0, ranks=2)
    assert [attempt.kind for attempt in bench.attempts.all()] == ["node lost"]


def test_a_device_is_what_was_given_and_not_what_is_visible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.delenv(GRANTED, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert this_device() == cuda  # in a notebook
    monkeypatch.setenv(GRANTED, "0")
    assert this_device() == cpu
    monkeypatch.setenv(GRANTED, "0.125")
    assert this_device() == cuda
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"was given 0.125 GPU, and torch .* sees none"):
        this_device()
    monkeypatch.delenv(GRANTED)
    assert this_device() == cpu


def test_a_program_without_a_gpu_sees_none(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them at once would meet on one that somebody else was given."""
    code = (
        "import json, os; print(json.dumps({{'loss': 1.0, 'tokens': TOKENS, "
        "'device': repr(os.environ['CUDA_VISIBLE_DEVICES'])}}))"
    )
    code = code.replace("TOKENS", str(bench.trial.tokens))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv(GRANTED, "0")
    seen = []
    for gpus in (0.0, 1.0):
        command = Command(run=(sys.executable, "-c", code), directory=str(tmp_path), gpus=gpus)
        trial = replace(bench.trial, trainer="command", command=command)
        *_, measured = Commanded().train(trial, Scratch(tmp_path / f"{gpus}"))
        assert isinstance(measured, Measurement)
        seen.append(measured.device)
    assert seen == ["''", "'0'"]


THREADS = """
import sys
from ray import tune
from orchestrator import worker
from orchestrator.worker import _know_gpus, Order
assert "torch" not in sys.modules
worker.nodes = lambda: [{"NodeID": "here", "Resources": {"CPU": 64.0, "GPU": 8.0}}]
import ray
ray.get_runtime_context = lambda: type("Context", (), {"get_node_id": lambda self: "here"})()
_know_gpus(Order.load(sys.argv[1]))
import torch._inductor.config
print(torch._inductor.config.compile_threads)
"""


@pytest.mark.parametrize(("gpus", "ranks", "threads"), [(0.125, 1, 1), (1.0, 1, 8), (8.0, 8, 8)])
def test_compilers_share_the_cores_of_a_node(
    bench: Bench, gpus: float, ranks: int, threads: int
) -> None:
    """Torch itself would start 32 for each of 64 processes that share the 8 GPUs of a node."""
    order = bench.order(gpus=gpus, ranks=ranks).dump()
    done = subprocess.run(
        [sys.executable, "-c", THREADS, order], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == threads
