"""The observation table: conventions, kinds, and what is left out."""

import numpy as np
import pyarrow as pa
import pytest

from analysis.errors import InputError
from analysis.observations import SCHEMA, kinds, observations, require_one_kind, where


def _row(**changes: object) -> dict:
    row = dict.fromkeys(SCHEMA.names) | {
        "trial": "a",
        "tokens": 1000,
        "status": "complete",
        "params_non_embedding": 100,
        "params_matmul": 150,
        "params_total": 200,
        "flops_exact": 7e5,
        "loss": 2.0,
        "recipe": "mini",
        "corpus": "x",
        "corpus_hash": "hash of x",
        "recipe_hash": "hash of mini",
    }
    return row | changes


def _table(*rows: dict) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=SCHEMA)


@pytest.mark.parametrize(
    ("params", "flops", "n", "c"),
    [
        ("non_embedding", "exact", 100, 7e5),
        ("matmul", "exact", 150, 7e5),
        ("non_embedding", "6nd", 100, 6e5),
        ("total", "6nd", 200, 1.2e6),
    ],
)
def test_conventions_count_n_and_c(params: str, flops: str, n: float, c: float) -> None:
    obs = observations(_table(_row()), {("a", 1000): 5e5}, params=params, flops=flops)
    assert (obs.params[0], obs.flops[0], obs.budget[0]) == (n, c, 5e5)
    assert (obs.params_convention, obs.flops_convention) == (params, flops)


def test_diverged_rows_are_not_fitted() -> None:
    table = _table(_row(), _row(trial="b", status="diverged", loss=None))
    assert len(observations(table, {})) == 1


def test_kinds_are_counted_and_told_apart() -> None:
    table = _table(_row(), _row(trial="b"), _row(trial="c", corpus="y", corpus_hash="other"))
    assert [(k["corpus"], k["count"]) for k in kinds(table)] == [("x", 2), ("y", 1)]
    with pytest.raises(InputError, match=r"2 with corpus=x; 1 with corpus=y\): select one"):
        require_one_kind(table)
    require_one_kind(where(table, {"corpus": "y"}))


def test_equal_content_under_two_names_is_one_kind() -> None:
    table = _table(_row(corpus="a.txt"), _row(trial="b", corpus="b.txt"))
    require_one_kind(table)
    assert [(k["corpus"], k["count"]) for k in kinds(table)] == [("a.txt", 2)]


def test_selection_compares_as_text() -> None:
    table = _table(_row(context=64), _row(trial="b", context=128))
    assert where(table, {"context": "64"})["trial"].to_pylist() == ["a"]
    with pytest.raises(InputError, match="no observation has context=32; there are 64, 128"):
        where(table, {"context": "32"})


@pytest.mark.parametrize(
    ("column", "value", "trials"),
    [
        ("flops_exact", "7e5", ["a"]),
        ("flops_exact", "800000", ["b"]),
        ("recipe", "mini", ["a", "b"]),
        ("seed", "1", ["b"]),
    ],
)
def test_numbers_are_selected_however_they_are_written(column, value, trials) -> None:
    table = _table(_row(seed=None), _row(trial="b", flops_exact=8e5, seed=1))
    assert where(table, {column: value})["trial"].to_pylist() == trials


def test_a_plan_tells_the_budget_before_the_row_does() -> None:
    table = _table(_row(budget=1e6), _row(trial="b", budget=2e6), _row(trial="c"))
    budget = observations(table, {("a", 1000): 5e5}).budget
    np.testing.assert_array_equal(budget, [5e5, 2e6, np.nan])


def test_horizons_of_one_trial_share_a_trunk() -> None:
    table = _table(
        _row(), _row(tokens=2000), _row(trial="b"), _row(trial="c", trunk="t"), _row(trunk="t")
    )
    first, second, other, named, same = observations(table, {}).trunk
    assert first == second
    assert named == same
    assert len({int(first), int(other), int(named)}) == 3


def test_weights_are_one_where_a_row_has_none() -> None:
    table = _table(_row(weight=0.5), _row(trial="b"))
    assert observations(table, {}).weight.tolist() == [0.5, 1.0]


