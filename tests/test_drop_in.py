"""`fla.ops.kda.chunk_kda` finds this package by itself and hands its work over; FLA_FLASH_KDA=0 takes it back."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DISPATCHED = "chunk_kda -> flash_kda"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fla") is None or importlib.util.find_spec("triton") is None,
    reason="fla-core or triton is not installed",
)

# fla logs each dispatch once a process, so every question is asked in a process of its own. It gets the arguments of
# chunk_kda that are tensors, and answers with what chunk_kda returned.
PROGRAM = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
on_gpu = torch.cuda.is_available()
if not on_gpu:
    from fuzz.triton_interpreter import help_fla, interpret_triton
    interpret_triton()
from fla.ops.kda import chunk_kda
if not on_gpu:
    help_fla()
else:
    from fuzz.fla_configurations import fix_configurations
    fix_configurations()  # tuning takes minutes
with torch.inference_mode():
    out, state = chunk_kda(
        **torch.load(sys.argv[1]), scale=128**-0.5, lower_bound=-5.0, output_final_state=True,
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, safe_gate=True,
        state_v_first=True,
    )
torch.save((out.cpu(), state.cpu()), sys.argv[2])
"""


def tensors(device: str, state_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Two packed sequences, of 100 and 28 tokens."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {name: draw(1, 128, 2, 128).bfloat16() for name in ("q", "k", "v", "g")}
    inputs["beta"] = draw(1, 128, 2).bfloat16()
    inputs |= {"A_log": draw(2), "dt_bias": draw(256), "initial_state": draw(2, 2, 128, 128).to(state_dtype)}
    inputs["cu_seqlens"] = torch.tensor([0, 100, 128])
    return {name: x.to(device) for name, x in inputs.items()}


def chunk_kda(folder: Path, inputs: dict[str, torch.Tensor], enabled: bool) -> tuple[torch.Tensor, torch.Tensor, str]:
    """What fla returns, and what it logs, with FLA_FLASH_KDA as an undecided user and as one who wants none has it."""
    torch.save(inputs, folder / "inputs.pt")
    environment = {name: x for name, x in os.environ.items() if name != "FLA_FLASH_KDA"}
    if not enabled:
        environment["FLA_FLASH_KDA"] = "0"
    command = [sys.executable, "-c", PROGRAM, str(folder / "inputs.pt"), str(folder / "results.pt")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return *torch.load(folder / "results.pt"), done.stdout


def direct(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    import flash_kda

    given = {**inputs, "dt_bias": inputs["dt_bias"].view(2, 128)}
    out, state = torch.empty_like(given["v"]), torch.empty(2, 2, 128, 128, device=given["v"].device)
    flash_kda.fwd(**given, scale=128**-0.5, out=out, lower_bound=-5.0, final_state=state)
    return out.cpu(), state.cpu()


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_fla_dispatches_to_this_package(device: str, state_dtype: torch.dtype, tmp_path: Path):
    """Also with a bf16 initial state, to which fla always adds an fp32 final state."""
    inputs = tensors(device, state_dtype)
    out, state, log = chunk_kda(tmp_path, inputs, enabled=True)
    assert DISPATCHED in log
    assert state.dtype == torch.float32
    expected = direct(inputs)
    assert torch.equal(out, expected[0]) and torch.equal(state, expected[1])


@pytest.mark.gpu
def test_flas_own_path_is_one_variable_away_and_agrees(tmp_path: Path):
    inputs = tensors("cuda", torch.float32)
    out, state, log = chunk_kda(tmp_path, inputs, enabled=False)
    assert DISPATCHED not in log
    ours = chunk_kda(tmp_path, inputs, enabled=True)[:2]
    for mine, theirs in zip(ours, (out, state), strict=True):
        assert ((mine.double() - theirs.double()).norm() / theirs.double().norm()).item() < 0.01


@pytest.mark.skipif(torch.cuda.is_available(), reason="the test before asks the same of fla's compiled kernels")
def test_flas_own_path_is_one_variable_away_without_a_gpu(tmp_path: Path):
    """In fp32, which Triton's interpreter can do and which this package leaves to fla, so only the logs tell."""
    inputs = {name: x.float() if x.dtype == torch.bfloat16 else x for name, x in tensors("cpu", torch.float32).items()}
    inputs |= {name: inputs[name][:, :16] for name in ("q", "k", "v", "g", "beta")}
    inputs |= {"initial_state": inputs["initial_state"][:1], "cu_seqlens": torch.tensor([0, 16])}
    assert "flash_kda" not in chunk_kda(tmp_path, inputs, enabled=False)[2]
    assert "flash_kda rejected: FlashKDA requires bfloat16" in chunk_kda(tmp_path, inputs, enabled=True)[2]
