"""The command line on data of others: files, conventions, external runs, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest

Run = Callable[..., tuple[int, str, str]]
MAPPED = ("--columns", "params=Model Size,flops=Training FLOP,loss=loss")


def _bad(isoflop: Run, *arguments: object) -> str:
    """An error for a person: exit code 2, one line on stderr, nothing on stdout."""
    code, out, err = isoflop(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("isoflop: ")
    assert err.count("\n") == 1
    return err


def _json(isoflop: Run, *arguments: object) -> dict:
    """What a verb gives with --json."""
    code, out, _ = isoflop(*arguments, "--json")
    assert code == 0
    return json.loads(out)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Four budgets of seven sizes under Hoffmann's published law, with .1% noise."""
    budget = np.repeat([1e18, 4e18, 1.6e19, 6.4e19], 7)
    n = np.sqrt(budget / 120) * np.tile(np.geomspace(0.25, 4, 7), 4)
    loss = 1.69 + 406.4 * n**-0.34 + 410.7 * (budget / (6 * n)) ** -0.28
    loss *= np.exp(0.001 * np.random.default_rng(0).standard_normal(28))
    path = tmp_path / "runs.csv"
    csv.write_csv(pa.table({"Model Size": n, "Training FLOP": budget, "loss": loss}), path)
    return path


def test_a_file_is_fitted_as_a_project_is(isoflop: Run, runs: Path) -> None:
    code, out, _ = isoflop("fit", runs, *MAPPED, "--drop-largest", "2", "--json")
    found = json.loads(out)
    assert (code, found["observations"]) == (0, 26)
    assert found["convention"] == {"params": "given", "flops": "given"}
    assert found["excluded"] == [
        {"reason": "among the largest losses (--drop-largest 2)", "count": 2}
    ]
    assert found["budgets"] == [1e18, 4e18, 1.6e19, 6.4e19]
    assert any("budgets found from C" in warning for warning in found["warnings"])
    assert isoflop("fit", runs, *MAPPED)[0] == 0


def test_forecast_and_report_take_a_file(isoflop: Run, runs: Path, tmp_path: Path) -> None:
    _, out, _ = isoflop("forecast", runs, *MAPPED, "--flops", "1e21", "--json")
    found = json.loads(out)
    assert found["convention"] == {"params": "given", "flops": "given"}
    assert found["params_interval"][0] < found["params"] < found["params_interval"][1]
    page = tmp_path / "page.html"
    code, out, _ = isoflop("report", runs, *MAPPED, "-o", page)
    assert (code, out.strip()) == (0, str(page))
    assert "28 points of runs.csv" in page.read_text()


def test_the_method_is_told_on_the_command_line(isoflop: Run, runs: Path) -> None:
    told = ("--pin", "E=1.7", "--pin", "alpha=0.34", "--objective", "huber", "--delta", "0.01")
    _, out, _ = isoflop("fit", runs, *MAPPED, *told, "--json")
    laws = json.loads(out)["laws"]
    assert laws["hoffmann"]["parameters"]["E"] == 1.7
    assert laws["generalised"]["parameters"]["alpha"] == 0.34
    _, squares, _ = isoflop("fit", runs, *MAPPED, "--json")
    assert json.loads(squares)["laws"]["hoffmann"]["parameters"]["E"] != 1.7


def test_the_points_of_besiroglu_et_al(isoflop: Run, chinchilla_csv: Path) -> None:
    told = ("--drop-largest", "5", "--objective", "huber", "--delta", "1e-3")
    _, out, _ = isoflop("fit", chinchilla_csv, *MAPPED, *told, "--json")
    found = json.loads(out)
    assert found["observations"] == 240
    assert found["excluded"][0]["count"] == 5
    assert found["laws"]["hoffmann"]["objective"] <= 1.01828e-3
    assert found["laws"]["hoffmann"]["parameters"]["E"] == pytest.approx(1.81722, rel=1e-3)


