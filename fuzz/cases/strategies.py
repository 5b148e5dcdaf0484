"""Strategies: how Hypothesis draws cases, and how it simplifies one that failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

from fuzz.cases.case import CU_SEQLENS_DTYPES, LAYOUTS, Case
from fuzz.cases.families import FAMILIES, PUBLISHED

Option = TypeVar("Option")


def _draw_by_the_seed_alone() -> None:
    """Keeps Hypothesis from mixing into its draws the literals of whatever modules are loaded from a checkout.

    With them the same seed draws other cases in another process, after an edit anywhere, or once the package is
    installed. There is no setting for it; versions that do not do it have nothing to replace.
    """
    if hasattr(providers, "_get_local_constants"):
        none = providers.Constants()
        providers._get_local_constants = lambda: none
        providers.CONSTANTS_CACHE.cache.clear()


_draw_by_the_seed_alone()

USUAL_SCALE = 128**-0.5

STATE_COMBINATIONS: tuple[tuple[str | None, str | None, bool], ...] = (
    (None, None, False),
    (None, "fp32", False),
    (None, "bf16", False),
    ("fp32", None, False),
    ("bf16", None, False),
    ("fp32", "fp32", False),
    ("fp32", "bf16", False),
    ("bf16", "fp32", False),
    ("bf16", "bf16", False),
    ("fp32", "fp32", True),
    ("bf16", "bf16", True),
)
"""Every (initial_state, final_state, in_place) that a case accepts."""

PUBLISHED_LENS = ((1300, 547, 2048, 963, 271, 3063), (1024,) * 8, (8192,))
"""The shapes on which published kernels were timed."""

_OTHER_TIMED_LENS = (
    (512,),
    (4096,),
    (32768,),
    (65536,),
    (2048,) * 8,
    (128,) * 64,
    (64,) * 256,
    (1,) * 256,
    (17,) * 300,
)


@dataclass(frozen=True)
class Profile:
    """How large the cases of a campaign are."""

    name: str
    max_tokens: int
    """Of all sequences together."""
    typical_length: int
    """Lengths up to about this one are drawn alike, longer ones more seldom."""
    max_heads: int
    max_seqs: int
    max_token_heads: int
    """Tokens times heads, so that the most of both do not meet."""
    max_state_heads: int
    """Sequences times heads: each has a state of 64 KB in fp32."""
    many_tokens: int = 0
    """One case in twenty is a single sequence of up to so many, beyond max_tokens; 0: none is."""
    many_seqs: int = 0
    """And one in twenty has up to so many sequences of no token or one, beyond max_seqs."""
    many_heads: int = 0
    """And one in twenty has up to so many heads and few tokens, beyond max_heads."""
    fixed_lens: tuple[tuple[int, ...], ...] = ()
    """Lengths that are drawn as they stand, whatever max_tokens says."""
    fixed_share: int = 8
    """One case in so many has fixed lengths."""
    gpu_memory: float = 1.0
    """GiB that a worker takes on a GPU for the largest cases, the float64 of the oracle and the judge included."""


CPU = Profile("cpu", 300, 20, 4, 40, 500, 64, many_tokens=2100, many_seqs=300, many_heads=16)
# A step of the oracle costs much the same for one token of one head as for a token of thousands, so what decides how
# many cases are judged in a second is the longest sequence of each: 380 tokens on average.
GPU = Profile("gpu", 2048, 128, 16, 400, 1 << 15, 1 << 11, fixed_lens=PUBLISHED_LENS, fixed_share=32, gpu_memory=5.0)
LONG = Profile(
    "long", 65536, 4096, 96, 1024, 1 << 20, 1 << 14, fixed_lens=PUBLISHED_LENS + _OTHER_TIMED_LENS, gpu_memory=28.0
)

PROFILES: dict[str, Profile] = {profile.name: profile for profile in (CPU, GPU, LONG)}


def edge_lengths(longest: int) -> list[int]:
    """0 to 3 and the neighbours of every multiple of 16 up to 1024, and of 1024 beyond; none above `longest`."""
    multiples = [*range(16, min(longest, 1024) + 2, 16), *range(2048, longest + 2, 1024)]
    edges = {0, 1, 2, 3, *(multiple + off for multiple in multiples for off in (-1, 0, 1))}
    return sorted(edge for edge in edges if edge <= longest)


# Hypothesis alters most of what it draws by copying one draw over another of the same kind, which here would only make
# near-duplicates of few cases (measured: 2,000 draws had some 350 independent ones). It does so where draws look alike;
# so each field is sampled from a collection of its own, and lists of lengths come out of one random number generator.


def _usually(options: Sequence[Option], weight: int) -> st.SearchStrategy[Option]:
    """The first option with as much weight as `weight` others."""
    return st.sampled_from((options[0],) * weight + tuple(options[1:]))


def _favour(edge: int) -> int:
    """How much more often a length comes that is within one of a multiple of a usual chunk or block, where states are
    handed over and another code may begin.
    """
    return next((times for step, times in ((64, 8), (32, 6), (16, 3)) if edge > 3 and (edge + 1) % step <= 2), 1)


@lru_cache
def _weighted_lengths(longest: int, typical: int) -> tuple[int, ...]:
    """Edges, each as often as its weight says, and a fourth of any lengths up to twice the typical one."""
    weighted = []
    for edge in edge_lengths(longest):
        weight = 32 * (typical / (typical + edge)) ** 2
        weighted += [edge] * max(1, round(_favour(edge) * weight))
    most = min(longest, 2 * typical)
    count = len(weighted) // 3
    return tuple(weighted) + tuple(most * index // count for index in range(count))


# Similar keys amplify what is wrong in the inverse from token to token, so they come with a chunk or more of them.
_AMPLIFYING = ("collinear", "collinear_strong", "equal")
_AMPLIFYING_LENGTH = 63
_TINY_LENGTHS = (0, 1, 2, 3) * 8 + (15, 16, 17)
_PACKINGS = ("one",) * 17 + ("several",) * 8 + ("equal",) * 10 + ("many tiny",) * 4 + ("one long",) * 2
_BEYOND = ("many sequences", "many tokens") * 2
_LONG_EDGES = tuple(n + off for n in (512, 1024, 2048) for off in (-1, 0, 0, 0, 1))
_FEW_TOKENS, _FEW_SEQS, _ONE_IN = 30, 4, 8  # of cases with few of both, so many have many heads
_FAMILY_NAMES = {name: _usually(families, 1 + len(families) // 3) for name, families in FAMILIES.items()}
# A state handed from channel to channel, and one that hardly changes over many tokens: what came long ago decides the
# results, if keys, gates, betas and values let it.
_RELAY = {
    "keys": ("relay",),
    "gates": ("relay",),
    "betas": ("near_one", "plus_infinity", "plus_5", "random"),
    "values": ("early", "early", "random", "zero"),
    "queries": ("random",),
}
_HISTORY = {
    "keys": ("random", "one_hot", "relay"),
    "gates": ("weak_12", "equal", "slow_channel", "weak_8", "slow_channel", "all_but_one_channel"),
    "betas": ("near_zero", "faint", "near_zero", "random"),
    "values": ("early", "early", "random", "zero"),
    "queries": ("random",),
    "states": ("large", "random", "structured"),
}
_LONG_HISTORY = {"betas": ("near_zero", "faint", "near_zero"), "values": ("early", "random")}
_COMBINED = (None,) * 17 + ("vanishing", "history", "relay", "relay")
_RELAYED_LENGTH = 36
# Rows next to nothing where all decays: what underflows then is another combination that independent draws would miss.
_VANISHING = {"queries": "tiny", "gates": "saturated_closed"}
_LOWER_BOUNDS = ("lowest",) * 8 + ("none",) * 4 + ("least",) + ("any",) * 7
_SCALE = _usually((USUAL_SCALE, 1.0, 0.0, -USUAL_SCALE, -1.0, 1e-3, 10.0), 8)


def _fitted(lens: Sequence[int], tokens: int) -> tuple[int, ...]:
    """Each sequence cut to what the ones before it have left of the tokens."""
    fitted = []
    for length in lens:
        fitted.append(min(length, tokens))
        tokens -= fitted[-1]
    return tuple(fitted)


@st.composite
def _seq_lens(draw: st.DrawFn, profile: Profile, at_least: int, long: bool = False) -> tuple[int, ...]:
    """at_least: one sequence of so many tokens or more. long: half of those are as long as the profile allows."""
    if profile.fixed_lens and draw(st.sampled_from(range(profile.fixed_share))) == profile.fixed_share - 1:
        return draw(st.sampled_from(profile.fixed_lens))
    longest = profile.max_tokens
    lengths = _weighted_lengths(longest, profile.typical_length)
    if long and at_least and profile.many_tokens and draw(st.sampled_from((False, True))):
        return (draw(st.sampled_from([each for each in _LONG_EDGES if each <= profile.many_tokens])),)
    if at_least:
        return (draw(st.sampled_from([length for length in lengths if length >= at_least])),)
    packing = draw(st.sampled_from(_PACKINGS + _BEYOND if profile.many_tokens else _PACKINGS))
    if packing == "one":
        return (draw(st.sampled_from(lengths)),)
    random = draw(st.randoms(use_true_random=True))
    if packing == "many tokens":
        edges = [each for each in _LONG_EDGES if longest < each <= profile.many_tokens]
        return (random.choice(random.choice((range(longest + 1, profile.many_tokens + 1), edges))),)
    if packing == "several":
        return _fitted(random.choices(lengths, k=random.randint(2, 3)), longest)
    if packing == "equal":
        length = random.choice(random.choice((lengths, [each for each in lengths if each > 64])))
        return (length,) * min(random.randint(2, 4), max(1, longest // max(1, length)))
    if packing == "many tiny":
        return _fitted(random.choices(_TINY_LENGTHS, k=random.randint(6, profile.max_seqs)), longest)
    if packing == "many sequences":
        most = random.choice((2 * profile.max_seqs,) * 2 + (256, profile.many_seqs))  # a byte counts to 255
        return tuple(random.choices((0, 1, 1), k=random.randint(most - 40, most)))
    lens = random.choices(_TINY_LENGTHS, k=random.randint(0, random.choice((3, 15))))
    lens.insert(random.randint(0, len(lens)), random.randint(longest // 2, longest))
    return _fitted(lens, longest)


@st.composite
def _lower_bound(draw: st.DrawFn) -> float:
    """Both ends often; else thousandths, as dense as matters, and readable."""
    which = draw(st.sampled_from(_LOWER_BOUNDS))
    if which == "lowest":
        return -5.0
    if which == "none":
        return 0.0
    # Of long ranges Hypothesis draws the beginning far more often than the rest.
    random = draw(st.randoms(use_true_random=True))
    return random.choice((-1e-3, -1e-6)) if which == "least" else -random.randint(1, 4999) / 1000


@st.composite
def cases(draw: st.DrawFn, profile: Profile = CPU) -> Case:
    """Cases of a profile: every family, edge and combination comes up, the plain ones more often."""
    # The published inputs one time in four, as they are combinations that independent draws would miss.
    published = draw(st.sampled_from((*(None,) * 15, *PUBLISHED)))
    combined = None if published is not None else draw(st.sampled_from(_COMBINED))
    at_least = _AMPLIFYING_LENGTH if published in _AMPLIFYING else 0
    if combined in ("relay", "history"):
        at_least = draw(st.sampled_from((0, _RELAYED_LENGTH, _RELAYED_LENGTH)))
    seq_lens = draw(_seq_lens(profile, at_least, long=combined == "history"))
    very_long = bool(profile.many_tokens) and max(seq_lens) > profile.max_tokens
    # Few cases are so long, and what came long ago shows in no others.
    if very_long and published is None and combined is None and draw(st.sampled_from((False, True))):
        combined = "history"
    most_heads = min(
        profile.max_heads,
        max(1, profile.max_token_heads // max(1, sum(seq_lens))),
        max(1, profile.max_state_heads // len(seq_lens)),
    )
    # Few heads more often: 1, then 1 and 2, then 1 to 3, and so on.
    heads = draw(st.sampled_from([count for most in range(1, most_heads + 1) for count in range(1, most + 1)]))
    few = sum(seq_lens) <= _FEW_TOKENS and len(seq_lens) <= _FEW_SEQS
    if profile.many_heads and few and draw(st.sampled_from(range(_ONE_IN))) == _ONE_IN - 1:
        heads = draw(st.sampled_from(range(profile.max_heads + 1, profile.many_heads + 1)))
    # Several sequences come more often without cu_seqlens, because few packings allow it.
    alike = len(set(seq_lens)) == 1
    packed = not alike or draw(st.sampled_from((True, False) if len(seq_lens) == 1 else (True, False, False, False)))
    initial_state, final_state, in_place = draw(st.sampled_from(STATE_COMBINATIONS))
    families = {name: draw(strategy) for name, strategy in _FAMILY_NAMES.items()}
    lower_bound = draw(_lower_bound())
    if published is not None:
        families |= PUBLISHED[published]
    elif combined == "vanishing":
        families |= _VANISHING
        lower_bound = -5.0
    elif combined is not None:
        chosen = _RELAY if combined == "relay" else _HISTORY
        families |= {name: draw(st.sampled_from(options)) for name, options in chosen.items()}
        if combined == "history" and very_long:
            families |= {name: draw(st.sampled_from(options)) for name, options in _LONG_HISTORY.items()}
        if combined == "relay" and lower_bound > -4:
            lower_bound = -5.0
    return Case(
        seq_lens=seq_lens,
        heads=heads,
        packed=packed,
        cu_seqlens_dtype=draw(st.sampled_from(CU_SEQLENS_DTYPES)),
        lower_bound=lower_bound,
        scale=draw(_SCALE),
        initial_state=initial_state,
        final_state=final_state,
        in_place=in_place,
        layout=draw(_usually(LAYOUTS, 2)),
        **families,
        seed=draw(st.integers(0, 2**32 - 1)),
    )


# Sequences are simplified in at most this many neighbouring groups, so that hundreds of them stay a few draws.
_GROUPS = 32


@st.composite
def smaller(draw: st.DrawFn, case: Case) -> Case:
    """The case itself, often, or simplifications of it, for `hypothesis.find`.

    Each field costs one integer: 0 is its simplest value, larger integers are less simple ones, and all beyond the last
    keep what the case has. The number of draws depends on `case` alone, so that Hypothesis, which lowers integers
    towards 0 one by one, moves from `case` to the simplest case that still fails. What it lowers first comes first.
    Fewer sequences, shorter ones, fewer heads, not packed, contiguous, no states, plain families, seed 0.
    """
    groups = min(len(case.seq_lens), _GROUPS)
    # An evenly drawn integer keeps its field but one time in `spread`, and all together nearly always. One of twenty
    # is not drawn evenly but a number that Hypothesis likes: the wider the range, the fewer of those change a field.
    spread = 16 * (16 + groups)

    def at_most(most: int) -> int:
        """An integer in [0, most], nearly always `most`."""
        return min(draw(st.integers(0, (most + 1) * spread - 1)), most)

    def simplest(*options: Option, kept: Option) -> Option:
        """The options stand in order, simplest first; what the case has is never made less simple."""
        index = at_most(len(options))
        simpler = options[: options.index(kept)] if kept in options else options
        return simpler[index] if index < len(simpler) else kept

    n_seqs = at_most(len(case.seq_lens))
    lens: list[int] = []
    for group in range(groups):
        members = case.seq_lens[group * case.n_seqs // groups : (group + 1) * case.n_seqs // groups]
        # 0 drops the group, n + 1 cuts its sequences to n tokens.
        limit = at_most(max(members) + 1)
        if limit:
            lens += [min(length, limit - 1) for length in members]
    seq_lens = tuple(lens[:n_seqs]) or (0,)

    heads = max(1, at_most(case.heads))
    packed = simplest(False, kept=case.packed) or len(set(seq_lens)) > 1
    initial_state = simplest(None, "fp32", kept=case.initial_state)
    final_state = simplest(None, "fp32", kept=case.final_state)
    in_place = simplest(False, kept=case.in_place) and initial_state == final_state and initial_state is not None
    return Case(
        seq_lens=seq_lens,
        heads=heads,
        packed=packed,
        cu_seqlens_dtype=simplest(CU_SEQLENS_DTYPES[0], kept=case.cu_seqlens_dtype),
        lower_bound=simplest(-5.0, -1.0, 0.0, kept=case.lower_bound),
        scale=simplest(1.0, USUAL_SCALE, kept=case.scale),
        initial_state=initial_state,
        final_state=final_state,
        in_place=in_place,
        layout=simplest("contiguous", kept=case.layout),
        **{name: simplest(names[0], kept=getattr(case, name)) for name, names in FAMILIES.items()},
        seed=simplest(0, 1, kept=case.seed),
    )
