"""`python -m fuzz conform`, and `targets`, which lists what it and other commands can judge."""

from __future__ import annotations

from pathlib import Path

import typer

from fuzz.commands.options import (
    AGREED,
    DISAGREED,
    KNOWN,
    NOT_DONE,
    PROMISE,
    TIME_LIMIT,
    expect,
    option,
    seconds,
    with_promises,
)


def conform(
    target: str = option(..., "NAME", "Built-in target, package.module:function or path/to/file.py:function."),
    out: Path | None = option(None, "DIR", "Folder of the card. Default: runs/conform- and the time."),
    seed: int = option(0, "N", "Seed of the random cases."),
    fuzz_cases: int = option(200, "N", "Number of random cases on the last rung."),
    time_limit: str = TIME_LIMIT,
    rung: list[str] | None = option(None, "NAME", "Rung of the ladder; repeatable. Default: all."),
    junit: Path | None = option(None, "FILE", "JUnit XML of the card, for continuous integration."),
    promise: list[str] | None = PROMISE,
    known: Path | None = KNOWN,
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
            plan = conform.CardPlan(target, folder, seed, fuzz_cases, limit, tuple(rung or ()), known)
            result = conform.conform(plan, show)
        if result.rows:
            card.write_card(result, folder)
            card.print_card(result, Console())
            print(f"card: {folder / card.PAGE}")
        if junit is not None:
            write_junit(result, junit)
    raise typer.Exit(DISAGREED if result.failed else AGREED if result.reached else NOT_DONE)


def targets() -> None:
    """List the built-in targets that can run here.

    The others are listed with the reason.
    """
    from fuzz.campaign.worker import ready_worker
    from fuzz.reporting.display import print_targets
    from fuzz.targets.registry import BUILTIN, PEERS

    with ready_worker((*BUILTIN, *PEERS), time_limit=60.0, lenient=True) as worker:
        print_targets(worker.descriptions)
