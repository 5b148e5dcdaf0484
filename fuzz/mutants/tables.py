"""What a mutation run found: by rule, by check, and each survivor in a line, as Markdown."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from fuzz.mutants.judging import EQUIVALENT, INVALID, KILLED, SURVIVED, UNSEEN, MutantResult
from fuzz.reporting.markdown import table

OUTCOMES = (KILLED, SURVIVED, EQUIVALENT, UNSEEN, INVALID)


def result_tables(results: Sequence[MutantResult], explained: Mapping[str, str] | None = None) -> str:
    """explained: why no check fails, by the mutant's id, or by its rule where that is all there is to say."""
    rules = sorted({result.rule for result in results})
    rows = []
    for rule in [*rules, "all"]:
        of_rule = [result for result in results if rule in (result.rule, "all")]
        counts = Counter(result.outcome for result in of_rule)
        needed = [result.cases for result in of_rule if result.outcome == KILLED]
        worst = (f"{statistics.median(needed):g}", str(max(needed))) if needed else ("", "")
        rows.append([rule, *map(str, (len(of_rule), *(counts[each] for each in OUTCOMES))), *worst])
    by_rule = table(["rule", "drawn", *OUTCOMES, "median cases", "worst"], rows)
    checks: dict[str, list[int]] = {}
    for result in results:
        if result.outcome == KILLED:
            checks.setdefault(result.check, []).append(result.cases)
    by_check = table(
        ["killed by", "mutants", "median cases", "worst"],
        [
            [check, str(len(needed)), f"{statistics.median(needed):g}", str(max(needed))]
            for check, needed in sorted(checks.items(), key=lambda each: -len(each[1]))
        ],
    )
    same = sum(result.outcome == EQUIVALENT and bool(result.check) for result in results)
    judged = [result.cases for result in results if result.outcome in (SURVIVED, EQUIVALENT) and not result.check]
    texts = [by_rule, "", by_check, "", f"Of the equivalent, {same} compile to the same code."]
    if judged:
        texts.append(f"All other equivalent ones and survivors were judged on {min(judged)} to {max(judged)} cases.")
    survivors = [line_of(result, explained or {}) for result in results if result.outcome == SURVIVED]
    same_bits = [
        line_of(result, explained or {}) for result in results if result.outcome == EQUIVALENT and not result.check
    ]
    texts += ["", "Survivors (results differ, within every bound):", "", *(survivors or ["none"])]
    return "\n".join([*texts, "", "Equivalent (no bit differs):", "", *(same_bits or ["none"])])


def line_of(result: MutantResult, explained: Mapping[str, str]) -> str:
    why = explained.get(result.id) or (explained.get(result.rule) if result.outcome == SURVIVED else None)
    why = f" {why}" if why else ""
    new = f" becomes `{one_line(result.new)}`" if result.new.strip("; ") else ""
    change = f"{result.rule}: `{one_line(result.old)}`{new}"
    return f"- `{result.id}` {result.file}:{result.line}, {change}, {result.cases} cases.{why}"


def one_line(text: str) -> str:
    return " ".join(text.split())[:80]
