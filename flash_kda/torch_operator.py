"""The operator as PyTorch knows it: `torch.ops.flash_kda.fwd`, for CPU and CUDA tensors and, without data, for tracers.

Defined by its schema, not by `torch.library.custom_op`: the Python layers of that cost many times what a launch does.
"""

from __future__ import annotations

import torch

from flash_kda import library, model, ordinary
from flash_kda.arguments import check_arguments

# `checked`: the caller has called check_arguments on just these arguments. A compiled graph cannot, so there they are
# checked here, when it runs.
_SCHEMA = """fwd(
    Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor(a!) out, Tensor A_log, Tensor dt_bias,
    float lower_bound, Tensor? initial_state=None, Tensor(b!)? final_state=None, Tensor? cu_seqlens=None, *,
    bool? validate=None, Tensor(c!)? workspace=None, Tensor? state_indices=None, Tensor(d!)? checkpoint_state=None,
    Tensor? checkpoint_offsets=None, bool checked=False) -> ()"""

_library = torch.library.Library("flash_kda", "DEF")
# The compiler may not change strides: the last one is 1, and the others decide what has to be copied.
_library.define(" ".join(_SCHEMA.split()), tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


def _cpu(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None, cu_seqlens=None, *,
    validate=None, workspace=None, state_indices=None, checkpoint_state=None, checkpoint_offsets=None, checked=False
) -> None:  # fmt: skip
    if not checked:
        check_arguments(
            q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, validate,
            workspace, state_indices, checkpoint_state, checkpoint_offsets
        )  # fmt: skip
    named = rows = None
    if state_indices is not None:
        named = state_indices >= 0
        rows = state_indices[named].long()
        if initial_state is not None:
            pool = initial_state
            initial_state = pool.new_zeros(len(state_indices), *pool.shape[1:])
            initial_state[named] = pool[rows]
    gates = A_log, dt_bias, lower_bound
    result, state = model.forward(q, k, v, g, beta, scale, *gates, initial_state, cu_seqlens)
    index, states = None, None
    if checkpoint_state is not None:
        index, states = model.checkpoints(q, k, v, g, beta, *gates, initial_state, cu_seqlens, checkpoint_offsets)
    end = out.shape[1] if cu_seqlens is None else int(cu_seqlens[-1])
    with torch.inference_mode():  # tensors that were made in it are written to outside it too, as the kernel does
        out[:, :end].copy_(result[:, :end])
        if final_state is not None and state_indices is not None:
            final_state[rows] = state[named].to(final_state.dtype)
        elif final_state is not None:
            final_state.copy_(state)
        if checkpoint_state is not None:
            checkpoint_state[index] = states.to(checkpoint_state.dtype)


def _cuda(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None, cu_seqlens=None, *,
    validate=None, workspace=None, state_indices=None, checkpoint_state=None, checkpoint_offsets=None, checked=False
) -> None:  # fmt: skip
    tensors = (q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens)
    serving = (state_indices, checkpoint_state, checkpoint_offsets)
    if not checked:
        if ordinary.run(*tensors, validate, workspace, *serving):
            return
        check_arguments(*tensors, validate, workspace, *serving)
    library.forward(*tensors, workspace, *serving)
    ordinary.note_writes(out, final_state, checkpoint_state)


def _fake(*arguments, **options) -> None:
    """Writes into what it was given and returns nothing: there is no shape to tell."""


_library.impl("fwd", _cpu, "CPU")
_library.impl("fwd", _cuda, "CUDA")
torch.library.register_fake("flash_kda::fwd", _fake, lib=_library)

fwd = torch.ops.flash_kda.fwd.default

# Dispatch keys of a thread that let the call through to the kernel unchanged.
_HARMLESS = ("BackendSelect", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA")


def is_direct() -> bool:
    """Whether a call of an operator on plain tensors comes straight to its kernel in this thread.

    Not so under a tracer, a mode of `__torch_function__` or `__torch_dispatch__`, a transform of `torch.func` or a
    profiler: each of them wants to see the call.
    """
    return not _function_modes() and not _profiling() and not _included().raw_repr() & _MEANS_SOMETHING


try:
    _function_modes = torch._C._len_torch_function_stack
    _profiling = torch.autograd._profiler_enabled
    _included = torch._C._dispatch_tls_local_include_set
    _MEANS_SOMETHING = ~0
    for _name in _HARMLESS:
        _MEANS_SOMETHING &= ~torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _name)).raw_repr()
except AttributeError:  # another PyTorch: then nobody knows

    def is_direct() -> bool:
        return False
