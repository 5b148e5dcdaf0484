"""The store of a campaign: one SQLite file in the run folder, in WAL mode, so that readers never wait for the writer.

Every write is committed before the call returns: killing the campaign loses nothing that was reported.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from pathlib import Path

from fuzz.case import Case
from fuzz.worker import Result

FILE = "campaign.sqlite"

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
    at REAL NOT NULL            -- seconds since the epoch, as every time in this file
);
CREATE INDEX results_by_case ON results (case_id, target);
CREATE TABLE findings (
    id TEXT PRIMARY KEY,
    target TEXT NOT NULL,
    check_name TEXT NOT NULL,
    error_class TEXT NOT NULL,  -- target, check and class make the group, of which this is the representative
    case_json TEXT NOT NULL,
    smallest_json TEXT NOT NULL,
    folder TEXT NOT NULL,       -- relative to the run folder
    detail TEXT NOT NULL,
    at REAL NOT NULL,
    count INTEGER NOT NULL      -- results in the group
);
"""


def case_id(case: Case) -> str:
    """The identity of a case: 16 hexadecimal digits of a hash of its fields."""
    return hashlib.sha256(dump(case.to_dict()).encode()).hexdigest()[:16]


def dump(value) -> str:
    return json.dumps(value, sort_keys=True)


def create(folder: Path) -> sqlite3.Connection:
    """A new store in `folder`. Raises FileExistsError when there is one, sqlite3.Error or OSError when it cannot be."""
    path = folder / FILE
    if path.exists():
        raise FileExistsError(f"{folder}: already holds a campaign")
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.executescript(SCHEMA)
    return db


def open_for_reading(folder: Path) -> sqlite3.Connection:
    """The store of a campaign, running or ended. Raises FileNotFoundError when the folder holds none."""
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: holds no campaign (no {FILE} in it)")
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)


def put(db: sqlite3.Connection, **values) -> None:
    """Sets keys of the campaign table."""
    rows = [(key, dump(value)) for key, value in values.items()]
    db.executemany("INSERT INTO campaign VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", rows)


def get(db: sqlite3.Connection, key: str):
    row = db.execute("SELECT value FROM campaign WHERE key = ?", (key,)).fetchone()
    return None if row is None else json.loads(row[0])


def add_result(db: sqlite3.Connection, result: Result) -> None:
    seconds = [result.seconds.get(stage) for stage in ("generate", "oracle", "target", "judge")]
    verdict = None if result.verdict is None else dump(result.verdict)
    db.execute(
        "INSERT INTO results VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            case_id(result.case),
            dump(result.case.to_dict()),
            result.target,
            result.outcome,
            result.reason,
            verdict,
            *seconds,
            time.time(),
        ),
    )


def add_finding(
    db, *, id: str, target: str, check: str, error_class: str, case: Case, folder: str, detail: str
) -> None:
    case_json = dump(case.to_dict())
    db.execute(
        "INSERT INTO findings VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 1)",
        (id, target, check, error_class, case_json, case_json, folder, detail, time.time()),
    )


def set_smallest(db: sqlite3.Connection, id: str, smallest: Case, detail: str) -> None:
    db.execute("UPDATE findings SET smallest_json = ?, detail = ? WHERE id = ?", (dump(smallest.to_dict()), detail, id))


def count_again(db: sqlite3.Connection, id: str) -> None:
    db.execute("UPDATE findings SET count = count + 1 WHERE id = ?", (id,))
