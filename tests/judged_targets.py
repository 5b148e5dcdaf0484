"""Cases, and a correct target that shares nothing with the model: what the judge must pass."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from flash_kda.arguments import check_arguments
from fuzz.cases.case import Case
from fuzz.cases.families import FAMILIES
from fuzz.cases.inputs import TENSORS, Inputs, sequence_ranges
from fuzz.cases.plain import PLAIN
from fuzz.targets.adapter import writing
from fuzz.targets.registry import Target


def a_case(seq_lens=(20, 37), heads=2, **changes) -> Case:
    return replace(PLAIN, seq_lens=tuple(seq_lens), heads=heads, **{"packed": True, "seed": 1, **changes})


def read_by_the_oracle(inputs: Inputs) -> dict:
    """The arguments of `oracle.recurrent_kda` and of `flash_kda.model.forward`."""
    return {name: getattr(inputs, name) for name in (*TENSORS, "scale", "lower_bound")}


def random_case(draw: random.Random) -> Case:
    """Any families, small: up to three sequences of up to 100 tokens."""
    packed = draw.random() < 0.6
    lengths = (0, 1, 2, 15, 16, 17, 33, 63, 64, 65, 70, 100)
    n = draw.choice((1, 1, 2, 3))
    seq_lens = [draw.choice(lengths) for _ in range(n)] if packed else [draw.choice(lengths[1:])] * min(n, 2)
    initial, final = draw.choice((None, "bf16", "fp32")), draw.choice((None, "bf16", "fp32", "fp32"))
    return a_case(
        seq_lens,
        draw.choice((1, 2, 3)),
        packed=packed,
        cu_seqlens_dtype=draw.choice(("int32", "int64")),
        lower_bound=draw.choice((0.0, -5.0, -5 * draw.random())),
        scale=draw.choice((128**-0.5, 1.0, -0.25)),
        initial_state=initial,
        final_state=final,
        in_place=initial is not None and initial == final and draw.random() < 0.5,
        layout=draw.choice(("contiguous", "strided")),
        seed=draw.getrandbits(63),
        **{name: draw.choice(families) for name, families in FAMILIES.items()},
    )


def recurrence(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens):
    """The recurrence of docs/operator.md in fp32, one token at a time."""
    B, T, H, K = q.shape
    ranges = sequence_ranges(q, cu_seqlens)
    written, V = torch.empty(B * T, H, v.shape[-1], dtype=v.dtype), v.shape[-1]
    # In float64, because the fp32 functions of PyTorch give an element bits that depend on its place in the tensor.
    q, k, v, g, beta = (x.flatten(0, 1).double() for x in (q, k, v, g, beta))
    q, k = ((x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()).float() for x in (q, k))
    b, v = torch.sigmoid(beta)[..., None].float(), v.float()
    decay = (lower_bound * torch.sigmoid(A_log.double().exp()[:, None] * (g + dt_bias))).exp()[:, :, None].float()
    states = torch.zeros(len(ranges), H, V, K, dtype=torch.float32)
    if initial_state is not None:
        states.copy_(initial_state)
    for n, (start, end) in enumerate(ranges):
        S = states[n]
        for t in range(start, end):
            S = S * decay[t]
            S = S + (b[t] * (v[t] - (S * k[t][:, None]).sum(-1)))[..., None] * k[t][:, None]
            written[t] = scale * (S * q[t][:, None]).sum(-1)
        states[n] = S
    return written.view(B, T, H, V), states


recurrence = writing(recurrence, check_arguments)


def target(fwd, name="judged") -> Target:
    return Target(name, fwd, "cpu")


CORRECT = target(recurrence, "correct")
