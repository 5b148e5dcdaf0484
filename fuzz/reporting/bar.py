"""Live progress of a command: a bar on a terminal, and elsewhere (a log) a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

INTERVAL = 10.0  # seconds between two lines where there is no terminal


def say(console: Console, text: str, **options) -> None:
    """Prints text as it is, a line for each line of it, however narrow the terminal."""
    console.print(text, soft_wrap=True, highlight=False, markup=False, **options)


@contextmanager
def bar(console: Console, unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yields `show(done, total, doing)`, with a total of 0 while it is not known. unit: what is counted."""
    if not console.is_terminal:
        shown_at = time.monotonic()

        def line(done: int, total: int, doing: str) -> None:
            nonlocal shown_at
            if time.monotonic() - shown_at >= INTERVAL:
                shown_at = time.monotonic()
                say(console, f"{done}/{total or '?'} {unit}, {doing}")

        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def advance(done: int, total: int, doing: str) -> None:
            progress.update(task, total=total or None, completed=done, description=escape(doing))

        yield advance
