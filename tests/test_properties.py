"""Each property passes a correct target and fails one that lacks it, whatever the oracle says."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from judged_targets import ARGUMENTS, CORRECT, a_case, random_case, recurrence, target, wrapped

from fuzz.inputs import make_inputs
from fuzz.judge import reference, run_target
from fuzz.properties import PROPERTIES, applicable, choose


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def checked(name, wrong, case, with_reference=True):
    inputs = make_inputs(case)
    ref = reference(inputs, "cpu") if with_reference else None
    return PROPERTIES[name](wrong, case, inputs, run_target(wrong, inputs), ref)


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_correct_target_has_every_property(name):
    draw = random.Random(name)
    answered = 0
    while answered < 5:
        case = random_case(draw)
        if applicable(name, case):
            check = checked(name, CORRECT, case)
            assert check.passed, (case, check.detail)
            assert check.name == name
            answered += not check.detail.startswith("not checked")


def test_continuation_and_key_channels_can_do_without_the_oracle():
    for name in ("continuation", "key_channels"):
        check = checked(name, CORRECT, a_case(), with_reference=False)
        assert check.passed and set(check.errors) == {"out", "final_state"}

    def no_state(given):
        given["initial_state"] = None

    assert not checked("continuation", wrapped(no_state), a_case(gates="weak"), with_reference=False).passed
    assert not checked("key_channels", DEFECTS["key_channels"][0], a_case(), with_reference=False).passed


# -------------------------------------------------------------------------------------------------------- wrong targets


def nudge(x: torch.Tensor) -> None:
    """Changes every element by about one unit in the last place."""
    x.copy_(x.view(torch.int16 if x.element_size() == 2 else torch.int32).add(1).view(x.dtype))


def depends_on_length(given):
    if given["q"].shape[1] % 2:
        nudge(given["out"])


def tail_over_next(given):
    if given["cu_seqlens"] is not None and len(given["cu_seqlens"]) > 2:
        end = int(given["cu_seqlens"][1])
        given["out"][0, end] = given["out"][0, end - 1]


def first_head_differs(given):
    nudge(given["out"][:, :, 0])


def packed_differs(given):
    if given["cu_seqlens"] is not None:
        nudge(given["out"])


def tiles(x: torch.Tensor):
    return x.flatten(0, 1).split(16)


def shared_scale(given):
    """Values to 11 bits with one scale for a 16-token tile: later tokens decide what is left of earlier ones."""
    v = given["v"].float()
    for tile in tiles(v):
        unit = tile.abs().amax().clamp_min(2.0**-100) / 2**10
        tile.copy_((tile / unit).round() * unit)
    given["v"] = v.bfloat16()


def later_anchor(given):
    """Rounds the gates against the tile's last row, as an exponential anchored there would."""
    g = given["g"].float()
    for tile in tiles(g):
        tile.copy_((tile - tile[-1:]).bfloat16().float() + tile[-1:])
    given["g"] = g.bfloat16()


class Remembers:
    """Counts its calls, and keeps the state of the last one."""

    def __init__(self):
        self.calls, self.state = 0, None

    def flip(self, given):
        self.calls += 1
        if self.calls % 3 == 0:
            nudge(given["out"][0, 3, 0, :1])

    def leak(self, given):
        S = given["final_state"]
        if self.state is not None and self.state.shape == S.shape:
            S += 1e-3 * self.state
        self.state = S.clone()


def reads_dirty_memory():
    def fwd(*args, **kwargs):
        recurrence(*args, **kwargs)
        scratch = torch.empty_like(args[2], dtype=torch.float32)  # never written
        args[6][0, 0, 0, 0] += scratch.isnan().any()

    return target(fwd)


def bf16_state(given):
    given["final_state"].copy_(given["final_state"].bfloat16())


def not_homogeneous(given):
    given["v"] = given["v"] + torch.tensor(2.0**-4, dtype=torch.bfloat16)


def last_columns_differ(given):
    nudge(given["out"][..., 120:])


def half_of_the_channels_decay(given):
    given["g"] = given["g"].clone()
    given["g"][..., 64:] = -torch.inf


def clamped(name, low):
    def before(given):
        given[name] = given[name].clamp_min(low)

    return before


def rounds_by_address(given):
    if given["k"].data_ptr() % 16 or not given["k"].is_contiguous():
        nudge(given["out"])


def strided_state_misread(given):
    S = given["initial_state"]
    if not S.is_contiguous():
        dense = torch.empty(S.shape, device="meta").stride()
        given["initial_state"] = S.as_strided(S.shape, dense, S.storage_offset()).nan_to_num(0.0)


def writes_state_first():
    def fwd(*args, **kwargs):
        if kwargs["final_state"] is not None:
            kwargs["final_state"].zero_()
        recurrence(*args, **kwargs)

    return target(fwd)


