"""The properties of docs/operator.md that any correct implementation has, each as a check of one target on one case.

They hold without an oracle, so most are exact: the same bits. Each function takes (target, case, inputs, outputs,
reference) with `outputs` what the target made of `inputs`, calls the target on inputs changed in one way, and returns a
Check. Where the law says "within tolerance", the changed call is held to the accuracy bounds against `reference`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from fuzz.cases.case import Case
from fuzz.cases.inputs import Inputs, apart, fuse, make_inputs
from fuzz.cases.plain import PLAIN
from fuzz.judging import bounds, errors
from fuzz.judging.judge import (
    NOT_CHECKED,
    Check,
    Outputs,
    accuracy,
    bits,
    run_target,
    sequences,
    those,
    within,
    written,
)
from fuzz.judging.sensitivity import CHUNK, ROUNDING, Reference, operands

TOKENS = ("q", "k", "v", "g", "beta")  # the inputs with a row for each token
HIGHEST, LOWEST = 2.0**100, 2.0**-100  # between these, nothing on the way to a result over- or underflows
SEQUENCES = 4  # called one by one, at most
BAD_ARGUMENTS = {"cpu": 64, "cuda": 16}  # tried for one case, of a hundred; on a GPU each is a hundred launches
AGAIN = {"cpu": 1, "cuda": 8}  # the same call for one case: a race shows in one of many, and GPUs are quick
SCRATCH = 2**21  # numbers of fp32, 8 MiB: more than a kernel needs of its own, whatever the case
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


class OutOfReach(Exception):
    """The target does not take the changed case, or the property says nothing about it. The message is the reason."""


def checked(function: Callable) -> Callable:
    """Turns OutOfReach into a passed check that says so, and names the check after the function."""
    name = function.__name__

    def check(target, case: Case, inputs: Inputs, outputs: Outputs, reference: Reference | None = None) -> Check:
        inputs = inputs.to(target.device)
        try:
            return replace(function(target, case, inputs, outputs, reference), name=name)
        except OutOfReach as reason:
            return Check(name, True, detail=f"{NOT_CHECKED}{reason}")

    check.__name__, check.__doc__ = name, function.__doc__
    return check


# ----------------------------------------------------------------------------------------------------------- the checks


@checked
def packing(target, case, inputs, outputs, reference) -> Check:
    """A call with several sequences equals one call for each, bitwise, also where some of the others are all NaN."""
    lens = case.seq_lens
    chosen = {0, case.n_seqs - 1, lens.index(max(lens)), lens.index(min(lens))}
    others = [n for n in range(case.n_seqs) if n not in chosen]
    chosen |= set(draws(case, "packing").sample(others, min(len(others), max(0, SEQUENCES - len(chosen)))))
    pairs, rows = [], inputs.seq_bounds()
    for n in sorted(chosen):
        changed = replace(case, seq_lens=(lens[n],))
        result = call(target, changed, one_sequence(inputs, n, rows[n]))
        pairs += named(f"sequence {n}", result, rows_of(outputs, n, rows[n]))
    draw = draws(case, "packing, NaN")
    sound = sorted(draw.sample(range(case.n_seqs), draw.randint(1, case.n_seqs - 1)))
    spoiled = call(target, contiguous(case), all_nan_but(case, inputs, sound))
    pairs += named("beside NaN:", *(of_sequences(case, x, sound) for x in (spoiled, outputs)))
    return same_bits(pairs)


@checked
def heads(target, case, inputs, outputs, reference) -> Check:
    """Permuting heads permutes the results, bitwise."""
    order = permutation(case, "heads", case.heads).to(inputs.q.device)
    changed = {name: getattr(inputs, name)[:, :, order] for name in TOKENS}
    changed |= {"A_log": inputs.A_log[order], "dt_bias": inputs.dt_bias[order]}
    if inputs.initial_state is not None:
        changed["initial_state"] = inputs.initial_state[:, order]
    result = call(target, contiguous(case), replace(inputs, **changed))
    state = None if outputs.final_state is None else outputs.final_state[:, order]
    return same_bits(named("", result, Outputs(outputs.out[:, :, order], state)))


@checked
def batch_form(target, case, inputs, outputs, reference) -> Check:
    """The batch form and the packed form of the same data agree, bitwise."""
    if not case.packed:
        changed = {name: getattr(inputs, name).flatten(0, 1)[None] for name in TOKENS}
        dtype = {"int32": torch.int32, "int64": torch.int64}[case.cu_seqlens_dtype]
        changed["cu_seqlens"] = offsets(case.seq_lens, dtype, inputs.q.device)
        result = call(target, contiguous(case, packed=True), replace(inputs, **changed))
        return same_bits(named("", result, Outputs(outputs.out.flatten(0, 1)[None], outputs.final_state)))
    lens = case.seq_lens
    if len(set(lens)) == 1:
        changed = {name: getattr(inputs, name)[0].unflatten(0, (case.n_seqs, lens[0])) for name in TOKENS}
        result = call(target, contiguous(case, packed=False), replace(inputs, **changed, cu_seqlens=None))
        return same_bits(named("", result, Outputs(outputs.out[0].view_as(result.out), outputs.final_state)))
    n = lens.index(max(lens))
    rows = inputs.seq_bounds()[n]
    alone = replace(one_sequence(inputs, n, rows), cu_seqlens=None)
    result = call(target, contiguous(case, packed=False, seq_lens=(lens[n],)), alone)
    return same_bits(named(f"sequence {n}", result, rows_of(outputs, n, rows)))


@checked
def causality(target, case, inputs, outputs, reference) -> Check:
    """Changing every input from token t on leaves the outputs before t unchanged, bitwise; t differs by sequence.

    Later tokens become loud (values times 2^20, closed gates) in one call, and in another quiet (zeros, open gates),
    random, or copies of the first key: what is shared over a tile (a scale, an anchor, a pivot) then changes.
    """
    draw = draws(case, "causality")
    pairs = []
    for kind in ("loud", draw.choice(("quiet", "random", "copies"))):
        cuts = [draw.randint(1, length - 1) if length > 1 else length for length in case.seq_lens]
        result = call(target, contiguous(case), changed_later(case, inputs, cuts, kind))
        before = rows_before(case, cuts).nonzero()[:, 0].to(inputs.q.device)
        pairs.append(
            (
                f"out before t = {shown(cuts)}, {kind} from there on:",
                *(flat(x)[before] for x in (result.out, outputs.out)),
            )
        )
    return same_bits(pairs)


@checked
def determinism(target, case, inputs, outputs, reference) -> Check:
    """The same call gives the same bits: again, in the place of another one, in dirty memory, on another stream, and
    whatever PyTorch's default dtype is.
    """
    pairs = []
    for number in range(2, 2 + AGAIN[inputs.q.device.type]):
        pairs += named(f"call {number}:", call(target, case, inputs), outputs)
    other = replace(inputs, v=(inputs.v.float() * -0.5).to(inputs.v.dtype), q=inputs.k, k=inputs.q)
    if case.packed:  # the same sequences in the other order
        other = replace(other, cu_seqlens=offsets(case.seq_lens[::-1], inputs.cu_seqlens.dtype, inputs.q.device))
    pairs += named("where a call had other contents:", call(target, case, inputs, before=other), outputs)
    with dirty_memory(inputs), default_dtype(torch.bfloat16):
        result = call(target, case, inputs)
    return same_bits(pairs + named("call in dirty memory, default dtype bf16:", result, outputs))


@checked
def continuation(target, case, inputs, outputs, reference) -> Check:
    """Running [0, t) and then [t, T) from the fp32 state agrees with the oracle as one run must, for any t."""
    draw = draws(case, "continuation")
    cuts = [draw.randint(0, length) for length in case.seq_lens]
    if not case.packed:
        cuts = [draw.randint(1, case.seq_lens[0] - 1)] * case.n_seqs
    return close(two_runs(target, case, inputs, cuts), outputs, inputs, reference)


@checked
def chunk_continuation(target, case, inputs, outputs, reference) -> Check:
    """The same is bitwise equal to one run when t is a multiple of the chunk, 64 tokens."""
    draw = draws(case, "chunk_continuation")
    last = [max(0, length - 1) // CHUNK for length in case.seq_lens]  # whole chunks before the last token
    cuts = [CHUNK * draw.randint(min(1, n), n) for n in last]
    if not case.packed:
        cuts = cuts[:1] * case.n_seqs
    whole = outputs
    if inputs.in_place or inputs.final_state_dtype != torch.float32:
        whole = call(target, *with_state(case, inputs))
    return same_bits(named(f"cut at {shown(cuts)}:", two_runs(target, case, inputs, cuts), whole))


@checked
def scaling(target, case, inputs, outputs, reference) -> Check:
    """`v` and the initial state times 2^j scale `out` and the final state by exactly 2^j."""
    given = (inputs.v, inputs.initial_state, outputs.out, outputs.final_state)
    sizes = torch.cat([x.float().abs().flatten() for x in given if x is not None])
    seen = (sizes > 0) & (sizes < torch.inf)
    low, high = torch.stack([sizes.where(seen, torch.inf).amin(), sizes.where(seen, 0.0).amax()]).tolist()
    if not high:
        raise OutOfReach("all values and results are zero")
    exponents = [
        j
        for j in (1, -1, 7, -7, 24, -24, 60, -60)
        if low * 2.0 ** min(j, 0) >= LOWEST and high * 2.0 ** max(j, 0) <= HIGHEST
    ]
    if not exponents:
        raise OutOfReach(f"values and results from {low:.2g} to {high:.2g} leave no room for a power of two")
    factor = 2.0 ** draws(case, "scaling").choice(exponents)
    changed = {"v": inputs.v * factor}
    if inputs.initial_state is not None:
        changed["initial_state"] = inputs.initial_state * factor
    result = call(target, contiguous(case), replace(inputs, **changed))
    state = None if outputs.final_state is None else outputs.final_state * factor
    pairs = named(f"times {factor:g}:", result, Outputs(outputs.out * factor, state))
    return same_bits([(name, *without_underflow(x, y)) for name, x, y in pairs])


def without_underflow(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero in both where both are so small that one may have underflowed on its way: then even its sign is open."""
    keep = ~((x.abs() < LOWEST) & (y.abs() < LOWEST))
    return x.where(keep, 0.0), y.where(keep, 0.0)


