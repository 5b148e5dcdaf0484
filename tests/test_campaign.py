"""Campaigns with targets that are wrong on purpose: found, shrunk, saved, and failing again when replayed."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fuzz.__main__ import main
from fuzz.campaign import campaign, findings, progress, run_folder, store
from fuzz.campaign import plan as plan_module
from fuzz.campaign.plan import Plan
from fuzz.cases import drawing

TESTS = Path(__file__).parent

ROOT = TESTS.parent

JUDGED = {"state_transposed": "accuracy", "last_row_dropped": "accuracy", "gives_nan": "written", "raises": "raised"}

FATAL = {"hangs": "timeout", "exits": "died", "segfaults": "died"}

CORRECT = "flash_kda:fwd"

CASES = 30


@dataclass
class Outcome:
    status: int
    folder: Path
    printed: str

    def findings(self, target: str, check: str | None = None) -> list[findings.SavedFinding]:
        saved = findings.find(self.folder / "findings")
        return [
            one
            for one in saved
            if one.finding["target"] == f"wrong_targets:{target}" and check in (None, one.finding["check"])
        ]


def call(*arguments: object) -> tuple[int, str]:
    """The exit status of a command and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main([str(argument) for argument in arguments])
    return status, printed.getvalue()


def campaign_of(
    folder: Path, wrong: dict[str, str], cases: int, shrink_limit: float, lives: int, time_limit: str
) -> Outcome:
    targets = [f"--target=wrong_targets:{name}" for name in wrong]
    options = ("--cases", cases, "--seed", 3, "--jobs", 2, "--time-limit", time_limit, "--out", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "SHRINK_LIMIT", shrink_limit)
        patch.setattr(campaign, "LIVES", lives)
        status, printed = call("run", *targets, "--target", CORRECT, *options)
    return Outcome(status, folder, printed)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> Outcome:
    """Of targets that the judge finds wrong. Shrinking takes seconds; a machine with much else to do needs more."""
    return campaign_of(tmp_path_factory.mktemp("judged") / "run", JUDGED, CASES, 60.0, campaign.LIVES, "60s")


@pytest.fixture(scope="module")
def fatal(tmp_path_factory) -> Outcome:
    """Of targets that cost a process with each failure, which is slow: few lives, and hardly any shrinking."""
    return campaign_of(tmp_path_factory.mktemp("fatal") / "run", FATAL, 10, 1.0, 2, "4s")


@pytest.mark.parametrize(
    ("checks", "worst"),
    [
        ([("accuracy", {"out": 0.2, "state": 0.1}, {"out": 0.4, "state": 0.1})], (1.0, "state")),
        ([("accuracy", {"out": 0.2}, {"out": 0.4}), ("accuracy", {"out": 0.1}, {"out": 0.4})], (0.5, "out")),
        ([("accuracy", {"out": 0.2, "state": math.nan}, {"out": 0.1, "state": 0.1})], (math.inf, "state")),
        ([("accuracy", {"out": 0.2, "out_element": 0.2}, {"out": 0.4, "out_element": 0.3})], (0.5, "out")),
        ([("accuracy", {"out": 0.2, "out_element": 0.57}, {"out": 0.4, "out_element": 0.3})], (3.0, "out_element")),
        ([("accuracy", {"out": 0.01, "out_element": 0.1}, {"out": 0.4, "out_element": 0.3})], (0.025, "out")),
        ([("accuracy", {"out": 0.0}, {"out": 0.0})], (0.0, "out")),
        ([("accuracy", {"out": 1e-9}, {"out": 0.0})], (math.inf, "out")),
        ([("repeat", {"out": 0.2}, {"out": 0.1})], None),
    ],
)
def test_the_worst_error_is_the_one_that_takes_up_most_of_its_bound(checks, worst):
    tally = progress.Tally()
    for name, errors, bounds in checks:
        check = {"name": name, "passed": True, "errors": errors, "bounds": bounds, "detail": ""}
        check["roundings"] = {"out_element": 0.165} if "out_element" in errors else {}
        progress.count(tally, "passed", "", {"checks": [check]})
    assert tally.worst == pytest.approx(worst)


