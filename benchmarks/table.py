"""Tables on the console: with rich where it is installed, aligned text where not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Table:
    """The first column is text, the others are numbers. A cell that begins with "!" is shown as bad, without it."""

    header: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def print(self) -> None:
        try:
            from rich import box
            from rich.console import Console
            from rich.table import Table as RichTable
            from rich.text import Text
        except ImportError:
            print(self.text(), flush=True)
            return
        table = RichTable(box=box.SIMPLE)
        for i, name in enumerate(self.header):
            table.add_column(name, justify="right" if i else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*(Text(cell.lstrip("!"), style="bold red" if cell.startswith("!") else "") for cell in row))
        console = Console()
        # In a log a table is as wide as it needs; a terminal has the width it has.
        (console if console.is_terminal else Console(width=max(console.width, 160))).print(table)

    def text(self) -> str:
        plain = [[f"{cell[1:]} !" if cell.startswith("!") else cell for cell in row] for row in self.rows]
        columns = list(zip(self.header, *plain, strict=True))
        widths = [max(map(len, column)) for column in columns]
        lines = [self.header, ["-" * width for width in widths], *plain]
        return "\n".join("  ".join(self._aligned(line, widths)).rstrip() for line in lines)

    @staticmethod
    def _aligned(line: Sequence[str], widths: Sequence[int]) -> list[str]:
        first, *others = zip(line, widths, strict=True)
        return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