@checked
def value_columns(target, case, inputs, outputs, reference) -> Check:
    """Permuting the V channels of `v` and of the state permutes those of the results, bitwise."""
    order = permutation(case, "value_columns", inputs.v.shape[-1]).to(inputs.v.device)
    changed = {"v": inputs.v[..., order]}
    if inputs.initial_state is not None:
        changed["initial_state"] = inputs.initial_state[:, :, order]
    result = call(target, contiguous(case), replace(inputs, **changed))
    state = None if outputs.final_state is None else outputs.final_state[:, :, order]
    return same_bits(named("", result, Outputs(outputs.out[..., order], state)))


@checked
def key_channels(target, case, inputs, outputs, reference) -> Check:
    """Permuting the K channels of q, k, g, dt_bias and the state permutes those of the state, within tolerance."""
    order = permutation(case, "key_channels", inputs.k.shape[-1]).to(inputs.k.device)
    changed = {name: getattr(inputs, name)[..., order] for name in ("q", "k", "g", "dt_bias")}
    if inputs.initial_state is not None:
        changed["initial_state"] = inputs.initial_state[..., order]
    result = call(target, contiguous(case), replace(inputs, **changed))
    state = None if result.final_state is None else result.final_state[..., order.argsort()]
    return close(Outputs(result.out, state), outputs, inputs, reference)


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

    So do expanded ones, as heads that share their keys; and strided outputs, unless the target refuses these with a
    ValueError, which the law leaves to it.
    """
    pairs, expected = [], outputs
    dense = {name: getattr(inputs, name).contiguous() for name in TOKENS}
    if case.layout == "strided":
        pairs += named("contiguous:", call(target, contiguous(case), replace(inputs, **dense)), outputs)
    draw = draws(case, "layout")
    kind = draw.choice(("heads first", "fused", "fused, interleaved", "apart", "mixed", "expanded", "expanded"))
    aligned = draw.random() < 0.5
    if kind == "heads first":
        changed = heads_first(dense)
    elif kind == "apart":
        changed = apart(dense, aligned=aligned)
    elif kind == "expanded":
        changed = dense | expanded(dense, draw)
        same = {name: x.contiguous() for name, x in changed.items()}
        expected = call(target, contiguous(case), replace(inputs, **same))
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
    check = same_bits(pairs + named(f"{kind}:", result, expected))
    overrun = within(result)
    return replace(overrun, detail=f"{kind}: {overrun.detail}") if check.passed else check


def output_places(inputs: Inputs, draw: random.Random, beside: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """NaN, strided: where an output may be written. beside: a slice for `out` of the tensor that q is a slice of."""
    if beside is not None:
        places = {"out": inputs.q.as_strided(beside.shape, beside.stride(), beside.storage_offset())}
    else:
        out = {"out": torch.full_like(inputs.v, torch.nan, memory_format=torch.contiguous_format)}
        places = draw.choice((heads_first, partial(apart, aligned=True), partial(apart, aligned=False)))(out)
    if inputs.final_state_dtype is not None and not inputs.in_place:
        shape = (sequences(inputs), inputs.v.shape[2], inputs.v.shape[3], inputs.k.shape[3])
        state = torch.full(shape, torch.nan, dtype=inputs.final_state_dtype, device=inputs.v.device)
        places |= apart({"final_state": state}, aligned=draw.random() < 0.5)
    return places


def heads_first(dense: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those with channels, as slices of `[B, H, T, K]`."""
    return {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in dense.items() if x.dim() == 4}


