"""GPU types against what their silicon does in a clock."""

import pytest

from analysis.errors import InputError
from trainers.gpus import GPUS, gpu_type, known_type


@pytest.mark.parametrize(
    ("name", "units", "fma_per_clock", "boost_ghz"),
    [
        ("B200", 148, 4096, 1.86),
        ("H200", 132, 2048, 1.83),
        ("H100 SXM", 132, 2048, 1.83),
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
        ("RTX 4090", 128, 256, 2.52),
        ("RTX 3090", 82, 256, 1.695),
        ("MI300X", 304, 1024, 2.1),
    ],
)
def test_a_peak_is_units_times_multiply_adds_times_clock(name, units, fma_per_clock, boost_ghz):
    """Dense: with the rate for 2:4 sparsity by mistake it would be twice that."""
    assert gpu_type(name).peak_flops == pytest.approx(
        units * fma_per_clock * 2 * boost_ghz * 1e9, rel=0.02
    )


@pytest.mark.parametrize(
    ("name", "lanes", "boost_ghz"),
    [
        ("B200", 148 * 128, 1.965),
        ("H200", 132 * 128, 1.98),
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
        ("RTX 4090", 128 * 128, 2.52),
        ("RTX 3090", 82 * 128, 1.695),
        ("MI300X", 304 * 128, 2.1),
    ],
)
def test_the_fp32_peak_is_lanes_times_two_times_clock(name, lanes, boost_ghz):
    assert gpu_type(name).fp32_flops == pytest.approx(lanes * 2 * boost_ghz * 1e9, rel=0.02)
    assert len(GPUS) == 22  # none is left out here


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
        InputError, match=r"no GPU type 'TPU v4' is known; there are B200, .*MI300X"
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
        ("NVIDIA GeForce GTX 1080", None),
        ("x86_64 CPU, 1 thread", None),
        (None, None),
    ],
)
def test_what_drivers_and_ray_report_is_recognised(reported, name):
    found = known_type(reported)
    assert (found and found.name) == name
