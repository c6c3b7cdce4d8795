"""MLflow as a view of the ledger, in real MLflow databases."""

import json
import math
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from analysis.errors import InputError
from orchestrator import runs as contents
from orchestrator import tracking
from orchestrator.lease import hold
from orchestrator.project import Project
from orchestrator.runs import SWEEP_TAG, TOKENS_TAG, TRIAL_TAG, params_of
from orchestrator.storage import open_storage
from orchestrator.sync import differences, sync
from orchestrator.tracking import Results, Store, Tracker, store_of, store_uri

pytestmark = pytest.mark.slow

MakeProject = Callable[..., Project]


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def _client(store: Store) -> MlflowClient:
    return MlflowClient(tracking_uri=store.uri)


def _runs(store: Store, name: str = "project", tag: str = TRIAL_TAG) -> list:
    client = _client(store)
    experiment = client.get_experiment_by_name(name)
    return list(client.search_runs([experiment.experiment_id], f"tags.`{tag}` != ''"))


def _row(project: Project, **changes: object) -> dict:
    """A row like the first of the ledger."""
    return {**project.ledger.read().to_pylist()[0], **changes}


def test_the_store_is_what_was_given_then_the_environments_then_the_projects_own(
    simulated_project: MakeProject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    project = simulated_project(measured=0)
    own = store_of(project)
    assert own.uri == f"sqlite:///{project.local}/mlflow.db"
    assert own.artifacts == f"file://{project.local}/mlartifacts"
    away = Project(open_storage("s3://bucket/project"))
    assert store_of(away) is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@server:5000")
    assert store_of(project).uri == store_of(away).uri == "http://me:secret@server:5000"
    assert store_of(project).artifacts is None
    assert store_of(project).shown == "http://***@server:5000"
    assert store_of(project, "postgresql://db/mlflow").uri == "postgresql://db/mlflow"
    assert store_of(project, store_uri(project)) == own
    beside = store_of(project, f"sqlite:///{tmp_path}/theirs.db")
    assert beside.artifacts == f"file://{tmp_path}/mlartifacts"
    for wrong in ("mlruns", "./mlruns", "file:///tmp/mlruns"):
        with pytest.raises(InputError, match="neither an MLflow server nor a database"):
            store_of(project, wrong)


def test_what_the_ledger_has_is_written_once_and_equals_it(simulated_project: MakeProject) -> None:
    project = simulated_project(measured=4)
    store = store_of(project)
    first = sync(project, store)
    assert (first.written, first.experiment, first.differences) == (4, "project", [])
    second = sync(project, store)
    assert (second.written, second.half_written, second.duplicates) == (0, 0, 0)
    (parent,) = _runs(store, tag=SWEEP_TAG)
    rows = {row["trial"]: row for row in project.ledger.read().to_pylist()}
    found = _runs(store)
    assert {run.data.tags[TRIAL_TAG] for run in found} == rows.keys()
    for run in found:
        row = rows[run.data.tags[TRIAL_TAG]]
        assert run.data.metrics["loss"] == row["loss"]
        assert run.data.params["width"] == str(row["width"])
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.end_time == int(row["finished_at"].timestamp() * 1000)
        history = _client(store).get_metric_history(run.info.run_id, "train_loss")
        assert [(m.step, m.value) for m in history] == [
            (point["step"], point["train_loss"]) for point in row["curve"]
        ]


def test_a_store_that_is_gone_is_rebuilt(simulated_project: MakeProject, empty_store: Path) -> None:
    project = simulated_project(measured=3)
    simulated_project(measured=2, name="other", budgets=[1e11])
    store = store_of(project)
    assert sync(project, store).written == 5
    shutil.copy(empty_store, project.local / "mlflow.db")
    tracking_uri = f"sqlite:///{project.local}/../again.db"
    again = store_of(project, tracking_uri)
    shutil.copy(empty_store, project.local.parent / "again.db")
    rebuilt = sync(project, again)
    assert (rebuilt.written, rebuilt.differences) == (5, [])
    assert {r.data.tags[SWEEP_TAG] for r in _runs(again, tag=SWEEP_TAG)} == {"s", "other"}


def test_halves_are_written_anew_and_doubles_removed(simulated_project: MakeProject) -> None:
    project = simulated_project(measured=3)
    store = store_of(project)
    sync(project, store)
    client = _client(store)
    doubled, halved, _ = _runs(store)
    experiment = doubled.info.experiment_id
    copy = client.create_run(experiment, tags=dict(doubled.data.tags)).info.run_id
    client.set_terminated(copy)
    half = client.create_run(experiment, tags=dict(halved.data.tags)).info.run_id
    client.delete_run(halved.info.run_id)
    done = sync(project, store)
    assert (done.written, done.half_written, done.duplicates) == (1, 1, 1)
    left = _runs(store)
    assert len(left) == len({run.data.tags[TRIAL_TAG] for run in left}) == 3
    assert half not in {run.info.run_id for run in left}
    assert all(run.info.end_time for run in left)


def test_runs_that_the_ledger_lacks_are_left_and_told(simulated_project: MakeProject) -> None:
    project = simulated_project(measured=1)
    store = store_of(project)
    sync(project, store)
    client = _client(store)
    experiment = _runs(store)[0].info.experiment_id
    theirs = client.create_run(experiment, tags={TRIAL_TAG: "abc", TOKENS_TAG: "7"}).info.run_id
    client.set_terminated(theirs)
    done = sync(project, store)
    assert done.unknown == [("abc", 7)]
    assert theirs in {run.info.run_id for run in _runs(store)}


def test_what_differs_is_named(simulated_project: MakeProject) -> None:
    project = simulated_project(measured=2)
    store = store_of(project)
    sync(project, store)
    tracker = Tracker(project, store)
    assert differences(project, tracker) == []
    changed, lost = _runs(store)
    later = changed.info.end_time + 1
    points = [Metric("loss", 9.0, later, 10**6), Metric("train_loss", 9.0, later, 10**6)]
    _client(store).log_batch(changed.info.run_id, points)
    _client(store).delete_run(lost.info.run_id)
    found = differences(project, tracker)
    assert len(found) == 3
    assert any("loss is 9.0 in MLflow and" in said for said in found)
    assert any("points of train_loss is" in said for said in found)
    assert any(lost.data.tags[TRIAL_TAG] in said and "0 runs" in said for said in found)


def test_a_long_curve_is_written_whole_and_a_refused_one_holds_nobody_up(
    simulated_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = simulated_project(measured=2)
    _, planned = project.plans()[0].planned[1:3]
    point = _row(project)["curve"][0]
    curve = [{**point, "step": i, "train_loss": 3.0 + i} for i in range(1500)]
    named = {"trial": planned.trial.key, "tokens": planned.trial.tokens}
    project.ledger.write_row(_row(project, **named, curve=curve))
    store = store_of(project)
    with monkeypatch.context() as patch:
        too_long = {"budget": "1", "x" * 300: "a name that MLflow does not take"}
        patch.setattr(
            tracking,
            "params_of",
            lambda row, p: too_long if p.id == planned.id else params_of(row, p),
        )
        done = sync(project, store)
        assert (done.written, list(done.refused)) == (2, [planned.id])
        assert "status is RUNNING in MLflow" in done.differences[0]
    done = sync(project, store)
    assert (done.written, done.half_written, done.differences) == (1, 1, [])
    (run,) = [r for r in _runs(store) if r.data.tags[TRIAL_TAG] == planned.trial.key]
    assert len(_client(store).get_metric_history(run.info.run_id, "train_loss")) == 1500


def test_a_diverged_trial_is_a_failed_run_without_infinities(
    simulated_project: MakeProject,
) -> None:
    project = simulated_project(measured=1)
    planned = project.plans()[0].planned[1]
    point = _row(project)["curve"][0]
    losses = [3.0, math.inf, math.nan]
    row = _row(
        project,
        trial=planned.trial.key,
        tokens=planned.trial.tokens,
        status="diverged",
        reason="loss is nan",
        loss=None,
        curve=[{**point, "step": i, "train_loss": loss} for i, loss in enumerate(losses)],
    )
    project.ledger.write_row(row)
    store = store_of(project)
    assert sync(project, store).differences == []
    (run,) = [r for r in _runs(store) if r.data.tags[TRIAL_TAG] == planned.trial.key]
    assert run.info.status == "FAILED"
    assert run.data.tags["isoflop.reason"] == "loss is nan"
    assert "loss" not in run.data.metrics
    history = _client(store).get_metric_history(run.info.run_id, "train_loss")
    assert [metric.value for metric in history] == [3.0]


def test_two_projects_of_one_name_do_not_mix_in_a_shared_store(
    simulated_project: MakeProject, tmp_path: Path, empty_store: Path
) -> None:
    shutil.copy(empty_store, tmp_path / "shared.db")
    uri = f"sqlite:///{tmp_path}/shared.db"
    one = simulated_project(measured=2, at="a/mini")
    other = simulated_project(measured=3, at="b/mini", budgets=[1e11])
    assert sync(one, store_of(one, uri)).experiment == "mini"
    second = sync(other, store_of(other, uri))
    assert second.experiment == f"mini ({other.uri})"
    assert (second.written, second.unknown) == (3, [])
    assert sync(one, store_of(one, uri)).written == 0
    assert len(_runs(store_of(one, uri), "mini")) == 2


def test_results_are_attached_once(simulated_project: MakeProject, tmp_path: Path) -> None:
    project = simulated_project(measured=2)
    store = store_of(project)
    sync(project, store)
    page = tmp_path / "report.html"
    page.write_text("found")
    results = Results(
        plan="s",
        metrics={"exponent_hoffmann": 0.5, "observations": 2.0},
        artifacts=(str(page), str(tmp_path / "missing.png")),
        ended=True,
    )
    for _ in range(2):
        tracker = Tracker(project, store)
        tracker.conclude(results)
    (parent,) = _runs(store, tag=SWEEP_TAG)
    assert parent.info.status == "FINISHED"
    client = _client(store)
    assert len(client.get_metric_history(parent.info.run_id, "exponent_hoffmann")) == 1
    assert [a.path for a in client.list_artifacts(parent.info.run_id)].count("report.html") == 1
    assert list(tracker.unattached) == [str(tmp_path / "missing.png")]


def test_points_of_a_curve_have_the_times_of_their_steps() -> None:
    """A trial of 10 s that ended at 12:00:10: step 5 of 10 was at 12:00:05."""
    end = datetime(2026, 1, 1, 12, 0, 10, tzinfo=UTC)
    curve = [{"step": s, "train_loss": 2.0, "heldout_loss": None} for s in (0, 5, 10)]
    row = dict.fromkeys(contents.METRICS) | {"finished_at": end, "seconds": 10.0, "curve": curve}
    row["domains"] = [{"name": "c++", "loss": 1.5}]
    at = int(end.timestamp() * 1000)
    assert contents.points_of(row) == [
        ("seconds", 10.0, at, 10),
        ("loss c__", 1.5, at, 10),  # MLflow takes few signs
        ("train_loss", 2.0, at - 10_000, 0),
        ("train_loss", 2.0, at - 5_000, 5),
        ("train_loss", 2.0, at, 10),
    ]


def test_domains_that_mlflow_would_take_for_one_are_told_apart() -> None:
    row = dict.fromkeys(contents.METRICS) | {"seconds": 1.0, "curve": []}
    row["finished_at"] = datetime(2026, 1, 1, tzinfo=UTC)
    losses = {"é": 1.0, "ü": 2.0, "web": 3.0}
    row["domains"] = [{"name": name, "loss": loss} for name, loss in losses.items()]
    found = {name: value for name, value, *_ in contents.points_of(row)}
    assert sorted(found.values()) == [1.0, 1.0, 2.0, 3.0]  # and the seconds
    assert found["loss web"] == 3.0


def test_sync_says_what_it_did(isoflop: Callable, simulated_project: MakeProject) -> None:
    project = simulated_project(measured=3)
    code, out, _ = isoflop("sync", project.uri, "--json")
    said = json.loads(out)
    assert (code, said["written"], said["differences"]) == (0, 3, [])
    assert said["store"] == store_uri(project)
    code, out, _ = isoflop("sync", project.uri)
    assert code == 0
    assert out.startswith("0 runs written to the experiment project at sqlite:///")


def test_sync_ends_with_1_where_mlflow_still_differs(
    isoflop: Callable, simulated_project: MakeProject
) -> None:
    project = simulated_project(measured=1)
    store = store_of(project)
    sync(project, store)
    (run,) = _runs(store)
    _client(store).log_metric(run.info.run_id, "loss", 9.0, run.info.end_time + 1, 10**6)
    code, out, _ = isoflop("sync", project.uri)
    assert code == 1
    assert "loss is 9.0 in MLflow and" in " ".join(out.split())


def test_sync_refuses_what_cannot_be_written(
    isoflop: Callable, simulated_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    project = simulated_project(measured=1)
    with hold(project.storage, "isoflop run"):
        code, _, error = isoflop("sync", project.uri)
    assert (code, "isoflop run" in error) == (2, True)
    code, _, error = isoflop("sync", project.uri, "--tracking-uri", "http://127.0.0.1:9")
    assert code == 2
    assert "MLflow at http://127.0.0.1:9 failed" in error
    (project.local / "mlflow.db").write_text("no database")
    code, _, error = isoflop("sync", project.uri)
    assert (code, "no SQLite database" in error) == (2, True)
