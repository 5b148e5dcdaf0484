"""Defects of meaning: another operator than that of docs/operator.md, or an argument taken for something else."""

from __future__ import annotations

from dataclasses import replace

import torch

from flash_kda import arguments, model
from fuzz.defects.defect import Defects, after, before, changed, constant, replaced, stage

SEMANTICS = Defects("semantics")
add, plant = SEMANTICS.add, SEMANTICS.plant

# ---------------------------------------------------------------------------------------------------------------- gates


@plant("accuracy", stage("log_decay"), failure="Safe gate")
def softplus_gate(original, g, A_log, dt_bias, lower_bound):
    """The gate is a softplus clamped at the bound instead of a sigmoid.

    -exp(A_log) softplus(g + dt_bias).
    """
    a = -A_log.exp()[:, None, None] * torch.nn.functional.softplus(g + dt_bias[:, None])
    return a.nan_to_num(nan=0.0).clamp_min(lower_bound) * model.LOG2_E


@plant("accuracy beta_off", stage("log_decay"))
def gate_rate_not_exponential(original, g, A_log, dt_bias, lower_bound):
    """A_log is the gate's rate, not its logarithm."""
    return original(g, A_log.clamp_min(1e-6).log(), dt_bias, lower_bound)


@plant("accuracy beta_off", stage("log_decay"))
def gate_bias_after_rate(original, g, A_log, dt_bias, lower_bound):
    """dt_bias is added after the rate has multiplied g."""
    rate = A_log.exp()[:, None]
    return original(g, A_log, dt_bias / rate, lower_bound)


add("gate_bias_without_sign", "accuracy beta_off", changed(dt_bias=torch.abs), "dt_bias loses its sign.")
add("gate_bias_subtracted", "accuracy beta_off", changed(dt_bias=torch.neg), "dt_bias is subtracted.")


@plant("accuracy beta_off", stage("log_decay"))
def natural_decay_in_base_2(original, *args):
    """A natural log-decay is the exponent of 2."""
    return original(*args) / model.LOG2_E


@plant("accuracy key_channels", stage("log_decay"))
def one_decay_a_head(original, *args):
    """All channels decay as the first one.

    The gated delta rule has one decay a head.
    """
    a = original(*args)
    return a[..., :1].expand_as(a)


@plant("accuracy beta_off", stage("Decays.of"))
def decay_after_update(original, a):
    """The state decays after the update instead of before.

    Each token decays by what belongs to the token before it. The last decay of a chunk goes to the state.
    """
    d = original(torch.cat([torch.zeros_like(a[:, :, :1]), a[:, :, :-1]], 2))
    return replace(d, after=d.after * a[:, :, -1:].exp2()[:, :, :, None], chunk=d.chunk * a[:, :, -1].exp2())


@plant("accuracy beta_off", stage("Decays.of"))
def first_decay_skipped(original, a):
    """The first token's decay is skipped.

    The decay of the first token of each chunk is taken for that of a token before the chunk.
    """
    a = a.clone()
    a[:, :, 0] = 0
    return original(a)


@plant("accuracy beta_off", stage("recur"))
def state_not_decayed(original, prepared, state, chunks):
    """The state is handed from chunk to chunk without its decay."""
    return original(replace(prepared, decay=torch.ones_like(prepared.decay)), state, chunks)


# ----------------------------------------------------------------------------------------------------------- the update


@plant("accuracy written", stage("prepare"))
def beta_without_sigmoid(original, q, k, v, g, beta, *args):
    """beta is used as it is given, without the sigmoid."""

    def unless_beta(function, f, x):
        return x if x is beta else function(f, x)

    with replaced(model, "through_fp64", unless_beta):
        return original(q, k, v, g, beta, *args)


@plant("accuracy", stage("prepare"))
def beta_squared(original, q, k, v, g, beta, *args):
    """beta multiplies the update twice.

    X diag(b) diag(b); L has its factor once.
    """
    b = torch.sigmoid(beta)[:, :, None]
    with replaced(model, "stage_X", lambda stage_X, L, kn: stage_X(L, kn) * b):
        return original(q, k, v, g, beta, *args)


@plant("accuracy", stage("prepare"))
def query_not_normalised(original, q, k, *args):
    """Queries are not normalised."""
    prepared = original(q, k, *args)
    return replace(prepared, qn=torch.ones_like(prepared.qn))


