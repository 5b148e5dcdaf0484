"""`python -m benchmarks.accuracy`: errors of the kernel and of fla against the float64 oracle, on the same inputs.

Relative RMS error of `out` and of the fp32 final state for each head, and the median over the heads. Inputs are the
five published ones (`fuzz.cases.families.PUBLISHED`), and every family of the fuzzer, one at a time, with the others
plain. A median of the kernel above that of fla is marked.

Meant for a GPU. `--device cpu` judges the model, and fla through Triton's interpreter, which is for tiny sizes only.
Exit status: 0 nowhere above, 1 somewhere, 2 nothing could be measured.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch

import flash_kda
from benchmarks.__main__ import positive
from benchmarks.analysis.published import errors_by_head, one_sequence
from benchmarks.results import ACCURACY_FILE
from benchmarks.table import Table
from fuzz.campaign.findings import environment
from fuzz.cases.families import FAMILIES, PUBLISHED
from fuzz.files import write_whole
from fuzz.targets import fla as fla_peers
from fuzz.text import first_line
from oracle import recurrent_kda

ACCURACY_VERSION = 1
NOT_ABOVE, ABOVE, NOT_MEASURED = 0, 1, 2
QUANTITIES = ("out", "state")
TINY = torch.finfo(torch.float32).tiny


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument(
        "--tokens", type=positive, metavar="N", default=256, help="length of the one sequence (default 256)"
    )
    parser.add_argument("--heads", type=positive, metavar="N", default=16, help="number of heads (default 16)")
    parser.add_argument(
        "--seeds", type=positive, metavar="N", default=1, help="number of draws of each family (default 1)"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="part of the names of the families to measure")
    parser.add_argument("--no-fla", action="store_true", help="measurement without fla")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device of the inputs (default cuda)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs/benchmark"),
        help="folder of the results (default runs/benchmark)",
    )
    options = parser.parse_args(arguments)
    names = [name for name in all_families() if options.only in name]
    missing = None if options.no_fla else fla_peers.available()
    problem = None
    if options.device == "cuda" and not torch.cuda.is_available():
        problem = (
            "--device: expected a machine with an NVIDIA GPU, got one without; --device cpu judges the model, slowly"
        )
    elif not names:
        problem = f"--only: expected part of the name of a family, got {options.only}"
    elif missing:
        problem = f"{missing}; --no-fla leaves it out"
    if problem:
        print(f"python -m benchmarks.accuracy: {problem}", file=sys.stderr)
        return NOT_MEASURED

    results = {
        "version": ACCURACY_VERSION,
        "measured_at": time.time(),
        "environment": environment([device_name(options.device)]),
        "settings": {"tokens": options.tokens, "heads": options.heads, "seeds": options.seeds},
        "families": {},
    }
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name}", flush=True)
        draws = [
            inputs_of(name, seed, tokens=options.tokens, heads=options.heads, device=options.device)
            for seed in range(options.seeds)
        ]
        results["families"][name] = measure(draws, with_fla=not options.no_fla)
        save(options.out / ACCURACY_FILE, results)
    table_of(results["families"]).print()
    above = {name: worse for name, family in results["families"].items() if (worse := above_fla(family))}
    for name, worse in above.items():
        print(f"above fla: {name}: {', '.join(worse)}")
    print(f"{len(names)} families, {len(above)} with the kernel above fla\nwritten: {options.out / ACCURACY_FILE}")
    return ABOVE if above else NOT_ABOVE


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def all_families() -> list[str]:
    """The five published ones, then FIELD=FAMILY for each family of the fuzzer."""
    return [*PUBLISHED, *(f"{field}={family}" for field, names in FAMILIES.items() for family in names)]


def inputs_of(name: str, seed: int, *, tokens: int, heads: int, device: str) -> dict:
    """Arguments of `flash_kda.fwd` but for its outputs: one sequence with an fp32 state."""
    field, _, family = name.partition("=")
    return one_sequence(PUBLISHED.get(name) or {field: family}, seed, tokens=tokens, heads=heads, device=device)


def measure(draws: list[dict], *, with_fla: bool) -> dict[str, dict]:
    """Medians and maxima over the heads of all draws: {"kernel" | "fla": {"out" | "state": [median, maximum]}}.

    What raises stands as {"error": one line} in the place of its numbers.
    """
    exact = [recurrent_kda(**inputs) for inputs in draws]
    found = {}
    for name, call in (("kernel", kernel), ("fla", fla))[: 1 + with_fla]:
        heads: dict[str, list[torch.Tensor]] = {quantity: [] for quantity in QUANTITIES}
        try:
            for inputs, right in zip(draws, exact, strict=True):
                for quantity, mine, theirs, axis in zip(QUANTITIES, call(inputs), right, (2, 1), strict=True):
                    heads[quantity].append(relative(mine, theirs, axis))
        except Exception as error:  # Triton's have no class in common
            found[name] = {"error": first_line(error)}
            continue
        found[name] = {quantity: list(median_and_maximum(torch.cat(errors))) for quantity, errors in heads.items()}
    return found


def kernel(inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.full_like(inputs["v"], torch.nan)
    state = torch.full_like(inputs["initial_state"], torch.nan)
    flash_kda.fwd(**inputs, out=out, final_state=state)
    return out, state


def fla(inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty_like(inputs["v"])
    state = torch.empty_like(inputs["initial_state"])
    fla_peers.chunk(**inputs, out=out, final_state=state)
    return out, state


def relative(result: torch.Tensor, exact: torch.Tensor, head_axis: int) -> torch.Tensor:
    """Relative RMS error of each head, float64 `[heads]`; 0 where the head is exactly right, though it be all zeros.

    What is below the normal numbers of fp32 counts as 0 in both: a state that has decayed to nothing has no error.
    """
    result, exact = (torch.where(x.abs() < TINY, 0.0, x) for x in (result.double(), exact))  # NaN stays
    axes = [axis for axis in range(exact.dim()) if axis != head_axis]
    differs = (result != exact).sum(axes) > 0  # NaN differs from everything
    return torch.where(differs, errors_by_head(result, exact, head_axis), 0.0)


def median_and_maximum(heads: torch.Tensor) -> tuple[float | None, float | None]:
    """Median and maximum, None where one is not finite."""
    return tuple(x.item() if x.isfinite() else None for x in (heads.median(), heads.max()))


def above_fla(family: dict[str, dict]) -> list[str]:
    """The quantities in which the kernel's median is above fla's, or not finite, in words."""
    found = []
    for quantity in QUANTITIES:
        mine, theirs = (median(family.get(who), quantity) for who in ("kernel", "fla"))
        if not math.isfinite(mine) or mine > theirs:
            found.append(f"{quantity} {mine:.6f}, fla {theirs:.6f}")
    return found


def median(errors: dict | None, quantity: str) -> float:
    """Infinite where there is none: what failed is above everything, and nothing is above it."""
    value = (errors or {}).get(quantity, [None])[0]
    return math.inf if value is None else value


def table_of(families: dict[str, dict]) -> Table:
    """Median / maximum over the heads."""
    table = Table(["family", "kernel out", "fla out", "of fla", "kernel state", "fla state", "of fla"])
    for name, family in families.items():
        cells = [name]
        for quantity in QUANTITIES:
            mine, theirs = (median(family.get(who), quantity) for who in ("kernel", "fla"))
            bad = not math.isfinite(mine) or mine > theirs
            share = f"{mine / theirs:.2f}" if theirs and math.isfinite(theirs) and math.isfinite(mine) else ""
            cells += ["!" * bad + cell(family["kernel"], quantity), cell(family.get("fla"), quantity), share]
        table.rows.append(cells)
    return table


def cell(errors: dict | None, quantity: str) -> str:
    if errors is None:
        return ""
    if "error" in errors:
        return "failed"
    return " / ".join("not finite" if x is None else f"{x:.5f}" if x < 0.1 else f"{x:.2g}" for x in errors[quantity])


def save(file: Path, results: dict) -> None:
    write_whole(file, json.dumps(results, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
