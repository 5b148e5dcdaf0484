"""Kimi Delta Attention (KDA), forward: `flash_kda.fwd`. The operator is defined in `docs/operator.md`."""

from flash_kda.forward import fwd
from flash_kda.library import get_workspace_size

__all__ = ["fwd", "get_workspace_size"]
__version__ = "0.1.0"
