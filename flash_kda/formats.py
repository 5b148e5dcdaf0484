"""The formats that operands of the kernel's matrix multiplications are rounded to, emulated on fp32 tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Format = Callable[[torch.Tensor], torch.Tensor]


def fp16(x: torch.Tensor) -> torch.Tensor:
    """Round to fp16 (nearest even, subnormals kept); the result stays fp32."""
    return x.half().float()


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Round to tf32 (10 bits of mantissa; ties away from zero, like `cvt.rna.tf32.f32`); the result stays fp32."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@dataclass(frozen=True)
class Formats:
    """The format of each operand. The defaults are the kernel's; `docs/numerics.md` measures them against others."""

    diagonal: Format = tf32  # both operands of L and M within a 16-token block
    between: Format = fp16  # both operands of L and M between blocks
    merge: Format = tf32  # operands of the products that merge inverted blocks into X
    K: Format = fp16  # K~
    Q: Format = fp16  # Q~
    Kr: Format = fp16
    X: Format = tf32
    M: Format = tf32
    W: Format = tf32
    U: Format = tf32  # as the operand of M U
    U_update: Format = fp16  # as the operand of the state update, over its power of two
    S: Format = fp16  # over its power of two
