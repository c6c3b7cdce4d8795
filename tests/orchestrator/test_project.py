"""Projects: where they are, what they keep, and what they refuse."""

from pathlib import Path

import pytest

from analysis.errors import InputError
from orchestrator.planner import Plan, make_plan
from orchestrator.project import create_project, directory_for, missing, open_project
from orchestrator.spec import parse_spec


def _plan(name: str = "x", **changes: object) -> Plan:
    spec = {"name": name, "trainer": "simulated", "budgets": [1e10, 1e11], "sizes": 4, **changes}
    return make_plan(parse_spec(spec, source=Path("x.toml")))


def test_a_sweep_runs_into_the_project_it_lies_in_else_a_new_one(tmp_path: Path) -> None:
    project = create_project(tmp_path / "p")
    assert directory_for(project.path / "next.toml", "other") == project.path
    assert directory_for(tmp_path / "sweep.toml", "name") == Path("projects/name")


def test_a_project_holds_any_number_of_plans(tmp_path: Path) -> None:
    project = create_project(tmp_path / "p")
    one, two = _plan("one"), _plan("two", budgets=[1e12])
    project.save_plan(one)
    project.save_plan(two)
    assert {plan.name: plan for plan in project.plans()} == {"one": one, "two": two}
    assert sorted(set(project.budgets().values())) == [1e10, 1e11, 1e12]
    assert len(missing(project, one)) == 8


def test_a_plan_may_grow_but_not_change_under_its_name(tmp_path: Path) -> None:
    project = create_project(tmp_path / "p")
    project.save_plan(_plan())
    project.save_plan(_plan())
    project.save_plan(_plan(budgets=[1e10, 1e11, 1e12]))
    assert len(project.plans()[0].planned) == 12
    with pytest.raises(InputError, match="another sweep called 'x', with 12 observations"):
        project.save_plan(_plan(recipe="mini-adamw", simulated={"noise": 0.5}))
    assert len(project.plans()[0].planned) == 12


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to the project directory"):
        create_project(tmp_path / "file" / "p")


def test_what_is_no_project_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no project at"):
        open_project(tmp_path)
