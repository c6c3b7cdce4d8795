"""Links and places that somebody planted in a project lead none of its files out of it."""

import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.errors import InputError
from analysis.writing import replacing
from orchestrator import (
    artifacts,
    attempts,
    compaction,
    conclusion,
    evaluations,
    lease,
    ledger,
    logs,
    models,
)
from orchestrator.artifacts import keep_inside
from orchestrator.checkpoints import directory_of
from orchestrator.checks import storage_checks
from orchestrator.mirror import Mirror
from orchestrator.project import DIRECTORIES, Project, create_project, open_project
from orchestrator.runs import SWEEP_TAG
from orchestrator.storage import open_storage, patiently
from orchestrator.sync import sync
from orchestrator.tracking import Results, Tracker, store_of, store_uri
from orchestrator.worker import Work
from tests.orchestrator.workers import STEPS, Tiny, bench_at
from tests.waiting import free_ports

Run = Callable[..., tuple[int, str, str]]
MakeProject = Callable[..., Project]
SECRET = "what only the owner may read or change"


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory of the victim's, outside of every project, with a file."""
    directory = tmp_path / "home"
    directory.mkdir()
    (directory / "secret").write_text(SECRET)
    return directory


def _require_untouched(home: Path) -> None:
    assert sorted(path.name for path in home.rglob("*")) == ["secret"]
    assert (home / "secret").read_text() == SECRET


