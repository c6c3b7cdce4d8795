"""Names by which Ray, drivers and nodes know the types of GPU in `trainers.gpus`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from trainers.gpus import GPUS, GpuType, known_type

_RAY_NAMES: Mapping[str, str] = {
    "RTX PRO 6000": "RTX-PRO-6000",
    "RTX 6000 Ada": "RTX-6000",
    "RTX A6000": "RTX-A6000",
    "RTX A5000": "RTX-A5000",
    "RTX 5090": "GeForce-RTX-5090",
    "RTX 5080": "GeForce-RTX-5080",
    "RTX 4090": "GeForce-RTX-4090",
    "RTX 4080": "GeForce-RTX-4080",
    "RTX 3090": "GeForce-RTX-3090",
    "MI355X": "AMD-Instinct-MI355X-OAM",
    "MI350X": "AMD-Instinct-MI350X-OAM",
    "MI325X": "AMD-Instinct-MI325X-OAM",
    "MI300X": "AMD-Instinct-MI300X-OAM",
    "MI250X": "AMD-Instinct-MI250X",
}
"""Ray's names of the types whose first word is not Ray's name."""


def ray_name(gpu: GpuType) -> str:
    """Ray's name of a type, of whatever form and memory.

    Examples
    --------
    >>> from trainers.gpus import gpu_type
    >>> [ray_name(gpu_type(name)) for name in ("A100 80GB", "RTX 4090")]
    ['A100', 'GeForce-RTX-4090']
    """
    return _RAY_NAMES.get(gpu.name, gpu.name.partition(" ")[0])


def variants(gpu: GpuType) -> list[GpuType]:
    """All types that Ray gives the same name.

    Examples
    --------
    >>> from trainers.gpus import gpu_type
    >>> [item.name for item in variants(gpu_type("A100"))]
    ['A100 80GB', 'A100 40GB']
    """
    return [item for item in GPUS if ray_name(item) == ray_name(gpu)]


def reported_type(name: str, memory_bytes: float | None) -> GpuType | None:
    """The type that a node means by its driver's name and memory; None if it is not in the table.

    Of variants that differ in memory alone it is the largest that fits in what the node reports. A
    GPU with less than any of them, such as a virtual one, is a type with that much memory.

    Examples
    --------
    >>> names = (("NVIDIA GH200 480GB", 146e9), ("Tesla V100-PCIE-32GB", 34e9))
    >>> [reported_type(*item).name for item in names]
    ['GH200 144GB', 'V100 PCIe 32GB']
    >>> reported_type("NVIDIA A100-SXM4-80GB", 20e9).memory_bytes
    20000000000.0
    """
    gpu = known_type(name)
    if gpu is None or memory_bytes is None:
        return gpu
    same = [item for item in variants(gpu) if item.peak_flops == gpu.peak_flops]
    fitting = [item for item in same if item.memory_bytes <= memory_bytes]
    if not fitting:
        return replace(gpu, memory_bytes=memory_bytes)
    return max(fitting, key=lambda item: item.memory_bytes)
