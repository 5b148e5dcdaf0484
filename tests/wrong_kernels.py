"""A Triton kernel that does what none may. Triton reads the source of a kernel, so it has a module of its own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def write_one(address):
    tl.store(address.to(tl.int64).to(tl.pointer_type(tl.float32)), 1.0)


def write_to(address: int, device) -> None:
    with torch.cuda.device(device):
        write_one[(1,)](address)
