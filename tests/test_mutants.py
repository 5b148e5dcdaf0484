"""Mutants: every rule makes some, they are drawn by a seed, and a handful is judged as the command does."""

from __future__ import annotations

import shutil

import pytest

from fuzz.mutants import kernel
from fuzz.mutants.judging import EQUIVALENT, INVALID, KILLED, cases, judged, known, original
from fuzz.mutants.rules import MODEL, ROOT, Mutant, drawn, mutants, sources
from fuzz.mutants.run import load, run, summary

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = {
    *("wait removed", "arrival removed", "fence removed", "< for <=", "off by one", "operands swapped", "sign flipped"),
    *("parity flipped", "mask dropped", "loop one short", "rounding left out", "rounding doubled"),
}


@pytest.fixture(scope="module")
def everything() -> list[Mutant]:
    return [each for file in sources() for each in mutants(file)]


def test_every_rule_finds_places(everything):
    assert {each.rule for each in everything} == RULES
    assert {each.rule for each in everything if each.file == MODEL} >= RULES - {
        *("wait removed", "arrival removed", "fence removed", "parity flipped")
    }
    assert len({each.id for each in everything}) == len(everything) > 1000


def test_a_mutant_changes_one_place_and_no_comment(everything):
    for each in everything:
        text = (ROOT / each.file).read_text()
        changed = each.apply(text)
        assert changed != text and changed[: each.start] == text[: each.start]
        line = text.splitlines()[each.line - 1]
        assert each.file == MODEL or not line.strip().startswith(("//", "#"))
    with pytest.raises(ValueError, match="the source has changed"):
        everything[0].apply(" " * 100_000)


def test_the_seed_draws_them():
    first, again, other = (drawn(40, seed, sources()) for seed in (1, 1, 2))
    assert first == again != other and len({each.id for each in first}) == 40


def test_a_handful_of_the_model(tmp_path):
    out = tmp_path / "mutants.jsonl"
    results = run(6, 3, out, ("model",), 12, 1, 60.0)
    assert len(results) == 6 == len(load(out))
    assert sum(each.outcome == KILLED for each in results) >= 4
    text = summary(results)
    assert "| all | 6 |" in text and "killed by" in text
    before = out.read_text()
    assert run(6, 3, out, ("model",), 12, 1, 60.0) == results and out.read_text() == before  # resumed


def test_a_mutant_that_changes_nothing_is_equivalent_and_one_that_fails_to_compile_is_not_counted(tmp_path):
    text = (ROOT / MODEL).read_text()
    start = text.index("CHUNK = 32")
    few = list(known(original(False, tmp_path), cases(1, 2, False), 1))
    for new, outcome in (("CHUNK = 31 + 1", EQUIVALENT), ("CHUNK = (32", INVALID)):
        same = Mutant(MODEL, "off by one", start, start + len("CHUNK = 32"), "CHUNK = 32", new, 1)
        assert judged(same, few, 60.0).outcome == outcome
    other = Mutant(MODEL, "off by one", start, start + 3, "another text", "", 1)
    with pytest.raises(ValueError, match="the source has changed"):  # while a run goes on
        judged(other, few, 60.0)


def test_a_handful_of_the_kernel(tmp_path):
    """One that computes something else, and one that waits for ever."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    (tmp_path / "right").mkdir()
    few = list(known(kernel.target("original", kernel.build(tmp_path / "right", None)), cases(1, 2, True), 0))
    everything = mutants("csrc/sm90/recur.h") + mutants("csrc/sm90/prepare.h")
    sign = next(each for each in everything if each.rule == "sign flipped" and each.file.endswith("recur.h"))
    arrival = next(each for each in everything if each.rule == "arrival removed")
    assert judged(sign, few, 300.0).outcome == KILLED
    found = judged(arrival, few, 300.0)
    assert found.outcome == KILLED and found.check in ("deadlock", "accuracy", "written", "timeout", "died"), found
