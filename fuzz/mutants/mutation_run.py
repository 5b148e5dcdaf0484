"""A mutation run: mutants drawn with a seed, judged side by side, kept in a file of one line each.

All mutants are judged on the first few cases before any is judged on more. So a run that ends early has a result of
each, with the number of its cases.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from fuzz.cases.case import Case
from fuzz.mutants import kernel
from fuzz.mutants.judging import (
    KILLED,
    SAME_CODE,
    UNSEEN,
    Baseline,
    MutantResult,
    baseline_of,
    built,
    drawn_cases,
    judge_mutant,
    result_of,
)
from fuzz.mutants.pool import DIED, SILENT, STOPPED, side_by_side
from fuzz.mutants.rules import MODEL, Mutant, drawn, sources

PROPERTIES_CHECKED = {"model": 2, "kernel": 1}

CASE_COUNTS = (8, 40, 120, 220, 320, 420)
"""Numbers of cases after which the file has the results of all mutants. Most are killed by the first ones."""


def run_mutants(
    count: int,
    seed: int,
    out: Path,
    most: dict[str, int],
    silence: float,
    part: tuple[int, int] = (1, 1),
    jobs: int = 1,
    budget: float = math.inf,
    without: Collection[str] = (),
    gpu_code: bool = False,
) -> list[MutantResult]:
    """Judges `count` mutants. What `out` already has is not judged again.

    most: the greatest number of cases, by "model" and "kernel", or of one of them: others are not drawn. silence:
    seconds for one case of a mutant. part: the i-th of n runs side by side. jobs: processes. budget: seconds until all
    stops. without: ids of mutants that are not drawn.
    gpu_code: whether nvcc compiles those that the emulator cannot see.
    """
    chosen = drawn(count, seed, [file for file in sources() if source_kind(file) in most], without)
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # a process cannot be forked from one that has more
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mutants-"))
        if "kernel" in most:
            stack.enter_context(kernel.sources_kept(Path(folder)))
        now = MutationRun(
            seed, chosen[part[0] - 1 :: part[1]], out, Path(folder), jobs, silence, time.monotonic() + budget
        )
        if gpu_code:
            now.gpu_code = kernel.gpu_code(Path(folder) / "right-gpu", None)
        now.judge_all(most)
    results = load_results([out])
    return [results[each.id] for each in chosen if each.id in results]


def source_kind(file: str) -> str:
    return "model" if file == MODEL else "kernel"


@dataclass
class MutationRun:
    seed: int
    mutants: list[Mutant]
    out: Path
    folder: Path  # of what is compiled
    jobs: int
    silence: float
    until: float
    gpu_code: str = ""  # its digest, of the original; "" where it is not asked for
    results: dict[str, MutantResult] = field(init=False)
    baselines: dict[tuple[str, int], Baseline] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.results = load_results([self.out])

    def judge_all(self, most: dict[str, int]) -> None:
        everything = max(most.values())
        cases = {kind: list(drawn_cases(self.seed, number, kind == "kernel")) for kind, number in most.items()}
        right = {kind: built(None, self.folder / "right", kind) for kind in most}
        for stage in [*(each for each in CASE_COUNTS if each < everything), everything]:
            todo = [each for each in self.mutants if self.judged(each) < min(stage, most[source_kind(each.file)])]
            needed = {
                (kind, number): cases[kind][number]
                for kind in most
                if (begun := [self.judged(each) for each in todo if source_kind(each.file) == kind])
                for number in range(min(begun), min(stage, most[kind]))
                if (kind, number) not in self.baselines
            }
            if not self.prepare(needed, right):
                return
            self.judge(todo, {kind: min(stage, number) for kind, number in most.items()}, right)

    def judged(self, mutant: Mutant) -> float:
        """Cases on which it was judged; infinite if no other case can change the result."""
        result = self.results.get(mutant.id)
        if result is None or (self.gpu_code and result.outcome == UNSEEN and result.check == SAME_CODE):
            return 0
        return math.inf if result.decided else result.cases

    def prepare(self, needed: dict[tuple[str, int], Case], right: dict) -> bool:
        """Computes what mutants are compared with. False if time is up. Raises RuntimeError if the original fails."""

        def work(some: list[tuple[str, int]]):
            def do(send):
                for kind, number in some:
                    send(((kind, number), baseline_of(right[kind][0], needed[kind, number], PROPERTIES_CHECKED[kind])))

            return do

        keys = list(needed)
        tasks = [(some, work(some)) for first in range(self.jobs) if (some := keys[first :: self.jobs])]
        for some, messages, how in side_by_side(tasks, self.jobs, 10 * self.silence, self.until):
            self.baselines.update(messages)
            if how == STOPPED:
                return False
            if len(messages) < len(some):
                raise RuntimeError(f"mutants: expected results of the original for {some[len(messages)]}, it {how}")
        return time.monotonic() < self.until

    def judge(self, todo: list[Mutant], stage: dict[str, int], right: dict) -> None:
        def work(mutant: Mutant):
            kind, before = source_kind(mutant.file), self.results.get(mutant.id)
            few = [self.baselines[kind, number] for number in range(self.judged(mutant), stage[kind])]
            folder, (_, code) = self.folder / mutant.id, right[kind]
            return lambda send: judge_mutant(mutant, before, few, code, folder, send, self.gpu_code)

        tasks = ((mutant, work(mutant)) for mutant in todo)
        for number, (mutant, messages, how) in enumerate(side_by_side(tasks, self.jobs, self.silence, self.until), 1):
            before = self.results.get(mutant.id)
            result = messages[-1] if messages else before
            if how in (DIED, SILENT):
                result = result_of(mutant, outcome=KILLED, check=how, cases=(result.cases if result else 0) + 1)
            if result is None or result == before:
                continue
            result = self.results[mutant.id] = replace(result, seed=self.seed)
            with self.out.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
            place = f"{mutant.file}:{mutant.line} {mutant.rule}"
            print(f"{number}/{len(todo)}, {max(stage.values())} cases: {place}: {outcome_text(result)}", flush=True)


def parse_part(part: str) -> tuple[int, int]:
    """(i, n) of "i/n". Raises ValueError."""
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--part: expected I/N with I from 1 to N, got {part}")
    return int(match[1]), int(match[2])


def outcome_text(result: MutantResult) -> str:
    by = f" by {result.check}" if result.check else ""
    return f"{result.outcome}{by} after {result.cases} cases"


def load_results(paths: Iterable[Path]) -> dict[str, MutantResult]:
    """The last result of each mutant of the files; none where there is no file. A line without an end is left out.

    Raises ValueError if a file holds something else.
    """
    results = {}
    for path in paths:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        try:
            for result in (MutantResult(**json.loads(line)) for line in lines if line.endswith("\n")):
                before = results.get(result.id)
                if before is None or result.decided or (not before.decided and result.cases >= before.cases):
                    results[result.id] = result
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected one result of a mutant a line ({error})") from error
    return results
