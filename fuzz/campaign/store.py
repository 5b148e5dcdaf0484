"""The store of a campaign: one SQLite file in the run folder, in WAL mode, so that readers never wait for the writer.

Every write is committed before the call returns: killing the campaign loses nothing that was reported. Times are
seconds since the epoch, durations seconds, and what is called *_json is JSON.

campaign    key and value (JSON): config, environment, seed, targets, unavailable; started, ended, status; batch, the
            first batch of cases that is not judged to its end; cases, elapsed, cases_per_second and seconds (by phase),
            written every few seconds
results     one row for each (case, target), once: judged, or skipped with the reason; a failure names the finding that
            it is counted in, whose folder in findings/ has all else
replays     what became of findings of earlier campaigns, which are judged before any new case
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

from fuzz.campaign.findings import Failure, first_failure
from fuzz.campaign.job import Result
from fuzz.cases.case import Case

STORE_FILE = "campaign.sqlite"

STORE_VERSION = 3
"""Of the schema, in SQLite's user_version."""

ACCEPTED = (2, STORE_VERSION)  # 2 has a table of findings too, which says nothing that their folders do not say

PHASES = ("generate", "oracle", "target", "judge", "tune")

SCHEMA = """
CREATE TABLE campaign (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE results (
    id INTEGER PRIMARY KEY,
    case_id TEXT NOT NULL,
    case_json TEXT NOT NULL,
    target TEXT NOT NULL,
    outcome TEXT NOT NULL CHECK (outcome IN ('passed', 'failed', 'skipped')),
    reason TEXT NOT NULL,
    verdict_json TEXT,          -- null when skipped
    seconds_generate REAL,      -- the inputs; these and the oracle are shared by the targets of a case, and stand
    seconds_oracle REAL,        -- in its first result alone, so that sums are right
    seconds_target REAL,
    seconds_judge REAL,
    at REAL NOT NULL,
    seconds_tune REAL,          -- of the target's calls, what Triton spent on choosing among configurations; not in
                                -- seconds_target; null where there was none
    properties_json TEXT NOT NULL DEFAULT '[]',  -- names of those that were checked
    batch INTEGER,              -- of cases, that the case was drawn in
    place TEXT NOT NULL DEFAULT '',  -- where it was judged: "cpu", "gpu 0", or that of a machine of a cluster
    finding TEXT                -- id of the finding that a failure is counted in
);
CREATE UNIQUE INDEX results_by_case ON results (case_id, target);
CREATE INDEX results_by_batch ON results (batch);
CREATE INDEX results_by_finding ON results (finding) WHERE finding IS NOT NULL;
CREATE TABLE replays (
    path TEXT PRIMARY KEY,      -- folder of the finding
    target TEXT NOT NULL,
    outcome TEXT NOT NULL,
    reason TEXT NOT NULL,
    verdict_json TEXT,
    at REAL NOT NULL
);
"""


class StoreError(ValueError):
    """A store cannot be resumed; the message is one line that says which and why."""


def case_id(case: Case) -> str:
    """The identity of a case: 16 hexadecimal digits of a hash of its fields."""
    return hashlib.sha256(dump(case.to_dict()).encode()).hexdigest()[:16]


def dump(value) -> str:
    return json.dumps(value, sort_keys=True)


def create(folder: Path) -> sqlite3.Connection:
    """A new store in `folder`. Raises FileExistsError when there is one, sqlite3.Error or OSError when it cannot be.

    It appears with its tables or not at all: until they are on the disk it has another name.
    """
    path, new = folder / STORE_FILE, folder / f".new-{STORE_FILE}"
    if path.exists():
        raise FileExistsError(f"{folder}: expected a folder without a campaign, got one with {STORE_FILE}")
    new.unlink(missing_ok=True)
    db = sqlite3.connect(new, isolation_level=None)
    try:
        db.executescript(SCHEMA)
        db.execute(f"PRAGMA user_version = {STORE_VERSION}")
    except sqlite3.Error:
        with suppress(OSError):
            new.unlink()
        raise
    finally:
        db.close()
    new.rename(path)
    return _connect(path)