def test_losses_equal_to_the_kth_largest_go_too() -> None:
    losses = [2.0, 4.0, 3.0, 3.0, 1.0]
    obs = observations(_table(*(_row(trial=str(i), loss=x) for i, x in enumerate(losses))), {})
    assert obs.without_largest(0).loss.tolist() == losses
    assert obs.without_largest(1).loss.tolist() == [2.0, 3.0, 3.0, 1.0]
    assert obs.without_largest(2).loss.tolist() == [2.0, 1.0]
    for k in (-1, 5, 6):
        with pytest.raises(InputError, match=f"dropping the {k} largest losses of 5"):
            obs.without_largest(k)


def test_external_rows_are_counted_as_given() -> None:
    row = _row(params_given=120.0, flops_given=9e5, params_total=None, flops_exact=None)
    obs = observations(_table(row), {}, params="given", flops="given")
    assert (obs.params[0], obs.flops[0]) == (120.0, 9e5)
    with pytest.raises(InputError, match="none of 1 observation has loss, N as total"):
        observations(_table(row), {}, params="total", flops="6nd")


def test_a_further_heldout_set_is_a_loss_too() -> None:
    def domains(code: float) -> list[dict]:
        web = {"name": "web", "loss": 3.0, "loss_stderr": None, "bits_per_byte": None}
        return [web, {**web, "name": "code", "loss": code, "loss_stderr": 0.02}]

    rows = [_row(domains=domains(1.5)), _row(trial="b", domains=domains(1.25)), _row(trial="c")]
    found = observations(_table(*rows), {}, loss="code")
    assert (found.loss.tolist(), found.loss_stderr.tolist()) == ([1.5, 1.25], [0.02, 0.02])
    assert found.loss_unit == "nats/token"
    with pytest.raises(InputError, match="choose among loss, bits_per_byte, code, web"):
        observations(_table(*rows), {}, loss="prose")


RUNS = pa.table(
    {
        "lr": [3e-4, 1e-3, None],
        "params": [100_000, 200_000, 100_000],
        "arch": ["dense", None, "8 GPUs"],
        "tied": [True, False, None],
    }
)


@pytest.mark.parametrize(
    ("column", "value", "rows"),
    [
        ("lr", "3e-4", [0]),
        ("lr", "0.0003", [0]),
        ("params", "100k", [0, 2]),
        ("params", "1e5", [0, 2]),
        ("params", "0.1M", [0, 2]),
        ("arch", "8 GPUs", [2]),
        ("arch", "", [1]),
        ("lr", "", [2]),
        ("tied", "TRUE", [0]),
    ],
)
def test_selection_takes_values_as_people_write_them(column, value, rows) -> None:
    table = RUNS.append_column("row", pa.array([0, 1, 2]))
    assert where(table, {column: value})["row"].to_pylist() == rows


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("arch", "moe", "no observation has arch=moe; there are 8 GPUs, dense$"),
        ("lr", "0.1", "no observation has lr=0.1; there are 0.0003, 0.001$"),
        ("lr", "high", "no observation has lr=high; there are 0.0003, 0.001$"),
        ("tied", "maybe", "there are false, true$"),
        ("config", "1", "no column 'config' to select on; choose among lr, params, arch, tied$"),
        (
            "curve",
            "1",
            "column 'curve' holds lists, nothing to select on; choose among lr, params, arch",
        ),
        ("notes", "x", "no observation has notes=x: that column is blank in every row"),
    ],
)
def test_what_there_is_to_select_is_listed_without_blanks(column, value, message) -> None:
    table = RUNS
    if column in ("curve", "notes"):
        extra = pa.array([[1.0]] * 3) if column == "curve" else pa.nulls(3, pa.string())
        table = RUNS.append_column(column, extra)
    with pytest.raises(InputError, match=message):
        where(table, {column: value})


def test_two_columns_of_one_name_are_not_selected_on() -> None:
    table = RUNS.append_column("lr", pa.array([1, 2, 3]))
    with pytest.raises(InputError, match="two columns are called 'lr': rename one of them"):
        where(table, {"lr": "1"})


def test_a_kind_is_selected_by_a_command_that_can_be_pasted() -> None:
    table = _table(_row(), _row(trial="b", corpus="my text", corpus_hash="other"), _row(trial="c"))
    spaced = where(table, {"corpus": "my text"})
    mixed = pa.concat_tables([spaced, spaced, where(table, {"trial": "a"})])
    with pytest.raises(InputError, match=r"select one with --where 'corpus=my text'$"):
        require_one_kind(mixed)
    nameless = _table(_row(schedule=None), _row(trial="b", schedule="wsd"))
    with pytest.raises(InputError, match=r"select one with --where schedule=wsd$"):
        require_one_kind(nameless)
