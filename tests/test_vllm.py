"""The operators that vLLM calls, on CPU tensors, and the plugin that puts them in the place of vLLM's own."""

from __future__ import annotations

import math
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

import flash_kda

H, D, T = 3, 128, 150


def arguments() -> dict:
    """As vLLM makes them: beta with a row stride, out a slice of a larger buffer, offsets of 32 bits."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    given = {name: draw(1, T, H, D).bfloat16() for name in ("q", "k", "v", "g")}
    given["beta"] = draw(1, T, 6288).bfloat16()[..., 5 : 5 + H]
    given |= {"scale": D**-0.5, "out": torch.full((2, T + 40, H, D), math.nan, dtype=torch.bfloat16)[1:, 8 : 8 + T]}
    given |= {"workspace": torch.empty(torch.ops._flashkda_C.get_workspace_size(8192, H, 16), dtype=torch.uint8)}
    given |= {"A_log": draw(1, 1, H, 1), "dt_bias": draw(H * D), "lower_bound": -5.0}
    given |= {"initial_state": draw(2, H, D, D).bfloat16(), "final_state": torch.zeros(2, H, D, D).bfloat16()}
    given["cu_seqlens"] = torch.tensor([0, 70, T - 5], dtype=torch.int32)
    given["checkpoint_state"] = torch.zeros(2, 3, H, D, D).bfloat16()
    given["checkpoint_offsets"] = torch.tensor([[16, 64, -1], [48, 80, 64]], dtype=torch.int32).sort()[0]
    return given


@pytest.fixture(autouse=True)
def registered():
    import flash_kda.vllm  # noqa: F401


def test_its_results_are_those_of_fwd():
    mine, plain = arguments(), arguments()
    assert torch.ops._flashkda_C.fwd(*mine.values()) is None
    flash_kda.fwd(**plain)
    for name in ("out", "final_state", "checkpoint_state"):
        assert torch.equal(mine[name].nan_to_num(nan=9.0), plain[name].nan_to_num(nan=9.0)), name
    assert mine["out"][:, : T - 5].isfinite().all() and mine["out"][:, T - 5 :].isnan().all()
    assert mine["checkpoint_state"][0, 1:].ne(0).any() and mine["final_state"].ne(0).any()


def test_what_may_be_left_out():
    mine, plain = arguments(), arguments()
    torch.ops._flashkda_C.fwd(*list(mine.values())[:11])
    named = {"initial_state": None, "final_state": None, "cu_seqlens": None, "checkpoint_state": None}
    flash_kda.fwd(**plain | named | {"checkpoint_offsets": None})
    assert torch.equal(mine["out"], plain["out"])


def test_a_workspace_that_is_too_small_does_no_harm(monkeypatch):
    monkeypatch.setattr(flash_kda.vllm, "_get_workspace_size", lambda *tensors: 5)  # as where a tensor is copied
    mine, plain = arguments(), arguments()
    mine["workspace"] = mine["q"].view(torch.uint8).flatten()[:4]  # which `fwd` would refuse, as q is there
    torch.ops._flashkda_C.fwd(*mine.values())
    flash_kda.fwd(**plain)
    assert torch.equal(mine["final_state"], plain["final_state"])


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected entry 2 to be at most T = 150, got 151"):
        torch.ops._flashkda_C.fwd(*(arguments() | {"cu_seqlens": torch.tensor([0, 70, 151])}).values())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("workspace", torch.empty(64), "expected dtype torch.uint8, got torch.float32"), ("q", None, "got NoneType")],
)
def test_what_cannot_be_used_is_named_and_not_left_out(name, value, said):
    with pytest.raises(TypeError, match=rf"^{name}: .*{said}"):
        torch.ops._flashkda_C.fwd(*(arguments() | {name: value}).values())


def test_the_workspace_size_is_that_of_the_package():
    assert torch.ops._flashkda_C.get_workspace_size(8192, 96) == flash_kda.get_workspace_size(8192, 96)
    assert torch.ops._flashkda_C.get_workspace_size(8192, 96, N=4) == flash_kda.get_workspace_size(8192, 96, 4)


def python(program: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """In a process of its own, with an empty package `vllm`."""
    (folder / "vllm").mkdir(exist_ok=True)
    (folder / "vllm" / "__init__.py").touch()
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{program}"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)


PLUGIN = """
import logging; logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from importlib.metadata import entry_points
(plugin,) = (entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "flash_kda")
plugin.load()(); plugin.load()()
import torch
print(hasattr(torch.ops._flashkda_C, "fwd"), "vllm._flashkda_C" in sys.modules)
"""


def test_there_is_a_plugin():
    (plugin,) = (entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "flash_kda")
    assert plugin.value == "flash_kda.vllm_plugin:register"


@pytest.mark.parametrize("environment", [{}, {"FLASH_KDA_VLLM": "0"}])
def test_the_plugin_is_off_unless_it_is_asked_for(tmp_path, environment):
    done = python(PLUGIN, tmp_path, **environment)
    assert (done.returncode, done.stdout) == (0, "False False\n"), done.stderr


@pytest.mark.parametrize("value", ["no", "false", "2"])
def test_a_switch_without_meaning_is_an_error(tmp_path, value):
    """It is off unless it is 1, and "no" must not turn it on."""
    done = python(PLUGIN, tmp_path, FLASH_KDA_VLLM=value)
    assert done.stderr.splitlines()[-1].startswith(f"ValueError: FLASH_KDA_VLLM: expected 0 or 1, got {value!r}. ")
    assert (done.returncode, done.stdout) == (1, "")


def test_the_plugin_stands_in_for_vllms_library_and_says_so_in_one_line(tmp_path):
    done = python(PLUGIN + "import vllm._flashkda_C; from vllm import _flashkda_C\n", tmp_path, FLASH_KDA_VLLM="1")
    line = f"flash_kda {flash_kda.__version__} is active in the place of vllm._flashkda_C (FLASH_KDA_VLLM=1)"
    assert (done.returncode, done.stdout) == (0, f"{line}\nTrue True\n"), done.stderr


THEIRS = {
    "module": "import types; sys.modules['vllm._flashkda_C'] = types.ModuleType('vllm._flashkda_C')",
    "fragment": "import torch; theirs = torch.library.Library('_flashkda_C', 'FRAGMENT'); theirs.define('fwd() -> ()')",
    "operator": "import torch; theirs = torch.library.Library('_flashkda_C', 'DEF'); theirs.define('fwd() -> ()')",
}


@pytest.mark.parametrize("loaded", THEIRS.values(), ids=THEIRS)
def test_vllms_own_library_loaded_before_is_one_clear_error(tmp_path, loaded):
    done = python(f"{loaded}\n{PLUGIN}", tmp_path, FLASH_KDA_VLLM="1")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: flash_kda.vllm: expected no library that defines torch.ops._flashkda_C, got ")
    assert "vLLM's own is loaded already" in last and "unset FLASH_KDA_VLLM" in last
