"""The part of a GPU's memory that a process keeps to where others have the rest."""

from __future__ import annotations

import warnings

import torch

from trainers.device import this_device
from trainers.memory import CONTEXT_BYTES

EXPANDABLE = "expandable_segments:True"
"""Segments that grow leave no holes between them, which a share has no room for (torch, "CUDA
semantics", PYTORCH_ALLOC_CONF)."""


def keep_to_share(share: float) -> None:
    """Have this process run out of memory by itself rather than take that of its neighbours.

    The allocator may have `share` of the GPU's memory less what a process takes before any tensor.
    Nothing is done where there is no GPU.
    """
    device = this_device()
    if device.type != "cuda":
        return
    # Torch has no public function for it after its start, and no promise to keep this one.
    configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if configure is None:
        warnings.warn(
            f"torch {torch.__version__} does not let a process choose {EXPANDABLE}: memory that "
            "trials leave in pieces may run out earlier on a share of a GPU; set "
            f"PYTORCH_ALLOC_CONF={EXPANDABLE} where Ray starts",
            stacklevel=2,
        )
    else:
        configure(EXPANDABLE)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(allocator_fraction(share, total), device)


def allocator_fraction(share: float, total_bytes: float) -> float:
    """The fraction of a GPU's memory that its allocator may have on a share of it.

    Examples
    --------
    >>> allocator_fraction(1 / 4, 80e9)
    0.24
    """
    return max(0.0, share - CONTEXT_BYTES / total_bytes)
