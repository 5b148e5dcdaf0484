"""Failures that do not repeat on the same inputs: marked with their rate, and one finding for each target."""

from __future__ import annotations

import contextlib
import json
import re

from test_campaign import call

from fuzz.campaign import campaign, findings, intermittent, store
from fuzz.campaign.findings import Failure
from fuzz.campaign.job import RATE_OF, REPEATS, Result
from fuzz.campaign.plan import Plan
from fuzz.campaign.progress import Finding, Progress
from fuzz.campaign.shrinker import Shrinker, take_shrunk, without_repeat
from fuzz.campaign.smallest_case import Shrunk
from fuzz.cases.plain import PLAIN

TARGET = "wrong_targets:wobbles"


def failed(check: str = "accuracy", detail: str = "") -> Result:
    checks = [{"name": check, "passed": False, "errors": {}, "bounds": {}, "detail": detail}]
    return Result(PLAIN, "kernel", "failed", check, {"checks": checks})


def passed() -> Result:
    return Result(PLAIN, "kernel", "passed", "", {"checks": []})


def test_an_intermittent_fault_is_one_finding_with_its_rate(tmp_path):
    done = campaign.run_campaign(Plan(tmp_path / "run", (TARGET,), cases=16, seed=3, jobs=2))
    (finding,) = done.findings.values()
    assert finding.state == findings.INTERMITTENT and finding.folder.name.startswith(
        "wrong_targets_wobbles-intermittent"
    )
    with contextlib.closing(store.open_for_reading(done.plan.out)) as db:
        reasons = {reason for (reason,) in db.execute("SELECT reason FROM results WHERE outcome = 'failed'")}
        assert store.failures_by_finding(db) == {finding.id: finding.count}
    assert len(reasons) > 1 and finding.count > 3  # seen by different checks
    saved = findings.find(finding.folder)[0]
    again, times = saved.finding["repeats"]
    assert 0 <= again < times == RATE_OF and saved.finding["state"] == "intermittent"
    status, printed = call("replay", finding.folder, "--repeat", 30)
    (count,) = re.findall(r"failed (\d+) of 30 times", printed)
    assert 0 < int(count) < 30 and status == 1
    status, printed = call("replay", finding.folder)
    assert f"of {RATE_OF} times" in printed and status == 1
    status, printed = call("report", done.plan.out)
    assert f"it failed {again} of\n  {RATE_OF} times" in (done.plan.out / "report.html").read_text()


def test_a_failure_that_repeats_is_judged_again_once_for_its_kind(monkeypatch):
    monkeypatch.setattr(intermittent, "REPEATING", set())
    assert [*intermittent.repeat(failed(), REPEATS, failed)][-1] == (REPEATS, REPEATS)
    assert [*intermittent.repeat(failed(), REPEATS, failed)] == []
    assert [*intermittent.repeat(failed("heads"), REPEATS, failed)][-1] == (REPEATS, REPEATS)


def test_the_rate_is_that_of_the_repeats(monkeypatch):
    monkeypatch.setattr(intermittent, "MEASURED", set())
    monkeypatch.setattr(intermittent, "REPEATING", set())
    answers = iter([failed(), passed()] * RATE_OF)
    assert [*intermittent.repeat(failed(), REPEATS, lambda: next(answers))][-1] == (RATE_OF // 2, RATE_OF)
    assert not intermittent.REPEATING
    assert [*intermittent.repeat(failed("heads"), REPEATS, lambda: next(answers))][-1] == (1, 2)  # its rate is known
    assert [*intermittent.repeat(failed("harness"), REPEATS, passed)] == []
    assert [*intermittent.repeat(failed(), REPEATS, lambda: Result(PLAIN, "kernel", "skipped"))] == []


def test_what_ended_its_process_once_joins_the_other_intermittent_failures(tmp_path):
    """The worker that judged it was lost, so the shrinker judges it again."""
    died = findings.failures(failed("died", "SIGSEGV: the process was killed"))[0]
    answers = iter([None, died, None, None, died, None, None, None])
    found = without_repeat(died, lambda case, deadline: next(answers), 60.0)
    assert found.failure.repeats == (2, REPEATS) and found.failure.intermittent
    assert without_repeat(died, lambda case, deadline: died, 60.0) is None

    progress = Progress(Plan(tmp_path))
    progress.write_inputs = lambda case, path: path.touch()
    (tmp_path / "findings").mkdir()
    with contextlib.closing(store.create(tmp_path)) as db:
        for id, failure, state in (
            ("first", Failure(PLAIN, "kernel", died.check | {"name": "heads"}, (), repeats=(1, 8)), "intermittent"),
            ("second", died, "shrinking"),
        ):
            folder = tmp_path / "findings" / id
            progress.findings[id] = Finding(id, folder, PLAIN, failure, count=1, state=state)
            (folder).mkdir()
            (folder / "case.json").write_text(json.dumps(PLAIN.to_dict()))
            (folder / "inputs.safetensors").touch()
        store.add_result(db, failed("died", "SIGSEGV: the process was killed"), finding="second")
        shrinker = Shrinker()
        shrinker.done.put((progress.findings["second"], Shrunk(found.failure, REPEATS, False)))
        take_shrunk(progress, db, shrinker)
        assert store.failures_by_finding(db) == {"first": 1}
    assert progress.findings.keys() == {"first"} and progress.findings["first"].count == 2
    assert not (tmp_path / "findings" / "second").exists()
