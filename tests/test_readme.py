"""What the README shows works: its sweep is planned, its commands and files exist."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from orchestrator.cli import app
from orchestrator.planner import make_plan
from orchestrator.spec import read_spec

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    (isoflop .*?)(?:\s+#.*)?$", README, flags=re.MULTILINE)


def test_the_sweep_of_the_readme_is_planned_on_text_of_ones_own(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "mine.toml").write_text(example)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "book.txt").write_text("It was a dark and stormy night. " * 200_000)
    plan = make_plan(read_spec(tmp_path / "mine.toml"))
    assert len(plan.planned) == 15 + 4
    assert [p.role for p in plan.planned[15:]] == ["probe"] * 4


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_readme_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every verb and option exists and takes what it is given."""
    group = typer.main.get_command(app)
    _, verb, *arguments = shlex.split(command)
    parsed = group.commands[verb].make_context(verb, arguments)
    assert parsed.params


def test_the_readme_has_commands_and_its_files_exist() -> None:
    assert len(COMMANDS) >= 5
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_examples_that_the_readme_names_are_there() -> None:
    for name in ("mini", "simulated", "cluster"):
        assert f"{name}.toml" in README
        assert read_spec(ROOT / f"examples/{name}.toml").name == name
