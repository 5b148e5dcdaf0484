"""The published inputs (`fuzz.cases.families.PUBLISHED`), and errors by head: what was measured of other kernels."""

from __future__ import annotations

from dataclasses import replace

import torch

from fuzz.cases.families import PUBLISHED
from fuzz.cases.inputs import make_inputs
from fuzz.cases.plain import PLAIN

READ = ("q", "k", "v", "g", "beta", "scale", "A_log", "dt_bias", "lower_bound", "initial_state")


def published_inputs(name: str, seed: int = 0, *, tokens: int = 256, heads: int = 16) -> dict:
    """Those of `one_sequence`. Raises KeyError for a name that is not published."""
    return one_sequence(PUBLISHED[name], seed, tokens=tokens, heads=heads)


def one_sequence(families: dict[str, str], seed: int, *, tokens: int, heads: int, device: str = "cpu") -> dict:
    """The arguments of `flash_kda.model.forward` (and of the oracle) for one sequence with an fp32 state.

    families: those that are not plain.
    """
    case = replace(PLAIN, seq_lens=(tokens,), heads=heads, seed=seed, **families)
    inputs = make_inputs(case, device)
    return {name: getattr(inputs, name) for name in READ}


def errors_by_head(result: torch.Tensor, exact: torch.Tensor, head_axis: int) -> torch.Tensor:
    """Relative RMS error of each head, float64 `[heads]`."""
    axes = [axis for axis in range(exact.dim()) if axis != head_axis]
    return ((result.double() - exact).square().sum(axes) / exact.square().sum(axes)).sqrt()
