"""Each property passes a correct target and fails one that lacks it, whatever the oracle says."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from judged_targets import CORRECT, a_case, random_case, target

from fuzz.cases.inputs import TOKENS, make_inputs
from fuzz.defects.catalogue import CATALOGUE
from fuzz.defects.catalogue import target as planted
from fuzz.defects.defect import wrapped
from fuzz.judging.call import run_target
from fuzz.judging.properties import PROPERTIES, applicable, choose
from fuzz.judging.sensitivity import reference
from fuzz.targets.registry import load_target

pytestmark = pytest.mark.usefixtures("one_thread")


SERVING = ("checkpoints", "state_pool", "rows_behind")  # asked of targets that take the arguments of serving


def checked(name, wrong, case, with_reference=True):
    inputs = make_inputs(case)
    ref = reference(inputs, "cpu") if with_reference else None
    return PROPERTIES[name](wrong, case, inputs, run_target(wrong, inputs), ref)


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_correct_target_has_every_property(name):
    draw = random.Random(name)
    right = load_target("flash_kda") if name in SERVING else CORRECT
    answered = 0
    while answered < 5:
        case = random_case(draw)
        if applicable(name, case):
            check = checked(name, right, case)
            assert check.passed, (case, check.detail)
            assert check.name == name
            answered += not check.detail.startswith("not checked")


def test_continuation_and_key_channels_can_do_without_the_oracle():
    for name in ("continuation", "key_channels"):
        check = checked(name, CORRECT, a_case(), with_reference=False)
        assert check.passed and set(check.errors) == {"out", "final_state"}

    wrong = planted(CATALOGUE["initial_state_ignored"])
    assert not checked("continuation", wrong, a_case(gates="weak"), with_reference=False).passed
    wrong = planted(CATALOGUE["one_decay_a_head"])
    assert not checked("key_channels", wrong, a_case(gates="mixed_channels"), with_reference=False).passed


def test_chunks_that_begin_at_the_cut_are_no_fault():
    """Two tokens overwrite a column. In one run, the second lies in a chunk of its own, which corrects the first one's
    rounding; after the cut, one chunk holds both."""
    two = {"seq_lens": (127, 127), "packed": False, "cu_seqlens_dtype": "int32", "heads": 1, "scale": 1.0}
    families = {"keys": "one_hot", "gates": "weak", "betas": "plus_3", "states": "structured", "queries": "random"}
    case = a_case(**two, **families, values="random", initial_state="fp32", final_state=None, seed=77478750)
    check = checked("continuation", load_target("model"), case)
    assert check.passed, check.detail


# -------------------------------------------------------------------------------------------------------- wrong targets


def nudge(x: torch.Tensor) -> None:
    """Changes every element by about one unit in the last place."""
    x.copy_(x.view(torch.int16 if x.element_size() == 2 else torch.int32).add(1).view(x.dtype))


class EveryThirdCall:
    """Another bit in one call of three."""

    def __init__(self):
        self.calls = 0

    def __call__(self, given):
        self.calls += 1
        if self.calls % 3 == 0:
            nudge(given.out[0, 3, 0, :1])


def strided_state_misread(given):
    S = given.initial_state
    if not S.is_contiguous():
        dense = torch.empty(S.shape, device="meta").stride()
        given.initial_state = S.as_strided(S.shape, dense, S.storage_offset()).nan_to_num(0.0)


# By property, a planted defect of `fuzz.defects` that lacks it, and what a case needs for that to show.
DEFECTS = {
    "packing": ("depends_on_the_length_of_the_call", {"seq_lens": (70, 130)}),
    "heads": ("depends_on_the_number_of_heads", {"heads": 3}),
    "batch_form": ("depends_on_packing", {}),
    "causality": ("values_share_a_scale", {}),
    "determinism": ("order_of_sums", {}),
    "continuation": ("state_before_last_update", {}),
    "chunk_continuation": ("final_state_through_bf16", {"seq_lens": (70, 130), "gates": "weak"}),
    "scaling": ("values_in_fixed_point", {}),
    "value_columns": ("depends_on_the_column", {}),
    "key_channels": ("one_decay_a_head", {}),
    "beta_off": ("beta_clamped", {}),
    "gate_off": ("gate_logit_clamped", {}),
    "layout": ("depends_on_the_address", {}),
    "in_place": ("final_state_cleared_first", {}),
    "wide_offsets": ("offsets_of_32_bits", {}),
    "arguments": ("lower_bound_not_checked", {}),
}

MORE = [
    ("packing", "tail_over_next_sequence", {}),
    ("causality", "anchored_at_a_later_row", {}),
    ("determinism", "state_leaks_between_calls", {}),
    ("determinism", "scratch_not_cleared", {}),
    ("layout", "depends_on_the_address", {"layout": "strided"}),
    ("layout", "strides_of_out_ignored", {}),
    ("batch_form", "depends_on_packing", {"packed": False, "seq_lens": (20, 20)}),
    ("batch_form", "depends_on_packing", {"seq_lens": (20, 20)}),
    ("in_place", "final_state_cleared_first", {"in_place": True}),
    ("scaling", "values_in_fixed_point", {"initial_state": "bf16", "final_state": None}),
    ("continuation", "state_before_last_update", {"packed": False, "seq_lens": (20, 20), "final_state": None}),
    (
        "chunk_continuation",
        "final_state_through_bf16",
        {"packed": False, "seq_lens": (90, 90), "final_state": "bf16", "gates": "weak"},
    ),
    ("gate_off", "gate_logit_clamped", {"initial_state": None, "final_state": None}),
    ("arguments", "cu_seqlens_not_checked", {}),
]


def test_there_is_a_defect_for_every_property():
    assert {*DEFECTS, *SERVING} == set(PROPERTIES)  # those of serving are tried in test_serving_checks.py


@pytest.mark.parametrize(
    ("name", "wrong", "changes"),
    [(name, *defect) for name, defect in DEFECTS.items()] + MORE,
    ids=lambda x: str(x)[:40],
)
def test_a_target_without_the_property_is_found(name, wrong, changes):
    """Within four seeds: the permutations, cuts and layouts that a check draws differ by seed."""
    wrong = planted(CATALOGUE[wrong])
    checks = [checked(name, wrong, a_case(**{"seq_lens": (21, 37), "seed": seed, **changes})) for seed in range(4)]
    assert not all(check.passed for check in checks)
    detail = next(check.detail for check in checks if not check.passed)
    assert any(words in detail for words in ("instead of", "allowed", "not finite", "documented"))


@pytest.mark.parametrize("name", ["determinism", "layout"])
def test_one_bit_or_a_strided_state_is_enough(name):
    wrong = {"determinism": wrapped(after=EveryThirdCall()), "layout": wrapped(before=strided_state_misread)}[name]
    checks = [checked(name, target(wrong()), a_case((21, 37), seed=seed)) for seed in range(4)]
    assert not all(check.passed for check in checks)


class Outputs:
    """What happens to outputs that are not contiguous: counted, and by `do` done."""

    def __init__(self, do=lambda given: None):
        self.do, self.strided = do, []

    def __call__(self, given):
        self.strided += [name for name in ("out", "final_state") if not getattr(given, name).is_contiguous()]
        if not given.out.is_contiguous():
            self.do(given)


def seeds_of_layout(do, when="before"):
    outputs = Outputs(do)
    wrong = target(wrapped(**{when: outputs})())
    return outputs, [checked("layout", wrong, a_case((21, 37), seed=seed)) for seed in range(24)]


def test_outputs_are_strided_too():
    outputs, checks = seeds_of_layout(lambda given: None)
    assert all(check.passed for check in checks)
    assert outputs.strided.count("out") > 6 and outputs.strided.count("final_state") > 6


def test_strided_outputs_may_be_refused():
    def refuse(given):
        raise ValueError(f"out: strides {given.out.stride()}; accepted are those of a contiguous tensor")

    outputs, checks = seeds_of_layout(refuse)
    assert all(check.passed for check in checks) and outputs.strided


def test_what_lies_between_rows_of_a_strided_output_stays():
    def pad(given):
        whole = given.out.as_strided((given.out.storage_offset(),), (1,), 0)
        whole[-1:].fill_(0)  # before the first element

    _, checks = seeds_of_layout(pad, when="after")
    details = [check.detail for check in checks if not check.passed]
    assert details and all("wrote outside of out" in detail for detail in details)


def test_dirty_memory_leaves_no_trace():
    assert checked("determinism", CORRECT, a_case()).passed
    assert not torch.are_deterministic_algorithms_enabled()


def test_details_say_how_many_how_much_where_and_what_was_allowed():
    wrong = wrapped(after=lambda given: nudge(given.out[:, :, 0]))()
    check = checked("heads", target(wrong), a_case())
    assert "14592 elements differ (100.0%), most at (0, " in check.detail.replace("14592 of ", "")
    assert "no bit may differ" in check.detail


def test_nan_in_both_is_not_the_same():
    wrong = wrapped(after=lambda given: given.out.fill_(torch.nan))()
    assert not checked("heads", target(wrong), a_case()).passed


def test_what_a_target_does_not_take_is_not_checked_and_says_why():
    short = replace(
        CORRECT, reach=lambda case: "more than one sequence" if case.n_seqs > 1 or not case.packed else None
    )
    check = checked("batch_form", short, a_case((20,)))
    assert check.passed and check.detail == "not checked: the changed case is unsupported: more than one sequence"
    check = checked("scaling", CORRECT, a_case(values="zero", initial_state=None))
    assert check.passed and "zero" in check.detail


def test_tokens_and_states_are_wide_one_after_the_other_and_what_has_no_room_is_said(monkeypatch):
    from fuzz.judging import wide

    names, calls = ("q", "k", "v", "g", "beta", "out", "initial_state"), []

    def spy(given):
        spans = {name: sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) for name, x in given}
        calls.append({name for name, span in spans.items() if span > 2**31})

    judged = target(
        wrapped(lambda given: spy([(name, vars(given)[name]) for name in names if vars(given)[name] is not None]))()
    )
    tokens = {"q", "k", "v", "g"}
    assert checked("wide_offsets", judged, a_case((21, 37))).detail == ""
    assert calls[1:] == [tokens, tokens, {"beta"}, {"out"}, {"initial_state"}]
    calls.clear()
    assert checked("wide_offsets", judged, a_case((5, 5), 1, packed=False, initial_state=None)).detail == ""
    assert calls[1:] == [tokens, tokens, {"beta"}, {"out"}]

    slices = wide.slices
    for axis, what in ((0, "initial_state"), (2, "q, k, v, g")):

        def no_room(tensors, along, axis=axis):
            if along == axis:
                raise wide.Unsupported("no room for 8.0 GiB")
            return slices(tensors, along)

        monkeypatch.setattr(wide, "slices", no_room)
        check = checked("wide_offsets", judged, a_case((21, 37)))
        said = f"not checked: {what} of more than 2^31 elements along axis {axis}: no room for 8.0 GiB"
        assert check.passed and check.detail == said
        assert not checked("wide_offsets", planted(CATALOGUE["offsets_of_32_bits"]), a_case((21, 37))).passed


def test_causality_changes_every_input_and_nothing_before_t():
    calls = []
    spy = wrapped(lambda given: calls.append({name: getattr(given, name) for name in TOKENS}))()
    assert checked("causality", target(spy), a_case((40,))).passed
    first, *others = calls
    assert len(others) == 2
    for other in others:
        rows = torch.stack([(first[name] != other[name]).reshape(40, -1).any(1) for name in first])
        assert rows[:, -1].all()
        cut = int(rows.any(0).nonzero()[0])
        assert cut > 0 and rows.any(0)[cut:].all()
    assert max(float(other["v"].abs().max()) for other in others) > 2.0**18


def test_choice_is_deterministic_and_reaches_every_applicable_property():
    case = a_case((70, 100), initial_state="bf16")
    assert choose(case, 3) == choose(case, 3) and len(choose(case, 3)) == 3
    chosen = {name for seed in range(100) for name in choose(replace(case, seed=seed), 2)}
    assert chosen == {name for name in PROPERTIES if applicable(name, case)} == set(PROPERTIES)
    lone = a_case((1,), 1, initial_state=None)
    assert not {"packing", "heads", "causality", "chunk_continuation", "in_place"} & set(choose(lone, 99))
    assert choose(case, 0) == ()
    with pytest.raises(KeyError, match="property: expected one of"):
        applicable("speed", case)


@pytest.mark.parametrize("how", ["over the tokens of a sequence", "over all tokens"])
def test_what_is_not_finite_stays_in_its_sequence_and_in_its_chunk(how):
    """A later value times zero is zero for every value but those that are not finite."""

    def leaks(given):
        for start, end in given.sequences() if how == "over the tokens of a sequence" else [(0, given.q.shape[1])]:
            sums = [x[:, start:end].float().sum() for x in (given.q, given.k, given.v)]
            given.out[:, start:end] += (0 * sum(0 * total for total in sums)).to(given.out.dtype).abs() * -0.0

    lens = (200,) if how == "over the tokens of a sequence" else (37, 20)
    wrong = target(wrapped(after=leaks)())
    for seed in range(60):
        case = a_case(lens, 1, seed=seed)
        check = checked("causality", wrong, case)
        if not check.passed:
            break
    assert "beside " in check.detail and "nan instead of" in check.detail
    assert checked("causality", CORRECT, case).passed
