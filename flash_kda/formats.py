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


def truncated_tf32(x: torch.Tensor) -> torch.Tensor:
    """What the tensor core makes of an fp32 operand that nobody rounded: the low 13 bits are dropped."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


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
    M: Format = bf16
    W: Format = truncated_tf32
    U: Format = bf16
    S: Format = bf16
