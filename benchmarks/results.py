"""What a benchmark measured, from its JSON: one row a case, and whether the goals are met.

`python -m benchmarks` measures and writes the file; this page only reads it, without a GPU and without PyTorch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import ALONE, BESIDE, BESIDE_WITHIN, SHORT_GOALS

SPEED_FILE = "speed.json"
ACCURACY_FILE = "accuracy.json"
SPEED_VERSION = 1

GEOMETRIC_MEAN_WANTED = 5.0  # of the ratios to fla, over the six published cases
LINEAR_WITHIN = 0.05  # the cost of a token at any length against that at 8192
SCRATCH_AT_MOST = 10**9  # bytes, for 8192 tokens of 96 heads
DIFFERENCE_AT_MOST = 0.03  # relative RMS from fla on random data; fla itself is 0.004 from the oracle


@dataclass(frozen=True)
class Row:
    """One case: times in milliseconds, None where there is none. What is published was measured on an H200."""

    name: str
    group: str
    heads: int
    tokens: int
    sequences: int
    longest: int
    bytes: int
    fits_l2: bool
    floor_ms: float
    kernel_ms: float | None
    device_ms: float | None  # of the kernel, while the device always has more to do
    host_ms: float | None  # to queue a call of the kernel, mean
    fla_ms: float | None
    published_fla_ms: float | None
    published_flashkda_ms: float | None
    published_cudnn_ms: float | None
    published_vllm_ms: float | None
    wanted: float | None
    hoped: float | None
    wanted_ms: float | None  # on the device
    hoped_ms: float | None
    problems: tuple[str, ...]  # "kernel: ...", "fla: ..."
    peak_bytes: int | None
    difference: float | None  # of out or state from fla, the larger

    @property
    def equal_lengths(self) -> bool:
        return self.longest * self.sequences == self.tokens

    @property
    def ratio(self) -> float | None:
        """Times as fast as fla in this run; against fla's published time where it was left out."""
        fla = self.fla_ms or self.published_fla_ms
        return fla / self.kernel_ms if fla and self.kernel_ms else None

    @property
    def of_floor(self) -> float | None:
        """1 would be the floor itself."""
        return self.floor_ms / self.kernel_ms if self.kernel_ms else None

    @property
    def to_flashkda(self) -> float | None:
        """Times as fast as FlashKDA's published time."""
        return self.against(self.published_flashkda_ms)

    def against(self, published: float | None) -> float | None:
        """Times as fast as a published time; on the device where that is."""
        mine = self.device_ms if self.group == "few-heads" else self.kernel_ms
        return published / mine if published and mine else None


@dataclass(frozen=True)
class Goal:
    """met: None while it is not known."""

    text: str
    met: bool | None


def load(file: Path) -> dict:
    """The results in a file. Raises ValueError when it holds something else, OSError when it cannot be read."""
    try:
        results = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: expected the JSON of a benchmark, got other text: {error}") from error
    if (
        not isinstance(results, dict)
        or results.get("version") != SPEED_VERSION
        or not isinstance(results.get("cases"), dict)
    ):
        raise ValueError(f"{file}: expected a benchmark of version {SPEED_VERSION}, got another file")
    return results


def rows(results: dict) -> list[Row]:
    bandwidth, l2 = results["copy_bytes_per_second"], results["environment"]["device"]["l2_bytes"]
    found = []
    for name, record in results["cases"].items():
        kernel, fla = record["kernel"], record["fla"] or {}
        difference = record["difference"]
        problems = [f"{who}: {times['error']}" for who, times in (("kernel", kernel), ("fla", fla)) if "error" in times]
        if record.get("finite") is False:
            problems.append("kernel: its results are not finite")
        if difference is not None:
            difference = max((math.inf if x is None else x) for x in difference.values())
            if difference > DIFFERENCE_AT_MOST:
                problems.append(f"kernel: differs from fla by {difference:.2g}, relative RMS")
        found.append(
            Row(
                name=name,
                **{key: record[key] for key in ("group", "heads", "tokens", "sequences", "longest", "bytes")},
                fits_l2=record["bytes"] <= l2,
                floor_ms=1e3 * record["bytes"] / bandwidth,
                kernel_ms=kernel.get("ms"),
                device_ms=kernel.get("device_ms"),  # a file of an earlier version has none
                host_ms=kernel.get("host_ms"),
                fla_ms=fla.get("ms"),
                **{key: record[key] for key in ("published_fla_ms", "published_flashkda_ms", "wanted", "hoped")},
                **{f"published_{peer}_ms": record.get(f"published_{peer}_ms") for peer in ("cudnn", "vllm")},
                **{key: record.get(key) for key in ("wanted_ms", "hoped_ms")},
                problems=tuple(problems),
                peak_bytes=kernel.get("peak_bytes"),
                difference=difference,
            )
        )
    return found