def expanded(dense: dict[str, torch.Tensor], draw: random.Random) -> dict[str, torch.Tensor]:
    """Some of them with all heads, tokens or sequences in the memory of the first one."""
    axis = draw.choice([axis for axis in (0, 1, 2) if dense["q"].shape[axis] > 1] or [2])
    names = [name for name, x in sorted(dense.items()) if axis < x.dim() - 1]  # the last stride stays 1
    names = draw.sample(names, draw.randint(1, len(names)))
    return {name: dense[name].narrow(axis, 0, 1).expand_as(dense[name]) for name in names}


@checked
def in_place(target, case, inputs, outputs, reference) -> Check:
    """A final state written over the initial state has the same bits as one written elsewhere."""
    dtype = inputs.initial_state.dtype
    apart = replace(case, in_place=False, final_state=NAMES[dtype])
    over = replace(apart, in_place=True)
    inputs = replace(inputs, final_state_dtype=dtype)
    first = outputs if case == apart else call(target, apart, replace(inputs, in_place=False))
    second = outputs if case == over else call(target, over, replace(inputs, in_place=True))
    return same_bits(named("in place:", second, first))


@checked
def wide_offsets(target, case, inputs, outputs, reference) -> Check:
    """Arguments whose elements lie more than 2^31 elements apart give the bits that contiguous ones give."""
    from fuzz.judging.wide import wide_offsets

    return wide_offsets(target, case, inputs, outputs, reference)


