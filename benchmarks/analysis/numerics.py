"""`python -m benchmarks.analysis.numerics`: the cost in accuracy of each operand's format. Two minutes on two cores.

Runs `flash_kda.model` with other formats in the place of the kernel's, and prints the errors against the float64
oracle. They are written to data/numerics.json, the tables of numerics.md, and the plot data/numerics.svg.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.analysis.operand_formats import EXACT, OPERAND_NAMES, every, operand_formats
from benchmarks.analysis.pages import parser, save, write_page
from benchmarks.analysis.published import errors_by_head, published_inputs
from flash_kda import model
from flash_kda.formats import Formats, bf16, tf32
from fuzz.cases.families import PUBLISHED
from fuzz.files import write_whole
from fuzz.reporting import markdown
from fuzz.reporting.plots import COLOURS, Drawing
from oracle import recurrent_kda

SEEDS = range(2)
SINGLE_OPERANDS = (*((operand,) for operand in OPERAND_NAMES), ("merge", "X"), ("merge", "X", "Xb"))
LONG_TOKENS = 8192  # tokens of the long sequences
PEERS_FILE = Path(__file__).parents[1] / "h200_peers.json"


def fp16(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


SHIPPED, FLA, FLASHKDA = "shipped", "fla, measured on an H200", "FlashKDA, measured on an H200"
VARIANTS = {
    "exact operands (the bf16 output alone)": EXACT,
    SHIPPED: Formats(),
    "X b rounded once to bf16": Formats(Xb=bf16),
    "X b tf32": Formats(Xb=tf32),
    "W tf32": Formats(W=tf32),
    "merges bf16": Formats(merge=bf16),
    "X bf16": Formats(X=bf16),
    "all bf16: X, X b and merges too": every(bf16),
    "diagonal blocks tf32": Formats(diagonal=tf32),
    "S, K~, Q~ tf32": Formats(S=tf32, K=tf32, Q=tf32),
    "U and M tf32": Formats(U=tf32, M=tf32),
    "U, M and Kr tf32": Formats(U=tf32, M=tf32, Kr=tf32),
    # Right only while all values stay below 65504 and decays above 2^-14, as here: on the diagonal they do not.
    "fp16 for bf16, diagonal blocks tf32": Formats(
        diagonal=tf32, between=fp16, K=fp16, Q=fp16, Kr=fp16, M=fp16, W=fp16, U=fp16, S=fp16
    ),
    "all tf32": every(tf32),
}


def main(arguments: list[str] | None = None) -> None:
    options = parser("benchmarks.analysis.numerics", __doc__).parse_args(arguments)
    problems = {family: [solved(published_inputs(family, seed)) for seed in SEEDS] for family in PUBLISHED}
    results = {"families": {}, "alone": {}, "long": {}, "magnitude": {}}
    for name, formats in VARIANTS.items():
        with operand_formats(formats):
            results["families"][name] = {family: errors(*cases) for family, cases in problems.items()}
    for operands in SINGLE_OPERANDS:
        with operand_formats(replace(EXACT, **{operand: getattr(Formats, operand) for operand in operands})):
            results["alone"][", ".join(operands)] = {family: errors(*cases) for family, cases in problems.items()}
    for name, peer in ((FLA, "fla"), (FLASHKDA, "flashkda")):
        measured = json.loads(PEERS_FILE.read_text())["relative_rms_error_vs_fp64"][peer]
        results["families"][name] = {family: measured[family] for family in PUBLISHED}
    for family in PUBLISHED:
        results["long"][family] = errors(solved(published_inputs(family, tokens=LONG_TOKENS, heads=2)))
    for power in (-90, 0, 90, 117):
        inputs = published_inputs("random")
        inputs |= {"v": inputs["v"] * 2.0**power, "initial_state": inputs["initial_state"] * 2.0**power}
        results["magnitude"][str(power)] = errors(solved(inputs))
    results["seconds"] = seconds(published_inputs("random", tokens=1024, heads=4))
    results["environment"] = {"torch": torch.__version__}

    save(options.out, "numerics", results, depth=2)
    write_page(options.out, "numerics", tables_of(results))
    write_whole(options.out / "data" / "numerics.svg", plot(results["families"]))


def solved(inputs: dict) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Inputs with the oracle's out and state."""
    return inputs, *recurrent_kda(**inputs)


def errors(*problems: tuple[dict, torch.Tensor, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """Relative RMS error of out and state: (median, maximum) over the heads of all problems."""
    found = {"out": [], "state": []}
    for inputs, exact_out, exact_state in problems:
        out, state = model.forward(**inputs)
        found["out"].append(errors_by_head(out, exact_out, 2))
        found["state"].append(errors_by_head(state, exact_state, 1))
    return {name: median_and_maximum(torch.cat(heads)) for name, heads in found.items()}


def median_and_maximum(heads: torch.Tensor) -> tuple[float, float]:
    return round(heads.median().item(), 6), round(heads.max().item(), 6)


def seconds(inputs: dict) -> float:
    """CPU time of the model in one thread, which other processes hardly change: the best of five runs."""
    threads, best = torch.get_num_threads(), float("inf")
    torch.set_num_threads(1)
    for _ in range(5):
        began = time.process_time()
        model.forward(**inputs)
        best = min(best, time.process_time() - began)
    torch.set_num_threads(threads)
    return best


def cell(error: tuple[float, float]) -> str:
    return " / ".join(f"{x:.5f}" if x < 0.1 else f"{x:.2f}" for x in error)


def tables_of(results: dict) -> dict[str, str]:
    """The tables of docs/numerics.md by name, from what docs/data/numerics.json holds."""
    return {
        "out": families_table(results["families"], "out"),
        "state": families_table(results["families"], "state"),
        "alone": families_table(results["alone"], "state"),
        "long": two_columns("family", results["long"]),
        "magnitude": two_columns("v and state times", {f"2^{p}": row for p, row in results["magnitude"].items()}),
        "speed": f"1024 tokens x 4 heads: {results['seconds']:.3f} s of one core.",
    }


def plot(families: dict) -> str:
    """The median errors of `out`, on a logarithmic axis: an SVG drawing."""
    series = {"this kernel (its model)": SHIPPED, FLA: FLA, FLASHKDA: FLASHKDA}
    with Drawing("Relative RMS error of out, median over heads", height=2.4) as drawing:
        for number, (label, name) in enumerate(series.items()):
            places = [place + 0.27 * (number - 1) for place in range(len(PUBLISHED))]
            errors = [families[name][family]["out"][0] for family in PUBLISHED]
            drawing.axes.bar(places, errors, 0.25, color=COLOURS[number], label=label)
        drawing.axes.set(yscale="log", ylim=(1e-3, 10))
        drawing.axes.set_xticks(range(len(PUBLISHED)), [family.replace("_", " ") for family in PUBLISHED])
        drawing.axes.grid(False, axis="x")
        drawing.legend(drawing.axes.get_legend_handles_labels()[0])
        return drawing.svg()


def families_table(results: dict, quantity: str) -> str:
    rows = [[name, *(cell(row[family][quantity]) for family in PUBLISHED)] for name, row in results.items()]
    return markdown.table(
        ["operands", *PUBLISHED], [[f"**{x}**" for x in row] if row[0] == SHIPPED else row for row in rows]
    )


def two_columns(title: str, results: dict) -> str:
    rows = [[name, cell(row["out"]), cell(row["state"])] for name, row in results.items()]
    return markdown.table([title, "out", "state"], rows)


if __name__ == "__main__":
    main()
