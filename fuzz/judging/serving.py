"""The properties of docs/operator.md for serving engines: checkpoints, pools of states, rows behind the last sequence.

Each calls the target once more, with what such an engine passes besides, and compares bits with ordinary calls. Targets
whose signature has no such arguments are not checked.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fuzz.cases.inputs import DTYPES, TOKENS, WORDS, Inputs, apart, storage, whole
from fuzz.judging.call import Outputs, copy_inputs, differ, launch, poisoned, takes, true_keys, within
from fuzz.judging.changed_calls import call, expect_reach
from fuzz.judging.changed_inputs import contiguous, draws, flat, generator, offsets
from fuzz.judging.comparison import Unsupported, checked, close, named, same_bits
from fuzz.judging.verdict import Check

CHECKPOINT_STEP = 16  # tokens: offsets of checkpoints are multiples
SAFE = 64  # of multiples of this nothing else depends
MOST_CHECKPOINTS = 1024  # times heads, in one call; each has 64 KB
MOST_COMPARED = 3  # columns of checkpoints compared with calls on the prefixes
UNWRITTEN = 12345.0  # in bf16 12352: what is not to be written holds it
OF_STATES = (torch.bfloat16, torch.float32)
INTEGERS = (torch.int32, torch.int64)


@checked
def checkpoints(target, case, inputs, outputs, reference) -> Check:
    """A checkpoint has the bits of the final state of a call on the prefix; where there is none, nothing is written.

    Offsets that are multiples of 64 change no other bit, other offsets none beyond tolerance.
    """
    require(target, "checkpoint_state", "checkpoint_offsets")
    promised(target)
    draw = draws(case, "checkpoints")
    most = max(1, MOST_CHECKPOINTS // (case.n_seqs * case.heads))
    count = draw.choice([n for n in (None, 1, 1, 3, 15) if (n or 1) <= most])
    safe = draw.random() < 0.3
    step = SAFE if safe else CHECKPOINT_STEP
    table = [drawn_offsets(draw, length, count or 1, step) for length in case.seq_lens]
    where = torch.tensor(table, dtype=draw.choice(INTEGERS), device=inputs.q.device)
    where = where if count else where[:, 0]
    dtype = draw.choice(OF_STATES)
    states = torch.full((*where.shape, *inputs.state_shape[1:]), UNWRITTEN, dtype=dtype, device=inputs.q.device)
    result, check = serve(
        target, inputs, checkpoint_offsets=where, checkpoint_state=states, strided=draw.random() < 0.4
    )
    if not check.passed:
        return check
    found = result.pop("checkpoint_state")
    if not safe:
        check = close(target, Outputs(result["out"], result.get("final_state")), outputs, inputs, reference)
        if not check.passed:
            return replace(check, detail=f"beside checkpoints: {check.detail}")

    expected = states if count else states[:, None]
    found = found if count else found[:, None]
    inside = [[0 < n <= length for n in row] for row, length in zip(table, case.seq_lens, strict=True)]
    known = [[not here for here in row] for row in inside]  # what the checkpoint must be: unwritten, or as follows
    columns = [c for c in range(count or 1) if any(row[c] for row in inside)]
    for c in draw.sample(columns, min(MOST_COMPARED, len(columns))):
        chosen = [n for n in range(case.n_seqs) if inside[n][c]]
        lens = tuple(table[n][c] for n in chosen)
        prefixes = replace(of_prefixes(case, inputs, chosen, lens), final_state_dtype=dtype, in_place=False)
        changed = contiguous(case, seq_lens=lens, packed=True, in_place=False, final_state=WORDS[dtype])
        expected[chosen, c] = call(target, changed, prefixes).final_state
        for n in chosen:
            known[n][c] = True
    index = torch.tensor(known, device=found.device).nonzero().unbind(1)
    pairs = [(f"checkpoints after {shortened(table)} tokens:", found[index], expected[index])]
    if safe:
        pairs += named("beside checkpoints:", Outputs(result["out"], result.get("final_state")), outputs)
    return same_bits(pairs)


def drawn_offsets(draw, length: int, count: int, step: int) -> list[int]:
    """`count` offsets for a sequence: increasing multiples of `step` inside it, and others that mean none."""
    multiples = list(range(step, length + 1, step))
    some = min(len(multiples), count if draw.random() < 0.5 else draw.randint(0, count))
    chosen = sorted(draw.sample(multiples, some))
    if chosen and draw.random() < 0.5:
        chosen[-1] = multiples[-1]  # the last full block: where engines ask for one
    row = chosen + [draw.choice((0, -1, -CHECKPOINT_STEP, length + 1, 2**31 - 1)) for _ in range(count - some)]
    if draw.random() < 0.3:  # those that mean none may stand anywhere
        places = sorted(draw.sample(range(count), some))
        rest = row[some:]
        row = [chosen.pop(0) if place in places else rest.pop() for place in range(count)]
    return row


def of_prefixes(case, inputs: Inputs, chosen: list[int], lens: tuple[int, ...]) -> Inputs:
    """The first tokens of these sequences, packed."""
    ranges = inputs.seq_ranges()
    rows = torch.cat(
        [torch.arange(ranges[n][0], ranges[n][0] + length) for n, length in zip(chosen, lens, strict=True)]
    )
    rows = rows.to(inputs.q.device)
    changed = {name: flat(getattr(inputs, name))[rows][None] for name in TOKENS}
    if inputs.initial_state is not None:
        changed["initial_state"] = inputs.initial_state[chosen]
    return replace(inputs, **changed, cu_seqlens=offsets(lens, DTYPES[case.cu_seqlens_dtype], inputs.q.device))


@checked
def state_pool(target, case, inputs, outputs, reference) -> Check:
    """A call on rows of a pool gives the bits of a call on their copies; other rows keep their bits.

    A negative index stands for a zero initial state, and nothing is written.
    """
    require(target, "state_indices")
    promised(target)
    draw, device = draws(case, "state_pool"), inputs.q.device
    initial, dtype = inputs.initial_state, inputs.final_state_dtype
    if initial is None and dtype is None:
        raise Unsupported("the case has no states")
    both_named = initial is not None and dtype is not None
    over = inputs.in_place or (both_named and initial.dtype == dtype and draw.random() < 0.5)
    size = case.n_seqs + draw.randint(1, 3)
    rows = draw.sample(range(size), case.n_seqs)
    absent = [n for n in range(case.n_seqs) if draw.random() < 0.3]
    named_rows = [-draw.randint(1, size + 1) if n in absent else row for n, row in enumerate(rows)]
    indices = torch.tensor(named_rows, dtype=draw.choice(INTEGERS), device=device)
    present = [n for n in range(case.n_seqs) if n not in absent]
    numbers = generator(case, inputs)

    def random_pool(dtype):
        return torch.randn((size, *inputs.state_shape[1:]), generator=numbers, device=device).to(dtype)

    pools, expected = {}, outputs
    if initial is not None:
        pools["initial_state"] = random_pool(initial.dtype)
        pools["initial_state"][[rows[n] for n in present]] = initial[present]
        copied = torch.zeros_like(initial, memory_format=torch.contiguous_format)
        copied[present] = initial[present]
        if absent or inputs.in_place:
            of_copies = contiguous(case, in_place=False)
            expected = call(target, of_copies, replace(inputs, initial_state=copied, in_place=False))
    if dtype is not None and not over:
        pools["final_state"] = random_pool(dtype)
    strided = draw.random() < 0.5
    result, check = serve(target, inputs, state_indices=indices, pools=pools, over=over, strided=strided)
    if not check.passed:
        return check
    pairs = [("out from a pool:", result["out"], expected.out)]
    if dtype is not None:
        before = pools["initial_state" if over else "final_state"]
        after = before.clone()
        after[[rows[n] for n in present]] = expected.final_state[present]
        pairs.append((f"the pool, rows {named_rows}:"[:200], result["final_state"], after))
    return same_bits(pairs)


@checked
def rows_behind(target, case, inputs, outputs, reference) -> Check:
    """With `cu_seqlens` ending before T, rows behind are neither read nor written, and empty sequences there may be."""
    require(target, "state_indices")  # older kernels may refuse such offsets
    promised(target)
    draw, device = draws(case, "rows_behind"), inputs.q.device
    extra, empty = draw.choice((1, 5, 16, 40, 70)), draw.choice((0, 0, 1, 3))
    changed = {}
    for name in TOKENS:
        x = flat(getattr(inputs, name))
        changed[name] = torch.cat([x, x.new_full((extra, *x.shape[1:]), torch.nan)])[None]
    lens = (*case.seq_lens, *[0] * empty)
    changed["cu_seqlens"] = offsets(lens, DTYPES[case.cu_seqlens_dtype], device)
    if inputs.initial_state is not None:
        state = inputs.initial_state
        changed["initial_state"] = torch.cat([state, state.new_full((empty, *state.shape[1:]), 0.5)])
    given = replace(inputs, **changed, in_place=False)
    expect_reach(target, contiguous(case, seq_lens=(*lens[:-1], lens[-1] + extra), packed=True, in_place=False))
    out = torch.full_like(given.v, UNWRITTEN)
    result, check = serve(target, given, out=out)
    if not check.passed:
        return check
    rows = case.tokens
    pairs = [
        ("out before the end:", flat(result["out"])[:rows], flat(outputs.out)),
        ("out behind the end:", flat(result["out"])[rows:], flat(out)[rows:]),
    ]
    if "final_state" in result:
        states = torch.zeros_like(result["final_state"])
        states[: case.n_seqs] = outputs.final_state
        if inputs.initial_state is not None:
            states[case.n_seqs :] = 0.5
        pairs.append(("final_state:", result["final_state"], states))
    return same_bits(pairs)


def promised(target) -> None:
    """The calls compared differ in what else they hold and in their form."""
    for name in ("packing", "batch_form"):
        if not target.promises.keeps(name):
            raise Unsupported(f"the target does not promise the bits of {name}")


def require(target, *names: str) -> None:
    if missing := [name for name in names if not takes(target.fwd, name)]:
        raise Unsupported(f"the target takes no {' and no '.join(missing)}")


def serve(
    target, inputs: Inputs, *, out=None, pools=None, over=False, strided=False, checkpoint_state=None, **arguments
) -> tuple[dict[str, torch.Tensor], Check]:
    """One call with the arguments of serving engines: what it wrote, by name, and whether it wrote nothing else.

    out: contents of `out` before the call; without them, it is poisoned.
    pools: the pools of states, by name.
    over: whether the final state is the initial one.
    strided: whether pools and checkpoints are slices of larger tensors.
    """
    given = copy_inputs(inputs)
    guards = {}
    if out is None:
        out, guards["out"] = poisoned(given.v.shape, torch.bfloat16, given.v.device)
    else:
        out = out.clone()
    states = dict(pools or {})
    if checkpoint_state is not None:
        states["checkpoint_state"] = checkpoint_state
    states = apart(states, aligned=False) if strided else {name: x.clone() for name, x in states.items()}
    around = {name: whole(x).clone() for name, x in states.items()}
    changed = {"out": out}
    if pools is not None:
        given = replace(given, initial_state=states.get("initial_state"))
        final_state = states.get("initial_state" if over else "final_state")
    elif given.in_place:
        final_state = given.initial_state
    else:
        final_state = None
        if given.final_state_dtype is not None:
            final_state, guards["final_state"] = poisoned(given.state_shape, given.final_state_dtype, given.v.device)
    if final_state is not None:
        changed["final_state"] = final_state
    if checkpoint_state is not None:
        arguments["checkpoint_state"] = changed["checkpoint_state"] = states["checkpoint_state"]
    launch(target, given, out, final_state, **arguments)
    if out.is_cuda:
        torch.cuda.synchronize(out.device)
    result = {name: x.clone(memory_format=torch.contiguous_format) for name, x in changed.items()}
    overrun = {name: x.eq(x).any() for name, x in guards.items()}
    for name, x in states.items():  # put back, so that what lies around them can be compared
        before = around[name].as_strided(x.shape, x.stride(), x.storage_offset())
        written = final_state is not None and storage(x) == storage(final_state)
        if written or name == "checkpoint_state":
            x.copy_(before)
        overrun[name] = differ(whole(x), around[name])
    return result, within(Outputs(out, None, overrun=tuple(sorted(true_keys(overrun)))))


def shortened(table: list[list[int]]) -> str:
    text = str(table)
    return text if len(text) <= 120 else text[:117] + "..."
