"""Scratch memory: what the kernel passes on, and copies of the tensors that it cannot reach as they lie."""

from __future__ import annotations

import torch

TOKENS_ALIGNMENT = 8  # elements of q, k, v, g and out: TMA and 16-byte stores
STATE_ALIGNMENT = 2  # elements of the states: read and written in pairs


def get_workspace_size(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    out: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
) -> int:
    """Bytes of scratch memory that `flash_kda.fwd` takes for these tensors: the least that its `workspace` must have.

    The kernel itself takes 32 KiB a multiprocessor and 4 KiB, whatever the tensors are (4.3 MB on an H200): through it
    a state passes on where a sequence is worked on by one after the other. It reads and writes the tensors in place if
    data and strides are positive multiples of 8 elements (of 2 for the states); each tensor that is not so is copied
    and takes the bytes of a contiguous one: nothing for contiguous tensors from PyTorch's allocator and for slices of
    fused projections at multiples of 8. On a CPU this is 0.
    """
    if q.device.type == "cpu":
        return 0
    from flash_kda import library  # which imports this file

    kernel = library.scratch_bytes(q.device.index)
    tokens = sum(_bytes(x) for x in (q, k, v, g, out) if not is_reachable(x, TOKENS_ALIGNMENT))
    states = (initial_state, final_state)
    return kernel + tokens + sum(_bytes(x) for x in states if x is not None and not is_reachable(x, STATE_ALIGNMENT))


def is_reachable(x: torch.Tensor, alignment: int) -> bool:
    """Whether data and strides of a tensor (4 dimensions, the last one dense) are multiples of `alignment` elements."""
    if x.data_ptr() % (alignment * x.element_size()):
        return False
    if x.is_contiguous():
        return True
    return all(
        stride > 0 and stride % alignment == 0
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
        if size > 1
    )


class Workspace:
    """Hands out contiguous tensors, from the caller's memory if there is some, else from PyTorch's allocator."""

    def __init__(self, memory: torch.Tensor | None) -> None:
        self._memory = memory
        self._used = 0

    def bytes(self, size: int, device: torch.device) -> torch.Tensor:
        """Uninitialised, uint8 `[size]`."""
        if self._memory is None:
            return torch.empty(size, dtype=torch.uint8, device=device)
        start, self._used = self._used, self._used + size
        return self._memory[start : self._used]

    def like(self, x: torch.Tensor) -> torch.Tensor:
        """Uninitialised, of the shape and dtype of `x`."""
        if self._memory is None:
            return torch.empty_like(x, memory_format=torch.contiguous_format)
        # Every size is a multiple of 256 bytes (128 channels of bf16), so each piece is as aligned as the first.
        start, self._used = self._used, self._used + _bytes(x)
        return self._memory[start : self._used].view(x.dtype).view(x.shape)

    def reachable(self, x: torch.Tensor, alignment: int) -> torch.Tensor:
        """`x` itself or a copy of it."""
        return x if is_reachable(x, alignment) else self.like(x).copy_(x)


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()
