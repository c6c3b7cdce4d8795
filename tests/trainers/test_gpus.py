"""GPU types against what their silicon does in a clock."""

import pytest

from analysis.errors import InputError
from trainers.gpus import GPUS, gpu_type, known_type


@pytest.mark.parametrize(
    ("name", "units", "fma_per_clock", "boost_ghz"),
    [
        ("B200", 148, 4096, 1.86),
        ("GH200 144GB", 132, 2048, 1.83),
        ("GH200 96GB", 132, 2048, 1.83),
        ("H200", 132, 2048, 1.83),
        ("H100 SXM", 132, 2048, 1.83),
        ("H800 SXM", 132, 2048, 1.83),
        ("H800 PCIe", 114, 2048, 1.62),
        ("A800 80GB", 108, 1024, 1.41),
        ("A800 40GB", 108, 1024, 1.41),
        ("A100 80GB", 108, 1024, 1.41),
        ("A100 40GB", 108, 1024, 1.41),
        ("A40", 84, 512, 1.74),
        ("A30", 56, 1024, 1.44),
        ("A10", 72, 512, 1.695),
        ("A10G", 80, 256, 1.71),
        ("L40S", 142, 512, 2.52),
        ("L4", 58, 512, 2.04),
        ("V100 SXM2 32GB", 80, 512, 1.53),
        ("V100 SXM2 16GB", 80, 512, 1.53),
        ("T4", 40, 512, 1.59),
        ("RTX PRO 6000", 188, 512, 2.617),
        ("RTX 6000 Ada", 142, 512, 2.505),
        ("RTX A6000", 84, 512, 1.8),
        ("RTX A5000", 64, 512, 1.695),
        ("RTX 5090", 170, 256, 2.407),
        ("RTX 5080", 84, 256, 2.617),
        ("RTX 4090", 128, 256, 2.52),
        ("RTX 4080", 76, 256, 2.505),
        ("RTX 3090", 82, 256, 1.695),
        ("MI355X", 256, 2048, 2.4),
        ("MI350X", 256, 2048, 2.2),
        ("MI325X", 304, 1024, 2.1),
        ("MI300X", 304, 1024, 2.1),
        ("MI250X", 110, 512, 1.7),
    ],
)
def test_a_peak_is_units_times_multiply_adds_times_clock(name, units, fma_per_clock, boost_ghz):
    """Dense: with the rate for 2:4 sparsity by mistake it would be twice that."""
    assert gpu_type(name).peak_flops == pytest.approx(
        units * fma_per_clock * 2 * boost_ghz * 1e9, rel=0.02
    )


LANES = [
    ("B200", 148 * 128, 1.965),
    ("GH200 144GB", 132 * 128, 1.98),
    ("GH200 96GB", 132 * 128, 1.98),
    ("H200", 132 * 128, 1.98),
    ("H200 NVL", 132 * 128, 1.785),
    ("H800 SXM", 132 * 128, 1.98),
    ("H800 PCIe", 114 * 128, 1.755),
    ("A800 80GB", 108 * 64, 1.41),
    ("A800 40GB", 108 * 64, 1.41),
    ("H100 SXM", 132 * 128, 1.98),
    ("H100 PCIe", 114 * 128, 1.755),
    ("H100 NVL", 132 * 128, 1.785),
    ("A100 80GB", 108 * 64, 1.41),
    ("A100 40GB", 108 * 64, 1.41),
    ("A40", 84 * 128, 1.74),
    ("A30", 56 * 64, 1.44),
    ("A10", 72 * 128, 1.695),
    ("A10G", 72 * 128, 1.71),
    ("L40S", 142 * 128, 2.52),
    ("L40", 142 * 128, 2.49),
    ("L4", 58 * 128, 2.04),
    ("V100 SXM2 32GB", 80 * 64, 1.53),
    ("V100 SXM2 16GB", 80 * 64, 1.53),
    ("V100 PCIe 32GB", 80 * 64, 1.38),
    ("V100 PCIe 16GB", 80 * 64, 1.38),
    ("T4", 40 * 64, 1.59),
    ("RTX PRO 6000", 188 * 128, 2.5),
    ("RTX 6000 Ada", 142 * 128, 2.505),
    ("RTX A6000", 84 * 128, 1.8),
    ("RTX A5000", 64 * 128, 1.695),
    ("RTX 5090", 170 * 128, 2.407),
    ("RTX 5080", 84 * 128, 2.617),
    ("RTX 4090", 128 * 128, 2.52),
    ("RTX 4080", 76 * 128, 2.505),
    ("RTX 3090", 82 * 128, 1.695),
    ("MI355X", 256 * 128, 2.4),
    ("MI350X", 256 * 128, 2.2),
    ("MI325X", 304 * 128, 2.1),
    ("MI300X", 304 * 128, 2.1),
    ("MI250X", 110 * 64, 1.7),
]
PLATFORMS = {
    "B200": (8, 36e15, 600e12, 1.44e12),
    "B300": (8, 36e15, 600e12, 2.16e12),
    "GB200": (72, 360e15, 5760e12, 13.4e12),
    "GB300": (72, 360e15, 5760e12, 20.1e12),
}
"""GPUs of a platform; its sums of bf16 with 2:4 sparsity, of fp32, and of memory."""


