"""The public door: an ordinary call goes the short way to the kernel, every other one is checked and dispatched."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

from flash_kda import native, ordinary, torch_operator
from flash_kda.arguments import check_arguments


def fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    lower_bound: float,
    initial_state: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    *,
    validate: bool | None = None,
    workspace: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    checkpoint_state: torch.Tensor | None = None,
    checkpoint_offsets: torch.Tensor | None = None,
) -> None:
    """Kimi Delta Attention, forward: writes `out`, and `final_state` if it is given. Returns nothing.

    Args:
        q: `[B, T, H, 128]` bf16, queries before L2 normalisation.
        k: `[B, T, H, 128]` bf16, keys before L2 normalisation.
        v: `[B, T, H, 128]` bf16, values.
        g: `[B, T, H, 128]` bf16, gate before activation.
        beta: `[B, T, H]` bf16, logits, with any strides. The operator applies the sigmoid.
        scale: factor of the output, usually `128 ** -0.5`.
        out: `[B, T, H, 128]` bf16, written.
        A_log: `[H]` fp32, logarithm of the gate rate of each head. Any other shape with H elements is accepted.
        dt_bias: `[H, 128]` or `[H * 128]` fp32, gate bias.
        lower_bound: lower bound of the log-decay of one token, in nats. It lies in `[-5, 0]`.
        initial_state: `[N, H, V, K]` bf16 or fp32, value first. None stands for zero.
        final_state: `[N, H, V, K]` bf16 or fp32, written. It may be None, and it may be `initial_state` itself.
        cu_seqlens: `[N + 1]` int32 or int64. Sequence `n` is rows `cu_seqlens[n]:cu_seqlens[n + 1]`, and `B` is 1.
            Without it each of the `B` rows is a sequence, and `N` is `B`. Rows of `out` from its last entry on are not
            written.
        validate: whether the contents of `cu_seqlens`, `state_indices` and `checkpoint_offsets` are checked on a GPU,
            which costs a synchronisation.
            None stands for True if the environment has `FLASH_KDA_VALIDATE=1`, else for False. A CPU always checks.
        workspace: `[n]` uint8, contiguous, 16-byte aligned: scratch memory for one call at a time.
            `flash_kda.get_workspace_size` says how large it must be. The call leaves anything in it.
            Without it, the library keeps memory for each stream. While a CUDA graph is captured, PyTorch's allocator
            gives it.
        state_indices: `[N]` int32 or int64. The states are then pools, `[P, H, V, K]`: sequence `n` reads and writes
            row `state_indices[n]`. A negative index: the initial state is zero, and no final state is written.
        checkpoint_state: `[N, H, V, K]` or `[N, C, H, V, K]` bf16 or fp32, written: states inside sequences.
        checkpoint_offsets: `[N]` or `[N, C]` int32 or int64, multiples of 16 that increase along C: a checkpoint is the
            state after so many tokens of its sequence. Where an offset is 0 or less, or greater than the length,
            nothing is written.

    A tensor may have any strides if its last dimension has stride 1.

    On a GPU the call queues its work on the current stream of q's device and waits for nothing. A CUDA graph can
    capture it, and replay it with other contents in the same tensors, `cu_seqlens` included.

    Under `torch.compile` and other tracers the call is one node of the graph. The graph checks the arguments when it
    runs.

    Raises:
        TypeError: an argument is no tensor or no number, or has a wrong dtype.
        ValueError: an argument has a wrong shape, device, stride or value, or an output overlaps another argument.
            The call has written nothing.
        RuntimeError: the tensors are on a GPU, and there is no CUDA library for it, or CUDA failed.
    """
    if not torch.compiler.is_compiling() and torch_operator.is_direct():
        if native.run(
            q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, validate,
            workspace, state_indices, checkpoint_state, checkpoint_offsets
        ):  # fmt: skip
            ordinary.note_writes(out, final_state, checkpoint_state)
            return
        if ordinary.run(
            q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, validate,
            workspace, state_indices, checkpoint_state, checkpoint_offsets
        ):  # fmt: skip
            return
    _long_way(
        q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, validate,
        workspace, state_indices, checkpoint_state, checkpoint_offsets
    )  # fmt: skip


@torch.no_grad()
def _long_way(
    q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, validate,
    workspace, state_indices, checkpoint_state, checkpoint_offsets
) -> None:  # fmt: skip
    """Check every argument for itself, then call the operator through PyTorch."""
    if torch.compiler.is_compiling() or isinstance(q, FakeTensor):
        checked = False  # they have no contents and no addresses yet
    else:
        check_arguments(
            q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, validate,
            workspace, state_indices, checkpoint_state, checkpoint_offsets
        )  # fmt: skip
        scale, lower_bound, checked = float(scale), float(lower_bound), True
    torch_operator.fwd(
        q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens,
        validate=validate, workspace=workspace, state_indices=state_indices, checkpoint_state=checkpoint_state,
        checkpoint_offsets=checkpoint_offsets, checked=checked
    )  # fmt: skip
