"""`ci/hopper.sh` with a stub in the place of Python, and the cases of `ci/sanitize.py` without a GPU."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "ci" / "hopper.sh"
STAGES = ("install", "tests", "sanitizer", "campaign", "long", "benchmark", "accuracy", "report")

# Notes what it is asked to do, makes the environment that install.py would make, fails and waits where told.
STUB = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
[[ $1 != ci/install.py ]] || { mkdir -p "$2/bin" && cp "$0" "$2/bin/python"; }
[[ -z ${WAIT:-} || "$*" != *"$WAIT"* ]] || { trap 'sleep 0.2; echo "came to its end"; exit 1' INT; sleep 2; }
[[ -z ${FAIL:-} || "$*" != *"$FAIL"* ]] || { echo "told to fail"; exit 3; }
"""


@pytest.fixture
def hopper(tmp_path: Path):
    """Runs the script with the stub: (exit status, output, calls, {stage: how it ended})."""
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(*arguments: str, **variables: str):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = {
            **os.environ,
            "PYTHON": str(stub),
            "VENV": str(tmp_path / "venv"),
            "CALLS": str(calls),
            **variables,
        }
        command = ["bash", str(SCRIPT), "--out", str(tmp_path / "out"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines(), endings(done.stdout)

    return run


def endings(output: str) -> dict[str, str]:
    """The closing table."""
    lines = output.partition("== summary\n")[2].splitlines()
    return {line.split()[0]: line.split(" s  ")[1] for line in lines if " s  " in line}


def test_every_stage_runs_in_its_order_and_passes(hopper, tmp_path):
    status, _, calls, ended = hopper("--budget", "90s", "--long", "2m")
    assert status == 0 and ended == dict.fromkeys(STAGES, "passed")
    run = [call for call in calls if "pip" not in call]  # the sanitizer is fetched only where there is none
    starts = ["ci/install.py", "-m pytest -n auto", "ci/sanitize.py", "-m fuzz run", "-m fuzz run",
              "-m benchmarks --cases all", "-m benchmarks.accuracy", "-m fuzz report"]  # fmt: skip
    assert [call.startswith(start) for call, start in zip(run, starts, strict=True)] == [True] * len(STAGES)
    assert "--profile gpu --budget 90s" in run[3] and "--profile long --budget 2m" in run[4]
    assert {path.name for path in (tmp_path / "out" / "logs").iterdir()} >= {f"{stage}.log" for stage in STAGES}


@pytest.mark.parametrize(
    ("fails", "stage"),
    [
        ("pytest -n", "tests"),
        ("sanitize", "sanitizer"),
        ("profile gpu", "campaign"),
        ("profile long", "long"),
        ("benchmarks --", "benchmark"),
    ],
)
def test_a_failing_stage_fails_the_job_and_the_others_run(hopper, tmp_path, fails, stage):
    status, _, calls, ended = hopper(FAIL=fails)
    assert status == 1
    assert ended == dict.fromkeys(STAGES, "passed") | {stage: "failed (exit status 3)"}
    assert "told to fail" in (tmp_path / "out" / "logs" / f"{stage}.log").read_text()
    assert calls[-1].startswith("-m fuzz report")


def test_without_an_installation_nothing_else_runs(hopper):
    status, _, calls, ended = hopper(FAIL="install.py")
    assert status == 1 and len(calls) == 1
    assert [ended[stage] for stage in STAGES[1:]] == ["not run: no installation"] * 7


def test_stages_are_skipped_or_chosen(hopper):
    status, _, calls, ended = hopper("--skip", "install", "--skip", "campaign")
    assert status == 0 and ended["install"] == ended["campaign"] == "skipped" and len(calls) == 5
    assert ended["report"] == "not run: no campaign"
    status, _, calls, ended = hopper("--only", "benchmark", BENCHMARK_CASES="six")
    assert status == 0 and len(calls) == 1 and "--cases six" in calls[0]
    assert [stage for stage in STAGES if ended[stage] == "passed"] == ["benchmark"]


def test_a_dry_run_says_what_it_would_do_and_does_nothing(hopper, tmp_path):
    status, output, calls, _ = hopper("--dry-run")
    assert status == 0 and not calls and not (tmp_path / "out").exists()
    for part in ("ci/install.py", "pytest -n auto", "ci/sanitize.py", "fuzz run", "benchmarks.accuracy", "fuzz report"):
        assert f"{part}" in output


def test_a_campaign_that_was_begun_is_resumed(hopper, tmp_path):
    (tmp_path / "out" / "campaign").mkdir(parents=True)
    (tmp_path / "out" / "campaign" / "campaign.sqlite").touch()
    status, _, calls, _ = hopper("--only", "campaign", "--budget", "1h")
    assert status == 0 and calls == [f"-m fuzz run --resume {tmp_path}/out/campaign --budget 1h"]


@pytest.mark.parametrize(
    "arguments", [["--skip", "everything"], ["--budget", "soon"], ["--budget"], ["--fast"], ["--only", ""]]
)
def test_wrong_usage_is_refused(hopper, arguments):
    status, output, calls, _ = hopper(*arguments)
    assert status == 2 and output.startswith("ci/hopper.sh: ") and "expected [--budget TIME]" in output and not calls


@pytest.mark.parametrize("all_of_it", [False, True], ids=["the script", "all of it, as by Ctrl-C"])
def test_an_interruption_leads_to_the_report(tmp_path, hopper, all_of_it: bool):
    stub, calls = tmp_path / "python", tmp_path / "calls"
    environment = {
        **os.environ,
        "PYTHON": str(stub),
        "VENV": str(tmp_path / "venv"),
        "CALLS": str(calls),
        "WAIT": "pytest",
    }
    command = ["bash", str(SCRIPT), "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    log = tmp_path / "out" / "logs" / "tests.log"  # of a process of its own, which may begin after the stage
    while not (calls.exists() and "pytest -n" in calls.read_text() and log.exists()):
        time.sleep(0.02)
    if all_of_it:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 130
    if all_of_it:  # what a stage says at its end is not lost
        assert "came to its end" in log.read_text()
    ended = endings(output)
    assert ended["campaign"] == "not run: interrupted" and ended["report"] == "passed"


def test_the_script_is_clean():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", str(SCRIPT)]).returncode == 0


# The sanitizer pass.


@pytest.fixture(scope="module")
def sanitize() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_sanitize", ROOT / "ci" / "sanitize.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


def test_its_cases_cover_every_form_of_a_call(sanitize):
    from dataclasses import replace

    checked = sanitize.checked_cases()
    cases = [replace(sanitize.plain_case(), **one.changes) for one in checked.values() if not one.wrong]
    states = set(itertools.product((None, "bf16", "fp32"), repeat=2))
    assert {(case.initial_state, case.final_state) for case in cases} == states
    assert {case.cu_seqlens_dtype for case in cases if case.packed} == {"int32", "int64"}
    assert {case.layout for case in cases} == {"contiguous", "strided"}
    assert {case.in_place for case in cases} == {False, True}
    assert any(not case.packed and case.n_seqs > 1 for case in cases)
    assert {0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129} <= {n for case in cases for n in case.seq_lens}
    assert max(case.heads for case in cases) > 132 and max(case.n_seqs for case in cases) > 132  # processors of an H200
    assert any(one.captured for one in checked.values())
    for name in ("offsets", "rows", "checkpoints"):
        some = [one for one in checked.values() if getattr(one, name) is not None]
        numbers = np.concatenate([np.ravel(getattr(one, name)) for one in some if one.wrong])
        assert min(numbers) < -(2**31) and max(numbers) > 2**31 and len(numbers) >= 20
        assert name == "offsets" or any(not one.wrong for one in some)


@pytest.mark.parametrize("name", ["checkpoint_state", "final_state"])
def test_its_cases_see_what_serving_engines_pass(sanitize, monkeypatch, name):
    import flash_kda

    cases = [one for one in sanitize.checked_cases().values() if (one.rows or one.checkpoints) and not one.wrong]
    assert all(sanitize.run_case(one, "cpu") is None for one in cases)
    right = flash_kda.fwd

    def wrong(**arguments):
        right(**arguments)
        if name in arguments:
            arguments[name][1, 0] = 0

    monkeypatch.setattr(flash_kda, "fwd", wrong)
    assert any(str(sanitize.run_case(one, "cpu")).startswith(f"{name} is wrong by") for one in cases)


def test_a_case_is_right_with_the_model_and_wrong_with_a_wrong_kernel(sanitize, monkeypatch):
    import flash_kda

    names = ("one of 17", "state bf16 to fp32", "strided 1", "state in place, fp32", "no tokens")
    cases = {name: sanitize.checked_cases()[name] for name in names}
    monkeypatch.setattr(sanitize, "checked_cases", lambda: cases)
    assert sanitize.main(["--cases", "--device", "cpu"]) == sanitize.SILENT
    right = flash_kda.fwd

    def wrong(**arguments):
        right(**arguments)
        arguments["out"][..., 5].zero_()

    monkeypatch.setattr(flash_kda, "fwd", wrong)
    assert sanitize.run_case(cases["one of 17"], "cpu").startswith("out is wrong by")
    assert sanitize.main(["--cases", "--device", "cpu"]) == sanitize.NOISY


# In the place of compute-sanitizer: racecheck finds something, synccheck breaks off.
SANITIZER = """#!/usr/bin/env bash
[[ "$*" == *"--error-exitcode 9"* && "$*" == *"--cases" && $PYTORCH_NO_CUDA_MEMORY_CACHING == 1 ]] || exit 4
echo "========= COMPUTE-SANITIZER"
[[ $2 != racecheck ]] || { echo "========= Error: Race reported"; exit 9; }
[[ $2 == synccheck ]] || echo "========= ERROR SUMMARY: 0 errors"
"""


def test_a_tool_with_something_to_say_fails_the_pass(sanitize, tmp_path, monkeypatch, capsys):
    stub = tmp_path / "compute-sanitizer"
    stub.write_text(SANITIZER)
    stub.chmod(0o755)
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: str(stub))
    assert sanitize.main(["--logs", str(tmp_path / "logs")]) == sanitize.NOISY
    said = capsys.readouterr().out
    assert said.count("silent (") == 2 and "racecheck: NOT SILENT: exit status 9" in said
    assert "synccheck: NOT SILENT: exit status 0, but its summary is missing" in said
    assert "    ========= Error: Race reported" in said
    assert sanitize.main(["memcheck", "initcheck", "--logs", str(tmp_path / "logs")]) == sanitize.SILENT


def test_without_the_sanitizer_it_says_where_it_comes_from(sanitize, monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert sanitize.main([]) == sanitize.NOT_RUN
    assert "pip install nvidia-cuda-sanitizer-api" in capsys.readouterr().err


def test_a_tool_that_hangs_is_ended(sanitize, tmp_path, monkeypatch, capsys):
    stub = tmp_path / "compute-sanitizer"
    stub.write_text("#!/bin/sh\nexec sleep 60\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sanitize, "TOOL_LIMIT", 0.3)
    began = time.monotonic()
    assert sanitize.run_tools(str(stub), ["memcheck"], tmp_path) == 1
    assert time.monotonic() - began < 20
    assert "memcheck: NOT SILENT: exit status still running after" in capsys.readouterr().out
