"""What somebody may plant in a project that others read: nothing runs, nothing ends a verb."""

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.errors import InputError
from orchestrator.artifacts import keep_inside
from orchestrator.lease import hold
from orchestrator.planner import Plan, make_plan
from orchestrator.project import Project, create_project
from orchestrator.spec import parse_spec, read_spec
from orchestrator.storage import LocalStorage
from orchestrator.verify import verify
from trainers.recipes import named
from trainers.registry import trainer
from trainers.workspace import Scratch

Run = Callable[..., tuple[int, str, str]]
SHAPES = {"aspect": 64.0, "head_width": 32, "width_multiple": 32}
READING = (
    ("status",),
    ("fit",),
    ("report",),
    ("forecast", "--flops", "1e19"),
    ("diagnose", "--params", "1e8", "--tokens", "1e9"),
    ("propose",),
    ("verify",),
    ("sync",),
)
OWN = """
from dataclasses import dataclass
from pathlib import Path
from trainers.decoder_recipe import DecoderRecipe, Rates

Path(__file__).with_name("imported").touch()


@dataclass(frozen=True, kw_only=True)
class Mine(DecoderRecipe):
    def rates(self, shape, tokens):
        return Rates(batch_tokens=2**17, matrix=0.01, embedding=0.01, head=0.01)
"""


def _fill(project: Project, plan: Plan) -> None:
    project.save_plan(plan)
    for trial in plan.trials:
        *_, measurement = trainer("simulated").train(trial, Scratch(Path("nowhere")))
        project.ledger.write(trial, measurement)


def _plan(source: Path, **changes: object) -> Plan:
    spec = {"name": "s", "trainer": "simulated", "budgets": [1e16, 1e17, 1e18], "sizes": 5}
    return make_plan(parse_spec({**spec, "shapes": SHAPES, **changes}, source=source))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A finished sweep of 15 simulated trials."""
    made = create_project(tmp_path / "p")
    _fill(made, _plan(Path("s.toml")))
    return made


# Reading runs nothing.


def _poison(project: Project, recipe: str) -> None:
    path = project.local / "plans/s.json"
    record = json.loads(path.read_text())
    record["spec"]["recipe"] = recipe
    architecture = record["trials"][0]["shape"]["architecture"]
    record["recipe"] = {"architecture": architecture, "min_steps": 20, "schedule": "cosine"}
    path.write_text(json.dumps(record))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["planted:Evil", "pytest:main"])
def test_reading_a_project_runs_nothing_of_it(
    project: Project, tmp_path: Path, empty_store: Path, recipe: str
) -> None:
    """With the command line as its users start it, in the directory that is poisoned."""
    marker = tmp_path / "ran"
    for name in ("conftest.py", "planted.py", "test_planted.py"):
        (project.local / name).write_text(f"open({str(marker)!r}, 'a').write({name!r})\n")
    shutil.copy(empty_store, project.local / "mlflow.db")
    _poison(project, recipe)
    isoflop = Path(sys.executable).with_name("isoflop")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    for verb, *options in READING:
        done = subprocess.run(
            [isoflop, verb, project.local, *options],
            cwd=project.local,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert not marker.exists(), f"{verb} ran {marker.read_text()}"
        assert "Traceback" not in done.stderr, done.stderr
        if verb == "propose":  # the one that needs the recipe's rules says how to give them
            assert done.returncode == 2
            assert "--sweep SWEEP.toml" in done.stderr
        else:
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("recipe", ["planted:Evil", "pytest:main", "os:getcwd", ":x", "x:"])
def test_a_kept_recipe_that_is_somebodys_own_stays_a_record(
    project: Project, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr("trainers.recipes.import_module", refuse)
    _poison(project, recipe)
    (plan,) = project.plans()
    assert plan.spec.recipe.name == recipe
    assert len(plan.planned) == 15
    with pytest.raises(InputError, match="read without running code"):
        plan.spec.recipe.rules.resolve(plan.trials[0].shape, 1e9)


CALLS = """
from dataclasses import dataclass
from pathlib import Path


