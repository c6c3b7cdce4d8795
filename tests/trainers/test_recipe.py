"""Recipes give the numbers of their sources."""

import pytest

from analysis.errors import InputError
from trainers.flops import params
from trainers.recipe import RECIPES, MiniRecipe, identity, named
from trainers.trial import Shape


def _mini(width: int) -> Shape:
    return Shape(width=width, depth=2, heads=2, vocabulary=256, context=64)


def test_mini_batch_grows_with_the_root_of_the_horizon() -> None:
    """0.45 sqrt(D) tokens, in whole sequences of 64."""
    assert named("mini").resolve(_mini(24), 288_000).batch_tokens == 4 * 64  # 241
    assert named("mini").resolve(_mini(24), 4 * 288_000).batch_tokens == 8 * 64  # 483
    assert named("mini").resolve(_mini(24), 5_000).batch_tokens == 64  # 32


def test_mini_rates_at_long_and_short_horizons() -> None:
    long = named("mini").resolve(_mini(32), 2e6)
    assert long.matrix_rate == pytest.approx(0.014 * 1.05)
    assert long.embedding_rate == pytest.approx(0.05 * 1.05)
    assert long.head_rate == pytest.approx(0.5 / 32 * 1.05)
    short = named("mini").resolve(_mini(32), 6e4)
    tokens = short.steps * short.batch_tokens
    assert short.matrix_rate == pytest.approx(0.014 * 1.05 * (6e5 / tokens) ** 0.4)


def test_ladder_at_its_reference_size() -> None:
    """Porian et al. (2024): 0.0047 and 160 sequences of 2048 at N = 108e6."""
    shape = Shape(width=768, depth=15, heads=12, vocabulary=256, context=2048)
    n = params(shape).non_embedding
    h = named("ladder-adamw").resolve(shape, 50 * n)
    ratio = n / 108e6
    assert ratio == pytest.approx(1, abs=0.02)
    assert h.matrix_rate == pytest.approx(0.0047 * ratio ** (-1 / 3))
    assert h.batch_tokens == pytest.approx(160 * 2048 * ratio ** (2 / 3), rel=0.01)
    assert h.warmup_steps * h.batch_tokens == pytest.approx(n, rel=0.01)
    assert h.beta2 == 0.99


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("width", [64, 128, 512])
@pytest.mark.parametrize("tokens", [2e4, 3.3e5, 7.7e8])
def test_a_run_is_whole_sequences_and_close_to_its_horizon(
    name: str, width: int, tokens: float
) -> None:
    shape = _mini(width)
    h = named(name).resolve(shape, tokens)
    assert h.batch_tokens % shape.context == 0
    assert h.steps >= named(name).min_steps
    assert h.steps * h.batch_tokens == pytest.approx(tokens, rel=0.5 / 20)


def test_recipes_of_other_constants_have_other_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity("mini")
    assert before != identity("mini-adamw")
    monkeypatch.setitem(RECIPES, "mini", MiniRecipe(matrix_rate=0.02))
    assert identity("mini").hash != before.hash


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(InputError, match="no recipe is called 'maxi'; there are mini"):
        named("maxi")
