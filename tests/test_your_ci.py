"""The page for authors of kernels: what it shows works in a folder outside of the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_debugging import saved

from fuzz.cases.case import Case
from fuzz.cases.plain import PLAIN
from fuzz.conformance.conform import FAIL, PASS, UNREACHABLE, Card, CardFinding, CardPlan, Grade
from fuzz.conformance.junit import write_junit
from fuzz.conformance.ladder import ladder
from fuzz.pytest_helper import replays

PAGE = (Path(__file__).parents[1] / "docs" / "your_ci.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
KERNEL, TEST = (text for language, text in BLOCKS if language == "python")
WRONG = KERNEL + "    out.mul_(2)\n"


@pytest.fixture
def project(tmp_path) -> Path:
    """A user's folder with the kernel and the test of the page, and one finding."""
    (tmp_path / "mykernel.py").write_text(KERNEL)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_kda.py").write_text(TEST)
    saved(tmp_path / "tests" / "findings" / "first", "another:kernel", PLAIN)
    return tmp_path


def command(project: Path, *arguments: object) -> subprocess.CompletedProcess:
    """In the user's folder, with nothing of the checkout in the environment but the installed package."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    return subprocess.run(
        [str(argument) for argument in arguments], cwd=project, env=environment, capture_output=True, text=True
    )


def test_findings_are_tests_of_the_users_suite(project):
    run = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_kda.py")
    done = command(project, *run)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
    (project / "mykernel.py").write_text(WRONG)
    done = command(project, *run)
    assert done.returncode == 1 and "1 failed" in done.stdout and "accuracy: out" in done.stdout, done.stdout
    (project / "mykernel.py").write_text("import os\n\n" + KERNEL + "    os._exit(3)\n")
    done = command(project, *run)
    assert done.returncode == 1 and "died: exit status 3" in done.stdout, done.stdout
    shutil.rmtree(project / "tests" / "findings")
    done = command(project, *run)
    assert done.returncode == 2 and "findings: expected a file or a folder, got none" in done.stdout, done.stdout


def test_a_case_that_the_target_does_not_take_is_skipped(tmp_path):
    case = Case.from_dict({**PLAIN.to_dict(), "seq_lens": [10**5]})
    saved(tmp_path / "findings" / "large", "fla.naive", PLAIN)
    test = replays(tmp_path / "findings")
    (mark,) = test.pytestmark
    assert [*mark.kwargs["ids"]] == ["findings/large"]
    with pytest.raises(pytest.skip.Exception, match="too large"):
        test(replace(mark.args[1][0], case=case))


def test_the_commands_of_the_page_work(project):
    (ladder_command,) = (text for _, text in BLOCKS if text.startswith("kda-fuzz conform"))
    words = ladder_command.replace("--rung edges --rung families", "--rung fuzz --fuzz-cases 2").split()
    done = command(project, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    suites = ElementTree.parse(project / "conform.xml").getroot()
    assert [suite.get("name") for suite in suites] == ["fuzz"]
    assert int(suites[0].get("tests")) == 1 and suites[0][0].get("name") == "fuzz/random"
    (run_command,) = (text for _, text in BLOCKS if text.startswith("kda-fuzz run"))
    done = command(project, *run_command.replace("--budget 10m", "--cases 3 --seed 1").split())
    assert done.returncode in (0, 2) and "run folder: run" in done.stdout, done.stdout + done.stderr


def test_known_failures_are_expected_ones(project):
    """And one that passes again is reported."""
    test = TEST.replace('target="mykernel:fwd"', 'target="mykernel:fwd", known="known.txt"')
    (project / "tests" / "test_kda.py").write_text(test)
    (project / "tests" / "known.txt").write_text("mykernel:fwd accuracy the output is doubled, issue 7\n")
    run = (sys.executable, "-m", "pytest", "-q", "-rx", "-p", "no:cacheprovider", "tests/test_kda.py")
    (project / "mykernel.py").write_text(WRONG)
    done = command(project, *run)
    assert done.returncode == 0 and "1 xfailed" in done.stdout, done.stdout
    assert "the output is doubled, issue 7" in done.stdout
    (project / "mykernel.py").write_text(KERNEL)
    done = command(project, *run)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout
    assert "known.txt:1: mykernel:fwd accuracy: did not fail; if it cannot any more, remove it" in done.stdout


def test_junit_has_a_case_for_each_row(tmp_path):
    card = Card(CardPlan("kernel", tmp_path), {"name": "kernel"}, status="complete", total=3)
    finding = CardFinding("accuracy", "out 2 \x1b[31mat", "a case", {}, "findings/x", "python -m fuzz replay x", True)
    card.rows = [
        Grade("edges/one", "one", PASS, judged=1, cases=1, seconds=0.5),
        Grade("edges/two", "two", FAIL, reason="too large", findings=[finding]),
        Grade("families/keys", "keys", UNREACHABLE, reason="int64 only"),
    ]
    write_junit(card, tmp_path / "conform.xml")
    edges, families = ElementTree.parse(tmp_path / "conform.xml").getroot()
    assert edges.attrib | {"tests": "2", "failures": "1", "skipped": "0"} == edges.attrib
    assert [[child.tag for child in case] for case in (*edges, *families)] == [[], ["failure"], ["skipped"]]
    assert "python -m fuzz replay x" in edges[1][0].text and families[0][0].get("message") == "int64 only"
    finding.known, card.notes = "too large for us", ["known.txt:3: kernel edges/one: did not fail"]
    write_junit(card, tmp_path / "conform.xml")
    edges, families = ElementTree.parse(tmp_path / "conform.xml").getroot()
    assert edges.attrib | {"failures": "0", "skipped": "1"} == edges.attrib
    assert edges[1][0].tag == "skipped" and edges[1][0].get("message") == "known failure: too large for us"
    assert families.find("system-out").text == "known.txt:3: kernel edges/one: did not fail"
    card.status = "interrupted"
    write_junit(card, tmp_path / "conform.xml")
    last = ElementTree.parse(tmp_path / "conform.xml").getroot()[-1]
    assert last[0][0].tag == "error" and last.get("errors") == "1"


def test_a_narrow_kernel_reaches_the_rows_that_matter():
    """One for packed int64 calls with fp32 states only reaches each family and property, and nearly each edge."""
    rows = [row for row in ladder("cpu", (PLAIN,), "cpu") if row.rung in ("families", "properties", "edges")]

    def taken(case: Case) -> bool:
        states = {case.initial_state, case.final_state} == {"fp32"}
        return case.packed and case.cu_seqlens_dtype == "int64" and states and case.layout == "contiguous"

    missed = [row.id for row in rows if not any(map(taken, row.cases))]
    assert set(missed) <= {"edges/many-sequences", "edges/strided", "edges/collinear-keys", "edges/full-decay"}, missed
