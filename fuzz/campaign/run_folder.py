"""The run folder of a campaign: created, locked, updated, and read again when the campaign is resumed."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from fuzz.campaign import findings, store
from fuzz.campaign.grouping import write_finding
from fuzz.campaign.plan import CampaignError, Plan
from fuzz.campaign.progress import Finding, Progress, count
from fuzz.campaign.replay import is_smaller

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)  # gave up

TAKEN = (store.STORE_FILE, "findings/*", "report.html")  # of a campaign


@contextmanager
def held_folder(out: Path, taken: Sequence[str] = TAKEN, *, resume: bool = False) -> Iterator[None]:
    """Makes a folder of results, and keeps other commands out of it; an empty one is removed in the end.

    taken: patterns of the files that an earlier command left. Raises CampaignError when another command is at work in
    the folder, such a file is there, or nothing can be written. Only the command that holds the folder looks into it,
    and only that one removes it.
    """
    if not resume:
        make(out)
    with hold(out):
        if not resume:
            for name in taken:
                if found := next(out.glob(name), None):
                    there = found.relative_to(out)
                    raise CampaignError(f"--out: expected a folder without results, got {out}, which has {there}")
            make(out / "findings")
        try:
            yield
        finally:
            remove_if_empty(out)


def new_folder(runs: Path, prefix: str = "") -> Path:
    """Makes a folder in `runs` that is named after the time in UTC, and that no other process has made."""
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H%M%SZ")
    for number in itertools.count(1):
        folder = runs / f"{prefix}{stamp}{f'-{number}' if number > 1 else ''}"
        try:
            make(folder, fresh=True)
        except FileExistsError:
            continue
        return folder


def make(folder: Path, *, fresh: bool = False) -> None:
    """Makes a folder. Raises CampaignError where it cannot be made, FileExistsError where a fresh one is there."""
    try:
        folder.mkdir(parents=True, exist_ok=not fresh)
    except OSError as error:
        if fresh and isinstance(error, FileExistsError) and folder.is_dir():
            raise
        raise CampaignError(
            f"--out: expected a folder that can be written to, got {folder}: {error.strerror}"
        ) from error


def remove_if_empty(out: Path) -> None:
    """Removes a folder in which nothing was put."""
    if all(entry.name == "findings" for entry in out.iterdir()):
        for folder in (out / "findings", out):
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Keeps a second command out of the folder for as long as this process lives. Raises CampaignError."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            here = out.exists() and os.path.samestat(os.fstat(descriptor), out.stat())
        except BlockingIOError as error:
            raise CampaignError(
                f"--out: expected a folder that no command uses, got {out}, which is in use; give another folder"
            ) from error
        if not here:  # another command removed the folder after this one had opened it
            raise CampaignError(
                f"--out: expected {out}, got no folder: another command has just removed it; start again"
            )
        yield
    finally:
        os.close(descriptor)


@contextmanager
def disk_trouble(plan: Plan) -> Iterator[None]:
    """Turns errors of the disk into a CampaignError, which says how to resume."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DISK:
            raise
        reason = getattr(error, "strerror", None) or error
        what = f"{plan.out}: cannot be written: {reason}"
        if (plan.out / store.STORE_FILE).exists():
            what += f"; its contents are whole, and python -m fuzz run --resume {plan.out} continues"
        raise CampaignError(what) from error


@contextmanager
def keep(plan: Plan, progress: Progress) -> Iterator[sqlite3.Connection]:
    """The store of the campaign, which also says how it began and how it ended."""
    db = store.open_for_writing(plan.out) if plan.resume else store.create(plan.out)
    try:
        if plan.resume:
            restore(progress, db)
        else:
            store.put(db, started=time.time(), seed=plan.seed, batch=0)
        store.put(
            db,
            config={**plan.to_dict(), "time_limit": plan.limit},
            environment=progress.environment,
            targets=[target for target in progress.targets if target["unavailable"] is None],
            unavailable=[target for target in progress.targets if target["unavailable"] is not None],
            status="running",
        )
        progress.status = "running"
        yield db
        store.put(db, status=progress.status)
    except BaseException:
        with suppress(sqlite3.Error):  # the disk may be what failed
            store.put(db, status="failed")
        raise
    finally:
        with suppress(sqlite3.Error):
            store.put(db, ended=time.time(), **progress.summary)
        db.close()


def restore(progress: Progress, db: sqlite3.Connection) -> None:
    """Takes over what an earlier run of the campaign left in its folder, however that ended."""
    names = tuple(progress.tallies)
    marks = ", ".join("?" * len(names))
    query = f"""SELECT count(*), sum(judged) FROM (
        SELECT max(outcome != 'skipped') AS judged FROM results WHERE target IN ({marks})
        GROUP BY case_id HAVING count(*) = {len(names)})"""
    given, judged = db.execute(query, names).fetchone()
    progress.given, progress.cases = given, judged or 0
    progress.elapsed = store.get(db, "elapsed") or 0.0
    sums = ", ".join(f"total(seconds_{phase})" for phase in store.PHASES)
    for phase, spent in zip(store.PHASES, db.execute(f"SELECT {sums} FROM results").fetchone(), strict=True):
        if spent:
            progress.seconds[phase] = spent
    for target, outcome, reason, verdict in db.execute("SELECT target, outcome, reason, verdict_json FROM results"):
        if target in progress.tallies:
            count(progress.tallies[target], outcome, reason, json.loads(verdict) if verdict else None)
    progress.replays = dict(db.execute("SELECT path, outcome FROM replays"))
    folder = progress.plan.out / "findings"
    folder.mkdir(exist_ok=True)
    findings.recover(folder, tidy=True)
    counts = store.failures_by_finding(db)
    for place in sorted(folder.iterdir()):
        if (place / "finding.json").exists() and not is_smaller(place):
            finding = load(place)
            finding.known = progress.why_known(replace(finding.failure, case=finding.original))
            finding.count = counts.pop(place.name, 0) + len(finding.previous)
            progress.findings[place.name] = finding
    for id, failed in counts.items():  # somebody took the folder away
        _, failure = store.failures_of(db, id)[0]
        write_finding(progress, failure, id=id).count = failed


def load(place: Path) -> Finding:
    """The finding of a campaign in this folder, without its count."""
    saved = findings.load_finding(place)
    original = findings.load_case_file(place / "original.json", inputs_saved=True).case
    state = saved.finding.get("state") or ("shrunk" if saved.finding.get("shrunk") else "waiting")
    previous = list(saved.finding.get("previous", ()))
    return Finding(place.name, place, original, findings.load_failure(saved), state=state, previous=previous)
