"""The device that a process trains on, and how fast it is."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

from analysis.errors import InputError
from trainers.gpus import known_type
from trainers.memory import HEADROOM
from trainers.template import GRANTED
from trainers.trial import Precision

PRODUCTS = 30
"""That a peak is measured by."""


@lru_cache(maxsize=4)
def peak_flops(device: torch.device, precision: Precision = "fp32") -> float:
    """Peak FLOP/s of a device in a precision: a GPU's by its datasheet, if its type is known.

    Otherwise measured, once a process, as the best of many products: of a CPU by the time that its
    thread computes, so that neighbours do not count; of a GPU by the clock.
    """
    if device.type == "cuda":
        known = datasheet_flops(torch.cuda.get_device_name(device), precision)
        if known is not None:
            return known
    # On a GPU 0.2 GB at most, a part of what `HEADROOM` leaves.
    size = 1024 if device.type == "cpu" else 4096
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(PRODUCTS):
        synchronise(device)
        start = clock()
        torch.mm(a, b)
        synchronise(device)
        best = min(best, clock() - start)
    return float(2 * size**3 / best)


def datasheet_flops(name: str, precision: Precision) -> float | None:
    """Peak FLOP/s of a GPU by what its driver calls it; None for unknown types and parts of one.

    >>> datasheet_flops("NVIDIA H100 80GB HBM3", "bf16")
    989000000000000.0
    >>> datasheet_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16")
    """
    known = known_type(name)
    return None if known is None else known.training_flops(precision)


def room(device: torch.device) -> float | None:
    """Bytes that training may take on a device, by what others leave there; None on a CPU.

    There a result is the same to the bit whatever the machine, so nothing may depend on its memory.
    """
    if device.type != "cuda":
        return None
    # This process's context is not in what is free, and what torch keeps of earlier trials is.
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    permitted = torch.cuda.get_per_process_memory_fraction(device) * total
    return (1 - HEADROOM) * min(free + kept, permitted)


def this_device() -> torch.device:
    """Return the GPU that this process was given, else the CPU.

    Outside of a sweep, where nobody gives any, a GPU that is there is taken.

    Raises
    ------
    InputError
        If it was given one that torch does not see: it would train on the CPU.
    """
    granted = os.environ.get(GRANTED)
    if granted == "0":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if granted is None:
        return torch.device("cpu")
    raise InputError(
        f"this process was given {granted} GPU, and torch {torch.__version__} sees none: "
        "`isoflop doctor` says why"
    )


def device_name(device: torch.device, count: int = 1) -> str:
    """What a row says that it was measured on, as in "8 x NVIDIA H100 80GB HBM3"."""
    several = f"{count} x " if count > 1 else ""
    if device.type == "cuda":
        return several + torch.cuda.get_device_name(device)
    return f"{several}{platform.machine()} CPU, 1 thread"


@contextmanager
def reproducible(device: torch.device, wanted: bool) -> Iterator[None]:
    """Have a GPU take only kernels that give the same bits again, where that is wanted.

    Others add up in the order in which their threads come. An operation that has no other kernel
    raises, with its name. A CPU is left as it is: one thread adds up in one order.
    """
    if not wanted or device.type != "cuda":
        yield
        return
    require_reproducible_products()
    os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")  # kernels are not chosen by clock
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def require_reproducible_products() -> None:
    """Have cuBLAS give the same bits again: before a process's first product, when torch looks."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def synchronise(device: torch.device) -> None:
    """Wait until what is queued is done, so that clocks are right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
