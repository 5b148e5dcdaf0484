"""The drawn cases reach everything that is worth reaching, stay within their profile, and shrink to what matters."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from random import Random
from statistics import mean

import hypothesis
import pytest
from hypothesis import HealthCheck

from fuzz.cases.case import Case
from fuzz.cases.drawing import examples
from fuzz.cases.families import FAMILIES, PUBLISHED
from fuzz.cases.plain import PLAIN
from fuzz.cases.strategies import (
    CPU,
    GPU,
    LONG,
    PROFILES,
    PUBLISHED_LENS,
    STATE_COMBINATIONS,
    cases,
    edge_lengths,
    smaller,
)


def draw(profile, count: int) -> list[Case]:
    """Batches of 100, as a campaign draws them."""
    return [case for batch in range(count // 100) for case in examples(cases(profile), batch, 100)]


@pytest.fixture(scope="module")
def sample() -> list[Case]:
    return draw(CPU, 2000)


def classes(case: Case) -> set[tuple[str, object]]:
    """Every class of the coverage table that a case belongs to."""
    lens = case.seq_lens
    found: set[tuple[str, object]] = {("length", length) for length in lens if length <= 4}
    # (48, -1): one less than 48.
    for step in (16, 64):
        for length in lens:
            multiple = (length + step // 2) // step * step
            if multiple and abs(length - multiple) <= 1:
                found.add((f"around a multiple of {step}", (multiple, length - multiple)))
                found.add((f"around a multiple of {step}", multiple))
    found |= {("tail of a chunk of 64", length % 64) for length in lens if length}
    found |= {("tail of a block of 16", length % 16) for length in lens if length}
    form = "fixed" if not case.packed else case.cu_seqlens_dtype
    found |= {("form", form), ("form", f"{form}, {'one' if case.n_seqs == 1 else 'several'}")}
    found.add(("heads", case.heads))
    if case.tokens == 0:
        found.add(("lengths", "no tokens"))
        found.add(("lengths", "no tokens, " + ("packed" if case.packed else "fixed")))
    if len(lens) > 1 and case.tokens:
        found |= {("lengths", "empty first")} if lens[0] == 0 else set()
        found |= {("lengths", "empty last")} if lens[-1] == 0 else set()
        found |= {("lengths", "empty between")} if 0 in lens[1:-1] and lens[0] and lens[-1] else set()
        found |= {("lengths", "a tail before another sequence")} if any(n % 64 for n in lens[:-1]) else set()
        found |= {("lengths", "unequal")} if len(set(lens)) > 1 else set()
        found |= {("lengths", "one long among tiny")} if max(lens) > 128 and sorted(lens)[-2] <= 17 else set()
    found |= {("lengths", "many tiny")} if len(lens) >= 20 and max(lens) <= 17 else set()
    found |= {("lengths", "more than 32 sequences")} if len(lens) > 32 else set()
    found |= {("lengths", "one long")} if len(lens) == 1 and lens[0] > 200 else set()
    bound = case.lower_bound
    found.add(("lower_bound", bound if bound in (-5, 0) else "tiny" if bound > -0.01 else -int(-bound) - 0.5))
    found.add(("states", (case.initial_state, case.final_state, case.in_place)))
    found.add(("layout", case.layout if case.layout == "contiguous" else f"strided, pattern {case.seed % 4}"))
    scale = case.scale
    found.add(
        ("scale", "zero" if scale == 0 else "negative" if scale < 0 else "usual" if scale == 128**-0.5 else "other")
    )
    found |= {(field, getattr(case, field)) for field in FAMILIES}
    if case.initial_state is not None:
        found.add(("states family with a state", case.states))
    found |= {
        ("published", name)
        for name, families in PUBLISHED.items()
        if all(getattr(case, field) == family for field, family in families.items())
    }
    return found


def wanted() -> set[tuple[str, object]]:
    """Every class that 2,000 cases have to reach, from harness.md and operator.md."""
    table: dict[str, object] = {
        "length": range(5),
        "around a multiple of 16": [
            *((multiple, off) for multiple in (16, 32, 48, 64) for off in (-1, 0, 1)),
            *range(80, 289, 16),
        ],
        "around a multiple of 64": [*((multiple, off) for multiple in (64, 128, 192) for off in (-1, 0, 1)), 256],
        "tail of a block of 16": range(16),
        "form": [
            *("fixed", "int32", "int64"),
            *(f"{form}, {count}" for form in ("fixed", "int32", "int64") for count in ("one", "several")),
        ],
        "heads": range(1, 5),
        "lengths": [
            "no tokens",
            "no tokens, packed",
            "no tokens, fixed",
            "empty first",
            "empty last",
            "empty between",
            "a tail before another sequence",
            "unequal",
            "one long among tiny",
            "many tiny",
            "more than 32 sequences",
            "one long",
        ],
        "lower_bound": [-5, 0, "tiny", -0.5, -1.5, -2.5, -3.5, -4.5],
        "states": STATE_COMBINATIONS,
        "layout": ["contiguous", *(f"strided, pattern {pattern}" for pattern in range(4))],
        "scale": ["zero", "negative", "usual", "other"],
        **FAMILIES,
        "states family with a state": FAMILIES["states"],
        "published": PUBLISHED,
    }
    # The field "states" has both its combinations and its families.
    table["states"] = [*STATE_COMBINATIONS, *FAMILIES["states"]]
    return {(name, value) for name, values in table.items() for value in values}


def test_two_thousand_cases_reach_every_class(sample):
    reached = Counter(found for case in sample for found in classes(case))
    missing = sorted((name, str(value)) for name, value in wanted() if not reached[name, value])
    table = "\n".join(f"{count:5}  {name}: {value}" for (name, value), count in sorted(reached.items(), key=str))
    assert not missing, f"never drawn: {missing}\n{table}"


def test_the_state_combinations_are_all_that_a_case_accepts():
    dtypes = (None, "bf16", "fp32")
    every = {(a, b, False) for a in dtypes for b in dtypes} | {(a, a, True) for a in dtypes if a}
    assert set(STATE_COMBINATIONS) == every and len(STATE_COMBINATIONS) == len(every)


def test_edge_lengths_surround_every_multiple():
    assert edge_lengths(66) == [0, 1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65]
    assert edge_lengths(16) == [0, 1, 2, 3, 15, 16] and edge_lengths(0) == [0]
    assert {1023, 1024, 1025, 65535, 65536} <= set(edge_lengths(65536))


def test_cases_for_a_cpu_are_small(sample):
    assert len(sample) >= 1500 and len(set(sample)) > 0.8 * len(sample)
    usual = [case for case in sample if case.tokens <= 300 and case.n_seqs <= 40 and case.heads <= 4]
    assert len(usual) > 0.85 * len(sample)
    assert max(case.tokens * case.heads for case in usual) <= 500
    assert mean(case.tokens for case in usual) < 110  # similar keys come with a chunk or more
    assert not any(lens in PUBLISHED_LENS for lens in (case.seq_lens for case in sample))


def test_some_cases_for_a_cpu_have_many_of_something(sample):
    """More than fit into a byte, a warp or a tile of whatever a kernel takes for enough."""
    assert 2000 < max(case.tokens for case in sample) <= 2100 and 256 < max(case.n_seqs for case in sample) <= 300
    assert max(case.heads for case in sample) == 16
    for case in sample:
        assert (case.tokens > 300) + (case.n_seqs > 40) + (case.heads > 4) <= 1 and case.tokens * case.heads <= 2100
    for many in (lambda case: case.tokens > 1024, lambda case: case.n_seqs > 64, lambda case: case.heads > 4):
        assert sum(map(many, sample)) > 0.008 * len(sample)
    assert any(case.tokens % 1024 == 0 for case in sample if case.tokens)
    assert any(len(lens) > 8 and max(lens) > 8 * sum(lens) / len(lens) for lens in (case.seq_lens for case in sample))


@pytest.mark.parametrize("profile", [GPU, LONG], ids=lambda profile: profile.name)
def test_larger_profiles_keep_their_limits_and_reach_their_shapes(profile):
    drawn = draw(profile, 600)
    free = [case for case in drawn if case.seq_lens not in profile.fixed_lens]
    for case in free:
        assert case.tokens <= profile.max_tokens and case.n_seqs <= profile.max_seqs and case.heads <= profile.max_heads
        assert case.heads == 1 or case.tokens * case.heads <= profile.max_token_heads
        assert case.heads == 1 or case.n_seqs * case.heads <= profile.max_state_heads
    assert max(case.tokens for case in free) > 0.9 * profile.max_tokens
    assert max(case.heads for case in free) > 0.7 * profile.max_heads
    assert max(case.n_seqs for case in free) > 0.5 * profile.max_seqs
    assert set(PUBLISHED_LENS) <= {case.seq_lens for case in drawn}


def test_the_limits_of_the_profiles():
    assert list(PROFILES) == ["cpu", "gpu", "long"]
    assert [(profile.max_tokens, profile.max_heads) for profile in PROFILES.values()] == [
        (300, 4),
        (2048, 16),
        (65536, 96),
    ]


def test_drawing_is_quick_and_repeatable():
    draw(CPU, 100)
    start = time.process_time()
    first = draw(CPU, 100)
    assert time.process_time() - start < 1
    assert draw(CPU, 100) == first


SIMPLEST = replace(PLAIN, seq_lens=(0,), cu_seqlens_dtype="int32", scale=1.0, initial_state=None, final_state=None)
COMPLEX = replace(
    PLAIN,
    seq_lens=(3, 0, 129, 64, 17, 1, 0, 65),
    heads=4,
    packed=True,
    lower_bound=-2.517,
    scale=-0.1,
    initial_state="bf16",
    final_state="bf16",
    in_place=True,
    layout="strided",
    queries="near_epsilon",
    keys="mixed_norms",
    values="spiky",
    gates="cancelling",
    betas="infinite",
    states="structured",
    seed=123456789,
)
MANY_TINY = replace(COMPLEX, seq_lens=(1, 0, 2, 3) * 10, heads=1)


@pytest.mark.parametrize(
    ("start", "fails", "expected"),
    [
        (COMPLEX, lambda case: True, {}),
        (COMPLEX, lambda case: case.packed and any(n % 64 for n in case.seq_lens), {"seq_lens": (1,), "packed": True}),
        (
            COMPLEX,
            lambda case: case.heads >= 2 and case.initial_state == "bf16",
            {"heads": 2, "initial_state": "bf16"},
        ),
        (COMPLEX, lambda case: max(case.seq_lens) > 64, {"seq_lens": (65,)}),
        (
            COMPLEX,
            lambda case: any(n == 0 for n in case.seq_lens[1:-1]) and min(case.seq_lens[0], case.seq_lens[-1]) > 0,
            {"seq_lens": (1, 0, 1), "packed": True},
        ),
        (
            COMPLEX,
            lambda case: case.in_place and case.layout == "strided",
            {"initial_state": "fp32", "final_state": "fp32", "in_place": True, "layout": "strided"},
        ),
        (
            COMPLEX,
            lambda case: case.keys == "mixed_norms" and case.tokens > 3 and case.gates == "cancelling",
            {"seq_lens": (4,), "keys": "mixed_norms", "gates": "cancelling"},
        ),
        (COMPLEX, lambda case: case.lower_bound > -5 and case.scale < 0, {"lower_bound": -1.0, "scale": -0.1}),
        (COMPLEX, lambda case: case.seed % 100 == 89, {"seed": 123456789}),
        (MANY_TINY, lambda case: case.n_seqs >= 7, {"seq_lens": (0,) * 7}),
        (MANY_TINY, lambda case: case.seq_lens.count(3) >= 1, {"seq_lens": (3,)}),
    ],
    ids=[
        *("anything", "packed tail", "two heads and a bf16 state", "longer than a chunk", "empty between", "in place"),
        *("two families", "bound and scale", "seed", "seven sequences", "one of many"),
    ],
)
def test_a_failing_case_shrinks_to_what_matters_in_few_calls(start, fails, expected):
    calls = []

    def counted(case: Case) -> bool:
        calls.append(case)
        return fails(case)

    settings = hypothesis.settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    smallest = hypothesis.find(smaller(start), counted, settings=settings, random=Random(0))
    assert smallest == replace(SIMPLEST, **expected)
    assert len(calls) < 300 and len(set(calls)) < 150


@pytest.mark.parametrize("start", [COMPLEX, SIMPLEST, MANY_TINY], ids=["complex", "simplest", "many tiny"])
def test_the_case_itself_is_drawn_often(start):
    """So that the search starts at the failure, and not at what happens to fail too."""
    drawn = examples(smaller(start), 0, 200)
    assert drawn.count(start) > 0.1 * len(drawn)


def test_simplifying_never_complicates():
    """Of what a field may be, simplest first, up to what the case has."""
    middle = replace(SIMPLEST, lower_bound=-1.0, initial_state="fp32", final_state="bf16")
    for start, bounds, initial, final in (
        (SIMPLEST, {-5.0}, {None}, {None}),
        (middle, {-5.0, -1.0}, {None, "fp32"}, {None, "fp32", "bf16"}),
    ):
        for case in examples(smaller(start), 0, 100):
            assert case.lower_bound in bounds and case.initial_state in initial and case.final_state in final
            assert case.scale == 1.0 and case.keys == "random" and case.tokens == 0


def test_hundreds_of_sequences_stay_few_draws():
    """They are simplified in groups; a second search, from where the first ended, takes the groups apart."""
    case, calls = replace(MANY_TINY, seq_lens=(2, 1, 3) * 100), 0

    def fails(smaller_case: Case) -> bool:
        nonlocal calls
        calls += 1
        return smaller_case.seq_lens.count(3) >= 2

    settings = hypothesis.settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    for _ in range(2):
        case = hypothesis.find(smaller(case), fails, settings=settings, random=Random(0))
    assert case == replace(SIMPLEST, seq_lens=(3, 3))
    assert calls < 300
