"""One study whatever the source: a project, its copy in a file, MLflow, somebody's CSV."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.errors import InputError
from analysis.fitting import Method
from orchestrator.conventions import compare, conventions_json
from orchestrator.experiment import read_experiment
from orchestrator.external import add, external_counts
from orchestrator.ledger import Ledger
from orchestrator.planner import Plan, make_plan
from orchestrator.project import Project, create_project
from orchestrator.reading import Convention, Reading, parse_where
from orchestrator.source import Evidence, Points, evidence, open_source, points
from orchestrator.spec import parse_spec
from orchestrator.storage import open_storage
from orchestrator.sync import sync
from orchestrator.tracking import store_of, store_uri
from trainers.registry import trainer
from trainers.workspace import Scratch

LARGE = {"aspect": 64.0, "head_width": 32, "width_multiple": 32}
SWEEP = {"name": "s", "budgets": [1e16, 1e17, 1e18], "sizes": 5, "shapes": LARGE}
TRUTH = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}


def _files(project: Project) -> list[Path]:
    """The files of a ledger."""
    return sorted((project.local / "ledger").glob("*.parquet"))


def _fill(project: Project, **changes: object) -> Plan:
    """Measure a simulated sweep into a project, without Ray."""
    spec = {"trainer": "simulated", **SWEEP, **changes}
    plan = make_plan(parse_spec(spec, source=Path("s.toml")))
    project.save_plan(plan)
    for trial in plan.trials:
        *_, measurement = trainer("simulated").train(trial, Scratch(Path("nowhere")))
        Ledger(project.storage).write(trial, measurement)
    return plan


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = create_project(tmp_path / "project")
    _fill(made)
    return made


def _points(tmp_path: Path, **changes: object) -> Path:
    """A CSV of Hoffmann's published law, without noise: 4 budgets of 7 sizes."""
    budget = np.repeat([1e18, 4e18, 1.6e19, 6.4e19], 7)
    n = np.sqrt(budget / 120) * np.tile(np.geomspace(0.25, 4, 7), 4)
    d = budget / (6 * n)
    truth = TRUTH
    loss = truth["E"] + truth["A"] * n ** -truth["alpha"] + truth["B"] * d ** -truth["beta"]
    columns = {"size": n, "FLOP": budget, "val": loss, **changes}
    path = tmp_path / "runs.csv"
    names = ",".join(columns)
    rows = [",".join(str(column[i]) for column in columns.values()) for i in range(28)]
    path.write_text("\n".join([names, *rows]) + "\n")
    return path


COLUMNS = {"params": "size", "flops": "FLOP", "loss": "val"}


def _write_exclude(project: Project, text: str) -> None:
    (project.local / "exclude.toml").write_text(text)


def test_a_copy_of_a_ledger_is_read_as_what_it_is(project: Project, tmp_path: Path) -> None:
    table = project.ledger.read()
    path = tmp_path / "copy.parquet"
    pq.write_table(pa.concat_tables([table, table.slice(0, 3)]), path)
    found = open_source(str(path), Reading())
    assert isinstance(found, Evidence)
    for params, flops in (("non_embedding", "exact"), ("total", "6nd")):
        convention = Convention(params=params, flops=flops)
        copied, own = found.study(convention), evidence(project).study(convention)
        np.testing.assert_array_equal(np.sort(copied.obs.flops), np.sort(own.obs.flops))
        np.testing.assert_array_equal(copied.obs.budgets(), [1e16, 1e17, 1e18])
        assert copied.excluded == {"the same observation again": 3}
        # The project's shapes tell FLOPs a token at any N, the copy only at those it has.
        assert copied.at_top[0].params.estimate == pytest.approx(
            own.at_top[0].params.estimate, rel=0.002
        )
        assert (
            "budgets found from C, within 1%, with their rows: 1e+16 (5), 1e+17 (5)"
            in copied.notes[0]
        )


