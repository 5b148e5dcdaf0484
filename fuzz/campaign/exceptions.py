"""What explains an exception of a target: its traceback, and the settings of the process at that time."""

from __future__ import annotations

import os
import traceback
from contextlib import suppress

from fuzz.text import printable

SETTINGS_SHOWN = (
    "CUDA_",
    "TORCH_",
    "PYTORCH_",
    "TRITON_",
    "FLA_",
    "FLASH_",
    "OMP_",
)  # variables in the settings of a finding


def process_settings() -> dict[str, object]:
    """The settings of this process that change what a call of PyTorch does, and the environment of kernels."""
    import torch

    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "grad mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "stream": str(torch.cuda.current_stream()) if torch.cuda.is_initialized() else None,
        "working directory": working_directory(),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(SETTINGS_SHOWN)},
    }


def working_directory() -> str | None:
    """None where it was removed."""
    with suppress(OSError):
        return os.getcwd()
    return None


def traceback_of(error: BaseException) -> list[str]:
    """The lines of a traceback, from the call of the target on."""
    begin = error.__traceback__
    while begin is not None and begin.tb_frame.f_code.co_name != "timed":
        begin = begin.tb_next
    first = begin.tb_next if begin is not None and begin.tb_next is not None else error.__traceback__
    lines = "".join(traceback.format_exception(type(error), error, first)).splitlines()
    return [printable(line) for line in lines]
