"""The unit of a loss is what its name, its metadata or a person says, and otherwise its column."""

import numpy as np
import pyarrow as pa
import pytest

from analysis.errors import InputError
from analysis.loss_units import convert, loss_unit, parse_loss_unit, shown


def _unit(name: str, asked: str | None = None, unit: str | None = None) -> str:
    metadata = {"unit": unit} if unit else None
    field = pa.field(name, pa.float64(), metadata=metadata)
    return shown(loss_unit(name, field, parse_loss_unit(asked)), name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss", "as in 'loss'"),
        ("val_bpb", "bits/byte"),
        ("bits_per_byte", "bits/byte"),
        ("eval.nats_per_byte", "nats/byte"),
        ("loss_bits", "bits/token"),
        ("loss (nats)", "nats/token"),
    ],
)
def test_a_name_says_what_it_can(name: str, expected: str) -> None:
    assert _unit(name) == expected


def test_metadata_and_a_person_say_more_than_a_name() -> None:
    assert _unit("loss", unit="nats/token, held out") == "nats/token"
    assert _unit("loss", asked="bits_per_byte") == "bits/byte"
    assert _unit("val_ppl", asked="nats") == "nats/token"
    with pytest.raises(InputError, match="--loss-unit furlongs: the units are nats, bits"):
        parse_loss_unit("furlongs")


@pytest.mark.parametrize("name", ["perplexity", "val_ppl", "Eval Perplexity"])
def test_a_perplexity_is_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(InputError, match=f"{name!r} is a perplexity.*--loss-unit perplexity"):
        _unit(name)


def test_the_logarithm_of_a_perplexity_is_taken_and_of_nothing_else() -> None:
    values = {"loss": np.array([np.e, np.e**2]), "loss_stderr": np.array([0.1, 0.2])}
    taken = convert("perplexity", "ppl", values)
    np.testing.assert_allclose(taken["loss"], [1.0, 2.0])
    np.testing.assert_allclose(taken["loss_stderr"], [0.1 / np.e, 0.2 / np.e**2])
    assert convert("bits", "b", values)["loss"] is values["loss"]
    with pytest.raises(InputError, match=r"1 of 2 rows have a perplexity .* down to 0\.9"):
        convert("perplexity", "ppl", {"loss": np.array([0.9, 3.0])})
