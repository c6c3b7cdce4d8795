"""What a node itself says of its NVIDIA GPUs, through the driver's own programs.

These see the GPUs that Ray hides from a process, and take no memory on them.
"""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

SMI_SECONDS = 20.0
"""Time limit of each of the driver's programs. nvidia-smi answers in a second or two where the
driver works, and takes longer where no process keeps it loaded."""
KILL_SECONDS = 5.0
"""Wait for a killed process. One that a driver holds in the kernel may never end, and is left."""
COLUMNS = ("index", "name", "driver_version", "compute_mode", "memory.total")
"""What nvidia-smi is asked for (nvidia-smi --help-query-gpu)."""
_MPS_QUESTION = "get_server_list\n"
"""A command that the control daemon of MPS answers whether or not it has a server yet."""
_NO_DAEMON = "cannot find mps control daemon"
"""What that program says, in any case, where there is none."""
_MEBIBYTE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a program printed, and how it ended."""

    output: str
    errors: str
    """What it printed to its standard error."""
    trouble: str | None
    """How it ended where that was not well."""


@dataclass(frozen=True, kw_only=True)
class Smi:
    """One GPU as nvidia-smi describes it."""

    index: int
    name: str
    driver: str
    compute_mode: str
    memory_bytes: float | None
    """Total memory; None where the driver does not say."""


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
    gpus = smi()
    if not gpus:
        return None
    least = min(gpus, key=lambda gpu: gpu.memory_bytes or 0.0)
    mps = mps_runs()
    # Under MPS the one process of an exclusive GPU is its server, which takes many clients.
    exclusive = any(gpu.compute_mode.startswith("Exclusive") for gpu in gpus) and not mps
    return GpuReport(name=least.name, memory_bytes=least.memory_bytes, exclusive=exclusive, mps=mps)


def smi() -> list[Smi]:
    """Return what nvidia-smi says of the GPUs; nothing where it is not there or does not answer."""
    query = f"--query-gpu={','.join(COLUMNS)}"
    return parse_smi(_answer(["nvidia-smi", query, "--format=csv,noheader,nounits"]) or "")


def parse_smi(output: str) -> list[Smi]:
    """Return the GPUs in nvidia-smi's CSV of `COLUMNS`; lines of another form are passed over.

    Examples
    --------
    >>> line = "0, NVIDIA H100 80GB HBM3, 580.65.06, Exclusive_Process, 81559"
    >>> [(gpu.index, gpu.driver, gpu.compute_mode) for gpu in parse_smi(line)]
    [(0, '580.65.06', 'Exclusive_Process')]
    """
    gpus = []
    for row in csv.reader(io.StringIO(output), skipinitialspace=True):
        if len(row) != len(COLUMNS) or not row[0].isdecimal():
            continue
        index, name, driver, mode, memory = (cell.strip() for cell in row)
        gpus.append(
            Smi(
                index=int(index),
                name=name,
                driver=driver,
                compute_mode=mode,
                memory_bytes=float(memory) * _MEBIBYTE if memory.isdecimal() else None,
            )
        )
    return gpus


def mps_runs() -> bool:
    """Return whether the control daemon of NVIDIA's Multi-Process Service answers here."""
    return _answer(["nvidia-cuda-mps-control"], _MPS_QUESTION) is not None


def _answer(command: Sequence[str], question: str = "") -> str | None:
    """Return what a program prints; None where there is no such program, or it fails or hangs."""
    try:
        outcome = run_bounded(command, SMI_SECONDS, question=question)
    except OSError:
        return None
    if outcome.trouble or _NO_DAEMON in (outcome.output + outcome.errors).casefold():
        return None
    return outcome.output


def run_bounded(
    command: Sequence[str],
    seconds: float,
    *,
    environment: Mapping[str, str] | None = None,
    question: str = "",
) -> Outcome:
    """Run a program that may hang in the driver, and wait for it no longer than a limit.

    It prints to files: waiting for the end of a pipe would take as long as the process is held.

    Parameters
    ----------
    command
        The program and its arguments.
    seconds
        Limit after which the program and its children are killed.
    environment
        Environment of the program; by default this process's own.
    question
        Text for its standard input.

    Raises
    ------
    OSError
        If the program cannot be started.
    """
    trouble = None
    with (
        tempfile.TemporaryFile("w+") as asked,
        tempfile.TemporaryFile("w+", errors="replace") as output,
        tempfile.TemporaryFile("w+", errors="replace") as errors,
    ):
        asked.write(question)
        asked.seek(0)
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=asked,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            trouble = f"did not end within {seconds:.0f} s"
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILL_SECONDS)
        else:
            if status:
                trouble = f"ended with exit status {status}"
        output.seek(0)
        errors.seek(0)
        return Outcome(output=output.read(), errors=errors.read(), trouble=trouble)
