"""Defects of meaning: another operator than that of docs/operator.md, or an argument taken for something else."""

from __future__ import annotations

from dataclasses import replace

import torch

from flash_kda import arguments, model
from fuzz.defects.defect import Defect, after, before, changed, constant, kind, replaced, staged

# ---------------------------------------------------------------------------------------------------------------- gates


def softplus_gate(original, g, A_log, dt_bias, lower_bound):
    """-exp(A_log) softplus(g + dt_bias), clamped at the bound."""
    a = -A_log.exp()[:, None, None] * torch.nn.functional.softplus(g + dt_bias[:, None])
    return a.nan_to_num(nan=0.0).clamp_min(lower_bound) * model.LOG2_E


def rate_not_exponential(original, g, A_log, dt_bias, lower_bound):
    return original(g, A_log.clamp_min(1e-6).log(), dt_bias, lower_bound)


def bias_after_rate(original, g, A_log, dt_bias, lower_bound):
    rate = A_log.exp()[:, None]
    return original(g, A_log, dt_bias / rate, lower_bound)


def base_2(original, *args):
    """Log-decays are natural, the exponential is of base 2, and nobody multiplies by log2(e)."""
    return original(*args) / model.LOG2_E


def first_token_keeps_state(original, a):
    """The decay of the first token of each chunk is taken for that of a token before the chunk."""
    a = a.clone()
    a[:, :, 0] = 0
    return original(a)


def decay_after_update(original, a):
    """Each token decays by what belongs to the token before it; the last decay of a chunk goes to the state."""
    d = original(torch.cat([torch.zeros_like(a[:, :, :1]), a[:, :, :-1]], 2))
    return replace(d, after=d.after * a[:, :, -1:].exp2()[:, :, :, None], chunk=d.chunk * a[:, :, -1].exp2())


def decay_of_first_channel(original, *args):
    """One decay a head, as in the gated delta rule: that of channel 0."""
    a = original(*args)
    return a[..., :1].expand_as(a)


# ----------------------------------------------------------------------------------------------------------- the update


def zero_is_default(name: str, default: float):
    return changed(**{name: lambda value: value or default})


def plain_linear_attention(original, Xb, K):
    """Nothing that the state predicts is taken off the values."""
    return torch.zeros_like(K)


def no_interaction(original, L, kn):
    """Tokens of one chunk do not see each other's updates."""
    return torch.diag_embed(kn.squeeze(-1))


def wrong_sign(original, L, kn):
    """X = (I - L)^-1."""
    return original(-L, kn)


def prediction_before_decay(original, Xb, K):
    return original(Xb, K / K.norm(dim=-1, keepdim=True).clamp_min(1e-30))


def beta_squared(original, q, k, v, g, beta, *args):
    """X diag(b) diag(b); L has its factor once."""
    b = torch.sigmoid(beta)[:, :, None]
    with replaced(model, "stage_X", lambda stage_X, L, kn: stage_X(L, kn) * b):
        return original(q, k, v, g, beta, *args)


def strict_diagonal(original, *args):
    """o_t does not see the update of token t."""
    return original(*args).tril(-1)


def state_before_last_update(original, prepared, state, chunks):
    """Each chunk hands on the state that the chunk before it has left."""
    result, kept = torch.empty_like(prepared.V), state.clone()
    for sequences, now in chunks.steps:
        kept[sequences] = state[sequences]
        result[now] = original(prepared, state, replace(chunks, steps=[(sequences, now)]))[now]
    state.copy_(kept)
    return result


def state_not_decayed(original, prepared, state, chunks):
    """The state is handed on without the decay of the chunk."""
    return original(replace(prepared, decay=torch.ones_like(prepared.decay)), state, chunks)


def query_not_normalised(original, q, k, *args):
    prepared = original(q, k, *args)
    return replace(prepared, qn=torch.ones_like(prepared.qn))


def key_not_normalised(original, x):
    """Rows whose norm is within [1/2, 2] are taken for normalised."""
    rows, factor = original(x)
    norm = x.norm(dim=-1, keepdim=True)
    return rows, torch.where((norm > 0.5) & (norm < 2), 1.0, factor)


# ----------------------------------------------------------------------------------------------------------------- time


def anchored_at_later_row(original, a):
    """Exponentials of a block are counted from its last row, which lies in the future of the others."""
    d = original(a)
    anchor = d.block
    # The decay between the rows and their anchor is rounded with the operands, so that the anchor shows.
    start = (d.from_start / anchor.clamp_min(2.0**-100)).bfloat16().float() * anchor.clamp_min(2.0**-100)
    return replace(d, from_start=start)


def values_share_a_scale(original, q, k, v, *args):
    """Values are kept in 11 bits with one scale for a chunk, which its later tokens decide."""
    unit = v.abs().amax(2, keepdim=True).clamp_min(2.0**-100) / 2**10
    return original(q, k, (v / unit).round() * unit, *args)


# ------------------------------------------------------------------------------------------------------------ arguments


def scale_on_values(given) -> None:
    given.v, given.scale = (given.v.float() * given.scale).bfloat16(), 1.0


def bf16_only(given) -> None:
    if given.final_state is not None:
        given.final_state.copy_(given.final_state.bfloat16())


def beta_as_given(original, q, k, v, g, beta, *args):
    def unless_beta(function, f, x):
        return x if x is beta else function(f, x)

    with replaced(model, "through_fp64", unless_beta):
        return original(q, k, v, g, beta, *args)