def test_an_older_ledger_is_read_without_the_later_columns(project, tmp_path) -> None:
    later = ["budget", "params_given", "flops_given", "weight", "trunk"]
    path = _files(project)[0]
    pq.write_table(pq.read_table(path).drop_columns(later), path)
    assert project.ledger.read()["budget"].null_count == 15
    assert len(evidence(project).study(Convention()).obs) == 15


@pytest.mark.slow
def test_mlflow_gives_the_projects_own_runs_back(project: Project) -> None:
    sync(project, store_of(project))
    found = open_source("mlflow:project", Reading(tracking_uri=store_uri(project)))
    own = evidence(project)
    for column in ("trial", "tokens", "loss", "params_total", "flops_exact", "width", "seed"):
        assert sorted(found.table[column].to_pylist()) == sorted(own.table[column].to_pylist())
    convention = Convention(params="total")
    assert found.study(convention).isoflop.exponent.estimate == pytest.approx(
        own.study(convention).isoflop.exponent.estimate, rel=1e-9
    )
    none = Reading(tracking_uri=store_uri(project), roles=("probe",))
    with pytest.raises(InputError, match="all 15 observations are left out"):
        open_source("mlflow:project", none)


@pytest.mark.slow
def test_somebody_elses_experiment_is_read_by_its_columns(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("theirs", artifact_location=tmp_path.as_uri())
    for i, loss in enumerate([3.5, 3.2, None]):
        run = client.create_run(experiment)
        client.log_param(run.info.run_id, "size", str(1e8 * (i + 1)))
        client.log_param(run.info.run_id, "tokens", "planned")
        client.log_metric(run.info.run_id, "tokens", 2e9)
        if loss:
            client.log_metric(run.info.run_id, "val", 9.0, step=0)
            client.log_metric(run.info.run_id, "val", loss, step=1)
        client.set_terminated(run.info.run_id)
    columns = {"params": "size", "tokens": "metrics.tokens", "loss": "val"}
    found = open_source("mlflow:theirs", Reading(tracking_uri=uri, columns=columns))
    assert sorted(found.found.obs.loss.tolist()) == [3.2, 3.5]
    assert sorted(found.found.obs.params.tolist()) == [1e8, 2e8]
    assert found.excluded == {"missing or not a finite number in 'val'": 1}
    with pytest.raises(InputError, match=r"no experiment 'ours'; it has .*'theirs'"):
        read_experiment("ours", uri)


def test_an_experiment_without_a_store_is_refused_and_none_is_made(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(InputError, match="say so with --tracking-uri"):
        read_experiment("x", None)
    with pytest.raises(InputError, match="there is no file"):
        read_experiment("x", f"sqlite:///{tmp_path}/none.db")
    assert not list(tmp_path.iterdir())


def test_points_of_a_law_give_its_optimum(tmp_path: Path) -> None:
    found = open_source(str(_points(tmp_path)), Reading(columns=COLUMNS))
    assert isinstance(found, Points)
    seen = found.study(Convention(), next_flops=1e21)
    assert seen.fits[0].constants == pytest.approx(TRUTH, rel=1e-4)
    # Hoffmann et al. 2022, Eq. 4: N_opt = G (C/6)^a
    alpha, beta = TRUTH["alpha"], TRUTH["beta"]
    g = (alpha * TRUTH["A"] / (beta * TRUTH["B"])) ** (1 / (alpha + beta))
    expected = g * (1e21 / 6) ** (beta / (alpha + beta))
    assert seen.next.params.estimate == pytest.approx(expected, rel=1e-4)
    assert found.conventions.pairs == [("given", "given")]


def test_c_given_and_c_by_6nd_are_two_conventions(tmp_path: Path) -> None:
    size = np.sqrt(np.repeat([1e18, 4e18, 1.6e19, 6.4e19], 7) / 120)
    factor = np.tile(np.linspace(1.3, 1.0, 7), 4)  # attention and head, less of larger models
    sizes = size * np.tile(np.geomspace(0.25, 4, 7), 4)
    tokens = np.repeat([1e18, 4e18, 1.6e19, 6.4e19], 7) / (6 * sizes * factor)
    path = _points(tmp_path, seen=tokens)
    source = open_source(str(path), Reading(columns={**COLUMNS, "tokens": "seen"}))
    found = compare(source, level=0.9, method=Method())
    given, by_6nd = found.studies
    np.testing.assert_allclose(by_6nd.obs.flops * factor, given.obs.flops, rtol=1e-12)
    np.testing.assert_array_equal(by_6nd.obs.budget, given.obs.budget)
    rows = conventions_json(found)["conventions"]
    assert [(row["params"], row["flops"]) for row in rows] == [("given", "given"), ("given", "6nd")]
    a = [row["a"]["hoffmann"] for row in rows]
    assert f"{min(a):.3f}" in found.sentence
    assert f"{max(a):.3f}" in found.sentence


def test_all_conventions_of_a_project_are_compared(project: Project) -> None:
    found = compare(evidence(project), level=0.9, method=Method())
    pairs = [(s.obs.params_convention, s.obs.flops_convention) for s in found.studies]
    names = ("non_embedding", "matmul", "total")
    assert pairs == [(params, flops) for params in names for flops in ("exact", "6nd")]
    for (params, flops), row in zip(pairs, conventions_json(found)["conventions"], strict=True):
        alone = evidence(project).study(Convention(params=params, flops=flops))
        assert row["a"]["hoffmann"] == pytest.approx(alone.at_top[0].exponent.estimate, rel=1e-12)
        assert row["params_at_top"]["hoffmann"] == alone.at_top[0].params.estimate


def test_one_convention_is_nothing_to_compare(tmp_path: Path) -> None:
    source = open_source(str(_points(tmp_path)), Reading(columns=COLUMNS))
    with pytest.raises(InputError, match="one convention only"):
        compare(source, level=0.9, method=Method())
    with pytest.raises(InputError, match="--params is 'total', but this source has given only"):
        source.study(Convention(params="total"))


def test_a_loss_of_ones_own_choice_is_fitted(tmp_path: Path) -> None:
    other = np.linspace(2.0, 1.0, 28)
    path = _points(tmp_path, code=other)
    columns = {"params": "size", "flops": "FLOP"}
    source = open_source(str(path), Reading(columns=columns, loss="code"))
    np.testing.assert_array_equal(source.study(Convention()).obs.loss, other)
    with pytest.raises(InputError, match="give one of them"):
        Reading(columns=COLUMNS, loss="code")


def test_rows_without_the_chosen_loss_are_counted(project: Project) -> None:
    for i, path in enumerate(_files(project)):
        table = pq.read_table(path)
        at = table.column_names.index("bits_per_byte")
        bits = pa.array([1.0 + i / 100 if i else None], pa.float64())
        pq.write_table(table.set_column(at, table.schema.field(at), bits), path)
    seen = evidence(project, Reading(loss="bits_per_byte")).study(Convention())
    assert sorted(seen.obs.loss) == pytest.approx([1.0 + i / 100 for i in range(1, 15)])
    assert seen.excluded == {"without N, C or bits_per_byte": 1}
    with pytest.raises(InputError, match="--loss seed: no such loss"):
        evidence(project, Reading(loss="seed")).study(Convention())


@pytest.mark.parametrize("kind", ["project", "file"])
def test_the_largest_losses_are_dropped_and_counted(project, tmp_path, kind: str) -> None:
    reading = {"drop_largest": 3}
    if kind == "project":
        found = evidence(project, Reading(**reading))
    else:
        found = open_source(str(_points(tmp_path)), Reading(columns=COLUMNS, **reading))
    seen = found.study(Convention())
    every = evidence(project) if kind == "project" else None
    losses = every.study(Convention()).obs.loss if every else found.found.obs.loss
    assert sorted(seen.obs.loss) == sorted(losses)[:-3]
    assert seen.excluded == {"among the largest losses (--drop-largest 3)": 3}


def test_rows_are_selected_as_people_write_values(tmp_path: Path) -> None:
    outlier = np.where(np.arange(28) % 7 == 0, "True", "False")
    study = np.where(np.arange(28) < 14, "llama3", "other")
    path = _points(tmp_path, outlier=outlier, study=study)
    where = parse_where(["outlier=false", "study=llama3", "FLOP=1e18"])
    found = open_source(str(path), Reading(columns=COLUMNS, where=where))
    assert len(found.found.obs) == 6
    assert found.excluded == {"not selected": 22}
    with pytest.raises(InputError, match="no column 'x' to select on; choose among size, FLOP"):
        open_source(str(path), Reading(columns=COLUMNS, where={"x": "1"}))
    with pytest.raises(InputError, match="no row is both"):
        parse_where(["study=a", "study=b"])


def _role(project: Project, plan: Plan, role: str, count: int) -> None:
    """Ask for the first of a plan's observations in another role instead."""
    data = plan.to_dict()
    for planned in data["planned"][:count]:
        planned["role"] = role
    (project.local / "plans" / f"{plan.name}.json").unlink()
    project.save_plan(Plan.from_dict(data))


def test_probes_and_confirmations_enter_a_fit_only_when_asked(project: Project) -> None:
    plan = project.plans()[0]
    _role(project, plan, "confirm", 4)
    assert len(evidence(project).table) == 11
    assert evidence(project).excluded == {"asked for as confirm only": 4}
    asked = Reading(roles=("grid", "replicate", "confirm"))
    assert len(evidence(project, asked).table) == 15
    again = {**plan.to_dict(), "name": "again"}
    project.save_plan(Plan.from_dict(again))  # which asks for the same observations as grid
    assert len(evidence(project).table) == 15
    with pytest.raises(InputError, match="--roles x: the roles are grid, replicate, probe"):
        Reading(roles=("x",))


def test_what_is_ruled_out_is_counted_with_its_reason(project: Project) -> None:
    table = project.ledger.read()
    key, width = table["trial"][0].as_py(), table["width"][5].as_py()
    wide = int(np.sum(table["width"].to_numpy() == width))
    both = wide + (table["width"][0].as_py() != width)
    _write_exclude(
        project,
        f'[[exclude]]\ntrial = "{key[:10]}"\nreason = "bad node"\n'
        f'[[exclude]]\nwidth = {width}\nseed = 0\nreason = "untuned"\n'
        '[[exclude]]\nwidth = 7\nreason = "typing error"\n',
    )
    found = evidence(project)
    assert found.table.num_rows == 15 - both
    assert found.excluded == {
        "ruled out: bad node": 1,
        "ruled out: untuned": both - 1,
    }
    assert found.notes == ("exclude.toml: no observation has width = 7 (typing error)",)
    assert found.notes[0] in found.study(Convention()).warnings
    assert project.ledger.read().num_rows == 15


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[exclude]\n", "is no TOML"),
        ('[[exclude]]\ntrial = "a"\n', r"\[\[exclude\]\] 1 has no reason"),
        ('[[exclude]]\nreason = " "\nwidth = 1\n', "has no reason"),
        ('[[exclude]]\nreason = "x"\n', r"\[\[exclude\]\] 1 selects nothing"),
        ('[[exclude]]\nreason = "x"\nwidht = 1\n', "selects by 'widht'; the columns are trial"),
        ('[[exclude]]\nreason = "x"\nwidth = [1, 2]\n', "give one value"),
        ('exclude = "a"\n', r"it holds \[\[exclude\]\] tables only"),
        ("[other]\n", "has other"),
    ],
)
def test_a_malformed_exclusion_is_named(project: Project, text: str, message: str) -> None:
    _write_exclude(project, text)
    with pytest.raises(InputError, match=message):
        evidence(project)


