"""Groups of failures: the finding that a failure is counted in."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fuzz.campaign import findings, store
from fuzz.campaign.findings import INTERMITTENT, Failure, SavedFinding
from fuzz.campaign.progress import Finding, Progress

FAMILIES_APART = 8  # groups into which failures of one target, check and error class are told apart by their families


def group_of(progress: Progress, failure: Failure, apart_from: Finding | None = None) -> Finding | None:
    """The finding that a failure is counted in, or None when it is the first of its group.

    Alike in target, check and error class, it belongs to a finding without whose families it would not fail either.
    While one is not shrunk yet, what it needs is not known, and the failure waits with it.
    """
    known = progress.why_known(failure)
    alike = [
        one
        for one in progress.findings.values()
        if one.failure.group == failure.group and one.known == known and one is not apart_from
    ]
    small = [one for one in alike if one.state in ("shrunk", "cut short", INTERMITTENT)]
    for finding in small:
        if finding.explains(failure.case):
            return finding
    waiting = next((one for one in alike if one not in small), None)
    if waiting is not None:
        return waiting
    return alike[0] if len(alike) >= FAMILIES_APART else None


def write_finding(progress: Progress, failure: Failure, *, id: str = "", copied: SavedFinding | None = None) -> Finding:
    """Makes a finding of the first failure of a group.

    copied: a finding of an earlier campaign, which failed again from the inputs that it holds.
    """
    id = id or findings.finding_id(failure, store.case_id(failure.case))
    state = INTERMITTENT if failure.intermittent else "waiting"
    finding = Finding(id, progress.plan.out / "findings" / id, failure.case, failure, state=state)
    finding.known = progress.why_known(failure)
    if copied is None:
        save_finding(progress, finding)
    else:
        finding.previous.append(str(copied.path.resolve()))
        save_finding(progress, finding, write_inputs=partial(shutil.copyfile, copied.inputs))
    finding.count = len(finding.previous)
    progress.findings[id] = finding
    return finding


def save_finding(progress: Progress, finding: Finding, write_inputs: Callable[[Path], object] | None = None) -> None:
    """Brings the folder of a finding up to date."""
    findings.save(
        finding.folder,
        finding.failure,
        finding.original,
        environment=progress.environment,
        write_inputs=write_inputs or partial(progress.write_inputs, finding.failure.case),
        state="waiting" if finding.state == "shrinking" else finding.state,
        previous=finding.previous,
        origin=progress.origin(finding.failure.target),
    )
