"""Tests of the tests: what the strategies claim to cover is covered where it matters, and not only somewhere."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from fuzz.cases.case import CU_SEQLENS_DTYPES, LAYOUTS, STATE_DTYPES, Case
from fuzz.cases.drawing import draw_batch
from fuzz.cases.families import FAMILIES
from fuzz.cases.inputs import make_inputs
from fuzz.cases.strategies import CPU, STATE_COMBINATIONS

DRAWN = 2000

SURROUNDINGS = {
    "over a chunk": lambda case: max(case.seq_lens) > 64,
    "in a short tail": lambda case: any(0 < length < 16 for length in case.seq_lens),
    "in several sequences": lambda case: case.n_seqs > 1 and case.tokens > 1,
    "in several heads": lambda case: case.heads > 1 and case.tokens > 0,
    "strided": lambda case: case.layout == "strided" and case.tokens > 0,
    "from a state": lambda case: case.initial_state is not None,
    "to a state": lambda case: case.final_state is not None,
    "with the lowest bound": lambda case: case.lower_bound == -5,
    "without decay": lambda case: case.lower_bound == 0,
}
"""Where a defect of one family may show, and in other places not."""


@pytest.fixture(scope="module")
def drawn() -> list[Case]:
    """The first cases of a campaign."""
    cases = itertools.chain.from_iterable(draw_batch(CPU.name, 0, batch) for batch in itertools.count())
    return list(itertools.islice(cases, DRAWN))


def test_every_family_comes_up_wherever_it_may_matter(drawn):
    found = Counter(
        (kind, getattr(case, kind), where)
        for case in drawn
        for where, holds in SURROUNDINGS.items()
        if holds(case)
        for kind in FAMILIES
    )
    wanted = {(kind, name, where) for kind, names in FAMILIES.items() for name in names for where in SURROUNDINGS}
    assert not wanted - set(found)


def test_every_form_meets_every_state_and_layout(drawn):
    forms = ("batch", *CU_SEQLENS_DTYPES)
    found = Counter(
        (case.cu_seqlens_dtype if case.packed else "batch", state, case.layout)
        for case in drawn
        if case.tokens
        for state in [(case.initial_state, case.final_state, case.in_place)]
    )
    assert not set(itertools.product(forms, STATE_COMBINATIONS, LAYOUTS)) - set(found)


def test_pairs_of_families_come_up_that_hide_each_other(drawn):
    """Keys matter where little decays, gates where something is remembered, betas where keys repeat."""
    pairs = {("keys", "gates"), ("keys", "betas"), ("gates", "states"), ("values", "states"), ("queries", "keys")}
    for one, other in pairs:
        met = {(getattr(case, one), getattr(case, other)) for case in drawn if case.tokens}
        possible = len(FAMILIES[one]) * len(FAMILIES[other])
        assert len(met) > 0.8 * possible, (one, other, len(met), possible)


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int32": torch.int32, "int64": torch.int64}


def test_the_tensors_are_what_the_case_says(drawn):
    """What a drawn case claims holds for what a target is given, whatever the fields of the case are called."""
    seen = Counter()
    for case in drawn[: DRAWN // 16]:
        inputs = make_inputs(case)
        batch, tokens = inputs.q.shape[:2]
        lens = [end - start for start, end in inputs.seq_ranges()]
        assert tuple(lens) == case.seq_lens and inputs.q.shape[2] == case.heads
        if case.packed:
            assert batch == 1 and inputs.cu_seqlens.dtype == DTYPES[case.cu_seqlens_dtype]
        else:
            assert (batch, tokens) == (case.n_seqs, case.seq_lens[0]) and inputs.cu_seqlens is None
        for name in ("q", "k", "v", "g", "beta"):
            x = getattr(inputs, name)
            assert x.dtype == torch.bfloat16 and x.stride(-1) == 1
            if case.layout == "contiguous":
                assert x.is_contiguous()
            elif x.numel():
                assert x.untyped_storage().nbytes() > x.numel() * x.element_size()
        assert (inputs.initial_state is None) == (case.initial_state is None)
        if case.initial_state is not None:
            assert inputs.initial_state.dtype == DTYPES[case.initial_state]
            assert inputs.initial_state.shape == (case.n_seqs, case.heads, 128, 128)
        assert inputs.final_state_dtype == DTYPES.get(case.final_state) and inputs.in_place == case.in_place
        assert (inputs.scale, inputs.lower_bound) == (case.scale, case.lower_bound)
        seen.update([case.layout, f"from {case.initial_state}", f"to {case.final_state}"])
    assert {f"from {dtype}" for dtype in (None, *STATE_DTYPES)} | {"strided", "to None"} <= set(seen)
