"""Somebody else's table: what its columns are, what is left out, and what is doubted."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

from analysis.errors import InputError
from analysis.files import read_table
from analysis.fitting import Method, fit
from analysis.foreign import foreign, parse_columns
from analysis.laws import HOFFMANN
from analysis.observations import Observations, where

N = np.array([1e8, 2e8, 4e8, 1e9])
D = np.array([4e9, 2e9, 8e9, 2e10])
C = 6 * N * D
L = np.array([3.1, 3.0, 2.8, 2.6])


def _table(**columns: object) -> pa.Table:
    return pa.table({name: np.asarray(values) for name, values in columns.items()})


@pytest.mark.parametrize(
    "columns",
    [{"N": N, "D": D}, {"N": N, "C": C}, {"D": D, "C": C}, {"N": N, "D": D, "C": C}],
    ids=["N and D", "N and C", "D and C", "all"],
)
def test_any_two_of_n_d_and_c_give_the_third(columns: dict) -> None:
    found = foreign(_table(L=L, **columns), {}).obs
    np.testing.assert_allclose(found.params, N, rtol=1e-14)
    np.testing.assert_allclose(found.tokens, D, rtol=1e-14)
    np.testing.assert_allclose(found.flops, C, rtol=1e-14)
    assert found.flops_convention == ("given" if "C" in columns else "6nd")
    assert found.params_convention == ("given" if "N" in columns else "derived")


def test_c_is_as_given_where_all_three_are() -> None:
    found = foreign(_table(N=N, D=D, C=1.3 * C, L=L), {})
    np.testing.assert_array_equal(found.obs.flops, 1.3 * C)
    assert not [note for note in found.notes if "6ND in" in note]


def test_a_nominal_budget_is_c_where_there_is_no_other() -> None:
    found = foreign(_table(N=N, D=D, budget=np.full(4, 1e19), L=L), {})
    np.testing.assert_array_equal(found.obs.flops, np.full(4, 1e19))
    np.testing.assert_array_equal(found.obs.budget, np.full(4, 1e19))
    assert "C is taken to be the nominal budget, 'budget'" in found.notes


def test_the_points_of_besiroglu_et_al_give_their_constants(chinchilla_csv: Path) -> None:
    columns = parse_columns(["params=Model Size,flops=Training FLOP,loss=loss"])
    obs = foreign(read_table(chinchilla_csv), columns).obs.without_largest(5)
    assert len(obs) == 240
    found = fit(HOFFMANN, obs, method=Method(objective="huber", delta=1e-3)).constants
    published = {"A": 477.83, "B": 2143.42, "E": 1.81722, "alpha": 0.34731, "beta": 0.36717}
    assert found == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize("study", ["chinchilla", "llama3", "marin-dclm"])
def test_published_studies_are_read_by_their_names_and_not_doubted(
    isoflop_csv: Path, study
) -> None:
    rows = where(read_table(isoflop_csv), {"study": study, "outlier": "false"})
    found = foreign(rows, {})
    assert len(found.obs) == rows.num_rows
    assert found.excluded == {}
    named = "columns known by their names: N is 'params', D is 'tokens', L is 'loss', "
    taken = "C is taken to be the nominal budget, 'budget_flops'"
    assert found.notes == (f"{named}budget is 'budget_flops'", taken)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["params=Model Size,loss=loss"], {"params": "Model Size", "loss": "loss"}),
        (["params=Model Size", "loss=a=b"], {"params": "Model Size", "loss": "a=b"}),
        ([' N = "Model Size" , C=f'], {"params": "Model Size", "flops": "f"}),
        ([], {}),
    ],
)
def test_columns_are_parsed_as_people_write_them(items, expected) -> None:
    assert parse_columns(items) == expected


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("params", "write KEY=COLUMN"),
        ("params=", "write KEY=COLUMN"),
        ("params=a,,loss=b", "write KEY=COLUMN"),
        ("size=a", "the keys are params, tokens, flops"),
        ("params=a,params=b", "gives params twice, as 'a' and 'b'"),
    ],
)
def test_columns_that_say_nothing_are_refused(item: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_columns([item])


def test_columns_by_name_alone() -> None:
    table = pa.table({"Model Size": N, "Training FLOP": C, "Val. Loss": L, "seed": [0, 1, 2, 3]})
    found = foreign(table, {})
    np.testing.assert_array_equal(found.obs.params, N)
    assert found.notes == (
        "columns known by their names: N is 'Model Size', C is 'Training FLOP', L is 'Val. Loss'",
    )


def test_a_third_column_is_not_looked_for_where_two_are_named() -> None:
    table = _table(N=N, C=C, D=np.ones(4), L=L)
    found = foreign(table, {"params": "N", "flops": "C"}).obs
    np.testing.assert_allclose(found.tokens, D)


@pytest.mark.parametrize(
    ("table", "columns", "message"),
    [
        ({"N": N, "D": D, "L": L}, {"loss": "x"}, "no column 'x'; the columns are N, D, L"),
        ({"N": N, "x": D, "L": L}, {}, r"which column is D or C: .* tokens=.*columns are N, x"),
        ({"N": N, "D": D}, {}, "which column is the loss"),
        ({"N": N, "D": D, "L": L, "val_loss": L}, {}, "several columns could be loss"),
        ({"N": N, "D": D, "L": ["3", "x", "2", "1"]}, {}, "'L' is not numeric: row 2 has 'x'"),
        ({"N": ["1.5 GB"] * 4, "D": D, "L": L}, {}, "'N' is not numeric: row 1 has '1.5 GB'"),
        ({"N": N, "D": D, "L": [True] * 4}, {}, "'L' is not numeric: it holds bool"),
        ({"N": N, "D": D, "L": [3, 0, -1, 2]}, {}, r"2 of 4 rows L \('L'\) is .* 0 in row 2"),
        ({"N": [1e8, -1, 1, 1], "D": D, "L": L}, {}, "rows N .* is not positive, the first is -1"),
        ({"N": N, "D": D, "L": L, "weight": [1, 1, -1, 0]}, {}, "weight .* is negative"),
        ({"N": N, "D": D, "L": [np.nan] * 4}, {}, "no row of 4 is complete"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(table, columns, message) -> None:
    with pytest.raises(InputError, match=message):
        foreign(_table(**table), columns)


def test_incomplete_rows_are_counted_and_left_out() -> None:
    loss = [3.1, np.nan, np.inf, 2.6]
    tokens = pa.array([4e9, 2e9, 8e9, None])
    found = foreign(pa.table({"N": N, "D": tokens, "L": loss}), {})
    assert found.obs.loss.tolist() == [3.1]
    assert found.excluded == {
        "missing or not a finite number in 'D'": 1,
        "missing or not a finite number in 'L'": 2,
    }


def test_exact_repetitions_count_once_and_replicates_stay() -> None:
    table = pa.table(
        {
            "N": [1e8, 1e8, 1e8, 2e8],
            "D": [1e9] * 4,
            "L": [3.0] * 4,
            "seed": [0, 0, 1, 0],
            "name": ["a", "a", "a", None],
        }
    )
    found = foreign(table, {})
    assert found.obs.params.tolist() == [1e8, 1e8, 2e8]
    assert found.excluded == {"exact duplicate of another row": 1}


def test_weights_and_trunks_are_carried() -> None:
    table = pa.table(
        {"N": N, "D": D, "L": L, "w": [1, 2, 0, 1], "trunk": ["a", "b", "a", None], "se": [0.1] * 4}
    )
    obs = foreign(table, {"weight": "w", "loss_stderr": "se"}).obs
    assert obs.weight.tolist() == [1, 2, 0, 1]
    a, b, other, alone = obs.trunk
    assert a == other
    assert len({int(a), int(b), int(alone)}) == 3
    kept = obs.select(np.array([True, False, True, True]))
    assert kept.weight.tolist() == [1, 0, 1]
    assert kept.trunk.tolist() == [a, a, alone]
    assert obs.loss_stderr.tolist() == [0.1] * 4


def test_by_default_rows_weigh_the_same_and_stand_alone() -> None:
    nan = np.full(4, np.nan)
    obs = Observations(params=N, tokens=D, flops=C, loss=L, loss_stderr=nan, budget=nan)
    assert obs.weight.tolist() == [1.0] * 4
    assert len(set(obs.trunk.tolist())) == 4


@pytest.mark.parametrize(
    ("columns", "doubts"),
    [
        (
            {"N": N, "D": D, "L": np.exp(L)},
            ["is above 20 in 2 of 4 rows, up to 22.2", "--loss-unit perplexity"],
        ),
        ({"N": N, "D": D, "L": [2400.0, 3, 3, 3]}, ["L ('L') is above 20 in 1 of 4 rows"]),
        ({"N": N / 1e6, "D": D, "L": L}, ["N ('N') is 300", "D ('D') is above 1e7 N in 3 of 4"]),
        ({"N": N, "D": D / 1e9, "L": L}, ["D ('D') is below N/1000 in 4 of 4"]),
        ({"N": N / 1e9, "D": D / 1e9, "L": L}, ["N ('N') is 0.3 at the median"]),
        ({"N": np.log10(N), "D": np.log10(D), "L": L}, ["N ('N') is 8.452 at the median"]),
        (
            {"N": N, "C": C / 8.64e19, "L": L},
            ["C ('C') is 0.125 at the median", "D (from C = 6ND) is below N/1000"],
        ),
        (
            {"N": N, "D": D, "C": C / 1e18, "L": L},
            ["C ('C') is 10.8", "C is not 6ND in 4 of 4 rows", "as if C were in 1e18s"],
        ),
        (
            {"N": N / 1e3, "D": D / 1e3, "C": C, "L": L},
            ["C is not 6ND in 4 of 4 rows", "as if N or D were in millions"],
        ),
        ({"N": N, "D": D, "C": C * [1, 1, 1, 2.1], "L": L}, ["C is not 6ND in 1 of 4 rows"]),
        ({"N": N, "D": D, "C": C * [1, 1.4, 0.7, 1.9], "L": L}, []),
    ],
    ids=[
        *("perplexity", "one loss", "N in millions", "D in billions", "both in billions"),
        *("logarithms", "PF-days", "C in 1e18s", "N and D in thousands", "one C", "attention"),
    ],
)
def test_units_are_doubted_by_name(columns: dict, doubts: list[str]) -> None:
    notes = foreign(_table(**columns), {}).notes[1:]
    said = " ".join(notes)
    for doubt in doubts:
        assert doubt in said
    assert bool(notes) == bool(doubts)


FILES = {
    "commas.csv": "params,tokens,loss\n1e8,2e9,3.1\n2e8,2e9,3.0\n",
    "spaces.csv": "params, tokens , loss\n1e8, 2e9, 3.1\n2e8,2e9 ,3.0\n",
    "semicolons.csv": "params;tokens;loss\n1e8;2e9;3.1\n2e8;2e9;3.0\n",
    "tabs.tsv": "params\ttokens\tloss\n1e8\t2e9\t3.1\n2e8\t2e9\t3.0\n",
    "mark.csv": "\ufeffparams,tokens,loss\r\n100000000,2e9,3.1\r\n200000000,2e9,3.0\r\n",
    "missing.csv": "params,tokens,loss\n1e8,2e9,3.1\n2e8,2e9,3.0\n3e8,2e9,None\n3e8,2e9,\n",
    "quotes.csv": '"params","tokens","loss"\n"1e8","2e9","3.1"\n"2e8","2e9","3.0"\n',
}


@pytest.mark.parametrize("name", FILES)
def test_csv_is_read_as_people_write_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(FILES[name])
    obs = foreign(read_table(path), {}).obs
    assert obs.params.tolist() == [1e8, 2e8]
    assert obs.tokens.tolist() == [2e9, 2e9]
    assert obs.loss.tolist() == [3.1, 3.0]


def test_types_may_change_far_down_a_file(tmp_path: Path) -> None:
    path, rows = tmp_path / "long.csv", 200_000
    many = "".join(f"{1000 + i},2000000000,3\n" for i in range(rows))
    path.write_text(f"params,tokens,loss\n{many}1e9,2e9,2.75\n1e9,2e9,NaN\n")
    found = foreign(read_table(path), {})
    assert len(found.obs) == rows + 1
    assert found.obs.loss[-1] == 2.75
    assert sum(found.excluded.values()) == 1
    path.write_text(f"params,tokens,loss\n{many}1e9,2e9,diverged\n")
    with pytest.raises(InputError, match=f"row {rows + 1} has 'diverged'"):
        foreign(read_table(path), {})


def test_parquet_is_read_without_its_curves(tmp_path: Path) -> None:
    path = tmp_path / "runs.parquet"
    table = pa.table({"params": N, "tokens": D, "loss": L, "curve": [[1.0, 2.0]] * 4})
    pq.write_table(table, path)
    read = read_table(path)
    assert read.column_names == ["params", "tokens", "loss"]
    np.testing.assert_array_equal(foreign(read, {}).obs.loss, L)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.csv", None, "there is no file"),
        ("book.xlsx", b"PK", "none of .csv, .tsv, .jsonl, .json and .parquet"),
        ("empty.csv", b"", "not a readable CSV file"),
        ("head.csv", b"params,tokens,loss\n", "has no rows"),
        ("ragged.csv", b"a,b\n1,2\n1,2,3\n", "not a readable CSV file .*Expected 2 columns, got 3"),
        ("text.parquet", b"params,tokens", "not a readable Parquet file"),
        ("latin.csv", "größe,b\n1,2\n".encode("latin1"), "line 1 has the byte 0xf6"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name, content, message) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_table(path)


def test_a_parquet_file_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.parquet"
    pq.write_table(_table(N=N, D=D, L=L), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_table(path)


def test_a_million_rows_are_read_in_seconds(tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(0), 1_000_000
    n = np.exp(rng.uniform(np.log(1e7), np.log(1e10), rows))
    loss = 1.8 + 480 * n**-0.35 + rng.uniform(0.0, 0.01, rows)
    path = tmp_path / "many.csv"
    table = pa.table({"params": n, "flops": rng.choice([1e18, 3e18], rows), "loss": loss})
    csv.write_csv(pa.concat_tables([table, table.slice(0, 10)]), path)
    found = foreign(read_table(path), {})
    np.testing.assert_array_equal(found.obs.loss, loss)
    assert found.excluded == {"exact duplicate of another row": 10}
