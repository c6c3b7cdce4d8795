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


@pytest.mark.parametrize("symbols", [500, 257, 512])
@pytest.mark.parametrize("chunks", [1, 3])
def test_columns_that_are_no_symbols_change_nothing(
    monkeypatch: pytest.MonkeyPatch, symbols: int, chunks: int
) -> None:
    """As a GPU has them, in loss, gradients and evaluation; the results have no such column."""
    hidden, head, targets = _inputs()
    hidden, head, targets = hidden.float(), head[:, :symbols].float(), targets % symbols
    monkeypatch.setattr(module, "CHUNK_LOGITS", -(-TOKENS // chunks) * 512)
    found, widths, product = [], [], module._logits

    def seen(part: torch.Tensor, table: torch.Tensor, count: int) -> torch.Tensor:
        widths.append((len(part), table.shape[1]))
        return product(part, table, count)

    monkeypatch.setattr(module, "_logits", seen)
    for gpu in (False, True):
        monkeypatch.setattr(module, "_on_gpu", lambda _, gpu=gpu: gpu)
        x, table = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        loss = head_loss(x, table, targets)
        loss.backward()
        each = module.token_losses(hidden, head, targets)
        assert table.grad.shape == head.shape
        found.append((loss.detach(), x.grad, table.grad, each))
    for ours, plain in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)
    padded = {columns for _, columns in widths[chunks:]}
    assert padded == {-(-symbols // 64) * 64}
    sizes = {tokens for tokens, _ in widths[chunks:]}
    assert len(sizes) == 1  # one shape to compile: 4096 tokens in four chunks, not in three


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("counted", [0, 1, 1500, 4095, 4096])
def test_tokens_that_do_not_count_have_neither_loss_nor_gradient(
    monkeypatch: pytest.MonkeyPatch, counted: int, chunks: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", -(-TOKENS // chunks) * SYMBOLS)
    hidden, head, targets = _inputs()
    x, table = hidden.float().requires_grad_(), head.float().requires_grad_()
    loss = head_loss(x, table, targets, counted)
    loss.backward()
    assert not x.grad[counted:].any()
    if not counted:
        assert loss == 0
        assert not table.grad.any()
        return
    own, other = hidden[:counted].float().requires_grad_(), head.float().requires_grad_()
    expected = F.cross_entropy(own @ other, targets[:counted])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x.grad[:counted], own.grad, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(table.grad, other.grad, rtol=1e-4, atol=1e-7)
