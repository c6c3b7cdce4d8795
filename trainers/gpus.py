"""GPU types, as their vendors' datasheets have them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from analysis.errors import InputError
from trainers.trial import Precision


@dataclass(frozen=True, kw_only=True)
class GpuType:
    """What a vendor's datasheet says of one GPU."""

    name: str
    peak_flops: float
    """Dense tensor (matrix) peak in FLOP/s, accumulated in fp32. Datasheets that print the rate for
    2:4 sparsity are halved: training has none."""
    fp32_flops: float
    """Peak in FLOP/s of fp32 products, which tensor cores do not do."""
    memory_bytes: float
    precision: Literal["bf16", "fp16"] = "bf16"
    """Of the peak; fp16 where the type has no bf16 tensor cores."""
    source: str
    """The document that says so."""

    def training_flops(self, precision: Precision) -> float:
        """Peak in FLOP/s of training in a precision; bf16 without tensor cores for it is fp32."""
        return self.peak_flops if precision == self.precision else self.fp32_flops


_H100 = "NVIDIA H100 Tensor Core GPU datasheet"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet"
_V100 = "NVIDIA V100 Tensor Core GPU datasheet"
_ADA = "NVIDIA Ada GPU architecture whitepaper, Appendix A"


def _type(
    name: str,
    teraflops: float,
    fp32_teraflops: float,
    gigabytes: float,
    source: str,
    precision: Literal["bf16", "fp16"] = "bf16",
) -> GpuType:
    return GpuType(
        name=name,
        peak_flops=teraflops * 1e12,
        fp32_flops=fp32_teraflops * 1e12,
        memory_bytes=gigabytes * 1e9,
        source=source,
        precision=precision,
    )


GPUS: tuple[GpuType, ...] = (
    _type("B200", 2250, 75, 180, "NVIDIA HGX B200 datasheet"),
    _type("H200", 989, 67, 141, "NVIDIA H200 Tensor Core GPU datasheet"),
    _type("H100 SXM", 989, 67, 80, _H100),
    _type("H100 PCIe", 756, 51, 80, _H100),
    _type("H100 NVL", 835, 60, 94, _H100),
    _type("A100 80GB", 312, 19.5, 80, _A100),
    _type("A100 40GB", 312, 19.5, 40, _A100),
    _type("A40", 149.7, 37.4, 48, "NVIDIA A40 datasheet"),
    _type("A30", 165, 10.3, 24, "NVIDIA A30 Tensor Core GPU datasheet"),
    _type("A10", 125, 31.2, 24, "NVIDIA A10 Tensor Core GPU datasheet"),
    _type("A10G", 70, 31.5, 24, "NVIDIA A10G datasheet"),
    _type("L40S", 362, 91.6, 48, "NVIDIA L40S datasheet"),
    _type("L40", 181, 90.5, 48, "NVIDIA L40 datasheet"),
    _type("L4", 121, 30.3, 24, "NVIDIA L4 Tensor Core GPU datasheet"),
    _type("V100 SXM2 32GB", 125, 15.7, 32, _V100, "fp16"),
    _type("V100 SXM2 16GB", 125, 15.7, 16, _V100, "fp16"),
    _type("V100 PCIe 32GB", 112, 14, 32, _V100, "fp16"),
    _type("V100 PCIe 16GB", 112, 14, 16, _V100, "fp16"),
    _type("T4", 65, 8.1, 16, "NVIDIA T4 Tensor Core GPU datasheet", "fp16"),
    _type("RTX 4090", 165.2, 82.6, 24, _ADA),
    _type("RTX 3090", 71, 35.6, 24, "NVIDIA Ampere GA102 GPU architecture whitepaper, Appendix A"),
    _type("MI300X", 1307, 163.4, 192, "AMD Instinct MI300X accelerator data sheet"),
)
"""Types by what clouds call them. Measure the MFU against these numbers, not against a boost."""
KNOWN = ", ".join(item.name for item in GPUS)
"""Their names, for errors."""

_SHORT: Mapping[str, str] = {"H100": "H100 SXM", "A100": "A100 40GB", "V100": "V100 SXM2 16GB"}
"""Which variant a bare name means, and Ray gives no other: of the least memory, the fastest."""


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
    plain = _plain(name).removeprefix("nvidia")
    found = _TYPES.get(plain)
    if found is None:
        raise InputError(f"no GPU type {name!r} is known; there are {KNOWN}")
    return found


def known_type(name: str | None) -> GpuType | None:
    """The type that a driver or Ray means by `name`, or None.

    Drivers add maker, form and memory, and Ray abbreviates: the longest known name whose words all
    occur in `name` is meant.

    Examples
    --------
    >>> names = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "A100-80G", "Tesla T4", "TPU v4")
    >>> [item and item.name for item in map(known_type, names)]
    ['H100 SXM', 'A100 40GB', 'A100 80GB', 'T4', None]
    >>> known_type("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    True
    """
    words = {word.removesuffix("b") for word in _words(name or "")}
    if "laptop" in words:  # slower than the type whose number it has
        return None
    names = {item.name: item for item in GPUS} | {k: _TYPES[_plain(v)] for k, v in _SHORT.items()}
    fitting = [k for k in names if {word.removesuffix("b") for word in _words(k)} <= words]
    return names[max(fitting, key=lambda k: len(_words(k)))] if fitting else None


def _words(name: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in name.casefold()).split()


def _plain(name: str) -> str:
    return "".join(_words(name))


_TYPES = {_plain(item.name): item for item in GPUS}
_TYPES |= {_plain(short): _TYPES[_plain(full)] for short, full in _SHORT.items()}
