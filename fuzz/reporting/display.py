"""The terminal: live progress, the closing table, and results of a replay in words."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from fuzz.campaign import findings, store
from fuzz.campaign.job import Result
from fuzz.campaign.plan import Plan
from fuzz.campaign.progress import Finding, Progress
from fuzz.cases.case import Case
from fuzz.cases.families import FAMILIES
from fuzz.judging.verdict import told_apart
from fuzz.reporting.bar import INTERVAL, say
from fuzz.text import shortened

REFRESH = 0.25  # seconds between two pictures on a terminal
MOST_FINDINGS = 20  # in the closing summary; the report has them all


@dataclass
class Display:
    """Progress on a terminal as a live table, and elsewhere (a log) as a line now and then."""

    plan: Plan
    console: Console
    live: Live | None
    shown_at: float = 0.0
    named: bool = False  # whether it was said which file each target comes from
    announced: set[str] = field(default_factory=set)

    def say(self, text: str) -> None:
        say(self.console, text)

    def show(self, progress: Progress) -> None:
        if progress.tallies and not self.named:
            self.named = True
            for target in progress.targets:
                if target["unavailable"] is None:
                    self.say(origin_line(target) + ("" if target["name"] in progress.tested else "; a reference"))
        for finding in list(progress.findings.values()):
            if finding.id not in self.announced:
                self.announced.add(finding.id)
                self.say(f"{kind_of(progress, finding)}: {finding_line(finding)}")
        now = time.monotonic()
        if self.live is not None:
            if now - self.shown_at >= REFRESH:
                self.shown_at = now
                self.live.update(picture(progress), refresh=True)
        elif now - self.shown_at >= INTERVAL:
            self.shown_at = now
            shares = phase_shares(progress)
            self.say(headline(progress) + (f"; {shares}" if shares else ""))

    def summarise(self, progress: Progress) -> None:
        """The closing table, the findings, and where the time went."""
        self.say(headline(progress))
        self.console.print(tally_table(progress, skips=True))
        for target in progress.targets:
            if target["unavailable"] is not None:
                self.say(f"not run: {target['unavailable']}")
        for name, tally in progress.tallies.items():
            if tally.retired:
                self.say(f"retired: {name}, after it cost {tally.deaths} processes")
        if progress.replays:
            again = sum(outcome == "failed" for outcome in progress.replays.values())
            self.say(f"findings of earlier campaigns judged first: {len(progress.replays)}, failed again: {again}")
        every = [*progress.verdict, *progress.of_references, *progress.known_to_fail]
        shown = every[:MOST_FINDINGS]
        if len(shown) < len(every):
            self.say(f"{len(every)} findings, of which the first {len(shown)}:")
        for finding in shown:
            whole = finding.state in ("shrunk", findings.INTERMITTENT)
            state = "" if whole else f" ({finding.state}; python -m fuzz minimize continues)"
            self.say(f"{kind_of(progress, finding)}: {finding_line(finding)}")
            self.say(f"  failed {finding.count} times{state}")
            self.say(f"  {describe_case(finding.failure.case)}")
            self.say(f"  python -m fuzz replay {finding.folder}")
        if shares := phase_shares(progress):
            self.say(f"time of the workers: {shares}")
        for note in (*progress.notes, *target_notes(progress)):
            self.say(f"note: {note}")
        if progress.status == "interrupted" and (progress.plan.out / store.STORE_FILE).exists():
            self.say(f"interrupted; python -m fuzz run --resume {progress.plan.out} continues")
        if progress.plan.out.exists():
            self.say(f"run folder: {progress.plan.out}")


@contextmanager
def live(plan: Plan) -> Iterator[Display]:
    console = Console()
    how_long = f"{plan.cases} cases" if plan.budget is None else f"{plan.budget:g} s"
    workers = f"{plan.jobs or 'as many as fit'} workers{' on each machine' * (plan.engine == 'ray')}"
    resumed = ", resumed" * plan.resume
    say(console, f"{how_long}, seed {plan.seed}, profile {plan.profile}, {workers}, {plan.out}{resumed}")
    if not console.is_terminal:
        yield Display(plan, Console(file=sys.stdout, width=max(console.width, 140)), None)
        return
    with Live(console=console, auto_refresh=False, transient=True) as picture:
        yield Display(plan, console, picture)


def headline(progress: Progress) -> str:
    plan = progress.plan
    if progress.status == "starting":
        return "starting: the workers import their targets"
    if progress.status == "replaying":
        return f"findings of earlier campaigns: {len(progress.replays)} judged again, {len(progress.findings)} fail"
    if plan.budget is not None:
        how_far = f"{progress.elapsed:.0f}/{plan.budget:.0f} s, {progress.cases} cases"
    else:
        how_far = f"{progress.elapsed:.0f} s, {progress.cases}/{plan.cases} cases"
    judged = sum(tally.judged for tally in progress.tallies.values())
    line = f"{progress.status}: {how_far} ({progress.rate:.1f}/s), {judged} judged, {len(progress.verdict)} findings"
    for number, what in ((len(progress.of_references), "of references"), (len(progress.known_to_fail), "known")):
        line += f", {number} {what}" if number else ""
    if progress.compiling and progress.status == "running":
        line += f", {progress.compiling} workers wait for kernels to be compiled"
    return line


def origin_line(target: dict) -> str:
    """Which file a target comes from, of its description."""
    limits = f" ({'; '.join(target['limits'])})" if target.get("limits") else ""
    return f"target {target['name']}: {target.get('file') or 'no file'}{limits}"


def kind_of(progress: Progress, finding: Finding) -> str:
    """What a finding is for the verdict."""
    if finding.known:
        return f"known failure ({finding.known})"
    return "finding" if finding.failure.target in progress.tested else "finding of a reference"


def target_notes(progress: Progress) -> Iterator[str]:
    """What targets left changed in the process, what they do not promise, and which failures did not come again."""
    for target in progress.targets:
        if target.get("changed"):
            yield f"{target['name']}: its import changed {', '.join(target['changed'])}, which was put back"
    for name, tally in progress.tallies.items():
        for what, times in sorted(tally.changed.items()):
            yield f"{name}: calls changed {what} in {times} cases, which was put back"
        for check, times in sorted(tally.measured.items()):
            yield f"{name}: {check} is not promised; other bits in {tally.other_bits[check]} of {times} checks"
    yield from progress.known.gone(set(progress.tallies))


def phase_shares(progress: Progress) -> str:
    """Where the time of the workers went, the most first."""
    total = sum(progress.seconds.values())
    return ", ".join(f"{phase} {spent / total:.0%}" for phase, spent in progress.seconds.most_common() if total)


def picture(progress: Progress) -> Group:
    lines = [headline(progress)]
    if shares := phase_shares(progress):
        lines.append(f"time of the workers: {shares}")
    return Group(*lines, tally_table(progress, skips=False)) if progress.tallies else Group(*lines)


def tally_table(progress: Progress, *, skips: bool) -> Table:
    """One row a target; with `skips`, the reasons too."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("target", no_wrap=True, overflow="fold")
    table.add_column("judged", justify="right")
    table.add_column("failed", justify="right")
    table.add_column("skipped", justify="right")
    table.add_column("error / bound beyond rounding", justify="right")
    table.add_column("findings", justify="right")
    tested, references = progress.tested, False
    for name, tally in sorted(progress.tallies.items(), key=lambda item: item[0] not in tested):  # these come first
        found = sum(finding.failure.target == name for finding in progress.findings.values())
        if name not in tested and not references:
            references = True
            table.add_section()
        table.add_row(
            escape(name),
            str(tally.judged),
            str(tally.failed),
            str(tally.skipped.total()),
            worst_text(tally.worst),
            str(found),
            style=("red" if name in tested else "yellow") if tally.failed else None,
        )
    if skips:
        reasons = [(name, *item) for name, tally in progress.tallies.items() for item in tally.skipped.most_common()]
        if reasons:
            table.caption = "\n".join(f"{name} skipped {count}: {escape(reason)}" for name, reason, count in reasons)
            table.caption_justify = "left"
            table.caption_style = ""
    return table


