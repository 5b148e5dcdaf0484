"""The gain: a bias that no single element shows is found, and what rounding alone makes is not."""

from __future__ import annotations

from dataclasses import asdict, fields, replace

import pytest
import torch
from judged_targets import a_case

from flash_kda.formats import Formats, tf32
from fuzz.campaign.findings import error_class
from fuzz.cases.families import PUBLISHED
from fuzz.cases.inputs import make_inputs
from fuzz.judging import bounds, gains
from fuzz.judging.accuracy import accuracy
from fuzz.judging.call import Outputs, run_target
from fuzz.judging.copies import SEED, to_bits
from fuzz.judging.gains import gain
from fuzz.judging.sensitivity import reference
from fuzz.targets.registry import load_target

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = {"model": "bf16", "fla.naive": "fp32"}


def judged(case, target: str):
    inputs = make_inputs(case)
    return inputs, reference(inputs, "cpu"), load_target(target)


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("family", PUBLISHED)
def test_a_tenth_of_a_percent_is_found_over_a_thousand_tokens(family, target):
    """And by no other metric. On strongly collinear keys, rounding of bf16 alone makes as much."""
    inputs, exact, found = judged(a_case((1000,), 1, **PUBLISHED[family], seed=3), target)
    right = run_target(found, inputs)
    assert gain(right, inputs, exact, FORMATS[target]).passed
    louder = run_target(found, replace(inputs, scale=1.001 * inputs.scale))
    wrong = Outputs(louder.out, right.final_state * 1.001)
    check = gain(wrong, inputs, exact, FORMATS[target])
    assert check.passed == ((family, target) == ("collinear_strong", "model"))
    assert set(check.errors) == set(check.bounds) == {"out_gain", "state_gain"}
    if target == "model":
        assert accuracy(wrong, inputs, exact).passed


def test_rounding_alone_makes_a_tenth_of_a_percent_on_strongly_collinear_keys():
    """A right kernel may round as one of these copies does, so no bound may call that gain wrong."""
    inputs, exact, _ = judged(a_case((1000,), 1, **PUBLISHED["collinear_strong"], seed=4), "model")
    rows = {
        what: gains.rows_of(what, dtype, inputs, exact)
        for what, dtype in (("out", torch.bfloat16), ("state", torch.float32))
    }
    for seed, most in ((SEED, 0.0006), (34, 0.0013)):
        rounded = gains.copies_of_operands(inputs, exact, seed)
        for what, of in rows.items():
            largest = ((of.weight * rounded[what]).sum((1, 2)) / of.size.sum()).abs().amax()
            assert most / 2 < largest < most, (seed, what, largest)
    assert largest > 0.001


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("family", PUBLISHED)
def test_a_right_kernel_needs_no_copies_and_a_wrong_one_does(family, target):
    """They take longer than all else, so a gain that independent rows explain passes before."""
    inputs, exact, found = judged(a_case((300,), 2, **PUBLISHED[family], seed=4), target)
    right = run_target(found, inputs)
    assert gain(right, inputs, exact, FORMATS[target]).passed and "copies" not in exact.kept
    wrong = Outputs((right.out.float() * 1.03).bfloat16(), right.final_state)
    assert not gain(wrong, inputs, exact, FORMATS[target]).passed and "copies" in exact.kept


def test_copies_decide_about_a_tenth_of_a_percent_wherever_there_are_a_thousand_rows(monkeypatch):
    """Of a state whose rounding is nearly that of its first value in all rows, copies show much less room."""
    families = {"queries": "tiny", "keys": "equal", "gates": "equal", "betas": "constant_6", "states": "large"}
    case = a_case((512, 512), 1, **families, values="large", lower_bound=-1.748, initial_state="bf16", seed=983114)
    inputs, exact, model = judged(case, "model")
    right = run_target(model, inputs)
    wrong = Outputs(right.out, right.final_state * 1.001)
    assert gain(right, inputs, exact).passed
    assert "state has a gain of +0.1" in gain(wrong, inputs, exact).detail
    monkeypatch.setattr(gains, "SOUGHT", 1.0)
    assert gain(wrong, inputs, exact).passed  # so the test shows what it is for


