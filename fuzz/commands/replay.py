"""`python -m fuzz replay` and `minimize`: what becomes of saved findings and cases."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import typer

from fuzz.commands.options import (
    AGREED,
    DISAGREED,
    KNOWN,
    NOT_DONE,
    ONE_TARGET,
    PROMISE,
    TIME_LIMIT,
    expect,
    option,
    seconds,
    with_promises,
)


def replay(
    path: list[Path] = typer.Argument(metavar="PATH", help="Finding, case file, or folder of either."),
    target: str | None = ONE_TARGET,
    promise: list[str] | None = PROMISE,
    known: Path | None = KNOWN,
    time_limit: str = TIME_LIMIT,
    repeat: int | None = option(
        None, "N", "Number of times that each is judged. Default: 1, more for intermittent ones."
    ),
    in_process: bool = option(
        False, None, "Judgement in this process, without a time limit, for a debugger.", "--in-process"
    ),
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


def minimize(
    path: Path = typer.Argument(metavar="PATH", help="Finding or case file."),
    target: str | None = ONE_TARGET,
    promise: list[str] | None = PROMISE,
    budget: str = option("2m", "TIME", "Time for the search."),
    time_limit: str = TIME_LIMIT,
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
