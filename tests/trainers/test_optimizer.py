"""The flat optimiser against torch's own AdamW and Muon, parameter by parameter."""

import math
from dataclasses import replace

import pytest
import torch

from trainers import optimizer as module
from trainers.optimizer import Optimizer, orthogonalised
from trainers.recipes import named
from trainers.shape import Shape
from trainers.transformer import Transformer

SHAPE = Shape(width=32, depth=2, heads=2, vocabulary=64, context=16)
SCHEDULE = (0.3, 1.0, 0.7)


def _windows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 64, (8, 17), generator=generator) for _ in SCHEDULE]


def _trained(recipe: str) -> tuple[Transformer, object]:
    hyperparameters = named(recipe).resolve(SHAPE, 1e5)
    model = Transformer(SHAPE, seed=0)
    optimizer = Optimizer(model, hyperparameters)
    for factor, windows in zip(SCHEDULE, _windows(), strict=True):
        model.loss(windows).backward()
        optimizer.step(factor)
    return model, hyperparameters


def _reference(hyperparameters, *, muon: bool) -> Transformer:
    h = hyperparameters
    model = Transformer(SHAPE, seed=0)
    matrices = list(model.blocks.parameters())
    adamw = torch.optim.AdamW(
        [
            {"params": [model.embedding], "lr": h.embedding_rate},
            {"params": [model.head], "lr": h.head_rate},
            *([] if muon else [{"params": matrices, "lr": h.matrix_rate}]),
        ],
        betas=(h.beta1, h.beta2),
        eps=h.epsilon,
        weight_decay=h.weight_decay,
    )
    split = []
    if muon:  # torch's Muon takes whole matrices: q, k and v apart
        for block in model.blocks:
            split += [*block.qkv.data.split(SHAPE.width), block.attention_out.data]
            split += [block.up.data, block.down.data]
    leaves = [torch.nn.Parameter(m) for m in split]
    optimizers = [adamw]
    if muon:
        optimizers.append(
            torch.optim.Muon(
                leaves,
                lr=h.matrix_rate,
                weight_decay=0.0,
                momentum=h.momentum,
                nesterov=True,
                adjust_lr_fn="original",
            )
        )
    for factor, windows in zip(SCHEDULE, _windows(), strict=True):
        model.zero_grad()
        model.loss(windows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), h.clip)
        if muon:
            grads = []
            for block in model.blocks:
                grads += [*block.qkv.grad.split(SHAPE.width), block.attention_out.grad]
                grads += [block.up.grad, block.down.grad]
            for leaf, gradient in zip(leaves, grads, strict=True):
                leaf.grad = gradient.clone()
        for optimizer in optimizers:
            peaks = [group["lr"] for group in optimizer.param_groups]
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.step()
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak
    return model


def test_adamw_alone_is_torch_adamw_with_clipping() -> None:
    model, h = _trained("mini-adamw")
    for ours, theirs in zip(
        model.parameters(), _reference(h, muon=False).parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_muon_is_torch_muon_one_matrix_at_a_time() -> None:
    """Torch orthogonalises in bfloat16: its updates are 4% noise, so direction and size count."""
    model, h = _trained("mini")
    start = Transformer(SHAPE, seed=0)
    reference = _reference(h, muon=True)
    for name, p in model.named_parameters():
        moved = (p - start.get_parameter(name)).detach()
        expected = (reference.get_parameter(name) - start.get_parameter(name)).detach()
        cosine = (moved * expected).sum() / (moved.norm() * expected.norm())
        assert cosine > 0.998, name
        assert moved.norm() == pytest.approx(expected.norm().item(), rel=0.01), name


@pytest.mark.parametrize("rows", [32, 128])
def test_orthogonalised_matrices_keep_their_singular_vectors_and_level_their_values(
    rows: int,
) -> None:
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(6, rows, 32, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(6, 32, 32, generator=generator))
    values = torch.logspace(-2, 0, 32)
    rotated = u.mT @ orthogonalised(u @ torch.diag(values) @ v.mT) @ v
    levelled = torch.diagonal(rotated, dim1=1, dim2=2)
    # Tall ones go through their Gram matrix, where 1e-7 of the largest value squared is lost.
    atol = 1e-4 if rows == 32 else 3e-4
    torch.testing.assert_close(rotated, torch.diag_embed(levelled), atol=atol, rtol=0)
    assert levelled.min() > 0.6
    assert levelled.max() < 1.25


@pytest.mark.parametrize("rows", [24, 96])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0])
def test_badly_conditioned_matrices_get_the_exact_direction(rows: int, magnitude: float) -> None:
    """Against the textbook iteration in float64, at condition number 1e8."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(4, rows, 24, generator=generator).double())
    v, _ = torch.linalg.qr(torch.randn(4, 24, 24, generator=generator).double())
    matrices = magnitude * u @ torch.diag(torch.logspace(-8, 0, 24).double()) @ v.mT
    exact = matrices / matrices.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = exact.mT @ exact
        exact = 3.4445 * exact + exact @ (-4.7750 * gram + 2.0315 * gram @ gram)
    error = (orthogonalised(matrices.float()).double() - exact).norm(dim=(1, 2))
    assert (error < 1e-3 * exact.norm(dim=(1, 2))).all()


def test_a_zero_matrix_stays_zero() -> None:
    """As the up-projections' gradients are at the first step."""
    for rows in (8, 32):
        assert not orthogonalised(torch.zeros(2, rows, 8)).any()


