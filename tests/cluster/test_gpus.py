"""GPU types against what Ray itself calls them."""

import pytest
from ray._private.accelerators import amd_gpu
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

from cluster.gpus import ray_name, reported_type
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


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA GeForce RTX 5080", "RTX 5080"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4080", "RTX 4080"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX A5000", "RTX A5000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
        ("NVIDIA GH200 480GB", "GH200 96GB"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA H800", "H800 SXM"),
        ("NVIDIA B300 SXM6 AC", "B300"),
    ],
)
def test_a_type_has_the_name_that_ray_gives_its_nodes(reported: str, name: str) -> None:
    said = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(reported)
    assert ray_name(gpu_type(name)) == said
    assert known_type(reported) is gpu_type(name)


@pytest.mark.parametrize("name", ["MI355X", "MI350X", "MI325X", "MI300X", "MI250X"])
def test_amds_types_have_the_names_that_ray_reads_off_their_device_ids(name: str) -> None:
    assert ray_name(gpu_type(name)) in amd_gpu.amd_product_dict.values()


@pytest.mark.parametrize(
    ("reported", "mebibytes", "name", "gigabytes"),
    [
        ("NVIDIA H100 80GB HBM3", 81559, "H100 SXM", 80),  # the table's, so that plans agree
        ("NVIDIA GH200 480GB", 97871, "GH200 96GB", 96),
        ("NVIDIA A100-PCIE-40GB", 40960, "A100 40GB", 40),
        ("Tesla V100-PCIE-16GB", 16160, "V100 PCIe 16GB", 16),
        ("NVIDIA H100 64GB", 65536, "H100 SXM", 68.7),  # a variant that is not in the table
        ("NVIDIA H100 NVL", None, "H100 NVL", 94),
    ],
)
def test_what_a_node_reports_is_the_variant_that_it_has(
    reported: str, mebibytes: int | None, name: str, gigabytes: float
) -> None:
    found = reported_type(reported, mebibytes and mebibytes * 2**20)
    assert found is not None
    assert found.name == name
    assert found.memory_bytes == pytest.approx(gigabytes * 1e9, rel=1e-3)
