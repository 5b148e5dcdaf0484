"""Checks: all that a job may name. Campaigns draw from the properties; the ladder names refusals too."""

from __future__ import annotations

from collections.abc import Callable

from fuzz.cases.case import Case
from fuzz.judging import properties
from fuzz.judging.properties import PROPERTIES
from fuzz.judging.refusals import REFUSALS
from fuzz.judging.verdict import NOT_CHECKED

CHECKS: dict[str, Callable] = {**PROPERTIES, **REFUSALS}


def applicable(name: str, case: Case) -> bool:
    """Whether the check says something about the case. KeyError for an unknown name."""
    return name in REFUSALS or properties.applicable(name, case)


def reason_not_checked(check: dict) -> str | None:
    """Why a check, as in a verdict's dict, had nothing to say about its target and case; None where it had."""
    detail = check["detail"]
    return detail.removeprefix(NOT_CHECKED) if check["passed"] and detail.startswith(NOT_CHECKED) else None
