"""What a target changes in the process is put back and noted, so that no other target is judged with it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fuzz.campaign.job import Job
from fuzz.campaign.worker import judge_job, ready_worker
from fuzz.cases.plain import PLAIN
from fuzz.targets.process_state import LIBC, SETTINGS, put_back, read

UPWARDS = 0x800  # FE_UPWARD of the C library on x86-64


def numpy_raises():
    np.seterr(all="raise")


def reduced_products():
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # of which the older settings then know nothing


class Doubling(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return 2 * function(*args, **kwargs or {}) if function is torch.exp else function(*args, **kwargs or {})


class Seeing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


class Refusing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        raise LookupError("a mode that was not left")


LEFT = []  # as Python would end what nobody holds


def not_left(mode):
    def enter():
        LEFT.append(mode())
        LEFT[-1].__enter__()

    return enter


CHANGES = {
    "modes of PyTorch": not_left(Doubling),
    "modes of PyTorch (dispatch)": not_left(Seeing),
    "default device (entered)": not_left(lambda: torch.device("meta")),
    "grad mode (inference)": not_left(torch.inference_mode),
    "environment (A_VARIABLE)": lambda: os.environ.update(A_VARIABLE="1"),
    "environment (PATH)": lambda: os.environ.pop("PATH"),
    "working directory": lambda: os.chdir("/"),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "default device": lambda: torch.set_default_device("meta"),
    "flush-to-zero": lambda: torch.set_flush_denormal(True),
    "rounding mode": lambda: LIBC.fesetround(UPWARDS),
    "precision of products": reduced_products,
    "deterministic mode": lambda: torch.use_deterministic_algorithms(True),
    "grad mode": lambda: torch.set_grad_enabled(not torch.is_grad_enabled()),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "warning filters": lambda: warnings.simplefilter("error"),
    "NumPy's error state": numpy_raises,
    "random seed of Python": lambda: random.seed(1),
    "random seed of NumPy": lambda: np.random.seed(1),
    "random seed of PyTorch": lambda: torch.manual_seed(1),
    "number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
}


def state() -> dict[str, object]:
    return {setting.name: read(setting) for setting in SETTINGS}


@pytest.mark.parametrize("what", CHANGES)
def test_each_change_is_put_back_and_named(what):
    if what == "rounding mode" and os.uname().machine != "x86_64":
        pytest.skip("another number there")
    with put_back(set()):
        CHANGES[what]()  # a first time, as PyTorch imports more when it is asked for some of these
        state()
    before, changed = state(), set()
    with put_back(changed):
        CHANGES[what]()
        assert state() != before
    assert changed == {what if what.startswith("environment") else what.partition(" (")[0]}
    assert state() == before


@pytest.mark.parametrize("how", ["medium", "high"])
def test_the_older_setting_of_products_is_put_back_too(how):
    before = state()
    with put_back(changed := set()):
        torch.set_float32_matmul_precision(how)
        torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
    assert changed == {"precision of products"} and state() == before


DETERMINISTIC = """
import sys, torch
from fuzz.targets.process_state import put_back
with put_back(changed := set()):
    torch._C._set_deterministic_algorithms(True, warn_only=False)
print(changed, torch.are_deterministic_algorithms_enabled(), "torch._inductor.config" in sys.modules)
"""


def test_the_deterministic_mode_is_put_back_without_the_compiler_of_pytorch():
    """Its import takes seconds in every worker."""
    done = subprocess.run([sys.executable, "-c", DETERMINISTIC], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "{'deterministic mode'} False False", done.stderr


def test_the_compiler_of_pytorch_learns_that_the_mode_is_put_back():
    import torch._inductor.config as compiler

    before = compiler.deterministic
    with put_back(set()):
        torch.use_deterministic_algorithms(True)
        assert compiler.deterministic
    assert compiler.deterministic == before


def test_every_setting_is_changed_by_a_test():
    of_gpus = {"current GPU and stream"}
    assert {setting.name for setting in SETTINGS} - of_gpus == {what.partition(" (")[0] for what in CHANGES}


def test_what_raises_is_put_back_too_and_no_directory_is_no_error(tmp_path):
    changed: set[str] = set()
    with pytest.raises(ZeroDivisionError), put_back(changed):
        torch.set_default_dtype(torch.float64)
        raise ZeroDivisionError
    assert changed == {"default dtype"} and torch.get_default_dtype() == torch.float32
    here, gone = os.getcwd(), tmp_path / "gone"
    gone.mkdir()
    try:
        os.chdir(gone)
        gone.rmdir()
        with put_back(changed):
            torch.set_default_dtype(torch.float64)
    finally:
        os.chdir(here)
    assert torch.get_default_dtype() == torch.float32


def test_a_mode_that_raises_keeps_nothing_from_being_put_back():
    """Other settings are read and put by functions of PyTorch, which the mode would see."""
    before = state()
    with put_back(changed := set()):
        torch.manual_seed(1)
        torch.set_default_dtype(torch.float64)
        not_left(Refusing)()
    assert changed == {"modes of PyTorch", "random seed of PyTorch", "default dtype"} and state() == before


@pytest.mark.gpu
def test_device_and_stream_are_put_back():
    torch.cuda.current_stream()
    before, changed = state(), set()
    with put_back(changed):
        torch.cuda.set_stream(torch.cuda.Stream())
    assert changed == {"current GPU and stream"} and state() == before


CARELESS = """
import os, random, torch
import flash_kda
os.environ["SET_BY_AN_IMPORT"] = "1"
torch.set_default_dtype(torch.float64)
torch.set_flush_denormal(True)
def fwd(*args, **kwargs):
    assert torch.get_default_dtype() != torch.float64 and "SET_BY_AN_IMPORT" not in os.environ
    flash_kda.fwd(*args, **kwargs)
    torch.set_default_device("meta")
    os.chdir("/")
"""


def test_a_careless_target_changes_nothing_for_others(tmp_path, monkeypatch):
    """Measured on hardware: flush-to-zero at import failed `model`, a default device broke the making of inputs."""
    (tmp_path / "careless.py").write_text(CARELESS)
    monkeypatch.syspath_prepend(tmp_path)
    case = replace(PLAIN, values="tiny")
    with ready_worker(("careless:fwd", "model"), time_limit=60.0, threads=1) as worker:
        results = judge_job(worker, Job(case, ("careless:fwd", "model", "careless:fwd"), ("determinism",)))
        (description, other) = worker.descriptions
    assert [result.outcome for result in results] == ["passed"] * 3, [result.failed_checks for result in results]
    assert description["changed"] == ["default dtype", "environment (SET_BY_AN_IMPORT)", "flush-to-zero"]
    assert [result.verdict.get("changed") for result in results] == [
        ["default device", "working directory"],
        None,
        ["default device", "working directory"],
    ]
    assert other["changed"] == [] and description["file"] == str(tmp_path / "careless.py")


def test_looking_takes_little_time():
    """A case on a GPU takes ten milliseconds and calls a target ten times."""
    with put_back(set()):
        pass
    began = time.process_time()
    for _ in range(50):
        with put_back(set()):
            pass
    assert (time.process_time() - began) / 50 < 5e-4
