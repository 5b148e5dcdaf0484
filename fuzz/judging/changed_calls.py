"""Calls of a target on changed inputs, for the properties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from fuzz.cases.case import Case
from fuzz.cases.inputs import TOKENS, Inputs
from fuzz.judging.call import Outputs, run_target
from fuzz.judging.changed_inputs import flat, generator, offsets, rows_before, with_state
from fuzz.judging.comparison import Unsupported, close
from fuzz.judging.sensitivity import ROUNDING, Reference, operands
from fuzz.judging.verdict import Check


def two_runs(target, case: Case, inputs: Inputs, cuts) -> tuple[Outputs, list[tuple[Inputs, Outputs]]]:
    """What [0, cut) and then [cut, T) of each sequence give together, with an fp32 state in between and after; and the
    inputs and results of each of the two runs."""
    case, inputs = with_state(case, inputs)
    before, runs = rows_before(case, cuts), []
    lens = [list(cuts), [length - cut for length, cut in zip(case.seq_lens, cuts, strict=True)]]
    out = torch.empty_like(flat(inputs.v))
    for part, seq_lens in zip((before, ~before), lens, strict=True):
        rows, changed = part.nonzero()[:, 0].to(inputs.q.device), {}
        for name in TOKENS:
            x = flat(getattr(inputs, name))[rows]
            changed[name] = x[None] if case.packed else x.unflatten(0, (case.n_seqs, seq_lens[0]))
        if case.packed:
            changed["cu_seqlens"] = offsets(seq_lens, inputs.cu_seqlens.dtype, inputs.q.device)
        given = replace(inputs, **changed)
        result = call(target, replace(case, seq_lens=tuple(seq_lens)), given)
        runs.append((given, result))
        out[rows] = flat(result.out)
        case, inputs = replace(case, initial_state="fp32"), replace(inputs, initial_state=result.final_state)
    return Outputs(out.view(inputs.v.shape), result.final_state), runs


def decay_only(target, case: Case, inputs: Inputs, **off: torch.Tensor) -> Check:
    """The target with all beta logits at -inf, against the closed form; from a random state if the case has none."""
    case, inputs = with_state(case, replace(inputs, **off))
    if inputs.initial_state is None:
        state = torch.randn(inputs.state_shape, generator=generator(case, inputs), device=inputs.q.device)
        case, inputs = replace(case, initial_state="fp32"), replace(inputs, initial_state=state)
    result = call(target, case, inputs)

    q, _, _, _, a = operands(inputs)
    S0 = inputs.initial_state.double()
    out, out_moves = (torch.zeros_like(flat(inputs.v), dtype=torch.float64) for _ in range(2))
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
    return close(target, result, result, inputs, exact)


def call(
    target, case: Case, inputs: Inputs, before: Sequence[Inputs] = (), places: Mapping[str, torch.Tensor] | None = None
) -> Outputs:
    """Runs the target on the changed inputs, if `case`, which describes them, is within its reach.

    before: others, which are in the same places in calls before this one. places: those of the outputs.
    """
    expect_reach(target, case)
    return run_target(target, inputs, before, places)


def expect_reach(target, case: Case) -> None:
    """Raises Unsupported if the target does not take the case."""
    reason = target.reach(case)
    if reason is not None:
        raise Unsupported(f"the changed case is unsupported: {reason}")
