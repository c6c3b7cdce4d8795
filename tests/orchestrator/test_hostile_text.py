"""Names, errors and logs that somebody else wrote reach the terminal and figures as mere text."""

import csv
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.live import Live
from rich.text import Text

from analysis.visible import UNSEEN, visible
from orchestrator.lasting import LastingConsole
from orchestrator.lease import current, hold
from orchestrator.planner import make_plan
from orchestrator.progress import Board, Progress
from orchestrator.project import Project, create_project
from orchestrator.spec import parse_spec
from tests.waiting import wait

Run = Callable[..., tuple[int, str, str]]
CLIPBOARD = "\x1b]52;c;cm0gLXJm\x07"
"""OSC 52, by which a program writes the clipboard of who sits at the terminal."""
HOSTILE = f"loss {CLIPBOARD}\x9b2J\u202e\x7f [/y] [bold]"
SHOWN = "loss \\x1b]52;c;cm0gLXJm\\x07\\x9b2J\\u202e\\x7f [/y] [bold]"
LIMIT = 120
"""Seconds that a command may take on a machine that is busy."""


def _table(path: Path, loss: str) -> Path:
    """Three valleys of a law, the loss under that name."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["params", "tokens", loss])
        for flops in (1e18, 3e18, 1e19):
            for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
                n = (flops / 120) ** 0.5 * factor
                d = flops / 6 / n
                rows.writerow([n, d, 1.7 + 400 / n**0.34 + 2000 / d**0.36])
    return path


def _isoflop(*arguments: object) -> str:
    """Everything that the real command line prints, where it takes its output for a terminal."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *map(str, arguments)],
        env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "400"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=LIMIT,
    )
    return done.stdout.decode()


def _require_mere_text(out: str) -> None:
    """Nothing but rich's own colours (CSI ... m) is in an output that a terminal would obey."""
    signs = out.replace("\x1b[", "").replace("\r\n", "\n")
    assert not UNSEEN.search(signs)
    assert all(part[: part.find("m")].replace(";", "").isdigit() for part in _sequences(out))


def _sequences(out: str) -> list[str]:
    return out.split("\x1b[")[1:]


def test_control_characters_are_shown_and_words_of_any_script_stay() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("\ud800 \u2028") == "\\ud800 \\u2028"
    words = "perte α → 損失 פסד 👩‍🚀\tand\nlines"
    assert visible(words) == words


@pytest.mark.parametrize("verb", ["fit", "forecast", "diagnose"])
def test_a_column_of_a_table_obeys_nobody(tmp_path: Path, verb: str) -> None:
    table = _table(tmp_path / "runs.csv", HOSTILE)
    options = {"fit": [], "forecast": [], "diagnose": ["--params", "1e8", "--tokens", "1e9"]}
    out = _isoflop(verb, table, "--columns", f"loss={HOSTILE}", *options[verb])
    _require_mere_text(out)
    assert "\\x1b]52" in out or verb != "fit"


def test_an_error_that_quotes_a_table_obeys_nobody(tmp_path: Path) -> None:
    out = _isoflop("fit", _table(tmp_path / "runs.csv", HOSTILE))
    _require_mere_text(out)
    assert SHOWN in out  # the columns that there are


def test_a_traceback_that_quotes_a_table_obeys_nobody(tmp_path: Path) -> None:
    out = _isoflop("--debug", "fit", _table(tmp_path / "runs.csv", HOSTILE))
    _require_mere_text(out)
    assert "Traceback" in out
    assert SHOWN in out