def test_every_wrong_target_is_found_and_the_correct_one_is_not(outcome):
    assert outcome.status == 1
    for target, check in JUDGED.items():
        assert outcome.findings(target, check), f"{target} was not found"
    named = {one.finding["target"].partition(":")[2] for one in findings.find(outcome.folder / "findings")}
    assert named == set(JUDGED)


@pytest.mark.parametrize(
    ("target", "check", "expected"),
    [
        # A token is needed to see the state in the output, and none to see it in the final state.
        ("state_transposed", "accuracy", {"heads": 1, "layout": "contiguous", "n_seqs": 1, "tokens": (0, 1)}),
        ("last_row_dropped", "accuracy", {"heads": 1, "layout": "contiguous", "n_seqs": 1, "tokens": (3,)}),
        ("gives_nan", "written", {"heads": 2, "layout": "contiguous", "n_seqs": 1, "tokens": (1,), "packed": False}),
        # Tokens cannot move from one sequence to another, so 21 of them may stay spread over several.
        ("raises", "raised", {"heads": 1, "layout": "contiguous", "tokens": (21,), "initial_state": None}),
    ],
)
def test_shrunk_to_what_a_person_can_read(outcome, target, check, expected):
    for one in outcome.findings(target, check):
        assert one.finding["shrunk"]
        tokens = expected["tokens"]
        assert one.case.tokens in tokens, one.case
        for name, value in expected.items():
            assert name == "tokens" or getattr(one.case, name) == value, one.case


def test_a_finding_folder_holds_everything(outcome):
    for one in findings.find(outcome.folder / "findings"):
        names = {path.name for path in one.path.iterdir()} - {"error_map.json"}
        assert names == {"case.json", "original.json", "inputs.safetensors", "finding.json", "repro.py"}
        finding = one.finding
        assert finding["environment"]["versions"]["torch"]
        assert finding["environment"]["devices"]
        assert finding["detail"]
        assert f"python -m fuzz replay {one.path}" == finding["replay"]
        if finding["check"] == "accuracy":
            assert any(not error <= finding["bounds"][name] for name, error in finding["errors"].items())


def test_a_target_that_kills_its_process_is_found_and_retired_and_the_others_go_on(fatal):
    assert fatal.status == 1
    for target, check in FATAL.items():
        assert fatal.findings(target, check), f"{target} was not found"
        assert f"retired: wrong_targets:{target}" in fatal.printed
    with contextlib.closing(store.open_for_reading(fatal.folder)) as db:
        counts = dict(db.execute("SELECT target, count(*) FROM results WHERE outcome != 'skipped' GROUP BY target"))
        retired = db.execute("SELECT DISTINCT target FROM results WHERE reason LIKE 'retired after%'").fetchall()
    assert counts[CORRECT] == 10
    assert {target.partition(":")[2] for (target,) in retired} == set(FATAL)
    assert counts["wrong_targets:segfaults"] < 10


def test_what_kills_its_process_does_so_again_under_replay(fatal):
    (one,) = fatal.findings("segfaults", "died")
    status, printed = call("replay", one.path)
    assert status == 1
    assert "died: SIGSEGV" in printed


def test_failures_of_one_kind_are_one_finding_with_a_count(outcome):
    with contextlib.closing(store.open_for_reading(outcome.folder)) as db:
        counts = store.failures_by_finding(db)
        failed = db.execute(
            "SELECT count(*) FROM results WHERE target = 'wrong_targets:raises' AND reason LIKE 'raised%'"
        ).fetchone()[0]
        phases = store.get(db, "seconds")
        assert store.get(db, "cases_per_second") > 0
        assert store.get(db, "status") == "finished"
        assert store.get(db, "cases") == CASES
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert set(phases) == {"generate", "oracle", "target", "judge"} and min(phases.values()) > 0
    found = {path.name: run_folder.load(path) for path in (outcome.folder / "findings").iterdir()}
    assert counts.keys() == found.keys()
    groups = [(*one.failure.group, findings.family(one.needs)) for one in found.values()]
    assert len(groups) == len(set(groups))
    alike = ("wrong_targets:raises", "raised", "RuntimeError", "")
    assert [counts[id] for id, group in zip(found, groups, strict=True) if group == alike] == [failed]
    assert failed > 1


