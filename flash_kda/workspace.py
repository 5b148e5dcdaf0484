"""Scratch memory: what the kernel passes on, and copies of the tensors that it cannot reach as they lie."""

from __future__ import annotations

import torch

TOKENS_ALIGNMENT = 8  # elements of q, k, v, g and out: TMA and 16-byte stores


def is_reachable(x: torch.Tensor) -> bool:
    """Whether data and strides of q, k, v, g or out are multiples of 8 elements. Its last dimension is dense."""
    if x.data_ptr() % (TOKENS_ALIGNMENT * x.element_size()):
        return False
    if x.is_contiguous():
        return True
    return all(
        stride > 0 and stride % TOKENS_ALIGNMENT == 0
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
        start, self._used = self._used, self._used + bytes_of(x)
        return self._memory[start : self._used].view(x.dtype).view(x.shape)

    def reachable(self, x: torch.Tensor) -> torch.Tensor:
        """`x` itself or a copy of it."""
        return x if is_reachable(x) else self.like(x).copy_(x)


def bytes_of(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()
