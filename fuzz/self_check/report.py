"""The results of a self-check: a table on the terminal, and a page of the documentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich import box
from rich.console import Console
from rich.table import Table

from fuzz.defects.catalogue import CATALOGUE
from fuzz.defects.defect import Defect
from fuzz.defects.device import DEVICE
from fuzz.files import write_whole
from fuzz.reporting import markdown
from fuzz.reporting.bar import bar, say
from fuzz.self_check.overview import CAMPAIGNS, add_campaigns, overview
from fuzz.self_check.record import ROOT, Hunt, Record, load
from fuzz.self_check.run import NOISE_FAMILIES, SelfCheckProgress, smallest

PAGE_WIDTH = 120  # columns there
COLUMNS = ("defect", "found", "by", "median", "worst", "first sign", "smallest case")
NUMBER_COLUMNS = ("median", "worst", "first sign")
MEANING = (
    "found: number of seeds with which an expected check finds the defect. by: the expected checks that found the "
    "defect. median, worst: number of cases until an expected check fails, over the seeds. first sign: median number "
    "of cases until any check fails. smallest case: tokens x heads of the shrunk case; <= means that shrinking ran out "
    "of time."
)


@dataclass(frozen=True)
class Figures:
    """Of one defect, over the seeds. Counts are of cases; a seed that did not find it counts as one more than all."""

    defect: Defect
    hunts: tuple[Hunt, ...]
    shrunk: dict | None
    most: int

    @property
    def found(self) -> int:
        return sum(hunt.right is not None for hunt in self.hunts)

    @property
    def counts(self) -> list[int]:
        return [self.most + 1 if hunt.right is None else hunt.right for hunt in self.hunts]

    @property
    def median(self) -> float:
        return median(self.counts)

    @property
    def first_sign(self) -> float:
        return median(self.most + 1 if hunt.found is None else hunt.found for hunt in self.hunts)

    @property
    def by(self) -> str:
        """The checks that should find it and did, most often first."""
        checks = Counter(check for hunt in self.hunts for check in hunt.right_by)
        return ", ".join(check for check, _ in checks.most_common())

    @property
    def missed(self) -> bool:
        return self.found < len(self.hunts)

    def row(self) -> tuple[str, ...]:
        size = "" if self.shrunk is None else f"{self.shrunk['tokens']} x {self.shrunk['heads']}"
        size = size if self.shrunk is None or self.shrunk["finished"] else f"<= {size}"
        counts = (self.cases(self.median), self.cases(max(self.counts)), self.cases(self.first_sign))
        return (self.defect.name, f"{self.found} of {len(self.hunts)}", self.by or "nothing", *counts, size)

    def cases(self, count: float) -> str:
        return f"more than {self.most}" if count > self.most else f"{count:g}"


def figures(record: Record, names: Iterable[str]) -> list[Figures]:
    """Of those of the defects for which anything is known, in the order of the catalogue."""
    return [
        Figures(defect, tuple(hunts[seed] for seed in sorted(hunts)), record.shrunk.get(name), record.cases)
        for name, defect in {**CATALOGUE, **DEVICE}.items()
        if name in names and (hunts := record.hunts.get(name))
    ]


def table(found: list[Figures]) -> Table:
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        result.add_column(column, no_wrap=column != "by", justify="right" if column in NUMBER_COLUMNS else "left")
    for each in found:
        result.add_row(*each.row(), style="red" if each.missed else "")
    return result


def in_words(record: Record, found: list[Figures]) -> list[str]:
    """The figures in a few lines."""
    if not found:
        return ["no defect was looked for to the end"]
    missed = [each.defect.name for each in found if each.missed]
    slowest = max(found, key=lambda each: max(each.counts))
    lines = [
        f"{len(found) - len(missed)} of {len(found)} planted defects found with every seed, each by a check that "
        f"should find it; median {median(each.median for each in found):g} cases, "
        f"worst {slowest.cases(max(slowest.counts))} ({slowest.defect.name})"
    ]
    if missed:
        lines.append(f"not found with every seed: {', '.join(missed)}")
    for target, alarms in record.alarms.items():
        skipped = f" ({alarms.skipped} skipped)" if alarms.skipped else ""
        lines.append(f"false alarms: {len(alarms.failures)} in {alarms.judged} cases of {target}{skipped}")
    return lines


def passed(record: Record, found: list[Figures]) -> bool:
    alarmed = any(alarms.failures for alarms in record.alarms.values())
    return bool(found) and not any(each.missed for each in found) and not alarmed


def noise_rows(record: Record) -> Iterable[tuple[str, str, str]]:
    for family in (each for each in NOISE_FAMILIES if each in record.noise):  # whichever was done first
        cells = []
        for where in ("out", "state"):
            found = smallest(record, family, where)
            cells.append("none" if found is None else f"2^-{found[0]} = {2.0 ** -found[0]:.2%}, after {found[1]}")
        yield (family, *cells)


def page_of(record: Record, data: Path | None = None) -> str:
    """The page: everything in the record. data: the folder of docs/data, for the table of all other numbers."""
    found = figures(record, record.hunts)
    command = "python -m fuzz self-check" + " --device" * (record.profile == "gpu")
    lines = [
        "# The self-check",
        "",
        "The self-check measures the judge. It plants defects in a correct implementation, and counts the cases until "
        f"a check finds each defect. `{command}` writes this page from its JSON file. All defects are in "
        "`fuzz/defects`. Every defect is also a target: `python -m fuzz run --target fuzz.defects:scale_twice`.",
        "",
        *(f"- {line[0].upper()}{line[1:]}." for line in in_words(record, found)),
        f"- Cases of the profile {record.profile}, at most {record.cases} for each defect and seed; digest of the "
        f"sources `{record.sources}`.",
        "",
        *(["## All numbers, each with its command", "", overview(record, data), ""] if data else []),
        "## Planted defects",
        "",
        MEANING.replace("x heads", "times heads"),
        "",
        markdown.table(COLUMNS, (each.row() for each in found)),
        "",
        "## What each one is",
        "",
        markdown.table(
            ("defect", "kind", "what is wrong", "stands for"),
            (
                (d.name, d.kind, d.sentence, f"{d.failure} ..." if d.failure else "")
                for d in (each.defect for each in found)
            ),
        ),
        "",
    ]
    if record.noise:
        lines += [
            "## The smallest error that is seen",
            "",
            "Noise is added to the model's outputs before rounding, or to its final state. The noise of an element is "
            "normally distributed. Its standard deviation is a power of two times the element. Every call has the same "
            "noise. The table has the smallest relative noise that the accuracy check finds within "
            f"{record.cases} cases, and the number of cases until the check fails.",
            "",
            markdown.table(("families", "outputs", "final state"), noise_rows(record)),
            "",
        ]
    if record.alarms:
        lines += [
            "## False alarms",
            "",
            markdown.table(
                ("correct target", "cases", "skipped", "failed"),
                ((name, f"{a.judged}", f"{a.skipped}", f"{len(a.failures)}") for name, a in record.alarms.items()),
            ),
            "",
        ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------- on a screen


def screen() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PAGE_WIDTH)


@contextmanager
def live() -> Iterator[Callable[[SelfCheckProgress], None]]:
    """Yields the `show` of `fuzz.self_check.run.run_self_check`."""
    with bar(screen(), "done") as show:
        yield lambda progress: show(progress.done, progress.steps, progress.doing or "starting")


def write_page(file: Path, record: Record) -> Path:
    """The page of a record's file: beside it, or above docs/data with the table of all numbers. Returns its path."""
    data = file.parent if file.parent.name == "data" else None
    page = (file.parent.parent if data else file.parent) / f"{file.stem}.md"
    write_whole(page, page_of(record, data))
    return page


def add_to_table(campaigns: Sequence[Path], file: Path | None) -> str:
    """Adds campaigns to docs/data and writes the page again; or to another file alone. Returns what is written."""
    docs = ROOT / "docs"
    add_campaigns(file or docs / "data" / CAMPAIGNS, campaigns)
    if file:
        return f"written: {file}"
    record = docs / "data" / "self_check.json"
    return f"written: {docs / 'data' / CAMPAIGNS}, {write_page(record, load(record))}"


def conclude(progress: SelfCheckProgress) -> bool:
    """Prints table and figures, and writes the page beside the file; whether what is known is as it should be."""
    console, plan, record = screen(), progress.plan, progress.record
    found = figures(record, plan.names)
    console.print(table(found))
    console.print(MEANING, highlight=False)
    if progress.resumed:
        say(console, f"{progress.resumed} results are of an earlier run, in {plan.out}")
    for line in in_words(record, found):
        say(console, line)
    if progress.interrupted:
        say(console, f"interrupted; python -m fuzz self-check --out {plan.out} continues")
    if plan.out.exists():
        page = write_page(plan.out, record)
        say(console, f"written: {plan.out}, {page}")
    return passed(record, found)
