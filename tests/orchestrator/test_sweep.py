"""The sweep with a real Ray, a real MLflow database and real processes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from ray.tune.utils.object_cache import _ObjectCache
from rich.console import Console

from analysis.errors import InputError
from orchestrator.loop import Outcome, run
from orchestrator.planner import make_plan
from orchestrator.project import Project, create_project, directory_for
from orchestrator.spec import parse_spec, read_spec
from orchestrator.storage import open_storage
from orchestrator.sweep import _Aimed, _Frugal
from orchestrator.tracking import store_uri
from trainers.flops import trial_flops

pytestmark = pytest.mark.slow

SWEEP = {"name": "s", "trainer": "simulated", "budgets": [1e10, 1e11, 1e12], "sizes": 5}


def _files(project: Project) -> list[Path]:
    """The files of a ledger."""
    return sorted((project.local / "ledger").glob("*.parquet"))


@pytest.fixture
def project(tmp_path: Path, empty_store: Path) -> Project:
    made = create_project(tmp_path / "project")
    shutil.copy(empty_store, made.local / "mlflow.db")
    return made


def _run(project: Project, *, extend: bool = False, **changes: object) -> Outcome:
    plan = make_plan(parse_spec({**SWEEP, **changes}, source=Path("s.toml")))
    with (project.local.parent / "console.txt").open("w") as file:
        return run(project, plan, Console(file=file), started=time.time(), extend=extend)


def _runs(project: Project) -> list:
    client = MlflowClient(tracking_uri=store_uri(project))
    experiment = client.get_experiment_by_name(project.name)
    return list(client.search_runs([experiment.experiment_id], max_results=1000))


@pytest.mark.usefixtures("ray_session")
def test_a_sweep_fills_the_ledger_and_mlflow_and_proposes(project: Project) -> None:
    outcome = _run(project, simulated={"noise": 0.001})
    assert outcome.finished
    assert (outcome.trained, outcome.states) == (15, {"complete": 15})
    table = project.ledger.read()
    assert table.num_rows == 15
    rows = {row["trial"]: row for row in table.to_pylist()}

    runs = _runs(project)
    children = [r for r in runs if "mlflow.parentRunId" in r.data.tags]
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert len(children) == 15
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parent.info.run_id}
    assert {r.info.status for r in runs} == {"FINISHED"}
    for child in children:
        row = rows[child.data.tags["isoflop.trial"]]
        assert child.data.metrics["loss"] == row["loss"]
        assert child.data.params["width"] == str(row["width"])
    client = MlflowClient(tracking_uri=store_uri(project))
    history = client.get_metric_history(children[0].info.run_id, "train_loss")
    assert len(history) == len(rows[children[0].data.tags["isoflop.trial"]]["curve"])
    artifacts = {a.path for a in client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"figures", "report.html", "next.toml"}
    assert "exponent_hoffmann" in parent.data.metrics


@pytest.mark.usefixtures("ray_session")
def test_the_fit_recovers_the_simulated_truth(project: Project) -> None:
    """Besiroglu et al.'s constants, N and D such that C is nearly 6 N D: a = .3658/.7136."""
    found = _run(
        project,
        budgets=[1e17, 1e18, 1e19, 1e20],
        sizes=7,
        shapes={"aspect": 64.0, "head_width": 32, "context": 64, "width_multiple": 32},
        simulated={"noise": 0.0005},
    ).to_json()
    for law in ("hoffmann", "generalised"):
        assert found["exponents"][law]["a"] == pytest.approx(0.5126, abs=0.01)
        assert abs(found["heldout"]["laws"][law]["loss_error"]) < 0.003
        low, high = found["exponents"][law]["a_interval"]
        assert low < found["exponents"][law]["a"] < high
    assert [v["status"] for v in found["vertices"]] == ["interior"] * 4


@pytest.mark.usefixtures("ray_session")
def test_what_is_measured_is_never_trained_again(project: Project) -> None:
    _run(project, budgets=[1e10, 1e11])
    files = {p: p.stat().st_mtime_ns for p in _files(project)}
    assert len(files) == 10
    again = _run(project, budgets=[1e10, 1e11])
    assert (again.trained, again.training_share) == (0, 0.0)
    with pytest.raises(InputError, match=r"run it with --extend to add them"):
        _run(project, budgets=[1e10, 1e11, 1e12])
    grown = _run(project, budgets=[1e10, 1e11, 1e12], extend=True)
    assert grown.trained == 5
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert len(_runs(project)) == 1 + 15


@pytest.mark.usefixtures("ray_session")
def test_the_proposal_runs_into_the_same_project_and_its_fit_uses_everything(
    project: Project,
) -> None:
    first = _run(project)
    spec = read_spec(Path(project.proposal))
    assert spec.budgets[0].flops == pytest.approx(1e13)
    plan = make_plan(spec)
    with Path(os.devnull).open("w") as file:
        second = run(project, plan, Console(file=file), started=time.time())
    assert second.trained == len(plan.planned) == 7
    assert len(second.study.obs) == 15 + 7
    assert second.to_json()["budgets"] == [1e10, 1e11, 1e12, 1e13]
    assert first.study.next.flops == pytest.approx(1e13)
    measured = second.study.isoflop.vertices[-1]
    assert measured.status == "interior"
    forecast = first.study.next.params
    assert forecast.low / 1.3 < measured.params < forecast.high * 1.3
    assert read_spec(Path(project.proposal)).budgets[0].flops == pytest.approx(1e14)


