"""JUnit XML of a report card: a test suite for each rung, and a test case for each row.

A row with known failures alone is skipped, with their reasons. What was known and did not fail is in the output of the
last suite.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from fuzz.conformance.conform import FAIL, UNREACHABLE, Card, Grade
from fuzz.conformance.ladder import RUNGS
from fuzz.files import write_whole


def write_junit(card: Card, path: Path) -> None:
    """Writes the file in one step. Raises OSError."""
    suites = ElementTree.Element("testsuites", name=f"conform {card.target.get('name', card.plan.target)}")
    for rung in RUNGS:
        rows = [row for row in card.rows if row.rung == rung]
        if rows:
            counts = {"tests": len(rows), "failures": sum(failed(row) for row in rows), "errors": 0}
            counts["skipped"] = sum(skipped(row) for row in rows)
            suite = ElementTree.SubElement(
                suites, "testsuite", name=rung, time=f"{sum(row.seconds for row in rows):.3f}"
            )
            suite.attrib.update({name: str(count) for name, count in counts.items()})
            for row in rows:
                add(suite, row)
    if card.notes and len(suites):
        ElementTree.SubElement(suites[-1], "system-out").text = printable("\n".join(card.notes))
    if card.status != "complete":
        suite = ElementTree.SubElement(suites, "testsuite", name="the command", tests="1", errors="1", failures="0")
        case = ElementTree.SubElement(suite, "testcase", classname="conform", name="status")
        ElementTree.SubElement(case, "error", message=f"{card.status} after {len(card.rows)} of {card.total} rows")
    ElementTree.indent(suites)
    write_whole(path, ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n")


def add(suite: ElementTree.Element, row: Grade) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=f"conform.{row.rung}", name=row.id)
    case.attrib["time"] = f"{row.seconds:.3f}"
    if failed(row):
        failure = ElementTree.SubElement(case, "failure", message=printable(row.reason))
        failure.text = printable("\n".join(f"{saved.check}: {saved.detail}\n{saved.replay}" for saved in row.findings))
    elif skipped(row):
        known = "; ".join(dict.fromkeys(saved.known for saved in row.findings))
        message = f"known failure: {known}" if known else row.reason
        ElementTree.SubElement(case, "skipped", message=printable(message))


def failed(row: Grade) -> bool:
    return row.unexpected


def skipped(row: Grade) -> bool:
    return row.grade == UNREACHABLE or (row.grade == FAIL and not row.unexpected)


def printable(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(char for char in text if char in "\n\t" or char.isprintable())
