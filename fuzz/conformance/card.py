"""Report cards: the results of `fuzz.conformance.conform` on the terminal and in files.

conform.json   everything, for programs; rows by id
conform.html   one page with everything inside, readable on a phone and without a network
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from fuzz.conformance.conform import FAIL, GRADES, PASS, UNREACHABLE, Card, CardFinding, Grade, summary_by_rung
from fuzz.conformance.ladder import RUNGS
from fuzz.files import lines_of, write_whole
from fuzz.reporting.bar import bar, say
from fuzz.reporting.display import origin_line
from fuzz.reporting.templates import flat, html_environment

JSON, PAGE = FILES = ("conform.json", "conform.html")


def write_card(card: Card, folder: Path) -> None:
    """Writes both files, each in one step. Raises OSError."""
    contents = {JSON: lines_of(card.to_dict(), depth=2), PAGE: page(card)}
    for name, content in contents.items():
        write_whole(folder / name, content)


# ---------------------------------------------------------------------------------------------------------------- text


def headline(card: Card) -> str:
    """One sentence: how it ended."""
    counts = {grade: card.count(grade) for grade in GRADES}
    tail = f"{counts[PASS]} pass, {counts[FAIL]} fail, {counts[UNREACHABLE]} unreachable"
    if card.status == "interrupted":
        return f"Interrupted after {len(card.rows)} of {card.total} rows: {tail}"
    if card.status == "broken":
        return f"The harness itself failed on a row, so this card says too little: {tail}"
    if not card.reached:
        return f"Nothing could be reached: {tail}"
    passed = "All failures are known" if counts[FAIL] else "All reachable rows pass"
    return f"{'Some rows fail' if card.failed else passed}: {tail}"


def score_text(score: float | None) -> str:
    return "" if score is None else f"{score:.2f}" if math.isfinite(score) else "not finite"


def count_text(row: Grade) -> str:
    """How many of a row's cases were judged, where it was not simply all of one."""
    return f"{row.judged}/{row.cases}" if row.judged < row.cases else str(row.cases)


def print_card(card: Card, console: Console) -> None:
    """The card: a line for each rung, and every row that does not pass."""
    line = partial(say, console)
    name = card.target.get("name", card.plan.target)
    if card.target.get("file"):
        line(origin_line(card.target))
    line(f"{name} on {card.target.get('device', '?')}, ladder {card.version}, seed {card.plan.seed}: {headline(card)}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rung")
    for grade in GRADES:
        table.add_column(grade, justify="right")
    table.add_column("error / bound beyond rounding", justify="right")
    for rung, counts, worst in summary_by_rung(card):
        shown = [str(counts[grade]) for grade in GRADES]
        table.add_row(rung, *shown, score_text(worst), style="red" if counts[FAIL] else None)
    console.print(table)
    for saved, rows in failures(card):
        known = f" (known: {saved.known})" if saved.known else ""
        line(f"fail{known}  {listed(rows, most=8)}", style=None if known else "red")
        line(f"      {saved.check}: {saved.detail}")
        if saved.repeats is not None:
            line("      intermittent: failed again {} of {} times on the same inputs".format(*saved.repeats))
        line(f"      {saved.case}{'' if saved.shrunk or saved.repeats else ' (not shrunk to the end)'}")
        line(f"      {saved.replay}")
    for reason, rows in unreachable(card).items():
        line(f"unreachable  {len(rows)} rows ({listed(rows)}): {reason}")
    for reason, rows in partly(card).items():
        line(f"in part  {len(rows)} rows pass on the supported cases only ({listed(rows)}): {reason}")
    for note in card.notes:
        line(f"note: {note}")
    for row in card.rows:
        if row.note:
            line(f"smaller  {row.id}: {row.note}")


def failures(card: Card) -> list[tuple[CardFinding, list[Grade]]]:
    """Every finding with the rows that it fails: one fault often fails many."""
    groups: dict[str, tuple[CardFinding, list[Grade]]] = {}
    for row in card.rows:
        for saved in row.findings:
            groups.setdefault(saved.folder, (saved, []))[1].append(row)
    return list(groups.values())


def unreachable(card: Card) -> dict[str, list[Grade]]:
    """The rows that could not be reached, by the reason."""
    return _by_reason(row for row in card.rows if row.grade == UNREACHABLE)


def partly(card: Card) -> dict[str, list[Grade]]:
    """The rows that pass on some of their cases, the others being unsupported, by the reason."""
    return _by_reason(row for row in card.rows if row.grade == PASS and row.reason)


def _by_reason(rows) -> dict[str, list[Grade]]:
    groups: dict[str, list[Grade]] = {}
    for row in rows:
        groups.setdefault(row.reason, []).append(row)
    return groups


def listed(rows: list[Grade], most: int = 4) -> str:
    """The ids of some rows; of a whole rung its name and their number."""
    rungs = Counter(row.rung for row in rows)
    if len(rows) > most:
        return ", ".join(f"{count} of {rung}" for rung, count in rungs.items())
    return ", ".join(row.id for row in rows)


@contextmanager
def live() -> Iterator[Callable[[Card, str], None]]:
    """Yields the `show` of `conform`."""
    with bar(Console(stderr=True), "rows") as show:
        yield lambda card, what: show(len(card.rows), card.total, what)


# ---------------------------------------------------------------------------------------------------------------- page


def page(card: Card) -> str:
    environment = html_environment(Path(__file__).parent)
    environment.filters.update(score=score_text, count=count_text, listed=listed)
    template = environment.get_template("card.html.j2")
    return template.render(
        card=card,
        headline=headline(card),
        failures=failures(card),
        rungs=[(rung, RUNGS[rung], counts, worst) for rung, counts, worst in summary_by_rung(card)],
        unreachable=unreachable(card),
        partly=partly(card),
        began=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(card.started)),
        environment=list(flat(card.environment)),
    )
