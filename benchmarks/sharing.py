"""Small trials that share one device, beside the same ones in turn; for `benchmarks.training`.

Each is a process, as Ray's workers are. No MPS: a GPU gives its processes turns.
"""

from __future__ import annotations

import time
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier, Lock

import torch

from benchmarks.steps import Work, ours
from trainers.device import synchronise

WARM_UP_STEPS = 5
PATIENCE = 600.0
"""Seconds to wait for any process: each of them compiles the model."""


def sharing(work: Work, *, trials: int, steps: int) -> dict[str, float]:
    """Wall seconds of so many steps of every trial, at once and one after another."""
    context = get_context("spawn")
    gate, turn = context.Barrier(trials + 1), context.Lock()
    processes = [
        context.Process(target=_train, args=(work, steps, gate, turn), daemon=True)
        for _ in range(trials)
    ]
    for process in processes:
        process.start()
    gate.wait(PATIENCE)
    marks = [time.perf_counter()]
    for _ in range(2):
        gate.wait(PATIENCE)
        marks.append(time.perf_counter())
    for process in processes:
        process.join(PATIENCE)
    together, in_turn = marks[1] - marks[0], marks[2] - marks[1]
    return {
        "trials": trials,
        "seconds_together": together,
        "seconds_in_turn": in_turn,
        "speedup": in_turn / together,
    }


def _train(work: Work, steps: int, gate: Barrier, turn: Lock) -> None:
    """Train so many steps with all others, then again when it is this process's turn."""
    torch.set_num_threads(1)
    step = ours(work, "adamw")

    def several(count: int) -> None:
        for _ in range(count):
            step()
        synchronise(work.device)

    several(WARM_UP_STEPS)
    gate.wait(PATIENCE)
    several(steps)
    gate.wait(PATIENCE)
    with turn:
        several(steps)
    gate.wait(PATIENCE)
