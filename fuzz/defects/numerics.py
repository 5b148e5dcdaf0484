"""Defects of the arithmetic: unstable, too coarse, or out of range."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from flash_kda import model
from fuzz.defects.defect import Defect, after, changed, constant, formats, kind, replaced, staged


def bf16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def fp16(x: torch.Tensor) -> torch.Tensor:
    """Infinite beyond 65504."""
    return x.half().float()


def fp8(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def truncated_bf16(x: torch.Tensor) -> torch.Tensor:
    """The upper half of an fp32 word, as a shift by 16 bits gives it: never rounded up."""
    return (x.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)


def neumann(original, L, kn):
    """Blocks of 16 by (I - A)(I + A^2)(I + A^4)(I + A^8) in fp16, merged as ever."""
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


def without_epsilon(original, x):
    rows, _ = original(x)
    return rows, torch.rsqrt(rows.square().sum(-1, keepdim=True))


def epsilon_beside_the_root(original, x):
    rows, factor = original(x)
    norm = rows.norm(dim=-1, keepdim=True)
    return rows, torch.where(norm > 0, 1 / (norm + model.NORM_EPSILON), factor)


def squares_in_bf16(original, x):
    """One channel after the other."""
    rows, factor = original(x)
    squares = functools.reduce(torch.add, x.bfloat16().square().unbind(-1)).float()[..., None]
    return rows, torch.where((rows == x).all(-1, keepdim=True), torch.rsqrt(squares + model.NORM_EPSILON), factor)


def squares_in_fp16(original, x):
    """The sum of squares overflows beyond 65504 and is lost below 6e-8."""
    squares = (x.half() * x.half()).sum(-1, keepdim=True).float()
    return x, torch.rsqrt(squares + model.NORM_EPSILON)


def sums_in_bf16(original, a):
    """The cumulative log-decay is kept in bf16."""
    G = bf16(model.to_blocks(a).cumsum(3))
    steps = torch.cat([G[:, :, :, :1], G.diff(dim=3)], 3)
    return original(steps.flatten(2, 3))


def one_anchor_a_chunk(original, a):
    """Decays counted from the start of the chunk, their inverses too: these overflow where a chunk decays far."""
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


def inverse_by_division(original, a):
    """1 / exp(G) of an exponential that was rounded to fp16: zero, and so infinity, below 2^-25."""
    d = original(a)
    return replace(d, inverse=1 / fp16(d.from_start))


def coarse_exponential(original, a):
    d = original(a)
    steps = {name: fp16(getattr(d, name)) for name in ("before", "after", "chunk")}
    return replace(d, **steps)


def gate_in_bf16(original, g, A_log, dt_bias, lower_bound):
    """The sum g + dt_bias is rounded to bf16."""
    return original(bf16(g + dt_bias[:, None]), A_log, torch.zeros_like(dt_bias), lower_bound)


def log_decay_in_bf16(original, *args):
    return bf16(original(*args))


def short_gate(original, g, A_log, dt_bias, lower_bound):
    """The logit is cut to [-8, 8], where a sigmoid is not yet 0 or 1."""
    rate = A_log.exp()[:, None, None]
    logit = (rate * (g + dt_bias[:, None])).clamp(-8, 8)
    return lower_bound * model.LOG2_E * torch.sigmoid(logit)


def bound_one_unit_small(original, g, A_log, dt_bias, lower_bound):
    """lower_bound is the next bf16 number towards 0."""
    return original(g, A_log, dt_bias, lower_bound * (1 - 2.0**-8))


def normalised_in_bf16(original, x):
    rows, factor = original(x)
    return bf16(rows * factor), torch.ones_like(factor)


def state_in_bf16(original, prepared, state, chunks):
    """The state is kept in bf16 from chunk to chunk."""
    state.copy_(bf16(state))
    O = original(prepared, state, chunks)
    state.copy_(bf16(state))
    return O


def beta_in_fp16(original, q, k, v, g, beta, *args):
    def through(through_fp64, function, x):
        return through_fp64(function, x).half().float() if x is beta else through_fp64(function, x)

    with replaced(model, "through_fp64", through):
        return original(q, k, v, g, beta, *args)


def smaller_state(given) -> None:
    if given.final_state is not None and given.final_state.dtype == torch.float32:
        given.final_state.mul_(0.999)


def louder(size):
    """Outputs of the one token in eight for which `size` is largest, of each call, times 1.005."""

    def change(given):
        if given.out.numel():
            x = size(given).flatten()
            chosen = size(given) >= x.kthvalue(x.numel() - x.numel() // 8).values
            given.out.copy_(torch.where(chosen[..., None], given.out.float() * 1.005, given.out.float()))

    return change


def beta(given) -> torch.Tensor:
    return -given.beta.float()


def decay(given) -> torch.Tensor:
    return given.g.float().mean(-1)


def norm(given) -> torch.Tensor:
    return given.k.float().norm(dim=-1)


DEFECTS = kind(
    "numerics",
    Defect(
        "beta_in_fp16",
        "sigmoid(beta) is an fp16 number, of which little is left far below zero.",
        ("accuracy",),
        staged(prepare=beta_in_fp16),
    ),
    Defect(
        "fp16_neumann_inverse",
        "Diagonal blocks are inverted by a Neumann series in fp16, whose powers explode on similar keys.",
        ("accuracy", "written"),
        staged(stage_X=neumann),
        failure="Triangular inverse",
    ),
    Defect(
        "missing_epsilon",
        "The 1e-6 under the root is missing, so that a row of zeros becomes NaN.",
        ("written", "accuracy"),
        staged(normalise=without_epsilon),
    ),
    Defect("epsilon_too_large", "The epsilon is 1e-5.", ("accuracy",), constant(NORM_EPSILON=1e-5)),
    Defect(
        "epsilon_beside_the_root",
        "The epsilon is added to the norm instead of to the sum of squares.",
        ("accuracy",),
        staged(normalise=epsilon_beside_the_root),
    ),
    Defect(
        "norm_summed_in_bf16",
        "The squares of a row are added up in bf16.",
        ("accuracy",),
        staged(normalise=squares_in_bf16),
    ),
    Defect(
        "norm_summed_in_fp16",
        "The squares of a row are added up in fp16, which large rows overflow and small ones leave at zero.",
        ("accuracy", "written"),
        staged(normalise=squares_in_fp16),
    ),
    Defect(
        "decay_sums_in_bf16",
        "The cumulative log-decay is kept in bf16.",
        ("accuracy",),
        staged(Decays__of=sums_in_bf16),
    ),
    Defect(
        "log_decay_in_bf16",
        "The log-decay of a token is rounded to bf16.",
        ("accuracy", "beta_off"),
        staged(log_decay=log_decay_in_bf16),
    ),
    Defect(
        "gate_sum_in_bf16",
        "The sum g + dt_bias is rounded to bf16.",
        ("accuracy", "beta_off"),
        staged(log_decay=gate_in_bf16),
    ),
    Defect("gate_bias_in_bf16", "The bias dt_bias is read as bf16.", ("accuracy", "beta_off"), changed(dt_bias=bf16)),
    Defect("gate_rate_in_bf16", "A_log is read as bf16.", ("accuracy", "beta_off"), changed(A_log=bf16)),
    Defect(
        "gate_logit_clamped",
        "The gate's logit is cut to [-8, 8], so that an open gate still decays.",
        ("accuracy", "gate_off"),
        staged(log_decay=short_gate),
    ),
    Defect(
        "bound_one_unit_small",
        "lower_bound is one unit of bf16 too small.",
        ("accuracy", "beta_off"),
        staged(log_decay=bound_one_unit_small),
    ),
    Defect(
        "one_anchor_a_chunk",
        "Decays and their inverses are counted over a whole chunk, so that infinity meets zero where it decays far.",
        ("written", "accuracy"),
        staged(Decays__of=one_anchor_a_chunk),
    ),
    Defect(
        "inverse_decay_from_fp16",
        "The inverse of a decay is computed from its fp16 rounding, which is zero when a block decays far.",
        ("written", "accuracy"),
        staged(Decays__of=inverse_by_division),
    ),
    Defect(
        "decays_between_blocks_in_fp16",
        "Decays over whole blocks are kept in fp16.",
        ("accuracy", "beta_off"),
        staged(Decays__of=coarse_exponential),
    ),
    Defect(
        "state_in_bf16",
        "The state is kept in bf16 from chunk to chunk, where fp32 is needed.",
        ("accuracy", "gate_off", "beta_off"),
        staged(recur=state_in_bf16),
    ),
    Defect("keys_in_fp8", "Keys are rounded to fp8.", ("accuracy",), changed(k=fp8)),
    Defect("values_in_fp8", "Values are rounded to fp8.", ("accuracy", "scaling"), changed(v=fp8)),
    Defect(
        "values_in_fixed_point",
        "Values are multiples of 2^-4.",
        ("accuracy", "scaling"),
        changed(v=lambda x: ((x.float() * 16).round() / 16).bfloat16()),
    ),
    Defect(
        "updates_in_fp16",
        "U is an operand in fp16, which large values overflow.",
        ("written", "accuracy", "scaling"),
        formats(U=fp16),
    ),
    Defect(
        "state_operand_in_fp16",
        "The state as an operand is in fp16, which large states overflow.",
        ("written", "accuracy", "scaling"),
        formats(S=fp16),
    ),
    Defect(
        "decayed_columns_in_fp16",
        "Keys times their inverse decay are in fp16, beyond which a block that decays far lies.",
        ("written", "accuracy"),
        formats(diagonal=fp16),
    ),
    Defect(
        "operands_truncated",
        "Operands are cut to bf16 instead of rounded, so that all errors have one sign.",
        ("accuracy",),
        formats(**dict.fromkeys(("diagonal", "between", "K", "Q", "Kr", "M", "W", "U", "S"), truncated_bf16)),
    ),
    Defect(
        "operands_rounded_twice",
        "Normalised rows are rounded to bf16 before they decay, and again after.",
        ("accuracy",),
        staged(normalise=normalised_in_bf16),
    ),
    Defect("output_gain", "Outputs are 0.1 % too large.", ("gain",), changed(scale=lambda scale: 1.001 * scale)),
    Defect("state_gain", "Final states in fp32 are 0.1 % too small.", ("gain",), after(smaller_state)),
    Defect(
        "gain_of_small_betas",
        "Outputs of tokens with a small beta are 0.5 % too large.",
        ("gain",),
        after(louder(beta)),
    ),
    Defect(
        "gain_of_fast_decay", "Outputs of tokens that decay fast are 0.5 % too large.", ("gain",), after(louder(decay))
    ),
    Defect(
        "gain_of_large_keys", "Outputs of tokens with a long key are 0.5 % too large.", ("gain",), after(louder(norm))
    ),
)
