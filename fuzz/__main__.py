"""Fuzzer and judge for kernels of Kimi Delta Attention.

Exit status: 0 nothing disagreed, 1 something did, 2 nothing was judged or the command could not be carried out.
"""

from __future__ import annotations

import bdb
import math
import os
import random
import re
import sqlite3
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__)

AGREED, DISAGREED, NOT_DONE = 0, 1, 2
INTERRUPTED = 130  # what typer makes of Ctrl-C
MOST_JOBS = 4  # worker processes for each core
DEVICE_JOBS = 4  # of a self-check on a GPU: a kernel that hangs takes its share of the time from all others

Targets = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Target under test: built in, package.module:function or path/to/file.py:function; repeatable. "
        "Default: flash_kda.",
    ),
]
OneTarget = Annotated[
    str | None, typer.Option(metavar="NAME", help="Target to judge. Default: the target of the finding, or flash_kda.")
]
Promise = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE",
        help="Promise of the named targets, such as operands=fp32, heads=no or chunk=none; repeatable. "
        "Default: their attribute promises, or everything.",
    ),
]
KnownFile = Annotated[
    Path | None, typer.Option(metavar="FILE", help="File of known failures: TARGET CHECK REASON, one a line.")
]
TimeLimit = Annotated[str, typer.Option(metavar="TIME", help="Time limit for one target on one case.")]


class UsageError(ValueError):
    """An option makes no sense; the message is one line."""


def with_promises(targets: list[str] | None, promises: list[str] | None) -> list[str]:
    """The names of the targets, followed by what they promise, as `fuzz.targets.registry.load_target` reads it."""
    expect(bool(targets) or not promises, "--promise", "a target with --target that it is a promise of", "none")
    return [",".join([target, *(promises or ())]) for target in targets or ()]


def expect(condition: bool, option: str, expected: str, got: object) -> None:
    """Raises UsageError unless the condition holds."""
    if not condition:
        raise UsageError(f"{option}: expected {expected}, got {got}")


