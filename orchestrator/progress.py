"""What a person sees while a sweep runs: a board of trial states, live or as plain lines."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Literal

from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from analysis.observations import ObservationId
from cluster.capacity import estimated_seconds
from orchestrator.planner import Plan, Planned
from orchestrator.tables import clock
from trainers.flops import trial_flops

State = Literal["waiting", "running", "complete", "diverged", "failed"]

STYLES: dict[State, str] = {
    "waiting": "dim",
    "running": "yellow",
    "complete": "green",
    "diverged": "red",
    "failed": "bold red",
}


REPEAT_SECONDS = 60.0
"""Before the same trouble is told of again."""
LOG_LINES, LOG_WIDTH = 6, 160
"""Number of last lines shown of a failed trial's log, and of characters of each."""


def log_lines(log: str) -> tuple[str, ...]:
    """Return the last lines of a log that have words in them, cut to a width."""
    lines = [line.rstrip() for line in log.splitlines() if line.strip()]
    return tuple(
        line if len(line) <= LOG_WIDTH else f"{line[:LOG_WIDTH]} ..." for line in lines[-LOG_LINES:]
    )


@dataclass
class Cell:
    """One observation on the board."""

    planned: Planned
    state: State = "waiting"
    loss: float | None = None
    """Latest training loss while running, held-out loss at the end; nats/token."""
    fraction: float = 0.0
    """Of its FLOPs done."""
    seconds: float | None = None
    """Wall time, if trained in this run."""

    @property
    def open(self) -> bool:
        """Whether it is still to be measured."""
        return self.state in ("waiting", "running")

    @cached_property
    def expected(self) -> float:
        """Seconds on one core: in proportion, how long it takes."""
        trial = self.planned.trial
        return estimated_seconds(trial) * self.flops / trial_flops(trial)

    @cached_property
    def flops(self) -> float:
        """Of its training, beyond that of the trial's earlier horizons."""
        return self.planned.flops_spent


@dataclass
class Board:
    """States of all observations of a plan. Plain data; `Progress` shows it."""

    plan: Plan
    slots: int = 1
    """Trials that are trained at once, about."""
    cells: dict[ObservationId, Cell] = field(init=False)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.cells = {p.id: Cell(p) for p in self.plan.planned}

    @property
    def done(self) -> int:
        """Observations that have ended."""
        return sum(c.state in ("complete", "diverged", "failed") for c in self.cells.values())

    @property
    def flops_fraction(self) -> float:
        """Of the plan's FLOPs that have been trained."""
        cells = self.cells.values()
        return sum(c.fraction * c.flops for c in cells) / sum(c.flops for c in cells)

    def know(
        self, outcomes: Mapping[ObservationId, str], losses: Mapping[ObservationId, float]
    ) -> None:
        """Enter what the ledger holds already: states and losses."""
        for name, cell in self.cells.items():
            state = outcomes[name]
            if state in ("complete", "diverged"):
                cell.state = "complete" if state == "complete" else "diverged"
                cell.loss, cell.fraction = losses.get(name), 1.0

    def of(self, key: str) -> list[Cell]:
        """What a trial measures in this run, by horizon."""
        cells = [cell for (k, _), cell in sorted(self.cells.items()) if k == key]
        return [c for c in cells if c.open or c.seconds is not None]

    def seconds_left(self) -> float | None:
        """Estimate from the trials ended so far; None before the first."""
        timed = [c for c in self.cells.values() if c.seconds is not None]
        expected = sum(c.expected for c in timed)
        if not timed or expected <= 0:
            return None
        pace = sum(c.seconds or 0.0 for c in timed) / expected
        left = [
            pace * c.expected * (1 - c.fraction)
            for c in self.cells.values()
            if c.state in ("waiting", "running")
        ]
        return max(sum(left) / self.slots, max(left, default=0.0))

    def best(self) -> set[ObservationId]:
        """The lowest loss of each budget; probes, which are no part of its valley, left out."""
        best: dict[float, Cell] = {}
        for cell in self.cells.values():
            budget = cell.planned.budget
            if cell.state != "complete" or cell.loss is None or cell.planned.role == "probe":
                continue
            if budget not in best or cell.loss < (best[budget].loss or 0.0):
                best[budget] = cell
        return {cell.planned.id for cell in best.values()}


