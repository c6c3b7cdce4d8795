"""The model: causal, exactly differentiated, and ignorant at the start."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from trainers import transformer
from trainers.decoders import LLAMA
from trainers.shape import Shape
from trainers.transformer import Transformer

SHAPE = Shape(width=16, depth=2, heads=2, vocabulary=32, context=12)


@pytest.fixture
def model() -> Transformer:
    """A model with no zero weights, so that every path matters."""
    made = Transformer(SHAPE, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return made


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, 32, (5, 13), generator=torch.Generator().manual_seed(2))


def test_no_position_sees_the_future(model: Transformer, windows: torch.Tensor) -> None:
    inputs = windows[:, :-1]
    changed = inputs.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 32
    before, after = model(inputs), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7], after[:, 7])


def test_position_matters(model: Transformer) -> None:
    """Rotary embeddings: with two distinct symbols before it, order changes what a token sees."""
    a = model(torch.tensor([[1, 2, 3]]))[0, -1]
    b = model(torch.tensor([[2, 1, 3]]))[0, -1]
    assert not torch.allclose(a, b, atol=1e-4)


def test_an_untrained_model_knows_nothing(windows: torch.Tensor) -> None:
    loss = Transformer(SHAPE, seed=3).loss(windows)
    assert loss.item() == pytest.approx(math.log(32), rel=1e-6)


def test_the_training_loss_and_its_gradients_are_those_of_cross_entropy(
    model: Transformer, windows: torch.Tensor
) -> None:
    ours = model.loss(windows)
    ours.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logits = model(windows[:, :-1])
    reference = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    reference.backward()
    torch.testing.assert_close(ours, reference)
    for ours_, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours_, p.grad)


def _by_the_book(model: Transformer, windows: torch.Tensor) -> torch.Tensor:
    """Loss of the same network, in real arithmetic and one head at a time, left to autograd."""
    batch, context, width = windows.shape[0], SHAPE.context, SHAPE.width // SHAPE.heads
    frequency = 1000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.arange(context)[:, None] * frequency
    future = torch.triu(torch.ones(context, context, dtype=torch.bool), 1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., ::2], x[..., 1::2]
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    def normed(x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    x = model.embedding[windows[:, :-1]]
    for block in model.blocks:
        parts = (normed(x) @ block.qkv.T).view(batch, context, 3, SHAPE.heads, width)
        mixed = []
        for head in range(SHAPE.heads):
            q, k, v = parts[..., head, :].unbind(2)
            scores = turned(q) @ turned(k).mT / math.sqrt(width)
            mixed.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v)
        x = x + torch.cat(mixed, -1) @ block.attention_out
        x = x + (normed(x) @ block.up.T).relu() @ block.down
    return F.cross_entropy((normed(x) @ model.head).flatten(0, 1), windows[:, 1:].flatten())


@pytest.mark.parametrize("long_context", [256, 4])
def test_loss_and_gradients_are_those_of_the_network_by_the_book(
    model: Transformer, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch, long_context: int
) -> None:
    """Both ways of attention: written out for short contexts, torch's kernel for long ones."""
    monkeypatch.setattr(transformer, "LONG_CONTEXT", long_context)
    gradients = torch.autograd.grad(model.loss(windows), list(model.parameters()))
    reference = _by_the_book(model, windows)
    torch.testing.assert_close(model.loss(windows), reference)
    for ours, theirs in zip(
        gradients, torch.autograd.grad(reference, list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_evaluation_and_training_agree(model: Transformer, windows: torch.Tensor) -> None:
    torch.testing.assert_close(model.token_losses(windows).mean(), model.loss(windows))


@pytest.mark.parametrize("queries_per_key", [2, 4])
def test_keys_that_heads_share_may_be_copied_for_each(
    monkeypatch: pytest.MonkeyPatch, queries_per_key: int
) -> None:
    """As a GPU does it in fp32, where its fused kernels have none that heads share."""
    llama = dataclasses.replace(LLAMA, queries_per_key=queries_per_key)
    shape = Shape(width=32, depth=2, heads=4, vocabulary=64, context=32, architecture=llama)
    windows = torch.randint(0, 64, (3, 33), generator=torch.Generator().manual_seed(0))
    attention, shared, found = F.scaled_dot_product_attention, [], []

    def seen(*args: torch.Tensor, **how: object) -> torch.Tensor:
        shared.append(how["enable_gqa"])
        assert not shared[-1] or args[0].shape[1] == queries_per_key * args[1].shape[1]
        return attention(*args, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    for copied in (False, True):
        monkeypatch.setattr(transformer, "_repeats_keys", lambda _, copied=copied: copied)
        model = Transformer(shape, 0)
        loss = model.loss(windows)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    assert shared == [True] * 2 + [False] * 2
    for copies, together in zip(*found, strict=True):
        torch.testing.assert_close(copies, together)


def test_the_seed_decides_the_weights() -> None:
    one, same, other = (Transformer(SHAPE, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.embedding, same.embedding)
    assert not torch.equal(one.embedding, other.embedding)
