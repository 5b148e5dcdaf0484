"""`fla.ops.kda.chunk_kda` finds this package by itself and hands its work over; FLA_FLASH_KDA=0 takes it back."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flash_kda

ROOT = Path(__file__).resolve().parent.parent
DISPATCHED = "chunk_kda -> flash_kda"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fla") is None or importlib.util.find_spec("triton") is None,
    reason="fla-core or triton is not installed",
)

# fla logs each dispatch once a process, so every question is asked in a process of its own. It gets, for each call, the
# arguments of chunk_kda that are tensors, and answers with what chunk_kda returned.
PROGRAM = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
on_gpu = torch.cuda.is_available()
if not on_gpu:
    from fuzz.targets.triton_interpreter import help_fla, interpret_triton
    interpret_triton()
from fla.ops.kda import chunk_kda
if not on_gpu:
    help_fla()
else:
    from fuzz.targets.fla_configurations import fix_configurations
    fix_configurations()  # tuning takes minutes
results = []
for call in torch.load(sys.argv[1]):
    with torch.no_grad() if call.pop("no_grad", False) else torch.inference_mode():
        try:
            results.append(chunk_kda(
                **{"output_final_state": True} | call, scale=128**-0.5, lower_bound=-5.0, use_qk_l2norm_in_kernel=True,
                use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, safe_gate=True, state_v_first=True,
            ))
        except (TypeError, ValueError) as error:
            results.append((str(error), None))
torch.save([tuple(x.cpu() if torch.is_tensor(x) else x for x in result) for result in results], sys.argv[2])
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


def chunk_kda(folder: Path, *calls: dict[str, torch.Tensor], enabled: bool) -> list:
    """What fla returns of each call, and what it logs, with FLA_FLASH_KDA unset, or as one sets it who wants none."""
    torch.save(calls, folder / "calls.pt")
    environment = {name: x for name, x in os.environ.items() if name != "FLA_FLASH_KDA"}
    if not enabled:
        environment["FLA_FLASH_KDA"] = "0"
    command = [sys.executable, "-c", PROGRAM, str(folder / "calls.pt"), str(folder / "results.pt")]
    # A limit of its own, below pytest's, which would leave a hanging process on the GPU.
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400 if calls[0]["q"].is_cuda else 200,
    )
    assert done.returncode == 0, done.stderr
    return [*torch.load(folder / "results.pt"), done.stdout]


def direct(call: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    given = {name: x for name, x in call.items() if isinstance(x, torch.Tensor)}
    given["dt_bias"] = given["dt_bias"].view(2, 128)
    sequences = len(given["cu_seqlens"]) - 1 if "cu_seqlens" in given else 1
    out, state = torch.empty_like(given["v"]), torch.empty(sequences, 2, 128, 128, device=given["v"].device)
    flash_kda.fwd(**given, scale=128**-0.5, out=out, lower_bound=-5.0, final_state=state)
    return out.cpu(), state.cpu()


# Two runs there may both compile fla.
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.timeout(900)])]


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_fla_dispatches_to_this_package(device: str, state_dtype: torch.dtype, tmp_path: Path):
    """Also with a bf16 initial state, to which fla always adds an fp32 final state."""
    inputs = tensors(device, state_dtype)
    (out, state), log = chunk_kda(tmp_path, inputs, enabled=True)
    assert DISPATCHED in log
    assert state.dtype == torch.float32
    expected = direct(inputs)
    assert torch.equal(out, expected[0]) and torch.equal(state, expected[1])


@pytest.mark.parametrize("device", DEVICES)
def test_every_form_of_a_call_is_handed_over(device: str, tmp_path: Path):
    plain = tensors(device, torch.float32)
    batch = {name: x for name, x in plain.items() if name != "cu_seqlens"}
    forms = [
        {**plain, "cu_seqlens": plain["cu_seqlens"].int()},
        {**batch, "initial_state": plain["initial_state"][:1]},
        {name: x for name, x in plain.items() if name != "initial_state"},
        {**plain, "dt_bias": plain["dt_bias"].view(2, 128)},
        {**plain, "output_final_state": False},
        {**plain, "no_grad": True},
    ]
    *results, log = chunk_kda(tmp_path, *forms, enabled=True)
    assert DISPATCHED in log
    for form, (out, state) in zip(forms, results, strict=True):
        expected = direct(form)
        assert torch.equal(out, expected[0])
        assert torch.equal(state, expected[1]) if form.get("output_final_state", True) else state is None


@pytest.mark.parametrize("device", DEVICES)
def test_shapes_that_fla_takes_are_taken_or_the_error_names_the_way_back(device: str, tmp_path: Path):
    plain = tensors(device, torch.float32)
    taken = [
        {**plain, "A_log": plain["A_log"].view(1, 1, 2, 1)},
        {**plain, "beta": plain["beta"].transpose(1, 2).contiguous().transpose(1, 2)},
    ]
    refused = {
        "A_log": plain["A_log"].new_zeros(128),
        "k": torch.stack([plain["k"]] * 2, -1)[..., 0],
        "beta": plain["beta"].float(),
    }
    forms = [*taken, *({**plain, name: x} for name, x in refused.items())]
    *results, _ = chunk_kda(tmp_path, *forms, enabled=True)
    expected = direct(plain)
    for out, state in results[: len(taken)]:
        assert torch.equal(out, expected[0]) and torch.equal(state, expected[1])
    for name, (said, _) in zip(refused, results[len(taken) :], strict=True):
        assert isinstance(said, str), name
        assert said.startswith(f"{name}: expected ") and "FLA_FLASH_KDA=0" in said


@pytest.mark.gpu
def test_flas_own_path_is_one_variable_away_and_agrees(tmp_path: Path):
    inputs = tensors("cuda", torch.float32)
    (out, state), log = chunk_kda(tmp_path, inputs, enabled=False)
    assert DISPATCHED not in log
    ours, _ = chunk_kda(tmp_path, inputs, enabled=True)
    for mine, theirs in zip(ours, (out, state), strict=True):
        assert ((mine.double() - theirs.double()).norm() / theirs.double().norm()).item() < 0.01


@pytest.mark.skipif(torch.cuda.is_available(), reason="the test before asks the same of fla's compiled kernels")
def test_flas_own_path_is_one_variable_away_without_a_gpu(tmp_path: Path):
    """In fp32, which Triton's interpreter can do and which this package leaves to fla, so only the logs tell."""
    inputs = {name: x.float() if x.dtype == torch.bfloat16 else x for name, x in tensors("cpu", torch.float32).items()}
    inputs |= {name: inputs[name][:, :16] for name in ("q", "k", "v", "g", "beta")}
    inputs |= {"initial_state": inputs["initial_state"][:1], "cu_seqlens": torch.tensor([0, 16])}
    assert "flash_kda" not in chunk_kda(tmp_path, inputs, enabled=False)[-1]
    assert "flash_kda rejected: FlashKDA requires bfloat16" in chunk_kda(tmp_path, inputs, enabled=True)[-1]
