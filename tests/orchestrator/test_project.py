"""Projects: where they are, what they keep, and what they refuse, in a directory or a bucket."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.errors import InputError
from orchestrator.attempts import Kind
from orchestrator.lease import hold
from orchestrator.planner import Plan, make_plan
from orchestrator.project import (
    Project,
    budgets,
    create_project,
    directory_for,
    missing,
    open_project,
)
from orchestrator.spec import parse_spec
from orchestrator.storage import open_storage
from tests.orchestrator.workers import measurement
from trainers import corpus
from trainers.registry import trainer
from trainers.workspace import Scratch

Run = Callable[..., tuple[int, str, str]]


def _plan(name: str = "x", **changes: object) -> Plan:
    spec = {"name": name, "trainer": "simulated", "budgets": [1e10, 1e11], "sizes": 4, **changes}
    return make_plan(parse_spec(spec, source=Path("x.toml")))


@pytest.fixture
def project(location: str) -> Project:
    return create_project(location)


def test_a_sweep_runs_into_the_project_it_lies_in_else_a_new_one(project: Project) -> None:
    for file in ("next.toml", "plans/x.toml"):
        assert str(directory_for(project.storage.place(file), "other")) == project.uri
    above = project.uri.rpartition("/")[0]
    assert directory_for(f"{above}/sweep.toml", "name") == Path("projects/name")


def test_a_project_is_found_where_it_was_made(project: Project) -> None:
    assert open_project(project.uri) == create_project(project.uri)
    assert open_project(project.uri).name == "project"
    assert project.report == f"{project.uri}/report.html"


def test_a_project_holds_any_number_of_plans(project: Project) -> None:
    one, two = _plan("one"), _plan("two", budgets=[1e12])
    project.save_plan(two)
    project.save_plan(one)
    assert project.plans() == [two, one]
    assert sorted(set(budgets(project.plans()).values())) == [1e10, 1e11, 1e12]
    assert len(missing(project, one)) == 8


def test_the_same_plan_again_changes_nothing(project: Project) -> None:
    project.save_plan(_plan())
    project.save_plan(_plan("later"))
    before = project.storage.read("plans/x.json")
    project.save_plan(_plan())
    assert project.storage.read("plans/x.json") == before


def test_a_plan_may_grow_if_told_to_but_not_change_under_its_name(project: Project) -> None:
    project.save_plan(_plan())
    project.save_plan(_plan("later"))
    project.attempts.begin(_plan().trials[0], driver=1, node="n", pid=1)
    grown = _plan(budgets=[1e10, 1e11, 1e12])
    widths = sorted({p.trial.shape.width for p in grown.planned if p.budget == 1e12})
    shown = ", ".join(map(str, widths))
    with pytest.raises(
        InputError,
        match=rf"asks for 4 observations \(4 at 1e\+12 FLOPs of widths {shown}\) in addition; "
        "run it with --extend",
    ):
        project.save_plan(grown)
    assert len(project.plans()[0].planned) == 8
    project.save_plan(grown, extend=True)
    assert [plan.name for plan in project.plans()] == ["later", "x"]
    assert len(project.plans()[1].planned) == 12
    for extend in (False, True):
        with pytest.raises(
            InputError,
            match=r"no longer asks for 12 observations \(4 at 1e\+10 .*\) and asks for 8 .*"
            "give this one another name",
        ):
            project.save_plan(_plan(simulated={"noise": 0.5}), extend=extend)
        with pytest.raises(InputError, match="no longer asks for 4 observations"):
            project.save_plan(_plan(), extend=extend)
    with pytest.raises(InputError, match=r"differs in simulated\.noise \(0\.5, was 0\.003\)"):
        project.save_plan(_plan(budgets=[1e10, 1e11, 1e12], simulated={"noise": 0.5}))
    assert len(project.plans()[1].planned) == 12


def test_a_plan_that_was_never_begun_may_be_corrected(project: Project) -> None:
    project.save_plan(_plan(simulated={"gpus": 2.0}))
    project.save_plan(_plan())
    assert [p.id for p in project.plans()[0].planned] == [p.id for p in _plan().planned]


def test_the_sweep_is_kept_beside_its_plan(project: Project) -> None:
    project.save_plan(_plan())
    assert 'name = "x"' in project.storage.read("plans/x.toml").decode()


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to the project "):
        create_project(tmp_path / "file" / "p")


def test_what_is_no_project_is_named(location: str) -> None:
    with pytest.raises(InputError, match="there is no project at"):
        open_project(location)


def test_a_project_of_before_the_mark_is_one(project: Project) -> None:
    project.save_plan(_plan())
    project.storage.remove("project.json")
    record = json.loads(project.storage.read("plans/x.json"))
    del record["saved_at"]
    project.storage.replace("plans/x.json", json.dumps(record).encode())
    assert open_project(project.uri).plans() == [_plan()]


def _fail(project: Project, plan: Plan, index: int, kind: Kind | None, driver: int = 1) -> None:
    """An attempt at a trial, and how it ended, if it did."""
    attempts = project.attempts
    attempt = attempts.begin(plan.trials[index], driver=driver, node="n", pid=1)
    if kind is not None:
        attempts.fail(attempt, kind=kind, error="x")


def test_outcomes_are_what_ledger_and_attempts_say(project: Project) -> None:
    plan = _plan()
    project.save_plan(plan)
    for index, kind in enumerate(("raised", "interrupted", "driver lost", "silent")):
        _fail(project, plan, index, kind)
    _fail(project, plan, 3, "interrupted")  # its last one, which says nothing of the trial
    with hold(project.storage, "a sweep") as held:
        _fail(project, plan, 4, None, held.generation)
        _fail(project, plan, 0, None, held.generation + 1)  # an orphan's, of another lease
        *_, row = trainer("simulated").train(plan.trials[4], Scratch(Path("nowhere")))
        states = list(project.outcomes(plan).values())
        assert states == ["waiting"] * 4 + ["running"] + ["waiting"] * 3
        assert [a.observation for a in project.activity().running] == [plan.planned[4].id]
        project.ledger.write(plan.trials[4], replace(row, status="diverged"))
        assert project.outcomes(plan)[plan.planned[4].id] == "diverged"
    assert project.activity().running == []
    _fail(project, plan, 5, "raised")
    _fail(project, plan, 6, None)
    states = list(project.outcomes(plan).values())
    assert states[4:] == ["diverged", "failed", "waiting", "waiting"]


@pytest.fixture
def simulated(project: Project) -> Project:
    """A finished sweep of the simulated trainer."""
    large = {"aspect": 64.0, "head_width": 32, "width_multiple": 32}
    plan = _plan("s", budgets=[1e16, 1e17, 1e18], sizes=5, shapes=large)
    project.save_plan(plan)
    for trial in plan.trials:
        *_, measurement = trainer("simulated").train(trial, Scratch(Path("nowhere")))
        project.ledger.write(trial, measurement)
    return project


def _json(isoflop: Run, *arguments: object) -> dict:
    code, out, err = isoflop(*arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_every_verb_takes_a_project_by_its_uri(isoflop: Run, simulated: Project) -> None:
    uri, storage = simulated.uri, simulated.storage
    assert _json(isoflop, "fit", uri)["observations"] == 15
    assert _json(isoflop, "status", uri)["plans"][0]["complete"] == 15
    assert isoflop("status", uri)[0] == 0
    proposal = _json(isoflop, "propose", uri, "--flops", "1e19")["proposal"]
    assert proposal == f"{uri}/next.toml"
    assert b"Proposed by isoflop" in storage.read("next.toml")
    code, out, _ = isoflop("report", uri)
    assert (code, out.strip()) == (0, f"{uri}/report.html")
    assert b"1e+19" in storage.read("report.html")  # the proposal is on the page
    assert storage.read("figures/isoflop.png").startswith(b"\x89PNG")
    code, out, _ = isoflop("report", uri, "-o", f"{uri}/elsewhere.html")
    assert (code, out.strip()) == (0, f"{uri}/elsewhere.html")
    assert storage.exists("elsewhere.html")


def test_an_exclusion_is_read_from_the_project(isoflop: Run, simulated: Project) -> None:
    key = simulated.plans()[0].trials[0].key
    text = f'[[exclude]]\ntrial = "{key}"\nreason = "bad node"\n'
    simulated.storage.replace("exclude.toml", text.encode())
    found = _json(isoflop, "fit", simulated.uri)
    assert found["excluded"] == [{"reason": "ruled out: bad node", "count": 1}]
    simulated.storage.replace("exclude.toml", text.encode("utf-8-sig"))
    assert _json(isoflop, "fit", simulated.uri) == found
    simulated.storage.replace("exclude.toml", text.replace("bad", "bl\xf6d").encode("latin-1"))
    assert "exclude.toml is not in UTF-8: line 3" in isoflop("fit", simulated.uri)[2]
    simulated.storage.replace("exclude.toml", b"[[")
    assert f"{simulated.uri}/exclude.toml is no TOML" in isoflop("fit", simulated.uri)[2]


def test_runs_of_others_are_added_by_uri_and_read_from_a_file_there(
    isoflop: Run, project: Project, tmp_path: Path
) -> None:
    budget = np.repeat([1e18, 4e18, 1.6e19, 6.4e19], 7)
    n = np.sqrt(budget / 120) * np.tile(np.geomspace(0.25, 4, 7), 4)
    loss = 1.69 + 406.4 * n**-0.34 + 410.7 * (budget / (6 * n)) ** -0.28
    rows = "\n".join(f"{a},{b},{c}" for a, b, c in zip(n, budget, loss, strict=True))
    (tmp_path / "runs.csv").write_text(f"params,flops,loss\n{rows}\n")
    assert _json(isoflop, "add", project.uri, tmp_path / "runs.csv")["added"] == 28
    assert _json(isoflop, "status", project.uri)["external"] == [{"name": "runs", "complete": 28}]
    project.storage.upload(tmp_path / "runs.csv", "runs.csv")
    there = _json(isoflop, "fit", f"{project.uri}/runs.csv")
    assert there["laws"] == _json(isoflop, "fit", tmp_path / "runs.csv")["laws"]
    message = isoflop("fit", f"{project.uri}/none.csv")[2]
    assert f"there is no file {project.uri}/none.csv" in message


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("ftp://host/p", "no storage is called ftp://"),
        ("s3://no-such-bucket/p", "there is no bucket 'no-such-bucket'"),
    ],
)
def test_a_place_that_cannot_be_is_refused_in_one_sentence(
    isoflop: Run, s3: str, location: str, message: str
) -> None:
    for verb in ("fit", "status", "report", "propose"):
        code, out, err = isoflop(verb, location)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1


def test_a_project_in_use_is_not_added_to(isoflop: Run, project: Project, tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text("params,flops,loss\n1e8,1e18,3\n")
    with hold(open_storage(project.uri), "isoflop run"):
        code, _, err = isoflop("add", project.uri, tmp_path / "runs.csv")
    assert code == 2
    assert f"another isoflop (process {os.getpid()} on" in err


OWN = """
from dataclasses import dataclass
from trainers.decoder_recipe import DecoderRecipe, Rates