def test_it_ends_with_a_table_and_a_report(outcome):
    assert (outcome.folder / "report.html").stat().st_size > 1000
    assert f"report: {outcome.folder / 'report.html'}" in outcome.printed
    for word in ("judged", "skipped", "error / bound beyond rounding", "wrong_targets:state_transposed"):
        assert word in outcome.printed
    assert f"python -m fuzz replay {outcome.folder / 'findings'}" in outcome.printed
    row = r"{} +\d+ +\d+ +\d+ +(\S+) \((?:out|state)\w*\) +\d+ *\n"
    assert 0.001 < float(re.search(row.format(CORRECT), outcome.printed)[1]) <= 1  # of the bound
    assert float(re.search(row.format("wrong_targets:last_row_dropped"), outcome.printed)[1]) > 1


def test_findings_fail_again_under_replay_and_not_with_a_correct_target(outcome):
    folder = outcome.folder / "findings"
    count = len(findings.find(folder))
    status, printed = call("replay", folder)
    assert status == 1
    assert f"{count} replayed, {count} failed" in printed
    status, printed = call("replay", folder, "--target", CORRECT)
    assert status == 0
    assert f"{count} replayed, 0 failed" in printed


def test_replay_needs_the_saved_inputs_alone(outcome, tmp_path, monkeypatch):
    source = """
import fuzz.cases.inputs
import wrong_targets
def changed(*args, **kwargs):
    raise RuntimeError("the generator has changed")
fuzz.cases.inputs.make_inputs = changed
fwd = wrong_targets.last_row_dropped
"""
    (tmp_path / "later_version.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    folder = outcome.findings("last_row_dropped", "accuracy")[0].path
    status, printed = call("replay", folder, "--target", "later_version:fwd")
    assert status == 1
    assert "accuracy: " in printed
    renamed = shutil.copytree(folder, tmp_path / "renamed")
    case = json.loads((folder / "case.json").read_text())
    (renamed / "case.json").write_text(json.dumps({**case, "version": 0, "keys": "a family of old"}))
    status, printed = call("replay", renamed, "--target", "later_version:fwd")
    assert status == 1
    assert "accuracy: " in printed
    status, printed = call("replay", folder / "original.json", "--target", "later_version:fwd")
    assert "the generator has changed" in printed  # a bare case has nothing but the generator


def test_minimize_continues_and_overwrites_nothing(outcome, tmp_path):
    one = outcome.findings("last_row_dropped", "accuracy")[0]
    fixture = tmp_path / "large.json"
    case = json.loads((one.path / "original.json").read_text())
    fixture.write_text(json.dumps({"why": "a last row is missing", "case": case}))
    for number in (1, 2):
        status, printed = call("minimize", fixture, "--target", "wrong_targets:last_row_dropped", "--budget", "60s")
        assert status == 1
        folder = tmp_path / f"large-smaller{number}"
        assert f"saved: {folder}" in printed
        saved = findings.load_finding(folder)
        assert (saved.case.tokens, saved.case.heads) == (3, 1)
        assert json.loads((folder / "original.json").read_text()) == case
    status, printed = call("minimize", folder)
    assert status == 1 and "nothing was saved" in printed and not folder.with_name("large-smaller2-smaller1").exists()
    status, printed = call("minimize", fixture, "--target", CORRECT)
    assert status == 0
    assert "does not fail" in printed


def test_a_run_folder_may_hold_more_than_findings(outcome, tmp_path):
    """A benchmark's file, which is no case; and what `minimize` made, which belongs to a finding that is there."""
    folder = tmp_path / "run"
    shutil.copytree(outcome.folder, folder)
    (folder / "speed.json").write_text("{}")
    count = len(findings.find(folder))
    assert count == len(findings.find(outcome.folder / "findings")) > 0
    (folder / "speed.json").unlink()  # nor a benchmark
    first = findings.find(folder)[0].path
    shutil.copytree(first, first.with_name(f"{first.name}-smaller1"))
    status, printed = call("run", "--resume", folder, "--cases", CASES)
    assert status == 1
    assert f"{count} findings" in printed


def test_a_run_folder_is_used_once(outcome, capsys):
    before = {path: path.stat().st_mtime_ns for path in outcome.folder.rglob("*")}
    assert main(["run", "--cases", "1", "--out", str(outcome.folder)]) == 2
    assert "expected a folder without results" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in outcome.folder.rglob("*")}