@plant("accuracy", stage("normalise"))
def keys_taken_for_normalised(original, x):
    """Rows with a norm from 1/2 to 2 are not normalised."""
    rows, factor = original(x)
    norm = x.norm(dim=-1, keepdim=True)
    return rows, torch.where((norm > 0.5) & (norm < 2), 1.0, factor)


@plant("accuracy", stage("stage_W"))
def no_delta_rule(original, Xb, K):
    """What the state predicts is not taken off the values."""
    return torch.zeros_like(K)


@plant("accuracy", stage("stage_X"))
def no_interaction_in_a_chunk(original, L, kn):
    """Tokens of one chunk do not see each other's updates."""
    return torch.diag_embed(kn.squeeze(-1))


@plant("accuracy written", stage("stage_X"))
def wrong_sign_in_the_inverse(original, L, kn):
    """X is the inverse of I - L."""
    return original(-L, kn)


@plant("accuracy", stage("stage_W"))
def prediction_before_decay(original, Xb, K):
    """The state predicts values before it has decayed."""
    return original(Xb, K / K.norm(dim=-1, keepdim=True).clamp_min(1e-30))


@plant("accuracy", stage("stage_M"))
def output_before_update(original, *args):
    """The output of a token does not see its own update."""
    return original(*args).tril(-1)


@plant("accuracy continuation", stage("recur"))
def state_before_last_update(original, prepared, state, chunks):
    """The last chunk's update is missing in the final state.

    Each chunk hands on the state that the chunk before it has left.
    """
    result, kept = torch.empty_like(prepared.V), state.clone()
    for sequences, now in chunks.steps:
        kept[sequences] = state[sequences]
        result[now] = original(prepared, state, replace(chunks, steps=[(sequences, now)]))[now]
    state.copy_(kept)
    return result


# ------------------------------------------------------------------------------------------------------------ causality


@plant("causality", stage("Decays.of"), failure="Exponentials anchored")
def anchored_at_a_later_row(original, a):
    """Exponentials are counted from the last row of their tile, and rounded before the mask.

    That row lies in the future of the others. The decay between the rows and their anchor is rounded with the
    operands, so that the anchor shows.
    """
    d = original(a)
    anchor = d.block.clamp_min(2.0**-100)
    return replace(d, from_start=(d.from_start / anchor).bfloat16().float() * anchor)


@plant("causality", stage("prepare"))
def values_share_a_scale(original, q, k, v, *args):
    """Values are kept in 11 bits with one scale a chunk, which later tokens decide."""
    unit = v.abs().amax(2, keepdim=True).clamp_min(2.0**-100) / 2**10
    return original(q, k, (v / unit).round() * unit, *args)


# ------------------------------------------------------------------------------------------------------------ arguments


@plant("accuracy beta_off", before())
def scale_on_values(given) -> None:
    """The scale multiplies the values, and so the state."""
    given.v, given.scale = (given.v.float() * given.scale).bfloat16(), 1.0


@plant("chunk_continuation gate_off beta_off", after("final_state"))
def final_state_through_bf16(given) -> None:
    """A final state in fp32 holds what bf16 keeps of it."""
    given.final_state.copy_(given.final_state.bfloat16())


add("lower_bound_ignored", "accuracy beta_off", changed(lower_bound=lambda value: -5.0), "lower_bound is always -5.")
add(
    "lower_bound_zero_is_default",
    "accuracy beta_off",
    changed(lower_bound=lambda value: value or -5.0),
    "A lower_bound of 0 is taken for one that was not given.",
)
add(
    "lower_bound_not_checked",
    "arguments",
    constant(arguments, MIN_LOWER_BOUND=-1e30),
    "A lower_bound below -5 or above 0 is accepted.",
    "`lower_bound` outside",
)
add("scale_twice", "accuracy", changed(scale=lambda scale: scale * scale), "The scale is applied twice.")
add("scale_is_default", "accuracy beta_off", changed(scale=lambda scale: 128**-0.5), "The scale is always 128^-1/2.")
add(
    "scale_zero_is_default",
    "accuracy",
    changed(scale=lambda scale: scale or 128**-0.5),
    "A scale of 0 is taken for one that was not given.",
)
add("scale_without_sign", "accuracy beta_off", changed(scale=abs), "The scale loses its sign.")
add(
    "beta_clamped",
    "accuracy beta_off",
    changed(beta=lambda x: x.clamp_min(-4.0)),
    "Beta logits are cut at -4, so that no token is ever left out.",
)
add(
    "initial_state_ignored",
    "accuracy continuation beta_off",
    changed(initial_state=lambda x: None),
    "Every sequence starts at zero.",
)
