"""Tables on the console."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text


@dataclass
class Table:
    """The first column is text, the others are numbers. A cell that begins with "!" is shown as bad, without it."""

    header: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def print(self) -> None:
        table = RichTable(box=box.SIMPLE)
        for i, name in enumerate(self.header):
            table.add_column(name, justify="right" if i else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*(Text(cell.lstrip("!"), style="bold red" if cell.startswith("!") else "") for cell in row))
        console = Console()
        # In a log a table is as wide as it needs; a terminal has the width it has.
        (console if console.is_terminal else Console(width=max(console.width, 160))).print(table)
