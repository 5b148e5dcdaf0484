"""The formats that operands of the kernel's matrix multiplications are rounded to, emulated on fp32 tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Format = Callable[[torch.Tensor], torch.Tensor]


def bf16(x: torch.Tensor) -> torch.Tensor:
    """Round to bf16 (nearest even, subnormals kept); the result stays fp32."""
    return x.bfloat16().float()


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Round to tf32 (10 bits of mantissa; ties away from zero, like `cvt.rna.tf32.f32`); the result stays fp32."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def two_bf16(x: torch.Tensor) -> torch.Tensor:
    """Round to the sum of two numbers of bf16: x to bf16, and what that leaves to bf16; the result stays fp32."""
    high = bf16(x)
    return high + bf16(x - high)


def two_tf32(x: torch.Tensor) -> torch.Tensor:
    """The sum of two numbers of tf32, each cut off as the tensor core does it; the result stays fp32."""

    def cut_off(y: torch.Tensor) -> torch.Tensor:
        return (y.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)

    high = cut_off(x)
    return high + cut_off(x - high)


@dataclass(frozen=True)
class Formats:
    """The format of each operand. The defaults are the kernel's; `docs/numerics.md` measures them against others."""

    diagonal: Format = bf16  # both operands of L and M within a 16-token block
    between: Format = bf16  # both operands of L and M between blocks
    merge: Format = tf32  # operands of the products that merge inverted blocks into X
    K: Format = bf16  # K~
    Q: Format = bf16  # Q~
    Kr: Format = bf16
    X: Format = tf32
    Xb: Format = two_bf16  # X diag(b)
    M: Format = bf16
    W: Format = bf16
    U: Format = bf16
    S: Format = bf16