def test_external_runs_make_a_project(isoflop: Run, runs: Path, tmp_path: Path) -> None:
    project = tmp_path / "p"
    code, out, _ = isoflop("add", project, runs, *MAPPED, "--name", "theirs", "--json")
    assert (code, json.loads(out)["added"], json.loads(out)["known"]) == (0, 28, 0)
    assert "28 known already" in isoflop("add", project, runs, *MAPPED, "--name", "theirs")[1]
    _, out, _ = isoflop("status", project, "--json")
    assert json.loads(out)["external"] == [{"name": "theirs", "complete": 28}]
    assert "theirs (external)" in isoflop("status", project)[1]
    _, direct, _ = isoflop("fit", runs, *MAPPED, "--json")
    _, added, _ = isoflop("fit", project, "--json")
    one, other = (json.loads(out)["laws"]["hoffmann"]["parameters"] for out in (direct, added))
    assert one == pytest.approx(other, rel=1e-6)
    assert isoflop("forecast", project, "--flops", "1e21")[0] == 0
    assert isoflop("report", project)[0] == 0
    assert "theirs" in (project / "report.html").read_text()
    assert "no sweep trained the runs" in _bad(isoflop, "propose", project)


def test_conventions_are_compared_where_there_are_several(isoflop: Run, runs: Path) -> None:
    assert "one convention only" in _bad(isoflop, "fit", runs, *MAPPED, "--conventions")
    table = csv.read_csv(runs)
    size, flops = table["Model Size"].to_numpy(), table["Training FLOP"].to_numpy()
    path = runs.with_name("three.parquet")
    tokens = pa.array(flops / (6.6 * size))
    pq.write_table(table.append_column("tokens", tokens), path)
    mapped = ("--columns", f"{MAPPED[1]},tokens=tokens")
    _, out, _ = isoflop("fit", path, *mapped, "--conventions", "--json")
    found = json.loads(out)
    assert [row["flops"] for row in found["conventions"]] == ["given", "6nd"]
    assert found["sentence"].startswith("Hoffmann's a goes from")
    code, out, _ = isoflop("fit", path, *mapped, "--conventions")
    assert code == 0
    assert "FLOPs by 6ND" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--columns", "params=x,flops=y"), "there is no column 'x'; the columns are 'Model Size'"),
        ((*MAPPED, "--where", "x=1"), "no column 'x' to select on"),
        ((*MAPPED, "--where", "x"), "write COLUMN=VALUE"),
        ((*MAPPED, "--loss", "val"), "give one of them"),
        ((*MAPPED, "--drop-largest", "-1"), "--drop-largest is -1; it must be at least 0"),
        ((*MAPPED, "--drop-largest", "99"), "the 99 largest losses of 28 observations leaves none"),
        ((*MAPPED, "--params", "total"), "this source has given only"),
        ((*MAPPED, "--params", "all"), "it must be one of non_embedding"),
        ((*MAPPED, "--roles", "some"), "the roles are grid, replicate"),
        ((*MAPPED, "--pin", "E"), "write NAME=VALUE"),
        ((*MAPPED, "--pin", "Z=1"), "no constant 'Z' to pin"),
        ((*MAPPED, "--objective", "mean"), "it must be squares or huber"),
        ((*MAPPED, "--delta", "0"), "delta is 0.0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(
    isoflop: Run, runs: Path, arguments: tuple, message: str
) -> None:
    assert message in _bad(isoflop, "fit", runs, *arguments)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1e8,2e9,-1", "L ('loss') is not positive, the first is -1 in row 1"),
        ("0,2e9,3", "N ('N') is not positive"),
        ("big,2e9,3", "column 'N' is not numeric: row 1 has 'big'"),
        ("", "has no rows"),
        ("1e8,2e9,3\n2e8,2e9,2.9\n4e8,4e9,2.8", "3 observations cannot determine"),
    ],
)
def test_bad_rows_are_refused_in_one_sentence(
    isoflop: Run, tmp_path: Path, rows: str, message: str
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(f"N,D,loss\n{rows}\n")
    assert message in _bad(isoflop, "fit", path)
    assert message in _bad(isoflop, "forecast", path, "--flops", "1e20")
    if "observations" not in message:
        assert message in _bad(isoflop, "add", tmp_path / "p", path)
        assert not (tmp_path / "p").exists()


def test_serving_nothing_is_the_headline_and_serving_all_is_refused(
    isoflop: Run, runs: Path
) -> None:
    there = ("forecast", runs, "--flops", 1e20)
    plain = _json(isoflop, *there)
    idle = _json(isoflop, *there, "--served-tokens", 0)["served"]
    for part in ("params", "tokens", "loss"):
        assert idle[part] == pytest.approx(plain[part], rel=1e-9)
    busy = _json(isoflop, *there, "--served-tokens", 1e10)["served"]
    assert busy["params"] < plain["params"]
    assert busy["loss"] > plain["loss"]
    assert busy["training_flops"] + busy["serving_flops"] == pytest.approx(1e20, rel=1e-9)
    assert "less than one" in _bad(isoflop, *there, "--served-tokens", 1e40)


def test_a_size_asks_for_its_budget(isoflop: Run, runs: Path) -> None:
    there = _json(isoflop, "forecast", runs, "--flops", 1e20)
    for part in ("params", "tokens"):
        back = _json(isoflop, "forecast", runs, f"--at-{part}", there[part])
        assert back["flops"] == pytest.approx(1e20, rel=1e-6)


def test_forecast_and_diagnosis_agree_where_the_optimum_is(isoflop: Run, runs: Path) -> None:
    """A run at the forecast optimum is compute-optimal by the same data."""
    there = _json(isoflop, "forecast", runs, "--flops", 1e20)
    size = ("--params", there["params"], "--tokens", there["tokens"])
    found = _json(isoflop, "diagnose", runs, *size)
    assert found["verdict"] == "compute-optimal"
    assert set(found["laws"]) == {"hoffmann", "generalised"}


def test_a_kind_that_cannot_be_told_from_its_sizes_is_asked_about(isoflop: Run, runs: Path) -> None:
    table = csv.read_csv(runs)
    half = ["my lab" if i < 14 else "theirs" for i in range(table.num_rows)]
    csv.write_csv(table.append_column("study", pa.array(half)), runs)
    warnings = _json(isoflop, "fit", runs)["warnings"]
    (asked,) = [text for text in warnings if "'study' has 2 values" in text]
    assert "--where 'study=my lab'" in asked


DATA = Path(__file__).parents[1] / "data"
TRUE_PARAMS, TRUE_LOSS = 809e6, 2.5674
"""At 9e19 FLOPs, see tests/data/README.md."""


@pytest.mark.parametrize(
    ("name", "column", "ways"),
    [
        ("rates.csv", "lr", ["--best-of lr", "--where lr=", "--pool"]),
        ("architectures.csv", "arch", ["--where arch=dense", "--best-of arch", "--pool"]),
    ],
)
def test_a_factor_is_refused_with_the_ways_out(isoflop: Run, name: str, column, ways) -> None:
    for verb in (("fit",), ("forecast", "--flops", 9e19), ("report",), ("propose",)):
        err = _bad(isoflop, verb[0], DATA / name, *verb[1:])
        assert f"column {column!r} explains" in err
        places = [err.index(way) for way in ways]
        assert places == sorted(places)  # the likeliest way first


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rates.csv", ["--best-of", "lr"]),
        ("architectures.csv", ["--where", "arch=dense"]),
        ("curves.csv", []),
        ("exported.csv", ["--columns", "N=config.model.n_params,D=summary.tokens"]),
        ("perplexity.csv", ["--loss", "val_ppl", "--loss-unit", "perplexity"]),
        ("derived.csv", []),
        ("padded.csv", []),
    ],
)
def test_tables_with_a_defect_give_the_truth_once_that_is_seen(isoflop: Run, name, options) -> None:
    if name == "exported.csv":
        options = [*options, "--loss", "summary.val_loss"]
    found = _json(isoflop, "forecast", DATA / name, "--flops", 9e19, "--level", 0.99, *options)
    n, loss = TRUE_PARAMS, TRUE_LOSS
    assert found["params"] == pytest.approx(n, rel=0.15)
    low, high = found["params_interval"]
    assert low < n < high
    low, high = found["loss_interval"]
    assert low < loss < high


