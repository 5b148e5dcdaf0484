"""Kernels of KDA that people have installed, behind the signature of `flash_kda.fwd`, by their public interfaces.

- `vllm.flashkda`: vLLM's operators `torch.ops._flashkda_C`, from `import vllm._flashkda_C` or from the library file
  that the environment variable VLLM_FLASHKDA_LIBRARY names.
- `cudnn.kda`: `cudnn.linear_attention.kimi_delta_attention` of nvidia-cudnn-frontend.

Both are imported by the first call, or to say what they are. Conversions are part of the call, as a caller needs them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from pathlib import Path

import torch

from fuzz.cases.case import Case
from fuzz.targets.adapter import writing
from fuzz.targets.promises import Promises

LIBRARY_VARIABLE = "VLLM_FLASHKDA_LIBRARY"

PROMISES = {
    # Nothing is published about bits. Those of packing, heads and the past are what a serving engine relies on.
    "vllm.flashkda": Promises(arguments=False, chunk=None, value_columns=False),
    # Packing is asked for by batch_invariant=True.
    "cudnn.kda": Promises(arguments=False, chunk=None, value_columns=False, scaling=False, causality=False),
}
"""Arguments are checked by neither as docs/operator.md has it."""


def available(name: str) -> str | None:
    """Why the kernel cannot run here, or None. Nothing of it is imported."""
    if name == "vllm.flashkda":
        given = os.environ.get(LIBRARY_VARIABLE)
        if given is not None and not Path(given).is_file():
            return f"{LIBRARY_VARIABLE}: expected a library file, got {given!r}"
        if given is None and importlib.util.find_spec("vllm") is None:
            return f"vllm not installed, and {LIBRARY_VARIABLE} names no library file"
    elif importlib.util.find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend not installed"
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU, and PyTorch sees none here"
    return None


def origin(name: str) -> str:
    """The file and the version that the target is of, for people. Raises ImportError or OSError."""
    if name == "vllm.flashkda":
        given = os.environ.get(LIBRARY_VARIABLE)
        if given is not None:
            return f"{given}, version unknown"
        return f"{importlib.util.find_spec('vllm').origin}, vllm {version('vllm')}"
    return f"{importlib.util.find_spec('cudnn').origin}, nvidia-cudnn-frontend {version('nvidia-cudnn-frontend')}"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def vllm_reach(case: Case) -> str | None:
    """Both states of one dtype; lower_bound below 0."""
    if case.initial_state and case.final_state and case.initial_state != case.final_state:
        return "vllm.flashkda takes states of one dtype only"
    return None if case.lower_bound < 0 else "vllm.flashkda takes lower_bound below 0 only"


def cudnn_reach(case: Case) -> str | None:
    """lower_bound in [-5, 0), and at least one token."""
    if not -5 <= case.lower_bound < 0:
        return "cudnn.kda takes lower_bound in [-5, 0) only"
    return None if case.tokens else "cudnn.kda takes one token or more only"


def vllm_flashkda(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None, cu_seqlens=None
) -> None:
    """`torch.ops._flashkda_C.fwd` with a workspace of its own size. Arguments as `flash_kda.fwd`."""
    operators = vllm_operators()
    batch, tokens, heads = q.shape[:3]
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    size = operators.get_workspace_size(batch * tokens, heads, sequences)
    workspace = torch.empty(size, dtype=torch.uint8, device=q.device)
    offsets = None if cu_seqlens is None else cu_seqlens.int()
    written = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    operators.fwd(
        *(q, k, v, g, beta, float(scale), written, workspace, A_log.contiguous(), dt_bias.contiguous()),
        *(float(lower_bound), initial_state, final_state, offsets),
    )
    if written is not out:
        out.copy_(written)


def vllm_operators():
    given = os.environ.get(LIBRARY_VARIABLE)
    if not hasattr(torch.ops._flashkda_C, "fwd"):
        torch.ops.load_library(given) if given else importlib.import_module("vllm._flashkda_C")
    return torch.ops._flashkda_C


@writing
def cudnn_kda(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial_state, cu_seqlens):
    """`cudnn.linear_attention.kimi_delta_attention` with all transforms inside. Arguments as `flash_kda.fwd`."""
    attention = importlib.import_module("cudnn.linear_attention").kimi_delta_attention
    batch, tokens = q.shape[:2]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32, device=q.device)
    with torch.inference_mode():
        out, state = attention(
            *(x.flatten(0, 1).contiguous() for x in (q, k, v, g, beta)),
            cu_seqlens.int(),
            scale=float(scale),
            initial_state=None if initial_state is None else initial_state.float().contiguous(),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            safe_gate=True,
            gate_lower_bound=float(lower_bound),
            a_log=A_log.contiguous(),
            dt_bias=dt_bias.contiguous(),
            batch_invariant=True,
        )
    return out.view(v.shape), state


FUNCTIONS = {"vllm.flashkda": vllm_flashkda, "cudnn.kda": cudnn_kda}
REACH = {"vllm.flashkda": vllm_reach, "cudnn.kda": cudnn_reach}
