"""The checks of what serving engines ask for: silent on what is right, and each finds what is wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

import flash_kda
from fuzz.cases.drawing import draw_cases
from fuzz.cases.inputs import make_inputs
from fuzz.cases.plain import PLAIN
from fuzz.defects.catalogue import CATALOGUE, target
from fuzz.defects.serving import SERVING
from fuzz.judging.call import run_target
from fuzz.judging.checks import CHECKS, applicable
from fuzz.judging.refusals import REFUSALS
from fuzz.judging.verdict import NOT_CHECKED
from fuzz.targets.registry import Target, load_target

NAMES = ("checkpoints", "state_pool", "rows_behind")
BASE = replace(PLAIN, seq_lens=(70, 0, 33), heads=2, packed=True, lower_bound=-0.05)
CASES = [
    *(replace(BASE, seed=seed) for seed in range(5)),
    replace(BASE, seed=5, final_state="bf16"),
    replace(BASE, seed=6, in_place=True),
    replace(BASE, seed=7, seq_lens=(80, 80), packed=False, initial_state=None),
    *(replace(BASE, seed=seed, seq_lens=(112, 0, 80)) for seed in (8, 10)),
]


def checked(judged: Target, name: str, case):
    inputs = make_inputs(case)
    return CHECKS[name](judged, case, inputs, run_target(judged, inputs))


@pytest.mark.parametrize("name", NAMES)
def test_the_operator_passes(name):
    for case in CASES + [case for case in draw_cases("cpu", 5, 12) if applicable(name, case)]:
        check = checked(load_target("flash_kda"), name, case)
        assert check.passed, (case, check.detail)
        assert not check.detail, check.detail


@pytest.mark.parametrize("name", NAMES)
def test_a_target_without_the_arguments_is_not_checked(name):
    def fwd(
        q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None, cu_seqlens=None
    ):
        flash_kda.fwd(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens)

    check = checked(Target("theirs", fwd, "cpu"), name, BASE)
    assert check.passed and check.detail.startswith(f"{NOT_CHECKED}the target takes no ")
    check = REFUSALS["arguments.state_indices-dtype"](Target("theirs", fwd, "cpu"), BASE, make_inputs(BASE))
    assert check.passed and check.detail.startswith(NOT_CHECKED)


@pytest.mark.parametrize("name", list(SERVING))
def test_each_defect_is_found(name):
    """By one of the checks that are expected to, on a few cases."""
    defect = CATALOGUE[name]
    for check in defect.expected:
        cases = CASES if check in NAMES else CASES[:2]
        asked = REFUSALS.values() if check == "arguments" else [CHECKS[check]]
        for case in cases:
            for ask in asked:
                inputs = make_inputs(case)
                if not ask(target(defect), case, inputs, run_target(target(defect), inputs), None).passed:
                    return
    pytest.fail("no check found it")


TARGET = """
from fuzz.defects.catalogue import CATALOGUE
import flash_kda

given = CATALOGUE["pool_cleared"].make() if WRONG else flash_kda.fwd

def fwd(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None, cu_seqlens=None, *,
    state_indices=None
):
    given(
        q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens,
        state_indices=state_indices
    )
"""


def test_a_saved_finding_replays_with_what_serving_engines_pass(tmp_path):
    """The pool and its indices follow from the case."""

    def fuzz(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "fuzz", *words], cwd=tmp_path, capture_output=True, text=True)

    target = tmp_path / "pools.py"
    target.write_text(f"WRONG = True\n{TARGET}")
    run = fuzz("run", "--target", "pools.py:fwd", "--cases", "60", "--seed", "1", "--jobs", "1", "--out", "run")
    (found,) = (tmp_path / "run" / "findings").iterdir()
    assert run.returncode == 1 and "pools.py:fwd state_pool: the pool, rows" in run.stdout
    again = fuzz("replay", str(found))
    assert again.returncode == 1 and "state_pool: the pool, rows" in again.stdout
    target.write_text(f"WRONG = False\n{TARGET}")
    assert fuzz("replay", str(found)).returncode == 0