def worst_text(worst: tuple[float, str] | None) -> str:
    """Of the errors of all cases, the one that takes up most of its bound beyond the last rounding: 1 is all of it."""
    if worst is None:
        return "-"
    share, metric = worst
    return f"{error_text(share)} ({metric})"


def error_text(error: float | None) -> str:
    if error is None:
        return "-"
    return "not finite" if not math.isfinite(error) else f"{error:.2g}"


def error_texts(error: float, bound: float) -> tuple[str, str]:
    """An error and its bound, with digits that tell them apart."""
    if not (math.isfinite(error) and math.isfinite(bound)):
        return error_text(error), error_text(bound)
    return told_apart(error, bound, 2)


def finding_line(finding: Finding) -> str:
    failure = finding.failure
    family = f" ({findings.family(finding.needs)})" if finding.needs else ""
    if failure.intermittent:
        family = " (intermittent: failed again {} of {} times on the same inputs)".format(*failure.repeats)
    return f"{failure.target} {failure.check['name']}{family}: {check_text(failure.check)}"


def check_text(check: dict) -> str:
    """What a failed check has to say, or else the errors that are beyond their bounds."""
    bounds = check["bounds"]
    beyond = (
        "{} {}, at most {} allowed".format(name, *error_texts(error, bounds[name]))
        for name, error in check["errors"].items()
        if name in bounds and not error <= bounds[name]
    )
    return shortened(check["detail"] or "; ".join(beyond), 240)


