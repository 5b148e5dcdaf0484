"""Results of mutation runs, written into docs/data/mutants.json and docs/mutants.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fuzz.files import lines_of, write_whole
from fuzz.mutants.judging import MutantResult
from fuzz.mutants.mutation_run import load_results
from fuzz.mutants.rules import ROOT
from fuzz.mutants.tables import result_tables
from fuzz.reporting.markdown import with_tables
from fuzz.self_check.record import load as load_record
from fuzz.self_check.report import write_page

PAGE, DATA = ROOT / "docs" / "mutants.md", ROOT / "docs" / "data" / "mutants.json"

EXPLAINED = ROOT / "docs" / "data" / "mutants_explained.json"
"""Written by hand: by id of a mutant, or by its rule, why it survives."""


def publish(paths: Sequence[Path]) -> str:
    """The page's tables, by seed. Parts of one seed are merged. Raises ValueError for a file that has no results."""
    for path in paths:
        if not path.exists():
            raise ValueError(f"--publish: expected a file of results, got {path}, which does not exist")
    results = load_results(paths).values()
    explained = json.loads(EXPLAINED.read_text())
    runs: dict[int, list[MutantResult]] = {}
    for result in results:
        runs.setdefault(result.seed, []).append(result)
    texts = [
        f"### Seed {seed}, {len(found)} mutants\n\n{result_tables(sorted(found, key=position), explained)}"
        for seed, found in runs.items()
    ]
    data = {str(seed): [asdict(result) for result in sorted(found, key=position)] for seed, found in runs.items()}
    write_whole(DATA, lines_of(data, depth=2))
    write_whole(PAGE, with_tables(PAGE.read_text(), {"runs": "\n\n".join(["", *texts, ""])}))
    record = DATA.with_name("self_check.json")  # whose page has the numbers of mutants, too
    return f"written: {DATA}, {PAGE}, {write_page(record, load_record(record))}"


def position(result: MutantResult) -> tuple[str, int, str]:
    return result.file, result.line, result.id
