"""The environment variable by which a process is given its GPUs, of NVIDIA's or of AMD's."""

from __future__ import annotations

from collections.abc import Mapping

CUDA, HIP = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"


def visible_variable(environment: Mapping[str, str]) -> str:
    """Return the variable that names a process's GPUs: AMD's where that is set, else NVIDIA's.

    Ray sets the one of the node's GPUs. Torch for AMD obeys both, so that a number in the other
    one would choose among those that are left.

    Examples
    --------
    >>> visible_variable({"HIP_VISIBLE_DEVICES": "2"}), visible_variable({})
    ('HIP_VISIBLE_DEVICES', 'CUDA_VISIBLE_DEVICES')
    """
    return HIP if HIP in environment else CUDA


def visible_gpus(environment: Mapping[str, str]) -> str:
    """Return which GPUs a process is given, as the variable names them; empty where none are."""
    return environment.get(visible_variable(environment), "")
