"""A run over mutants: drawn with a seed, judged one after the other, kept in a file of one line each, and shown."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fuzz.mutants.judging import EQUIVALENT, INVALID, KILLED, SURVIVED, Result, cases, judged, known, original
from fuzz.mutants.rules import MODEL, drawn, sources
from fuzz.reporting.markdown import table

OUTCOMES = (KILLED, SURVIVED, EQUIVALENT, INVALID)
PROPERTIES = {"model": 2, "kernel": 1}


def run(
    count: int,
    seed: int,
    out: Path,
    what: Sequence[str],
    most_cases: int,
    emulated_cases: int,
    seconds: float,
    part: tuple[int, int] = (1, 1),
) -> list[Result]:
    """Judges `count` mutants of "model", "kernel" or both. Those that `out` already has are not judged again.

    part: the i-th of n runs side by side, which share the file.
    """
    files = [file for file in sources() if ("model" if file == MODEL else "kernel") in what]
    have = {result.id for result in load(out)}
    chosen = drawn(count, seed, files)
    mine = {each.id for each in chosen[part[0] - 1 :: part[1]]}
    out.parent.mkdir(parents=True, exist_ok=True)
    for kind in what:
        todo = [each for each in chosen if (each.file == MODEL) == (kind == "model") and each.id in mine - have]
        if not todo:
            continue
        emulated = kind == "kernel"
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            right = original(emulated, Path(folder))
        few = emulated_cases if emulated else most_cases
        known_cases = list(known(right, cases(seed, few, emulated), PROPERTIES[kind]))
        for number, mutant in enumerate(todo, 1):
            result = judged(mutant, known_cases, seconds)
            with out.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
            print(f"{kind} {number}/{len(todo)} {mutant.file}:{mutant.line} {mutant.rule}: {told(result)}", flush=True)
    ids = {each.id for each in chosen}
    return [result for result in load(out) if result.id in ids]


def place(part: str) -> tuple[int, int]:
    """(i, n) of "i/n". Raises ValueError."""
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--part: expected I/N with I from 1 to N, got {part}")
    return int(match[1]), int(match[2])


def told(result: Result) -> str:
    by = f" by {result.check}" if result.check else ""
    return f"{result.outcome}{by} after {result.cases} cases"


def load(path: Path) -> list[Result]:
    """The results of a file; none where there is no file. Raises ValueError if it holds something else."""
    if not path.exists():
        return []
    try:
        return [Result(**json.loads(line)) for line in path.read_text().splitlines()]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected one result of a mutant a line ({error})") from error


def summary(results: Sequence[Result]) -> str:
    """By rule and by check, as tables of Markdown, and each survivor in a line."""
    rules = sorted({result.rule for result in results})
    rows = []
    for rule in [*rules, "all"]:
        of_rule = [result for result in results if rule in (result.rule, "all")]
        counts = Counter(result.outcome for result in of_rule)
        needed = [result.cases for result in of_rule if result.outcome == KILLED]
        worst = (f"{statistics.median(needed):g}", str(max(needed))) if needed else ("", "")
        rows.append([rule, *map(str, (len(of_rule), *(counts[each] for each in OUTCOMES))), *worst])
    by_rule = table(["rule", "drawn", *OUTCOMES, "median cases", "worst"], rows)
    checks = Counter(result.check for result in results if result.outcome == KILLED)
    by_check = table(["killed by", "mutants"], [[check, str(number)] for check, number in checks.most_common()])
    left = [
        f"- {result.file}:{result.line} {result.rule}: `{one_line(result.old)}` -> `{one_line(result.new)}`"
        for result in results
        if result.outcome == SURVIVED
    ]
    return "\n".join([by_rule, "", by_check, "", "Survivors (results differ, within every bound):", "", *left])


def one_line(text: str) -> str:
    return " ".join(text.split())[:80]
