"""What a node says of its GPUs, with programs that answer as NVIDIA's do."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import nvidia
from cluster.nvidia import GpuReport, gpu_report

H100S = "0, NVIDIA H100 80GB HBM3, 580.65.06, Default, 81559\n" * 2
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes programs of a name that print a text and end with a status; no others are found."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def make(name: str, text: str, status: int = 0, *, seconds: float = 0.0) -> None:
        program = tmp_path / name
        program.write_text(
            f"#!{sys.executable} -S\nimport sys, time\n"
            f"time.sleep({seconds})\nprint({text!r}, end='')\nsys.exit({status})\n"
        )
        program.chmod(0o755)

    return make


def test_a_node_without_a_driver_says_nothing(install: Install) -> None:
    assert gpu_report() is None
    install("nvidia-smi", "NVIDIA-SMI has failed because it couldn't communicate", 9)
    assert gpu_report() is None
    install("nvidia-smi", "No devices were found\n")
    assert gpu_report() is None


def test_a_node_says_name_and_memory_of_its_gpus(install: Install) -> None:
    install("nvidia-smi", H100S)
    found = gpu_report()
    assert found == GpuReport(name="NVIDIA H100 80GB HBM3", memory_bytes=81559 * 2**20)


def test_of_several_types_the_one_of_least_memory_counts(install: Install) -> None:
    install("nvidia-smi", H100S + "2, NVIDIA L4, 580.65.06, Default, 23034\n")
    found = gpu_report()
    assert found is not None
    assert (found.name, found.memory_bytes) == ("NVIDIA L4", 23034 * 2**20)


def test_memory_that_a_driver_does_not_tell_is_not_known(install: Install) -> None:
    install("nvidia-smi", "0, NVIDIA GB10, 580.65.06, Default, [N/A]\n")
    assert gpu_report() == GpuReport(name="NVIDIA GB10", memory_bytes=None)


@pytest.mark.parametrize(
    ("text", "status", "mps"),
    [
        ("", 0, True),  # a daemon that has no server yet
        ("4711\n", 0, True),
        ("Cannot find MPS control daemon process\n", 1, False),
        ("Cannot find MPS control daemon process\n", 0, False),
    ],
)
@pytest.mark.parametrize("mode", ["Default", "Exclusive_Process"])
def test_a_gpu_that_takes_one_process_takes_several_by_mps(
    install: Install, text: str, status: int, mps: bool, mode: str
) -> None:
    install("nvidia-smi", H100S.replace("Default", mode))
    install("nvidia-cuda-mps-control", text, status)
    found = gpu_report()
    assert found is not None
    assert found.mps is mps
    assert found.exclusive is (mode == "Exclusive_Process" and not mps)


def test_a_driver_that_hangs_is_not_waited_for(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "SMI_SECONDS", 1.0)
    install("nvidia-smi", H100S, seconds=600)
    assert gpu_report() is None


def test_a_program_that_the_driver_holds_in_the_kernel_is_left_alone(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No signal ends it, here because none is sent."""
    spared: list[int] = []
    kill = os.killpg
    monkeypatch.setattr(nvidia, "SMI_SECONDS", 0.5)
    monkeypatch.setattr(nvidia, "KILL_SECONDS", 0.5)
    monkeypatch.setattr(os, "killpg", lambda pid, _: spared.append(pid))
    install("nvidia-smi", H100S, seconds=600)
    started = time.monotonic()
    try:
        assert gpu_report() is None
        assert time.monotonic() - started < 300
    finally:
        for pid in spared:
            kill(pid, signal.SIGKILL)
    assert spared
