"""GPU types against what Ray itself calls them."""

import pytest
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

from cluster.gpus import ray_name
from trainers.gpus import gpu_type, known_type


@pytest.mark.parametrize(
    "reported", ["NVIDIA A100-SXM4-40GB", "Tesla V100-SXM2-32GB", "NVIDIA H100 NVL", "NVIDIA L40S"]
)
def test_of_what_ray_calls_a_gpu_the_smallest_is_assumed(reported: str) -> None:
    """Ray drops form and memory from the name, and what is placed must fit whatever it is."""
    said = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(reported)
    real, assumed = known_type(reported), known_type(said)
    assert real is not None
    assert assumed is not None
    assert ray_name(real) == ray_name(assumed) == said
    assert assumed.memory_bytes <= real.memory_bytes


def test_ray_calls_consumer_cards_by_their_whole_name() -> None:
    said = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type("NVIDIA GeForce RTX 4090")
    assert ray_name(gpu_type("RTX 4090")) == said
