"""Error maps: a small picture of the errors in the worst sequence and head, for the report."""

from __future__ import annotations

import math

import torch

from fuzz.judging import errors

ROWS = 128  # of the picture, at most


def error_map(out, state, reference, seq_ranges: list[tuple[int, int]], of: str = "out") -> dict:
    """The error of the sequence and head where it is largest, relative to the RMS of the exact result there.

    out: [B, T, H, V], as written.
    state: [N, H, V, K], as written, or None.
    of: "out" or "state".

    Returns {"of", "sequence", "head", "first_token" (in its sequence), "tokens_per_row", "values"}. Values are rows of
    tokens (for "state", of V columns) by channels: the largest of `tokens_per_row` neighbours, or None where one is not
    finite. The dict is empty if there is nothing to show.
    """
    if of == "state":
        difference, scale = _relative(state.to(reference.state.device), reference.state)
        size = difference.square().mean((2, 3)).sqrt() / scale
        if not size.numel():
            return {}
        sequence, head = divmod(int(size.nan_to_num(nan=torch.inf).argmax()), size.shape[1])
        picture = difference[sequence, head] / scale[sequence, head]
    else:
        exact = reference.out.flatten(0, 1)
        written = out.to(exact.device).flatten(0, 1)
        worst, sequence, head, picture = -1.0, 0, 0, None
        for n, (start, end) in enumerate(seq_ranges):
            if end == start:
                continue
            difference, scale = _relative(
                written[start:end].transpose(0, 1)[None], exact[start:end].transpose(0, 1)[None]
            )
            size = (difference.square().mean((2, 3)).sqrt() / scale)[0].nan_to_num(nan=torch.inf)
            if float(size.max()) > worst:
                worst, sequence, head = float(size.max()), n, int(size.argmax())
                picture = difference[0, head] / scale[0, head]
        if picture is None:
            return {}
    step = max(1, math.ceil(len(picture) / ROWS))
    rows = [part.amax(0) for part in picture.split(step)]  # amax hands on NaN
    values = [[float(f"{x:.3g}") if math.isfinite(x) else None for x in row.tolist()] for row in rows]
    return {"of": of, "sequence": sequence, "head": head, "first_token": 0, "tokens_per_row": step, "values": values}


def _relative(result: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """|result - exact| [N, H, rows, columns] with NaN where it is not finite, and the RMS of exact [N, H]."""
    difference = errors.difference(result, exact).abs()
    difference = difference.where(~errors.not_written(result, exact), torch.nan)
    scale = exact.square().mean((2, 3)).sqrt()
    return difference, scale.clamp_min(torch.finfo(torch.float64).tiny)
