"""Kimi Delta Attention (KDA), forward. `docs/operator.md` in the source repository defines the operator.

fla's dispatch imports this package by its name, and calls `flash_kda.fwd`.

Example, 1024 tokens of 4 heads (on a Hopper GPU with `device="cuda"` everywhere, else on the CPU):

    q, k, v, g = torch.randn(4, 1, 1024, 4, 128).bfloat16()
    beta, A_log, dt_bias = torch.randn(1, 1024, 4).bfloat16(), torch.zeros(4), torch.zeros(4, 128)
    out, final_state = torch.empty_like(v), torch.empty(1, 4, 128, 128)
    flash_kda.fwd(q, k, v, g, beta, 128**-0.5, out, A_log, dt_bias, -5.0, final_state=final_state)
    assert out.isfinite().all()
"""

from flash_kda.forward import fwd
from flash_kda.library import get_workspace_size

__all__ = ["fwd", "get_workspace_size"]
__version__ = "0.1.0"
