"""The board: counts, the estimate of time left, and what is shown in and outside a terminal."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from cluster.capacity import estimated_seconds
from orchestrator.planner import make_plan
from orchestrator.progress import Board, Progress
from orchestrator.spec import parse_spec

SPEC = {
    "name": "board",
    "trainer": "simulated",
    "budgets": [1e10, 1e11],
    "sizes": 3,
    "simulated": {"seconds": 10.0},
}


@pytest.fixture
def board() -> Board:
    return Board(make_plan(parse_spec(SPEC, source=Path("s.toml"))), slots=2)


def _shown(board: Board, *, terminal: bool) -> tuple[Progress, io.StringIO]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100)
    return Progress(board, console), file


def test_time_left_is_paced_by_what_was_measured(board: Board) -> None:
    progress, _ = _shown(board, terminal=False)
    first, second, *rest = board.cells
    assert board.seconds_left() is None
    progress.measured(first, "complete", 2.0, 20.0)  # twice as slow as expected
    assert board.seconds_left() == pytest.approx(5 * 20 / 2)
    progress.running(second[0], fraction=0.5, loss=2.5)
    assert board.seconds_left() == pytest.approx((4 * 20 + 10) / 2)
    for key in (second, *rest[:-1]):
        progress.measured(key, "complete", 2.0, 20.0)
    assert board.seconds_left() == pytest.approx(20)  # one trial cannot use two slots


def test_flops_done_are_those_of_the_trials(board: Board) -> None:
    progress, _ = _shown(board, terminal=False)
    large = [k for k, c in board.cells.items() if c.planned.budget == 1e11]
    for key in large:
        progress.measured(key, "complete", 2.0, 1.0)
    assert board.flops_fraction == pytest.approx(10 / 11, rel=0.01)
    assert board.done == 3


def test_what_the_ledger_holds_is_not_counted_as_time(board: Board) -> None:
    outcomes = {c.planned.id: "complete" for c in board.cells.values()}
    board.know(outcomes, dict.fromkeys(board.cells, 2.0))
    assert (board.done, board.flops_fraction) == (6, pytest.approx(1.0))
    assert board.seconds_left() is None


def test_outside_a_terminal_it_prints_a_line_a_trial(board: Board) -> None:
    progress, file = _shown(board, terminal=False)
    key = next(iter(board.cells))
    with progress:
        progress.measured(key, "complete", 2.5, 3.0)
        progress.measured(list(board.cells)[1], "diverged", None, 1.0)
        progress.measured(list(board.cells)[2], "diverged", 5.3484, 1.0)
    lines = file.getvalue().splitlines()
    assert lines[0] == "board: 6 trials, 3.3e+11 FLOPs; 6 to train"
    assert "1/6  1e+10 FLOPs  width 8" in lines[1]
    assert "loss 2.5000, 3.0 s" in lines[1]
    assert "diverged, 1.0 s" in lines[2]
    assert "diverged at a loss of 5.3484, 1.0 s" in lines[3]
    assert "\x1b" not in file.getvalue()


def test_a_terminal_shows_every_state_and_marks_the_best(board: Board) -> None:
    progress, file = _shown(board, terminal=True)
    a, b, c, d, *_ = board.cells
    progress.measured(a, "complete", 2.75, 1.0)
    progress.measured(b, "complete", 2.5, 1.0)
    progress.running(c[0], fraction=0.25, loss=3.125)
    progress.failed(d[0])
    assert board.best() == {b}
    with progress:
        pass
    text = file.getvalue()
    for piece in ("3 of 6 trials", "2.750", "3.125 25%", "failed", "1e+11", "·"):
        assert piece in text
    assert "\x1b[1;30;42m2.500" in text


def test_the_estimate_of_a_simulated_trial_is_what_it_is_told(board: Board) -> None:
    for cell in board.cells.values():
        assert estimated_seconds(cell.planned.trial) == 10.0
