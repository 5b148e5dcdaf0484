"""The command line: `python -m fuzz run | replay | minimize | report | conform | targets`.

Exit status: 0 nothing disagreed, 1 something did, 2 nothing was judged or the command could not be carried out.
"""

from __future__ import annotations

import os
import random
import re
import sqlite3
import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__)

AGREED, DISAGREED, NOT_DONE = 0, 1, 2
INTERRUPTED = 130  # what typer makes of Ctrl-C
DEVICE_JOBS = 4  # of a self-check on a GPU: a kernel that hangs takes its share of the time from all others

Targets = Annotated[
    list[str] | None,
    typer.Option(help="A built-in target or package.module:function; may be repeated. Default: all that can run here."),
]
OneTarget = Annotated[str | None, typer.Option(help="Judge this target instead of the one that a finding names.")]
TimeLimit = Annotated[str, typer.Option(help="For one target on one case, such as 60s.")]


class UsageError(ValueError):
    """An option makes no sense; the message is one line."""


def seconds(option: str, text: str) -> float:
    """The seconds in "90", "90s", "5m" or "2h". Raises UsageError unless they are more than 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    value = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not 0 < value < 1e8:
        raise UsageError(f"{option} {text}: accepted: a time greater than 0, such as 60s, 5m or 2h")
    return value


@app.command()
def run(
    target: Targets = None,
    budget: Annotated[str | None, typer.Option(help="Time to judge for, such as 60s, 5m or 2h. Default: 60s.")] = None,
    cases: Annotated[int | None, typer.Option(help="Number of cases to judge, instead of a time.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the cases. Default: a random one, which is shown.")] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Worker processes. Default: one for each core, fewer where GPUs lack the memory.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/ and the time, in UTC.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="Size of the cases: cpu, gpu or long. Default: gpu where there is one, else cpu.")
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(help="For one target on one case. Default: 60s, or a quarter of the budget where that is less."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the campaign in this run folder, killed, interrupted or finished.")
    ] = None,
    previous: Annotated[
        list[Path] | None,
        typer.Option(
            help="Run folder or finding that is judged before any new case; may be repeated. "
            "Default without --out: the newest folder in runs/ that has findings of these targets."
        ),
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="local, or ray: on all machines of a Ray cluster. Default: local.")
    ] = None,
) -> None:
    """Judge targets on new cases. Save, shrink and count what disagrees. Write a report."""
    from fuzz.campaign import campaign
    from fuzz.campaign.devices import cores, default_jobs, gpus
    from fuzz.campaign.plan import ENGINES, Plan, resumed
    from fuzz.cases.strategies import PROFILES
    from fuzz.reporting.display import live

    if budget is not None and cases is not None:
        raise UsageError("--budget and --cases: both given; accepted: one of them")
    if cases is not None and cases < 1:
        raise UsageError(f"--cases {cases}: accepted: 1 or more")
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs}: accepted: 1 or more")
    if seed is not None and seed < 0:
        raise UsageError(f"--seed {seed}: accepted: 0 or more")
    if profile is not None and profile not in PROFILES:
        raise UsageError(f"--profile {profile}: unknown; accepted: {', '.join(PROFILES)}")
    if engine is not None and engine not in ENGINES:
        raise UsageError(f"--engine {engine}: unknown; accepted: {', '.join(ENGINES)}")
    limit = None if time_limit is None else seconds("--time-limit", time_limit)
    if resume is not None:
        fixed = {
            "target": target,
            "seed": seed,
            "out": out,
            "profile": profile,
            "time-limit": time_limit,
            "previous": previous,
            "engine": engine,
        }
        if given := [name for name, value in fixed.items() if value is not None]:
            raise UsageError(f"--resume with --{given[0]}: accepted with it: --budget, --cases, --jobs")
        longer = None if budget is None else seconds("--budget", budget)
        plan = resumed(resume, budget=longer, cases=cases, jobs=jobs)
    else:
        found = gpus()
        profile = profile or ("gpu" if found else "cpu")
        if engine != "ray":  # whose machines each find out what fits them
            jobs = jobs or default_jobs(found, PROFILES[profile].gpu_memory, cores())
        plan = Plan(
            out=out or Path("runs") / datetime.now(timezone.utc).strftime("%Y-%m-%dT%H%M%SZ"),
            targets=tuple(dict.fromkeys(target or ())),
            budget=None if cases is not None else seconds("--budget", budget or "60s"),
            cases=cases,
            seed=random.SystemRandom().randrange(2**32) if seed is None else seed,
            jobs=jobs,
            profile=profile,
            time_limit=limit,
            engine=engine or "local",
            previous=tuple(previous or ()),
            runs=Path("runs") if out is None else None,
        )
    with live(plan) as display:
        progress = campaign.run(plan, display.show)
    display.summarise(progress)
    judged = progress.cases or progress.replays or progress.findings
    if judged:
        from fuzz.reporting.report import write_report

        print(f"report: {write_report(plan.out)}")
    else:
        print("nothing was judged")
    raise typer.Exit(DISAGREED if progress.findings else AGREED if judged else NOT_DONE)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@app.command()
def replay(
    path: Annotated[list[Path], typer.Argument(help="Findings, case files, or folders of them.")],
    target: OneTarget = None,
    time_limit: TimeLimit = "60s",
) -> None:
    """Judge saved findings and cases again; a finding from its saved inputs alone."""
    from fuzz.campaign import findings
    from fuzz.campaign import replay as replaying
    from fuzz.reporting.display import describe_result

    limit = seconds("--time-limit", time_limit)
    saved = [one for each in path for one in findings.find(each)]
    outcomes: Counter[str] = Counter()
    for one, result in replaying.replay(saved, target=target, time_limit=limit):
        damaged = any(check["name"] == "harness" for check in result.failed_checks)  # says nothing about the target
        outcomes["not judged" if damaged else result.outcome] += 1
        for line in describe_result(one.path, result):
            print(line, flush=True)
    if len(saved) > 1:
        others = (f", {outcomes[each]} {each}" for each in ("skipped", "not judged") if outcomes[each])
        print(f"{len(saved)} replayed, {outcomes['failed']} failed{''.join(others)}")
    done = outcomes["passed"] and not outcomes["not judged"]
    raise typer.Exit(DISAGREED if outcomes["failed"] else AGREED if done else NOT_DONE)


@app.command()
def minimize(
    path: Annotated[Path, typer.Argument(help="A finding or a case file.")],
    target: OneTarget = None,
    budget: Annotated[str, typer.Option(help="Time to search for.")] = "2m",
    time_limit: TimeLimit = "60s",
) -> None:
    """Shrink a finding or a case file further, into a new finding beside it."""
    from fuzz.campaign import replay as replaying
    from fuzz.reporting.display import describe_case

    limits = {"seconds": seconds("--budget", budget), "time_limit": seconds("--time-limit", time_limit)}
    found = replaying.minimize(path, target=target, **limits)
    if found is None:
        print(f"{path}: does not fail, so there is nothing to shrink")
        raise typer.Exit(AGREED)
    shrunk, folder = found
    how = "smallest" if shrunk.finished else "smallest when the time was up"
    print(f"{how} of {shrunk.judged} cases judged: {describe_case(shrunk.failure.case)}")
    print("none is smaller than the one given, so nothing was saved" if folder is None else f"saved: {folder}")
    raise typer.Exit(DISAGREED)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")],
    benchmark: Annotated[
        Path | None, typer.Option(help="speed.json of a benchmark. Default: that in the run folder, if there is one.")
    ] = None,
) -> None:
    """Write the report of a campaign: one self-contained HTML page."""
    from fuzz.campaign import findings
    from fuzz.reporting.report import write_report

    findings.recover(folder / "findings")
    print(f"report: {write_report(folder, benchmark)}")


@app.command()
def conform(
    target: Annotated[str, typer.Option(help="A built-in target or package.module:function.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the card. Default: runs/conform- and the time.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random cases.")] = 0,
    fuzz_cases: Annotated[int, typer.Option(help="Random cases on the last rung.")] = 200,
    time_limit: TimeLimit = "60s",
) -> None:
    """Hold one target to the fixed ladder, and write its report card as JSON and HTML."""
    from rich.console import Console

    from fuzz.conformance import card, conform

    if fuzz_cases < 1:
        raise UsageError(f"--fuzz-cases {fuzz_cases}: accepted: 1 or more")
    if seed < 0:
        raise UsageError(f"--seed {seed}: accepted: 0 or more")
    folder = out or Path("runs") / datetime.now(timezone.utc).strftime("conform-%Y-%m-%dT%H%M%SZ")
    for name in (*card.FILES, "findings"):
        if (folder / name).exists():
            raise UsageError(f"--out {folder}: already holds a card ({name} is there); give another folder")
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):  # asked now, and not after the climb
        raise UsageError(f"--out {folder}: {there} is no folder that can be written to; give another folder")
    plan = conform.Plan(target, folder, seed, fuzz_cases, seconds("--time-limit", time_limit))
    with card.live() as show:
        result = conform.conform(plan, show)
    if result.rows:
        card.write_card(result, folder)
        card.print_card(result, Console())
        print(f"card: {folder / card.PAGE}")
    raise typer.Exit(DISAGREED if result.failed else AGREED if result.reached else NOT_DONE)


@app.command("self-check")
def self_check(
    defect: Annotated[list[str] | None, typer.Option(help="A planted defect; may be repeated. Default: all.")] = None,
    seeds: Annotated[int, typer.Option(help="Each defect is looked for with the cases of so many seeds.")] = 5,
    cases: Annotated[int, typer.Option(help="For each defect and seed, at most.")] = 500,
    device: Annotated[
        bool, typer.Option("--device", help="Defects of device code, on a GPU, not those on a CPU.")
    ] = False,
    noise: Annotated[bool, typer.Option("--noise", help="Also look for the smallest error that is seen.")] = False,
    false_alarms: Annotated[int, typer.Option(help="Also judge the correct targets on so many cases each.")] = 0,
    jobs: Annotated[
        int | None,
        typer.Option(help=f"Worker processes. Default: one for each core, with --device {DEVICE_JOBS} at most."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file, continued if it exists; a page goes beside it.")] = None,
) -> None:
    """Plant defects, and measure what finds them and after how many cases."""
    from fuzz.self_check import report as reporting
    from fuzz.self_check import run as checking

    for option, value in {"--seeds": seeds, "--cases": cases, "--jobs": jobs}.items():
        if value is not None and value < 1:
            raise UsageError(f"{option} {value}: accepted: 1 or more")
    if false_alarms < 0:
        raise UsageError(f"--false-alarms {false_alarms}: accepted: 0 or more")
    out = out or Path("runs/self_check_device.json" if device else "runs/self_check.json")
    defects = tuple(dict.fromkeys(defect or ()))
    jobs = jobs or (min(DEVICE_JOBS, available_cores()) if device else available_cores())
    plan = checking.Plan(out, defects, seeds, cases, jobs, device, noise, false_alarms)
    with reporting.live() as show:
        progress = checking.run(plan, show)
    fine = reporting.conclude(progress)
    raise typer.Exit(NOT_DONE if progress.interrupted else AGREED if fine else DISAGREED)


@app.command()
def targets() -> None:
    """List the built-in targets: what can run here, and why not."""
    from fuzz.campaign.worker import Worker, wait_until_ready
    from fuzz.reporting.display import print_targets
    from fuzz.targets.registry import BUILTIN

    worker = Worker(tuple(BUILTIN), time_limit=60.0, lenient=True)
    try:
        wait_until_ready(worker)
    finally:
        worker.close()
    print_targets(worker.descriptions)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status. Whatever keeps a command from being done is one line."""
    from fuzz.campaign.job import WorkerError

    try:
        status = app(arguments, prog_name="python -m fuzz", standalone_mode=False) or AGREED
        if status != INTERRUPTED:
            return status
        message = "interrupted"
    except (ValueError, sqlite3.Error, WorkerError) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except KeyboardInterrupt:
        message = "interrupted"
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own errors have it, in every version
            raise
        message = error.format_message()
    lines = message.strip().splitlines() or ["failed"]
    print(f"python -m fuzz: {' '.join(line.strip() for line in lines)}", file=sys.stderr)
    return NOT_DONE


if __name__ == "__main__":
    sys.exit(main())
