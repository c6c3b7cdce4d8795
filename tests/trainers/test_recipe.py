"""Recipes give the numbers of their sources."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from analysis.errors import InputError
from orchestrator.spec_recipe import RecipeSpec
from trainers.decoder_recipe import DecoderRecipe
from trainers.recipe import Recipe, idle
from trainers.recipes import RECIPES, constants_of, identity, named
from trainers.shape import Shape

DOCS = Path(__file__).parents[2] / "docs/trainers.md"


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


# What each constant changes

SCHEDULED = [
    (name, constants)
    for name, recipe in RECIPES.items()
    for constants in ({}, {"schedule": "wsd"})
    if not constants or isinstance(recipe, DecoderRecipe)
]
RUNS = [
    (width, vocabulary, tokens)
    for width in (64, 512, 4096)
    for vocabulary in (256, 50_000)
    for tokens in (3e3, 3e5, 3e8, 3e11)
]
"""So short that the least steps bind, and so large that the large batch does."""


def _trained(recipe: Recipe) -> list[tuple[Any, ...]]:
    """Everything of some runs that a recipe decides: the shape and the hyperparameters."""
    found = []
    for width, vocabulary, tokens in RUNS:
        shape = Shape(width=width, depth=2, heads=4, vocabulary=vocabulary, context=64,
                      architecture=recipe.architecture)  # fmt: skip
        a = shape.architecture
        reading = a.input_std or a.input_gain * width**-0.5  # as the transformer starts them
        head = None if a.tied else a.head_std
        parts = replace(a, input_std=reading, input_gain=0.5, head_std=head or 0.0)
        found.append((replace(shape, architecture=parts), recipe.resolve(shape, tokens)))
    return found


def _other_values(value: Any) -> Iterator[Any]:
    """Values of a constant that it might have in place of its own."""
    choices = ["muon", "adamw", "fp32", "bf16", "cosine", "wsd", "rms", "layer", "swiglu", "relu2"]
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, str):
        yield from choices
    elif value is None:
        yield 0.5
    elif isinstance(value, int):
        yield from (2 * value, 4 * value, max(1, value // 2), 1)
    else:
        yield from (0.75 * value, 1.25 * value, 0.5, 0.05)


def _changed(name: str, given: dict[str, Any], constant: str, value: Any) -> dict[str, Any]:
    table, dot, part = constant.partition(".")
    return {"name": name, **given, table: {part: value} if dot else value}


def _recipes(name: str, given: dict[str, Any], constant: str) -> Iterator[Recipe]:
    """Those recipes that another value of a constant makes, of the values that it may have."""
    found: Any = named(name, given)
    for part in constant.split("."):
        found = getattr(found, part)
    for value in _other_values(found):
        with suppress(ValidationError):  # not every value may be had
            made = RecipeSpec.model_validate(_changed(name, given, constant, value))
            if value != found:
                yield made.rules


@pytest.mark.parametrize(("name", "given"), SCHEDULED)
def test_every_constant_that_a_recipe_takes_changes_what_is_trained(
    name: str, given: dict[str, Any]
) -> None:
    recipe = named(name, given)
    before = _trained(recipe)
    without = [
        constant
        for constant in constants_of(recipe)
        if all(_trained(other) == before for other in _recipes(name, given, constant))
    ]
    assert without == []


@pytest.mark.parametrize(("name", "given"), SCHEDULED)
def test_a_constant_that_would_change_nothing_is_refused_with_those_that_do(
    name: str, given: dict[str, Any]
) -> None:
    recipe = named(name, given)
    refused = idle(recipe)
    assert refused
    for constant in refused:
        table, _, part = constant.partition(".")
        value = getattr(getattr(recipe, table), part) if part else getattr(recipe, table)
        changed = _changed(name, given, constant, value)
        with pytest.raises(ValidationError) as caught:
            RecipeSpec.model_validate(changed)
        said = str(caught.value)
        assert f"recipe {name} does not use {constant}: " in said
        assert f"Its constants are {', '.join(constants_of(recipe))}" in said
        other = _changed(name, given, constant, 0.75 * value)
        del other["name"]
        assert _trained(named(name, other)) == _trained(recipe), constant


def test_the_rate_of_mini_adamw_is_named_to_who_gives_it_the_factor_of_muon() -> None:
    with pytest.raises(ValidationError, match="whose rate is adamw_rate over the width"):
        RecipeSpec.model_validate({"name": "mini-adamw", "rate_factor": 0.5})
    muon = RecipeSpec.model_validate({"name": "mini-adamw", "optimizer": "muon", "rate_factor": 2})
    assert muon.rules == named("mini", {"rate_factor": 2.0})


def test_a_recipe_of_ones_own_that_resolves_by_itself_takes_all_its_constants() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(DecoderRecipe):
        def resolve(self, shape: Shape, tokens: float) -> Any:
            return replace(named("llama-adamw").resolve(shape, tokens), momentum=self.momentum)

    assert "momentum" in constants_of(Own())


def test_a_kept_plan_opens_whatever_its_recipe_does_not_use() -> None:
    given = {"name": "mini-adamw", "rate_factor": 0.5}
    assert RecipeSpec.model_validate(given, context={"kept": None}).rules.optimizer == "adamw"


def test_the_docs_list_the_constants_of_every_recipe() -> None:
    rows = re.findall(r"^\| (`[a-z-]+`|all below) \| (`.*) \|$", DOCS.read_text(), re.MULTILINE)
    listed = {who.strip("`"): set(re.findall(r"`([a-z]\w+)`", text)) for who, text in rows}
    shared = listed["all below"] - {"wsd"}
    for name, recipe in RECIPES.items():
        with_wsd = named(name, {"schedule": "wsd"}) if isinstance(recipe, DecoderRecipe) else recipe
        own = {*constants_of(recipe), *constants_of(with_wsd)}
        if name == "muon":
            own |= {*constants_of(named(name, {"beta2": 0.99}))}
        own = {constant for constant in own if "." not in constant}
        common = shared if isinstance(recipe, DecoderRecipe) else set()
        assert listed[name] - {"wsd"} | common == own, name


def test_recipes_of_other_constants_have_other_hashes() -> None:
    mini, adamw = (identity(name, named(name)) for name in ("mini", "mini-adamw"))
    assert mini.hash != adamw.hash
    changed = identity("mini", named("mini", {"matrix_rate": 0.02}))
    assert changed.hash not in (mini.hash, adamw.hash)
    assert changed.name == "mini"


def test_an_unknown_recipe_is_named() -> None:
    with pytest.raises(InputError, match="no recipe is called 'maxi'; there are mini"):
        named("maxi")