class Progress:
    """Shows a board: live in a terminal, else a line a trial. Use as a context manager."""

    def __init__(self, board: Board, console: Console) -> None:
        self.board = board
        self.console = console
        self._doing = ""
        self._told: dict[str, float] = {}
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4)

    def __enter__(self) -> Progress:
        left = len(self.board.cells) - self.board.done
        if self.console.is_terminal and left:
            self._live.start()
        else:
            plan = self.board.plan
            self.console.print(
                f"{plan.name}: {plan.counted}, {plan.flops:.3g} FLOPs; "
                + (f"{left} to train" if left else "all measured")
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.stop()

    def running(self, key: str, fraction: float = 0.0, loss: float | None = None) -> None:
        """A trial has started, or has come so far in what it has to do."""
        self._doing = ""
        cells = self.board.of(key)
        done = fraction * sum(cell.flops for cell in cells)
        first = True
        for cell in cells:
            if cell.open:
                cell.fraction = min(1.0, max(0.0, done / cell.flops))
                cell.state = "running" if first or done > 0 else "waiting"
                cell.loss = loss if cell.state == "running" else None
                first = False
            done -= cell.flops

    def doing(self, text: str) -> None:
        """What goes on before the first trial, shown until then."""
        self._doing = text

    def joined(self, cluster: str, slots: int) -> None:
        """What there is to train on, and how many trials fit on it at once, about."""
        self.board.slots = slots
        self.say(f"on {cluster}: about {slots} trial{'s' * (slots != 1)} at once", style="dim")

    def say(self, text: str, *, style: str = "yellow") -> None:
        """A line of news, above the live view."""
        self.console.print(Text(text, style=style))

    def trouble(self, text: str) -> None:
        """Something that many trials may report again and again until it is over."""
        now = time.monotonic()
        if now - self._told.get(text, -REPEAT_SECONDS) >= REPEAT_SECONDS:
            self._told[text] = now
            self.say(text)

    def attempt_failed(
        self, key: str, reason: str | None, log: Sequence[str], *, again: bool
    ) -> None:
        """An attempt at a trial failed, and whether another one follows; lines of its log.

        Without a `reason` it is one that was shown before.
        """
        cells = self.board.of(key)
        if cells:
            planned = cells[-1].planned
            where = f"width {planned.trial.shape.width} at {planned.budget:.3g} FLOPs"
        else:
            where = f"trial {key}"
        alike = " alike" if reason is None else ""
        then = ", and is tried again" if again else ""
        why = "" if reason is None else f": {reason}"
        self.say(f"{where} failed{alike}{then}{why}", style="red")
        for line in log:
            self.say(f"  | {line}", style="dim")

    def waiting(self, key: str) -> None:
        """A trial has to start again."""
        for cell in self.board.of(key):
            if cell.open:
                self.board.cells[cell.planned.id] = Cell(cell.planned)

    def failed(self, key: str) -> None:
        """A trial has been given up."""
        for cell in self.board.of(key):
            if cell.open:
                self.measured(cell.planned.id, "failed", None, None)

    def measured(
        self, name: ObservationId, state: State, loss: float | None, seconds: float | None
    ) -> None:
        """An observation is made, or is not to be had."""
        cell = self.board.cells[name]
        cell.state, cell.loss, cell.seconds, cell.fraction = state, loss, seconds, 1.0
        if not self.console.is_terminal:
            p = cell.planned
            value = f"loss {loss:.4f}" if loss is not None else state
            if state == "diverged" and loss is not None:
                value = f"diverged at a loss of {loss:.4f}"
            took = f", {seconds:.1f} s" if seconds is not None else ""
            count = f"{self.board.done}/{len(self.board.cells)}"
            self.console.print(
                f"{count:>9}  {p.budget:.3g} FLOPs  width {p.trial.shape.width:<5} {value}{took}"
                f"{_left(self.board)}"
            )

    def _render(self) -> Group:
        board = self.board
        total, trials = len(board.cells), len(board.plan.trials)
        head = Text.assemble(
            (board.plan.name, "bold"),
            f"  {board.done} of {total} {'trials' if total == trials else 'observations'}  "
            f"{board.flops_fraction:.0%} of {board.plan.flops:.3g} FLOPs  "
            f"{clock(time.monotonic() - board.started)} elapsed{_left(board)}",
            (f"  {self._doing}", "dim"),
        )
        bar = ProgressBar(total=1.0, completed=board.flops_fraction, width=78)
        return Group(head, Padding(bar, (0, 0, 1, 0)), _matrix(board))


def _matrix(board: Board) -> Table:
    """A row a budget, a column a size: width above, loss below."""
    rows: dict[float, dict[int, list[Cell]]] = {}
    for cell in board.cells.values():
        by_width = rows.setdefault(cell.planned.budget, {})
        by_width.setdefault(cell.planned.trial.shape.width, []).append(cell)
    columns = max(len(row) for row in rows.values())
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("FLOPs", justify="right", style="bold")
    for _ in range(columns):
        table.add_column(justify="center", min_width=7)
    best = board.best()
    for budget in sorted(rows):
        cells = [_cell(rows[budget][width], best) for width in sorted(rows[budget])]
        table.add_row(f"{budget:.3g}", *cells)
    return table


def _cell(cells: list[Cell], best: set[ObservationId]) -> Text:
    """Width and state of a size; with replicates, the state of the least advanced."""
    width = cells[0].planned.trial.shape.width
    cells = [c for c in cells if c.planned.role != "probe"] or cells
    order: list[State] = ["failed", "diverged", "running", "waiting", "complete"]
    shown = min(cells, key=lambda c: order.index(c.state))
    style = STYLES[shown.state]
    if any(c.planned.id in best for c in cells):
        style = "bold black on green"
    losses = [c.loss for c in cells if c.loss is not None]
    below = {"diverged": "diverged", "failed": "failed", "waiting": "·"}.get(shown.state, "")
    if not below:
        below = f"{sum(losses) / len(losses):.3f}" if losses else "starts"
        below += f" {shown.fraction:.0%}" if shown.state == "running" and losses else ""
    return Text.assemble((f"d={width}", "dim"), "\n", (below, style))


def _left(board: Board) -> str:
    left = board.seconds_left()
    return "" if left is None or board.done == len(board.cells) else f"  about {clock(left)} left"