def called():
    Path(__file__).with_name("called").touch()


class Plain:
    def __init__(self):
        called()


@dataclass(frozen=True)
class Value:
    pass


instance = Value()
"""


@pytest.mark.parametrize("attribute", ["called", "Plain", "instance", "nothing"])
def test_only_a_dataclass_is_called_as_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attribute: str
) -> None:
    (tmp_path / "calls.py").write_text(CALLS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "calls", raising=False)
    with pytest.raises(InputError, match="recipe 'calls"):
        named(f"calls:{attribute}")
    assert not (tmp_path / "called").exists()


def test_a_proposal_imports_the_recipe_of_the_sweep_file_that_was_named(
    isoflop: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_own.py").write_text(OWN)
    sweep = tmp_path / "s.toml"
    sweep.write_text(
        'name = "s"\ntrainer = "simulated"\nrecipe = "mine_own:Mine"\n'
        "budgets = [1e16, 1e17, 1e18]\nsizes = 5\n"
        "[shapes]\naspect = 64\nhead_width = 32\nwidth_multiple = 32\n"
    )
    project = create_project(tmp_path / "p")
    _fill(project, make_plan(read_spec(sweep)))
    imported = tmp_path / "imported"
    imported.unlink()
    monkeypatch.delitem(sys.modules, "mine_own")
    monkeypatch.chdir(tmp_path)
    assert "--sweep SWEEP.toml" in isoflop("propose", project.uri)[2]
    assert not imported.exists()
    code, _, err = isoflop("propose", project.uri, "--sweep", sweep)
    assert code == 0
    assert imported.exists()
    assert "executes the module mine_own, which has its recipe" in " ".join(err.split())
    text = (project.local / "next.toml").read_text()
    assert "# Running it executes the module mine_own, which has its recipe." in text
    assert 'recipe = "mine_own:Mine"' in text
    other = sweep.read_text().replace('"mine_own:Mine"', '{ name = "mine_own:Mine", beta1 = 0.8 }')
    sweep.write_text(other)
    code, _, err = isoflop("propose", project.uri, "--sweep", sweep)
    assert code == 2
    assert "name the sweep file that was run" in err


def test_a_proposal_says_which_program_it_would_run(
    isoflop: Run, project: Project, tmp_path: Path
) -> None:
    """A plan of a project that somebody sent may name any program."""
    path = project.local / "plans/s.json"
    record = json.loads(path.read_text())
    record["spec"] |= {
        "trainer": "command",
        "command": {"run": ["sh", "-c", "evil\x1b]52;\n{width} {steps}"], "directory": "/tmp"},
        "corpus": {"kind": "declared", "name": "c", "version": "1", "vocabulary": 256,
                   "tokens": 10**12},
    }  # fmt: skip
    path.write_text(json.dumps(record))
    code, _, err = isoflop("propose", project.uri)
    assert code == 0, err
    assert "executes the program sh -c 'evil?]52;?{width} {steps}' in /tmp" in " ".join(err.split())
    text = (project.local / "next.toml").read_text()
    assert "# Running it executes the program sh -c 'evil?]52;?{width} {steps}' in /tmp." in text
    assert read_spec(project.local / "next.toml").command is not None


# One odd file never ends `status` or `fit`.


def _mutated_json(value: object, chance: random.Random) -> object:
    """One value of a record replaced by another, or a key removed or added."""
    odd = [None, -1, 0, 2**70, 1.5, float("nan"), 1e400, "", "x", "../../x", [], {}, True,
           "\ud800", "9" * 5000, [[]], {"a": {}}]  # fmt: skip
    if isinstance(value, dict) and value and chance.random() < 0.9:
        name = chance.choice(sorted(value))
        kind = chance.random()
        if kind < 0.1:
            return {k: v for k, v in value.items() if k != name}
        if kind < 0.2:
            return {**value, "later": chance.choice(odd)}
        return {**value, name: _mutated_json(value[name], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        i = chance.randrange(len(value))
        return [*value[:i], _mutated_json(value[i], chance), *value[i + 1 :]]
    return chance.choice(odd)


def _mutated_bytes(data: bytes, chance: random.Random) -> bytes:
    kind, at = chance.randrange(5), chance.randrange(len(data))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([chance.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return b""
    return b"[" * 100_000 if kind == 3 else b"\xff\xfe" + data


def _mutated_row(path: Path, chance: random.Random) -> None:
    table = pq.read_table(path)
    name = chance.choice(table.column_names)
    at = table.column_names.index(name)
    kind = chance.randrange(4)
    if kind == 0:
        table = table.drop_columns([name])
    elif kind == 1:
        table = table.set_column(at, name, pa.nulls(1, table.field(at).type))
    elif kind == 2:
        table = table.set_column(at, name, pa.array([chance.choice(["x", "", "complete"])]))
    else:
        odd = chance.choice([float("nan"), float("inf"), -1.0, 0.0, 1e308])
        table = table.set_column(at, name, pa.array([odd]))
    pq.write_table(table, path)


def _mutate(project: Path, seed: int) -> Path:
    chance = random.Random(seed)
    groups = {
        "plans": sorted(project.glob("plans/*.*")),
        "attempts": sorted(project.glob("attempts/*")),
        "leases": sorted(project.glob("leases/*")),
        "ledger": sorted(project.glob("ledger/*")),
        "others": [project / "exclude.toml", project / "next.toml"],
    }
    path = chance.choice(groups[sorted(groups)[seed % len(groups)]])
    if path.suffix in (".json", ".stopped") and chance.random() < 0.8:
        record = _mutated_json(json.loads(path.read_text()), chance)
        path.write_text(json.dumps(record))
    elif path.suffix == ".parquet" and chance.random() < 0.8:
        _mutated_row(path, chance)
    else:
        path.write_bytes(_mutated_bytes(path.read_bytes(), chance))
    return path


@pytest.fixture
def lived_in(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A small project with every kind of record, and a driver that seems to be at work."""
    from orchestrator.stopped import note_stopped

    (plan,) = project.plans()
    attempts = project.attempts
    with hold(project.storage, "a sweep") as lease:
        for index in range(3):
            attempt = attempts.begin(plan.trials[index], driver=lease.generation, node="n", pid=1)
            if index:
                attempts.fail(attempt, kind="raised", error="x", step=3)
        note = {"stopping": False, "running": {plan.trials[0].key: {"fraction": 0.5, "loss": 3.0}}}
        lease.note(note)
    record = json.loads((project.local / "leases/1.json").read_text())
    (project.local / "leases/1.json").write_text(
        json.dumps({**record, "released": False, "note": note})
    )
    note_stopped(project.storage, "s", "x", [plan.trials[0].key])
    key = plan.trials[3].key
    (project.local / "exclude.toml").write_text(
        f'[[exclude]]\ntrial = "{key}"\nreason = "bad"\n[[exclude]]\nwidth = 7\nreason = "x"\n'
    )
    (project.local / "next.toml").write_text('name = "x"\n')
    monkeypatch.setattr("orchestrator.lease.is_alive", lambda record: True)
    return project