@pytest.mark.parametrize("recipe", ["mini", "mini-adamw"])
def test_a_restored_optimiser_continues_to_the_bit(recipe: str) -> None:
    hyperparameters = named(recipe).resolve(SHAPE, 1e5)

    def advance(model: Transformer, optimizer: Optimizer, first: int) -> None:
        steps = list(zip(SCHEDULE, _windows(), strict=True))[first:]
        for factor, windows in steps:
            model.loss(windows).backward()
            optimizer.step(factor)

    model = Transformer(SHAPE, seed=0)
    optimizer = Optimizer(model, hyperparameters)
    model.loss(_windows()[0]).backward()
    optimizer.step(SCHEDULE[0])
    state = optimizer.state()
    advance(model, optimizer, 1)

    other = Transformer(SHAPE, seed=9)
    restored = Optimizer(other, hyperparameters)
    restored.restore(state)
    advance(other, restored, 1)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_parameters_share_the_flat_buffer() -> None:
    model = Transformer(SHAPE, seed=0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = Optimizer(model, named("mini").resolve(SHAPE, 1e5))
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)
        assert p.untyped_storage().data_ptr() == optimizer.weights.untyped_storage().data_ptr()


@pytest.mark.parametrize("rows", [24, 64])
@pytest.mark.parametrize(("condition", "most"), [(10.0, 0.02), (1e8, 0.3)])
def test_in_bf16_as_on_a_gpu_directions_stay_those_of_newton_schulz(
    rows: int, condition: float, most: float
) -> None:
    """Of nearly singular matrices rounding fills the small directions, but none grows beyond 1."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(4, rows, 24, generator=generator).double())
    v, _ = torch.linalg.qr(torch.randn(4, 24, 24, generator=generator).double())
    values = torch.logspace(-math.log10(condition), 0, 24).double()
    matrices = u @ torch.diag(values) @ v.mT
    exact = orthogonalised(matrices)
    found = orthogonalised(matrices.float(), half=True)
    assert found.dtype == torch.bfloat16
    error = (found.double() - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))
    assert error.max() < most
    assert torch.linalg.matrix_norm(found.double(), 2).max() < 1.3
    assert not orthogonalised(torch.zeros(2, rows, 24), half=True).any()


def test_steps_in_bf16_go_where_those_in_fp32_do(monkeypatch: pytest.MonkeyPatch) -> None:
    start, (exact, h) = Transformer(SHAPE, seed=0), _trained("mini")
    assert not module.orthogonalises_in_bf16(torch.device("cuda"), h)
    assert module.orthogonalises_in_bf16(torch.device("cuda"), replace(h, precision="bf16"))
    assert not module.orthogonalises_in_bf16(torch.device("cpu"), replace(h, precision="bf16"))
    monkeypatch.setattr(module, "orthogonalises_in_bf16", lambda *_: True)
    half, _ = _trained("mini")
    for name, p in half.named_parameters():
        assert p.dtype == torch.float32
        moved = (p - start.get_parameter(name)).detach()
        expected = (exact.get_parameter(name) - start.get_parameter(name)).detach()
        cosine = (moved * expected).sum() / (moved.norm() * expected.norm())
        assert cosine > 0.998, name
