"""Published recipes against their sources: the same N or C, and the numbers that they print."""

import dataclasses
import math

import pytest
import torch

from analysis.errors import InputError
from trainers.decoders import LLAMA
from trainers.flops import flops_per_token, params
from trainers.recipe import probed
from trainers.recipes import RECIPES, named
from trainers.shape import Shape
from trainers.transformer import Transformer
from trainers.trial import Probe

PORIAN = [
    (96, 3, 5_173_248, 1.30e-2, 20),
    (160, 5, 9_809_920, 1.05e-2, 32),
    (384, 10, 37_060_608, 6.8e-3, 80),
    (640, 15, 108_462_080, 4.7e-3, 160),
    (1024, 23, 347_078_656, 3.2e-3, 320),
    (1504, 30, 901_726_208, 2.4e-3, 640),
]
"""Width, depth, N, rate and batch in sequences of 2048 that Porian et al. trained with: their
`params_lr_map` and `params_bs_map`, in make_paper.ipynb of their code."""


def _theirs(width: int, depth: int) -> Shape:
    """Of open_lm: hidden units are a multiple of 256, and there are 50,432 symbols."""
    architecture = dataclasses.replace(LLAMA, hidden_multiple=256)
    return Shape(
        width=width,
        depth=depth,
        heads=4,
        vocabulary=50_432,
        context=2048,
        architecture=architecture,
    )


@pytest.mark.parametrize(("width", "depth", "n", "rate", "sequences"), PORIAN)
def test_porians_models_get_their_rates_batches_and_warm_up(
    width: int, depth: int, n: int, rate: float, sequences: int
) -> None:
    """Rates are printed with two digits, and batches rounded to what their GPUs share."""
    shape = _theirs(width, depth)
    h = named("llama-adamw").resolve(shape, 20 * n)
    assert named("llama-adamw").size(shape) == n
    assert h.matrix_rate == h.head_rate == pytest.approx(rate, rel=0.04)
    assert h.batch_tokens / 2048 == pytest.approx(sequences, rel=0.1)
    assert h.warmup_steps * h.batch_tokens == pytest.approx(n, rel=0.01)
    assert h.beta2 == (0.95 if sequences >= 256 else 0.99)
    assert named("llama-adamw").caution(shape, 20 * n) is None
    for other in ("mup", "muon"):
        assert named(other).resolve(shape, 20 * n).batch_tokens == h.batch_tokens
        assert named(other).caution(shape, 20 * n) is None


def test_porians_weight_decay_is_the_same_a_step_at_every_rate() -> None:
    for factor in (0.5, 1.0, 2.0):
        for width, depth in ((96, 3), (640, 15)):
            h = named("llama-adamw", {"rate_factor": factor}).resolve(_theirs(width, depth), 1e9)
            assert h.weight_decay * h.matrix_rate == pytest.approx(1e-4)


@pytest.mark.parametrize("name", ["llama-adamw", "step-law", "mini"])
def test_a_probe_is_what_the_recipe_would_train_at_that_rate(make_trial, name: str) -> None:
    trial = make_trial(64, 1e11, recipe=name)
    factor = named(name).rate_factor
    found = probed(trial, Probe(rate=2.0), named(name)).hyperparameters
    wanted = 1e11 / flops_per_token(trial.shape)
    twice = named(name, {"rate_factor": 2 * factor}).resolve(trial.shape, wanted)
    assert dataclasses.asdict(found) == pytest.approx(dataclasses.asdict(twice))


@pytest.mark.parametrize(("name", "whose"), [("llama-adamw", "Porian"), ("mup", "its batch")])
def test_small_models_are_outside_of_porians_range(name: str, whose: str) -> None:
    shape = dataclasses.replace(_theirs(96, 3), vocabulary=40_000)  # 4.2e6 with the head
    assert named(name).caution(shape, 1e9).startswith(whose)


def test_deepseek_counts_flops_as_its_paper_does() -> None:
    """72 n d^2 + 12 n d l a token (Bi et al. 2024, equation 2): hidden units are 8/3 of 768."""
    shape = Shape(
        width=768, depth=12, heads=12, vocabulary=102_400, context=4096, architecture=LLAMA
    )
    assert params(shape).non_embedding == 12 * 12 * 768**2
    c = 3e9 * (72 * 12 * 768**2 + 12 * 12 * 768 * 4096)
    h = named("deepseek").resolve(shape, 3e9)
    assert h.matrix_rate == pytest.approx(0.3118 * c**-0.1250)
    assert h.batch_tokens == pytest.approx(0.2920 * c**0.3271, rel=0.01)


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_step_law_ends_at_the_same_rate_whatever_the_peak(factor: float) -> None:
    shape = dataclasses.replace(_theirs(640, 15), vocabulary=65_536)
    h = named("step-law", {"rate_factor": factor}).resolve(shape, 4e9)
    n = params(shape).non_embedding
    assert h.matrix_rate == pytest.approx(factor * 1.79 * n**-0.713 * 4e9**0.307)
    assert h.final_fraction * h.matrix_rate == pytest.approx(1e-5)
    tenth = named("step-law", {"final_fraction": 0.1}).resolve(shape, 4e9)
    assert tenth.final_fraction == 0.1
    tiny = named("step-law", {"rate_factor": 1e-9}).resolve(shape, 4e9)
    assert tiny.final_fraction == 1.0


@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize("name", ["llama-adamw", "step-law", "deepseek"])
def test_a_tied_head_starts_as_ignorant_as_an_untied_one(name: str, width: int) -> None:
    recipe = named(name, {"architecture": {"tied": True}})
    shape = Shape(
        width=width,
        depth=2,
        heads=width // 32,
        vocabulary=256,
        context=16,
        architecture=recipe.architecture,
    )
    windows = torch.randint(0, 256, (16, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = Transformer(shape, seed=0).loss(windows).item()
    assert loss == pytest.approx(math.log(256), rel=0.05)
    h = recipe.resolve(shape, 1e7)
    assert h.embedding_rate == h.head_rate


@pytest.mark.parametrize("name", ["mup", "muon"])
def test_a_head_that_starts_and_trains_apart_cannot_be_tied(name: str) -> None:
    with pytest.raises(InputError, match=r"architecture.tied is true, .* or take llama-adamw"):
        named(name, {"architecture": {"tied": True}})


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"mini", "mini-adamw"}))
def test_rates_of_one_optimiser_are_not_anothers(name: str) -> None:
    its = named(name).optimizer
    other = "adamw" if its == "muon" else "muon"
    message = f"optimizer is '{other}', but its rates are {its}'s"
    with pytest.raises(InputError, match=message):
        named(name, {"optimizer": other})
    assert named(name, {"optimizer": its}) == named(name)
