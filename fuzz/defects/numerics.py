"""Defects of the arithmetic: unstable, too coarse, or out of range."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from flash_kda import model
from fuzz.defects.defect import Defects, after, changed, constant, formats, replaced, stage

NUMERICS = Defects("numerics")
add, plant = NUMERICS.add, NUMERICS.plant


def bf16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def fp16(x: torch.Tensor) -> torch.Tensor:
    """Infinite beyond 65504."""
    return x.half().float()


def fp8(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def fixed_point(x: torch.Tensor) -> torch.Tensor:
    return ((x.float() * 16).round() / 16).bfloat16()


def truncated_bf16(x: torch.Tensor) -> torch.Tensor:
    """The upper half of an fp32 word, as a shift by 16 bits gives it: never rounded up."""
    return (x.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)


@plant("accuracy", stage("prepare"))
def beta_in_fp16(original, q, k, v, g, beta, *args):
    """sigmoid(beta) is an fp16 number, of which little is left far below zero."""

    def through(through_fp64, function, x):
        return through_fp64(function, x).half().float() if x is beta else through_fp64(function, x)

    with replaced(model, "through_fp64", through):
        return original(q, k, v, g, beta, *args)


@plant("accuracy written", stage("stage_X"), failure="Triangular inverse")
def fp16_neumann_inverse(original, L, kn):
    """Diagonal blocks are inverted by a Neumann series in fp16, whose powers explode on similar keys.

    Blocks of 16 by (I - A)(I + A^2)(I + A^4)(I + A^8) in fp16, merged as ever.
    """
    A = (L * kn.mT).half()  # the same inverse with the factors of the columns inside
    eye = torch.eye(model.BLOCK, dtype=torch.float16)
    X = original(L, kn)
    for i in range(model.BLOCKS):
        rows = slice(model.BLOCK * i, model.BLOCK * (i + 1))
        block = A[:, :, rows, rows]
        power, inverse = block, eye - block
        for _ in range(3):
            power = power @ power
            inverse = inverse @ (eye + power)
        X[:, :, rows, rows] = inverse.float() * kn[:, :, rows]
    upper, lower = slice(0, model.BLOCK), slice(model.BLOCK, model.CHUNK)
    X[:, :, lower, upper] = -(X[:, :, lower, lower] @ L[:, :, lower, upper] @ X[:, :, upper, upper])
    return X


# ---------------------------------------------------------------------------------------------------------------- norms


@plant("written accuracy", stage("normalise"))
def missing_epsilon(original, x):
    """The 1e-6 under the root is missing, so that a row of zeros becomes NaN."""
    rows, _ = original(x)
    return rows, torch.rsqrt(rows.square().sum(-1, keepdim=True))


add("epsilon_too_large", "accuracy", constant(NORM_EPSILON=1e-5), "The epsilon is 1e-5.")


@plant("accuracy", stage("normalise"))
def epsilon_beside_the_root(original, x):
    """The epsilon is added to the norm instead of to the sum of squares."""
    rows, factor = original(x)
    norm = rows.norm(dim=-1, keepdim=True)
    return rows, torch.where(norm > 0, 1 / (norm + model.NORM_EPSILON), factor)


@plant("accuracy", stage("normalise"))
def norm_summed_in_bf16(original, x):
    """The squares of a row are added up in bf16.

    One channel after the other.
    """
    rows, factor = original(x)
    squares = functools.reduce(torch.add, x.bfloat16().square().unbind(-1)).float()[..., None]
    return rows, torch.where((rows == x).all(-1, keepdim=True), torch.rsqrt(squares + model.NORM_EPSILON), factor)


@plant("accuracy written", stage("normalise"))
def norm_summed_in_fp16(original, x):
    """The squares of a row are added up in fp16, which large rows overflow and small ones leave at zero."""
    squares = (x.half() * x.half()).sum(-1, keepdim=True).float()
    return x, torch.rsqrt(squares + model.NORM_EPSILON)


@plant("accuracy", stage("normalise"))
def operands_rounded_twice(original, x):
    """Normalised rows are rounded to bf16 before they decay, and again after."""
    rows, factor = original(x)
    return bf16(rows * factor), torch.ones_like(factor)


# ----------------------------------------------------------------------------------------------------- gates and decays


@plant("accuracy", stage("Decays.of"))
def decay_sums_in_bf16(original, a):
    """The cumulative log-decay is kept in bf16."""
    G = bf16(model.to_blocks(a).cumsum(3))
    steps = torch.cat([G[:, :, :, :1], G.diff(dim=3)], 3)
    return original(steps.flatten(2, 3))


@plant("accuracy beta_off", stage("log_decay"))
def log_decay_in_bf16(original, *args):
    """The log-decay of a token is rounded to bf16."""
    return bf16(original(*args))


@plant("accuracy beta_off", stage("log_decay"))
def gate_sum_in_bf16(original, g, A_log, dt_bias, lower_bound):
    """The sum g + dt_bias is rounded to bf16."""
    return original(bf16(g + dt_bias[:, None]), A_log, torch.zeros_like(dt_bias), lower_bound)


add("gate_bias_in_bf16", "accuracy beta_off", changed(dt_bias=bf16), "The bias dt_bias is read as bf16.")
add("gate_rate_in_bf16", "accuracy beta_off", changed(A_log=bf16), "A_log is read as bf16.")


@plant("accuracy gate_off", stage("log_decay"))
def gate_logit_clamped(original, g, A_log, dt_bias, lower_bound):
    """The gate's logit is cut to [-8, 8], so that an open gate still decays."""
    rate = A_log.exp()[:, None, None]
    logit = (rate * (g + dt_bias[:, None])).clamp(-8, 8)
    return lower_bound * model.LOG2_E * torch.sigmoid(logit)


