"""The adapter: gives the signature of `flash_kda.fwd` to a function that returns its results."""

from __future__ import annotations

from collections.abc import Callable

Check = Callable[..., object]


def writing(compute: Callable, check: Check = lambda *tensors: None) -> Callable:
    """A function with the arguments of `flash_kda.fwd`, which writes what `compute` returns: (out, final_state).

    compute: takes q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens.
    check: is called with all thirteen arguments first. It raises the errors of bad arguments.
    """

    def fwd(
        q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None, cu_seqlens=None
    ):
        check(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens)
        result, state = compute(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens)
        end = out.shape[1] if cu_seqlens is None else int(cu_seqlens[-1])
        out[:, :end].copy_(result[:, :end])
        if final_state is not None:
            final_state.copy_(state)

    fwd.__doc__ = compute.__doc__
    return fwd