@pytest.mark.parametrize(("wrong", "group"), [("out", "out"), ("state", "state"), ("both", "out")])
def test_findings_of_gains_are_grouped_by_what_has_the_gain(wrong, group):
    inputs, exact, model = judged(a_case((400,), 1, gates="weak"), "model")
    right = run_target(model, inputs)
    out = right.out if wrong == "state" else (right.out.float() * 1.02).bfloat16()
    state = right.final_state if wrong == "out" else right.final_state * 1.02
    check = gain(Outputs(out, state), inputs, exact)
    assert not check.passed and error_class(asdict(check)) == group


@pytest.mark.parametrize(
    ("name", "what"),
    [("beta", "tokens where beta is large"), ("k", "tokens where the norm of k is large"), ("q", "the norm of q is")],
)
def test_a_gain_of_a_few_tokens_is_found_where_it_is(name, what):
    inputs, exact, model = judged(a_case((1000,), 1, gates="weak", keys="mixed_norms", queries="mixed_norms"), "model")
    right = run_target(model, inputs)
    x = getattr(inputs, name).float()
    size = x if name == "beta" else x.norm(dim=-1)
    chosen = size >= size.flatten().kthvalue(875).values
    out = torch.where(chosen[..., None], right.out.float() * 1.004, right.out.float()).bfloat16()
    check = gain(Outputs(out, None), inputs, exact)
    assert not check.passed and what in check.detail


def test_a_gain_of_one_head_is_found():
    inputs, exact, model = judged(a_case((400,), 3, gates="weak"), "model")
    right = run_target(model, inputs)
    out = right.out.clone()
    out[:, :, 2] = (out[:, :, 2].float() * 0.9965).bfloat16()
    check = gain(Outputs(out, None), inputs, exact)
    assert "over head 2" in check.detail and "head 1" not in check.detail


def test_few_tokens_are_left_to_the_other_metrics():
    inputs, exact, model = judged(a_case((17,), 2), "model")
    assert gain(run_target(model, inputs), inputs, exact) == gains.Check("gain", True)


def test_a_result_of_zeros_has_no_gain():
    inputs, exact, model = judged(a_case((200,), 1, scale=0.0, values="zero", states="zero"), "model")
    check = gain(run_target(model, inputs), inputs, exact)
    assert check.passed and set(check.errors.values()) == {0.0}


