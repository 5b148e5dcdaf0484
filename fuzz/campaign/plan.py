"""What a campaign is asked to do."""

from __future__ import annotations

import sqlite3
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fuzz.campaign import store

TIME_LIMIT = 60.0  # seconds for one target on one case

SHRINK_LIMIT = 30.0  # seconds for one finding

ENGINES = ("local", "ray")

DEFAULT_TARGET = "flash_kda"  # under test where nobody names one


class CampaignError(ValueError):
    """A campaign cannot be run as asked; the message is one line that says why."""


@dataclass(frozen=True)
class Plan:
    """What a campaign is asked to do.

    targets: names of the targets under test. Empty means flash_kda.
    references: names of other targets to judge. If both are empty, all other built-in targets that can run here.
    budget: seconds, or None if `cases` ends the campaign.
    jobs: number of worker processes; with the engine "ray" on each machine, and None for what fits the machine.
    time_limit: seconds for one target on one case.
    previous: run folders or findings to judge before any new case.
    runs: folder of run folders. Without `previous`, the newest with a finding of one of the targets is taken.
    known: file of known failures, see `fuzz.campaign.known`.
    resume: whether the campaign in `out` is resumed.
    """

    out: Path
    targets: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    budget: float | None = None
    cases: int | None = None
    seed: int = 0
    jobs: int | None = 1
    profile: str = "cpu"
    time_limit: float | None = None
    engine: str = "local"
    previous: tuple[Path, ...] = ()
    known: Path | None = None
    runs: Path | None = None
    resume: bool = False

    @property
    def tested(self) -> tuple[str, ...]:
        """Names of the targets under test, which alone decide the verdict."""
        return self.targets or (DEFAULT_TARGET,)

    @property
    def whatever_can_run(self) -> bool:
        """Whether nobody named a target, so that one which cannot run here is left out."""
        return not self.targets and not self.references

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
        known = None if self.known is None else str(self.known)
        return {**fields, "out": str(self.out), "previous": [str(path) for path in self.previous], "known": known}


def resumed(folder: Path, *, budget: float | None = None, cases: int | None = None, jobs: int | None = None) -> Plan:
    """The plan of the campaign in `folder`, to be resumed; budget, cases and jobs replace those of the plan."""
    db = store.open_for_reading(folder)
    try:
        config = store.get(db, "config")
    except sqlite3.Error as error:
        raise CampaignError(f"--resume: expected the run folder of a campaign, got {folder}: {error}") from error
    finally:
        db.close()
    if config is None:
        raise CampaignError(f"--resume: expected a campaign that has begun, got {folder}; start it anew")
    previous = tuple(Path(path) for path in config.pop("previous"))
    names = {each: tuple(config.get(each, ())) for each in ("targets", "references")}
    known = None if config.get("known") is None else Path(config["known"])
    plan = Plan(**{**config, **names, "out": folder, "previous": previous, "known": known, "resume": True})
    if budget is not None or cases is not None:
        plan = replace(plan, budget=budget, cases=cases)
    return plan if jobs is None else replace(plan, jobs=jobs)
