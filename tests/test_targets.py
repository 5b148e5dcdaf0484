"""Targets: built in or anybody's, and one clear line where there is none."""

from __future__ import annotations

import pytest
import torch
from judged_targets import a_case

import flash_kda
from flash_kda import library
from fuzz.targets import fla as fla_peers
from fuzz.targets import registry as targets
from fuzz.targets.registry import BUILTIN, Target, TargetError, load_target, signature_problem


def test_a_function_of_a_module_is_a_target():
    target = load_target("flash_kda:fwd")
    assert target.fwd is flash_kda.fwd
    assert target.device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_target_object_is_taken_as_it_is(tmp_path, monkeypatch):
    source = """
from fuzz.targets.registry import Target
import flash_kda
mine = Target("any name", flash_kda.fwd, "cpu", reach=lambda case: "too long" if case.tokens > 9 else None, slow=True)
"""
    (tmp_path / "their_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    target = load_target("their_module:mine")
    assert isinstance(target, Target)
    assert (target.name, target.slow) == ("their_module:mine", True)


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_targets_can_be_had(name):
    if name.startswith("fla.") and (reason := fla_peers.available()):
        pytest.skip(reason)
    target = load_target(name)
    assert target.name.removesuffix(".fp32") == name
    assert load_target(target.name).fwd.__name__ == target.fwd.__name__  # a finding names it so
    assert target.note


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nonsense", "expected flash_kda, model"),
        (":fwd", "expected flash_kda, model"),
        ("no_such_module:fwd", "cannot import no_such_module: ModuleNotFoundError"),
        ("broken_module:fwd", "cannot import broken_module: ZeroDivisionError"),
        ("wrong_targets:absent", "expected a function absent in wrong_targets, got none"),
        ("wrong_targets:not_a_function", "expected a function not_a_function in wrong_targets, got a "),
        ("wrong_targets:wrong_names", "cannot be called as fwd is"),
    ],
)
def test_no_target(spec, message, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TargetError, match="target ") as caught:
        load_target(spec)
    assert message in str(caught.value)
    assert spec in str(caught.value)
    assert "\n" not in str(caught.value)


def test_beside_a_gpu_what_is_slow_takes_small_cases_only(monkeypatch):
    monkeypatch.setattr(targets, "default_device", lambda: "cuda")
    monkeypatch.setattr(fla_peers, "on_gpu", lambda: True)
    monkeypatch.setattr(fla_peers, "available", lambda: None)
    model, naive, chunk = (load_target(name) for name in ("model", "fla.naive", "fla.chunk"))
    assert model.slow and naive.slow and not chunk.slow
    assert chunk.fwd.__wrapped__ is fla_peers.chunk  # whose calls alone have fixed configurations
    assert model.reach(a_case((64,) * 16, 2)) is None and model.reach(a_case((1,) * 32, 2)) is None
    assert "too large" in model.reach(a_case((1,) * 33, 2))  # each a chunk of its own
    assert naive.reach(a_case((120, 6), 16)) is None
    assert "too large" in naive.reach(a_case((120, 7), 1))


@pytest.mark.parametrize("missing", ["check_capability", "load"])
def test_a_kernel_that_cannot_run_on_this_gpu_is_no_target(missing, monkeypatch):
    def refused(*given):
        raise RuntimeError("flash_kda: not here")

    monkeypatch.setattr(targets, "default_device", lambda: "cuda")
    for name in ("check_capability", "load"):
        monkeypatch.setattr(library, name, refused if name == missing else lambda *given: None)
    with pytest.raises(TargetError, match="target 'flash_kda': flash_kda: not here"):
        load_target("flash_kda")


def test_signatures():
    def order_changed(
        q, k, g, v, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=None, final_state=None, cu_seqlens=None
    ): ...

    def more(
        q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state=0, final_state=0, cu_seqlens=0, more=0
    ): ...

    def one_more_required(
        q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, initial_state, final_state, cu_seqlens, stream
    ): ...

    def no_states(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, cu_seqlens=None): ...

    def positional(q, k, v, g, beta, scale, out, A_log, dt_bias, lower_bound, /, **states): ...

    assert signature_problem(flash_kda.fwd) is None
    assert signature_problem(more) is None
    assert signature_problem(lambda *args, **kwargs: None) is None
    assert signature_problem(order_changed) == "argument 3 is named 'g', not 'v'"
    assert "stream" in signature_problem(one_more_required)
    assert "initial_state" in signature_problem(no_states)
    assert "'q'" in signature_problem(positional)
