"""Parameters and FLOPs as counted against the real model by torch itself."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainers.flops import flops_per_token, params
from trainers.shape import Shape
from trainers.transformer import Transformer

SHAPES = [
    Shape(width=24, depth=2, heads=2, vocabulary=256, context=64),
    Shape(width=48, depth=3, heads=4, vocabulary=100, context=32),
    Shape(width=128, depth=1, heads=2, vocabulary=64, context=128),
]


def _unmasked_forward(shape: Shape) -> int:
    """FLOPs of one sequence with attention unmasked, as torch counts its MATH kernel."""
    attention = 4 * shape.depth * shape.width * shape.context
    return shape.context * (2 * params(shape).matmul + attention)


@pytest.mark.parametrize("shape", SHAPES)
def test_params_are_those_of_the_model(shape: Shape) -> None:
    model = Transformer(shape, seed=0)
    embedding, head = model.embedding.numel(), model.head.numel()
    total = sum(p.numel() for p in model.parameters())
    counted = params(shape)
    assert counted.total == total
    assert counted.matmul == total - embedding
    assert counted.non_embedding == total - embedding - head


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_flops_are_what_torch_counts(shape: Shape) -> None:
    model = Transformer(shape, seed=0)
    inputs = torch.zeros(3, shape.context, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    assert counter.get_total_flops() == 3 * _unmasked_forward(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_training_flops_are_thrice_forward_as_torch_counts(shape: Shape) -> None:
    model = Transformer(shape, seed=0)
    windows = torch.zeros(2, shape.context + 1, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(windows[:, :-1])
        logits.sum().backward()
    assert counter.get_total_flops() == 2 * 3 * _unmasked_forward(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_causal_mask_halves_attention_and_nothing_else(shape: Shape) -> None:
    unmasked = 3 * _unmasked_forward(shape) / shape.context
    attention = 3 * 4 * shape.depth * shape.width * shape.context
    kept = (shape.context + 1) / (2 * shape.context)
    assert flops_per_token(shape) == pytest.approx(unmasked - attention * (1 - kept), rel=1e-12)


def test_mini_shapes_cost_more_than_six_n() -> None:
    """The share of head and attention at small width, as stated for the mini grid: 2.3 to 1.1."""
    narrow = Shape(width=12, depth=2, heads=2, vocabulary=256, context=64)
    wide = Shape(width=128, depth=2, heads=2, vocabulary=256, context=64)
    ratio = [flops_per_token(s) / (6 * params(s).non_embedding) for s in (narrow, wide)]
    assert ratio == pytest.approx([2.34, 1.125], abs=0.01)
