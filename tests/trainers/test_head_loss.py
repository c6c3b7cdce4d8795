"""The head's loss in chunks of tokens: the same as of all at once."""

import pytest
import torch
import torch.nn.functional as F

from trainers import head_loss as module
from trainers.head_loss import head_loss

TOKENS, WIDTH, SYMBOLS = 4096, 32, 512


def _gradients(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradients by inputs that bf16 holds exactly."""
    hidden, head, targets = _inputs()
    hidden, head = (t.to(dtype).requires_grad_() for t in (hidden, head))
    loss = head_loss(hidden, head, targets)
    loss.backward()
    return loss.detach(), hidden.grad, head.grad


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw).bfloat16()
    head = (0.3 * torch.randn(WIDTH, SYMBOLS, generator=draw)).bfloat16()
    return hidden, head, torch.randint(SYMBOLS, (TOKENS,), generator=draw)


@pytest.fixture
def reference() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By torch, in fp64."""
    hidden, head, targets = _inputs()
    hidden, head = (t.double().requires_grad_() for t in (hidden, head))
    loss = F.cross_entropy(hidden @ head, targets)
    loss.backward()
    return loss.detach(), hidden.grad, head.grad


def _off(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


@pytest.mark.parametrize("chunks", [1, 3, 64])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_chunks_change_nothing(
    dtype: torch.dtype,
    error: float,
    chunks: int,
    reference: tuple[torch.Tensor, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bf16 the error of one chunk's gradient by the head is .0020."""
    monkeypatch.setattr(module, "CHUNK_LOGITS", -(-TOKENS // chunks) * SYMBOLS)
    for found, true in zip(_gradients(dtype), reference, strict=True):
        assert _off(found, true) < error