def test_failures_that_need_other_families_are_other_findings(tmp_path):
    """Two mistakes that look alike: one with huge keys, one with huge queries."""
    plan = Plan(tmp_path / "run", ("wrong_targets:two_mistakes",), cases=100, seed=1, jobs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "SHRINK_LIMIT", 60.0)
        done = campaign.run_campaign(plan)
    raised = [one for one in done.findings.values() if one.failure.check["name"] == "raised"]
    families = {findings.family(one.needs): one for one in raised}
    assert len(raised) == 2 and set(families) == {"keys huge", "queries huge"}
    with contextlib.closing(store.open_for_reading(plan.out)) as db:
        for family, one in families.items():
            failed = db.execute("SELECT case_json FROM results WHERE finding = ?", (one.id,)).fetchall()
            assert len(failed) == one.count and one.state == run_folder.load(one.folder).state == "shrunk"
            name, value = family.split()
            assert all(json.loads(case)[name] == value for (case,) in failed)


def test_earlier_findings_are_judged_first(outcome, tmp_path, monkeypatch):
    """Those of the targets at hand; what fails again is a finding of this campaign, from the inputs that were saved."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copytree(outcome.folder, tmp_path / "runs" / "earlier")
    status, printed = call("run", "--target", "wrong_targets:gives_nan", "--cases", 1, "--jobs", 1, "--seed", 8)
    earlier = outcome.findings("gives_nan")
    assert status == 1 and f"judged first: {len(earlier)}, failed again: {len(earlier)}" in printed
    newest = max((tmp_path / "runs").iterdir(), key=lambda folder: folder.name if folder.name != "earlier" else "")
    with contextlib.closing(store.open_for_reading(newest)) as db:
        saved = [run_folder.load(path) for path in (newest / "findings").iterdir()]
        previous = {path for one in saved for path in one.previous}
        assert {path for (path,) in db.execute("SELECT path FROM replays")} >= previous
    assert previous == {str(tmp_path / "runs" / "earlier" / "findings" / one.path.name) for one in earlier}
    kept = {(one.case, one.inputs.read_bytes()) for one in findings.find(newest / "findings")}
    assert {(one.case, one.inputs.read_bytes()) for one in earlier} <= kept
    # Those of other targets are not.
    status, printed = call("run", "--target", CORRECT, "--cases", 1, "--jobs", 1, "--previous", earlier[0].path)
    assert status == 0 and f"--previous {earlier[0].path}: holds no finding of {CORRECT}" in printed


def test_the_seed_decides_the_cases():
    first = drawing.draw_cases("cpu", 1, 30)
    assert first == drawing.draw_cases("cpu", 1, 30)
    assert first != drawing.draw_cases("cpu", 2, 30)
    drawn = drawing.all_cases("cpu", 1)
    many = [next(drawn) for _ in range(2 * drawing.BATCH)]
    assert len(set(many)) == len(many)


DRAW = """
import hashlib, sys
sys.path[:0] = {path}
{imports}
from fuzz.cases.drawing import draw_cases
print(hashlib.sha256(repr([case.to_dict() for case in draw_cases("cpu", 1, 200)]).encode()).hexdigest())
"""


def test_the_seed_draws_the_same_cases_whatever_else_is_loaded(tmp_path):
    (tmp_path / "of_a_user.py").write_text("SIZES = (4711, 1234567, 321098765, 0.123456789)\n")

    def digest(imports: str) -> str:
        program = DRAW.format(path=[str(tmp_path), str(ROOT)], imports=imports)
        return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert digest("") == digest(
        "import fuzz.campaign.campaign, fuzz.conformance.conform, fuzz.self_check.run, benchmarks.speed, of_a_user"
    )
