"""Tests of the tests: a finding survives its writer, and is replayed exactly, elsewhere and later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import killed_writer
import pytest

from fuzz.campaign import findings
from fuzz.campaign.findings import Failure
from fuzz.cases.inputs import load_inputs, make_inputs, save_inputs
from fuzz.judging.judge import judge
from fuzz.judging.sensitivity import reference
from fuzz.targets.registry import load_target

TESTS = Path(__file__).parent


def python(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """A new process that finds the project, the tests and what PYTHONPATH adds."""
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(TESTS), str(TESTS.parent)]))
    given = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path, **environment)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=240)


# ------------------------------------------------------------------------------------------------------------- kill -9


@pytest.fixture(scope="module")
def kills(tmp_path_factory) -> tuple[list[dict], Path]:
    """What each kill left behind, and a folder of findings that were there after one."""
    folder = tmp_path_factory.mktemp("kills") / "run"
    done = python(TESTS / "killed_writer.py", folder)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], folder / "survivors"


def test_a_finding_is_there_whole_or_not_at_all_whenever_its_writer_is_killed(kills):
    results, _ = kills
    wrong = [result for result in results if result["after"] not in ("nothing", "first", "second")]
    assert not wrong, wrong[:5]
    after = {name: Counter(r["after"] for r in results if r["before"] == name) for name in ("nothing", "first")}
    # A new finding is there from some moment on; one that is replaced is never missing.
    assert set(after["nothing"]) == {"nothing", "first"} and set(after["first"]) == {"first", "second"}
    for before, later in (("nothing", "first"), ("first", "second")):
        order = [result["after"] for result in results if result["before"] == before]
        assert order == sorted(order, key=later.__eq__), "what was there once was not there after a later kill"
        assert order[-1] == later and len(order) > 80


def test_kills_at_random_moments_lose_nothing(kills):
    results, _ = kills
    random = Counter(result["after"] for result in results if result["moment"] == "random")
    assert set(random) == {"first", "second"} and random.total() >= 50


def test_what_survived_a_kill_fails_again_under_replay(kills):
    _, survivors = kills
    names = {path.name for path in survivors.iterdir()}
    assert names == {"nothing-first", "first-first", "first-second", "either-first", "either-second"}
    done = python("-m", "fuzz", "replay", survivors)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{len(names)} replayed, {len(names)} failed" in done.stdout


# -------------------------------------------------------------------------------------------------------- exact replay

RECORDING = """
import hashlib, json, os
import torch
import wrong_targets

def fwd(*args, **kwargs):
    given = wrong_targets.arguments(args, kwargs)
    digest = hashlib.sha256()
    for name, x in given.items():
        if isinstance(x, torch.Tensor) and name not in ("out", "final_state"):
            place = f"{x.dtype} {tuple(x.shape)} {x.stride()} {x.storage_offset()}"
            digest.update(f"{name} {place}".encode() + x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif not isinstance(x, torch.Tensor):
            digest.update(f"{name} {x!r}".encode())
    with open(os.environ["RECORD"], "a") as file:
        print(digest.hexdigest(), file=file)
    wrong_targets.last_row_dropped(*args, **kwargs)
"""

# What a later version may have done to the generator: other noise, other families, another version of the form.
LATER = """
import numpy as np
import fuzz.cases.case, fuzz.cases.families, fuzz.cases.noise
normal = fuzz.cases.noise.Noise.normal
fuzz.cases.noise.Noise.normal = lambda *args: np.float32(3) * normal(*args)
for families in fuzz.cases.families.FAMILIES:
    fuzz.cases.families.FAMILIES[families] = ("of another kind",)
fuzz.cases.families.KEYS.clear()
fuzz.cases.case.CASE_VERSION += 1
"""

PATCHED = """
import sys
import later
from fuzz.__main__ import main
sys.exit(main(["replay", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A strided finding of a target that writes down what it is given, saved by this process."""
    folder = tmp_path_factory.mktemp("replay")
    (folder / "recording.py").write_text(RECORDING)
    (folder / "later.py").write_text(LATER)
    (folder / "recording_later.py").write_text("import later\nfrom recording import fwd\n")
    (folder / "patched.py").write_text(PATCHED)
    record = folder / "record"
    case = replace(killed_writer.a_case(9), layout="strided", initial_state="bf16", final_state="fp32", seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("RECORD", str(record))
        target = load_target("recording:fwd")
        given = make_inputs(case)
        verdict = judge(target, case, given, reference(given, "cpu"), ())
    (check,) = (each for each in verdict.to_dict()["checks"] if each["name"] == "accuracy")
    assert not check["passed"]
    finding = folder / "finding"
    failure = Failure(case, "recording:fwd", check, ())
    findings.save(finding, failure, case, environment={}, write_inputs=lambda path: save_inputs(path, given))
    return folder, finding, record, check


def replayed(recorded, *command: object) -> tuple[str, str, int]:
    """What the target was given in a new process, what was printed, and the exit status."""
    folder, finding, _, _ = recorded
    again = folder / "again"
    again.unlink(missing_ok=True)
    done = python(*command, finding, PYTHONPATH=str(folder), RECORD=str(again))
    assert again.exists(), done.stderr
    return again.read_text(), done.stdout, done.returncode


def test_replay_in_new_processes_gives_the_target_the_same_bits_in_the_same_places(recorded):
    _, _, record, check = recorded
    first = replayed(recorded, "-m", "fuzz", "replay")
    assert first == replayed(recorded, "-m", "fuzz", "replay")
    given, printed, status = first
    assert status == 1 and given == record.read_text()
    for name, error in check["errors"].items():
        assert name.endswith("element") or f"{name} {error:.2g}" in printed


def test_replay_after_the_generator_has_changed_uses_the_saved_inputs(recorded):
    """The generator is another one both in the command and in the worker; it would make other inputs, or none."""
    folder, finding, record, _ = recorded
    given, printed, status = replayed(recorded, folder / "patched.py", "--target", "recording_later:fwd")
    assert status == 1 and given == record.read_text() and "accuracy: " in printed
    bare = python(folder / "patched.py", finding / "case.json", PYTHONPATH=str(folder), RECORD=str(folder / "none"))
    assert bare.returncode == 2 and "version: expected 2, got 1" in bare.stderr


def test_saved_inputs_that_were_damaged_are_refused_and_not_replaced_by_new_ones(recorded, tmp_path):
    """One flipped bit would be another case that passes or fails for reasons of its own."""
    _, finding, _, _ = recorded
    path = finding / "inputs.safetensors"
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match="digest"):
            load_inputs(path)
        done = python("-m", "fuzz", "replay", finding, PYTHONPATH=str(finding.parent), RECORD=str(tmp_path / "none"))
        assert done.returncode == 2 and "harness: ValueError" in done.stdout and not (tmp_path / "none").exists()
    finally:
        path.write_bytes(whole)
