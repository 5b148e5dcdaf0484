"""The catalogue of planted defects is complete, each defect does something, and the self-check counts right."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from judged_targets import a_case

from flash_kda import model
from fuzz.campaign.job import Result
from fuzz.cases.inputs import make_inputs
from fuzz.defects import device
from fuzz.defects.catalogue import CATALOGUE, spec, target
from fuzz.defects.defect import KINDS
from fuzz.defects.noise import NOISE
from fuzz.judging.call import bits, run_target
from fuzz.judging.checks import CHECKS
from fuzz.judging.judge import judge
from fuzz.judging.properties import LEGAL
from fuzz.judging.refusals import REFUSALS
from fuzz.judging.sensitivity import reference
from fuzz.self_check.record import Hunt, Record, SelfCheckError, load, save, sources
from fuzz.self_check.report import figures, in_words, page_of, passed
from fuzz.self_check.run import NOISE_FAMILIES, smallest
from fuzz.targets.registry import load_target

ROOT = Path(__file__).resolve().parent.parent
ALL = [*CATALOGUE.values(), *device.DEVICE.values()]
OF_THE_JUDGE = {"gain", "accuracy", "written", "inputs_untouched", "outputs_within"}
OF_THE_WORKER = {"timeout", "died", "raised"}


pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------------- the catalogue


def known_failures() -> list[str]:
    """The first column of the table in docs/operator.md."""
    page = (ROOT / "docs" / "operator.md").read_text()
    table = page[page.index("## Known failures") :]
    return [row.split("|")[1].strip() for row in table.splitlines() if row.startswith("|")][2:]


def test_every_known_failure_has_a_defect():
    failures = known_failures()
    assert len(failures) == 10
    for failure in failures:
        assert [d for d in ALL if d.failure and failure.startswith(d.failure)], failure
    for defect in ALL:
        assert defect.failure is None or any(row.startswith(defect.failure) for row in failures), defect


def test_the_catalogue_is_complete():
    names = [defect.name for defect in (*ALL, *NOISE.values())]
    assert len(names) == len(set(names)) and len(CATALOGUE) >= 40 and len(device.DEVICE.values()) >= 10
    assert {defect.kind for defect in ALL} == set(KINDS)
    for defect in ALL:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", defect.name), defect.name
        assert defect.sentence.endswith("."), defect.sentence
        accepted = OF_THE_JUDGE | set(CHECKS) | (OF_THE_WORKER if defect.kind == "device" else set())
        assert defect.expected and set(defect.expected) <= accepted, defect


def test_each_defect_is_a_target_by_name():
    found = load_target(spec("scale_twice"))
    assert found.name == "fuzz.defects:scale_twice" and found.note == "The scale is applied twice."
    assert load_target(spec("noise_5_out")).device == "cpu"
    with pytest.raises(ValueError, match="expected a function no_such_defect"):
        load_target(spec("no_such_defect"))


RELAY = {"keys": "relay", "gates": "relay", "betas": "plus_infinity", "values": "early"}

# Among them, something for every defect to show: forms, tails, heads, layouts, families, states.
CASES = (
    a_case((70, 64, 0, 21), 3, lower_bound=-4.0, keys="mixed_norms"),
    a_case((150,), 2, packed=False, layout="strided", keys="near_epsilon", gates="exact_bounds", scale=-1.0, seed=4),
    a_case((64,), 1, states="huge"),
    a_case(
        (33,), 2, in_place=True, keys="one_hot", queries="huge", gates="plus_infinity", values="huge", lower_bound=0.0
    ),
    a_case((40,), 1, keys="zero_rows", initial_state="bf16", gates="cancelling", betas="infinite", scale=0.0, seed=2),
    a_case((1,) * 40, 1, keys="mixed_norms", layout="strided", initial_state=None, seed=3),
    a_case((100,), 1, keys="equal", gates="equal", betas="constant_6", initial_state="bf16", final_state="bf16"),
    a_case((70, 70), 2, packed=False, layout="strided", seed=3),
    a_case((9,), 6, gates="signed", betas="faint"),
    a_case((0, 1) * 40, 1),
    a_case((520,), 1, initial_state=None),
    a_case((1030,), 1),
    a_case((600,), 1, gates="equal", betas="near_zero", values="early", keys="one_hot"),
    a_case((200,), 1, **RELAY, seed=5),
    a_case((64,), 1, **RELAY, seed=5),
)


@pytest.fixture(scope="module")
def right():
    """What the model makes of the cases."""
    return [(inputs, run_target(load_target("flash_kda"), inputs)) for inputs in map(make_inputs, CASES)]


CALLS = {"time": 11}  # of one case; what depends on chance or on earlier calls shows in one of them


# Those show in one kind of call only, which a check makes: with bad arguments, other strides, another default dtype,
# NaN in other sequences, or where another call was.
ELSEWHERE = {
    "cu_seqlens_not_checked": "arguments.cu_seqlens-past-the-end",
    "cu_seqlens_checked_once": "arguments.cu_seqlens-later",
    "larger_pool_of_states_accepted": "arguments.initial_state-sequences",
    "default_dtype_for_scratch": "determinism",
    "first_32_offsets_checked": "arguments.cu_seqlens-late",
    "lower_bound_not_checked": "arguments.lower_bound-too-low",
    "in_place_by_the_address": "arguments.final_state-over-its-strides",
    "offsets_of_32_bits": "wide_offsets",
    "batch_offsets_of_32_bits": "wide_offsets",
    "beta_offsets_of_32_bits": "wide_offsets",
    "output_offsets_of_32_bits": "wide_offsets",
    "offsets_kept_by_address": "determinism",
    "tail_times_zero": "packing",
    "stride_of_zero_ignored": "layout",
    "strides_of_out_ignored": "layout",
    **{name: "determinism" for name in CATALOGUE if name.startswith("results_kept_")},
}


@pytest.mark.parametrize(("name", "check"), ELSEWHERE.items())
def test_each_of_the_others_shows_in_the_call_that_a_check_makes(name, check):
    packed = [a_case(lens, 2) for lens in ((5, 9), (30, 2), (1, 2, 3, 4), (70, 8))]  # in memory that differs, too
    batches = [a_case((5, 5), 2, packed=False, seed=seed) for seed in range(24)]  # layouts differ by seed
    cases = [LEGAL] if check in REFUSALS else [*packed, *batches]

    def passes(judged, case) -> bool:
        inputs = make_inputs(case)
        return CHECKS[check](judged, case, inputs, run_target(judged, inputs)).passed

    assert not all(passes(target(CATALOGUE[name]), case) for case in cases)
    assert all(passes(load_target("flash_kda"), case) for case in cases)


# Those of serving show in calls of their own: tests/test_serving_checks.py.
@pytest.mark.parametrize(
    "name", [name for name in CATALOGUE if name not in ELSEWHERE and CATALOGUE[name].kind != "serving"]
)
def test_each_defect_changes_something(name, right):
    """And nothing of the model stays changed."""
    stages = dict(vars(model))
    wrong = target(CATALOGUE[name])
    calls = CALLS.get(CATALOGUE[name].kind, 1)
    assert any(differs(wrong, inputs, outputs) for inputs, outputs in right for _ in range(calls))
    assert vars(model) == stages


def differs(wrong, inputs, outputs) -> bool:
    from fuzz.judging.changed_inputs import dirty_memory

    with dirty_memory(inputs):
        found = run_target(wrong, inputs)
    if found.touched or found.overrun or not same(found.out, outputs.out):
        return True
    return found.final_state is not None and not same(found.final_state, outputs.final_state)


def same(x, y) -> bool:
    return torch.equal(bits(x), bits(y))


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("fp16_neumann_inverse", "accuracy"),
        ("softplus_gate", "accuracy"),
        ("tail_over_next_sequence", "accuracy"),
        ("state_transposed_on_reading", "accuracy"),
        ("depends_on_packing", "batch_form"),
        ("scratch_not_cleared", "determinism"),
    ],
)
def test_found_by_the_check_that_should_within_forty_drawn_cases(name, check):
    from fuzz.cases.drawing import draw_cases
    from fuzz.judging.properties import choose

    wrong = target(CATALOGUE[name])
    for case in draw_cases("cpu", 0, 40):
        inputs = make_inputs(case)
        properties = [each for each in choose(case, 1) if each == check]
        verdict = judge(wrong, case, inputs, reference(inputs, "cpu"), properties)
        if check in {each.name for each in verdict.failed}:
            return
    pytest.fail(f"{name} was not found by {check}")


# ------------------------------------------------------------------------------------------------ defects of the device


@pytest.mark.parametrize("defect", device.DEVICE.values(), ids=lambda defect: defect.name)
def test_each_patch_still_fits_the_sources(defect, tmp_path):
    """Where this fails, the kernel has changed: the patch has to be made anew for it."""
    device.copy_sources(tmp_path)
    before = device.digest(tmp_path)
    for patch in defect.make.patches:
        patch.apply(tmp_path)
    assert device.digest(tmp_path) != before


def test_a_patch_that_no_longer_fits_says_so(tmp_path):
    (tmp_path / "kernel.h").write_text("wait(0); wait(0); fence();")
    with pytest.raises(device.BuildError, match=r"kernel.h: expected 'wait\(0\)' once, got it 2 times"):
        device.Patch("kernel.h", "wait(0)", "").apply(tmp_path)
    with pytest.raises(device.BuildError, match="got it 0 times"):
        device.Patch("other.h", "wait(0)", "").apply(tmp_path)
    device.Patch("kernel.h", " fence();", "").apply(tmp_path)
    assert (tmp_path / "kernel.h").read_text() == "wait(0); wait(0);"


def test_tools_that_only_the_projects_own_build_has_are_fetched_once(tmp_path, monkeypatch):
    toolchain = tmp_path / "build_backend" / "toolchain.py"
    toolchain.parent.mkdir()
    toolchain.write_text("def requirements():\n    return ['tool==1']\n\n1 / (__name__ != '__main__')")
    ran = []

    def run(command, otherwise):
        ran.append(command)
        Path(command[command.index("--target") + 1]).mkdir()

    monkeypatch.setattr(device, "ROOT", tmp_path)
    monkeypatch.setattr(device, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(device, "run_command", run)
    monkeypatch.setenv("PYTHONPATH", "mine")
    for _ in range(2):
        wheels, mine = device.with_tools()["PYTHONPATH"].split(os.pathsep)
        assert Path(wheels).is_dir() and Path(wheels).parent == tmp_path / "cache" and mine == "mine"
    assert len(ran) == 1 and ran[0][-1] == "tool==1"
    toolchain.write_text("")  # finds everything
    assert device.with_tools()["PYTHONPATH"] == "mine"


# ------------------------------------------------------------------------------------------------------- the self-check


def result(*failed: str) -> Result:
    checks = [{"name": name, "passed": False, "errors": {}, "bounds": {}, "detail": ""} for name in failed]
    return Result(a_case(), "wrong", "failed" if failed else "passed", verdict={"checks": checks})


def test_a_hunt_counts_the_first_sign_and_the_right_check():
    hunt = Hunt("race_on_a_tile", 0)
    for failed in ((), ("accuracy",), (), ("accuracy", "determinism")):
        hunt.take(result(*failed), ("determinism",))
    assert (hunt.judged, hunt.found, hunt.by, hunt.right, hunt.right_by) == (4, 2, ["accuracy"], 4, ["determinism"])


@pytest.fixture
def record() -> Record:
    hunts = {
        "scale_twice": {
            seed: Hunt("scale_twice", seed, n, n, ["accuracy"], n, ["accuracy"]) for seed, n in enumerate((2, 9, 4))
        },
        "race_on_a_tile": {
            0: Hunt("race_on_a_tile", 0, 30, 7, ["accuracy"], 30, ["determinism"]),
            1: Hunt("race_on_a_tile", 1, 500, 40, ["accuracy"]),
        },
    }
    noise = {
        family: {name: Hunt(name, 0, right=3 if int(name.split("_")[1]) < 6 else None) for name in NOISE}
        for family in NOISE_FAMILIES
    }
    return Record("sources", "cpu", 500, {"git": "commit"}, hunts, noise=noise)


def test_figures_are_medians_and_worsts_and_say_what_was_missed(record):
    one, other = figures(record, CATALOGUE)
    assert one.row()[:6] == ("scale_twice", "3 of 3", "accuracy", "4", "9", "4")
    assert other.row()[:6] == ("race_on_a_tile", "1 of 2", "determinism", "265.5", "more than 500", "23.5")
    assert other.missed and not passed(record, [one, other]) and passed(record, [one])
    assert "1 of 2 planted defects" in in_words(record, [one, other])[0]
    assert "not found with every seed: race_on_a_tile" in in_words(record, [one, other])[1]
    assert smallest(record, "equal", "out") == (5, 3)
    assert "| equal | 2^-5 = 3.12%, after 3 |" in page_of(record)


def test_a_record_survives_its_file(record, tmp_path):
    path = tmp_path / "new" / "self_check.json"
    save(path, record)
    assert load(path) == record
    path.write_text(json.dumps({"version": 0}))
    with pytest.raises(SelfCheckError, match="expected a self-check of version 2, got 0"):
        load(path)
    path.write_text("{}")
    with pytest.raises(SelfCheckError, match="expected the file of a self-check"):
        load(path)


@pytest.mark.xfail(
    strict=True,
    reason="fewer than 20,000 cases of each correct kernel have been judged since the bound of gains was derived anew",
)
def test_the_published_self_check_is_of_this_catalogue():
    """Every defect was found with every seed, without a false alarm; docs/self_check.md says what the file says."""
    record = load(ROOT / "docs" / "data" / "self_check.json")
    found = figures(record, CATALOGUE)
    assert record.sources == sources(device=False), "the sources have changed: measure again"
    assert {each.defect.name for each in found} == set(CATALOGUE)
    assert passed(record, found)
    assert all(len(each.hunts) == 5 for each in found)
    assert min(alarms.judged for alarms in record.alarms.values()) >= 20_000
    assert (ROOT / "docs" / "self_check.md").read_text() == page_of(record, ROOT / "docs" / "data")


def test_interrupted_and_run_again_it_resumes(tmp_path, capfd):
    from fuzz.__main__ import main

    arguments = [
        "self-check",
        "--defect",
        "scale_twice",
        "--cases",
        "20",
        "--jobs",
        "1",
        "--out",
        str(tmp_path / "out.json"),
    ]
    assert main([*arguments, "--seeds", "1"]) == 0
    first = load(tmp_path / "out.json")
    assert main([*arguments, "--seeds", "1"]) == 0
    assert "1 results are of an earlier run" in capfd.readouterr().out
    assert load(tmp_path / "out.json") == first
    others = [*arguments, "--cases", "30", "--seeds", "1"]
    assert main(others) == 2
    assert "with other sources or --cases 20" in capfd.readouterr().err
    assert load(tmp_path / "out.json") == first
    assert main(["self-check", "--defect", "no_such", "--out", str(tmp_path / "none.json")]) == 2
    assert "--defect: expected one of " in capfd.readouterr().err
