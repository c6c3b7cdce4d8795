"""What a process on a share of a GPU keeps to."""

import subprocess
import sys

import pytest
import torch

from trainers.gpu_share import allocator_fraction, keep_to_share
from trainers.memory import CONTEXT_BYTES, HEADROOM


@pytest.mark.parametrize("share", [1 / 8, 1 / 4, 1 / 2])
@pytest.mark.parametrize("gigabytes", [16, 80, 180])
def test_shares_and_contexts_together_are_the_whole_gpu(share: float, gigabytes: int) -> None:
    total = gigabytes * 1e9
    each = allocator_fraction(share, total) * total + CONTEXT_BYTES
    assert each / share == pytest.approx(total)
    # What placement puts on a share, contexts included, the allocator may have.
    assert (1 - HEADROOM) * share * total <= each


def test_a_share_that_cannot_hold_a_context_leaves_nothing() -> None:
    assert allocator_fraction(1 / 8, 4e9) == 0


def test_torch_takes_the_setting_of_the_allocator_in_a_process_that_runs() -> None:
    """Fails where torch renames what `keep_to_share` calls. In a process of its own: it stays."""
    program = (
        "import torch; from trainers.gpu_share import EXPANDABLE; "
        "torch._C._accelerator_setAllocatorSettings(EXPANDABLE); "
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.strip() == "expandable_segments:True"
    assert callable(torch.cuda.set_per_process_memory_fraction)


def test_a_torch_without_that_function_bounds_the_share_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[float] = []

    class Properties:
        total_memory = 80e9

    monkeypatch.setattr("trainers.gpu_share.this_device", lambda: torch.device("cuda"))
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, _: told.append(fraction)
    )
    with pytest.warns(UserWarning, match="PYTORCH_ALLOC_CONF=expandable_segments:True"):
        keep_to_share(1 / 4)
    assert told == [pytest.approx(0.24)]


def test_a_gpu_is_bounded_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is none: what torch is told of it, in order."""
    told: list[object] = []

    class Properties:
        total_memory = 80e9

    monkeypatch.setattr("trainers.gpu_share.this_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, _: told.append(fraction)
    )
    keep_to_share(1 / 4)
    assert told == ["expandable_segments:True", pytest.approx(0.24)]


def test_a_process_without_a_gpu_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainers.gpu_share.this_device", lambda: torch.device("cpu"))
    before = torch._C._accelerator_getAllocatorSettings()
    keep_to_share(1 / 4)
    assert torch._C._accelerator_getAllocatorSettings() == before
