"""What is no model is refused, with the value and the bound."""

import dataclasses

import pytest
from pydantic import ValidationError

from analysis.errors import InputError
from orchestrator.spec_recipe import RecipeSpec
from trainers.decoders import LLAMA, MUP, RELU2
from trainers.shape import Architecture


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"queries_per_key": 0}, "queries_per_key is 0, but it should be at least 1"),
        ({"hidden_multiple": 0}, "hidden_multiple is 0, but it should be at least 1"),
        ({"hidden_ratio": -1.0}, "hidden_ratio is -1, but it should be finite and above 0"),
        ({"hidden_ratio": float("inf")}, "hidden_ratio is inf, but it should be finite and above"),
        ({"rotary_base": 1.0}, "rotary_base is 1, but it should be finite and above 1"),
        ({"embedding_std": 0.0}, "embedding_std is 0, but it should be finite and above 0"),
        ({"input_std": 0.0}, "input_std is 0, but it should be finite and above 0"),
        ({"output_std": -0.02}, "output_std is -0.02, but it should be finite and at least 0"),
        ({"head_std": float("nan")}, "head_std is nan, but it should be finite and at least 0"),
    ],
)
def test_an_architecture_out_of_bounds_is_named(given: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Architecture(**given)
    with pytest.raises(ValidationError, match=f"is wrong: {message}"):
        RecipeSpec(name="llama-adamw", architecture=given)


@pytest.mark.parametrize("given", [{"hidden_ratio": "wide"}, {"queries_per_key": 1.5}])
def test_what_is_no_number_of_its_kind_is_named_too(given: dict[str, object]) -> None:
    (name,) = given
    with pytest.raises(ValidationError, match=f"is wrong: architecture.{name} is .* should be a"):
        RecipeSpec(name="llama-adamw", architecture=given)


def test_the_least_that_is_a_model_is_none_of_it() -> None:
    Architecture(queries_per_key=1, hidden_multiple=1, output_std=0.0, head_std=0.0, input_std=None)
    for architecture in (Architecture(), LLAMA, MUP, RELU2):
        assert dataclasses.replace(architecture) == architecture
