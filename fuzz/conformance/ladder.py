"""The ladder: the fixed rows that `python -m fuzz conform` holds every target to, wrong numbers before bad arguments.

A row is a few cases and the checks of them. Its id never changes its meaning. A change that adds, removes or alters a
row increments `LADDER_VERSION`. So cards of one version can be compared row by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fuzz.cases import plain
from fuzz.cases.case import Case
from fuzz.cases.families import FAMILIES, PUBLISHED
from fuzz.cases.strategies import PUBLISHED_LENS

LADDER_VERSION = 8

RUNGS = {
    "edges": "The edges that docs/operator.md says must hold.",
    "families": "Every family of inputs, by its worst error over its bound.",
    "properties": "The properties of docs/operator.md, which need no oracle; the number is that of the page.",
    "shapes": "The shapes on which published kernels were timed.",
    "fuzz": "Random cases of the default strategies.",
    "arguments": "Bad arguments raise the documented error, which names the argument, before anything is written.",
}

ARGUMENTS = "arguments"  # what a target is exempt from that checks none


@dataclass(frozen=True)
class Row:
    """One row of the ladder.

    id: rung and name.
    properties: names of checks (`fuzz.judging.checks`) for each case, or number of properties to choose.
    checks: names of the checks that decide the row; empty for the whole verdict. An exception, a hang or a crash fails
    any row.
    known: whether published kernels had this failure. No target is exempt from such a row.
    note: what is smaller on this machine.
    """

    id: str
    title: str
    cases: tuple[Case, ...]
    properties: tuple[str, ...] | int = ()
    checks: tuple[str, ...] = ()
    known: bool = False
    note: str = ""

    @property
    def rung(self) -> str:
        return self.id.partition("/")[0]


SHORT_CASE = replace(plain.PLAIN, seq_lens=(24,), seed=1)


def packed(*seq_lens: int, **changes) -> Case:
    return replace(SHORT_CASE, seq_lens=seq_lens, packed=True, **changes)


def batch(*seq_lens: int, **changes) -> Case:
    return replace(SHORT_CASE, seq_lens=seq_lens, **changes)


def ladder(device: str, fuzz_cases: tuple[Case, ...], profile: str) -> list[Row]:
    """All rows for a target on `device`, "cpu" or "cuda". fuzz_cases: those of the last rung, drawn from `profile`."""
    return [
        *edges(device),
        *families(),
        *properties(),
        *shapes(device),
        Row("fuzz/random", f"{len(fuzz_cases)} random cases, profile {profile}", fuzz_cases, 1),
        *arguments(),
    ]


def arguments() -> Iterator[Row]:
    """One call for each documented error: three sequences and both states, so that everything can be wrong."""
    from fuzz.judging.refusals import REFUSALS

    for name, refusal in REFUSALS.items():
        # Along an axis of one head any stride is right. The other rows have one, which fla's interpreted kernels reach.
        case = packed(2, 0, 1, heads=2 if refusal.name.endswith("-stride") else 1)
        yield Row(f"arguments/{refusal.name}", refusal.title, (case,), (name,), (name,), known=refusal.known)


def edges(device: str) -> Iterator[Row]:
    def row(name: str, title: str, *cases: Case, **options) -> Row:
        return Row(f"edges/{name}", title, cases, **options)

    yield row(
        "empty-sequence",
        "A sequence of length 0 writes no row, and its final state is its initial state, or zero",
        packed(0, 5, 0, 3),
        packed(5, 0, initial_state=None),
        packed(0, 70, 0, heads=2, initial_state="bf16"),
    )
    yield row("no-tokens", "T = 0, packed and as a batch", packed(0), packed(0, 0, initial_state=None), batch(0, 0))
    for length in (1, 15, 16, 17, 63, 64, 65):
        cases = batch(length), packed(length, length), packed(length, 3, length, heads=2, final_state="bf16")
        yield row(f"length-{length}", f"{length} token{'s' * (length > 1)}", *cases)
    short = tuple(packed(length, 16 - length) for length in range(9))
    yield row("tails-16", "Every tail of a block of 16, before another sequence", *short)
    yield row("tails-64", "Every tail of a chunk of 64, before another sequence", packed(*range(1, 65)))
    many = 20_000 if device == "cuda" else 300
    yield row(
        "many-sequences",
        "20000 sequences of 0 to 3 tokens",
        packed(*(n % 4 for n in range(many)), initial_state=None),
        note="" if device == "cuda" else "300 sequences, as on a CPU",
    )
    yield row(
        "lower-bound-0",
        "lower_bound = 0: no decay at all",
        batch(24, lower_bound=0.0),
        batch(70, lower_bound=0.0, gates="saturated_closed"),
        packed(130, 17, heads=2, lower_bound=0.0, betas="near_one"),
    )
    yield row(
        "full-decay",
        "lower_bound = -5 with a saturated gate: a chunk decays by exp(-320); no overflow, no NaN",
        batch(24, gates="plus_infinity"),
        batch(65, gates="saturated_closed"),
        packed(130, 64, heads=2, gates="plus_infinity"),
        packed(200, heads=2, gates="exact_bounds", initial_state=None),
    )
    yield row(
        "zero-rows",
        "A key or query row of zeros is zero after normalisation, not NaN",
        batch(24, keys="zero_rows"),
        batch(24, queries="zero_rows"),
        packed(70, 17, heads=2, keys="zero_rows", queries="zero_rows"),
    )
    collinear = [batch(tokens, **PUBLISHED[name]) for tokens in (24, 65, 256) for name in PUBLISHED if "equal" in name]
    collinear += [batch(tokens, **PUBLISHED[name]) for tokens in (24, 65, 256) for name in PUBLISHED if "coll" in name]
    yield row("collinear-keys", "Equal or nearly collinear keys, weak decay, beta near 1", *collinear)
    yield row(
        "in-place",
        "final_state may be initial_state, with the same bits",
        packed(9, 5, in_place=True),
        packed(65, 0, 17, heads=2, initial_state="bf16", final_state="bf16", in_place=True),
        properties=("in_place",),
    )
    wide = packed(7, 0, 9)
    name = ("wide_offsets",)
    yield row(
        "64-bit-offsets", "Inputs whose elements lie more than 2^31 elements apart", wide, properties=name, checks=name
    )
    strided = tuple(packed(9, 5, layout="strided", seed=seed) for seed in range(4))
    longer = tuple(batch(70, 70, heads=2, layout="strided", seed=seed) for seed in range(4))
    yield row("strided", "Inputs that are slices of a fused projection, aligned and not", *strided, *longer)


def families() -> Iterator[Row]:
    """A short case that any target should take, one over a chunk, and a larger one that makes the family matter.

    And one for kernels that take packed int64 calls with fp32 states only, as those of serving engines do.
    """
    for kind, names in FAMILIES.items():
        for name in names:
            # Keys and betas matter where little is forgotten; the rest matters where the state is not all there is.
            gates = {} if kind == "gates" else {"gates": "weak_8"}
            hard = {**gates, **({} if kind == "betas" else {"betas": "plus_3"}), kind: name}
            yield Row(
                f"families/{kind}-{name}",
                f"{kind} {name}",
                (
                    batch(24, **{kind: name}),
                    batch(65, **hard, initial_state="fp32" if kind == "states" else None, lower_bound=-2.5),
                    packed(17, 0, 130, heads=2, **hard, initial_state="bf16", final_state="bf16", layout="strided"),
                    packed(20, 75, heads=2, **hard, lower_bound=-2.5),
                ),
            )


def properties() -> Iterator[Row]:
    from fuzz.judging.checks import applicable

    cases = (
        packed(9, 5),
        batch(12, heads=2),
        batch(6, 6),
        batch(65, **PUBLISHED["collinear"]),
        packed(70, 0, 33, 130, heads=2),
        packed(70, 1, 130, heads=3, layout="strided", gates="weak", betas="near_one", initial_state="bf16", seed=2),
    )
    for name, (number, title) in PROPERTY_TITLES.items():
        fitting = tuple(case for case in cases if applicable(name, case))
        yield Row(f"properties/{name}", f"{number}. {title}", fitting, (name,), (name,))
    # The judge poisons every output with NaN anyway.
    title = "10. Every output element is written, and nothing beside them"
    yield Row("properties/written", title, cases, (), ("written", "outputs_within", "inputs_untouched"))


PROPERTY_TITLES = {
    "packing": (1, "A packed call equals one call per sequence, bitwise"),
    "heads": (2, "Permuting heads permutes the results, bitwise"),
    "batch_form": (3, "Batch and varlen forms of the same data agree, bitwise"),
    "causality": (4, "What happens at token t leaves outputs before t unchanged, bitwise"),
    "determinism": (5, "The same call twice gives the same bits"),
    "continuation": (6, "Running [0, t) and then [t, T) from the fp32 state equals one run, within tolerance"),
    "chunk_continuation": (6, "The same, bitwise where t is a multiple of 64"),
    "scaling": (7, "v and the state times 2^j scale the results by exactly 2^j"),
    "value_columns": (8, "Permuting V channels permutes those of the results, bitwise"),
    "key_channels": (8, "Permuting K channels changes nothing else, within tolerance"),
    "beta_off": (9, "Beta logits of -inf leave the state to decay only"),
    "gate_off": (9, "A gate logit of -inf means no decay"),
    "layout": (11, "Strided and contiguous inputs and outputs give the same bits"),
    "checkpoints": (12, "A checkpoint is the final state of a call on the prefix, bitwise"),
    "state_pool": (13, "Rows of a pool give the bits of their copies, and other rows keep theirs"),
    "rows_behind": (14, "Rows behind the last sequence are neither read nor written"),
}
"""The properties of docs/operator.md with their numbers there, by the check that asks for each."""

SHAPE_NAMES = ("mixed", "1024x8", "8192")


def shapes(device: str) -> Iterator[Row]:
    for heads, few in ((64, 1), (96, 2)):
        for name, lens in zip(SHAPE_NAMES, PUBLISHED_LENS, strict=True):
            shown = "1024 x 8" if len(set(lens)) < len(lens) else f"[{', '.join(map(str, lens))}]"
            case = packed(*lens, heads=heads if device == "cuda" else few)
            note = "" if device == "cuda" else f"H = {few}, as on a CPU"
            yield Row(f"shapes/{name}-h{heads}", f"{shown} tokens at H = {heads}", (case,), note=note)
