"""What `benchmarks.analysis.bounds` measures: one function for each section of docs/bounds.md."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import torch

from benchmarks.analysis.operand_formats import EXACT, operand_formats
from benchmarks.analysis.published import published_inputs
from benchmarks.analysis.stages import STAGES, expected, of_family
from flash_kda import model
from flash_kda.formats import Formats, bf16, tf32, two_bf16
from fuzz.cases.case import Case
from fuzz.cases.drawing import draw_cases
from fuzz.cases.families import PUBLISHED
from fuzz.cases.inputs import Inputs, make_inputs
from fuzz.cases.strategies import USUAL_SCALE
from fuzz.defects.catalogue import CATALOGUE
from fuzz.defects.defect import Make, formats
from fuzz.judging import bounds, errors
from fuzz.judging.accuracy import Places, accuracy, measure, written
from fuzz.judging.call import Outputs, run_target
from fuzz.judging.sensitivity import Reference, reference
from fuzz.judging.verdict import shares_of_bounds
from fuzz.targets.registry import Target, load_target
from oracle import recurrent_kda

SEED = 4

JUDGED_TARGETS = {
    "model": (1000, "bf16"),
    "fla.chunk": (100, "fp32"),
    "fla.recurrent": (40, "fp32"),
    "fla.naive": (150, "fp32"),
}
"""Of each target, how many drawn cases within its reach it is judged on, and the format of its operands on a CPU, where
fla is slow."""

QUANTILES = (0.5, 0.9, 0.99, 1.0)

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    from rich.progress import track

    return track(items, what, total)


def quantiles(x: list[float]) -> list[float]:
    return rounded(torch.quantile(torch.tensor(x, dtype=torch.float64), torch.tensor(QUANTILES).double()).tolist())


def rounded(x):
    """To four digits, so that the file is short and says no more than it knows."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def stages() -> dict:
    """Of each stage and family, what it should err by and does; the median of three seeds."""
    found: dict = {"roundings": roundings(), "formula": {name: stage.formula for name, stage in STAGES.items()}}
    found["stages"] = {name: {} for name in STAGES}
    for family in progress(PUBLISHED, "stages"):
        seeds = [of_family(family, seed) for seed in range(3)]
        for name in STAGES:
            rows = [seed[name] for seed in seeds]
            found["stages"][name][family] = {
                what: None if rows[0][what] is None else sorted(row[what] for row in rows)[1] for what in rows[0]
            }
    return found


def roundings() -> dict:
    """Relative RMS error of one rounding of normal numbers: predicted, measured."""
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(SEED))
    found = {}
    for name, format in (("bf16", bf16), ("tf32", tf32), ("two bf16", two_bf16)):
        error = (format(x).double() - x.double()) / x.double()
        found[name] = {"predicted": expected(format), "measured": float(error.square().mean().sqrt())}
    return found


ERROR_SOURCES = {
    "L, M: decayed rows and columns": ("diagonal", "between"),
    "K~, Q~": ("K", "Q"),
    "Kr": ("Kr",),
    "M": ("M",),
    "U": ("U",),
    "S as an operand": ("S",),
    "X and its merge": ("merge", "X"),
    "X b": ("Xb",),
    "W": ("W",),
}

ALL_ELSE = "fp32: all else"

TOGETHER = "all together"

SUM = "root of the sum of squares"

LAST = "the last rounding, to bf16"


def budget() -> dict:
    """Relative RMS error of out, before it is rounded, and of the state, by what is rounded, everything else exact."""
    found: dict = {}
    for family in progress(PUBLISHED, "budget"):
        inputs = published_inputs(family, 0)
        right = recurrent_kda(**inputs)

        def errs(formats: Formats, inputs=inputs, right=right) -> list[float]:
            with operand_formats(formats):
                results = unrounded(inputs)
            return [float(errors.rms(x - y) / errors.rms(y)) for x, y in zip(results, right, strict=True)]

        rows = {ALL_ELSE: errs(EXACT)}
        for source, operands in ERROR_SOURCES.items():
            rows[source] = errs(replace(EXACT, **{name: getattr(Formats, name) for name in operands}))
        rows[SUM] = [math.hypot(*column) for column in zip(*rows.values(), strict=True)]
        rows[TOGETHER] = errs(Formats())
        out = right[0]
        rows[LAST] = [float(errors.rms(out.bfloat16().double() - out) / errors.rms(out)), 0.0]
        for source, (of_out, of_state) in rows.items():
            found.setdefault(source, {})[family] = {"out": of_out, "state": of_state}
    return found