@dataclass(frozen=True, kw_only=True)
class Mine(DecoderRecipe):
    def rates(self, shape, tokens):
        return Rates(batch_tokens=2**13, matrix=0.01, embedding=0.01, head=0.01)
"""


def test_a_project_is_read_where_its_recipes_module_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = {"name": "own", "recipe": "mine_alone:Mine", "trainer": "simulated",
             "budgets": [1e15, 1e16, 1e17]}  # fmt: skip
    (tmp_path / "mine_alone.py").write_text(OWN)
    plan = make_plan(parse_spec(sweep, source=tmp_path / "own.toml"))
    project = create_project(tmp_path / "p")
    project.save_plan(plan)
    monkeypatch.delitem(sys.modules, "mine_alone")
    (found,) = project.plans()
    assert found.planned == plan.planned
    rules = found.spec.recipe.rules
    assert rules.architecture == plan.spec.recipe.rules.architecture
    assert rules.min_steps == plan.spec.recipe.rules.min_steps
    monkeypatch.chdir(tmp_path)  # not even where it could be imported
    (there,) = project.plans()
    assert "mine_alone" not in sys.modules
    with pytest.raises(InputError, match=r"'mine_alone:Mine' is somebody's own, .* --sweep SWEEP"):
        there.spec.recipe.rules.resolve(plan.trials[0].shape, 1e9)


def test_a_corpus_that_changed_is_named_where_a_sweep_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan() -> Plan:
        sweep = {"name": "x", "corpus": {"kind": "files", "glob": "*.txt"}, "epochs": 1e6,
                 "budgets": [{"flops": 1e9, "widths": [4, 8, 12]}],
                 "shapes": {"depth": 2, "heads": 2, "context": 16}}  # fmt: skip
        return make_plan(parse_spec(sweep, source=tmp_path / "x.toml"))

    monkeypatch.setenv("ISOFLOP_CACHE", str(tmp_path / "cache"))
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text {i} " * 600)
    before = plan()
    project = create_project(tmp_path / "p")
    project.save_plan(before)
    project.ledger.write(before.trials[0], measurement(before.trials[0]))
    (tmp_path / "7.txt").write_text("another text " * 600)
    corpus._loaded.cache_clear()
    after = plan()
    hashes = f"{after.trials[0].corpus.combined_hash}, was {before.trials[0].corpus.combined_hash}"
    with pytest.raises(InputError, match=rf"differs in the corpus's text \({hashes}, by hash\)"):
        project.save_plan(after)