def seconds(option: str, text: str) -> float:
    """The seconds in "90", "90s", "5m" or "2h". Raises UsageError unless they are more than 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    value = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    expect(0 < value < 1e8, option, "a time greater than 0, such as 60s, 5m or 2h", text)
    return value


def expect_jobs(jobs: int | None, cores: int) -> None:
    """Raises UsageError for more worker processes than this machine can start within a few minutes."""
    most = MOST_JOBS * cores
    expect(jobs is None or 1 <= jobs <= most, "--jobs", f"1 to {most} ({MOST_JOBS} for each of {cores} cores)", jobs)


@app.command()
def run(
    target: Targets = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Target to judge beside those under test, without a say in the verdict; repeatable. "
            "Default: all other built-in targets, unless --target is given.",
        ),
    ] = None,
    promise: Promise = None,
    known: KnownFile = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Time for judging, such as 60s, 5m or 2h. Default: 60s.")
    ] = None,
    cases: Annotated[int | None, typer.Option(metavar="N", help="Number of cases, instead of a time.")] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of the cases. Default: random, and shown.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Number of worker processes. Default: one per core, fewer if GPU memory is short."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run folder. Default: runs/ and the time in UTC.")
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Size of the cases: cpu, gpu or long. Default: gpu with a GPU, else cpu."),
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help="Time limit for one target on one case. Default: 60s, at most a quarter of the budget."
        ),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run folder of a campaign to resume, however it ended.")
    ] = None,
    previous: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Run folder or finding to judge before any new case; repeatable. "
            "Default without --out: the newest run in runs/ with findings of these targets.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Place of the workers: local, or ray for a Ray cluster. Default: local."),
    ] = None,
) -> None:
    """Judge targets on new cases, and report.

    Failures are saved, shrunk and counted.
    """
    from fuzz.campaign import campaign
    from fuzz.campaign.devices import cores, default_jobs, gpus
    from fuzz.campaign.known import read
    from fuzz.campaign.plan import ENGINES, Plan, resumed
    from fuzz.campaign.run_folder import new_folder
    from fuzz.cases.strategies import PROFILES
    from fuzz.reporting.display import live

    expect(budget is None or cases is None, "--budget and --cases", "one of them", "both")
    expect(cases is None or cases >= 1, "--cases", "1 or more", cases)
    expect_jobs(jobs, cores())
    expect(seed is None or seed >= 0, "--seed", "0 or more", seed)
    expect(profile is None or profile in PROFILES, "--profile", f"one of {', '.join(PROFILES)}", profile)
    expect(engine is None or engine in ENGINES, "--engine", f"one of {', '.join(ENGINES)}", engine)
    limit = None if time_limit is None else seconds("--time-limit", time_limit)
    read(known)  # now, before anything is made
    duration = None if cases is not None else seconds("--budget", budget or "60s")
    if resume is not None:
        fixed = {
            "target": target,
            "reference": reference,
            "promise": promise,
            "known": known,
            "seed": seed,
            "out": out,
            "profile": profile,
            "time-limit": time_limit,
            "previous": previous,
            "engine": engine,
        }
        given = [f"--{name}" for name, value in fixed.items() if value is not None]
        expect(not given, "--resume", "no other option than --budget, --cases and --jobs", ", ".join(given))
        plan = resumed(resume, budget=None if budget is None else duration, cases=cases, jobs=jobs)
    else:
        found = gpus()
        profile = profile or ("gpu" if found else "cpu")
        if engine != "ray":  # whose machines each find out what fits them
            jobs = jobs or default_jobs(found, PROFILES[profile].gpu_memory, cores())
            jobs = min(jobs, cases or jobs)  # a worker for each case, at most
        plan = Plan(
            out=out or new_folder(Path("runs")),
            targets=tuple(dict.fromkeys(with_promises(target, promise))),
            references=tuple(dict.fromkeys(reference or ())),
            known=known,
            budget=duration,
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
        progress = campaign.run_campaign(plan, display.show)
    display.summarise(progress)
    judged = progress.judged or progress.verdict
    if judged:
        from fuzz.reporting.report import write_report

        print(f"report: {write_report(plan.out)}")
    else:
        print("nothing was judged")
    done = judged and progress.status == "finished"
    raise typer.Exit(DISAGREED if progress.verdict else AGREED if done else NOT_DONE)


@app.command()
def replay(
    path: Annotated[list[Path], typer.Argument(metavar="PATH", help="Finding, case file, or folder of either.")],
    target: OneTarget = None,
    promise: Promise = None,
    known: KnownFile = None,
    time_limit: TimeLimit = "60s",
    repeat: Annotated[
        int | None,
        typer.Option(metavar="N", help="Number of times that each is judged. Default: 1, more for intermittent ones."),
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Judgement in this process, without a time limit, for a debugger.")
    ] = False,
) -> None:
    """Judge saved findings and cases again.

    A finding is judged on its saved inputs alone. Where it fails, so are the references of its campaign. Findings of
    references have no say in the exit status beside others, unless --target names the target.
    """
    from fuzz.campaign import findings
    from fuzz.campaign import replay as replaying
    from fuzz.campaign.known import read
    from fuzz.reporting.display import describe_result, origin_line, reference_line

    limit = seconds("--time-limit", time_limit)
    expect(repeat is None or repeat >= 1, "--repeat", "1 or more", repeat)
    known_failures = read(known)
    saved = [one for each in path for one in findings.find(each)]
    target = next(iter(with_promises([] if target is None else [target], promise)), None)
    apart = replaying.stand_apart(saved, target)
    outcomes: Counter[str] = Counter()
    descriptions: dict[str, dict] = {}

    def describe(description: dict) -> None:
        descriptions[description["name"]] = description
        print(origin_line(description), flush=True)

    if in_process:
        results = replaying.replay_here(saved, target=target, repeat=repeat, describe=describe)
    else:
        results = replaying.replay(saved, target=target, time_limit=limit, repeat=repeat, describe=describe)
    with replaying.references(limit) as judge_references:
        for one, result in results:
            outcome, reason = replaying.outcome_of(result, known_failures)
            if one in apart:
                outcome = f"{outcome} of references"
            outcomes[outcome] += 1
            for line in describe_result(one.path, result, reason):
                print(line, flush=True)
            if file := replaying.other_file(one, descriptions[result.target]):
                print(f"         note: the finding is of another file, {file}")
            for beside in [] if in_process or result.outcome != "failed" else judge_references(one):
                print(f"         beside: {reference_line(beside)}", flush=True)
    for line in known_failures.gone(set(descriptions)):
        print(line)
    if len(saved) > 1:
        plain = ("passed", "failed")
        others = (f", {number} {name}" for name, number in sorted(outcomes.items()) if name not in plain)
        print(f"{len(saved)} replayed, {outcomes['failed']} failed{''.join(others)}")
    done = (outcomes["passed"] or outcomes["known"]) and not outcomes["not judged"]
    raise typer.Exit(DISAGREED if outcomes["failed"] else AGREED if done else NOT_DONE)


@app.command()
def minimize(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Finding or case file.")],
    target: OneTarget = None,
    promise: Promise = None,
    budget: Annotated[str, typer.Option(metavar="TIME", help="Time for the search.")] = "2m",
    time_limit: TimeLimit = "60s",
) -> None:
    """Shrink a finding or a case file further.

    The result is a new finding beside it.
    """
    from fuzz.campaign import replay as replaying
    from fuzz.reporting.display import describe_case, origin_line

    limits = {"seconds": seconds("--budget", budget), "time_limit": seconds("--time-limit", time_limit)}
    target = next(iter(with_promises([] if target is None else [target], promise)), None)

    def describe(description: dict) -> None:
        print(origin_line(description), flush=True)

    found = replaying.minimize(path, target=target, describe=describe, **limits)
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
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Run folder.")],
    benchmark: Annotated[
        Path | None, typer.Option(metavar="FILE", help="speed.json of a benchmark. Default: the one in the run folder.")
    ] = None,
) -> None:
    """Write the report of a campaign.

    The report is one self-contained HTML page.
    """
    from fuzz.campaign import findings
    from fuzz.reporting.report import write_report

    findings.recover(folder / "findings")
    print(f"report: {write_report(folder, benchmark)}")


@app.command()
def conform(
    target: Annotated[str, typer.Option(metavar="NAME", help="Built-in target or package.module:function.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the card. Default: runs/conform- and the time.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the random cases.")] = 0,
    fuzz_cases: Annotated[int, typer.Option(metavar="N", help="Number of random cases on the last rung.")] = 200,
    time_limit: TimeLimit = "60s",
    rung: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Rung of the ladder; repeatable. Default: all.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JUnit XML of the card, for continuous integration.")
    ] = None,
    promise: Promise = None,
    known: KnownFile = None,
) -> None:
    """Hold one target to the ladder of fixed rows.

    The report card is written as JSON and HTML.
    """
    from rich.console import Console

    from fuzz.campaign.known import read
    from fuzz.campaign.run_folder import held_folder, new_folder
    from fuzz.conformance import card, conform
    from fuzz.conformance.junit import write_junit
    from fuzz.conformance.ladder import RUNGS

    expect(fuzz_cases >= 1, "--fuzz-cases", "1 or more", fuzz_cases)
    expect(seed >= 0, "--seed", "0 or more", seed)
    limit = seconds("--time-limit", time_limit)
    for name in rung or ():
        expect(name in RUNGS, "--rung", f"one of {', '.join(RUNGS)}", name)
    expect(junit is None or not junit.is_dir(), "--junit", "a file", f"{junit}, a folder")
    read(known)  # now, before anything is made
    folder = out or new_folder(Path("runs"), "conform-")
    with held_folder(folder, (*card.FILES, "findings/*")):
        with card.live() as show:
            (target,) = with_promises([target], promise)
            plan = conform.Plan(target, folder, seed, fuzz_cases, limit, tuple(rung or ()), known)
            result = conform.conform(plan, show)
        if result.rows:
            card.write_card(result, folder)
            card.print_card(result, Console())
            print(f"card: {folder / card.PAGE}")
        if junit is not None:
            write_junit(result, junit)
    raise typer.Exit(DISAGREED if result.failed else AGREED if result.reached else NOT_DONE)


@app.command("self-check")
def self_check(
    defect: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Planted defect; repeatable. Default: all.")
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Number of seeds for each defect.")] = 5,
    cases: Annotated[int, typer.Option(metavar="N", help="Greatest number of cases for each defect and seed.")] = 500,
    device: Annotated[
        bool, typer.Option("--device", help="Defects of device code, on a GPU, instead of those on a CPU.")
    ] = False,
    noise: Annotated[bool, typer.Option("--noise", help="Search for the smallest error that is seen.")] = False,
    false_alarms: Annotated[
        int, typer.Option(metavar="N", help="Number of cases on which each correct target is judged.")
    ] = 0,
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Number of worker processes. Default: one per core, with --device {DEVICE_JOBS} at most.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON file, resumed if it exists, with a page beside it. Default: a new folder in runs/.",
        ),
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Results in docs/ of this checkout, resumed if they exist.")
    ] = False,
) -> None:
    """Plant defects, and measure what finds them.

    The file and its page say which check finds each defect, and after how many cases.
    """
    from fuzz.campaign.devices import cores
    from fuzz.campaign.run_folder import new_folder
    from fuzz.self_check import report as reporting
    from fuzz.self_check import run as checking
    from fuzz.self_check.record import ROOT

    for option, value in {"--seeds": seeds, "--cases": cases}.items():
        expect(value >= 1, option, "1 or more", value)
    expect_jobs(jobs, cores())
    expect(false_alarms >= 0, "--false-alarms", "0 or more", false_alarms)
    expect(not (out and publish), "--out and --publish", "one of them", "both")
    name = "self_check_device.json" if device else "self_check.json"
    if publish:
        out = ROOT / "docs" / "data" / name
        expect(out.parent.is_dir(), "--publish", "a checkout with docs/data", ROOT)
    defects = tuple(dict.fromkeys(defect or ()))
    jobs = jobs or (min(DEVICE_JOBS, cores()) if device else cores())
    if out is None:
        checking.expect_defects(defects, device)  # before a folder is made
        out = new_folder(Path("runs"), "self_check-") / name
    plan = checking.Plan(out, defects, seeds, cases, jobs, device, noise, false_alarms)
    with reporting.live() as show:
        progress = checking.run_self_check(plan, show)
    fine = reporting.conclude(progress)
    raise typer.Exit(NOT_DONE if progress.interrupted else AGREED if fine else DISAGREED)


@app.command()
def mutants(
    count: Annotated[int, typer.Option(metavar="N", help="Number of mutants.")] = 300,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of mutants and cases. Default: random.")] = None,
    of: Annotated[str, typer.Option(metavar="NAME", help="Sources to mutate: model, kernel or both.")] = "both",
    cases: Annotated[int, typer.Option(metavar="N", help="Greatest number of cases for a mutant of the model.")] = 500,
    emulated_cases: Annotated[
        int, typer.Option(metavar="N", help="Greatest number of cases in the emulator, for a mutant of the kernel.")
    ] = 500,
    jobs: Annotated[int | None, typer.Option(metavar="N", help="Number of processes. Default: one a core.")] = None,
    time_limit: Annotated[str, typer.Option(metavar="TIME", help="Time limit for one case of a mutant.")] = "30s",
    budget: Annotated[str | None, typer.Option(metavar="TIME", help="Time limit for the run. Default: none.")] = None,
    part: Annotated[str, typer.Option(metavar="I/N", help="Part of the mutants, on one of N machines.")] = "1/1",
    without: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Results whose mutants are not drawn again. Repeatable.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Results, resumed if it exists. Default: runs/mutants-SEED.jsonl."),
    ] = None,
    publish: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Results for docs/mutants.md; nothing is judged. Repeatable: parts merge."),
    ] = None,
) -> None:
    """Mutate kernel and model by rule, and measure what notices."""
    from fuzz.campaign.devices import cores
    from fuzz.mutants import publish as publishing
    from fuzz.mutants import run as mutating
    from fuzz.mutants.judging import SURVIVED
    from fuzz.mutants.summary import summary

    if publish:
        print(publishing.publish(publish))
        return
    expect_jobs(jobs, cores())
    for option, value in {"--count": count, "--cases": cases, "--emulated-cases": emulated_cases}.items():
        expect(value >= 1, option, "1 or more", value)
    expect(of in ("model", "kernel", "both"), "--of", "model, kernel or both", of)
    seed = random.randrange(2**32) if seed is None else seed
    print(f"seed {seed}", flush=True)
    most = {kind: number for kind, number in {"kernel": emulated_cases, "model": cases}.items() if of in (kind, "both")}
    results = mutating.run(
        count,
        seed,
        out or Path(f"runs/mutants-{seed}.jsonl"),
        most,
        seconds("--time-limit", time_limit),
        mutating.place(part),
        jobs or cores(),
        math.inf if budget is None else seconds("--budget", budget),
        mutating.load(without or ()),
    )
    print(summary(results))
    raise typer.Exit(DISAGREED if any(each.outcome == SURVIVED for each in results) else AGREED)


@app.command()
def targets() -> None:
    """List the built-in targets that can run here.

    The others are listed with the reason.
    """
    from fuzz.campaign.worker import Worker, wait_until_ready
    from fuzz.reporting.display import print_targets
    from fuzz.targets.registry import BUILTIN, PEERS

    worker = Worker((*BUILTIN, *PEERS), time_limit=60.0, lenient=True)
    try:
        wait_until_ready(worker)
    finally:
        worker.close()
    print_targets(worker.descriptions)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status. An error is one line on stderr; no arguments show the help."""
    from fuzz.campaign.job import WorkerError

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = app(arguments or ["--help"], prog_name="python -m fuzz", standalone_mode=False) or AGREED
        if status != INTERRUPTED:
            return status
        message = "interrupted"
    except (ValueError, sqlite3.Error, WorkerError) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (KeyboardInterrupt, bdb.BdbQuit):  # a person at the keyboard, or at a debugger
        message = "interrupted"
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own errors have it, in every version
            raise
        message = error.format_message()
    lines = message.strip().splitlines() or ["failed"]
    print(f"python -m fuzz: {' '.join(line.strip() for line in lines)}", file=sys.stderr)
    return NOT_DONE


def console() -> int:
    """The console script `kda-fuzz`: targets are found in the working directory, as with `python -m fuzz`."""
    sys.path.insert(0, os.getcwd())
    return main()


if __name__ == "__main__":
    sys.exit(main())