DEFECTS = kind(
    "semantics",
    Defect(
        "softplus_gate",
        "The gate is a softplus clamped at the bound instead of a sigmoid.",
        ("accuracy",),
        staged(log_decay=softplus_gate),
        failure="Safe gate",
    ),
    Defect(
        "gate_rate_not_exponential",
        "A_log is the gate's rate, not its logarithm.",
        ("accuracy", "beta_off"),
        staged(log_decay=rate_not_exponential),
    ),
    Defect(
        "gate_bias_after_rate",
        "dt_bias is added after the rate has multiplied g.",
        ("accuracy", "beta_off"),
        staged(log_decay=bias_after_rate),
    ),
    Defect("gate_bias_without_sign", "dt_bias loses its sign.", ("accuracy", "beta_off"), changed(dt_bias=torch.abs)),
    Defect("gate_bias_subtracted", "dt_bias is subtracted.", ("accuracy", "beta_off"), changed(dt_bias=torch.neg)),
    Defect(
        "natural_decay_in_base_2",
        "A natural log-decay is the exponent of 2.",
        ("accuracy", "beta_off"),
        staged(log_decay=base_2),
    ),
    Defect(
        "one_decay_a_head",
        "All channels decay as the first one.",
        ("accuracy", "key_channels"),
        staged(log_decay=decay_of_first_channel),
    ),
    Defect(
        "lower_bound_ignored",
        "lower_bound is always -5.",
        ("accuracy", "beta_off"),
        changed(lower_bound=lambda value: -5.0),
    ),
    Defect(
        "lower_bound_zero_is_default",
        "A lower_bound of 0 is taken for one that was not given.",
        ("accuracy", "beta_off"),
        zero_is_default("lower_bound", -5.0),
    ),
    Defect(
        "decay_after_update",
        "The state decays after the update instead of before.",
        ("accuracy", "beta_off"),
        staged(Decays__of=decay_after_update),
    ),
    Defect(
        "first_decay_skipped",
        "The first token's decay is skipped.",
        ("accuracy", "beta_off"),
        staged(Decays__of=first_token_keeps_state),
    ),
    Defect(
        "state_not_decayed",
        "The state is handed from chunk to chunk without its decay.",
        ("accuracy", "beta_off"),
        staged(recur=state_not_decayed),
    ),
    Defect("scale_twice", "The scale is applied twice.", ("accuracy",), changed(scale=lambda scale: scale * scale)),
    Defect(
        "scale_on_values",
        "The scale multiplies the values, and so the state.",
        ("accuracy", "beta_off"),
        before(scale_on_values),
    ),
    Defect(
        "scale_is_default",
        "The scale is always 128^-1/2.",
        ("accuracy", "beta_off"),
        changed(scale=lambda scale: 128**-0.5),
    ),
    Defect(
        "scale_zero_is_default",
        "A scale of 0 is taken for one that was not given.",
        ("accuracy",),
        zero_is_default("scale", 128**-0.5),
    ),
    Defect("scale_without_sign", "The scale loses its sign.", ("accuracy", "beta_off"), changed(scale=abs)),
    Defect(
        "beta_without_sigmoid",
        "beta is used as it is given, without the sigmoid.",
        ("accuracy", "written"),
        staged(prepare=beta_as_given),
    ),
    Defect("beta_squared", "beta multiplies the update twice.", ("accuracy",), staged(prepare=beta_squared)),
    Defect(
        "beta_clamped",
        "Beta logits are cut at -4, so that no token is ever left out.",
        ("accuracy", "beta_off"),
        changed(beta=lambda x: x.clamp_min(-4.0)),
    ),
    Defect("query_not_normalised", "Queries are not normalised.", ("accuracy",), staged(prepare=query_not_normalised)),
    Defect(
        "keys_taken_for_normalised",
        "Rows with a norm from 1/2 to 2 are not normalised.",
        ("accuracy",),
        staged(normalise=key_not_normalised),
    ),
    Defect(
        "no_delta_rule",
        "What the state predicts is not taken off the values.",
        ("accuracy",),
        staged(stage_W=plain_linear_attention),
    ),
    Defect(
        "no_interaction_in_a_chunk",
        "Tokens of one chunk do not see each other's updates.",
        ("accuracy",),
        staged(stage_X=no_interaction),
    ),
    Defect(
        "wrong_sign_in_the_inverse", "X is the inverse of I - L.", ("accuracy", "written"), staged(stage_X=wrong_sign)
    ),
    Defect(
        "prediction_before_decay",
        "The state predicts values before it has decayed.",
        ("accuracy",),
        staged(stage_W=prediction_before_decay),
    ),
    Defect(
        "output_before_update",
        "The output of a token does not see its own update.",
        ("accuracy",),
        staged(stage_M=strict_diagonal),
    ),
    Defect(
        "state_before_last_update",
        "The last chunk's update is missing in the final state.",
        ("accuracy", "continuation"),
        staged(recur=state_before_last_update),
    ),
    Defect(
        "initial_state_ignored",
        "Every sequence starts at zero.",
        ("accuracy", "continuation", "beta_off"),
        changed(initial_state=lambda x: None),
    ),
    Defect(
        "final_state_through_bf16",
        "A final state in fp32 holds what bf16 keeps of it.",
        ("chunk_continuation", "gate_off", "beta_off"),
        after(bf16_only),
    ),
    Defect(
        "anchored_at_a_later_row",
        "Exponentials are counted from the last row of their tile, and rounded before the mask.",
        ("causality",),
        staged(Decays__of=anchored_at_later_row),
        failure="Exponentials anchored",
    ),
    Defect(
        "values_share_a_scale",
        "Values are kept in 11 bits with one scale a chunk, which later tokens decide.",
        ("causality",),
        staged(prepare=values_share_a_scale),
    ),
    Defect(
        "lower_bound_not_checked",
        "A lower_bound below -5 or above 0 is accepted.",
        ("arguments",),
        constant(arguments, MIN_LOWER_BOUND=-1e30),
        failure="`lower_bound` outside",
    ),
)
