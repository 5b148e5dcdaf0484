"""`python -m fuzz mutants`: sources changed by rule, and what notices."""

from __future__ import annotations

import math
import random
from pathlib import Path

import typer

from fuzz.commands.options import AGREED, DISAGREED, expect, expect_jobs, option, seconds


def mutants(
    count: int = option(300, "N", "Number of mutants."),
    seed: int | None = option(None, "N", "Seed of mutants and cases. Default: random."),
    of: str = option("both", "NAME", "Sources to mutate: model, kernel or both."),
    cases: int = option(500, "N", "Greatest number of cases for a mutant of the model."),
    emulated_cases: int = option(500, "N", "Greatest number of cases in the emulator, for a mutant of the kernel."),
    jobs: int | None = option(None, "N", "Number of processes. Default: one a core."),
    time_limit: str = option("30s", "TIME", "Time limit for one case of a mutant."),
    budget: str | None = option(None, "TIME", "Time limit for the run. Default: none."),
    part: str = option("1/1", "I/N", "Part of the mutants, on one of N machines."),
    gpu_code: bool = option(False, None, "Machine code of nvcc, where the emulator sees nothing.", "--gpu-code"),
    without: list[Path] | None = option(None, "FILE", "Results whose mutants are not drawn again; repeatable."),
    out: Path | None = option(None, "FILE", "Results, resumed if it exists. Default: runs/mutants-SEED.jsonl."),
    publish: list[Path] | None = option(
        None, "FILE", "Results for docs/mutants.md, instead of a run; repeatable: parts merge."
    ),
) -> None:
    """Mutate kernel and model by rule, and measure what notices."""
    from fuzz.campaign.devices import cores
    from fuzz.mutants import mutation_run
    from fuzz.mutants import publish as publishing
    from fuzz.mutants.judging import SURVIVED
    from fuzz.mutants.tables import result_tables

    if publish:
        print(publishing.publish(publish))
        return
    expect_jobs(jobs, cores())
    for name, value in {"--count": count, "--cases": cases, "--emulated-cases": emulated_cases}.items():
        expect(value >= 1, name, "1 or more", value)
    expect(of in ("model", "kernel", "both"), "--of", "model, kernel or both", of)
    seed = random.randrange(2**32) if seed is None else seed
    print(f"seed {seed}", flush=True)
    most = {kind: number for kind, number in {"kernel": emulated_cases, "model": cases}.items() if of in (kind, "both")}
    results = mutation_run.run_mutants(
        count,
        seed,
        out or Path(f"runs/mutants-{seed}.jsonl"),
        most,
        seconds("--time-limit", time_limit),
        mutation_run.parse_part(part),
        jobs or cores(),
        math.inf if budget is None else seconds("--budget", budget),
        mutation_run.load_results(without or ()),
        gpu_code,
    )
    print(result_tables(results))
    raise typer.Exit(DISAGREED if any(each.outcome == SURVIVED for each in results) else AGREED)
