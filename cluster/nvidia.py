"""What a node itself says of its NVIDIA GPUs, through the driver's own programs.

These see the GPUs that Ray hides from a process, and take no memory on them.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

PATIENCE_SECONDS = 10.0
"""Limit of each program: nvidia-smi takes seconds where no process keeps the driver loaded."""
_GPUS = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,compute_mode",
    "--format=csv,noheader,nounits",
)
_MPS = ("nvidia-cuda-mps-control",)
_MPS_QUESTION = "get_server_list\n"
"""A command that the control daemon of MPS answers whether or not it has a server yet."""
_NO_DAEMON = "cannot find mps control daemon"
"""What that program says, in any case, where there is none."""
_MEBIBYTE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class GpuReport:
    """The GPUs of one node, as its driver has them; of several types, the one of least memory."""

    name: str
    memory_bytes: float | None
    """Total memory of one GPU; None where the driver does not say."""
    exclusive: bool = False
    """Whether a GPU takes one process alone, and MPS does not share that one."""
    mps: bool = False
    """Whether the control daemon of MPS answers here."""


def gpu_report() -> GpuReport | None:
    """Ask this node's driver for its GPUs; None where there is no driver, or it says nothing."""
    text = _answer(_GPUS)
    if text is None:
        return None
    gpus = [_parsed(line) for line in text.splitlines() if line.count(",") >= 2]
    if not gpus:
        return None
    name, memory, _ = min(gpus, key=lambda gpu: gpu[1] or 0.0)
    mps = _answer(_MPS, _MPS_QUESTION) is not None
    # Under MPS the one process of an exclusive GPU is its server, which takes many clients.
    exclusive = any(mode.startswith("exclusive") for _, _, mode in gpus) and not mps
    return GpuReport(name=name, memory_bytes=memory, exclusive=exclusive, mps=mps)


def _parsed(line: str) -> tuple[str, float | None, str]:
    """Name, bytes of memory and compute mode of one GPU."""
    name, memory, mode = (part.strip() for part in line.rsplit(",", 2))
    size = float(memory) * _MEBIBYTE if memory.isdecimal() else None
    return name, size, mode.casefold()


def _answer(command: tuple[str, ...], question: str = "") -> str | None:
    """What a program prints; None where there is no such program, or it fails or takes long."""
    try:
        done = subprocess.run(
            command,
            input=question,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return None if _NO_DAEMON in (done.stdout + done.stderr).casefold() else done.stdout
