"""What Ray calls the types of GPU of `trainers.gpus`, and what it cannot tell apart."""

from __future__ import annotations

from collections.abc import Mapping

from trainers.gpus import GPUS, GpuType

_RAY_NAMES: Mapping[str, str] = {
    "RTX 4090": "GeForce-RTX-4090",
    "RTX 3090": "GeForce-RTX-3090",
    "MI300X": "AMD-Instinct-MI300X-OAM",
}
"""Those of which it is not the first word."""


def ray_name(gpu: GpuType) -> str:
    """What Ray calls a type, of whatever form and memory.

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