DEFECTS = {
    "packing": (wrapped(after=depends_on_length), {}),
    "heads": (wrapped(after=first_head_differs), {}),
    "batch_form": (wrapped(after=packed_differs), {}),
    "causality": (wrapped(before=shared_scale), {}),
    "determinism": (wrapped(after=Remembers().flip), {}),
    "continuation": (wrapped(drop_last_update=True), {}),
    "chunk_continuation": (wrapped(after=bf16_state), {"seq_lens": (70, 130)}),
    "scaling": (wrapped(before=not_homogeneous), {}),
    "value_columns": (wrapped(after=last_columns_differ), {}),
    "key_channels": (wrapped(before=half_of_the_channels_decay), {}),
    "beta_off": (wrapped(before=clamped("beta", -4.0)), {}),
    "gate_off": (wrapped(before=clamped("g", -2.0)), {}),
    "layout": (wrapped(after=rounds_by_address), {}),
    "in_place": (writes_state_first(), {}),
}

MORE = [
    ("packing", wrapped(after=tail_over_next), {}),
    ("causality", wrapped(before=later_anchor), {}),
    ("determinism", wrapped(after=Remembers().leak), {}),
    ("layout", wrapped(before=strided_state_misread), {}),
    ("layout", wrapped(after=rounds_by_address), {"layout": "strided"}),
    ("batch_form", wrapped(after=packed_differs), {"packed": False, "seq_lens": (20, 20)}),
    ("batch_form", wrapped(after=packed_differs), {"seq_lens": (20, 20)}),
    ("in_place", writes_state_first(), {"in_place": True}),
    ("scaling", wrapped(before=not_homogeneous), {"initial_state": "bf16", "final_state": None}),
    ("continuation", wrapped(drop_last_update=True), {"packed": False, "seq_lens": (20, 20), "final_state": None}),
    ("chunk_continuation", wrapped(after=bf16_state), {"packed": False, "seq_lens": (70, 70), "final_state": "bf16"}),
    ("gate_off", wrapped(before=clamped("g", -2.0)), {"initial_state": None, "final_state": None}),
]


def test_there_is_a_defect_for_every_property():
    assert set(DEFECTS) == set(PROPERTIES)


@pytest.mark.parametrize(
    ("name", "wrong", "changes"),
    [(name, *defect) for name, defect in DEFECTS.items()] + MORE,
    ids=lambda x: str(x)[:40],
)
def test_a_target_without_the_property_is_found(name, wrong, changes):
    """Within four seeds: the permutations, cuts and layouts that a check draws differ by seed."""
    checks = [checked(name, wrong, a_case(**{"seq_lens": (21, 37), "seed": seed, **changes})) for seed in range(4)]
    assert not all(check.passed for check in checks)
    detail = next(check.detail for check in checks if not check.passed)
    assert "instead of" in detail or "allowed" in detail or "not finite" in detail


def test_reading_memory_that_nobody_wrote_is_found():
    assert not checked("determinism", reads_dirty_memory(), a_case()).passed
    assert not torch.are_deterministic_algorithms_enabled()


def test_details_say_how_many_how_much_where_and_what_was_allowed():
    check = checked("heads", wrapped(after=first_head_differs), a_case())
    assert "14592 elements differ (100.0%), most at (0, " in check.detail.replace("14592 of ", "")
    assert "no bit may differ" in check.detail


def test_nan_in_both_is_not_the_same():
    def nan(given):
        given["out"].fill_(torch.nan)

    assert not checked("heads", wrapped(after=nan), a_case()).passed


def test_what_a_target_does_not_take_is_not_checked_and_says_why():
    short = replace(
        CORRECT, reach=lambda case: "more than one sequence" if case.n_seqs > 1 or not case.packed else None
    )
    check = checked("batch_form", short, a_case((20,)))
    assert check.passed and check.detail == "not checked: the changed case is out of reach: more than one sequence"
    check = checked("scaling", CORRECT, a_case(values="zero", initial_state=None))
    assert check.passed and "zero" in check.detail


def test_causality_changes_every_input_and_nothing_before_t():
    calls = []
    spy = wrapped(lambda given: calls.append({name: given[name] for name in ARGUMENTS[:5]}))
    assert checked("causality", spy, a_case((40,))).passed
    first, *others = calls
    assert len(others) == 2
    for other in others:
        rows = torch.stack([(first[name] != other[name]).reshape(40, -1).any(1) for name in first])
        assert rows[:, -1].all()
        cut = int(rows.any(0).nonzero()[0])
        assert cut > 0 and rows.any(0)[cut:].all()
    assert max(float(other["v"].abs().max()) for other in others) > 2.0**18


def test_choice_is_deterministic_and_reaches_every_applicable_property():
    case = a_case((70, 80), initial_state="bf16")
    assert choose(case, 3) == choose(case, 3) and len(choose(case, 3)) == 3
    chosen = {name for seed in range(60) for name in choose(replace(case, seed=seed), 2)}
    assert chosen == {name for name in PROPERTIES if applicable(name, case)} == set(PROPERTIES)
    lone = a_case((1,), 1, initial_state=None)
    assert not {"packing", "heads", "causality", "chunk_continuation", "in_place"} & set(choose(lone, 99))
    assert choose(case, 0) == ()
    with pytest.raises(KeyError, match="unknown; accepted"):
        applicable("speed", case)
