"""Whether the GPUs of this machine can be trained on: found out by a process that may hang.

Doctor and the driver of a sweep try everything. They do not import torch here, and leave no CUDA
context behind. A worker, which does both anyway, tries only what its trial cannot do without.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from analysis.errors import InputError, last_line
from cluster.nvidia import Smi, mps_runs, run_bounded, smi
from orchestrator import gpu_probe
from orchestrator.checks import Check, compiler

PROBE_SECONDS = 120.0
"""Time limit of the process that tries the GPUs: most of its time is importing torch, which takes
tens of seconds from a cold network file system."""
OLDEST_DRIVERS: Mapping[int, int] = {11: 450, 12: 525, 13: 580}
"""Oldest NVIDIA driver of each major version of CUDA (NVIDIA, "CUDA Compatibility", section Minor
Version Compatibility)."""
OTHER_MAKERS = ("/dev/kfd", "/dev/dri/renderD*")
"""Device files of GPUs that are not NVIDIA's. A program on those is not checked any further."""
DRIVER_FILE = Path("/proc/driver/nvidia/version")
DRIVER = "driver"
"""Name of the check of driver and torch together."""

Use = Literal["torch", "driver"]
"""What trials need of a GPU: that torch works on it, or that a driver answers."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What trying one GPU gave."""

    name: str = ""
    memory_bytes: float = 0.0
    product_error: str | None = None
    compile_error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What `gpu_probe` reported, as far as it came."""

    ended: str | None = None
    """How and where it ended too early; None if it came to its end."""
    driver_cuda: int | None = None
    """Newest CUDA that the driver knows, as 1000 times its major and 10 times its minor number."""
    driver_error: str | None = None
    driver_gpus: int = 0
    torch: str | None = None
    """Version of torch."""
    torch_cuda: str | None = None
    torch_hip: str | None = None
    torch_gpus: int = 0
    gpus: tuple[Gpu, ...] = ()


def use_of(trainer: str) -> Use | None:
    """Return what trials of a trainer need of the GPUs that they ask for; None for nothing."""
    uses: dict[str, Use] = {"pretrain": "torch", "command": "driver"}
    return uses.get(trainer)


def probe(
    use: Use = "torch",
    *,
    device: str | None = None,
    offered: int = 0,
    seconds: float = PROBE_SECONDS,
    environment: Mapping[str, str] | None = None,
) -> Probe:
    """Try the GPUs that this process sees, in a process of its own, for at most `seconds`.

    Parameters
    ----------
    use
        Whether torch is tried too.
    device
        One device, such as "cpu", in place of all GPUs.
    offered
        GPUs that Ray says this node has. Some versions of Ray hide them from a task without GPUs,
        which this undoes.
    seconds
        After which the process is killed, and its last stage reported.
    environment
        Environment of the process; by default this one's.
    """
    command = [sys.executable, "-P", gpu_probe.__file__]
    command += ["--driver-only"] if use == "driver" else []
    command += ["--device", device] if device else []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        env = dict(os.environ if environment is None else environment)
        # Caches of its own: a function that was compiled before needs no compiler.
        env |= dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"), directory)
        env["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        if offered and env.get("CUDA_VISIBLE_DEVICES") == "":
            del env["CUDA_VISIBLE_DEVICES"]
        outcome = run_bounded(command, seconds, environment=env)
    report = _report(outcome.output)
    stage = report.pop("stage", "its start")
    ended = outcome.trouble
    if ended is None and stage:
        ended = "ended early"
    if ended is not None and outcome.errors:
        ended += f" ({last_line(outcome.errors)})"
    return Probe(**report, ended=ended and f"{ended} at this step: {stage or 'its end'}")


def _report(output: str) -> dict[str, Any]:
    """Return the fields of a `Probe` from the lines that the program printed."""
    report: dict[str, Any] = {}
    gpus: dict[str, dict[str, Any]] = {}
    for line in output.splitlines():
        try:
            values = json.loads(line)
        except ValueError:  # a library's own words, or a line cut short
            continue
        if isinstance(values, dict) and "device" in values:
            gpus.setdefault(values.pop("device"), {}).update(values)
        elif isinstance(values, dict):
            report |= values
    return report | {"gpus": tuple(Gpu(**values) for values in gpus.values())}


def driver_version(gpus: Iterable[Smi]) -> str | None:
    """Return the version of the NVIDIA driver, such as "580.65.06", if one is loaded.

    nvidia-smi's answer is taken where there is one, else that of the kernel.
    """
    for gpu in gpus:
        return gpu.driver
    try:
        words = DRIVER_FILE.read_text().split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


def is_expected() -> bool:
    """Return whether there is any sign of an NVIDIA GPU here, so that trying it is worthwhile."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return False
    return bool(shutil.which("nvidia-smi")) or _device_files()


