"""What is found out about GPUs: by the real program, on drivers and torches that are broken.

A driver is a small library in C that answers as a broken or an old one would; a torch is a module
that hangs, crashes or sees no GPU.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

import orchestrator
from cluster import nvidia
from cluster.nvidia import smi
from orchestrator import gpu_checks
from orchestrator.checks import Check
from orchestrator.gpu_checks import Gpu, driver_check, probe
from tests.waiting import wait

MakeTorch = Callable[..., dict[str, str]]
MakeDriver = Callable[..., dict[str, str]]

DRIVER = """
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuInit(unsigned int flags) { return STATUS; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuGetErrorName(int status, const char **name) {
    *name = "CUDA_ERROR_SYSTEM_NOT_READY";
    return 0;
}
"""

TORCH = """
import types

__version__ = "2.13.0"
version = types.SimpleNamespace(cuda="13.0", hip=None)
float32, bfloat16 = "fp32", "bf16"
COUNT, BAD = {count}, {bad}

class cuda:
    is_available = staticmethod(lambda: COUNT > 0)
    device_count = staticmethod(lambda: COUNT)
    get_device_properties = staticmethod(
        lambda device: types.SimpleNamespace(name="NVIDIA X", total_memory=80e9)
    )

class ones:
    def __init__(self, *size, device, dtype=None):
        self.device = device
    def __matmul__(self, other):
        if self.device in BAD:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        return self
    __mul__ = __add__ = lambda self, other: self
    def __eq__(self, other):
        return types.SimpleNamespace(all=lambda: True)

compile = lambda function, dynamic: function
"""


@pytest.fixture
def torch_of(tmp_path: Path) -> MakeTorch:
    """Makes the environment in which torch is another module."""

    def make(text: str = TORCH, count: int = 0, bad: tuple[str, ...] = ()) -> dict[str, str]:
        directory = tmp_path / "modules"
        directory.mkdir(exist_ok=True)
        text = text.replace("{count}", str(count)).replace("{bad}", repr(bad))
        (directory / "torch.py").write_text(text)
        return {**os.environ, "PYTHONPATH": str(directory)}

    return make


@pytest.fixture
def driver_of(tmp_path: Path) -> MakeDriver:
    """Makes the environment in which a CUDA driver says what a test wants."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc to build a driver")

    def make(version: int, *, status: int = 0, count: int = 0) -> dict[str, str]:
        directory = tmp_path / "driver"
        directory.mkdir()
        (directory / "driver.c").write_text(DRIVER)
        macros = [f"-DVERSION={version}", f"-DSTATUS={status}", f"-DCOUNT={count}"]
        command = ["gcc", "-shared", "-fPIC", *macros, "-o", "libcuda.so.1", "driver.c"]
        subprocess.run(command, cwd=directory, check=True)
        return {"LD_LIBRARY_PATH": str(directory)}

    return make


def test_a_driver_that_is_too_old_for_torch_is_named_with_both_versions(
    torch_of: MakeTorch, driver_of: MakeDriver
) -> None:
    """As torch from 2.11 on does with a driver before 580: it sees no GPU and raises nothing."""
    found = probe(environment=torch_of() | driver_of(12040, count=8))
    check = driver_check(found, "550.54.15", offered=8)
    assert check.status == "failure"
    for part in ("550.54.15", "CUDA up to 12.4", "torch 2.13.0 for CUDA 13.0", "sees no GPU"):
        assert part in check.value
    assert "driver 580 or newer, or a torch for CUDA 12" in check.remedy


def test_what_the_driver_itself_complains_of_is_passed_on(
    torch_of: MakeTorch, driver_of: MakeDriver
) -> None:
    """A node with NVSwitch whose fabric manager does not run."""
    found = probe(environment=torch_of() | driver_of(13000, status=802))
    check = driver_check(found, "580.65.06")
    assert check.status == "failure"
    assert "CUDA_ERROR_SYSTEM_NOT_READY (802)" in check.value
    assert "nvidia-smi" in check.remedy
    check = driver_check(replace(found, torch=None, torch_cuda=None), "580.65.06", use="driver")
    assert check.status == "failure"
    assert "nvidia-smi" in check.remedy
    check = driver_check(replace(found, torch_cuda=None), "580.65.06")
    assert "install a torch with CUDA" in check.remedy