def test_a_mistake_of_ours_that_quotes_others_obeys_nobody(
    isoflop: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError(HOSTILE)

    monkeypatch.setattr("orchestrator.project.open_project", fail)
    code, out, err = isoflop("status", tmp_path)
    assert (code, out) == (1, "")
    assert f"ZeroDivisionError: {SHOWN}" in err
    _require_mere_text(err)


@pytest.mark.parametrize("name", ["x [/y]", ":boom: [link=http://evil]", HOSTILE])
def test_runs_may_be_called_anything(tmp_path: Path, name: str) -> None:
    table, project = _table(tmp_path / "runs.csv", "loss"), tmp_path / "project"
    assert visible(name) in _isoflop("add", project, table, "--name", name)
    out = _isoflop("status", project)
    _require_mere_text(out)
    assert f"{visible(name)} (external)" in out
    assert "15" in out


@pytest.fixture
def poisoned(tmp_path: Path) -> Iterator[Project]:
    """A project in whose driver's purpose, nodes and errors somebody put control characters."""
    project = create_project(tmp_path / "project")
    spec = {"name": "s", "trainer": "simulated", "budgets": [1e10], "sizes": 4}
    plan = make_plan(parse_spec(spec, source=Path("s.toml")))
    project.save_plan(plan)
    with hold(project.storage, HOSTILE) as lease:
        first, second = (
            project.attempts.begin(trial, driver=lease.generation, node=HOSTILE, pid=1)
            for trial in plan.trials[:2]
        )
        project.attempts.fail(first, kind="raised", error=HOSTILE, traceback="", log="", step=1)
        assert second.open
        lease.note({"stopping": False, "running": {}}, at_once=True)
        wait(lambda: current(project.storage).note)
        yield project


def test_errors_and_hosts_of_a_project_obey_nobody(poisoned: Project) -> None:
    out = _isoflop("status", poisoned.uri)
    _require_mere_text(out)
    assert out.count("\\x1b]52;c;cm0gLXJm\\x07") == 3  # the node twice, and the error


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux, a real terminal")
def test_a_real_terminal_keeps_its_clipboard_and_title(poisoned: Project, tmp_path: Path) -> None:
    """OSC 52 in a project's records fills no paste buffer of tmux; a bare cat of it would."""
    tmux = ["tmux", "-S", str(tmp_path / "socket"), "-f", "/dev/null"]
    plain, over = tmp_path / "plain", tmp_path / "over"
    plain.write_text(HOSTILE)
    script = tmp_path / "show.sh"
    python = f"{sys.executable} -m orchestrator"
    script.write_text(
        f"{python} status {poisoned.uri}; touch {over}.status; read x; cat {plain}; sleep {LIMIT}\n"
    )

    def ask(*arguments: str) -> str:
        done = subprocess.run([*tmux, *arguments], capture_output=True, text=True, timeout=LIMIT)
        return done.stdout

    try:
        ask("new-session", "-d", "-x", "250", "-y", "50", "sleep", str(3 * LIMIT))
        ask("set-option", "-s", "set-clipboard", "on")
        ask("new-window", "sh", str(script))
        wait(lambda: over.with_suffix(".status").exists(), LIMIT)
        time.sleep(0.5)  # tmux reads what was written
        assert ask("list-buffers") == ""
        assert "\\x1b]52" in ask("capture-pane", "-p", "-J")
        ask("send-keys", "Enter")
        wait(lambda: ask("list-buffers") != "", LIMIT)
        assert ask("show-buffer").strip() == "rm -rf"  # so the terminal would have obeyed
    finally:
        ask("kill-server")


def test_the_live_view_obeys_nobody() -> None:
    spec = {"name": "s", "trainer": "simulated", "budgets": [1e10], "sizes": 3}
    plan = make_plan(parse_spec(spec, source=Path("s.toml")))
    file = io.StringIO()
    console = LastingConsole(file=file, force_terminal=True, width=200)
    with Progress(Board(plan), console) as progress:
        progress.doing(HOSTILE)
        progress.joined(HOSTILE, 2)
        progress.trouble(HOSTILE)
        progress.attempt_failed(plan.trials[0].key, HOSTILE, [HOSTILE], again=True)
    with Live(Text(HOSTILE), console=console):
        pass
    out = file.getvalue()
    for harmful in ("\x1b]52", "\x9b", "\u202e", "\x7f"):
        assert harmful not in out
    assert out.count("\\x1b]52") >= 5


@pytest.mark.parametrize("loss", [r"$\frac{1}$", r"\$\frac{1}\$ $", HOSTILE])
def test_a_loss_is_no_formula_of_a_figure(tmp_path: Path, loss: str) -> None:
    table, page = _table(tmp_path / "runs.csv", loss), tmp_path / "report.html"
    out = _isoflop("report", table, "--columns", f"loss={loss}", "-o", page)
    _require_mere_text(out)
    assert "</html>" in page.read_text()