def _device_files() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def gpu_checks(use: Use = "torch", offered: int = 0) -> list[Check]:
    """Try this machine's GPUs: driver, CUDA, every GPU, compute mode, MPS, and the compiler.

    Parameters
    ----------
    use
        What trials need of them.
    offered
        GPUs that Ray says this machine has; 0 where nobody has asked Ray.
    """
    if not offered and not is_expected():
        return [Check.ok("GPUs", "none"), compiler(needed=False)]
    gpus = smi()
    report = probe(use, offered=offered)
    checks = [driver_check(report, driver_version(gpus), offered, use)]
    if checks[0].status == "failure" and not offered and not _device_files():
        # nvidia-smi alone is no GPU: Ray offers none either, and a sweep runs on cores.
        checks[0] = replace(checks[0], status="warning")
        return [*checks, compiler(needed=False)]
    if checks[0].status != "failure" and use == "torch":
        checks += _each_gpu(report)
        if report.torch_gpus < offered:
            checks.append(
                Check.failure(
                    "GPUs",
                    f"Ray offers {offered}, and torch sees {report.torch_gpus}",
                    "start Ray on this node with the number of GPUs that nvidia-smi lists",
                )
            )
    checks += _modes(gpus)
    checks.append(compiler(needed=use == "torch"))
    return checks


def is_of_gpus(check: Check) -> bool:
    """Return whether one of `gpu_checks` is of the driver or of GPUs one by one."""
    return check.name == DRIVER or check.name.startswith("GPU ")


def gpus_work(checks: Sequence[Check]) -> bool:
    """Return whether the driver works and at least one GPU, as far as they were tried."""
    driver = next((check for check in checks if check.name == DRIVER), None)
    each = [check for check in checks if check.name.startswith("GPU ")]
    return (
        driver is not None
        and driver.status != "failure"
        and (not each or any(check.status != "failure" for check in each))
    )


def driver_check(report: Probe, driver: str | None, offered: int = 0, use: Use = "torch") -> Check:
    """Return whether driver and torch work together, with both versions where they do not."""
    name = DRIVER
    versions = _versions(report, driver)
    if report.ended is not None:
        return Check.failure(
            name,
            f"the process that tries the GPUs {report.ended}",
            "see whether nvidia-smi answers; restart the machine if it does not",
        )
    if report.torch_gpus or (use == "driver" and report.driver_gpus):
        return Check.ok(name, versions)
    if use == "driver":
        if report.driver_cuda is None and _other_maker():
            return Check.ok(name, "not NVIDIA's, and not checked")
        return Check.failure(name, f"no GPU answers: {versions}", _driver_remedy(report, offered))
    return Check.failure(name, f"torch sees no GPU: {versions}", _driver_remedy(report, offered))


def _versions(report: Probe, driver: str | None) -> str:
    """Name the versions of driver, CUDA and torch, and what the driver complains of."""
    parts = [f"driver {driver}" if driver else "no NVIDIA driver"]
    if report.driver_cuda is not None:
        major, minor = report.driver_cuda // 1000, report.driver_cuda % 1000 // 10
        parts[0] += f" (CUDA up to {major}.{minor})"
    if report.torch is not None:
        built = f"for CUDA {report.torch_cuda}" if report.torch_cuda else "without CUDA"
        built = f"for ROCm {report.torch_hip}" if report.torch_hip else built
        parts.append(f"torch {report.torch} {built}")
    if report.driver_error:
        parts.append(report.driver_error)
    return ", ".join(parts)


