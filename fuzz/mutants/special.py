"""Cases that mutants are judged on beside drawn ones: inputs and ways through the kernel that those seldom have."""

from __future__ import annotations

from dataclasses import replace

import torch

from fuzz.cases.case import Case
from fuzz.cases.inputs import Inputs, make_inputs
from fuzz.cases.plain import PLAIN

LONG_CASE = replace(PLAIN, seq_lens=(650,), packed=True, scale=0.25, seed=1, gates="weak")
"""The case in which a missing wait has to show: every stage of every pipeline is used again and again."""

MIXED_CASE = replace(
    PLAIN, seq_lens=(70, 5, 16, 0, 45), packed=True, gates="weak", initial_state="bf16", final_state="bf16", seed=274
)
"""Long, short and empty sequences in one call, whose last chunks are not full. The seed lets causality make the first
token infinite: rows past the end of a sequence are read from there.
"""

HEADS_CASE = replace(MIXED_CASE, seq_lens=(40, 7), heads=2, final_state="fp32")

HANDOVER_CASE = replace(PLAIN, seq_lens=(20, 150, 33), packed=True, gates="weak", seed=3)
"""Two clusters cut the sequence in the middle near its end, and the second one waits for the first one. The seed lets
rows_behind put more NaN behind the last sequence than its last chunk has room for.
"""

EXTREME_CASE = replace(HEADS_CASE, seed=2)
"""Rates exp(A_log) that leave fp32, gates at both infinities, rows of q and k with norms from 2^-121 to 2^119."""

SPECIAL_CASES = {
    LONG_CASE: (),
    MIXED_CASE: ("state_pool", "checkpoints", "causality", "layout"),
    HEADS_CASE: ("checkpoints", "rows_behind", "continuation"),
    HANDOVER_CASE: ("rows_behind",),
    EXTREME_CASE: (),
}
"""With the properties asked of each."""


def inputs_of(case: Case) -> Inputs:
    inputs = make_inputs(case)
    if case == EXTREME_CASE:
        for number, rows in enumerate((inputs.q, inputs.k)):
            powers = (torch.arange(rows.shape[1]) + 2 * number) % 5
            powers = torch.tensor([-124.0, -60.0, 0.0, 60.0, 116.0], dtype=torch.float64)[powers]
            rows.copy_(rows.double() * powers.exp2()[:, None, None])
        inputs.A_log.copy_(torch.tensor([-200.0, 200.0]))
        bias = inputs.dt_bias.view(case.heads, -1)
        bias[1] = bias[1].bfloat16()
        inputs.g[:, ::3] = -torch.inf
        inputs.g[:, 1::3, 0] = torch.inf
        inputs.g[:, 1::3, 1] = -bias[1]  # the sum is zero, which an infinite rate would make NaN
    return inputs