@checked
def arguments(target, case, inputs, outputs, reference) -> Check:
    """Bad arguments are refused before anything is written: some of `fuzz.judging.refusals`, others for each case."""
    from fuzz.judging.refusals import REFUSALS

    reason = target.reach(LEGAL)
    if reason is not None:
        raise OutOfReach(f"the legal call of which bad ones are made is out of reach: {reason}")
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
        arguments,
    )
}

NEEDS: dict[str, Callable[[Case], bool]] = {
    "packing": lambda case: case.n_seqs > 1,
    "heads": lambda case: case.heads > 1,
    "batch_form": lambda case: case.tokens > 0,
    "causality": lambda case: max(case.seq_lens) > 1,
    "continuation": lambda case: max(case.seq_lens) > 1,
    "chunk_continuation": lambda case: max(case.seq_lens) > CHUNK,
    "scaling": lambda case: case.tokens > 0 or case.initial_state is not None,
    "value_columns": lambda case: case.tokens > 0,
    "key_channels": lambda case: case.tokens > 0,
    "layout": lambda case: case.tokens > 0,
    "in_place": lambda case: case.initial_state is not None,
    "wide_offsets": lambda case: case.tokens > 1,
}
"""What a case must have for a property to say something about it; those not named here apply to every case."""


RARE: dict[str, Callable[[Case], bool]] = {
    "heads": lambda case: case.heads > 2,
    "wide_offsets": lambda case: not case.packed and case.n_seqs > 1,
}
"""What few cases are of use for: of those, a property is asked three times as often as another."""


def applicable(name: str, case: Case) -> bool:
    """Whether the property says something about the case. KeyError for an unknown name."""
    if name not in PROPERTIES:
        raise KeyError(f"property {name!r}: unknown; accepted: {', '.join(PROPERTIES)}")
    return NEEDS.get(name, lambda case: True)(case)