def test_a_program_of_ones_own_needs_a_driver_that_answers_and_no_torch(
    torch_of: MakeTorch, driver_of: MakeDriver
) -> None:
    hanging = torch_of("import time; time.sleep(600)")
    found = probe("driver", environment=hanging | driver_of(13000, count=2), seconds=60)
    assert driver_check(found, "580.65.06", use="driver").status == "ok"
    found = probe("driver", environment=hanging | {"LD_LIBRARY_PATH": ""}, seconds=60)
    if found.driver_error is None:
        pytest.skip("this machine has a driver")
    check = driver_check(found, None, use="driver")
    assert check.status == "failure"
    assert "no NVIDIA driver" in check.value


def test_this_torch_without_cuda_is_named() -> None:
    found = probe(environment={**os.environ, "CUDA_VISIBLE_DEVICES": "-1"})
    if found.torch_cuda is not None:
        pytest.skip("this torch was built with CUDA")
    check = driver_check(found, None, offered=2)
    assert check.status == "failure"
    assert f"torch {found.torch} without CUDA" in check.value
    assert "--num-gpus=0" in check.remedy


def test_a_driver_that_hangs_is_left_alone_after_the_limit(
    torch_of: MakeTorch, tmp_path: Path
) -> None:
    """And the process that hung is gone."""
    text = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
    started = time.monotonic()
    found = probe(environment=torch_of(text + "time.sleep(600)"), seconds=15)
    assert time.monotonic() - started < 300
    assert found.ended == "did not end within 15 s at this step: importing torch"
    check = driver_check(found, "580.65.06")
    assert check.status == "failure"
    assert "nvidia-smi" in check.remedy
    pid = int((tmp_path / "pid").read_text())
    wait(lambda: not psutil.pid_exists(pid))


def test_a_torch_that_crashes_is_named_with_the_step(torch_of: MakeTorch) -> None:
    found = probe(environment=torch_of("import os; os.abort()"))
    assert found.ended == "ended with exit status -6 at this step: importing torch"
    found = probe(environment=torch_of("raise ImportError('libcudnn.so.9: no such file')"))
    assert found.ended is not None
    assert "libcudnn.so.9: no such file" in found.ended


