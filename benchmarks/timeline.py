"""`python -m benchmarks.timeline`: what each role of the kernel does when, drawn from clock reads. Needs a Hopper GPU.

Compiles the kernel with clock reads at the beginning of each stage, runs one case, and writes timeline.json and
timeline.svg. Two CTAs are shown, for some chunks in the middle of their work: those of the first cluster, or one that
has R alone and one that only prepares. A clock read takes
about 40 cycles, so the kernel is slower here than in the normal build. Exit status: 0 drawn, 2 nothing was recorded.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np

from benchmarks.cases import SpeedCase, speed_cases

RECORDING, PICTURE = "timeline.json", "timeline.svg"
DRAWN, NOTHING_RECORDED = 0, 2
WAIT = "0.9"  # its colour
LAUNCHES = 3  # the last one is drawn: the first ones load the kernel and fill the caches


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.show is not None:
            recording = json.loads(options.show.read_text())
        else:
            recording = record(speed_cases()[options.case])
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / RECORDING).write_text(json.dumps(recording) + "\n")
        options.out.mkdir(parents=True, exist_ok=True)
        draw_timeline(recording, options.out / PICTURE)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"python -m benchmarks.timeline: {error}", file=sys.stderr)
        return NOTHING_RECORDED
    print(mean_cycles(recording))
    print(f"picture: {options.out / PICTURE}")
    return DRAWN


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.timeline", description=__doc__)
    parser.add_argument(
        "--case",
        default="H96 fixed",
        choices=list(speed_cases()),
        metavar="NAME",
        help="case of the benchmark (default H96 fixed)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/timeline"),
        metavar="DIR",
        help="folder of the results (default runs/timeline)",
    )
    parser.add_argument("--show", type=Path, metavar="FILE", help=f"{RECORDING} to draw, without a run")
    return parser.parse_args(arguments)


def record(case: SpeedCase) -> dict:
    """Runs the case on the instrumented kernel.

    Returns the names of `stages`, the `roles` by warp of each CTA, and `marks`: CTA, warp, clock in cycles since both
    CTAs began, stage and chunk of each. Raises RuntimeError without a Hopper GPU or a compiler.
    """
    from benchmarks import speed
    from fuzz.defects.device import BuildError, Patch, build

    device = speed.find_device()
    if "FLASH_KDA_LIBRARY" not in os.environ:
        print("compiling the kernel with clock reads", flush=True)
        try:
            patch = Patch("csrc/sm90/timeline.h", "#pragma once", "#pragma once\n#define FLASH_KDA_TIMELINE")
            os.environ["FLASH_KDA_LIBRARY"] = str(build((patch,)))
        except BuildError as error:
            raise RuntimeError(str(error)) from error
    import torch

    import flash_kda
    from flash_kda import library

    kernel = library.load()
    if not hasattr(kernel, "flash_kda_timeline_read"):
        raise RuntimeError(
            f"FLASH_KDA_LIBRARY: expected a library compiled with FLASH_KDA_TIMELINE, got {library.path()}. Unset it."
        )
    inputs = speed.speed_inputs(case, device)
    inputs |= {"out": torch.empty_like(inputs["v"])}
    for _ in range(LAUNCHES):
        flash_kda.fwd(**inputs)
    torch.cuda.synchronize(device)
    return read(kernel)


def read(kernel: ctypes.CDLL) -> dict:
    """What the last launch recorded, as `record` returns it."""
    shape = (ctypes.c_int32 * 3)()
    kernel.flash_kda_timeline_shape(shape)
    ctas, warps, marks = shape
    words = (ctypes.c_uint32 * (1 + ctas + ctas * warps * marks * 3))()
    if error := kernel.flash_kda_timeline_read(words):
        raise RuntimeError(f"the clocks cannot be read: CUDA error {error}")
    for function in (kernel.flash_kda_timeline_stage, kernel.flash_kda_timeline_role):
        function.restype = ctypes.c_char_p
    stages = []
    while name := kernel.flash_kda_timeline_stage(len(stages)):
        stages.append(name.decode())
    apart, *clocks = words
    role_of = functools.partial(kernel.flash_kda_timeline_role, int(apart))
    roles = [{w: name.decode() for w in range(warps) if (name := role_of(cta, w))} for cta in range(ctas)]
    clocks = np.array(clocks, np.uint32)
    begin, rows = clocks[:ctas], clocks[ctas:].reshape(ctas, warps, marks, 3)
    end = len(stages) - 1
    return {
        "stages": stages,
        "roles": roles,
        "marks": [
            [cta, warp, int(clock - begin[cta]), int(stage), int(chunk)]  # clocks of 32 bits wrap around
            for cta in range(ctas)
            for warp in roles[cta]
            for clock, stage, chunk in rows[cta, warp]
            if stage != end
        ],
    }


def intervals(recording: dict) -> dict[tuple[int, str], list[tuple[int, int, str, int]]]:
    """By CTA and role: begin and duration in cycles, stage and chunk of everything between two marks."""
    roles = [{int(warp): role for warp, role in of_cta.items()} for of_cta in recording["roles"]]
    rows: dict[tuple[int, str], list] = {}
    for cta, warp, clock, stage, chunk in recording["marks"]:
        rows.setdefault((cta, roles[cta][warp]), []).append((clock, recording["stages"][stage], chunk))
    return {
        row: [(at, following - at, stage, chunk) for (at, stage, chunk), (following, _, _) in itertools.pairwise(marks)]
        for row, marks in rows.items()
    }


def mean_cycles(recording: dict) -> str:
    """For each role of each CTA, the mean cycles of each stage for a chunk."""
    lines = ["mean cycles of a stage:"]
    for (cta, role), parts in intervals(recording).items():
        if not parts:
            continue
        times: dict[str, list[int]] = {}
        for _, duration, stage, _ in parts:
            times.setdefault(stage, []).append(duration)
        lines.append(f"  CTA {cta}: {role:10} " + ", ".join(f"{stage} {np.mean(t):.0f}" for stage, t in times.items()))
    return "\n".join(lines)


def draw_timeline(recording: dict, file: Path) -> None:
    """One row a role of each CTA, one colour a stage; waits are light grey."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text: a small file
    matplotlib.rcParams["svg.hashsalt"] = "timeline"
    import matplotlib.pyplot as plt

    rows = intervals(recording)
    # The chunks that all roles have recorded, after the first ones
    begin = max(parts[0][0] for parts in rows.values() if parts)
    end = min(at + duration for parts in rows.values() if parts for at, duration, _, _ in parts[-1:])
    if end <= begin:
        begin, end = 0, max(at + duration for parts in rows.values() for at, duration, _, _ in parts)
    stages = [
        stage for stage in recording["stages"] if any(stage == part[2] for parts in rows.values() for part in parts)
    ]
    work = [stage for stage in stages if not stage.startswith("wait")]
    colours = {stage: plt.get_cmap("tab20")(i % 20) for i, stage in enumerate(work)}
    figure, axes = plt.subplots(figsize=(14, 0.42 * len(rows) + 1.8), layout="constrained")
    for y, (_, parts) in enumerate(rows.items()):
        for at, duration, stage, chunk in parts:
            left, right = max(at, begin), min(at + duration, end)
            if right <= left:
                continue
            waits = stage.startswith("wait")
            style = (
                {"facecolor": "0.93", "hatch": "////", "edgecolor": "0.8"} if waits else {"facecolor": colours[stage]}
            )
            axes.barh(y, right - left, 0.8, left - begin, linewidth=0, **style)
            if not waits and right - left > (end - begin) / 60:
                axes.text((left + right) / 2 - begin, y, str(chunk), ha="center", va="center", fontsize=6)
    axes.set_yticks(range(len(rows)), [f"CTA {cta}: {role}" for cta, role in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, end - begin)
    axes.set_xlabel("cycles; numbers are chunks")
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=colours[stage]) for stage in work]
    handles.append(plt.Rectangle((0, 0), 1, 1, facecolor=WAIT))
    figure.legend(handles, [*work, "waits"], loc="outside lower center", ncols=7, fontsize=7, frameon=False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
