"""Peaks by which utilisation is reckoned: the same whoever else uses the device."""

import time
from collections.abc import Iterator

import pytest
import torch

from trainers import device
from trainers.device import datasheet_flops, peak_flops

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As trials have it; nothing that was measured before or is here stays."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    peak_flops.cache_clear()
    yield
    peak_flops.cache_clear()
    torch.set_num_threads(threads)


def test_a_core_is_as_fast_as_it_computes_not_as_often_as_it_gets_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread that waits 50 ms for its turn: a product takes some 15 ms."""
    monkeypatch.setattr(device, "PRODUCTS", 8)
    alone, product = peak_flops(CPU), torch.mm

    def waiting(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return product(a, b)

    peak_flops.cache_clear()
    monkeypatch.setattr(torch, "mm", waiting)
    assert peak_flops(CPU) == pytest.approx(alone, rel=0.5)


@pytest.mark.parametrize(
    ("name", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA A100-SXM4-40GB", 312e12, 19.5e12),
        ("Tesla V100-SXM2-16GB", 15.7e12, 15.7e12),  # no tensor cores for bf16
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA GeForce GTX 1080", None, None),
    ],
)
def test_a_gpu_peaks_where_its_datasheet_says(
    name: str, bf16: float | None, fp32: float | None
) -> None:
    assert (datasheet_flops(name, "bf16"), datasheet_flops(name, "fp32")) == (bf16, fp32)


def test_nothing_is_measured_on_a_gpu_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its neighbours would be, and its memory is reckoned without."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L40S")
    monkeypatch.setattr(torch, "randn", None)
    assert peak_flops(torch.device("cuda"), "bf16") == 362e12


@pytest.mark.parametrize(
    ("free", "kept", "fraction", "expected"),
    [
        (80e9, 0, 1.0, 72e9),
        (30e9, 0, 1.0, 27e9),  # another process has the rest
        (30e9, 10e9, 1.0, 36e9),  # of which 10 GB are what torch keeps of an earlier trial
        (80e9, 0, 0.25, 18e9),  # a share
    ],
)
def test_there_is_as_much_room_as_others_leave(
    monkeypatch: pytest.MonkeyPatch, free: float, kept: float, fraction: float, expected: float
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: kept + 1e9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1e9)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: fraction)
    assert device.room(torch.device("cuda")) == pytest.approx(expected)
    assert device.room(CPU) is None


def test_a_gpu_computes_the_same_bits_again_only_where_that_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr("os.environ", {})
    for place, wanted, expected in ((gpu, True, True), (gpu, False, False), (CPU, True, False)):
        with device.reproducible(place, wanted):
            assert torch.are_deterministic_algorithms_enabled() == expected
            assert ("CUBLAS_WORKSPACE_CONFIG" in device.os.environ) == (place == gpu and wanted)
            device.os.environ.clear()
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyboardInterrupt), device.reproducible(gpu, True):
        raise KeyboardInterrupt
    assert not torch.are_deterministic_algorithms_enabled()
