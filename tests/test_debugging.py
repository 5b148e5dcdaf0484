"""What a finding gives to the author of a kernel: a traceback, settings, a script, and a replay for a debugger."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_campaign import TESTS, call

from fuzz.campaign import findings
from fuzz.campaign.job import Job
from fuzz.campaign.repro import kernel
from fuzz.campaign.worker import judge_job, ready_worker
from fuzz.cases.inputs import TENSORS, make_inputs, save_inputs
from fuzz.cases.plain import PLAIN

ROOT = TESTS.parent

CASES = {
    "plain": PLAIN,
    "packed": replace(PLAIN, seq_lens=(5, 0, 3), heads=2, packed=True, initial_state=None, final_state="bf16"),
    "strided": replace(PLAIN, seq_lens=(3, 4), packed=True, layout="strided", seed=1),
    "fused": replace(PLAIN, seq_lens=(3, 3), heads=2, layout="strided", seed=4),
    "in place": replace(PLAIN, in_place=True),
    "no final state": replace(PLAIN, final_state=None),
}

KERNEL = """
import sys
import torch


def fwd(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None,
        cu_seqlens=None):
    assert "fuzz" not in sys.modules and "flash_kda" not in sys.modules and "oracle" not in sys.modules
    given = {name: x for name, x in locals().items() if isinstance(x, torch.Tensor)}
    torch.save({**given, "scale": scale, "lower_bound": lower_bound, "same": final_state is initial_state}, "given.pt")
    out.fill_(7)
"""


def saved(folder: Path, target: str, case, check: dict | None = None, origin: dict | None = None, **more) -> Path:
    """A finding of the target in `folder`."""
    check = check or {"name": "accuracy", "passed": False, "errors": {}, "bounds": {}, "detail": ""}
    failure = findings.Failure(case, target, check, (), **more)
    given = {"environment": {}, "write_inputs": lambda path: save_inputs(path, make_inputs(case)), "origin": origin}
    findings.save(folder, failure, case, **given)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_script_calls_the_kernel_on_the_saved_inputs_without_the_harness(name, tmp_path):
    case = CASES[name]
    (tmp_path / "mykernel.py").write_text(KERNEL)
    folder = saved(tmp_path / "finding", "mykernel:fwd", case)
    script = folder / "repro.py"
    assert case.layout != "contiguous" or len(script.read_text().splitlines()) <= 13
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "7." in done.stdout
    given, inputs = torch.load(tmp_path / "given.pt"), make_inputs(case)
    for tensor in TENSORS:
        expected = getattr(inputs, tensor)
        assert (expected is None) == (tensor not in given)
        if expected is not None:
            assert torch.equal(given[tensor], expected) or (tensor == "initial_state" and case.in_place)
            assert given[tensor].stride() == expected.stride()
            assert given[tensor].storage_offset() == expected.storage_offset()
    if name == "fused":
        assert given["q"].untyped_storage().data_ptr() == given["v"].untyped_storage().data_ptr()
    assert (given["scale"], given["lower_bound"]) == (case.scale, case.lower_bound)
    assert ("final_state" in given) == (case.final_state is not None)
    if case.final_state is not None:
        assert given["final_state"].dtype == inputs.final_state_dtype
        assert given["same"] == case.in_place


@pytest.mark.parametrize("target", ["flash_kda", "model", "fla.naive", "wrong_targets:gives_nan"])
def test_a_script_runs_for_targets_of_every_kind(target, tmp_path):
    script = saved(tmp_path / "finding", target, PLAIN) / "repro.py"
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(TESTS)]))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "tensor(" in done.stdout and "nan" not in done.stdout, done.stderr


def test_what_raised_has_its_traceback_and_the_settings_of_the_process(tmp_path):
    """Also where the settings are those of a check, such as another default dtype."""
    with ready_worker(("wrong_targets:needs_fp32",), time_limit=60.0, threads=1) as worker:
        (result,) = judge_job(worker, Job(PLAIN, worker.targets, ("determinism",)))
    (failure,) = findings.failures(result)
    folder = tmp_path / "finding"
    findings.save(
        folder, failure, PLAIN, environment={}, write_inputs=lambda path: save_inputs(path, make_inputs(PLAIN))
    )
    finding = json.loads((folder / "finding.json").read_text())
    assert finding["traceback"][0].startswith("Traceback") and "needs_fp32" in "".join(finding["traceback"])
    assert not any("worker_process" in line for line in finding["traceback"])
    assert finding["settings"]["default dtype"] == "torch.bfloat16"
    assert finding["settings"]["threads"] == 1
    again = findings.load_failure(findings.load_finding(folder))
    assert again.context == failure.context
    status, printed = call("replay", folder)
    assert status == 1 and "Traceback" in printed and "the default dtype has to be fp32" in printed


def test_a_replay_shows_what_the_references_of_the_campaign_make_of_a_failure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doubles.py").write_text(
        "import flash_kda\n\n\ndef fwd(*a, **k):\n    flash_kda.fwd(*a, **k)\n    a[6].mul_(2)\n"
    )
    monkeypatch.syspath_prepend(TESTS)
    call(
        "run",
        "--target",
        "doubles.py:fwd",
        "--reference",
        "model",
        "--reference",
        "wrong_targets:writes_zeros",
        "--cases",
        4,
        "--jobs",
        1,
        "--seed",
        1,
    )
    folders = {each.name.partition("-")[0]: each for each in (tmp_path / "runs").glob("*/findings/*-accuracy-*")}
    wrong, of_reference = folders["doubles.py_fwd"], folders["wrong_targets_writes_zeros"]
    status, printed = call("replay", wrong)
    assert status == 1 and f"target doubles.py:fwd: {tmp_path / 'doubles.py'}" in printed
    assert "beside: model ok" in printed and "beside: wrong_targets:writes_zeros failed, " in printed
    status, printed = call("replay", wrong, of_reference)
    assert status == 1 and "1 failed of references" in printed
    (tmp_path / "doubles.py").write_text("from flash_kda import fwd\n")
    status, printed = call("replay", wrong)
    assert status == 0 and "beside" not in printed
    monkeypatch.chdir(TESTS)  # where no such file is
    status, printed = call("minimize", wrong, "--budget", "1s")
    assert status == 0 and str(tmp_path / "doubles.py") in printed and "does not fail" in printed


def test_a_kernel_is_found_in_the_folder_of_its_campaign(tmp_path, monkeypatch):
    """Where the present folder has none: a finding is looked at from anywhere."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "kernel_there.py").write_text("from flash_kda import fwd\n")
    origin = {"folder": str(tmp_path / "there"), "file": str(tmp_path / "there" / "kernel_there.py")}
    folder = saved(tmp_path / "finding", "kernel_there:fwd", PLAIN, origin=origin)
    monkeypatch.chdir(tmp_path)
    status, printed = call("replay", folder)
    assert status == 0 and f"(by way of {origin['file']})" in printed
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, folder / "repro.py"], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["mykernel:fwd,heads=no,operands=fp32", "fla.naive", "a/file.py:fwd,chunk=none"])
def test_a_script_knows_targets_with_promises(name):
    compile(kernel(name), "repro.py", "exec")
    assert "=no" not in kernel(name) and "=none" not in kernel(name)