def describe_case(case: Case) -> str:
    """One line a person can read: what is unusual about a case comes with its name."""
    lengths = ", ".join(map(str, case.seq_lens[:8])) + (", ..." if case.n_seqs > 8 else "")
    words = [
        f"{case.n_seqs} x {case.seq_lens[0]} tokens"
        if not case.packed
        else f"packed [{lengths}] {case.cu_seqlens_dtype}",
        f"{case.heads} head{'s' * (case.heads > 1)}",
        f"lower_bound {case.lower_bound:g}",
        f"scale {case.scale:.4g}",
    ]
    if case.initial_state or case.final_state:
        words.append(f"state {case.initial_state} -> {case.final_state}{' in place' * case.in_place}")
    if case.layout != "contiguous":
        words.append(case.layout)
    words += [f"{name} {getattr(case, name)}" for name, names in FAMILIES.items() if getattr(case, name) != names[0]]
    return ", ".join([*words, f"seed {case.seed}"])


def describe_result(path: Path, result: Result, known: str = "") -> Iterable[str]:
    """A replay in words: one line, and one more for each check that failed. known: the reason why it was to fail."""
    if result.outcome == "skipped":
        yield f"skipped  {path}  {result.target}: {result.reason}"
        return
    checks = result.verdict["checks"]
    errors = {name: error for check in checks if check["name"] == "accuracy" for name, error in check["errors"].items()}
    measured = ", ".join(f"{name} {error_text(error)}" for name, error in errors.items())
    if result.repeats is not None:
        measured = "failed {} of {} times".format(*result.repeats) + f"  {measured}" * bool(measured)
    outcome = "ok" if result.outcome == "passed" else "known" if known else "failed"
    yield f"{outcome:8} {path}  {result.target}  {measured}{f'  {known}' if known else ''}".rstrip()
    for check in result.failed_checks:
        yield f"         {check['name']}: {check_text(check)}"
    for line in (result.context or {}).get("traceback", ()):
        yield f"           {line}"


def reference_line(result: Result) -> str:
    """What a reference made of the inputs of a finding."""
    failed = "; ".join(f"{check['name']}: {check_text(check)}" for check in result.failed_checks)
    return f"{result.target} {'ok' if result.outcome == 'passed' else f'failed, {failed}' if failed else result.reason}"


def print_targets(descriptions: list[dict]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("target", "runs on", "note"):
        table.add_column(column, overflow="fold")
    for target in descriptions:
        if target["unavailable"] is None:
            exempt: dict[str, list[str]] = {}
            for name, reason in target["exempt"].items():
                exempt.setdefault(reason, []).append(name)
            notes = [target["note"], "; ".join(target["limits"])]
            notes += [f"not held to {', '.join(names)}: {reason}" for reason, names in exempt.items()]
            table.add_row(escape(target["name"]), target["device"], escape("\n".join(note for note in notes if note)))
        else:
            table.add_row(escape(target["name"]), "-", escape(target["unavailable"]), style="dim")
    Console().print(table)
