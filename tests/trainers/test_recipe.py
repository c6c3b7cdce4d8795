"""Recipes give the numbers of their sources."""

from dataclasses import replace

import pytest
from pydantic import ValidationError

from analysis.errors import InputError
from orchestrator.spec_recipe import RecipeSpec
from trainers.recipes import RECIPES, identity, named
from trainers.shape import Shape


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


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("width", [64, 512])
@pytest.mark.parametrize("context", [64, 1024])
def test_a_run_is_whole_sequences_and_close_to_its_horizon(
    name: str, width: int, context: int
) -> None:
    """Of at least the least steps; of 30 sequences it once made 20 steps of 2."""
    recipe = named(name)
    shape = replace(_mini(width), context=context)
    horizons = [*(n * context for n in (20, 25, 30, 50, 70, 99)), 3.3e5, 7.7e8]
    for tokens in horizons:
        h = recipe.resolve(shape, tokens)
        assert h.batch_tokens % context == 0
        assert h.steps >= recipe.min_steps
        assert h.steps * h.batch_tokens == pytest.approx(tokens, rel=0.5 / 20)


def test_a_batch_leaves_the_least_steps() -> None:
    """Also where a coefficient asks for more than there is."""
    h = named("mini", {"batch_coefficient": 50.0}).resolve(_mini(24), 30 * 64)
    assert (h.batch_tokens, h.steps) == (64, 30)


@pytest.mark.parametrize("name", RECIPES)
def test_constants_are_within_their_ranges(name: str) -> None:
    assert RecipeSpec(name=name).rules == RECIPES[name]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "mini", "rate_factor": -1.0}, "rate_factor is -1.0, but it should be greater"),
        ({"name": "llama-adamw", "min_steps": 0}, "min_steps is 0, but it should be greater"),
        ({"name": "llama-adamw", "min_steps": -5}, "min_steps is -5, but it should be greater"),
        ({"name": "step-law", "batch_factor": 0.0}, "batch_factor is 0.0, but it should be gre"),
        ({"name": "deepseek", "beta1": 1.5}, "beta1 is 1.5, but it should be less than 1"),
        ({"name": "muon", "decay_fraction": 1.5}, "decay_fraction is 1.5, but it should be less"),
        ({"name": "mup", "base_width": 0}, "base_width is 0, but it should be greater than"),
        ({"name": "mup", "architecture": 3}, "architecture is 3, but it should be a table"),
        ({"name": "mup", "architecture": {"tied": True}}, "architecture.tied is true, but it"),
        ({"name": "step-law", "optimizer": "muon"}, "optimizer is 'muon', but its rates are ada"),
    ],
)
def test_a_constant_out_of_its_range_is_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=f"is wrong: {message}"):
        RecipeSpec.model_validate(given)


def test_recipes_of_other_constants_have_other_hashes() -> None:
    mini, adamw = (identity(name, named(name)) for name in ("mini", "mini-adamw"))
    assert mini.hash != adamw.hash
    changed = identity("mini", named("mini", {"matrix_rate": 0.02}))
    assert changed.hash not in (mini.hash, adamw.hash)
    assert changed.name == "mini"


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(InputError, match="no recipe is called 'maxi'; there are mini"):
        named("maxi")
