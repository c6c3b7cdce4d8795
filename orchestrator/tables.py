"""How tables and times look in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

WORDS = frozenset(
    {"", "by", "law", "status", "where", "widths", "plan", "on", "why"}
    | {"running trial", "attempt without a row", "task", "metric"}
)
"""Columns that hold words."""


def plain_table(*columns: str) -> Table:
    """A plain table: columns of words on the left, of numbers on the right."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in WORDS else "right")
    return table


def show_table(console: Console, title: str, table: Table) -> None:
    """A table under its title, which may be the wider of the two."""
    console.print(Text(title, style="bold"))
    console.print(table)


def clock(seconds: float) -> str:
    """A time as minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