@pytest.mark.usefixtures("ray_session")
def test_diverged_trials_are_rows_and_not_fitted(project: Project) -> None:
    outcome = _run(project, simulated={"diverge": 0.2})
    diverged = outcome.states["diverged"]
    assert 0 < diverged < 10
    assert outcome.finished
    assert len(outcome.study.obs) == 15 - diverged
    assert outcome.study.excluded == {"diverged": diverged}
    statuses = sorted(r.info.status for r in _runs(project))
    assert statuses.count("FAILED") == diverged


@pytest.mark.usefixtures("ray_session")
def test_the_executed_sweep_is_kept_as_a_file_whose_run_adds_nothing(project: Project) -> None:
    _run(project)
    kept = project.local / "plans" / "s.toml"
    assert directory_for(kept, "s") == project.local
    with Path(os.devnull).open("w") as file:
        again = run(project, make_plan(read_spec(kept)), Console(file=file), started=time.time())
    assert again.trained == 0
    client = MlflowClient(tracking_uri=store_uri(project))
    (parent,) = [r for r in _runs(project) if "mlflow.parentRunId" not in r.data.tags]
    assert len(client.get_metric_history(parent.info.run_id, "exponent_hoffmann")) == 1


@pytest.mark.usefixtures("ray_session")
def test_mlflow_that_fails_at_the_end_is_told_and_not_fatal(project: Project) -> None:
    (project.local / "mlartifacts").write_text("in the way")
    outcome = _run(project)
    assert outcome.finished
    assert outcome.tracking_error
    assert outcome.to_json()["complete"] == 15


def test_tune_keeps_no_actor_that_nobody_takes_over() -> None:
    """By a private field, for want of a setting: with another Ray it may be another."""
    cache = _ObjectCache(may_keep_one=True)
    _Frugal().on_trial_add(SimpleNamespace(_actor_cache=cache), None)
    assert not cache.cache_object("a line", "an actor")
    cache.increase_max("a line")
    assert cache.cache_object("a line", "an actor")


def test_only_trials_of_one_line_use_each_others_actors() -> None:
    bundles = [{"CPU": 1.0}]
    one, same, other = (
        _Aimed(bundles, "STRICT_PACK", node, line)
        for node, line in (("x", "1"), ("y", "1"), ("x", "2"))
    )
    assert (one == same, hash(one) == hash(same), one == other) == (True, True, False)


def _command(spec: Path, project: Path) -> list[str]:
    code = "from orchestrator.cli import main; main()"
    return [sys.executable, "-c", code, "run", str(spec), "--project", str(project), "--json"]


def test_real_training_on_text_goes_through_the_same_path(tmp_path: Path) -> None:
    """Two budgets of real training by the command line, with nothing but JSON on its stdout."""
    path = tmp_path / "tiny.toml"
    path.write_text(
        'name = "tiny"\nshapes = {depth = 2, heads = 2, context = 64}\n'
        "[[budgets]]\nflops = 1e9\nwidths = [8, 16, 24]\n"
        "[[budgets]]\nflops = 3e9\nwidths = [12, 16, 32]\n"
    )
    result = subprocess.run(
        _command(path, tmp_path / "p"), capture_output=True, timeout=200, check=True
    )
    found = json.loads(result.stdout)
    assert (found["trials"], found["complete"], found["failed"]) == (6, 6, 0)
    assert 0 < found["training_share"] < 1
    text = result.stderr.decode()
    assert "6/6" in text
    assert not any(word in text.lower() for word in ("ray", "mlflow", "warning", "traceback"))
    table = Project(open_storage(tmp_path / "p")).ledger.read()
    assert max(table["loss"].to_pylist()) < 3.2
    by_seed = set(table["device"].to_pylist())
    assert len(by_seed) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_trunk_that_is_extended_costs_what_its_last_horizon_takes(project: Project) -> None:
    """All of it again would be above the cap; what is left of it is not."""
    budgets = [{"flops": c, "widths": [4, 8, 12]} for c in (2e8, 4e8, 8e8, 16e8)]
    trunks = {
        "trainer": "pretrain",
        "recipe": {"name": "llama-adamw", "schedule": "wsd", "precision": "fp32"},
        "shapes": {"depth": 1, "heads": 1, "context": 32},
        "probes": 0,
    }
    spec = {**SWEEP, "budgets": budgets, **trunks}
    asked = make_plan(parse_spec(spec, source=Path("s.toml"))).flops
    first = _run(project, budgets=budgets[:3], limits={"flops": 1.01 * asked}, **trunks)
    assert first.trained == 9
    burnt = sum(project.ledger.read()["flops_spent"].to_pylist())
    left = make_plan(parse_spec({**spec, "budgets": budgets[3:]}, source=Path("s.toml")))
    assert burnt + sum(map(trial_flops, left.trials)) > 1.2 * asked
    both = _run(project, extend=True, budgets=budgets, limits={"flops": 1.01 * asked}, **trunks)
    assert (both.trained, both.finished, both.end.held) == (3, True, ())
    assert sum(project.ledger.read()["flops_spent"].to_pylist()) == pytest.approx(asked)
