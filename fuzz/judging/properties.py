"""The properties of docs/operator.md that any correct implementation has, each as a check of one target on one case.

They hold without an oracle, so most are exact: the same bits. Each function takes (target, case, inputs, outputs,
reference), where `outputs` are the target's results for `inputs`. It calls the target on inputs changed in one way, and
returns a Check. Where the specification says "within tolerance", the changed call is held to the accuracy bounds
against `reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fuzz.cases.case import Case
from fuzz.cases.inputs import DTYPES, TOKENS, WORDS, apart, fuse, make_inputs
from fuzz.cases.plain import PLAIN
from fuzz.judging.call import Outputs, within
from fuzz.judging.changed_calls import call, decay_only, two_runs
from fuzz.judging.changed_inputs import (
    all_nan_but,
    changed_later,
    contiguous,
    default_dtype,
    dirty_memory,
    draws,
    expanded,
    flat,
    heads_first,
    not_finite_at,
    of_sequences,
    offsets,
    one_sequence,
    other_contents,
    output_places,
    permutation,
    rows_before,
    rows_of_chosen,
    with_state,
)
from fuzz.judging.comparison import (
    HIGHEST,
    LOWEST,
    Part,
    Unsupported,
    checked,
    close,
    compared,
    named,
    same_bits,
    shown,
)
from fuzz.judging.refusals import REFUSALS
from fuzz.judging.sensitivity import LONGEST_CHUNK
from fuzz.judging.sensitivity import reference as make_reference
from fuzz.judging.serving import CHECKPOINT_STEP, MOST_CHECKPOINTS, checkpoints, rows_behind, state_pool
from fuzz.judging.verdict import Check
from fuzz.judging.wide import wide_offsets

SEQUENCES = 4  # called one by one, at most

SHORT_TOKENS = 16  # of the longest sequence that a target may compute in another way than longer ones

BAD_ARGUMENTS = {"cpu": 64, "cuda": 16}  # tried for one case, of a hundred; on a GPU each is a hundred launches

CHANGED_ALONE = 6  # arguments of which each alone is another one in a call before
AGAIN = {"cpu": 1, "cuda": 8}  # the same call for one case: a race shows in one of many, and GPUs are quick


@checked
def packing(target, case, inputs, outputs, reference) -> list[Part]:
    """A call with several sequences equals one call for each, bitwise, also where some of the others are all NaN."""
    lens = case.seq_lens
    chosen = {0, case.n_seqs - 1, lens.index(max(lens)), lens.index(min(lens))}
    others = [n for n in range(case.n_seqs) if n not in chosen]
    chosen |= set(draws(case, "packing").sample(others, min(len(others), max(0, SEQUENCES - len(chosen)))))
    parts, rows = [], inputs.seq_ranges()
    for n in sorted(chosen):
        changed = replace(case, seq_lens=(lens[n],))
        result = call(target, changed, one_sequence(inputs, n, rows[n]))
        parts.append(Part(f"sequence {n}", result, slice(*rows[n]), slice(n, n + 1)))
    draw = draws(case, "packing, NaN")
    sound = sorted(draw.sample(range(case.n_seqs), draw.randint(1, case.n_seqs - 1)))
    spoiled = call(target, contiguous(case), all_nan_but(case, inputs, sound))
    rows = rows_of_chosen(case, sound).nonzero()[:, 0].to(inputs.q.device)
    return [*parts, Part("beside NaN:", of_sequences(spoiled, rows, sound), rows, sound)]


@checked
def heads(target, case, inputs, outputs, reference) -> list[Part]:
    """Permuting heads permutes the results, bitwise."""
    order = permutation(case, "heads", case.heads).to(inputs.q.device)
    changed = {name: getattr(inputs, name)[:, :, order] for name in TOKENS}
    changed |= {"A_log": inputs.A_log[order], "dt_bias": inputs.dt_bias[order]}
    if inputs.initial_state is not None:
        changed["initial_state"] = inputs.initial_state[:, order]
    result = call(target, contiguous(case), replace(inputs, **changed))
    return [Part("", result, (slice(None), order), (slice(None), order))]


@checked
def batch_form(target, case, inputs, outputs, reference) -> list[Part]:
    """The batch form and the packed form of the same data agree, bitwise."""
    if not case.packed:
        changed = {name: getattr(inputs, name).flatten(0, 1)[None] for name in TOKENS}
        changed["cu_seqlens"] = offsets(case.seq_lens, DTYPES[case.cu_seqlens_dtype], inputs.q.device)
        return [Part("", call(target, contiguous(case, packed=True), replace(inputs, **changed)))]
    lens = case.seq_lens
    if len(set(lens)) == 1:
        changed = {name: getattr(inputs, name)[0].unflatten(0, (case.n_seqs, lens[0])) for name in TOKENS}
        return [Part("", call(target, contiguous(case, packed=False), replace(inputs, **changed, cu_seqlens=None)))]
    n = lens.index(max(lens))
    rows = inputs.seq_ranges()[n]
    alone = replace(one_sequence(inputs, n, rows), cu_seqlens=None)
    result = call(target, contiguous(case, packed=False, seq_lens=(lens[n],)), alone)
    return [Part(f"sequence {n}", result, slice(*rows), slice(n, n + 1))]


@checked
def causality(target, case, inputs, outputs, reference) -> list[Part]:
    """Changing every input from token t on leaves the outputs before t unchanged, bitwise; t differs by sequence.

    Later tokens become loud in one call: values times 2^20, closed gates. In another call they become quiet (zeros,
    open gates), random, or copies of the first key. So a scale, an anchor or a pivot of a tile changes. Or one token
    has a value that is not finite. It may reach the outputs of its chunk, and of no other sequence.
    """
    draw = draws(case, "causality")
    parts = []
    kinds = ["loud", draw.choice(("quiet", "random", "copies", NOT_FINITE, NOT_FINITE))]
    if kinds[1] == NOT_FINITE:
        parts.append(beside_not_finite(target, case, inputs, draw))
    for kind in (kind for kind in kinds if kind != NOT_FINITE):
        cuts = [draw.randint(1, length - 1) if length > 1 else length for length in case.seq_lens]
        result = call(target, contiguous(case), changed_later(case, inputs, cuts, kind))
        before = rows_before(case, cuts).nonzero()[:, 0].to(inputs.q.device)
        early = Outputs(flat(result.out)[before][None], None)
        parts.append(Part(f"before t = {shown(cuts)}, {kind} from there on:", early, before))
    return parts


NOT_FINITE = "not finite"


def beside_not_finite(target, case, inputs, draw) -> Part:
    """What a value that is not finite must not reach: other sequences, and earlier chunks of its own."""
    n = draw.choice([n for n, length in enumerate(case.seq_lens) if length])
    t = draw.randrange(case.seq_lens[n])
    changed, what = not_finite_at(case, inputs, n, t)
    result = call(target, contiguous(case), changed)
    chunk = max(LONGEST_CHUNK, target.promises.bitwise_chunk or 0)
    lengths = [t // chunk * chunk if n == number else length for number, length in enumerate(case.seq_lens)]
    rows = rows_before(case, lengths).nonzero()[:, 0].to(inputs.q.device)
    others = [number for number in range(case.n_seqs) if number != n]
    return Part(f"beside {what} at token {t} of sequence {n}:", of_sequences(result, rows, others), rows, others)


@checked
def determinism(target, case, inputs, outputs, reference) -> Check:
    """The same call gives the same bits.

    It is repeated as it is, and in the place of calls with other contents, some with one argument changed alone.
    It is repeated in dirty memory, on another stream, and with another default dtype of PyTorch.
    """
    pairs = []
    for number in range(2, 2 + AGAIN[inputs.q.device.type]):
        pairs += named(f"call {number}:", call(target, case, inputs), outputs)
    others = other_contents(case, inputs)
    alone = draws(case, "determinism").sample(sorted(others), CHANGED_ALONE)
    before = [replace(inputs, **others), *(replace(inputs, **{one: others[one]}) for one in alone)]
    what = f"where calls had other contents, then another {' or '.join(alone)} alone:"
    pairs += named(what, call(target, case, inputs, before=before), outputs)
    with dirty_memory(inputs), default_dtype(torch.bfloat16):
        result = call(target, case, inputs)
    return same_bits(pairs + named("call in dirty memory, default dtype bf16:", result, outputs))


@checked
def continuation(target, case, inputs, outputs, reference) -> Check:
    """Running [0, t) and then [t, T) from the fp32 state agrees with the oracle as one run must, for any t.

    Bounds of one run count chunks from the first token. Chunks of the second run begin at t, and may hold tokens
    together that lie in two chunks of one run. So where the bounds are exceeded, each of the two runs is judged as a
    call of its own, the second from the state that the first returned.
    """
    draw = draws(case, "continuation")
    cuts = [draw.randint(0, length) for length in case.seq_lens]
    if not case.packed:
        cuts = [draw.randint(1, case.seq_lens[0] - 1)] * case.n_seqs
    together, runs = two_runs(target, case, inputs, cuts)
    check = close(target, together, outputs, inputs, reference)
    if check.passed or reference is None:
        return check
    for what, (given, result) in zip(
        ("the first run", "the second run, from the first one's state"), runs, strict=True
    ):
        alone = close(target, result, result, given, make_reference(given, reference.out.device))
        if not alone.passed:
            return replace(alone, detail=f"{what}: {alone.detail}; together: {check.detail}")
    return alone


@checked
def chunk_continuation(target, case, inputs, outputs, reference) -> list[Part]:
    """The same is bitwise equal to one run when t is a multiple of the chunk that the target promises.

    More than 16 tokens come after t: a target may compute shorter sequences another way.
    """
    chunk = target.promises.bitwise_chunk or LONGEST_CHUNK
    if max(case.seq_lens) <= chunk + SHORT_TOKENS:
        raise Unsupported(f"no more than {SHORT_TOKENS} tokens come after a chunk of {chunk} tokens")
    draw = draws(case, "chunk_continuation")
    last = [max(0, length - 1 - SHORT_TOKENS) // chunk for length in case.seq_lens]  # whole ones before such a rest
    cuts = [chunk * draw.randint(min(1, n), n) for n in last]
    if not case.packed:
        cuts = cuts[:1] * case.n_seqs
    whole = outputs
    if inputs.in_place or inputs.final_state_dtype != torch.float32:
        whole = call(target, *with_state(case, inputs))
    return [Part(f"cut at {shown(cuts)}:", two_runs(target, case, inputs, cuts)[0], whole=whole)]


@checked
def scaling(target, case, inputs, outputs, reference) -> list[Part]:
    """`v` and the initial state times 2^j scale `out` and the final state by exactly 2^j."""
    given = (inputs.v, inputs.initial_state, outputs.out, outputs.final_state)
    sizes = torch.cat([x.float().abs().flatten() for x in given if x is not None])
    seen = (sizes > 0) & (sizes < torch.inf)
    low, high = torch.stack([sizes.where(seen, torch.inf).amin(), sizes.where(seen, 0.0).amax()]).tolist()
    if not high:
        raise Unsupported("all values and results are zero")
    exponents = [
        j
        for j in (1, -1, 7, -7, 24, -24, 60, -60)
        if low * 2.0 ** min(j, 0) >= LOWEST and high * 2.0 ** max(j, 0) <= HIGHEST
    ]
    if not exponents:
        raise Unsupported(f"values and results from {low:.2g} to {high:.2g} leave no room for a power of two")
    factor = 2.0 ** draws(case, "scaling").choice(exponents)
    changed = {"v": inputs.v * factor}
    if inputs.initial_state is not None:
        changed["initial_state"] = inputs.initial_state * factor
    result = call(target, contiguous(case), replace(inputs, **changed))
    return [Part(f"times {factor:g}:", result, factor=factor)]


@checked
def value_columns(target, case, inputs, outputs, reference) -> list[Part]:
    """Permuting the V channels of `v` and of the state permutes those of the results, bitwise."""
    order = permutation(case, "value_columns", inputs.v.shape[-1]).to(inputs.v.device)
    changed = {"v": inputs.v[..., order]}
    if inputs.initial_state is not None:
        changed["initial_state"] = inputs.initial_state[:, :, order]
    result = call(target, contiguous(case), replace(inputs, **changed))
    return [Part("", result, (..., order), (..., order, slice(None)))]


@checked
def key_channels(target, case, inputs, outputs, reference) -> Check:
    """Permuting the K channels of q, k, g, dt_bias and the state permutes those of the state, within tolerance."""
    order = permutation(case, "key_channels", inputs.k.shape[-1]).to(inputs.k.device)
    changed = {name: getattr(inputs, name)[..., order] for name in ("q", "k", "g", "dt_bias")}
    if inputs.initial_state is not None:
        changed["initial_state"] = inputs.initial_state[..., order]
    result = call(target, contiguous(case), replace(inputs, **changed))
    state = None if result.final_state is None else result.final_state[..., order.argsort()]
    return close(target, Outputs(result.out, state), outputs, inputs, reference)


@checked
def beta_off(target, case, inputs, outputs, reference) -> Check:
    """Beta logits of -inf leave the state to decay only: out = scale S0^T (q^ exp(G)), final state = exp(G) S0."""
    return decay_only(target, case, inputs, beta=torch.full_like(inputs.beta, -torch.inf))


@checked
def gate_off(target, case, inputs, outputs, reference) -> Check:
    """A gate logit of -inf means no decay: with beta logits of -inf too, the state stays what it is."""
    off = {name: torch.full_like(getattr(inputs, name), -torch.inf) for name in ("beta", "g")}
    return decay_only(target, case, inputs, **off)


@checked
def layout(target, case, inputs, outputs, reference) -> Check:
    """Strided inputs with a last stride of 1 and contiguous ones give the same bits, whatever the alignment.

    So do expanded ones, as heads that share their keys. So do strided outputs, unless the target refuses these with a
    ValueError. The specification leaves that to the target.
    """
    parts, expected = [], {}
    dense = {name: getattr(inputs, name).contiguous() for name in TOKENS}
    if case.layout == "strided":
        parts.append(Part("contiguous:", call(target, contiguous(case), replace(inputs, **dense))))
    draw = draws(case, "layout")
    kind = draw.choice(("heads first", "fused", "fused, interleaved", "apart", "mixed", "expanded", "expanded"))
    aligned = draw.random() < 0.5
    if kind == "heads first":
        changed = heads_first(dense)
    elif kind == "apart":
        changed = apart(dense, aligned=aligned)
    elif kind == "expanded":
        changed = dense | expanded(dense, draw)
        same = replace(inputs, **{name: x.contiguous() for name, x in changed.items()})
        expected = {"whole": call(target, contiguous(case), same), "inputs": same}
    elif kind == "mixed":  # no two of them need be alike
        layouts = dense, heads_first(dense), apart(dense, aligned=True), apart(dense, aligned=False)
        changed = {name: draw.choice(layouts).get(name, x) for name, x in dense.items()}
    else:
        hosted = {name: x.cpu() for name, x in dense.items()}
        hosted["out"] = torch.full_like(hosted["v"], torch.nan)
        changed = fuse(hosted, interleaved=kind == "fused, interleaved", aligned=aligned)
    beside = changed.pop("out", None)
    others = {name: getattr(inputs, name) for name in ("A_log", "dt_bias", "initial_state", "cu_seqlens")}
    changed |= apart({name: x for name, x in others.items() if x is not None}, aligned=aligned)
    strided, given = replace(case, layout="strided"), replace(inputs, **changed).to(inputs.q.device)
    places = output_places(given, draw, beside) if draw.random() < 0.5 else None
    try:
        result = call(target, strided, given, places=places)
    except ValueError:
        if places is None:
            raise
        result = call(target, strided, given)
    parts.append(Part(f"{kind}:", result, **expected))
    check, overrun = compared(target, "layout", inputs, outputs, reference, parts), within(result)
    return check if overrun.passed or not check.passed else replace(overrun, detail=f"{kind}: {overrun.detail}")


@checked
def in_place(target, case, inputs, outputs, reference) -> Check:
    """A final state written over the initial state has the same bits as one written elsewhere."""
    dtype = inputs.initial_state.dtype
    apart = replace(case, in_place=False, final_state=WORDS[dtype])
    over = replace(apart, in_place=True)
    inputs = replace(inputs, final_state_dtype=dtype)
    first = outputs if case == apart else call(target, apart, replace(inputs, in_place=False))
    second = outputs if case == over else call(target, over, replace(inputs, in_place=True))
    return same_bits(named("in place:", second, first))


@checked
def arguments(target, case, inputs, outputs, reference) -> Check:
    """Bad arguments are refused before anything is written: some of `fuzz.judging.refusals`, others for each case."""
    reason = target.reach(LEGAL)
    if reason is not None:
        raise Unsupported(f"the legal call is unsupported: {reason}")
    legal = make_inputs(LEGAL, target.device)
    chosen = draws(case, "arguments").sample(list(REFUSALS.values()), BAD_ARGUMENTS[legal.q.device.type])
    checks = (refusal(target, LEGAL, legal) for refusal in chosen)
    return next((check for check in checks if not check.passed), Check("", True))


LEGAL = replace(PLAIN, seq_lens=(4, 1, 2), heads=3, packed=True, scale=1.0)
"""Has everything that can be wrong: several sequences, and both states."""

PROPERTIES: dict[str, Callable[..., Check]] = {
    function.__name__: function
    for function in (
        packing,
        causality,
        determinism,
        continuation,
        heads,
        batch_form,
        chunk_continuation,
        scaling,
        value_columns,
        key_channels,
        beta_off,
        gate_off,
        layout,
        in_place,
        wide_offsets,
        checkpoints,
        state_pool,
        rows_behind,
        arguments,
    )
}

NEEDS: dict[str, Callable[[Case], bool]] = {
    "packing": lambda case: case.n_seqs > 1,
    "heads": lambda case: case.heads > 1,
    "batch_form": lambda case: case.tokens > 0,
    "causality": lambda case: max(case.seq_lens) > 1,
    "continuation": lambda case: max(case.seq_lens) > 1,
    "chunk_continuation": lambda case: max(case.seq_lens) > LONGEST_CHUNK + SHORT_TOKENS,
    "scaling": lambda case: case.tokens > 0 or case.initial_state is not None,
    "value_columns": lambda case: case.tokens > 0,
    "key_channels": lambda case: case.tokens > 0,
    "layout": lambda case: case.tokens > 0,
    "in_place": lambda case: case.initial_state is not None,
    "wide_offsets": lambda case: case.tokens > 1,
    "checkpoints": lambda case: case.n_seqs * case.heads <= MOST_CHECKPOINTS,
    "state_pool": lambda case: case.initial_state is not None or case.final_state is not None,
}
"""What a case must have for a property to say something about it; those not named here apply to every case."""


def ends_at_a_checkpoint(case: Case) -> bool:
    return any(length and length % CHECKPOINT_STEP == 0 for length in case.seq_lens)


RARE: dict[str, Callable[[Case], bool]] = {
    "heads": lambda case: case.heads > 2,
    "wide_offsets": lambda case: not case.packed and case.n_seqs > 1,
    "checkpoints": lambda case: max(case.seq_lens) >= (32 if case.n_seqs > 1 else 80) or ends_at_a_checkpoint(case),
    "state_pool": lambda case: case.n_seqs > 1,
}
"""What few cases are of use for: of those, a property is asked three times as often as another."""


def applicable(name: str, case: Case) -> bool:
    """Whether the property says something about the case. KeyError for an unknown name."""
    if name not in PROPERTIES:
        raise KeyError(f"property: expected one of {', '.join(PROPERTIES)}, got {name}")
    return NEEDS.get(name, lambda case: True)(case)


def choose(case: Case, n: int) -> tuple[str, ...]:
    """`n` applicable properties (fewer if there are not as many), the same ones for the same case, others by seed."""
    names = [name for name in PROPERTIES if applicable(name, case)]
    counts = [3 if name in RARE and RARE[name](case) else 1 for name in names]
    return tuple(dict.fromkeys(draws(case, "choose").sample(names, sum(counts), counts=counts)))[:n]
