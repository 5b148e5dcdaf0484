"""All that the judge is measured by in one table, each number with its command, from the files in docs/data."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from fuzz.campaign import store
from fuzz.files import lines_of, write_whole
from fuzz.mutants.tables import OUTCOMES
from fuzz.reporting import markdown
from fuzz.reporting.summary import gather
from fuzz.self_check.record import Record

CAMPAIGNS, HELD_OUT, MUTANTS = "campaigns.json", "held_out.json", "mutants.json"
"""The second one is written by hand: of defects that others invented without knowing the cases."""

HEADER = ("what", "result", "command")


def campaign(folder: Path) -> dict:
    """Of a run folder: what ran where, on how many cases, and with how many findings. Raises StoreError or OSError."""
    with closing(store.open_for_reading(folder)) as db:
        summary = gather(db, folder)
    config, environment = (summary.campaign.get(name) or {} for name in ("config", "environment"))
    return {
        "targets": sorted(summary.tested),
        "place": ", ".join(dict.fromkeys(environment.get("devices") or ["cpu"])),
        "profile": config.get("profile"),
        "seed": config.get("seed"),
        "cases": summary.cases,
        "judged": summary.judged,
        "findings": len(summary.verdict),
        "seconds": round(summary.seconds),
        "started": summary.campaign.get("started"),
        "git": environment.get("git"),
    }


def add_campaigns(file: Path, folders: Sequence[Path]) -> None:
    """Adds those of run folders, or of other files of campaigns, to a file. The same campaign is there once."""
    entries = json.loads(file.read_text()) if file.exists() else []
    for each in folders:
        entries += json.loads(each.read_text()) if each.is_file() else [campaign(each)]
    by_start = {(str(entry["targets"]), entry["started"]): entry for entry in entries}
    write_whole(file, lines_of(list(by_start.values()), depth=1))


def overview(record: Record, data: Path) -> str:
    """The table. data: the folder of the files; one that is not there has no row."""
    rows = [*of_defects(record), *of_held_out(read(data / HELD_OUT, [])), *of_mutants(read(data / MUTANTS, {}))]
    rows += [*of_alarms(record), *of_campaigns(read(data / CAMPAIGNS, []))]
    return markdown.table(HEADER, rows)


def read(path: Path, otherwise):
    return json.loads(path.read_text()) if path.exists() else otherwise


def of_defects(record: Record):
    by_defect = [list(hunts.values()) for hunts in record.hunts.values()]
    if by_defect:
        every = [hunt.right for hunts in by_defect for hunt in hunts]
        found = sum(all(hunt.right is not None for hunt in hunts) for hunts in by_defect)
        counts = [count for count in every if count is not None]
        seeds, device = max(map(len, by_defect)), " --device" * (record.profile == "gpu")
        searches = f"{len(counts)} of {len(every)} searches, median {statistics.median(counts):g} cases"
        yield (
            "planted defects, found with every seed",
            f"{found} of {len(by_defect)}; {searches}, worst {max(counts)}",
            f"`python -m fuzz self-check{device} --seeds {seeds} --cases {record.cases} --publish`",
        )


def of_held_out(sets: list[dict]):
    for each in sets:
        later = f", {each['after_changes']} after changes" if "after_changes" in each else ""
        yield (
            f"defects that others invented, {each['set']} set",
            f"{each['found']} of {each['defects']} at first{later}",
            "`python -m fuzz run --target FILE:NAME --cases 500` with each of two seeds; "
            "[harness.md](harness.md) says which of them are in the catalogue",
        )


def of_mutants(runs: dict[str, list[dict]]):
    for number, (seed, results) in enumerate(runs.items()):
        counts = Counter(result["outcome"] for result in results)
        needed = [result["cases"] for result in results if result["outcome"] == "killed"]
        said = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])
        cases = f"; median {statistics.median(needed):g} cases, worst {max(needed)}" if needed else ""
        fresh = f" --without runs/mutants-{list(runs)[number - 1]}.jsonl" if number else ""
        command = f"`python -m fuzz mutants --count {len(results)} --seed {seed}{fresh}`"
        yield f"mutants, seed {seed}", f"{len(results)}: {said}{cases}", command


def of_alarms(record: Record):
    for target, alarms in record.alarms.items():
        skipped = f", {alarms.skipped} skipped" if alarms.skipped else ""
        yield (
            f"false alarms, {target}",
            f"{len(alarms.failures)} in {alarms.judged} cases{skipped}",
            f"`python -m fuzz self-check --false-alarms {alarms.cases} --publish`",
        )


def of_campaigns(entries: list[dict]):
    for each in entries:
        named = "".join(f" --target {target}" for target in each["targets"])
        yield (
            f"campaign, {', '.join(each['targets'])} on {each['place']}",
            f"{each['findings']} findings in {each['cases']} cases",
            f"`python -m fuzz run{named} --cases {each['cases']} --seed {each['seed']} --profile {each['profile']}`",
        )
