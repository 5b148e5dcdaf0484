"""The operators that vLLM calls, `torch.ops._flashkda_C.fwd` and `.get_workspace_size`, by this package.

Importing this module registers both, and makes it stand in for `vllm._flashkda_C`, which vLLM imports for them. Raises
RuntimeError if vLLM's own library is loaded already. `flash_kda.vllm_plugin` does that for vLLM.
"""

from __future__ import annotations

import sys

import torch

from flash_kda.forward import fwd as _fwd
from flash_kda.library import get_workspace_size as _get_workspace_size

NAMESPACE = "_flashkda_C"
MODULE = f"vllm.{NAMESPACE}"

_SCHEMAS = (
    """fwd(
    Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, float scale, Tensor(a!) out, Tensor(c!) workspace,
    Tensor A_log, Tensor dt_bias, float lower_bound, Tensor? initial_state=None, Tensor(b!)? final_state=None,
    Tensor? cu_seqlens=None, Tensor(d!)? checkpoint_state=None, Tensor? checkpoint_offsets=None) -> ()""",
    "get_workspace_size(int T_total, int H, int N=1) -> int",
)


def fwd(
    q, k, v, g, beta, scale, out, workspace, A_log, dt_bias, lower_bound, initial_state=None, final_state=None,
    cu_seqlens=None, checkpoint_state=None, checkpoint_offsets=None
) -> None:  # fmt: skip
    """`flash_kda.fwd` in vLLM's order of arguments. See there for shapes, dtypes and errors.

    workspace: `[get_workspace_size(T_total, H, N)]` uint8. Tensors that have to be copied may need more than it has:
        then the memory comes from PyTorch's allocator.
    """
    tensors = (q, k, v, g, out)
    small = (
        isinstance(workspace, torch.Tensor)
        and workspace.dtype == torch.uint8
        and all(isinstance(x, torch.Tensor) for x in tensors)  # else `fwd` says what is wrong
        and workspace.numel() < _get_workspace_size(*tensors)
    )
    _fwd(
        q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens,
        workspace=None if small else workspace, checkpoint_state=checkpoint_state, checkpoint_offsets=checkpoint_offsets
    )  # fmt: skip


def get_workspace_size(T_total: int, H: int, N: int = 1) -> int:
    """The bytes that `fwd` needs as workspace, on the current GPU. Without a GPU it is 0."""
    return _get_workspace_size(T_total, H, N)


def _fake(*arguments, **options) -> None:
    """Writes into what it was given and returns nothing: there is no shape to tell."""


def _register() -> torch.library.Library:
    loaded = sys.modules.get(MODULE)
    try:
        if loaded is not None:
            raise RuntimeError(f"{MODULE} is imported")
        library = torch.library.Library(NAMESPACE, "DEF")
        for schema in _SCHEMAS:
            library.define(" ".join(schema.split()))
    except RuntimeError as error:
        raise RuntimeError(
            f"flash_kda.vllm: expected no library that defines torch.ops.{NAMESPACE}, got one: vLLM's own is loaded "
            f"already. Import flash_kda.vllm before it, or unset FLASH_KDA_VLLM to use vLLM's."
        ) from error
    for device in ("CPU", "CUDA"):
        library.impl("fwd", fwd, device)
    library.impl("get_workspace_size", get_workspace_size, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::fwd", _fake, lib=library)
    sys.modules[MODULE] = sys.modules[__name__]
    return library


_library = _register()
