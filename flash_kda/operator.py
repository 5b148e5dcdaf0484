"""The operator as PyTorch knows it: `torch.ops.flash_kda.fwd`, for CPU and CUDA tensors and, without data, for tracers.

Defined by its schema, not by `torch.library.custom_op`: the Python layers of that cost many times what a launch does.
"""

from __future__ import annotations

import torch

from flash_kda import library, model
from flash_kda.arguments import check_arguments

# `checked`: the caller has called check_arguments on just these arguments. A compiled graph cannot, so there they are
# checked here, when it runs.
_SCHEMA = """fwd(
    Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor(a!) out, Tensor A_log, Tensor dt_bias,
    float lower_bound, Tensor? initial_state=None, Tensor(b!)? final_state=None, Tensor? cu_seqlens=None, *,
    bool? validate=None, Tensor(c!)? workspace=None, bool checked=False) -> ()"""

_library = torch.library.Library("flash_kda", "DEF")
# The compiler may not change strides: the last one is 1, and the others decide what has to be copied.
_library.define(" ".join(_SCHEMA.split()), tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))


def _cpu(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None, cu_seqlens=None, *,
    validate=None, workspace=None, checked=False
) -> None:  # fmt: skip
    tensors = (q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens)
    if not checked:
        check_arguments(*tensors, validate, workspace)
    result, state = model.forward(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens)
    with torch.inference_mode():  # tensors that were made in it are written to outside it too, as the kernel does
        out.copy_(result)
        if final_state is not None:
            final_state.copy_(state)


def _cuda(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None, cu_seqlens=None, *,
    validate=None, workspace=None, checked=False
) -> None:  # fmt: skip
    tensors = (q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens)
    if not checked:
        check_arguments(*tensors, validate, workspace)
    library.forward(*tensors, workspace)
    for written in (out, final_state):
        if written is not None and not written.is_inference():
            torch.autograd.graph.increment_version(written)  # autograd did not see the kernel write


def _fake(*arguments, **options) -> None:
    """Writes into what it was given and returns nothing: there is no shape to tell."""


_library.impl("fwd", _cpu, "CPU")
_library.impl("fwd", _cuda, "CUDA")
torch.library.register_fake("flash_kda::fwd", _fake, lib=_library)

fwd = torch.ops.flash_kda.fwd.default
