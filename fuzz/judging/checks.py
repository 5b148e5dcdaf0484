"""Checks: all that a job may name. Campaigns draw from the properties; the ladder names refusals too."""

from __future__ import annotations

from collections.abc import Callable

from fuzz.cases.case import Case
from fuzz.judging import properties
from fuzz.judging.properties import PROPERTIES
from fuzz.judging.refusals import REFUSALS
from fuzz.judging.verdict import NOT_CHECKED, NOT_PROMISED

CHECKS: dict[str, Callable] = {**PROPERTIES, **REFUSALS}


def applicable(name: str, case: Case) -> bool:
    """Whether the check says something about the case. KeyError for an unknown name."""
    return name in REFUSALS or properties.applicable(name, case)


def reason_not_checked(check: dict) -> str | None:
    """Why a check, as in a verdict's dict, decides nothing about its target and case; None where it does."""
    detail = check["detail"]
    if not check["passed"]:
        return None
    if detail.startswith(NOT_PROMISED):
        return detail
    return detail.removeprefix(NOT_CHECKED) if detail.startswith(NOT_CHECKED) else None