@plant("accuracy beta_off", stage("log_decay"))
def bound_one_unit_small(original, g, A_log, dt_bias, lower_bound):
    """lower_bound is one unit of bf16 too small."""
    return original(g, A_log, dt_bias, lower_bound * (1 - 2.0**-8))


@plant("written accuracy", stage("Decays.of"))
def one_anchor_a_chunk(original, a):
    """Decays and their inverses are counted over a whole chunk, so that infinity meets zero where it decays far."""
    d = original(a)
    G = a.cumsum(2)
    return replace(
        d,
        from_start=model.to_blocks(G.exp2()),
        inverse=model.to_blocks((-G).exp2()),
        block=torch.ones_like(d.block),
        before=torch.ones_like(d.before),
        after=model.to_blocks(a).sum(3, keepdim=True).sum(2, keepdim=True).exp2().expand_as(d.after),
    )


@plant("written accuracy", stage("Decays.of"))
def inverse_decay_from_fp16(original, a):
    """The inverse of a decay is computed from its fp16 rounding, which is zero when a block decays far.

    Below 2^-25 the inverse is infinite.
    """
    d = original(a)
    return replace(d, inverse=1 / fp16(d.from_start))


@plant("accuracy beta_off", stage("Decays.of"))
def decays_between_blocks_in_fp16(original, a):
    """Decays over whole blocks are kept in fp16."""
    d = original(a)
    return replace(d, **{name: fp16(getattr(d, name)) for name in ("before", "after", "chunk")})


# ----------------------------------------------------------------------------------------------- operands and the state


@plant("accuracy gate_off beta_off", stage("recur"))
def state_in_bf16(original, prepared, state, chunks):
    """The state is kept in bf16 from chunk to chunk, where fp32 is needed."""
    state.copy_(bf16(state))
    O = original(prepared, state, chunks)
    state.copy_(bf16(state))
    return O


CUT = formats(**dict.fromkeys(("diagonal", "between", "K", "Q", "Kr", "M", "W", "U", "S"), truncated_bf16))

add("keys_in_fp8", "accuracy", changed(k=fp8), "Keys are rounded to fp8.")
add("values_in_fp8", "accuracy scaling", changed(v=fp8), "Values are rounded to fp8.")
add("values_in_fixed_point", "accuracy scaling", changed(v=fixed_point), "Values are multiples of 2^-4.")
add(
    "updates_in_fp16",
    "written accuracy scaling",
    formats(U=fp16),
    "U is an operand in fp16, which large values overflow.",
)
add(
    "state_operand_in_fp16",
    "written accuracy scaling",
    formats(S=fp16),
    "The state as an operand is in fp16, which large states overflow.",
)
add(
    "decayed_columns_in_fp16",
    "written accuracy",
    formats(diagonal=fp16),
    "Keys times their inverse decay are in fp16, beyond which a block that decays far lies.",
)
add(
    "operands_truncated",
    "accuracy",
    CUT,
    "Operands are cut to bf16 instead of rounded, so that all errors have one sign.",
)


# ---------------------------------------------------------------------------------------------------------------- gains


add("output_gain", "gain", changed(scale=lambda scale: 1.001 * scale), "Outputs are 0.1 % too large.")


@plant("gain", after("final_state"))
def state_gain(given) -> None:
    """Final states in fp32 are 0.1 % too small."""
    if given.final_state.dtype == torch.float32:
        given.final_state.mul_(0.999)


def louder(size):
    """Outputs of the one token in eight for which `size` is largest, of each call, times 1.005."""

    def change(given):
        if given.out.numel():
            x = size(given).flatten()
            chosen = size(given) >= x.kthvalue(x.numel() - x.numel() // 8).values
            given.out.copy_(torch.where(chosen[..., None], given.out.float() * 1.005, given.out.float()))

    return after()(change)


for name, size, tokens in (
    ("gain_of_small_betas", lambda given: -given.beta.float(), "with a small beta"),
    ("gain_of_fast_decay", lambda given: given.g.float().mean(-1), "that decay fast"),
    ("gain_of_large_keys", lambda given: given.k.float().norm(dim=-1), "with a long key"),
):
    add(name, "gain", louder(size), f"Outputs of tokens {tokens} are 0.5 % too large.")
