"""Fuzzer and judge for kernels of Kimi Delta Attention.

Exit status: 0 nothing disagreed, 1 something did, 2 nothing was judged or the command could not be carried out.
"""

from __future__ import annotations

import bdb
import math
import os
import random
import sqlite3
import sys
from pathlib import Path
from typing import Annotated

import typer

from fuzz.commands import conform, replay, run, self_check
from fuzz.commands.options import AGREED, DISAGREED, INTERRUPTED, NOT_DONE, expect, expect_jobs, seconds

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__)
for command in (run.run, replay.replay, replay.minimize, run.report, conform.conform):
    app.command()(command)
app.command("self-check")(self_check.self_check)


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
    gpu_code: Annotated[
        bool, typer.Option("--gpu-code", help="Machine code of nvcc, for mutants that the emulator cannot see.")
    ] = False,
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
        gpu_code,
    )
    print(summary(results))
    raise typer.Exit(DISAGREED if any(each.outcome == SURVIVED for each in results) else AGREED)


app.command()(conform.targets)


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