def test_what_is_left_out_and_what_is_alike_is_counted(isoflop: Run) -> None:
    curves = _json(isoflop, "fit", DATA / "curves.csv")
    assert curves["excluded"] == [{"reason": "earlier point of a training curve", "count": 90}]
    assert curves["cells"] == {"rows": 15, "distinct": 15}
    padded = _json(isoflop, "fit", DATA / "padded.csv")
    assert (padded["cells"], padded["factors"]) == ({"rows": 60, "distinct": 20}, [])
    columns = ("--columns", "N=config.model.n_params,D=summary.tokens,L=summary.val_loss")
    exported = _json(isoflop, "fit", DATA / "exported.csv", *columns)
    assert exported["excluded"] == [{"reason": "unfinished: State is crashed", "count": 6}]
    pooled = _json(isoflop, "fit", DATA / "architectures.csv", "--pool")
    (factor,) = pooled["factors"]
    assert (factor["column"], factor["cells"]) == ("arch", 28)
    assert any("column 'arch'" in text for text in pooled["warnings"])


def test_all_points_of_curves_share_the_noise_of_their_run_and_are_called_biased(
    isoflop: Run,
) -> None:
    alone = _json(isoflop, "fit", DATA / "curves.csv")
    found = _json(isoflop, "fit", DATA / "curves.csv", "--all-points")
    assert found["observations"] == 105
    assert any("biased upwards" in text for text in found["warnings"])
    # Points share their run's noise: 105 of them are not worth much more than 15 runs.
    widths = [
        np.log(high / low)
        for low, high in (alone["laws"]["hoffmann"]["intervals"]["A"],
                          found["laws"]["hoffmann"]["intervals"]["A"])
    ]  # fmt: skip
    assert widths[1] > widths[0] / np.sqrt(7)