def test_rounding_to_so_many_bits_is_that_of_bf16_and_tf32():
    x = torch.randn(10_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ties = x.bfloat16().double() != x.float().bfloat16().double()  # rounded twice
    assert torch.equal(to_bits(x)[~ties], x.bfloat16().double()[~ties])
    assert torch.equal(to_bits(x.float().double(), 11), tf32(x.float()).double())
    assert to_bits(x * 2.0**300).isfinite().all()


def test_the_copies_round_alike_what_is_alike():
    """Equal keys without decay: the gains of copies are those of one token, not of a thousand independent ones."""
    for keys, betas, least, most in (("equal", "constant_6", 6.0, 1e9), ("random", "random", 0.0, 3.0)):
        queries = "equal_to_keys" if keys == "equal" else "random"
        case = a_case((640,), 1, keys=keys, gates="saturated_closed", betas=betas, queries=queries)
        inputs, exact, _ = judged(case, "model")
        copies = gains.copies_of_operands(inputs, exact)["out"]
        together = copies.sum((1, 2)).square().mean().sqrt()
        alone = copies.square().mean(0).sum().sqrt()
        assert least < together / alone < most, keys


def test_rounding_that_undoes_a_decay_in_all_tokens_is_expected():
    """Rows that are bf16 as given are rounded back to what they were if a decay is within half a unit of 1."""
    inputs, exact, model = judged(
        a_case((400,), 1, keys="collinear", gates="weak_8", betas="plus_3", seed=46915, lower_bound=-5.0), "model"
    )
    check = gain(run_target(model, inputs), inputs, exact)
    of_copies = gains.copies_of_operands(inputs, exact)["out"].sum((1, 2)).square().mean().sqrt()
    of_rows = gains.copies_as_given(inputs, exact, 1.0)["out"].sum((1, 2))[::2]
    assert check.passed and of_rows.abs().amax() > 2 * of_copies


HISTORY = {"queries": "random", "keys": "relay", "values": "early", "gates": "slow_channel", "betas": "near_zero"}
HISTORY |= {"states": "structured", "lower_bound": 0.0, "scale": 128**-0.5, "final_state": "fp32"}
WEAK = {"seq_lens": (1025,), "gates": "weak_12", "betas": "faint", "states": "random", "lower_bound": -5.0}
WEAK |= {"initial_state": "bf16", "seed": 159779248}
WERE_ALARMS = [  # before states were rounded as given, and fp32 counted relative to the row
    ("model", {"seq_lens": (512,), "keys": "random", "values": "random", "initial_state": "fp32", "seed": 56834976}),
    ("model", {"seq_lens": (512,), "scale": -1.0, "initial_state": "fp32", "final_state": None, "seed": 7597103}),
    ("model", WEAK),
    (
        "fla.naive",
        {"seq_lens": (1849,), "gates": "all_but_one_channel", "lower_bound": -1e-6, "states": "large"}
        | {"initial_state": None, "seed": 720},
    ),
    (
        "fla.naive",
        {"seq_lens": (1023,), "keys": "one_hot", "values": "random", "betas": "faint", "lower_bound": -4.877}
        | {"scale": 1.0, "initial_state": "fp32", "seed": 912461},
    ),
]


@pytest.mark.parametrize(("target", "of"), WERE_ALARMS)
def test_a_state_that_hardly_changes_is_no_alarm(target, of):
    case = a_case(heads=1, **HISTORY | of)
    inputs, exact, found = judged(case, target)
    check = gain(run_target(found, inputs), inputs, exact, FORMATS[target])
    assert check.passed, check.detail


def test_rounding_undoes_what_little_a_state_has_decayed():
    """A given state in bf16, as an operand, is rounded back to what it was. Such copies predict the gain of `out`."""
    inputs, exact, model = judged(a_case(heads=1, **HISTORY | WEAK), "model")
    rows = gains.rows_of("out", torch.bfloat16, inputs, exact)
    found = gains.products("out", run_target(model, inputs).out.double() - exact.out, exact.out) * rows.weight
    copies = rows.weight * gains.copies_of_operands(inputs, exact)["out"]
    undone = (rows.weight * gains.copies_as_given(inputs, exact, 1.0)["out"]).sum((1, 2))[1::2]
    assert undone.tolist() == pytest.approx([found.sum().item()] * 3, rel=0.2)
    assert found.sum() > 6.5 * copies.sum((1, 2)).square().mean().sqrt()


def test_operands_of_tf32_undo_no_less_of_a_small_decay(monkeypatch):
    """Of a decay within half a unit of tf32, rounding to tf32 undoes all, not the eighth of what bf16 undoes."""
    families = {"gates": "saturated_closed", "betas": "minus_infinity", "states": "random", "keys": "random"}
    case = a_case((256,), 8, **families, lower_bound=-1e-6, initial_state="bf16", final_state=None, seed=5)
    inputs, exact, model = judged(case, "model")
    monkeypatch.setattr("flash_kda.model.FORMATS", Formats(**{field.name: tf32 for field in fields(Formats)}))
    check = gain(run_target(model, inputs), inputs, exact, "fp16")
    assert check.passed and 0.0001 < check.errors["out_gain"] < 0.0002


@pytest.mark.parametrize(("units", "each"), [(0.49, 0.98), (0.51, 1.87), (2.51, 1.34)])
def test_fp32_takes_as_much_of_a_state_for_each_token_as_is_derived(units, each):
    """Decays of 1 less so many units of 2^-24: the decay and its product with the state both err one way."""
    families = {"gates": "saturated_closed", "betas": "minus_infinity", "states": "large"}
    case = a_case((1500,), 1, **families, lower_bound=-units * 2.0**-24, initial_state="fp32", final_state="fp32")
    inputs, exact, naive = judged(case, "fla.naive")
    check = gain(run_target(naive, inputs), inputs, exact, "fp32")
    rows = gains.rows_of("state", torch.float32, inputs, exact)
    errors = gains.products("state", run_target(naive, inputs).final_state - exact.state, exact.state) * rows.weight
    assert errors.sum().abs() / rows.size.sum() == pytest.approx(1500 * each * 2.0**-25, rel=0.02)
    assert check.passed


def test_the_part_of_finer_operands():
    inputs, exact, _ = judged(a_case((500,), 1, gates="weak"), "model")
    zero = Outputs(exact.out.bfloat16(), exact.state.float())
    allowed = [gain(zero, inputs, exact, each).bounds["out_gain"] for each in bounds.OPERANDS]
    assert allowed == sorted(allowed, reverse=True)