def _content(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_report_takes_the_place_of_links(
    simulated_project: MakeProject, isoflop: Run, home: Path
) -> None:
    project = simulated_project(measured=15, budgets=[1e10, 3e10, 9e10])
    figures, page = project.local / "figures", project.local / "pages/page.html"
    page.parent.mkdir()
    figures.mkdir()
    planted = [
        *(figures / f"{name}.{kind}" for name in ("isoflop", "scaling") for kind in ("svg", "png")),
        project.local / "report.html",
    ]
    for link in (*planted, page):
        link.symlink_to(home / "secret")
    assert isoflop("report", project.uri)[0] == 0
    assert isoflop("report", project.uri, "-o", page)[0] == 0
    _require_untouched(home)
    for path in (*planted, page):
        assert path.is_file()
        assert not path.is_symlink()
    assert not [name for name in os.listdir(figures) if name.startswith(".")]


def test_a_link_that_a_person_names_elsewhere_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target.html", tmp_path / "link.html"
    link.symlink_to(target)
    for text in ("first", "second"):
        conclusion.write(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    with pytest.raises(InputError, match="Is a directory"):
        conclusion.write(tmp_path, "text")


def test_a_report_is_written_to_standard_output(
    simulated_project: MakeProject, tmp_path: Path
) -> None:
    project = simulated_project(measured=15, budgets=[1e10, 3e10, 9e10])
    link = tmp_path / "stdout"
    link.symlink_to("/dev/stdout")
    command = [sys.executable, "-m", "orchestrator", "report", project.uri, "-o", str(link)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    assert "</html>" in done.stdout
    assert os.readlink(link) == "/dev/stdout"


def test_a_proposal_takes_the_place_of_a_link(
    simulated_project: MakeProject, isoflop: Run, home: Path
) -> None:
    project = simulated_project(measured=15, budgets=[1e10, 3e10, 9e10])
    proposal = project.local / "next.toml"
    proposal.symlink_to(home / "secret")
    assert isoflop("propose", project.uri)[0] == 0
    _require_untouched(home)
    assert not proposal.is_symlink()
    assert "Proposed by isoflop" in proposal.read_text()


def test_figures_are_not_written_through_a_link_of_their_directory(
    simulated_project: MakeProject, isoflop: Run, home: Path
) -> None:
    project = simulated_project(measured=15, budgets=[1e10, 3e10, 9e10])
    (project.local / "figures").symlink_to(home)
    code, _, err = isoflop("report", project.uri)
    assert code == 2
    assert str(project.local / "figures") in err
    _require_untouched(home)


def test_every_directory_of_a_project_is_known() -> None:
    modules = (attempts, compaction, evaluations, ledger, lease, logs, models, artifacts)
    own = {directory_of("key").partition("/")[0], "plans", "figures"}
    assert set(DIRECTORIES) == own | {module.DIRECTORY for module in modules}


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_a_directory_that_leads_elsewhere_is_found_before_anything_is_done(
    tmp_path: Path, home: Path, directory: str
) -> None:
    link = tmp_path / "project" / directory
    link.parent.mkdir()
    link.symlink_to(home)
    with pytest.raises(InputError, match=f"{link} is or lies in a symbolic link") as refusal:
        create_project(link.parent)
    (check,) = storage_checks(open_storage(link.parent))
    assert check.status == "failure"
    assert f"{check.value}: {check.remedy}" == str(refusal.value)
    assert "move the whole project" in check.remedy
    assert list(link.parent.iterdir()) == [link]
    _require_untouched(home)


@pytest.mark.parametrize("verb", ["run", "tune"])
def test_a_sweep_does_not_start_beside_a_link_of_its_ledger(
    isoflop: Run,
    sweep_file: Callable[..., Path],
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
) -> None:
    for name in ("orchestrator.loop.run", "orchestrator.tune.tune"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("it started"))
    link = tmp_path / "project/ledger"
    link.parent.mkdir()
    link.symlink_to(home)
    code, _, err = isoflop(verb, sweep_file(), "--project", link.parent)
    assert code == 2
    assert str(link) in err
    assert list(link.parent.iterdir()) == [link]
    _require_untouched(home)


def test_patience_ends_at_once_where_a_link_leads_out(tmp_path: Path, home: Path) -> None:
    storage = open_storage(tmp_path / "project")
    storage.make()
    (tmp_path / "project/ledger").symlink_to(home)

    def tell(error: OSError) -> None:
        raise AssertionError(f"waits for {error}")

    with pytest.raises(InputError, match="out of the project"):
        patiently(lambda: storage.create("ledger/row", b""), tell=tell, unless=lambda: False)


def test_an_attempt_fails_where_a_link_was_planted_meanwhile(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path / "project")
    with bench_at(storage, tmp_path, monkeypatch) as bench:
        plant = Tiny(at={STEPS: lambda: (storage.local / "ledger").symlink_to(home)})
        monkeypatch.setattr(Work, "_tell", lambda _, trouble: pytest.fail(f"waits: {trouble}"))
        with pytest.raises(InputError, match="out of the project"):
            bench.run(plant)
        (attempt,) = bench.attempts.all()
    assert attempt.kind == "raised"
    assert "ledger is or lies in a symbolic link" in attempt.error
    _require_untouched(home)


@pytest.mark.slow
def test_figures_that_cannot_be_written_do_not_end_a_sweep(
    simulated_project: MakeProject, isoflop: Run
) -> None:
    project = simulated_project(measured=15, budgets=[1e10, 3e10, 9e10])
    (project.local / "figures").write_text("a file")
    code, out, err = isoflop("run", project.local / "plans/s.toml")
    assert code == 0, err
    assert "hoffmann" in out
    assert f"no pictures are in {project.local}/figures" in " ".join(err.split())
    (report,) = project.local.glob("mlartifacts/*/artifacts/report.html")
    assert report.read_bytes() == (project.local / "report.html").read_bytes()


@pytest.mark.parametrize("directory", ["ledger", "plans", "attempts"])
def test_records_are_not_written_through_a_link_of_their_directory(
    tmp_path: Path, home: Path, directory: str
) -> None:
    storage = open_storage(tmp_path / "project")
    storage.make()
    (storage.local / directory).symlink_to(home)
    for write in (storage.create, storage.replace):
        with pytest.raises(InputError, match="out of the project"):
            write(f"{directory}/secret", b"theirs")
        with pytest.raises(InputError, match="out of the project"):
            write(f"{directory}/deeper/secret", b"theirs")
    (home / "deeper").mkdir()
    with pytest.raises(InputError, match="out of the project"):
        storage.remove_all(f"{directory}/deeper")
    assert (home / "deeper").is_dir()
    (home / "deeper").rmdir()
    _require_untouched(home)


def test_a_project_may_itself_be_a_link_and_have_links_within(tmp_path: Path) -> None:
    (tmp_path / "real/there").mkdir(parents=True)
    (tmp_path / "project").symlink_to(tmp_path / "real")
    (tmp_path / "real/ledger").symlink_to("there")
    for place in (tmp_path / "project", f"file://{tmp_path}/project"):
        storage = open_storage(place)
        storage.replace("ledger/row", b"ours")
        assert (tmp_path / "real/there/row").read_bytes() == b"ours"


def test_a_file_that_is_not_finished_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(TypeError), replacing(path) as file:
        file.writelines([b"half", None])
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"file": "before"}


def _attach(project: Project, files: Path) -> None:
    """Attach a report to the run of the sweep, as its end does."""
    files.mkdir(exist_ok=True)
    report, picture = files / "report.html", files / "isoflop.png"
    report.write_text("page")
    picture.write_text("picture")
    tracker = Tracker(project, store_of(project))
    results = Results(plan="s", metrics={}, artifacts=(str(report), str(picture)), ended=True)
    tracker.conclude(results)
    assert tracker.unattached == {}
    (run,) = tracker.search(SWEEP_TAG)
    names = {item.path for item in tracker.client.list_artifacts(run.info.run_id)}
    assert names == {"report.html", "figures"}


def _poison(project: Project, table: str, column: str, uri: str, more: str = "") -> None:
    with sqlite3.connect(project.local / "mlflow.db") as database:
        database.execute(f"UPDATE {table} SET {column} = ?", [uri])
        database.executescript(more)
    database.close()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["file://{}", "{}", "file://{}/../../x/../home", "FILE://{}"])
def test_artifacts_go_where_the_project_is_whatever_its_database_says(
    simulated_project: MakeProject, tmp_path: Path, home: Path, form: str
) -> None:
    project = simulated_project(measured=1)
    sync(project, store_of(project))
    for table, column in (("runs", "artifact_uri"), ("experiments", "artifact_location")):
        _poison(project, table, column, form.format(home))
    with Mirror(project, "s") as mirror:
        caution = mirror.caution()
    assert str(project.local / "mlartifacts") in caution
    assert "2 runs" in caution
    _attach(project, tmp_path / "files")
    _require_untouched(home)
    with Mirror(project, "s") as mirror:
        assert mirror.caution() is None


@pytest.mark.slow
def test_a_copy_of_a_project_leaves_the_original_as_it_is(
    simulated_project: MakeProject, tmp_path: Path, isoflop: Run
) -> None:
    project = simulated_project(measured=2)
    sync(project, store_of(project))
    _attach(project, tmp_path / "files")
    shutil.copytree(project.local, tmp_path / "copies/project")
    before = _content(project.local)
    copy = open_project(tmp_path / "copies/project")
    code, _, err = isoflop("sync", copy.uri)
    assert code == 0
    assert f"they are now written to and looked for in {copy.local}/mlartifacts" in " ".join(
        err.split()
    )
    _attach(copy, tmp_path / "files")
    assert _content(project.local) == before


@pytest.mark.slow
def test_a_database_that_leads_elsewhere_again_by_itself_is_refused(
    simulated_project: MakeProject, home: Path
) -> None:
    project = simulated_project(measured=1)
    sync(project, store_of(project))
    trigger = (
        "CREATE TRIGGER evil AFTER UPDATE ON runs BEGIN "
        f"UPDATE runs SET artifact_uri = 'file://{home}' WHERE run_uuid = NEW.run_uuid; END;"
    )
    _poison(project, "runs", "artifact_uri", f"file://{home}", trigger)
    with pytest.raises(InputError, match=r"mlflow\.db"):
        keep_inside(project)
    with pytest.raises(InputError, match=r"mlflow\.db"):
        Tracker(project, store_of(project))


@pytest.mark.slow
def test_an_id_of_a_run_that_is_a_path_is_refused(
    simulated_project: MakeProject, home: Path
) -> None:
    project = simulated_project(measured=1)
    sync(project, store_of(project))
    _poison(project, "experiments", "artifact_location", f"file://{home}")
    with sqlite3.connect(project.local / "mlflow.db") as database:
        database.execute(
            "INSERT INTO runs (run_uuid, artifact_uri, experiment_id) VALUES (?, ?, 1)",
            ["../../../home", f"file://{home}"],
        )
    database.close()
    with pytest.raises(InputError, match=r"mlflow\.db"):
        keep_inside(project)


@pytest.mark.slow
@pytest.mark.parametrize("database", [True, False])
@pytest.mark.parametrize("name", ["mlflow.db", "mlflow.db-journal", "mlartifacts", "mlartifacts/x"])
def test_a_store_that_is_a_link_out_of_the_project_is_refused(
    simulated_project: MakeProject, home: Path, name: str, database: bool
) -> None:
    project = simulated_project(measured=1)
    link = project.local / name
    link.parent.mkdir(exist_ok=True)
    if name == "mlflow.db":
        link.rename(home / "secret")
    before = (home / "secret").read_bytes()
    link.symlink_to(home / "secret")
    if name != "mlflow.db" and not database:
        (project.local / "mlflow.db").unlink()
    for act in (keep_inside, lambda p: Tracker(p, store_of(p)), lambda p: Mirror(p, "s").caution()):
        with pytest.raises(InputError) as refusal:
            act(project)
        assert str(link) in str(refusal.value)
    assert (home / "secret").read_bytes() == before
    assert os.listdir(home) == ["secret"]


@pytest.mark.slow
def test_the_ui_serves_no_file_from_outside_of_the_project(
    simulated_project: MakeProject, home: Path
) -> None:
    project = simulated_project(measured=1, at="shown")
    sync(project, store_of(project, store_uri(project)))
    _poison(project, "runs", "artifact_uri", f"file://{home}")
    with sqlite3.connect(project.local / "mlflow.db") as database:
        (run,) = database.execute("SELECT run_uuid FROM runs").fetchone()
    database.close()
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "orchestrator", "ui", str(project.local), "--port", str(port)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if "Ctrl-C" in line:
                    break
            where = f"http://127.0.0.1:{port}/get-artifact?run_uuid={run}&path=secret"
            try:
                with urllib.request.urlopen(where, timeout=60) as answer:
                    body = answer.read().decode()
            except urllib.error.HTTPError as error:
                body = error.read().decode()
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    assert SECRET not in body
