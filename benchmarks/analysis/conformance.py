"""`python -m benchmarks.analysis.conformance FOLDER`: the page of the report cards in a folder.

Reads the `conform.json` of every card below FOLDER, prints the tables, and writes data/conformance.json and the tables
of conformance.md, or peers.json and peers.md. The cards are made by `python -m fuzz conform --target NAME --out
FOLDER/NAME`. Cards of one target may have other rungs each.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.analysis.pages import parser, save, write_page
from fuzz.conformance.conform import FAIL, GRADES, PASS, UNREACHABLE
from fuzz.conformance.ladder import RUNGS
from fuzz.reporting import markdown
from fuzz.targets.registry import BUILTIN

KEPT = ("id", "grade", "score", "judged", "cases", "reason", "note")  # of a row


def main(arguments: list[str] | None = None) -> None:
    options = parser("benchmarks.analysis.conformance", __doc__)
    options.add_argument("folder", type=Path, metavar="FOLDER", help="folder of report cards")
    options.add_argument("--page", choices=("conformance", "peers"), default="conformance", help="name of the page")
    options = options.parse_args(arguments)
    cards = [json.loads(path.read_text()) for path in sorted(options.folder.rglob("conform.json"))]
    if not cards:
        raise SystemExit(
            f"FOLDER: expected a conform.json below {options.folder}, got none; python -m fuzz conform makes one"
        )
    cards = merged(cards)
    cards.sort(key=lambda card: place(card["target"]["name"]))
    for card in cards:
        card["target"].pop("file", None)  # a path of the machine that the card is from
    kept = {card["target"]["name"]: {**card, "rows": [shortened(row) for row in card["rows"]]} for card in cards}
    save(options.out, options.page, kept, depth=3)
    write_page(
        options.out, options.page, {"summary": rows_by_rung(cards), "failures": failures(cards), "reach": reach(cards)}
    )


def merged(cards: list[dict]) -> list[dict]:
    """One card of each target, with the rows of all of them. Raises SystemExit if two have the same row."""
    by_name: dict[str, dict] = {}
    for card in cards:
        name = card["target"]["name"]
        first = by_name.setdefault(name, {**card, "rows": [], "summary": dict.fromkeys(GRADES, 0)})
        twice = {row["id"] for row in first["rows"]} & {row["id"] for row in card["rows"]}
        if twice:
            raise SystemExit(f"FOLDER: expected each row of {name} once, got {sorted(twice)[0]} in two cards")
        first["rows"] += card["rows"]
        first["status"] = card["status"] if first["status"] == "complete" else first["status"]
        for grade in GRADES:
            first["summary"][grade] += card["summary"][grade]
    return list(by_name.values())


def place(name: str) -> int:
    """The built-in targets in their order, then anybody's."""
    names = [*BUILTIN]
    name = name.removesuffix(".fp32")
    return names.index(name) if name in names else len(names)


def shortened(row: dict) -> dict:
    row = {**row, "reason": without_trace(row["reason"])}
    return {name: row[name] for name in KEPT if row[name] not in ("", None)}


def rows_by_rung(cards: list[dict]) -> str:
    """Rows that pass of all rows, by rung."""
    rows = []
    for card in cards:
        cells = [rung_cell([row for row in card["rows"] if row["rung"] == rung]) for rung in RUNGS]
        rows.append([card["target"]["name"], *cells, *(str(card["summary"][grade]) for grade in GRADES)])
    return markdown.table(["target", *RUNGS, *GRADES], rows)


def rung_cell(rows: list[dict]) -> str:
    counts = {grade: sum(row["grade"] == grade for row in rows) for grade in GRADES}
    scores = [row["score"] for row in rows if row["score"] is not None]
    text = f"{counts[PASS]} of {len(rows)}"
    if counts[FAIL]:
        text += f", {counts[FAIL]} fail"
    if scores:
        text += ", not finite" if "not finite" in scores else f", worst {max(scores):.2f}"
    return text


def failures(cards: list[dict]) -> str:
    lines = []
    for card in cards:
        for row in card["rows"]:
            if row["grade"] == FAIL:
                found = "; ".join(dict.fromkeys(f"{saved['check']}: {shown(saved)}" for saved in row["findings"]))
                smallest = "; ".join(dict.fromkeys(saved["case"] for saved in row["findings"]))
                lines.append([card["target"]["name"], row["id"], found, smallest.replace("|", "\\|")])
    return markdown.table(["target", "row", "what", "smallest case"], lines) if lines else "None."


def shown(saved: dict) -> str:
    return without_trace(saved["detail"]).replace("|", "\\|")


def without_trace(text: str) -> str:
    """What failed; of a process that died not where in the interpreter it happened to."""
    return text.partition("; it wrote:")[0]


def reach(cards: list[dict]) -> str:
    lines = []
    for card in cards:
        rows = [row for row in card["rows"] if row["reason"] and row["grade"] != FAIL]
        for reason in dict.fromkeys(without_trace(row["reason"]) for row in rows):
            same = [row for row in rows if without_trace(row["reason"]) == reason]
            counts = [sum(row["grade"] == grade for row in same) for grade in (UNREACHABLE, PASS)]
            rungs = ", ".join(dict.fromkeys(row["rung"] for row in same))
            lines.append([card["target"]["name"], rungs, *map(str, counts), reason])
    header = ["target", "rows", "not reached", "in part", "reason"]
    return markdown.table(header, lines) if lines else "Every row is supported."


if __name__ == "__main__":
    main()