def unrounded(inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """`model.forward` of one sequence, with `out` in float64 as it is before its last rounding."""
    chunks = model.Chunks.of([(0, inputs["q"].shape[1])], torch.device("cpu"))
    tokens = (chunks.gather(inputs[name]) for name in ("q", "k", "v", "g", "beta"))
    p = model.prepare(*tokens, inputs["A_log"], inputs["dt_bias"], inputs["lower_bound"], chunks.valid)
    state = inputs["initial_state"].clone()
    out = model.recur(p, state, chunks) * (inputs["scale"] * p.qn)
    return out.transpose(1, 2)[chunks.valid][None].double(), state.double()


@dataclass(frozen=True)
class JudgedCase:
    """A case of the fuzzer's, and what is right."""

    case: Case
    inputs: Inputs
    reference: Reference

    @staticmethod
    def of(case: Case) -> JudgedCase:
        inputs = make_inputs(case)
        return JudgedCase(case, inputs, reference(inputs, "cpu"))

    def run(self, target: Target) -> Outputs:
        return run_target(target, self.inputs)

    def places(self, outputs: Outputs, operands: str = "bf16") -> list[Places]:
        return measure(outputs, self.inputs, self.reference, operands)


def name_of(places: Places, inputs: Inputs) -> str:
    narrow = places.name.startswith("state") and inputs.final_state_dtype == torch.bfloat16
    return f"{places.name}, bf16" if narrow else places.name


METRIC_COLUMNS = tuple(f"state{level}{dtype}" for dtype in ("", ", bf16") for level in ("", "_head", "_element"))

METRIC_COLUMNS = ("out", "out_window", "out_element", *METRIC_COLUMNS)


def used(places: Places) -> float:
    """The largest part that an error uses of what it may be beyond the last rounding."""
    beyond = (places.error - places.rounding).clamp_min(0) / (places.allowed - places.rounding)
    return float(beyond.max())


def cases() -> dict:
    """Of each target and metric: the part of the bound that errors use, one number a case, the largest."""
    most = max(count for count, _ in JUDGED_TARGETS.values())
    drawn = draw_cases("cpu", SEED, most + 200)[:most]
    parts: dict = {}
    for name, (count, operands) in JUDGED_TARGETS.items():
        judged, found = load_target(name), {metric: [] for metric in METRIC_COLUMNS}
        failed = 0
        within = [case for case in drawn if judged.reach(case) is None][:count]
        for case in progress(within, f"cases: {name}"):
            one = JudgedCase.of(case)
            outputs = one.run(judged)
            measured = one.places(outputs, operands)
            failed += not written(outputs, one.reference).passed or any((p.error > p.allowed).any() for p in measured)
            for places in measured:
                found[name_of(places, one.inputs)].append(used(places))
        parts[judged.name] = {
            "cases": len(within),
            "operands": operands,
            "failed": int(failed),
            "used": {metric: quantiles(x) for metric, x in found.items() if x},
        }
    return parts


BINS = (1.0, 0.5, 0.25, 0.125, 1 / 16, 1 / 32, 1 / 64, 1 / 128)


def tails() -> dict:
    """Of windows and heads, by the share of the largest independent error: how many standard deviations they err by."""
    found: dict[str, list[torch.Tensor]] = {"out_window": [], "state_head": []}
    judged = load_target("model")
    for case in progress(draw_cases("cpu", SEED + 1, 600), "tails"):
        one = JudgedCase.of(case)
        for places in one.places(one.run(judged)):
            if places.name in found and name_of(places, one.inputs) == places.name:
                beyond = (places.error - places.rounding - places.floor).clamp_min(0) / places.deviation
                keep = places.deviation > 0
                found[places.name].append(torch.stack([places.share.expand_as(beyond)[keep], beyond[keep]]))
    return {name: by_share(*torch.cat(pairs, 1)) for name, pairs in found.items()}


def by_share(share: torch.Tensor, deviations: torch.Tensor) -> list[dict]:
    rows = []
    for most, least in itertools.pairwise((*BINS, 0.0)):
        x = deviations[(share <= most * (1 + 1e-9)) & (share > least * (1 + 1e-9))]
        if len(x):
            allowed = float(bounds.tail(torch.tensor(max(least, 1 / 128), dtype=torch.float64)))
            rows.append({"share": most, "places": len(x), "reached": quantiles(x.tolist()), "allowed_from": allowed})
    return rows


INVERSES: dict[str, dict] = {
    "merges": {"merge": bf16},
    "merges and X": {"merge": bf16, "X": bf16},
    "merges, X and X b": {"merge": bf16, "X": bf16, "Xb": bf16},
}
"""What of the model's inverse is in bf16."""


def inverse() -> dict:
    """Of right models with an inverse in bf16, over cases of similar keys: how many are above their bounds, and the
    largest part of a bound beyond the last rounding; with the format of the inverse undeclared, and declared."""
    drawn = [case for case in draw_cases("cpu", SEED + 3, 2500) if case.keys in SIMILAR and case.tokens > model.BLOCK]
    found: dict = {name: {"cases": len(drawn), **{how: [0, 0.0] for how in DECLARED}} for name in INVERSES}
    for case in progress(drawn, "inverse"):
        one = JudgedCase.of(case)
        for name, operands in INVERSES.items():
            outputs = one.run(Target(name, formats(**operands)(), "cpu"))
            for how, format in DECLARED.items():
                check = accuracy(outputs, one.inputs, one.reference, inverse=format)
                above, most = found[name][how]
                shares = shares_of_bounds(asdict(check)).values()
                found[name][how] = [above + (not check.passed), max(most, *shares, 0.0)]
    return found


SIMILAR = ("equal", "opposite", "repeated", "collinear", "collinear_strong", "relay")

DECLARED = {"undeclared": "fp32", "declared": "bf16"}

NUMERIC: dict[str, Make] = {
    "merges in bf16": formats(merge=bf16),
    "merges, X and X b in bf16": formats(merge=bf16, X=bf16, Xb=bf16),
    **{
        name.replace("_", " "): CATALOGUE[name].make
        for name in (
            "fp16_neumann_inverse",
            "operands_rounded_twice",
            "operands_truncated",
            "state_in_bf16",
            "log_decay_in_bf16",
            "keys_in_fp8",
        )
    },
}

PLACED = ("out", "out_window", "state", "state_head")

CONSTANTS = tuple(2.0 ** (n / 4) for n in range(-34, 9))

SHOWN_CONSTANTS = (0.01, 0.03, 0.1)


def constants() -> dict:
    """A bound that follows the case against constant ones, on cases of the fuzzer and the published inputs.

    Of the right model and of each planted defect: the largest relative error of each case, and the largest part of the
    bound, over the same places. A defect counts in the cases that it at least doubles the error of.
    """
    published = [published_case(family, seed) for family in PUBLISHED for seed in range(6)]
    drawn = draw_cases("cpu", SEED + 2, 250)
    rows = []
    for case in progress([*published, *drawn], "constants"):
        one = JudgedCase.of(case)
        family = next((name for name, keys in PUBLISHED.items() if case in published and has(case, keys)), "drawn")
        right = one.run(load_target("model"))
        row = {"family": family, "right": largest(one, right), "defects": {}}
        base = sizes(one, right)
        for name, make in NUMERIC.items():
            outputs = one.run(Target(name, make(), "cpu"))
            if any(b > 2 * a for a, b in zip(base, sizes(one, outputs), strict=True)):
                row["defects"][name] = largest(one, outputs)
        rows.append(row)
    return by_defect(rows)


def published_case(family: str, seed: int) -> Case:
    plain = {"queries": "random", "values": "random", "states": "random"}
    return Case(
        (256,), 2, False, "int64", -5.0, USUAL_SCALE, "fp32", "fp32", False, "contiguous",
        **plain, **PUBLISHED[family], seed=seed,
    )  # fmt: skip


def has(case: Case, families: dict[str, str]) -> bool:
    return all(getattr(case, name) == value for name, value in families.items())


def sizes(one: JudgedCase, outputs: Outputs) -> list[float]:
    """RMS error of each tensor; infinite where something is not finite that should be."""
    if not written(outputs, one.reference).passed:
        return [math.inf] * 2
    pairs = [(outputs.out, one.reference.out), (outputs.final_state, one.reference.state)]
    return [0.0 if x is None else float(errors.rms(errors.difference(x, y))) for x, y in pairs]


def largest(one: JudgedCase, outputs: Outputs) -> list[float]:
    """(error relative to its sequence and head, part of the bound), the largest over all places."""
    if not written(outputs, one.reference).passed:
        return [math.inf, math.inf]
    places = [p for p in one.places(outputs) if p.name in PLACED]
    if not places:
        return [0.0, 0.0]
    return [
        float(max((p.error / p.unit).max() for p in places)),
        float(max((p.error / p.allowed).max() for p in places)),
    ]


def by_defect(rows: list[dict]) -> dict:
    right = [row["right"] for row in rows]
    quietest = max(constant for constant, _ in right)

    def share(values: list[bool]) -> float | None:
        return sum(values) / len(values) if values else None

    def above(values: list[list[float]], c: float) -> float | None:
        return share([constant > c for constant, _ in values])

    found: dict = {
        "cases": len(rows),
        "quietest": quietest,
        "false_alarms": {
            "follows": share([part > 1 for _, part in right]),
            "constant": [above(right, c) for c in CONSTANTS],
        },
        "shown": {str(c): above(right, c) for c in SHOWN_CONSTANTS},
        "defects": {},
        "families": {},
    }
    for name in NUMERIC:
        values = [row["defects"][name] for row in rows if name in row["defects"]]
        found["defects"][name] = {
            "cases": len(values),
            "missed": share([part <= 1 for _, part in values]),
            "constant": [None if not values else 1 - above(values, c) for c in CONSTANTS],
            "shown": {str(c): None if not values else 1 - above(values, c) for c in (*SHOWN_CONSTANTS, quietest)},
        }
    for family in PUBLISHED:
        of = [row for row in rows if row["family"] == family]
        hidden = [min((row["right"][0] / row["right"][1]) for row in of), max(row["right"][0] for row in of)]
        found["families"][family] = {"right": hidden[1], "allowed": hidden[0]}
    return found
