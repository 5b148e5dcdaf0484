"""Kimi Delta Attention (KDA), forward: `flash_kda.fwd`. The operator is defined in `docs/operator.md`."""

from flash_kda.forward import fwd

__all__ = ["fwd"]
__version__ = "0.1.0"
