"""The five families of inputs on which the peers' errors were measured (`h200_peers.json`, "relative_rms_error...")."""

from __future__ import annotations

import torch

from fuzz.cases.families import PUBLISHED

FAMILIES = tuple(PUBLISHED)


def draw(family: str, seed: int = 0, *, tokens: int = 256, heads: int = 16) -> dict:
    """The inputs of `flash_kda.model.forward` (and of the oracle) for one sequence, as keyword arguments.

    q, k, v, g, beta and the state are standard normal, the state times 0.1; A_log and dt_bias uniform in [0, 1). A
    family changes keys, gates and betas. Rounded to bf16 once formed; A_log, dt_bias and the state stay fp32.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator, dtype=torch.float32)

    q, k, v, g = (normal(tokens, heads, 128) for _ in range(4))
    beta = normal(tokens, heads)
    A_log, dt_bias = torch.rand(heads, generator=generator), torch.rand(heads, 128, generator=generator)
    state = 0.1 * normal(heads, 128, 128)
    one_key = normal(1, heads, 128)
    if family == "weak":
        g = g - 6
    elif family == "collinear":
        k, g, beta = 3 * one_key + k, g - 8, beta + 3
    elif family == "collinear_strong":
        k, g, beta = 10 * one_key + k, g - 12, beta + 5
    elif family == "equal":
        k, g, beta = one_key.expand_as(k), torch.full_like(g, -20), torch.full_like(beta, 6)
        A_log, dt_bias = torch.zeros_like(A_log), torch.zeros_like(dt_bias)
    elif family != "random":
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family}")
    q, k, v, g, beta = (x.to(torch.bfloat16) for x in (q, k, v, g, beta))
    return {
        "q": q,
        "k": k,
        "v": v,
        "g": g,
        "beta": beta,
        "scale": 128**-0.5,
        "A_log": A_log,
        "dt_bias": dt_bias,
        "lower_bound": -5.0,
        "initial_state": state,
    }


def errors_by_head(result: torch.Tensor, exact: torch.Tensor, head_axis: int) -> torch.Tensor:
    """Relative RMS error of each head, float64 `[heads]`."""
    axes = [axis for axis in range(exact.dim()) if axis != head_axis]
    return ((result.double() - exact).square().sum(axes) / exact.square().sum(axes)).sqrt()