def open_for_writing(folder: Path) -> sqlite3.Connection:
    """The store of a campaign to be resumed. Raises FileNotFoundError, StoreError or sqlite3.Error."""
    path = folder / STORE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected the run folder of a campaign, got a folder without {STORE_FILE}")
    db = _connect(path)
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version not in ACCEPTED:
        db.close()
        raise StoreError(f"{path}: expected a store of version {' or '.join(map(str, ACCEPTED))}, got {version}")
    return db


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    return db


def open_for_reading(folder: Path) -> sqlite3.Connection:
    """The store of a campaign, running or ended. Raises FileNotFoundError when the folder holds none."""
    path = folder / STORE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: expected the run folder of a campaign, got a folder without {STORE_FILE}")
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)


def put(db: sqlite3.Connection, **values) -> None:
    """Sets keys of the campaign table."""
    rows = [(key, dump(value)) for key, value in values.items()]
    db.executemany("INSERT INTO campaign VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", rows)


def get(db: sqlite3.Connection, key: str):
    row = db.execute("SELECT value FROM campaign WHERE key = ?", (key,)).fetchone()
    return None if row is None else json.loads(row[0])


def add_result(
    db: sqlite3.Connection, result: Result, *, batch: int | None = None, place: str = "", finding: str | None = None
) -> bool:
    """Whether it is new: what was judged before, by a machine that was lost on the way, say, is left as it is."""
    row = {
        "case_id": case_id(result.case),
        "case_json": dump(result.case.to_dict()),
        "target": result.target,
        "outcome": result.outcome,
        "reason": result.reason,
        "verdict_json": None if result.verdict is None else dump(result.verdict),
        **{f"seconds_{phase}": result.seconds.get(phase) for phase in PHASES},
        "at": time.time(),
        "properties_json": dump(result.properties),
        "batch": batch,
        "place": place,
        "finding": finding,
    }
    names, places = ", ".join(row), ", ".join("?" * len(row))
    cursor = db.execute(f"INSERT OR IGNORE INTO results ({names}) VALUES ({places})", tuple(row.values()))
    return cursor.rowcount == 1


def has_result(db: sqlite3.Connection, result: Result) -> bool:
    query = "SELECT 1 FROM results WHERE case_id = ? AND target = ?"
    return db.execute(query, (case_id(result.case), result.target)).fetchone() is not None


def judged_pairs(db: sqlite3.Connection, batch: int) -> set[tuple[str, str]]:
    """(case id, target) of the batch that have a result."""
    return set(db.execute("SELECT case_id, target FROM results WHERE batch = ?", (batch,)))


def failures_by_finding(db: sqlite3.Connection) -> dict[str, int]:
    """How many results are counted in each finding."""
    return dict(db.execute("SELECT finding, count(*) FROM results WHERE finding IS NOT NULL GROUP BY finding"))


def failures_of(db: sqlite3.Connection, finding: str) -> list[tuple[int, Failure]]:
    """The results that are counted in a finding: their ids and the failures that they are counted for."""
    rows = db.execute(
        "SELECT id, case_json, target, verdict_json, properties_json FROM results WHERE finding = ? ORDER BY id",
        (finding,),
    )
    failures = []
    for id, case, target, verdict, properties in rows.fetchall():
        case = Case.from_dict(json.loads(case))
        result = Result(case, target, "failed", "", json.loads(verdict), tuple(json.loads(properties)))
        failures.append((id, first_failure(result)))
    return failures


def move_result(db: sqlite3.Connection, result: int, finding: str) -> None:
    """Counts a failure in another finding."""
    db.execute("UPDATE results SET finding = ? WHERE id = ?", (finding, result))


def add_replay(db: sqlite3.Connection, path: Path, result: Result) -> None:
    verdict = None if result.verdict is None else dump(result.verdict)
    db.execute(
        "INSERT OR REPLACE INTO replays VALUES (?, ?, ?, ?, ?, ?)",
        (str(path), result.target, result.outcome, result.reason, verdict, time.time()),
    )