@pytest.mark.slow
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_no_odd_file_ends_status_or_fit_with_a_traceback(
    isoflop: Run, lived_in: Project, tmp_path: Path
) -> None:
    """Any error but one meant for people would go through `main`, and fail this test."""
    whole = tmp_path / "whole"
    shutil.copytree(lived_in.local, whole)
    for seed in range(60):
        shutil.rmtree(lived_in.local)
        shutil.copytree(whole, lived_in.local)
        path = _mutate(lived_in.local, seed)
        code, out, err = isoflop("status", lived_in.local, "--json")
        assert (code, err) == (0, ""), f"seed {seed}, {path}: {err}"
        json.loads(out)
        assert isoflop("status", lived_in.local)[0] == 0
        code, _, err = isoflop("fit", lived_in.local, "--json")
        if code:  # what was ruled out must not come back in silence, nor a row of another kind
            assert path.name == "exclude.toml" or "kinds cannot share" in err, f"{path}: {err}"
            assert err.startswith("isoflop: "), err
        verify(lived_in)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("attempts/KEY-2.json", '{"trial": "KEY", "kind": "abducted"}'),
        ("leases/9.json", '{"generation": 9}'),
        ("leases/9.json", "[" * 100_000),
        ("plans/later.json", '{"name": "later", "spec": {}, "trials": [{}], "planned": []}'),
        ("plans/s.stopped", '{"plan": "s", "trials": 5}'),
        ("ledger/0123456789abcdef-64.parquet", "PAR1"),
        ("ledger/notes.parquet", ""),
        ("exclude.toml", "[[exclude]]\nwidth = 5\n"),
    ],
)
def test_what_is_left_out_is_shown_with_its_reason(
    isoflop: Run, project: Project, file: str, text: str
) -> None:
    key = project.plans()[0].trials[0].key
    path = project.local / file.replace("KEY", key)
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.replace("KEY", key))
    code, out, _ = isoflop("status", project.uri, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["plans"][0]["complete"] == 15
    (odd,) = found["left_out"]
    assert str(path) in odd["reason"]
    shown = isoflop("status", project.uri)[1]
    assert "! left out: " in shown
    code, out, err = isoflop("fit", project.uri, "--json")
    if file == "exclude.toml":
        assert code == 2
        assert "has no reason" in err
    else:
        found = json.loads(out)
        assert found["observations"] == 15
        in_fit = file.startswith(("ledger", "plans/later"))
        assert any(str(path) in warning for warning in found["warnings"]) == in_fit
    assert verify(project).problems


def test_a_run_refuses_a_ledger_with_a_file_that_is_no_row(project: Project) -> None:
    """Others are answered without it; a run would train on beside what it cannot read."""
    (project.local / "ledger/0123456789abcdef-64.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        project.ledger.read()


def test_a_plan_whose_trials_have_other_keys_is_left_out(project: Project) -> None:
    path = project.local / "plans/s.json"
    record = json.loads(path.read_text())
    record["trials"][0]["seed"] = 5
    path.write_text(json.dumps(record))
    plans, (odd,) = project.survey_plans()
    assert plans == []
    assert "it lacks" in odd.reason
    record["planned"][0]["trial"] = "x"
    path.write_text(json.dumps(record))
    assert project.plans() == []


def test_a_plan_is_known_by_the_name_of_its_file(project: Project) -> None:
    (project.local / "plans/s.json").rename(project.local / "plans/t.json")
    plans, (odd,) = project.survey_plans()
    assert plans == []
    assert "it is the plan s" in odd.reason


# isoflop verify.


@pytest.fixture
def anywhere(location: str, monkeypatch: pytest.MonkeyPatch) -> Project:
    """15 rows and a copy of them, in a directory, then in a bucket."""
    made = create_project(location)
    _fill(made, _plan(Path("s.toml")))
    made.ledger.compact()
    return made


def _change_row(project: Project, **values: object) -> str:
    from orchestrator.ledger import file_name

    name = sorted(project.ledger.ids())[4]
    row = project.ledger.find(name)
    table = pa.Table.from_pylist([row | values], schema=project.ledger.read().schema)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    project.storage.replace(file_name(name), buffer.getvalue().to_pybytes())
    return file_name(name)


def test_a_project_that_agrees_is_said_to(isoflop: Run, anywhere: Project) -> None:
    code, out, err = isoflop("verify", anywhere.uri, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["problems"] == []
    assert (found["rows"], found["rows_checked"], found["copied"]) == (15, 15, 15)
    code, out, _ = isoflop("verify", anywhere.uri)
    assert code == 0
    assert "nothing disagrees" in out


@pytest.mark.parametrize(
    ("values", "column"),
    [({"params_non_embedding": 7}, "params_non_embedding"), ({"seed": 3}, "seed"),
     ({"flops_exact": 1.0}, "flops_exact"), ({"corpus_hash": "x"}, "corpus_hash")],
)  # fmt: skip
def test_a_row_that_is_not_its_trials_is_found(
    isoflop: Run, anywhere: Project, values: dict, column: str
) -> None:
    file = _change_row(anywhere, **values)
    code, out, _ = isoflop("verify", anywhere.uri, "--json")
    assert code == 1
    problems = json.loads(out)["problems"]
    assert {p["file"].partition("/")[0] for p in problems} == {"ledger", "compacted"}
    assert any(p["file"] == file and f"{column} is" in p["reason"] for p in problems)
    assert "disagrees: " in isoflop("verify", anywhere.uri)[1]


def test_a_copy_with_the_right_marks_and_other_numbers_is_found(anywhere: Project) -> None:
    (name,) = anywhere.storage.names("compacted")
    table = pq.read_table(pa.BufferReader(anywhere.storage.read(f"compacted/{name}")))
    at = table.column_names.index("loss")
    losses = table["loss"].to_pylist()
    losses[7] = 0.5
    forged = table.set_column(at, table.field(at), pa.array(losses))
    buffer = pa.BufferOutputStream()
    pq.write_table(forged, buffer)
    anywhere.storage.replace(f"compacted/{name}", buffer.getvalue().to_pybytes())
    (problem,) = verify(anywhere).problems
    assert problem.file == f"compacted/{name}"
    assert "loss of" in problem.reason


def test_a_copied_row_that_the_ledger_lacks_is_found(anywhere: Project) -> None:
    name = sorted(anywhere.storage.names("ledger"))[0]
    anywhere.storage.remove(f"ledger/{name}")
    (problem,) = verify(anywhere).problems
    assert "the ledger does not" in problem.reason


def test_a_row_under_another_name_is_found(anywhere: Project) -> None:
    name = sorted(anywhere.storage.names("ledger"))[0]
    data = anywhere.storage.read(f"ledger/{name}")
    anywhere.storage.create("ledger/0123456789abcdef-64.parquet", data)
    (problem,) = verify(anywhere).problems
    assert problem.file == "ledger/0123456789abcdef-64.parquet"


def test_an_external_row_that_was_changed_is_found(
    isoflop: Run, anywhere: Project, tmp_path: Path
) -> None:
    rows = "\n".join(f"{n},1e18,{3 + n / 1e9}" for n in (1e8, 2e8, 4e8))
    (tmp_path / "runs.csv").write_text(f"params,flops,loss\n{rows}\n")
    assert isoflop("add", anywhere.uri, tmp_path / "runs.csv")[0] == 0
    result = verify(anywhere)
    assert (result.problems, result.rows, result.rows_checked) == ([], 18, 18)
    name = next(
        n for n in anywhere.ledger.ids() if anywhere.ledger.find(n)["trainer"] == "external"
    )
    row = anywhere.ledger.find(name)
    table = pa.Table.from_pylist([row | {"loss": 2.0}], schema=anywhere.ledger.read().schema)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    anywhere.storage.replace(f"ledger/{name[0]}-{name[1]}.parquet", buffer.getvalue().to_pybytes())
    (problem,) = verify(anywhere).problems
    assert "the key of its content" in problem.reason


def test_what_points_outside_of_a_project_is_found(project: Project, tmp_path: Path) -> None:
    assert verify(project).problems == []
    (tmp_path / "theirs").mkdir()
    (project.local / "figures").symlink_to(tmp_path / "theirs")
    (project.local / "inside").symlink_to(project.local / "ledger")
    (project.local / "logs").mkdir()
    os.mkfifo(project.local / "logs/pipe")
    reasons = {p.file: p.reason for p in verify(project).problems}
    assert set(reasons) == {"figures", "logs/pipe"}
    assert f"symbolic link to {tmp_path}/theirs" in reasons["figures"]


def test_files_that_a_running_sweep_removes_meanwhile_are_no_problem(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As between the moment when a directory is listed and the one when a file is looked at."""
    names, walk = LocalStorage.names, os.walk

    def names_and_one(storage: LocalStorage, directory: str, prefix: str = "") -> list[str]:
        more = ["gone.safetensors"] if directory == "models" else []
        return [*names(storage, directory, prefix), *more]

    def walk_and_one(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        return ((where, folders, [*files, ".row.gone"]) for where, folders, files in walk(top))

    monkeypatch.setattr(LocalStorage, "names", names_and_one)
    monkeypatch.setattr(os, "walk", walk_and_one)
    result = verify(project)
    assert result.problems == []
    assert result.models == 0


@pytest.fixture
def place_artifacts(project: Project, empty_store: Path) -> Callable[[str], None]:
    """Gives the project a database that says that files of an experiment lie at a place."""

    def place(uri: str) -> None:
        path = project.local / "mlflow.db"
        shutil.copy(empty_store, path)
        with sqlite3.connect(path) as connection:
            connection.execute(
                "INSERT INTO experiments (experiment_id, name, artifact_location, "
                "lifecycle_stage, workspace) VALUES (7, 'x', ?, 'active', 'default')",
                [uri.format(project=project.local)],
            )
        connection.close()

    return place


@pytest.mark.parametrize(
    ("place", "within"),
    [
        ("file://{project}/mlartifacts/1", True),
        ("{project}/mlartifacts/1", False),
        ("mlflow-artifacts:/1", False),
        ("file://{project}/plans", False),
        ("file://{project}/../elsewhere", False),
        ("file://{project}-other/mlartifacts", False),
        ("/etc", False),
        ("file://host/{project}", False),
        ("s3://bucket/x", False),
        ("relative", False),
    ],
)
def test_an_artifact_place_outside_of_a_project_is_found_and_mended(
    project: Project, place_artifacts: Callable[[str], None], place: str, within: bool
) -> None:
    """As `run`, `tune`, `sync` and `ui` mend it, and only where they would."""
    place_artifacts(place)
    problems = verify(project).problems
    assert [p.file for p in problems] == ([] if within else ["mlflow.db"])
    keep_inside(project)
    assert verify(project).problems == []


def test_places_of_many_runs_are_one_line_with_one_remedy(
    project: Project, place_artifacts: Callable[[str], None], tmp_path: Path
) -> None:
    place_artifacts("file://{project}/mlartifacts/7")
    (tmp_path / "theirs").mkdir()
    (project.local / "mlartifacts").symlink_to(tmp_path / "theirs")
    inside = f"{(project.local / 'mlartifacts').as_uri()}/7/artifacts"
    with sqlite3.connect(project.local / "mlflow.db") as connection:
        connection.executemany(
            "INSERT INTO runs (run_uuid, artifact_uri, experiment_id) VALUES (?, ?, 7)",
            [(f"{i:032x}", inside) for i in range(20)],
        )
        assert [p.file for p in verify(project).problems] == ["mlartifacts"]  # the link itself
        (project.local / "mlartifacts").unlink()
        connection.execute("UPDATE runs SET artifact_uri = 'mlflow-artifacts:/x'")
        connection.execute("UPDATE workspaces SET default_artifact_root = 'file:///etc'")
    connection.close()
    (problem,) = verify(project).problems
    assert "21 places of files outside" in problem.reason
    assert f"isoflop sync {project.local}" in problem.reason


def test_who_else_can_write_to_a_project_is_said(project: Project) -> None:
    project.local.chmod(0o777)
    assert any("others than its owner" in note for note in verify(project).notes)
    project.local.chmod(0o755)
    assert verify(project).notes == []


def test_what_is_no_project_is_refused(isoflop: Run, tmp_path: Path) -> None:
    code, _, err = isoflop("verify", tmp_path / "none")
    assert code == 2
    assert "there is no project" in err


@pytest.mark.parametrize("planted", ["pipe", "device"])
def test_a_file_without_an_end_in_the_place_of_exclusions_is_refused(
    isoflop: Run, project: Project, planted: str
) -> None:
    """Reading a named pipe would wait for ever, and /dev/zero would fill the memory."""
    path = project.local / "exclude.toml"
    if planted == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    code, _, err = isoflop("fit", project.uri)
    assert code == 2
    assert "exclude.toml is no regular file: remove it" in " ".join(err.split())
    code, out, _ = isoflop("status", project.uri)
    assert code == 0
    assert "exclude.toml is no regular file" in " ".join(out.split())