def _driver_remedy(report: Probe, offered: int) -> str:
    """Say what to do where no GPU answers."""
    if report.torch_hip is not None:
        return "see what rocm-smi says of the GPUs, and whether HIP_VISIBLE_DEVICES hides them"
    if report.driver_cuda and report.torch and not report.torch_cuda:
        return "install a torch with CUDA, as https://pytorch.org/get-started says"
    if report.driver_cuda and report.torch_cuda:
        major = int(report.torch_cuda.partition(".")[0])
        if report.driver_cuda // 1000 < major:
            driver = OLDEST_DRIVERS.get(major)
            newer = f"driver {driver} or newer" if driver else "a newer driver"
            return f"install {newer}, or a torch for CUDA {report.driver_cuda // 1000}"
    if report.driver_cuda is None:
        fewer = ", or start Ray there with --num-gpus=0" if offered else ""
        return f"install the NVIDIA driver, in a container with its toolkit{fewer}"
    return "see what nvidia-smi says of the GPUs, and whether CUDA_VISIBLE_DEVICES hides them"


def _other_maker() -> bool:
    return any(any(Path("/").glob(pattern.lstrip("/"))) for pattern in OTHER_MAKERS)


def _each_gpu(report: Probe) -> list[Check]:
    """Return a check for each kind of result, with the GPUs that gave it."""
    numbers: dict[Gpu, list[str]] = {}
    for index, gpu in enumerate(report.gpus):
        numbers.setdefault(gpu, []).append(str(index))
    checks = []
    for gpu, indices in numbers.items():
        name = f"GPU {', '.join(indices)}"
        what = f"{gpu.name}, {gpu.memory_bytes / 1e9:.0f} GB"
        if gpu.product_error is not None:
            checks.append(
                Check.failure(
                    name,
                    f"{what}: a matrix product fails ({gpu.product_error})",
                    "see what nvidia-smi and the kernel's log (Xid) say of it; hide it with "
                    "CUDA_VISIBLE_DEVICES where Ray starts",
                )
            )
        elif gpu.compile_error is not None:
            checks.append(
                Check.warning(
                    name,
                    f"{what}: compiling fails ({gpu.compile_error})",
                    "install a C compiler and Python's headers; until then trials train without "
                    "compilation, more slowly",
                )
            )
        else:
            checks.append(Check.ok(name, f"{what}: a matrix product and a compilation work"))
    return checks


def _modes(gpus: list[Smi]) -> list[Check]:
    """Return the checks of the GPUs' compute mode and of MPS, where nvidia-smi tells."""
    if not gpus:
        return []
    mps = mps_runs()
    by_mode: dict[str, list[str]] = {}
    for gpu in gpus:
        by_mode.setdefault(gpu.compute_mode, []).append(str(gpu.index))
    checks = []
    for mode, indices in by_mode.items():
        where = f"{mode} on GPU {', '.join(indices)}"
        reset = f"nvidia-smi -i {','.join(indices)} -c DEFAULT (as root)"
        if mode == "Prohibited":
            checks.append(Check.failure("compute mode", f"{where}: no process may use it", reset))
        elif mode.startswith("Exclusive") and not mps:
            checks.append(
                Check.warning(
                    "compute mode",
                    f"{where}: one process at a time, so trials that share a GPU fail",
                    f"{reset}, or start MPS",
                )
            )
        else:
            checks.append(Check.ok("compute mode", where))
    text = "running" if mps else "not running: trials that share a GPU take turns on it"
    return [*checks, Check.ok("MPS", text)]


def require_gpu(use: Use) -> None:
    """Check, once a process, that the GPUs granted to it work.

    Only the driver is tried by a process of its own. CUDA and a matrix product are tried here,
    where a trial would use them next, and nothing is compiled: many workers begin at once, and
    training goes on where compiling fails.

    Raises
    ------
    InputError
        If they do not work, with the versions of driver, CUDA and torch.
    """
    _required(use, os.environ.get("CUDA_VISIBLE_DEVICES"))


@cache
def _required(use: Use, visible: str | None) -> None:
    """Try the GPUs; `visible` says which they are, so that others are tried anew."""
    report = probe("driver")
    if use == "torch" and report.ended is None:
        report = _with_torch(report)
    if driver_check(report, None, 0, use).status == "failure":
        check = driver_check(report, driver_version(smi()), 0, use)
        raise InputError(f"a trial was given a GPU here, and {check.value}: {check.remedy}")
    for index in range(report.torch_gpus):
        error = gpu_probe.product_error(f"cuda:{index}")
        if error is not None:
            name = f"GPU {index} of those in CUDA_VISIBLE_DEVICES={visible}"
            raise InputError(f"a matrix product fails on {name}: {error}")


def _with_torch(report: Probe) -> Probe:
    """Return a report with what torch sees in this process."""
    import torch

    return replace(
        report,
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        torch_hip=torch.version.hip,
        torch_gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
    )
