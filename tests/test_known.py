"""The verdict follows the targets under test; known failures and references stand apart, in every command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_debugging import saved

from fuzz.__main__ import main
from fuzz.campaign.campaign import previous_findings
from fuzz.campaign.findings import Failure
from fuzz.campaign.known import KnownError, names_of, read
from fuzz.campaign.plan import Plan
from fuzz.campaign.progress import Progress, Tally
from fuzz.cases.plain import PLAIN

TOO_LONG = {"name": "raised", "passed": False, "errors": {}, "bounds": {}, "detail": "RuntimeError: too long"}


def failure(target="mine:fwd", check=TOO_LONG, **changes) -> Failure:
    return Failure(replace(PLAIN, **changes), target, check, ())


@pytest.fixture
def known(tmp_path):
    def write(text: str):
        path = tmp_path / "known.txt"
        path.write_text(text)
        return read(path)

    return write


def why(found, one: Failure) -> str:
    return found.reason(one.target, names_of(one), one.case)


def test_a_line_is_a_target_a_check_and_a_reason(known):
    found = known("# a comment\n\nmine:fwd  raised   no more than 9 tokens, see issue 3\n")
    assert why(found, failure()) == "no more than 9 tokens, see issue 3"
    assert why(found, failure("other:fwd")) == ""
    assert why(found, failure(check={**TOO_LONG, "name": "died"})) == ""
    assert why(read(None), failure()) == ""


def test_a_line_may_be_about_a_class_of_errors_and_about_some_cases_alone(known):
    found = known("mine:* raised:RuntimeError keys=equal packed=True reason = text\nmine:fwd raised:KeyError other\n")
    assert why(found, failure(keys="equal", packed=True)) == "reason = text"
    assert why(found, failure(keys="equal")) == why(found, failure()) == ""
    assert why(found, failure(check={**TOO_LONG, "detail": "KeyError: 3"})) == "other"
    once = replace(failure(), repeats=(1, 8))
    assert why(known("mine:fwd intermittent a race\n"), once) == "a race"


def test_what_did_not_fail_is_reported(known):
    found = known("mine:fwd raised a\nmine:fwd heads keys=equal b\nother:fwd heads c\nmine:fwd edges/* d\n")
    why(found, failure())
    (line,) = found.gone({"mine:fwd"})
    assert line.endswith(":2: mine:fwd heads keys=equal: did not fail; if it cannot any more, remove it")
    _, line = found.gone({"mine:fwd"}, rungs=("edges", "shapes"))
    assert ":4: mine:fwd edges/*: did not fail" in line
    assert list(found.gone({"mine:fwd"}, rungs=("edges",), alone=True)) == [line]
    assert not list(found.gone({"mine:fwd"}, rungs=("shapes",), alone=True))


def test_promises_of_the_command_line_are_no_part_of_the_name(known):
    """Declaring one more promise must not make every known failure unknown."""
    found = known("mine:fwd raised a\nmine:fwd heads b\n")
    assert why(found, failure("mine:fwd,chunk=none,operands=fp32")) == "a"
    assert why(found, failure("mine:fwd.other")) == ""
    (line,) = found.gone({"mine:fwd,chunk=none"})
    assert ":2: mine:fwd heads: did not fail" in line


def test_earlier_findings_are_judged_with_the_promises_of_now(tmp_path):
    """Also those of a target that runs in fp32 here and did not there."""
    for name in ("mine:fwd", "fla.chunk", "other:fwd"):
        saved(tmp_path / name, name, PLAIN)
    progress = Progress(Plan(tmp_path / "run", previous=(tmp_path,)))
    progress.tallies = {"mine:fwd,chunk=none": Tally(), "fla.chunk.fp32": Tally()}
    found = {one.path.name: one.finding["target"] for one in previous_findings(progress)}
    assert found == {"mine:fwd": "mine:fwd,chunk=none", "fla.chunk": "fla.chunk.fp32"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine:fwd\n", r"known.txt:1: expected TARGET CHECK \[FIELD=VALUE\]... REASON, got 'mine:fwd'"),
        ("# x\nmine:fwd raised\n", "known.txt:2: expected TARGET CHECK"),
        ("mine:fwd raised keys=equal\n", "known.txt:1: expected TARGET CHECK"),
        ("mine:fwd * everything\n", "known.txt:1: expected the name of a check, got '\\*'"),
        ("mine:fwd accuracy kes=equal a typo", r"known.txt:1: expected a field of a case among .*, got 'kes'"),
        ("mine:fwd accuracy keys=eqal a typo", r"known.txt:1: keys: expected one of .*equal.*, got 'eqal'"),
    ],
)
def test_lines_that_make_no_sense(text, message, known):
    with pytest.raises(KnownError, match=message):
        known(text)


def test_a_file_that_is_not_there_ends_the_command_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--known", "absent.txt"]) == 2
    assert (
        capsys.readouterr().err
        == "python -m fuzz: --known: expected a text file, got absent.txt: No such file or directory\n"
    )
    assert not (tmp_path / "runs").exists()


def test_targets_under_test_and_references_are_kept_for_a_resumption(tmp_path):
    plan = Plan(tmp_path, targets=("mine:fwd",), references=("model",), known=Path("known.txt"), cases=1)
    assert plan.tested == ("mine:fwd",) and not plan.whatever_can_run
    assert Plan(tmp_path).tested == ("flash_kda",) and Plan(tmp_path).whatever_can_run
    assert Plan(tmp_path, references=("model",)).tested == ("flash_kda",)
    assert json.loads(json.dumps(plan.to_dict()))["known"] == "known.txt"


def run(tmp_path, capsys, *arguments: str) -> tuple[int, str, str]:
    """The exit status of a short campaign, what it printed, and its report."""
    out = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
    status = main(["run", *arguments, "--cases", "6", "--jobs", "1", "--seed", "1", "--out", str(out)])
    return status, capsys.readouterr().out, (out / "report.html").read_text()


def test_the_verdict_follows_the_targets_under_test(tmp_path, monkeypatch, capsys):
    """Measured on hardware: the findings of peers made every run red."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    zeros = "wrong_targets:writes_zeros"
    status, printed, page = run(tmp_path, capsys, "--target", "flash_kda:fwd", "--reference", zeros)
    assert status == 0 and "finding of a reference: wrong_targets:writes_zeros" in printed
    assert " 0 findings, " in printed and " of references" in printed and "Nothing disagreed" in page
    assert "findings of their own, which do not count here" in page
    assert f"target {zeros}: {Path(__file__).with_name('wrong_targets.py')}; a reference" in printed
    folder = next(tmp_path.glob("run0/findings/*"))

    status, printed, page = run(tmp_path, capsys, "--target", zeros)
    assert status == 1 and "\nfinding: wrong_targets:writes_zeros" in printed and "Nothing disagreed" not in page

    known = tmp_path / "known.txt"
    checks = ("gate_off", "beta_off", "conti*", "key_*", "gain*", "written")
    checks += ("rows_behind", "state_pool", "checkpoints", "arguments")
    lines = [f"{zeros} accuracy it writes zeros", *(f"{zeros} {check} the same" for check in checks)]
    known.write_text("\n".join(lines))
    status, printed, page = run(tmp_path, capsys, "--target", zeros, "--known", str(known))
    assert status == 0 and "known failure (it writes zeros): wrong_targets:writes_zeros accuracy" in printed
    assert "known.txt:7: wrong_targets:writes_zeros written: did not fail" in printed
    assert "Nothing disagreed" in page and "failures were known" in page and "(known: it writes zeros)" in page

    assert main(["replay", str(folder)]) == 1
    assert f"target {zeros}: " in capsys.readouterr().out
    assert main(["replay", str(folder), "--known", str(known)]) == 0
    printed = capsys.readouterr().out
    assert "known    " in printed and "written: did not fail" in printed
