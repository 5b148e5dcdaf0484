"""`python -m fuzz run`, and `report`, which a run ends with."""

from __future__ import annotations

import random
from pathlib import Path

import typer

from fuzz.commands.options import (
    AGREED,
    DISAGREED,
    KNOWN,
    NOT_DONE,
    PROMISE,
    TARGET_OPTION,
    expect,
    expect_jobs,
    option,
    seconds,
    with_promises,
)


def run(
    target: list[str] | None = TARGET_OPTION,
    reference: list[str] | None = option(
        None,
        "NAME",
        "Target to judge beside those under test, without a say in the verdict; repeatable. "
        "Default: all other built-in targets, unless --target is given.",
    ),
    promise: list[str] | None = PROMISE,
    known: Path | None = KNOWN,
    budget: str | None = option(None, "TIME", "Time for judging, such as 60s, 5m or 2h. Default: 60s."),
    cases: int | None = option(None, "N", "Number of cases, instead of a time."),
    seed: int | None = option(None, "N", "Seed of the cases. Default: random, and shown."),
    jobs: int | None = option(
        None, "N", "Number of worker processes. Default: one per core, fewer if GPU memory is short."
    ),
    out: Path | None = option(None, "DIR", "Run folder. Default: runs/ and the time in UTC."),
    profile: str | None = option(
        None, "NAME", "Size of the cases: cpu, gpu or long. Default: gpu with a GPU, else cpu."
    ),
    time_limit: str | None = option(
        None, "TIME", "Time limit for one target on one case. Default: 60s, at most a quarter of the budget."
    ),
    resume: Path | None = option(None, "DIR", "Run folder of a campaign to resume, however it ended."),
    previous: list[Path] | None = option(
        None,
        "PATH",
        "Run folder or finding to judge before any new case; repeatable. "
        "Default without --out: the newest run in runs/ with findings of these targets.",
    ),
    engine: str | None = option(None, "NAME", "Place of the workers: local, or ray for a Ray cluster. Default: local."),
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


def report(
    folder: Path = typer.Argument(metavar="DIR", help="Run folder."),
    benchmark: Path | None = option(None, "FILE", "speed.json of a benchmark. Default: the one in the run folder."),
) -> None:
    """Write the report of a campaign.

    The report is one self-contained HTML page.
    """
    from fuzz.campaign import findings
    from fuzz.reporting.report import write_report

    findings.recover(folder / "findings")
    print(f"report: {write_report(folder, benchmark)}")
