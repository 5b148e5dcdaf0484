"""`python -m benchmarks.analysis.bounds [SECTION]...`: where errors come from, their predicted and allowed size.

Sections: stages, budget, cases, tails, inverse, constants; all unless named, about seven minutes on two idle cores.
Each is written to data/bounds.json when it is done, and the page with its tables is made from that file.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.analysis.bounds_measured import (
    DECLARED,
    METRIC_COLUMNS,
    SHOWN_CONSTANTS,
    budget,
    cases,
    constants,
    inverse,
    rounded,
    stages,
    tails,
)
from benchmarks.analysis.pages import load, parser, save, write_page
from fuzz.cases.families import PUBLISHED
from fuzz.reporting import markdown


def short(x: float | None) -> str:
    return "-" if x is None else f"{x:.2g}" if x < 1e-3 else f"{x:.4f}" if x < 0.1 else f"{x:.2f}"


def percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.0f} %" if x in (0, 1) or x >= 0.1 else f"{100 * x:.1f} %"


def tables_of(results: dict) -> dict[str, str]:
    """The tables of docs/bounds.md by name, from what docs/data/bounds.json holds."""
    tables = {}
    if "stages" in results:
        part = results["stages"]
        rows = [[name, *(short(row[x]) for x in ("predicted", "measured"))] for name, row in part["roundings"].items()]
        tables["roundings"] = markdown.table(["format", "predicted", "measured"], rows)
        rows = []
        for name, families in part["stages"].items():
            cells = (families[family] for family in PUBLISHED)
            rows.append([f"`{name}`", *(f"{short(c['predicted'])} / {short(c['measured'])}" for c in cells)])
        tables["stages"] = markdown.table(["stage", *PUBLISHED], rows)
    if "budget" in results:
        for quantity in ("out", "state"):
            rows = [[source, *(short(row[family][quantity]) for family in PUBLISHED)]
                    for source, row in results["budget"].items()]  # fmt: skip
            tables[f"budget_{quantity}"] = markdown.table(["rounded", *PUBLISHED], rows)
    if "cases" in results:
        rows = []
        for metric in METRIC_COLUMNS:
            cells = [part["used"].get(metric) for part in results["cases"].values()]
            rows.append([metric, *("-" if c is None else f"{c[0]:.2f} / {c[2]:.2f} / {c[3]:.2f}" for c in cells)])
        heads = [f"{name}, {part['cases']} cases, {part['operands']}" for name, part in results["cases"].items()]
        tables["cases"] = markdown.table(["metric", *heads], rows)
        rows = [[metric, *(margin(part, metric) for part in results["cases"].values())] for metric in METRIC_COLUMNS]
        tables["margins"] = markdown.table(["metric", *results["cases"]], rows)
    if "tails" in results:
        rows = []
        for name, part in results["tails"].items():
            for row in part:
                reached = [f"{x:.2f}" for x in row["reached"]]
                rows.append([name, f"{row['share']:.3g}", str(row["places"]), *reached, f"{row['allowed_from']:.1f}"])
        heads = ["metric", "share up to", "places", "median", "90 %", "99 %", "largest", "allowed"]
        tables["tails"] = markdown.table(heads, rows)
    if "inverse" in results:
        rows = []
        for name, part in results["inverse"].items():
            cells = (f"{above} / {most:.2f}" for above, most in (part[how] for how in DECLARED))
            rows.append([name, str(part["cases"]), *cells])
        tables["inverse"] = markdown.table(["in bf16", "cases", *DECLARED], rows)
    if "constants" in results:
        part = results["constants"]
        heads = [
            "",
            "cases",
            "follows the case",
            *(f"constant {c}" for c in SHOWN_CONSTANTS),
            f"constant {part['quietest']:.2g}",
        ]
        alarms = part["false_alarms"]
        rows = [["right model: false alarms", str(part["cases"]), percent(alarms["follows"]),
                 *(percent(part["shown"][str(c)]) for c in SHOWN_CONSTANTS), percent(0.0)]]  # fmt: skip
        for name, row in part["defects"].items():
            rows.append([f"{name}: missed", str(row["cases"]), percent(row["missed"]),
                         *(percent(x) for x in row["shown"].values())])  # fmt: skip
        tables["constants"] = markdown.table(heads, rows)
        rows = [[family, short(row["right"]), short(row["allowed"])] for family, row in part["families"].items()]
        tables["families"] = markdown.table(["family", "largest error of the right model", "allowed there"], rows)
    return tables


def margin(part: dict, metric: str) -> str:
    used = part["used"].get(metric)
    return "-" if used is None else "> 1000" if used[3] < 1e-3 else f"{1 / used[3]:.1f}"


SECTIONS: dict[str, Callable[[], dict]] = {f.__name__: f for f in (stages, budget, cases, tails, inverse, constants)}


def main(arguments: list[str] | None = None) -> None:
    options = parser("benchmarks.analysis.bounds", __doc__)
    options.add_argument(
        "section", nargs="*", metavar="SECTION", help=f"part to measure: {', '.join(SECTIONS)} (default all)"
    )
    options = options.parse_args(arguments)
    unknown = [name for name in options.section if name not in SECTIONS]
    if unknown:
        raise SystemExit(f"SECTION: expected one of {', '.join(SECTIONS)}, got {unknown[0]}")
    torch.set_num_threads(1)  # the tensors are small
    results = load(options.out, "bounds")
    for name in options.section or SECTIONS:
        results[name] = rounded(SECTIONS[name]())
        save(options.out, "bounds", results, depth=3)
    write_page(options.out, "bounds", tables_of(results))


if __name__ == "__main__":
    main()