def geometric_mean(rows: list[Row]) -> float | None:
    """Of the ratios to fla over the six published cases; None unless all six are there."""
    ratios = [row.ratio for row in rows if row.group == "six"]
    if len(ratios) != 6 or None in ratios:
        return None
    return math.exp(sum(map(math.log, ratios)) / 6)


def by_length(rows: list[Row], heads: int) -> list[Row]:
    """The measured cases of one sequence with that many heads, the shortest first. "few-heads" repeats some of them."""
    chosen = [row for row in rows if row.heads == heads and row.sequences == 1 and row.kernel_ms]
    chosen = [row for row in chosen if row.group != "few-heads"]
    return sorted(chosen, key=lambda row: row.tokens)


def goals(results: dict) -> list[Goal]:
    """What the project set itself, in words with what was measured."""
    all_rows = rows(results)
    six = [row for row in all_rows if row.group == "six"]
    mean = geometric_mean(all_rows)
    found = [
        Goal(
            f"{GEOMETRIC_MEAN_WANTED:g} times fla over the six, geometric mean: {_or_unknown(mean, '{:.2f}')}",
            None if mean is None else mean >= GEOMETRIC_MEAN_WANTED,
        )
    ]
    for word in ("wanted", "hoped"):
        below = [row.name for row in six if row.ratio is not None and row.ratio < getattr(row, word)]
        complete = len(six) == 6 and all(row.ratio is not None for row in six)
        what = f"below: {', '.join(below)}" if below else "none below" if complete else "not all measured"
        found.append(Goal(f"each of the six as many times fla as {word}: {what}", False if below else complete or None))
    compared = [row for row in all_rows if row.to_flashkda is not None]
    slower = [f"{row.name} ({row.to_flashkda:.2f})" for row in compared if row.to_flashkda < 1]
    found.append(
        Goal(
            f"no case slower than FlashKDA's published time: "
            f"{', '.join(slower) or f'none of {len(compared)} that were measured'}",
            not slower if compared else None,
        )
    )
    few = [row for row in all_rows if row.wanted_ms is not None]
    missed = [row.name for row in few if row.device_ms is not None and row.device_ms > row.wanted_ms]
    complete = bool(few) and all(row.device_ms is not None for row in few)
    what = f"not in {', '.join(missed)}" if missed else f"in {len(few)} cases" if complete else "not measured"
    found.append(Goal(f"few heads on the device in the time wanted: {what}", False if missed else complete or None))
    long = [row for row in by_length(all_rows, 96) if row.tokens >= 8192]
    costs = [row.kernel_ms / row.tokens for row in long]
    farthest = max((abs(cost / costs[0] - 1) for cost in costs[1:]), default=None)
    reach = f"8192 to {long[-1].tokens}" if len(long) > 1 else "8192 and more"
    found.append(
        Goal(
            f"cost linear in T, H = 96, {reach}, within {LINEAR_WITHIN:.0%}: {_or_unknown(farthest, '{:.1%}')}",
            None if farthest is None else farthest <= LINEAR_WITHIN,
        )
    )
    scratch = next((row.peak_bytes for row in long if row.tokens == 8192), None)
    found.append(
        Goal(
            f"scratch memory at T = 8192, H = 96 at most {SCRATCH_AT_MOST / 1e9:g} GB: "
            f"{_or_unknown(None if scratch is None else scratch / 1e6, '{:.1f} MB')}",
            None if scratch is None else scratch <= SCRATCH_AT_MOST,
        )
    )
    times = {row.name: row.kernel_ms for row in all_rows if row.kernel_ms}
    for name, most in SHORT_GOALS.items():
        if most is not None and name in times:
            found.append(Goal(f"{name}: at most {most:g} ms: {times[name]:.3f} ms", times[name] <= most))
    if ALONE in times and BESIDE in times:
        more = times[BESIDE] / times[ALONE] - 1
        found.append(Goal(f"{BESIDE}: at most {BESIDE_WITHIN:.0%} over {ALONE}: {more:.1%}", more <= BESIDE_WITHIN))
    return found


def _or_unknown(value: float | None, form: str) -> str:
    return "not measured" if value is None else form.format(value)