@pytest.mark.parametrize(("name", "lanes", "boost_ghz"), LANES)
def test_the_fp32_peak_is_lanes_times_two_times_clock(name, lanes, boost_ghz):
    assert gpu_type(name).fp32_flops == pytest.approx(lanes * 2 * boost_ghz * 1e9, rel=0.02)


@pytest.mark.parametrize("name", PLATFORMS)
def test_a_gpu_of_a_platform_is_its_part_of_the_sums(name):
    count, sparse, fp32, memory = PLATFORMS[name]
    found = gpu_type(name)
    assert found.peak_flops == sparse / 2 / count
    assert found.fp32_flops == fp32 / count
    assert found.memory_bytes == pytest.approx(memory / count, rel=0.01)


def test_no_type_is_left_unchecked_and_the_one_that_is_limited_is_below_its_silicon():
    checked = {name for name, *_ in LANES} | PLATFORMS.keys()
    assert {item.name for item in GPUS} - checked == {"H20"}
    assert gpu_type("H20").peak_flops < 78 * 2048 * 2 * 1.0e9  # 78 of an H100's 132 units


def test_a_peak_is_of_the_precision_that_is_trained_in():
    assert gpu_type("H100").training_flops("fp32") == 67e12
    assert gpu_type("H100").training_flops("bf16") == 989e12
    assert gpu_type("V100").training_flops("bf16") == gpu_type("V100").fp32_flops  # it has fp16's


def test_types_without_bf16_tensor_cores_are_marked():
    """Volta and Turing have none."""
    assert {item.name for item in GPUS if item.precision == "fp16"} == {
        "V100 SXM2 32GB",
        "V100 SXM2 16GB",
        "V100 PCIe 32GB",
        "V100 PCIe 16GB",
        "T4",
    }


@pytest.mark.parametrize("name", ["H100", "h100-sxm", "NVIDIA H100", "H100SXM"])
def test_a_bare_or_spelt_out_name_finds_its_type(name):
    assert gpu_type(name).name == "H100 SXM"


def test_an_unknown_type_lists_those_there_are():
    with pytest.raises(
        InputError, match=r"no GPU type 'TPU v4' is known; there are .*B200, .*MI300X"
    ):
        gpu_type("TPU v4")


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("A100-80G", "A100 80GB"),  # Ray's own
        ("Tesla V100-SXM2-16GB", "V100 SXM2 16GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD-Instinct-MI300X-OAM", "MI300X"),
        ("AMD Instinct MI325X", "MI325X"),
        ("NVIDIA GH200 480GB", "GH200 96GB"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA H800", "H800 SXM"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("Quadro RTX 6000", None),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("x86_64 CPU, 1 thread", None),
        (None, None),
    ],
)
def test_what_drivers_and_ray_report_is_recognised(reported, name):
    found = known_type(reported)
    assert (found and found.name) == name
