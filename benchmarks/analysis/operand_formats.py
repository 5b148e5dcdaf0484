"""The model of the kernel with other operand formats, exact ones among them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flash_kda import model
from flash_kda.formats import Formats

OPERAND_NAMES = tuple(Formats.__dataclass_fields__)


def exact(x: torch.Tensor) -> torch.Tensor:
    """The format that rounds nothing."""
    return x


def every(rounding) -> Formats:
    """One format for all operands."""
    return Formats(**dict.fromkeys(OPERAND_NAMES, rounding))


EXACT = every(exact)


@contextmanager
def operand_formats(formats: Formats) -> Iterator[None]:
    """The model computes with these formats until the block ends."""
    model.FORMATS, before = formats, model.FORMATS
    try:
        yield
    finally:
        model.FORMATS = before
