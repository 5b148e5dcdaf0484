"""The command line refuses what makes no sense: one line on stderr, exit status 2, nothing written over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.__main__ import main
from fuzz.commands.options import seconds

CASE = {
    "version": 1,
    "seq_lens": [3],
    "heads": 1,
    "packed": False,
    "cu_seqlens_dtype": "int32",
    "lower_bound": -1.0,
    "scale": 1.0,
    "initial_state": None,
    "final_state": None,
    "in_place": False,
    "layout": "contiguous",
    "queries": "random",
    "keys": "random",
    "values": "random",
    "gates": "centred",
    "betas": "random",
    "states": "random",
    "seed": 1,
}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Calls the command line in an empty folder; checks that it is refused in one line and gives that line."""
    monkeypatch.chdir(tmp_path)

    def check(*arguments: object) -> str:
        before = contents(tmp_path)
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.endswith("\n") and error.count("\n") == 1, error
        assert error.startswith("python -m fuzz: ")
        assert contents(tmp_path) == before
        return error

    return check


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0s"], "--budget: expected a time greater than 0"),
        (["--budget=-1"], "--budget: expected "),
        (["--budget", "abc"], "--budget: expected "),
        (["--budget", "5 minutes"], "--budget: expected "),
        (["--budget", "inf"], "--budget: expected "),
        (["--cases", "0"], "--cases: expected 1 or more"),
        (["--cases", "-3"], "--cases: expected "),
        (["--cases", "abc"], "'--cases'"),
        (["--cases", "5", "--budget", "5s"], "--budget and --cases: expected one of them, got both"),
        (["--jobs", "0"], "--jobs: expected 1 to "),
        (["--jobs", "99999"], "--jobs: expected 1 to "),
        (["--seed", "-1"], "--seed: expected "),
        (["--profile", "huge"], "--profile: expected one of cpu, gpu, long, got huge"),
        (["--time-limit", "0"], "--time-limit: expected "),
        (["--engine", "steam"], "--engine: expected one of local, ray, got steam"),
        (["--resume", "nowhere"], "nowhere: expected the run folder of a campaign"),
        (
            ["--resume", "nowhere", "--seed", "3"],
            "--budget, --cases and --jobs, got --seed",
        ),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_options_that_make_no_sense(arguments, message, refused):
    assert message in refused("run", *arguments)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nonsense", "expected flash_kda, model"),
        ("no_such_module:fwd", "cannot import no_such_module"),
        ("wrong_targets:wrong_names", "cannot be called as fwd is"),
    ],
)
def test_targets_that_cannot_be_had(target, message, refused):
    error = refused("run", "--target", target, "--cases", 1, "--jobs", 1, "--out", "run")
    assert f"target {target!r}: " in error and message in error
    assert not Path("run").exists()


@pytest.mark.parametrize("name", ["campaign.sqlite", "report.html", "findings/one/finding.json"])
def test_a_folder_that_holds_a_campaign(name, refused, tmp_path):
    held = tmp_path / "run" / name
    held.parent.mkdir(parents=True)
    held.write_text("what somebody found")
    assert "expected a folder without results" in refused("run", "--cases", 1, "--out", "run")


def test_a_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "got file/run: Not a directory" in refused("run", "--cases", 1, "--out", "file/run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to any folder")
def test_a_folder_without_permission(refused, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "got locked/run: Permission denied" in refused("run", "--cases", 1, "--out", "locked/run")


@pytest.mark.parametrize("command", ["replay", "minimize"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a file or a folder, got none"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"{", "expected JSON"),
        (b"[1, 2]", "got a JSON list"),
        (b'{"name": "package", "version": "1.0"}', "case: "),
        (json.dumps(CASE | {"heads": 0}).encode(), "heads: expected an integer, at least 1, got 0"),
        (json.dumps({"why": "an edge", "case": CASE | {"surprise": 1}}).encode(), ", got surprise"),
    ],
)
def test_files_that_are_no_cases(command, content, message, refused, tmp_path):
    if content is not None:
        (tmp_path / "case.json").write_bytes(content)
    assert message.lower() in refused(command, "case.json").lower()


def test_findings_that_are_not_whole(refused, tmp_path):
    folder = tmp_path / "finding"
    folder.mkdir()
    assert "expected a finding or a case file" in refused("replay", folder)
    (folder / "finding.json").write_text(json.dumps({"version": 1}))
    assert "expected a finding of version 1, got one without target" in refused("replay", folder)
    (folder / "finding.json").write_text(json.dumps({"version": 1, "target": "x", "check": "y", "properties": []}))
    assert "inputs.safetensors: expected the inputs" in refused("replay", folder)


def test_a_report_of_no_campaign(refused):
    assert "expected the run folder of a campaign" in refused("report", "nowhere")


def test_replay_of_a_case_file(tmp_path, capsys):
    (tmp_path / "one.json").write_text(json.dumps(CASE))
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "two.json").write_text(
        json.dumps({"why": "a longer one", "case": CASE | {"seq_lens": [17]}})
    )
    assert main(["replay", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "2 replayed, 0 failed" in printed
    assert f"ok       {tmp_path / 'one.json'}  flash_kda  out " in printed
    assert main(["replay", str(tmp_path / "one.json"), "--target", "wrong_targets:gives_nan"]) == 0  # one head only


def test_what_judges_nothing_is_no_success(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "large.json").write_text(json.dumps(CASE | {"seq_lens": [10**5]}))
    assert main(["replay", "large.json", "--target", "fla.naive"]) == 2
    assert "\nskipped  large.json" in capsys.readouterr().out


def test_an_interrupt_is_one_line_and_no_verdict(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.json").write_text(json.dumps(CASE))

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("fuzz.campaign.replay.replay", interrupted)
    assert main(["replay", "one.json"]) == 2
    assert capsys.readouterr().err == "python -m fuzz: interrupted\n"


def test_a_run_folder_is_no_finding(refused, tmp_path):
    (tmp_path / "run").mkdir()
    assert "run: expected a finding's folder or a case file" in refused("minimize", "run")


def test_earlier_findings_that_are_not_there_cost_no_folder(refused):
    assert "--previous: expected a run folder or a finding, got nowhere" in refused(
        "run", "--previous", "nowhere", "--out", "run"
    )
    assert not Path("run").exists()


def test_times():
    assert [seconds("--budget", text) for text in ("60", "60s", "5m", "2h", "0.5s")] == [60, 60, 300, 7200, 0.5]


def test_without_arguments_the_help_names_every_subcommand(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    commands = ("run", "replay", "minimize", "report", "conform", "self-check", "mutants", "targets")
    for name in commands:
        line = next(line for line in shown.splitlines() if line.startswith(f"  {name} "))
        assert len(line.split()) > 3 and "..." not in line, line
    assert shown.partition("Commands:")[2].count("\n") == len(commands) + 1


@pytest.mark.parametrize(
    "module",
    [
        "benchmarks",
        "benchmarks.accuracy",
        *(f"benchmarks.analysis.{name}" for name in ("bounds", "numerics", "conformance")),
    ],
)
def test_every_measurement_says_what_it_does(module):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"usage: python -m {module}" in done.stdout and "--out" in done.stdout