def choose(case: Case, n: int) -> tuple[str, ...]:
    """`n` applicable properties (fewer if there are not as many), the same ones for the same case, others by seed."""
    names = [name for name in PROPERTIES if applicable(name, case)]
    counts = [3 if name in RARE and RARE[name](case) else 1 for name in names]
    return tuple(dict.fromkeys(draws(case, "choose").sample(names, sum(counts), counts=counts)))[:n]


# ------------------------------------------------------------------------------------------------------- changed inputs


def draws(case: Case, purpose: str) -> random.Random:
    """Numbers that depend on the case's seed and the purpose alone, the same on every machine."""
    return random.Random(f"{purpose} {case.seed}")


def generator(case: Case, inputs: Inputs) -> torch.Generator:
    return torch.Generator(inputs.q.device).manual_seed(case.seed % 2**63)


def permutation(case: Case, purpose: str, size: int) -> torch.Tensor:
    """Of `size` things, never the one that leaves all of them in place (if there are two)."""
    draw, order = draws(case, purpose), list(range(size))
    while size > 1 and order == list(range(size)):
        draw.shuffle(order)
    return torch.tensor(order)


def offsets(seq_lens, dtype: torch.dtype, device) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(seq_lens)], dtype=dtype, device=device)


def contiguous(case: Case, **changes) -> Case:
    return replace(case, layout="contiguous", **changes)


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1)


def one_sequence(inputs: Inputs, n: int, rows: tuple[int, int]) -> Inputs:
    """Sequence `n` alone, which has these rows, in the form (packed or batch) that it has now."""
    start, end = rows
    changed = {name: flat(getattr(inputs, name))[start:end][None] for name in TOKENS}
    if inputs.initial_state is not None:
        changed["initial_state"] = inputs.initial_state[n : n + 1]
    if inputs.cu_seqlens is not None:
        changed["cu_seqlens"] = offsets([end - start], inputs.cu_seqlens.dtype, inputs.q.device)
    return replace(inputs, **changed)


def rows_of(outputs: Outputs, n: int, rows: tuple[int, int]) -> Outputs:
    start, end = rows
    state = None if outputs.final_state is None else outputs.final_state[n : n + 1]
    return Outputs(flat(outputs.out)[start:end][None], state)


def of_sequences(case: Case, outputs: Outputs, chosen) -> Outputs:
    """The rows and the states of these sequences, one after the other."""
    rows = rows_of_chosen(case, chosen).nonzero()[:, 0].to(outputs.out.device)
    return Outputs(flat(outputs.out)[rows], None if outputs.final_state is None else outputs.final_state[chosen])


def all_nan_but(case: Case, inputs: Inputs, sound) -> Inputs:
    """The inputs with every sequence that is not among these, and its state, NaN."""
    rows, changed = rows_of_chosen(case, sound).to(inputs.q.device), {}
    for name in TOKENS:
        x = getattr(inputs, name)
        changed[name] = x.where(rows.view(*x.shape[:2], *[1] * (x.dim() - 2)), torch.nan)
    if inputs.initial_state is not None:
        changed["initial_state"] = torch.full_like(inputs.initial_state, torch.nan)
        changed["initial_state"][sound] = inputs.initial_state[sound]
    return replace(inputs, **changed)


def rows_of_chosen(case: Case, chosen) -> torch.Tensor:
    """bool [B * T], on the CPU: the rows of these sequences."""
    return rows_before(case, [length if n in chosen else 0 for n, length in enumerate(case.seq_lens)])


def rows_before(case: Case, cuts) -> torch.Tensor:
    """bool [B * T], on the CPU: the rows of each sequence before its cut."""
    parts = torch.tensor([[cut, length - cut] for length, cut in zip(case.seq_lens, cuts, strict=True)])
    return torch.tensor([True, False]).repeat(len(parts)).repeat_interleave(parts.flatten())


