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
_HOPPER_EXPORT = "NVIDIA H800 datasheet: tensor rates and memory of the H100"
_ADA = "NVIDIA Ada GPU architecture whitepaper, Appendix A"
_GA102 = "NVIDIA Ampere GA102 GPU architecture whitepaper, Appendix A"
_GB202 = "NVIDIA RTX Blackwell GPU architecture whitepaper, Appendix A"
_HGX = "NVIDIA HGX platform specifications, per GPU"
_NVL72 = "NVIDIA GB200 NVL72 and GB300 NVL72 datasheets, per GPU"
_CDNA4 = "AMD Instinct MI350 series data sheets"


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
    _type("GB300", 2500, 80, 279, _NVL72),
    _type("GB200", 2500, 80, 186, _NVL72),
    _type("B300", 2250, 75, 270, _HGX),
    _type("B200", 2250, 75, 180, _HGX),
    _type("GH200 144GB", 990, 67, 144, "NVIDIA GH200 Grace Hopper Superchip datasheet"),
    _type("GH200 96GB", 990, 67, 96, "NVIDIA GH200 Grace Hopper Superchip datasheet"),
    _type("H200", 989, 67, 141, "NVIDIA H200 Tensor Core GPU datasheet"),
    _type("H200 NVL", 835, 60, 141, "NVIDIA H200 Tensor Core GPU datasheet"),
    _type("H100 SXM", 989, 67, 80, _H100),
    _type("H100 PCIe", 756, 51, 80, _H100),
    _type("H100 NVL", 835, 60, 94, _H100),
    _type("H800 SXM", 989, 67, 80, _HOPPER_EXPORT),
    _type("H800 PCIe", 756, 51, 80, _HOPPER_EXPORT),
    _type("H20", 148, 44, 96, "NVIDIA H20 datasheet: limited far below its silicon"),
    _type("A100 80GB", 312, 19.5, 80, _A100),
    _type("A100 40GB", 312, 19.5, 40, _A100),
    _type("A800 80GB", 312, 19.5, 80, "NVIDIA A800 datasheet: tensor rates of the A100"),
    _type("A800 40GB", 312, 19.5, 40, "NVIDIA A800 datasheet: tensor rates of the A100"),
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
    _type("RTX PRO 6000", 500, 120, 96, "NVIDIA RTX PRO 6000 Blackwell Server Edition datasheet"),
    _type("RTX 6000 Ada", 364.2, 91.1, 48, "NVIDIA RTX 6000 Ada Generation datasheet"),
    _type("RTX A6000", 154.8, 38.7, 48, _GA102),
    _type("RTX A5000", 111.1, 27.8, 24, "NVIDIA RTX A5000 datasheet"),
    _type("RTX 5090", 209.5, 104.8, 32, _GB202),
    _type("RTX 5080", 112.6, 56.3, 16, _GB202),
    _type("RTX 4090", 165.2, 82.6, 24, _ADA),
    _type("RTX 4080", 97.5, 48.7, 16, _ADA),
    _type("RTX 3090", 71, 35.6, 24, _GA102),
    _type("MI355X", 2516, 157.3, 288, _CDNA4),
    _type("MI350X", 2307, 144.2, 288, _CDNA4),
    _type("MI325X", 1307, 163.4, 256, "AMD Instinct MI325X accelerator data sheet"),
    _type("MI300X", 1307, 163.4, 192, "AMD Instinct MI300X accelerator data sheet"),
    _type("MI250X", 191.5, 23.95, 64, "AMD Instinct MI250X data sheet; each die is a GPU"),
)
"""Types by what clouds call them. Measure the MFU against these numbers, not against a boost."""
UNKNOWN_TYPE = "T4"
"""Type whose speed is assumed of a GPU that is not in the table."""
KNOWN = ", ".join(item.name for item in GPUS)
"""Their names, for errors."""

_SHORT: Mapping[str, str] = {
    "GH200": "GH200 96GB",
    "H100": "H100 SXM",
    "H800": "H800 SXM",
    "A100": "A100 40GB",
    "A800": "A800 40GB",
    "V100": "V100 SXM2 16GB",
    "A6000": "RTX A6000",
}
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
    occur in `name` is meant. A part of a GPU (MIG) and a laptop's are none of them: both are slower
    than the type whose name they carry.

    Examples
    --------
    >>> names = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "A100-80G", "Tesla T4", "TPU v4")
    >>> [item and item.name for item in map(known_type, names)]
    ['H100 SXM', 'A100 40GB', 'A100 80GB', 'T4', None]
    >>> slower = "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
    >>> [*map(known_type, slower)]
    [None, None]
    """
    words = {word.removesuffix("b") for word in _words(name or "")}
    if words & {"laptop", "mig"}:
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
