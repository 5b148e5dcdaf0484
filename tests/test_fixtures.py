"""Every fixture is judged again, by all checks that apply to it, on what `flash_kda.fwd` runs here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fuzz.campaign import findings
from fuzz.campaign.replay import replay
from fuzz.cases.case import Case
from fuzz.targets.registry import default_device

FOLDER = Path(__file__).parent / "fixtures"
CASE_FILES = sorted(FOLDER.glob("*.json"))


def test_there_are_enough_hand_picked_edges():
    assert len(CASE_FILES) >= 25


@pytest.mark.parametrize("path", CASE_FILES, ids=lambda path: path.stem)
def test_a_case_file_says_why_it_is_there(path):
    content = json.loads(path.read_text())
    assert set(content) == {"why", "case"}
    assert content["why"].endswith(".") and len(content["why"].split()) > 4
    assert Case.from_dict(content["case"]).to_dict() == content["case"]


def test_no_two_case_files_hold_the_same_case():
    cases = [Case.from_dict(json.loads(path.read_text())["case"]) for path in CASE_FILES]
    assert len(set(cases)) == len(cases)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_flash_kda_passes_every_fixture(device, monkeypatch):
    assert default_device() == device
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the worker: the cases are too small for more to help
    saved = findings.find(FOLDER)
    assert len(saved) >= len(CASE_FILES)
    results = list(replay(saved))
    assert len(results) == len(saved)
    wrong = [
        f"{one.path.name}: {result.outcome} {result.failed_checks}"
        for one, result in results
        if result.outcome != "passed"
    ]
    assert not wrong, "\n".join(wrong)
