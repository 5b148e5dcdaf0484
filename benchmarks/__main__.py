"""`python -m benchmarks`: the kernel's speed, beside fla's and the floor. Needs a Hopper GPU.

Prints a table, and writes speed.json after each case, speed.svg and speed.png at the end. Exit status: 0 measured, 1 a
case failed or gave wrong results, 2 nothing could be measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import results as benchmark
from benchmarks.cases import HOST, chosen
from benchmarks.table import Table

MEASURED, FAILED, NOT_MEASURED, INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.show is not None:
            file, results = options.show, benchmark.load(options.show)
            return conclude(results, file)
        file = options.out / benchmark.SPEED_FILE
        cases = chosen(options.cases)
        from benchmarks import host, speed

        if HOST in options.cases:
            try:
                host.measure()
            except speed.CannotMeasure as error:
                raise ValueError(str(error)) from error
        if not cases:
            return MEASURED
        settings = speed.Settings(
            calls=options.calls, with_fla=not options.no_fla, cold=options.cold, peers=tuple(options.peer)
        )
        status = MEASURED
        try:
            speed.measure_all(cases, settings, file, resume=options.resume, say=say)
        except KeyboardInterrupt:
            say("interrupted; --resume continues")
            status = INTERRUPTED
        except speed.DeviceLost as error:
            say(str(error))
            status = FAILED
        except speed.CannotMeasure as error:
            raise ValueError(str(error)) from error
        return max(status, conclude(benchmark.load(file), file)) if file.exists() else status
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except ValueError as error:
        message = str(error)
    print(f"python -m benchmarks: {message}", file=sys.stderr)
    return NOT_MEASURED


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["six"],
        metavar="NAME",
        help="groups (six, also, few-heads, short, linear, scaling, checkpoints, all), names of cases, or host for the "
        "host time of a call (default six)",
    )
    parser.add_argument(
        "--no-fla",
        action="store_true",
        help="measurement without fla, which takes a minute to tune for each number of heads",
    )
    parser.add_argument(
        "--calls", type=positive, metavar="N", default=60, help="number of timed calls for each case (default 60)"
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME",
        help="target to time beside the kernel, such as vllm.flashkda or cudnn.kda; repeatable",
    )
    parser.add_argument("--cold", action="store_true", help="calls with an overwritten L2 cache")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs/benchmark"),
        help="folder of the results (default runs/benchmark)",
    )
    parser.add_argument("--resume", action="store_true", help="measurement of the cases that the folder lacks")
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="speed.json to show as table and plot, without a measurement"
    )
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return int(text)


def say(text: str) -> None:
    print(text, flush=True)


def conclude(results: dict, file: Path) -> int:
    """Table, goals, problems and plots of what was measured."""
    rows = benchmark.rows(results)
    device, settings = results["environment"]["device"], results["settings"]
    say("")
    copy = f"{results['copy_bytes_per_second'] / 1e12:.2f} TB/s"
    how = "L2 overwritten before each" if settings["cold"] else "back to back on the same buffers"
    say(f"{device['name']}, copy {copy}; median of {settings['calls']} calls, {how}; fp32 states unless named")
    table_of([row for row in rows if row.group != "few-heads"]).print()
    few = [row for row in rows if row.group == "few-heads"]
    if few:
        say('few heads; peers as published (H200). All but "kernel ms" and "host us" is on the device alone')
        table_of_few_heads(few).print()
    if any(row.fits_l2 for row in rows) and not settings["cold"]:
        say(f"*: all that it moves fits into the L2 cache ({device['l2_bytes'] / 1e6:.0f} MB), so it was warm")
    if any(row.ratio and not row.fla_ms for row in rows):
        say("(...): fla's published time, measured on an H200; it was left out here")
    for goal in benchmark.goals(results):
        say(f"{'?' if goal.met is None else 'yes' if goal.met else 'NO':>3}  {goal.text}")
    problems = [f"{row.name}: {problem}" for row in rows for problem in row.problems]
    for problem in problems:
        say(f"problem: {problem}")
    say(f"written: {file}")
    draw_plots(results, file)
    return FAILED if any(": kernel: " in problem for problem in problems) else MEASURED


def table_of(rows: list[benchmark.Row]) -> Table:
    table = Table(
        ["case", "MB", "kernel ms", "host us", "fla ms", "x fla", "wanted", "hoped", "floor ms", "of floor",
         "FlashKDA ms", "x FlashKDA"]
    )  # fmt: skip
    for row in rows:
        below = row.ratio is not None and row.wanted is not None and row.ratio < row.wanted
        slower = row.to_flashkda is not None and row.to_flashkda < 1
        published = row.fla_ms is None and row.published_fla_ms is not None
        fla = number(row.fla_ms or row.published_fla_ms, "{:.3f}")
        ratio = number(row.ratio, "{:.2f}")
        table.rows.append(
            [
                row.name + "*" * row.fits_l2,
                f"{row.bytes / 1e6:.0f}",
                number(row.kernel_ms, "{:.3f}") or "!failed",
                number(row.host_ms and 1e3 * row.host_ms, "{:.0f}"),
                f"({fla})"
                if published
                else fla or ("failed" if any(p.startswith("fla") for p in row.problems) else ""),
                "!" * below + (f"({ratio})" if published and ratio else ratio),
                number(row.wanted, "{:g}"),
                number(row.hoped, "{:g}"),
                number(row.floor_ms, "{:.3f}"),
                number(row.of_floor, "{:.0%}"),
                number(row.published_flashkda_ms, "{:.3f}"),
                "!" * slower + number(row.to_flashkda, "{:.2f}"),
            ]
        )
    return table


def table_of_few_heads(rows: list[benchmark.Row]) -> Table:
    table = Table(
        ["case", "device ms", "wanted", "hoped", "floor ms", "cuDNN ms", "x cuDNN", "vLLM ms", "x vLLM", "FlashKDA ms",
         "x FlashKDA", "kernel ms", "host us"]
    )  # fmt: skip
    for row in rows:
        slower = row.device_ms is not None and row.device_ms > row.wanted_ms
        cells = [row.name, "!" * slower + number(row.device_ms, "{:.3f}") or "!failed"]
        cells += [number(ms, "{:.3f}") for ms in (row.wanted_ms, row.hoped_ms, row.floor_ms)]
        for ms in (row.published_cudnn_ms, row.published_vllm_ms, row.published_flashkda_ms):
            ratio = row.against(ms)
            behind = ratio is not None and ratio < 1
            cells += [number(ms, "{:.3f}"), "!" * behind + number(ratio, "{:.2f}")]
        table.rows.append(
            [*cells, number(row.kernel_ms, "{:.3f}"), number(row.host_ms and 1e3 * row.host_ms, "{:.0f}")]
        )
    return table


def number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def draw_plots(results: dict, file: Path) -> None:
    try:
        from benchmarks.plot import plot
    except ImportError as error:
        say(f"no plot, as {error.name} is not installed; elsewhere: python -m benchmarks --show {file}")
        return
    for path in plot(results, file):
        say(f"plot: {path}")


if __name__ == "__main__":
    sys.exit(main())