def test_units_are_said_everywhere(isoflop: Run, tmp_path: Path) -> None:
    file = DATA / "padded.csv"
    assert _json(isoflop, "fit", file)["loss_unit"] == "as in 'loss'"
    assert _json(isoflop, "fit", file, "--loss-unit", "bits_per_byte")["loss_unit"] == "bits/byte"
    _, out, _ = isoflop("fit", file)
    assert "L, as in 'loss'" in out
    assert "nats/token" not in out
    assert "nats/token" not in isoflop("forecast", file, "--flops", 9e19)[1]
    assert "nats/token" not in isoflop("diagnose", file, "--params", 1e9, "--tokens", 1e10)[1]
    page = tmp_path / "page.html"
    isoflop("report", file, "--loss-unit", "bits", "-o", page)
    assert "bits/token" in page.read_text()
    assert "nats/token" not in page.read_text()


def test_n_from_c_is_called_so_and_what_looks_like_n_is_named(isoflop: Run) -> None:
    code, out, _ = isoflop("fit", DATA / "derived.csv")
    assert code == 0
    assert "N: C/(6D)" in out
    found = _json(isoflop, "fit", DATA / "derived.csv")
    assert found["convention"]["params"] == "derived"
    (note,) = [text for text in found["warnings"] if text.startswith("N is C/(6D)")]
    assert "--columns params=params_total or --columns params=params_transformer" in note
    chosen = _json(isoflop, "fit", DATA / "derived.csv", "--columns", "params=params_transformer")
    assert chosen["convention"]["params"] == "given"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("accuracy.csv", ["--loss", "accuracy"], "'accuracy') rises with N and D"),
        ("perplexity.csv", ["--loss", "val_ppl"], "add --loss-unit perplexity"),
        ("suite.csv", [], "all 8 observations have one D, about 3e+11 tokens"),
        ("rates.csv", ["--best-of", "wd"], "--best-of wd: there is no column 'wd' besides N, D"),
    ],
)
def test_what_no_law_can_be_fitted_to_is_refused(isoflop: Run, name, options, message) -> None:
    assert message in _bad(isoflop, "fit", DATA / name, *options)


def test_options_for_tables_of_others_are_refused_for_a_project(isoflop: Run, tmp_path) -> None:
    isoflop("add", tmp_path / "p", DATA / "padded.csv")
    assert "--best-of is for tables of others" in _bad(
        isoflop, "fit", tmp_path / "p", "--best-of", "lr"
    )


def test_the_best_at_the_end_of_what_was_tried_is_told(isoflop: Run, tmp_path: Path) -> None:
    table = csv.read_csv(DATA / "rates.csv")
    few = tmp_path / "few.csv"
    csv.write_csv(table.filter(pa.array(table["lr"].to_numpy() < 3e-3)), few)
    warnings = _json(isoflop, "fit", few, "--best-of", "lr")["warnings"]
    assert any("smallest or largest that was tried" in text for text in warnings)


def test_budgets_are_not_looked_for_when_told_so(isoflop: Run) -> None:
    assert len(_json(isoflop, "fit", DATA / "padded.csv")["budgets"]) == 4
    assert _json(isoflop, "fit", DATA / "padded.csv", "--budgets", "none")["budgets"] == []
    assert "it is auto or none" in _bad(isoflop, "fit", DATA / "padded.csv", "--budgets", "x")