def test_all_ruled_out_is_refused(project: Project) -> None:
    _write_exclude(project, '[[exclude]]\nseed = 0\nreason = "wrong tokenizer"\n')
    with pytest.raises(InputError, match=r"all 15 .* are left out: ruled out: wrong tokenizer"):
        evidence(project)


def test_external_runs_are_added_once_and_fitted(tmp_path: Path) -> None:
    found = points_of(_points(tmp_path))
    first = add(tmp_path / "p", found.found.obs, "theirs")
    again = add(tmp_path / "p", found.found.obs.select(np.arange(28) % 2 == 1), "theirs")
    assert (first.written, first.known) == (28, 0)
    assert (again.written, again.known) == (0, 14)
    project = Project(open_storage(tmp_path / "p"))
    assert external_counts(project.ledger.read(), project.plans()) == {"theirs": 28}
    source = open_source(str(project.local), Reading())
    assert (source.plan, source.conventions.pairs[0]) == (None, ("given", "given"))
    seen, direct = source.study(Convention()), found.study(Convention())
    assert seen.fits[0].constants == pytest.approx(direct.fits[0].constants, rel=1e-6)
    np.testing.assert_array_equal(seen.obs.budgets(), direct.obs.budgets())


def points_of(path: Path, **columns: str) -> Points:
    found = open_source(str(path), Reading(columns={**COLUMNS, **columns}))
    assert isinstance(found, Points)
    return found