def changed_later(case: Case, inputs: Inputs, cuts, kind: str) -> Inputs:
    """The inputs with all rows from each sequence's cut on replaced."""
    numbers = generator(case, inputs)
    later = (~rows_before(case, cuts)).to(inputs.q.device)
    starts, lens = offsets(case.seq_lens, torch.int64, "cpu")[:-1], torch.tensor(case.seq_lens)
    first = starts.repeat_interleave(lens).to(inputs.q.device)  # of the row's sequence

    def normal(x):
        return torch.randn(x.shape, generator=numbers, device=x.device, dtype=torch.float32)

    size = inputs.v.float().abs().amax().clamp(2.0**-100, 2.0**90) if inputs.v.numel() else 1.0
    new = {
        "loud": lambda x, name: {"v": normal(x) * size * 2.0**20, "g": normal(x) + 100, "beta": normal(x) + 8}.get(
            name, normal(x)
        ),
        "quiet": lambda x, name: torch.full_like(x, {"g": -torch.inf, "beta": -torch.inf}.get(name, 0.0)),
        "random": lambda x, name: normal(x) * (size if name == "v" else 1.0),
        "copies": lambda x, name: -x[first] if name == "v" else x[first],
    }[kind]
    changed = {}
    for name in TOKENS:
        x = flat(getattr(inputs, name))
        mask = later.view(-1, *[1] * (x.dim() - 1))
        changed[name] = torch.where(mask, new(x, name).to(x.dtype), x).view(getattr(inputs, name).shape)
    return replace(inputs, **changed)


