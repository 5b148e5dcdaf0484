"""A coarse inverse: what its declaration costs, and that nobody else has that room."""

from __future__ import annotations

from dataclasses import replace

import pytest
from judged_targets import a_case

from flash_kda.formats import bf16, tf32
from fuzz.cases.inputs import make_inputs
from fuzz.defects.catalogue import CATALOGUE
from fuzz.defects.defect import formats
from fuzz.judging import copies
from fuzz.judging.accuracy import accuracy
from fuzz.judging.call import Outputs, run_target
from fuzz.judging.gains import gain
from fuzz.judging.judge import judge
from fuzz.judging.sensitivity import reference
from fuzz.targets.promises import Promises
from fuzz.targets.registry import Target, fla_promises

pytestmark = pytest.mark.usefixtures("one_thread")

SIMILAR = {"keys": "equal", "gates": "equal", "packed": False, "cu_seqlens_dtype": "int64"}

CASES = {
    "windows of out": a_case(
        (129,),
        3,
        **SIMILAR,
        betas="constant_6",
        values="tiny",
        lower_bound=-2.375,
        seed=56902,
        initial_state="bf16",
        queries="equal_to_keys",
    ),
    "large states": a_case(
        (33,), 1, **SIMILAR, betas="random", values="random", states="large", lower_bound=-5.0, seed=13488024
    ),
    "whole states": a_case((95,), 3, **SIMILAR, betas="constant_6", lower_bound=-3.343, states="random", seed=489),
    "one element of out": a_case(
        (256,),
        1,
        **SIMILAR,
        betas="constant_6",
        lower_bound=-5.0,
        scale=-(128**-0.5),
        seed=434,
        values="one_hot",
        initial_state=None,
        final_state=None,
        states="structured",
    ),  # the token before the last block of 16 of 64
}
"""Equal keys, on which merges in bf16 err by more than bf16 operands do."""

COARSE = formats(merge=bf16)()


def failed(target: Target, case) -> set[str]:
    inputs = make_inputs(case)
    verdict = judge(target, case, inputs, reference(inputs, "cpu"), ())
    return {check.name for check in verdict.failed}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_merges_in_bf16_pass_where_they_are_declared(case):
    target = Target("coarse", COARSE, "cpu")
    assert failed(target, case) == {"accuracy"}
    assert failed(replace(target, promises=Promises(inverse="bf16")), case) == set()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_wrong_kernel_is_found_all_the_same(case):
    """Results that are 30 % too large; and an inverse by a power series, whose terms explode on equal keys."""
    promises = Promises(inverse="bf16")
    assert failed(Target("wrong", louder, "cpu", promises=promises), case)
    series = Target("wrong", CATALOGUE["fp16_neumann_inverse"].make(), "cpu", promises=promises)
    assert bool(failed(series, case)) == (case.betas == "constant_6")


def louder(*arguments, **keywords):
    formats(merge=tf32)()(*arguments, **keywords)
    for x in (arguments[6], keywords["final_state"]):
        if x is not None:
            x.mul_(1.3)


def test_who_does_not_declare_it_has_no_room_and_no_cost():
    inputs = make_inputs(CASES["large states"])
    exact = reference(inputs, "cpu")
    outputs = run_target(Target("coarse", COARSE, "cpu"), inputs)
    without = accuracy(outputs, inputs, exact)
    assert not without.passed and "inverse" not in exact.kept
    assert accuracy(outputs, inputs, exact, inverse="fp32") == without
    right = run_target(Target("right", formats()(), "cpu"), inputs)
    assert accuracy(right, inputs, exact, inverse="bf16") == accuracy(right, inputs, exact)
    assert "inverse" not in exact.kept  # what passes without needs no room
    wide = accuracy(outputs, inputs, exact, inverse="bf16")
    narrow = accuracy(outputs, inputs, exact, inverse="fp16")
    room = {format.bounds["state_head"] - without.bounds["state_head"] for format in (narrow, wide)}
    assert min(room) * 8 == pytest.approx(max(room)) and min(room) > 0


def test_the_copies_are_exact_but_for_what_they_round(monkeypatch):
    """Both orders of the products, of triangles of 32 and 64 tokens, and of what is left of them."""
    inputs = make_inputs(a_case((20, 150), 2, keys="collinear", betas="plus_3", gates="weak_8"))
    exact = reference(inputs, "cpu")
    rounding = copies.errors_of_inverse(inputs, exact)
    assert rounding["out"].abs().amax() > 1e-4 * exact.out.abs().amax()
    assert rounding["out"].shape == (16, *exact.out.flatten(0, 1).shape)
    assert rounding["state"].shape == (16, *exact.state.shape)
    exact.kept.clear()
    monkeypatch.setattr(copies, "to_bits", lambda x, bits=8: x)
    for what, errors in copies.errors_of_inverse(inputs, exact).items():
        assert errors.abs().amax() < 1e-9 * getattr(exact, what).abs().amax()


def test_the_gain_has_its_part_of_it():
    inputs = make_inputs(a_case((640,), 1, **SIMILAR, betas="constant_6", lower_bound=-0.1, states="large"))
    exact = reference(inputs, "cpu")
    wrong = Outputs((1.05 * exact.out).bfloat16(), (1.05 * exact.state).float())
    allowed = [gain(wrong, inputs, exact, inverse=format).bounds["state_gain"] for format in ("fp32", "fp16", "bf16")]
    assert allowed[0] < allowed[1] < allowed[2]
    assert not gain(wrong, inputs, exact, inverse="bf16").passed


@pytest.mark.parametrize("form", [{"merge": bf16}, {"merge": bf16, "X": bf16}, {"merge": bf16, "X": bf16, "Xb": bf16}])
def test_right_kernels_with_a_coarse_inverse_raise_no_alarm(form):
    target = Target("coarse", formats(**form)(), "cpu", promises=Promises(inverse="bf16"))
    for seed in range(12):
        for keys in ("equal", "opposite"):
            case = a_case((96 - seed,), 1, **{**SIMILAR, "keys": keys}, betas="constant_6", lower_bound=-seed / 3)
            assert failed(target, replace(case, seed=seed)) == set()


def test_fla_declares_it_on_a_gpu():
    assert fla_promises("chunk", interpreted=False).inverse == "bf16"
    assert fla_promises("chunk", interpreted=True).inverse == "fp32"
    assert fla_promises("recurrent", interpreted=False).inverse == "fp32"
    assert "inverse bf16" in Promises(inverse="bf16").describe()
