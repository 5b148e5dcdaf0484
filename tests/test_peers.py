"""Adapters of other people's kernels, with stand-ins for their packages that compute by the model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from judged_targets import a_case

from benchmarks.analysis import conformance
from flash_kda import model
from fuzz.cases.inputs import make_inputs
from fuzz.judging.judge import judge
from fuzz.judging.sensitivity import reference
from fuzz.targets import peers
from fuzz.targets.registry import PEERS, Target, TargetError, load_target

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = (
    a_case((17, 0, 40), 2, cu_seqlens_dtype="int64"),
    a_case((33, 33), 2, packed=False, layout="strided", initial_state="bf16", final_state="bf16"),
    a_case((20,), 1, initial_state=None, final_state=None),
)


def passes(name: str) -> None:
    target = Target(name, peers.FUNCTIONS[name], "cpu", promises=peers.PROMISES[name], reach=peers.REACH[name])
    for case in CASES:
        inputs = make_inputs(case)
        assert target.reach(case) is None
        verdict = judge(target, case, inputs, reference(inputs, "cpu"), ())
        assert verdict.passed, [check.detail for check in verdict.failed]


def test_cudnn_is_given_what_its_interface_asks_for(monkeypatch):
    def attention(q, k, v, g, beta, cu_seqlens, *, scale, initial_state, output_final_state, a_log, dt_bias, **options):
        assert q.dim() == 3 and q.is_contiguous() and beta.dim() == 2 and cu_seqlens.dtype == torch.int32
        assert output_final_state and options.pop("gate_lower_bound") == -5.0
        assert options and all(value is True for value in options.values())
        given = (x[None] for x in (q, k, v, g, beta))
        out, state = model.forward(*given, scale, a_log, dt_bias, -5.0, initial_state, cu_seqlens)
        return out[0], state

    package = types.ModuleType("cudnn.linear_attention")
    package.kimi_delta_attention = attention
    monkeypatch.setitem(sys.modules, "cudnn", types.ModuleType("cudnn"))
    monkeypatch.setitem(sys.modules, "cudnn.linear_attention", package)
    passes("cudnn.kda")


def test_vllm_is_given_what_its_operator_asks_for(monkeypatch):
    def fwd(q, k, v, g, beta, scale, out, workspace, A_log, dt_bias, lower_bound, initial, final, cu_seqlens):
        assert workspace.numel() == 100 * q.shape[0] * q.shape[1] and out.is_contiguous()
        assert cu_seqlens is None or cu_seqlens.dtype == torch.int32
        result, state = model.forward(q, k, v, g, beta, scale, A_log, dt_bias, lower_bound, initial, cu_seqlens)
        out.copy_(result)
        if final is not None:
            final.copy_(state)

    stand_in = types.SimpleNamespace(fwd=fwd, get_workspace_size=lambda tokens, heads, sequences: 100 * tokens)
    monkeypatch.setattr(peers, "vllm_operators", lambda: stand_in)
    passes("vllm.flashkda")


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_cannot_run_says_why(name, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match=f"target {name}: .*not installed"):
        load_target(name)


def test_a_library_file_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setenv(peers.LIBRARY_VARIABLE, "/no/such/library.so")
    with pytest.raises(TargetError, match="expected a library file, got '/no/such/library"):
        load_target("vllm.flashkda")


def test_reach():
    assert peers.vllm_reach(a_case((3,), 1, initial_state="bf16", final_state="fp32")) is not None
    for reach in (peers.vllm_reach, peers.cudnn_reach):
        assert reach(a_case((3,), 1, lower_bound=0.0)) is not None
        assert reach(a_case((3,), 1)) is None
    assert peers.cudnn_reach(a_case((0,), 1)) is not None


REPORT = Path(__file__).parents[1] / "docs" / "upstream" / "report.py"


@pytest.mark.parametrize("case", ["relay", "equal-keys", "huge-state", "faint-betas", "neighbour"])
def test_the_report_for_authors_runs_alone(case, tmp_path):
    """Isolated from this project, by its model of a right kernel."""
    done = subprocess.run([sys.executable, "-I", REPORT, "model", case], capture_output=True, text=True, cwd=tmp_path)
    errors = [float(x) for x in re.findall("relative RMS error ([^,]+),", done.stdout)]
    assert done.returncode == 0 and len(errors) == 2, done.stderr
    assert 0.001 < errors[0] < 0.002 and errors[1] < 1e-6, done.stdout


def test_the_report_tells_refused_offsets_from_accepted_ones(tmp_path):
    refuses = "if ends[-1] != q.shape[1]:"
    for given, said in ((refuses, "right, an error"), ("if False:", "nothing was raised")):
        (tmp_path / "report.py").write_text(REPORT.read_text().replace(refuses, given))
        command = [sys.executable, "-I", tmp_path / "report.py", "model", "past-the-end"]
        assert said in subprocess.run(command, capture_output=True, text=True).stderr


def card(name: str, *rows: dict) -> dict:
    counts = {grade: sum(row["grade"] == grade for row in rows) for grade in conformance.GRADES}
    return {"target": {"name": name}, "status": "complete", "summary": counts, "rows": list(rows)}


def row(name: str, grade: str, *findings: dict) -> dict:
    numbers = {"score": None, "judged": 1, "cases": 1, "reason": "", "note": ""}
    return {"id": name, "rung": name.partition("/")[0], "grade": grade, **numbers, "findings": list(findings)}


def test_cards_of_one_target_merge_into_the_page_of_peers(tmp_path):
    found = {"check": "accuracy", "detail": "out is off", "case": "1 x 3 tokens, 1 head"}
    for folder, rows in {"a": [row("edges/one", "pass")], "b": [row("families/keys-equal", "fail", found)]}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "conform.json").write_text(json.dumps(card("cudnn.kda", *rows)))
    conformance.main([str(tmp_path), "--page", "peers", "--out", str(tmp_path / "docs")])
    page = (tmp_path / "docs" / "peers.md").read_text()
    assert re.search(r"\| cudnn.kda \| 1 of 1 \| 0 of 1, 1 fail .*\| 1 \| 1 \| 0 \|", page), page
    assert "| cudnn.kda | families/keys-equal | accuracy: out is off | 1 x 3 tokens, 1 head |" in page
    assert json.loads((tmp_path / "docs" / "data" / "peers.json").read_text())["cudnn.kda"]["summary"]["fail"] == 1
    (tmp_path / "b" / "conform.json").write_text(json.dumps(card("cudnn.kda", row("edges/one", "pass"))))
    with pytest.raises(SystemExit, match=r"each row of cudnn\.kda once, got edges/one"):
        conformance.main([str(tmp_path), "--page", "peers", "--out", str(tmp_path / "docs")])
