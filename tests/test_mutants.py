"""Mutants: every rule makes some, they are drawn by a seed, and a handful is judged as the command does."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from fuzz.cases.plain import PLAIN
from fuzz.mutants import kernel, rules
from fuzz.mutants import publish as publishing
from fuzz.mutants.judging import (
    EQUIVALENT,
    INVALID,
    KILLED,
    SAME_CODE,
    SURVIVED,
    UNSEEN,
    Baseline,
    MutantResult,
    baseline_of,
    built,
    drawn_cases,
    judge_mutant,
    model_with,
    result_of,
)
from fuzz.mutants.mutation_run import load_results, run_mutants
from fuzz.mutants.pool import DIED, ENDED, SILENT, STOPPED, side_by_side
from fuzz.mutants.rules import MODEL, ROOT, Mutant, drawn, mutants, sources, text_of
from fuzz.mutants.special import EXTREME_CASE, HANDOVER_CASE, MIXED_CASE, SPECIAL_CASES
from fuzz.mutants.tables import result_tables

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


def test_what_was_drawn_before_is_not_drawn_again():
    first = {each.id for each in drawn(300, 1, sources())}
    assert not first & {each.id for each in drawn(300, 2, sources(), first)}


def test_a_handful_of_the_model_side_by_side(tmp_path):
    out = tmp_path / "mutants.jsonl"
    results = run_mutants(6, 3, out, {"model": 12}, 60.0, jobs=2)
    assert len(results) == 6 and {each.id for each in results} == set(load_results([out]))
    assert sum(each.outcome == KILLED for each in results) >= 4
    assert all(each.cases == 12 for each in results if not each.decided)
    text = result_tables(results)
    assert "| all | 6 |" in text and "killed by" in text
    before = out.read_text()
    assert run_mutants(6, 3, out, {"model": 12}, 60.0) == results and out.read_text() == before  # resumed
    more = run_mutants(6, 3, out, {"model": 14}, 60.0)
    assert [each for each in more if each.decided] == [each for each in results if each.decided]
    assert all(each.cases in (13, 14) for each in more if each not in results)


def test_parts_merge_and_are_published(tmp_path, monkeypatch):
    parts = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for number, out in enumerate(parts, 1):
        assert len(run_mutants(5, 3, out, {"model": 2}, 60.0, part=(number, 2))) == (3, 2)[number - 1]
    with parts[1].open("a") as file:
        file.write('{"id": "cut off')
    assert len(load_results(parts)) == 5
    for name, text in {"PAGE": "# Mutants\n<!-- runs -->\n<!-- end -->\n", "DATA": "", "EXPLAINED": "{}"}.items():
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(publishing, name, tmp_path / name)
    (tmp_path / "self_check.json").write_bytes((ROOT / "docs" / "data" / "self_check.json").read_bytes())
    assert publishing.publish(parts).endswith("self_check.md")
    assert "### Seed 3, 5 mutants" in (tmp_path / "PAGE").read_text()
    assert len(json.loads((tmp_path / "DATA").read_text())["3"]) == 5
    with pytest.raises(ValueError, match="which does not exist"):
        publishing.publish([tmp_path / "none"])


def test_survivors_are_explained_by_id_or_by_rule():
    mutant = drawn(1, 3, [MODEL])[0]
    one = result_of(mutant, outcome=SURVIVED, cases=500)
    other = result_of(replace(mutant, new=mutant.new + " ", line=7), outcome=SURVIVED)
    text = result_tables([one, other], {one.id: "It is so.", mutant.rule: "As all of them."})
    assert "500 cases. It is so." in text and ":7, " in text and "0 cases. As all of them." in text
    assert "It is so" not in result_tables([one])
    same = replace(one, outcome=EQUIVALENT)
    assert "Equivalent (no bit differs)" in result_tables([same], {same.id: "No bit."}).partition("No bit.")[0]
    assert "As all of them" not in result_tables([same], {mutant.rule: "As all of them."})


def test_special_cases_come_among_the_drawn_ones():
    for emulated in (True, False):
        among = list(drawn_cases(1, 70, emulated))
        assert among[3:8] == among[63:68] == list(SPECIAL_CASES) and len(among) == 70
        assert list(drawn_cases(1, 6, emulated)) == among[:6]


def test_ids_stay_while_other_lines_change(monkeypatch):
    before = {each.id for each in mutants("csrc/sm90/recur.h")}
    text = text_of("csrc/sm90/recur.h")
    monkeypatch.setattr(rules, "text_of", lambda file: "// a line more\n\n" + text)
    assert {each.id for each in mutants("csrc/sm90/recur.h")} == before


@pytest.mark.parametrize(
    ("file", "rule", "line", "case", "properties"),
    [
        (MODEL, "mask dropped", "return rows.where(mask, 0.0)", MIXED_CASE, ("causality",)),
        (MODEL, "mask dropped", "rate = through_fp64(torch.exp, A_log).clamp", EXTREME_CASE, ()),
        ("csrc/sm90/recur_parts.h", "loop one short", "for (int i = 0; i < 8; ++i) {", HANDOVER_CASE, ("rows_behind",)),
        ("csrc/sm90/recur_parts.h", "wait removed", "    sync();", HANDOVER_CASE, ()),
    ],
)
def test_what_special_cases_are_for(tmp_path, file, rule, line, case, properties):
    kind = "model" if file == MODEL else "kernel"
    if kind == "kernel" and shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    text = text_of(file).splitlines()
    chosen = [each for each in mutants(file) if each.rule in rule.split("|") and line in text[each.line - 1]]
    right, code = built(None, tmp_path / "right", kind)
    few = [replace(baseline_of(right, case, 0), properties=properties)]
    for each in chosen[-1:]:
        assert outcome_of(each, few, code, tmp_path / each.id).outcome == KILLED, each
    assert chosen


def test_an_address_that_a_gpu_refuses_ends_the_process(tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    text = text_of("csrc/params.h")
    old = "return reinterpret_cast<uint64_t>(x.data)"
    mutant = Mutant(
        "csrc/params.h", "mask dropped", text.index(old), text.index(old) + len(old), old, "return true ||" + old[6:], 1
    )
    right, code = built(None, tmp_path / "right", "kernel")
    few = [replace(baseline_of(right, MIXED_CASE, 0), properties=("state_pool", "checkpoints", "layout"))]
    assert outcome_of(mutant, few, code, tmp_path / "wrong").check == DIED


def test_a_run_ends_when_its_time_is_up(tmp_path):
    assert run_mutants(6, 3, tmp_path / "mutants.jsonl", {"model": 500}, 60.0, budget=1e-3) == []


def test_tasks_side_by_side():
    """One that ends, one that dies, one that computes for ever, one that waits, and one that time runs out for."""

    def computes(send):
        while True:
            pass

    def talks(send):
        for number in range(600):
            send(number)
            time.sleep(0.1)

    tasks = {
        "ends": lambda send: send("last"),
        "dies": lambda send: os._exit(3),
        "says nothing": computes,
        "waits": lambda send: time.sleep(60),
        "talks": talks,
    }
    found = {
        key: (messages[-1:], how) for key, messages, how in side_by_side(tasks.items(), 5, 1.0, time.monotonic() + 8)
    }
    assert found["ends"] == (["last"], ENDED) and found["dies"] == ([], DIED) and found["says nothing"] == ([], SILENT)
    assert found["waits"] == ([], STOPPED)
    assert found["talks"][1] == STOPPED and 10 < found["talks"][0][0] < 90


def test_sources_may_be_edited_while_a_run_goes_on(tmp_path):
    """Mutants are of the texts as they were drawn, and the rest of the kernel is of a copy."""
    before = kernel.emulator().CSRC
    with kernel.sources_kept(tmp_path):
        assert tmp_path / "csrc" == kernel.emulator().CSRC and (tmp_path / "csrc" / "params.h").exists()
    assert before == kernel.emulator().CSRC
    text_of.cache_clear()
    assert text_of(MODEL) is text_of(MODEL)


def outcome_of(mutant: Mutant, few: list[Baseline], right: str, folder: Path) -> MutantResult:
    task = partial(judge_mutant, mutant, None, few, right, folder)
    (_, messages, how), *_ = side_by_side([(mutant.id, task)], 1, 300.0, math.inf)
    assert how in (ENDED, DIED)
    return messages[-1] if how == ENDED else replace(messages[-1], outcome=KILLED, check=DIED)


def test_a_mutant_that_changes_nothing_is_equivalent_and_one_that_fails_to_compile_is_not_counted(tmp_path):
    text = (ROOT / MODEL).read_text()
    start = text.index("CHUNK = 32")
    few = [baseline_of(model_with(None), case, 1) for case in drawn_cases(1, 2, False)]
    for new, outcome in (("CHUNK = 31 + 1", EQUIVALENT), ("CHUNK = (32", INVALID)):
        same = Mutant(MODEL, "off by one", start, start + len("CHUNK = 32"), "CHUNK = 32", new, 1)
        assert outcome_of(same, few, "", tmp_path).outcome == outcome
    other = Mutant(MODEL, "off by one", start, start + 3, "another text", "", 1)
    assert outcome_of(other, few, "", tmp_path).outcome == INVALID  # while a run goes on


def test_a_case_on_which_the_original_fails_kills_no_mutant(tmp_path):
    wrong = next(each for each in mutants(MODEL) if each.rule == "sign flipped")
    few = [baseline_of(model_with(None), case, 0) for case in drawn_cases(1, 8, False)]
    assert not any(each.failed for each in few)
    assert outcome_of(wrong, few, "", tmp_path).outcome == KILLED
    few = [replace(each, failed="accuracy") for each in few]
    assert outcome_of(wrong, few, "", tmp_path).outcome == EQUIVALENT


def test_a_handful_of_the_kernel(tmp_path):
    """One that computes something else, one that waits for ever, and two that compile to the same code."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    right, code = built(None, tmp_path / "right", "kernel")
    weak = replace(PLAIN, seq_lens=(70,), packed=True, gates="weak")  # the state lives from chunk to chunk
    few = [baseline_of(right, replace(weak, seed=seed), 0) for seed in range(2)]
    everything = [each for name in ("recur", "prepare") for each in mutants(f"csrc/sm90/{name}.h")]
    lines = (ROOT / "csrc/sm90/recur.h").read_text().splitlines()
    sign = next(
        each
        for each in everything
        if each.rule == "sign flipped"
        and each.file.endswith("/recur.h")
        and each.old == " - "
        and "V_part[2 * i] -" in lines[each.line - 1]
    )
    arrival = next(each for each in everything if each.rule == "arrival removed" and "bar_" in each.old)
    fence = next(each for each in everything if each.rule == "fence removed")
    same = replace(sign, new=sign.old + " ")
    found = {each.id: outcome_of(each, few, code, tmp_path / each.id) for each in (sign, arrival, fence, same)}
    assert found[sign.id].outcome == KILLED
    assert found[arrival.id].outcome == KILLED
    assert found[arrival.id].check in ("deadlock", "accuracy", "written", DIED), found[arrival.id]
    assert found[fence.id].outcome == UNSEEN and found[same.id].outcome == EQUIVALENT
    assert found[fence.id].check == found[same.id].check == SAME_CODE
