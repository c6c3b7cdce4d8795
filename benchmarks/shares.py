"""What training loses to checkpoints and to reading data; for `benchmarks.training`."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.steps import Work, clock, ours, stream
from benchmarks.trunks import pretraining
from orchestrator.checkpoints import StoredWorkspace
from orchestrator.spec_running import Checkpoints
from orchestrator.storage import open_storage
from trainers.pretrain import Pretrain
from trainers.recipes import named
from trainers.shape import Shape
from trainers.trial import Step, Trial

SAVES = 20
REPEATS = 3


def checkpoint_costs(shape: Shape) -> dict[str, float]:
    """Seconds of one save and of one restore, and their share of the default interval.

    A checkpoint is written every `Checkpoints.every_seconds` (300 s), or later where `max_overhead`
    says so. Instead of training for hours, this takes what a save adds to a training that saves
    after every step, and what going on from a checkpoint adds to the time to the first step; the
    share is of one interval with a save and, as if it were interrupted in each, a restore. The
    steps since the last checkpoint, which an interruption loses, are not in it.
    """
    trial = pretraining(shape, named("mini").resolve(shape, 1e7))
    save = statistics.median(_save_seconds(trial) for _ in range(REPEATS))
    starts = [_starts(trial) for _ in range(REPEATS)]
    fresh, restored = (min(seconds) for seconds in zip(*starts, strict=True))
    restore = max(0.0, restored - fresh)
    interval = Checkpoints().every_seconds or float("inf")
    return {
        "save_seconds": save,
        "restore_seconds": restore,
        "interval_seconds": interval,
        "share": (save + restore) / interval,
    }


def _save_seconds(trial: Trial) -> float:
    with tempfile.TemporaryDirectory(prefix="isoflop-checkpoints-") as directory:
        without, saving = (  # in this order: the second would go on from the first's checkpoints
            _seconds_to(SAVES, trial, _workspace(Path(directory), trial, saving=saves))
            for saves in (False, True)
        )
    return max(0.0, (saving - without) / SAVES)


def _starts(trial: Trial) -> tuple[float, float]:
    """Seconds to the first step of a new training, and of one that goes on from a checkpoint."""
    with tempfile.TemporaryDirectory(prefix="isoflop-checkpoints-") as directory:
        path = Path(directory)
        fresh = _seconds_to(1, trial, _workspace(path, trial, saving=False))
        _seconds_to(SAVES, trial, _workspace(path, trial, saving=True))
        return fresh, _seconds_to(SAVES + 1, trial, _workspace(path, trial, saving=False))


def _workspace(directory: Path, trial: Trial, *, saving: bool) -> StoredWorkspace:
    """Checkpoints in a project on this disk, after every step or never."""
    local = directory / "scratch"
    local.mkdir(exist_ok=True)
    storage = open_storage(str(directory / "project"))
    storage.make()
    settings = Checkpoints(every_seconds=None)
    return StoredWorkspace(
        directory=local, storage=storage, key=trial.key, settings=settings, stop=lambda: saving
    )


def _seconds_to(last: int, trial: Trial, workspace: StoredWorkspace) -> float:
    """Wall seconds from the start of an attempt until it has done a step."""
    start = time.perf_counter()
    for event in Pretrain().train(trial, workspace):
        if isinstance(event, Step) and event.step == last:
            break
    return time.perf_counter() - start


def data_share(work: Work, *, steps: int = 200) -> float:
    """Time in reading a batch and copying it to the device, over that of a step."""
    now, windows, step = clock(work.device), stream(work), ours(work, "adamw")
    number = iter(range(10**9))

    def read() -> None:
        torch.from_numpy(windows.batch(next(number))).to(work.device)

    return statistics.median(_each(read, steps, now) / _each(step, steps, now) for _ in range(5))


def _each(action: Callable[[], None], times: int, now: Callable[[], float]) -> float:
    action()
    start = now()
    for _ in range(times):
        action()
    return (now() - start) / times
