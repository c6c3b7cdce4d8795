"""GPU types, and how long a trial takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from analysis.errors import InputError
from trainers.flops import trial_flops
from trainers.simulated import SimulatedSettings
from trainers.trial import Trial


@dataclass(frozen=True, kw_only=True)
class GpuType:
    """What a vendor's datasheet says of one GPU."""

    name: str
    peak_flops: float
    """Dense tensor (matrix) peak in FLOP/s, accumulated in fp32. Datasheets that print the rate for
    2:4 sparsity are halved: training has none."""
    memory_bytes: float
    precision: Literal["bf16", "fp16"] = "bf16"
    """Of the peak; fp16 where the type has no bf16 tensor cores."""
    source: str
    """The document that says so."""


_H100 = "NVIDIA H100 Tensor Core GPU datasheet"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet"
_V100 = "NVIDIA V100 Tensor Core GPU datasheet"
_ADA = "NVIDIA Ada GPU architecture whitepaper, Appendix A"


def _type(
    name: str,
    teraflops: float,
    gigabytes: float,
    source: str,
    precision: Literal["bf16", "fp16"] = "bf16",
) -> GpuType:
    return GpuType(
        name=name,
        peak_flops=teraflops * 1e12,
        memory_bytes=gigabytes * 1e9,
        source=source,
        precision=precision,
    )


GPUS: tuple[GpuType, ...] = (
    _type("B200", 2250, 180, "NVIDIA HGX B200 datasheet"),
    _type("H200", 989, 141, "NVIDIA H200 Tensor Core GPU datasheet"),
    _type("H100 SXM", 989, 80, _H100),
    _type("H100 PCIe", 756, 80, _H100),
    _type("H100 NVL", 835, 94, _H100),
    _type("A100 80GB", 312, 80, _A100),
    _type("A100 40GB", 312, 40, _A100),
    _type("A40", 149.7, 48, "NVIDIA A40 datasheet"),
    _type("A30", 165, 24, "NVIDIA A30 Tensor Core GPU datasheet"),
    _type("A10", 125, 24, "NVIDIA A10 Tensor Core GPU datasheet"),
    _type("A10G", 70, 24, "NVIDIA A10G datasheet"),
    _type("L40S", 362, 48, "NVIDIA L40S datasheet"),
    _type("L40", 181, 48, "NVIDIA L40 datasheet"),
    _type("L4", 121, 24, "NVIDIA L4 Tensor Core GPU datasheet"),
    _type("V100 SXM2", 125, 32, _V100, "fp16"),
    _type("V100 PCIe", 112, 32, _V100, "fp16"),
    _type("T4", 65, 16, "NVIDIA T4 Tensor Core GPU datasheet", "fp16"),
    _type("RTX 4090", 165.2, 24, _ADA),
    _type("RTX 3090", 71, 24, "NVIDIA Ampere GA102 GPU architecture whitepaper, Appendix A"),
    _type("MI300X", 1307, 192, "AMD Instinct MI300X accelerator data sheet"),
)
"""Types by what clouds call them. Measure the MFU against these numbers, not against a boost."""

_VARIANTS: Mapping[str, str] = {"H100": "H100 SXM", "A100": "A100 80GB", "V100": "V100 SXM2"}
"""Which variant a bare name means: the one that most clouds rent out."""


def gpu_type(name: str) -> GpuType:
    """The type of that name, in any case, with or without spaces and dashes.

    Raises
    ------
    InputError
        If there is none, listing those there are.

    Examples
    --------
    >>> gpu_type("h100").name, gpu_type("rtx-4090").peak_flops / 1e12
    ('H100 SXM', 165.2)
    """
    types = {_plain(item.name): item for item in GPUS}
    types |= {_plain(short): types[_plain(full)] for short, full in _VARIANTS.items()}
    found = types.get(_plain(name).removeprefix("nvidia"))
    if found is None:
        known = ", ".join(item.name for item in GPUS)
        raise InputError(f"no GPU type {name!r} is known; there are {known}")
    return found


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


CPU_SECONDS_PER_BLOCK_STEP = 0.94e-3
CPU_SECONDS_PER_BLOCK_STEP_CUBIC = 2.25e-9
CPU_SECONDS_PER_TOKEN = 2.74e-6
CPU_FLOPS_PER_SECOND = 68e9
"""Fitted to 28 trials of widths 12 to 128 on one core: within 10% rms. Overhead of a step, its
Newton-Schulz (x width^3), work of a token that no matmul does, and the matmuls."""


def estimated_seconds(trial: Trial) -> float:
    """Wall seconds of `trial` on one CPU core. Elsewhere right only in proportion."""
    if trial.trainer == "simulated":
        return SimulatedSettings(**dict(trial.settings)).seconds
    block_steps = trial.hyperparameters.steps * trial.shape.depth
    return (
        CPU_SECONDS_PER_BLOCK_STEP * block_steps
        + CPU_SECONDS_PER_BLOCK_STEP_CUBIC * trial.shape.width**3 * block_steps
        + CPU_SECONDS_PER_TOKEN * trial.tokens
        + trial_flops(trial) / CPU_FLOPS_PER_SECOND
    )