def test_a_finding_is_small(tmp_path):
    error_map = {"of": "out", "sequence": 0, "head": 0, "values": [[0.1234567] * 128] * 128}
    folder = saved(
        tmp_path / "finding", "kernel:fwd", replace(PLAIN, seq_lens=(3,) * 300, packed=True), error_map=error_map
    )
    lines = {path.name: len(path.read_text().splitlines()) for path in folder.glob("*.*[jy]*")}
    assert lines.keys() >= {"finding.json", "case.json", "error_map.json", "repro.py"} and max(lines.values()) <= 40
    assert (folder / "finding.json").stat().st_size < 4000
    assert findings.load_failure(findings.load_finding(folder)).error_map == error_map
    old = json.loads((folder / "finding.json").read_text()) | {"error_map": {"of": "state"}}
    (folder / "error_map.json").unlink()
    (folder / "finding.json").write_text(json.dumps(old))
    assert findings.load_failure(findings.load_finding(folder)).error_map == {"of": "state"}  # where it was before


def test_replay_in_this_process_shows_prints_and_stops_at_a_breakpoint(tmp_path):
    folder = saved(tmp_path / "finding", "wrong_targets:talks", PLAIN)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(TESTS)]))
    command = [sys.executable, "-m", "fuzz", "replay", folder]

    def run(*options: str, typed: str = "") -> subprocess.CompletedProcess:
        return subprocess.run([*command, *options], env=environment, input=typed, capture_output=True, text=True)

    here = run("--in-process", typed="p q.shape\np 'typed ' + 'here'\nc\n" + "c\n" * 20)
    assert here.returncode == 0 and "the target speaks" in here.stdout and "typed here" in here.stdout, here.stderr
    left = run("--in-process", typed="q\n")
    assert left.returncode == 2 and "raised" not in left.stdout
    in_worker = run()
    assert in_worker.returncode == 0 and "the target speaks" not in in_worker.stdout  # and no breakpoint
