"""What a campaign is asked to do."""

from __future__ import annotations

import sqlite3
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fuzz.campaign import store

TIME_LIMIT = 60.0  # seconds for one target on one case

SHRINK_LIMIT = 30.0  # seconds for one finding

ENGINES = ("local", "ray")


class CampaignError(ValueError):
    """A campaign cannot be run as asked; the message is one line that says why."""


@dataclass(frozen=True)
class Plan:
    """What a campaign is asked to do.

    targets: names; empty means all built-in targets that can run here. budget: seconds, or None when `cases` ends it.
    jobs: worker processes, with the engine "ray" on each machine, where None means what fits it.
    time_limit: seconds for one target on one case.
    previous: run folders or findings that are judged before any new case. runs: a folder of run folders, where the
    newest with a finding of one of the targets is taken when no previous one is given.
    resume: go on with what is in `out`.
    """

    out: Path
    targets: tuple[str, ...] = ()
    budget: float | None = None
    cases: int | None = None
    seed: int = 0
    jobs: int | None = 1
    profile: str = "cpu"
    time_limit: float | None = None
    engine: str = "local"
    previous: tuple[Path, ...] = ()
    runs: Path | None = None
    resume: bool = False

    @property
    def limit(self) -> float:
        """A hang has to show within the budget, so a short budget has a shorter limit."""
        if self.time_limit is not None:
            return self.time_limit
        return TIME_LIMIT if self.budget is None else min(TIME_LIMIT, max(5.0, self.budget / 4))

    @property
    def shrink_limit(self) -> float:
        return SHRINK_LIMIT if self.budget is None else min(SHRINK_LIMIT, max(5.0, self.budget / 4))

    def to_dict(self) -> dict:
        """For JSON: all but what is of one run of it only."""
        fields = asdict(self)
        del fields["resume"], fields["runs"]
        return {**fields, "out": str(self.out), "previous": [str(path) for path in self.previous]}


def resumed(folder: Path, *, budget: float | None = None, cases: int | None = None, jobs: int | None = None) -> Plan:
    """The plan of the campaign in `folder`, to be resumed; budget, cases and jobs replace those of the plan."""
    db = store.open_for_reading(folder)
    try:
        config = store.get(db, "config")
    except sqlite3.Error as error:
        raise CampaignError(f"--resume {folder}: cannot be read as a campaign: {error}") from error
    finally:
        db.close()
    if config is None:
        raise CampaignError(f"--resume: expected a campaign that has begun, got {folder}; start it anew")
    previous = tuple(Path(path) for path in config.pop("previous"))
    plan = Plan(**{**config, "out": folder, "targets": tuple(config["targets"]), "previous": previous, "resume": True})
    if budget is not None or cases is not None:
        plan = replace(plan, budget=budget, cases=cases)
    return plan if jobs is None else replace(plan, jobs=jobs)