@contextmanager
def dirty_memory(inputs: Inputs) -> Iterator[None]:
    """Memory that a call allocates and does not initialise holds NaN; on a GPU the call also runs on another stream.

    On a CPU PyTorch itself fills new tensors. On a GPU that would change the algorithms it chooses, so memory full of
    NaN is freed instead, in the sizes that a target may ask for, and the caching allocator hands it out again. It keeps
    blocks above 1 MiB apart, so for scratch of a fixed size one of them is large even where the case is small.
    """
    if inputs.q.device.type == "cuda":
        tokens, states = inputs.v.numel(), sequences(inputs) * inputs.dt_bias.numel() * inputs.v.shape[-1]
        torch.cuda.synchronize(inputs.q.device)
        with torch.cuda.stream(torch.cuda.Stream(inputs.q.device)):  # memory is handed out again by stream
            for size in (tokens, 2 * tokens, states, SCRATCH):
                torch.full((size,), torch.nan, device=inputs.q.device)
            yield
        return
    modes = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fill_uninitialized_memory (the default) needs
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(modes[0], warn_only=modes[1])


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """As code that loads a model sets it, and forgets to set it back."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def with_state(case: Case, inputs: Inputs) -> tuple[Case, Inputs]:
    """The same with an fp32 final state of its own."""
    changed = contiguous(case, in_place=False, final_state="fp32")
    return changed, replace(inputs, in_place=False, final_state_dtype=torch.float32)


def two_runs(target, case: Case, inputs: Inputs, cuts) -> Outputs:
    """What [0, cut) and then [cut, T) of each sequence give together, with an fp32 state in between and after."""
    case, inputs = with_state(case, inputs)
    before = rows_before(case, cuts)
    lens = [list(cuts), [length - cut for length, cut in zip(case.seq_lens, cuts, strict=True)]]
    out = torch.empty_like(flat(inputs.v))
    for part, seq_lens in zip((before, ~before), lens, strict=True):
        rows, changed = part.nonzero()[:, 0].to(inputs.q.device), {}
        for name in TOKENS:
            x = flat(getattr(inputs, name))[rows]
            changed[name] = x[None] if case.packed else x.unflatten(0, (case.n_seqs, seq_lens[0]))
        if case.packed:
            changed["cu_seqlens"] = offsets(seq_lens, inputs.cu_seqlens.dtype, inputs.q.device)
        result = call(target, replace(case, seq_lens=tuple(seq_lens)), replace(inputs, **changed))
        out[rows] = flat(result.out)
        case, inputs = replace(case, initial_state="fp32"), replace(inputs, initial_state=result.final_state)
    return Outputs(out.view(inputs.v.shape), result.final_state)


def decay_only(target, case: Case, inputs: Inputs, **off: torch.Tensor) -> Check:
    """The target with all beta logits at -inf, against the closed form; from a random state if the case has none."""
    case, inputs = with_state(case, replace(inputs, **off))
    if inputs.initial_state is None:
        shape = (case.n_seqs, *inputs.dt_bias.shape[:1], inputs.v.shape[-1], inputs.k.shape[-1])
        state = torch.randn(shape, generator=generator(case, inputs), device=inputs.q.device)
        case, inputs = replace(case, initial_state="fp32"), replace(inputs, initial_state=state)
    result = call(target, case, inputs)

    q, _, _, _, a = operands(inputs)
    S0 = inputs.initial_state.double()
    out, out_moves = (
        torch.zeros_like(flat(inputs.v), dtype=torch.float64),
        torch.zeros_like(flat(inputs.v), dtype=torch.float64),
    )
    state = S0.clone()
    starts = offsets(case.seq_lens, torch.int64, "cpu")
    for length in set(case.seq_lens) - {0}:  # all sequences of one length together: there may be hundreds
        chosen = torch.tensor([n for n, each in enumerate(case.seq_lens) if each == length])
        rows = (starts[chosen, None] + torch.arange(length)).to(S0.device)
        chosen = chosen.to(S0.device)
        decay, S = a[rows].cumsum(1).exp(), S0[chosen]
        decayed = (q[rows] * decay).transpose(1, 2)
        out[rows] = (inputs.scale * decayed @ S.mT).transpose(1, 2)
        size = (decayed.square() @ S.square().mT).sqrt()
        out_moves[rows] = (abs(inputs.scale) * ROUNDING * size).transpose(1, 2)
        state[chosen] = S * decay[:, -1][:, :, None]
    shape = inputs.v.shape
    exact = Reference(out.view(shape), state, out_moves.view(shape), torch.zeros_like(state))
    return close(result, result, inputs, exact)


def call(
    target,
    case: Case,
    inputs: Inputs,
    before: Inputs | None = None,
    places: Mapping[str, torch.Tensor] | None = None,
) -> Outputs:
    """Runs the target on the changed inputs, if `case`, which describes them, is within its reach.

    before: others, which are in the same places in a call before this one. places: those of the outputs.
    """
    reason = target.reach(case)
    if reason is not None:
        raise OutOfReach(f"the changed case is out of reach: {reason}")
    return run_target(target, inputs, before, places)


# ------------------------------------------------------------------------------------------------------------ comparing


def named(what: str, result: Outputs, expected: Outputs) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    pairs = [(f"{what} out".strip(), result.out, expected.out)]
    if result.final_state is not None and expected.final_state is not None:
        pairs.append((f"{what} final_state".strip(), result.final_state, expected.final_state))
    return pairs


def same_bits(pairs) -> Check:
    """Passed when each pair (what, result, expected) has the same bits; NaN is the same as nothing."""
    pairs = [(what, result, expected.to(result.device)) for what, result, expected in pairs]
    differ = [(bits(result) != bits(expected)) | result.isnan() for _, result, expected in pairs]
    failed = those({index: places.any() for index, places in enumerate(differ)})
    lines = []
    for index in sorted(failed):
        (what, result, expected), places = pairs[index], differ[index]
        count = int(places.sum())
        size = (result.double() - expected.double()).abs().where(places, -1.0).nan_to_num(nan=torch.inf)
        most = tuple(int(i) for i in torch.unravel_index(size.argmax().cpu(), size.shape))
        lines.append(
            f"{what}: {count} of {places.numel()} elements differ ({count / places.numel():.1%}), most at {most}: "
            f"{result[most].item():.6g} instead of {expected[most].item():.6g}; no bit may differ"
        )
    return Check("", not lines, detail="; ".join(lines))


def close(result: Outputs, whole: Outputs, inputs: Inputs, reference: Reference | None) -> Check:
    """Passed when `result` is as close to the reference as any result must be; without one, close to `whole`."""
    if reference is not None:
        finite, check = written(result, reference), accuracy(result, inputs, reference)
        return replace(
            check, passed=finite.passed and check.passed, detail="; ".join(filter(None, (finite.detail, check.detail)))
        )
    found = {}
    for what, a, b in named("", result, whole):
        found[what] = float(errors.rms(a.double() - b.double()) / errors.rms(b.double()).clamp_min(bounds.SMALLEST))
    allowed = bounds.WITHOUT_ORACLE
    failed = [
        f"{what}: {error:.3g} relative RMS apart, at most {allowed:.3g} allowed"
        for what, error in found.items()
        if not error <= allowed
    ]
    return Check("", not failed, found, dict.fromkeys(found, allowed), "; ".join(failed))


def shown(cuts) -> str:
    text = ", ".join(map(str, cuts[:8]))
    return f"({text}, ...)" if len(cuts) > 8 else f"({text})"
