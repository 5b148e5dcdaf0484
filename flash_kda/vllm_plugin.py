"""The plugin for vLLM: entry point `flash_kda` of the group `vllm.general_plugins`, off unless `FLASH_KDA_VLLM=1`."""

from __future__ import annotations

import logging
import os
import sys


def register() -> None:
    """Make vLLM's calls of `torch.ops._flashkda_C` run this package's kernel, if `FLASH_KDA_VLLM=1`.

    vLLM calls this in each of its processes. Raises RuntimeError as importing `flash_kda.vllm` does, and ValueError for
    a value of `FLASH_KDA_VLLM` that is neither 0 nor 1.
    """
    switch = os.environ.get("FLASH_KDA_VLLM", "")
    if switch not in ("", "0", "1"):
        raise ValueError(f"FLASH_KDA_VLLM: expected 0 or 1, got {switch!r}. Set one of them, or unset it.")
    if switch != "1" or "flash_kda.vllm" in sys.modules:
        return
    import flash_kda.vllm

    message = "flash_kda %s is active in the place of %s (FLASH_KDA_VLLM=1)"
    logging.getLogger("vllm.flash_kda").info(message, flash_kda.__version__, flash_kda.vllm.MODULE)