def test_one_bad_gpu_of_several_is_named(
    torch_of: MakeTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = probe(environment=torch_of(count=3, bad=("cuda:1",)))
    monkeypatch.setattr(gpu_checks, "probe", lambda *_, **__: found)
    checks = gpu_checks.gpu_checks("torch", 3)
    by_name = {check.name: check for check in checks}
    assert by_name["driver"].status == "ok"
    assert by_name["GPU 0, 2"].status == "ok"
    bad = by_name["GPU 1"]
    assert bad.status == "failure"
    assert "uncorrectable ECC error" in bad.value


def test_fewer_gpus_than_ray_offers_are_a_failure(
    torch_of: MakeTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = probe(environment=torch_of(count=3))
    monkeypatch.setattr(gpu_checks, "probe", lambda *_, **__: found)
    (check,) = [c for c in gpu_checks.gpu_checks("torch", 4) if c.status == "failure"]
    assert check.value == "Ray offers 4, and torch sees 3"


EAGER = """
import torch
function = torch.compile(lambda x: x * 2 + 1, dynamic=False)
assert bool((function(torch.ones(8)) == 3).all())
"""


@pytest.mark.slow
def test_where_no_compiler_is_torch_says_so_and_trains_without(tmp_path: Path) -> None:
    """The same functions of torch and the same search as on a GPU, with the CPU's compiler."""
    bare = {**os.environ, "PATH": str(tmp_path)} | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    found = probe(device="cpu", environment=bare)
    assert found.ended is None
    (gpu,) = found.gpus
    assert gpu.product_error is None
    assert "compiler" in (gpu.compile_error or "").lower()
    command = [sys.executable, "-c", EAGER]
    assert subprocess.run(command, env=bare, capture_output=True, check=False).returncode != 0
    eager = bare | {"TORCHDYNAMO_DISABLE": "1"}
    subprocess.run(command, env=eager, capture_output=True, check=True)
    assert probe(device="cpu").gpus == (Gpu(),)


REQUIRE = """
from analysis.errors import InputError
from orchestrator.gpu_checks import require_gpu

for _ in range(2):
    try:
        require_gpu("torch")
    except InputError as error:
        print(error)
"""
LOGGED = """
def log(word):
    with open({log!r}, "a") as file:
        file.write(word + " ")

log("imported")

def compile(function, dynamic):
    log("compiled")
    return function
"""


def _required(environment: dict[str, str]) -> str:
    """Return what a worker's check prints in a process of its own."""
    root = Path(orchestrator.__file__).parents[1]
    environment = environment | {"PYTHONPATH": f"{environment['PYTHONPATH']}{os.pathsep}{root}"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", REQUIRE],
        env=environment | {"CUDA_VISIBLE_DEVICES": "7"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout


def test_a_worker_imports_torch_once_and_compiles_nothing(
    torch_of: MakeTorch, driver_of: MakeDriver, tmp_path: Path
) -> None:
    """With shares of GPUs 64 workers begin at once on a node: each tries what it needs itself."""
    log = tmp_path / "log"
    text = TORCH + LOGGED.replace("{log!r}", repr(str(log)))
    assert _required(torch_of(text, count=1) | driver_of(13000, count=1)) == ""
    assert log.read_text().split() == ["imported"]


def test_a_worker_refuses_a_gpu_whose_product_fails_and_a_torch_that_sees_none(
    torch_of: MakeTorch, driver_of: MakeDriver
) -> None:
    driver = driver_of(12040, count=1)
    for line in _required(torch_of(count=1, bad=("cuda:0",)) | driver).splitlines():
        assert "a matrix product fails on GPU 0 of those in CUDA_VISIBLE_DEVICES=7" in line
        assert "uncorrectable ECC error" in line
    first, second = _required(torch_of() | driver).splitlines()  # it is asked again until it works
    assert first == second
    assert "a trial was given a GPU here, and torch sees no GPU" in first
    assert "torch 2.13.0 for CUDA 13.0" in first
    assert "install driver 580 or newer, or a torch for CUDA 12" in first


def _program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def _nvidia_smi(tmp_path: Path, script: str, patch: pytest.MonkeyPatch) -> None:
    _program(tmp_path / "nvidia-smi", script)
    patch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


LINES = """echo '0, NVIDIA H100 80GB HBM3, 580.65.06, Exclusive_Process, 81559'
echo '1, NVIDIA H100 80GB HBM3, 580.65.06, Prohibited, [N/A]'
echo '2, NVIDIA H100 80GB HBM3, 580.65.06, Default, 81559'"""


def test_compute_modes_that_refuse_processes_are_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _nvidia_smi(tmp_path, LINES, monkeypatch)
    exclusive, prohibited, default, mps = gpu_checks._modes(smi())
    assert exclusive.status == "warning"
    assert "nvidia-smi -i 0 -c DEFAULT" in exclusive.remedy
    assert (prohibited.status, default.status) == ("failure", "ok")
    assert mps.name == "MPS"
    assert "not running" in mps.value
    _program(tmp_path / "nvidia-cuda-mps-control", 'read -r line; test "$line" = get_server_list')
    exclusive, *_, mps = gpu_checks._modes(smi())
    assert (exclusive.status, mps.value) == ("ok", "running")


def test_an_nvidia_smi_that_hangs_or_fails_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia, "SMI_SECONDS", 0.5)
    _nvidia_smi(tmp_path, "sleep 600", monkeypatch)
    assert smi() == []
    monkeypatch.undo()
    _nvidia_smi(tmp_path, f"{LINES}\nexit 9", monkeypatch)
    assert smi() == []


def test_nothing_is_tried_where_nobody_speaks_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "probe", None)
    assert gpu_checks.gpu_checks()[0] == Check.ok("GPUs", "none")


@pytest.mark.gpu
def test_a_real_gpu_works() -> None:
    found = gpu_checks.gpu_checks()
    assert [check for check in found if check.status == "failure"] == []
    assert any("a matrix product and a compilation work" in check.value for check in found)
