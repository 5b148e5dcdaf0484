"""The run folder of a campaign: created, locked, updated, and read again when the campaign is resumed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fuzz.campaign import findings, store
from fuzz.campaign.grouping import write_finding
from fuzz.campaign.plan import CampaignError, Plan
from fuzz.campaign.progress import Finding, Progress, count
from fuzz.campaign.replay import is_smaller

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)  # gave up


def make_folder(plan: Plan) -> None:
    """Makes the run folder. Raises CampaignError when something of a campaign is there, or nothing can be written."""
    out = plan.out
    if plan.resume:
        return
    for name in (store.FILE, "findings/*", "report.html"):
        if found := next(out.glob(name), None):
            there = found.relative_to(out)
            raise CampaignError(f"--out {out}: already holds a campaign ({there} is there); give another folder")
    try:
        (out / "findings").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CampaignError(f"--out {out}: cannot be written: {error.strerror}") from error


def remove_if_empty(out: Path) -> None:
    """Takes a run folder away again in which nothing was put."""
    if not (out / store.FILE).exists():
        for folder in (out / "findings", out):
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Keeps a second campaign out of the folder for as long as this process lives."""
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CampaignError(f"{out}: another campaign is running in it") from error
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
        if (plan.out / store.FILE).exists():
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
    sums = ", ".join(f"total(seconds_{stage})" for stage in store.STAGES)
    for stage, spent in zip(store.STAGES, db.execute(f"SELECT {sums} FROM results").fetchone(), strict=True):
        if spent:
            progress.seconds[stage] = spent
    for target, outcome, reason, verdict in db.execute("SELECT target, outcome, reason, verdict_json FROM results"):
        if target in progress.tallies:
            checks = json.loads(verdict)["checks"] if verdict else []
            count(progress.tallies[target], outcome, reason, checks)
    progress.replays = dict(db.execute("SELECT path, outcome FROM replays"))
    folder = progress.plan.out / "findings"
    folder.mkdir(exist_ok=True)
    findings.recover(folder, tidy=True)
    counts = store.failures_by_finding(db)
    for place in sorted(folder.iterdir()):
        if (place / "finding.json").exists() and not is_smaller(place):
            finding = load(place)
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