def test_budgets_weights_and_trunks_of_external_runs_are_kept(tmp_path: Path) -> None:
    weight, trunk = np.arange(28) / 10, np.array([f"t{i // 2}" for i in range(28)])
    budget = np.repeat([1.0e18, 4.1e18, 1.7e19, 6.5e19], 7)
    path = _points(tmp_path, w=weight, t=trunk, b=budget)
    found = points_of(path, weight="w", trunk="t", budget="b")
    add(tmp_path / "p", found.found.obs, "theirs")
    obs = open_source(str(tmp_path / "p"), Reading()).study(Convention()).obs
    order = np.argsort(obs.loss)
    expected = np.argsort(found.found.obs.loss)
    expected = expected[weight[expected] > 0]  # a row of weight 0 is left out, and counted
    np.testing.assert_allclose(obs.weight[order], weight[expected] / weight[1:].mean())
    np.testing.assert_array_equal(obs.budget[order], budget[expected])
    _, sizes = np.unique(obs.trunk, return_counts=True)
    assert sorted(sizes.tolist()) == [1] + [2] * 13


def test_external_runs_are_a_kind_of_their_own(project: Project, tmp_path: Path) -> None:
    found = points_of(_points(tmp_path))
    add(project.local, found.found.obs, "theirs")
    add(project.local, found.found.obs, "other")
    with pytest.raises(InputError, match=r"observations of 3 kinds .*28 with .*corpus=other"):
        evidence(project)
    chosen = evidence(project, Reading(where={"corpus": "theirs"}))
    assert len(chosen.study(Convention()).obs) == 28
    assert len(evidence(project, kind_of=project.plans()[0]).table) == 15


def test_runs_in_another_unit_are_not_added(tmp_path: Path) -> None:
    table = pa.table({"N": [0.1, 0.2], "D": [4.0, 2.0], "L": [3.0, 2.9]})
    found = points(table, "x", Reading())
    with pytest.raises(InputError, match=r"D is 2 tokens .* in millions or billions"):
        add(tmp_path / "p", found.found.obs, "x")
    assert not (tmp_path / "p").exists()


def test_no_source_is_refused(tmp_path: Path, project: Project) -> None:
    for name, message in (("none", "there is no project"), ("none.csv", "there is no file")):
        with pytest.raises(InputError, match=message):
            open_source(str(tmp_path / name), Reading())
    with pytest.raises(InputError, match="--columns is for tables of others"):
        open_source(str(project.local), Reading(columns={"loss": "loss"}))
