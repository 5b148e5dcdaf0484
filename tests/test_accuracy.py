"""The comparison of errors with fla's: its arithmetic, its inputs and what it marks. Tiny sizes, the model, no fla."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import accuracy
from fuzz.cases.families import FAMILIES
from oracle import recurrent_kda


def test_every_family_is_there_once():
    names = accuracy.all_families()
    assert len(names) == len(set(names)) == 5 + sum(map(len, FAMILIES.values()))
    assert {"collinear_strong", "gates=steep", "states=huge"} <= set(names)


@pytest.mark.parametrize("name", ["random", "values=huge", "gates=exact_bounds"])
def test_inputs_are_of_the_family_and_size(name):
    inputs = accuracy.inputs_of(name, 0, tokens=24, heads=2, device="cpu")
    assert inputs["q"].shape == (1, 24, 2, 128) and inputs["initial_state"].shape == (1, 2, 128, 128)
    assert inputs["initial_state"].dtype == torch.float32
    if name == "values=huge":
        assert inputs["v"].float().abs().mean() > 1e29
    if name == "gates=exact_bounds":
        assert inputs["g"].isinf().all()
    other = accuracy.inputs_of(name, 1, tokens=24, heads=2, device="cpu")
    assert not torch.equal(inputs["q"], other["q"])


def test_errors_are_those_of_each_head():
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(1, 5, 3, 128, generator=generator, dtype=torch.float64)
    result = exact.clone()
    result[:, :, 1] *= 1.01
    result[:, 0, 2, 0] = torch.nan
    found = accuracy.relative(result, exact, 2)
    assert found[0] == 0 and found[1] == pytest.approx(0.01) and found[2].isnan()
    assert accuracy.median_and_maximum(found[:2]) == pytest.approx((0.0, 0.01))
    assert accuracy.median_and_maximum(found) == (None, None)


def test_where_all_is_zero_only_zero_is_right():
    exact = torch.zeros(1, 4, 3, 128, dtype=torch.float64)
    result = exact.clone()
    exact[:, 1, 0] = 1e-200  # which fp32 has not
    result[:, :, 1] = 1e-30
    result[:, :, 2] = torch.nan
    assert accuracy.relative(result, exact, 2).tolist()[:2] == [0.0, torch.inf]
    assert accuracy.relative(result, exact, 2)[2].isnan()


def family(kernel: float | None, fla: float | None) -> dict:
    return {"kernel": {q: [kernel, kernel] for q in ("out", "state")}, "fla": {q: [fla, fla] for q in ("out", "state")}}


@pytest.mark.parametrize(
    ("kernel", "fla", "above"),
    [(0.001, 0.002, 0), (0.002, 0.002, 0), (0.0021, 0.002, 2), (None, 0.002, 2), (None, None, 2), (0.002, None, 0)],
)
def test_above_is_above_or_not_finite(kernel, fla, above):
    found = family(kernel, fla)
    assert len(accuracy.above_fla(found)) == above
    row = accuracy.table_of({"x": found}).rows[0]
    assert [cell.startswith("!") for cell in row] == [False, above > 0, False, False, above > 0, False, False]


def test_a_kernel_that_raises_is_above_fla_that_does_not():
    raised = {"kernel": {"error": "RuntimeError: no"}, "fla": family(1, 0.1)["fla"]}
    assert len(accuracy.above_fla(raised)) == 2
    assert accuracy.table_of({"x": raised}).rows[0][1] == "!failed"
    other = {"kernel": family(0.1, 1)["kernel"], "fla": {"error": "RuntimeError: no"}}
    assert not accuracy.above_fla(other)
    assert not accuracy.above_fla({"kernel": other["kernel"]})  # nobody to compare with


def test_whatever_fla_raises_stands_in_the_place_of_its_numbers(monkeypatch):
    class OutOfResources(Exception):  # as Triton's, no RuntimeError
        pass

    def chunk(**arguments):
        raise OutOfResources("shared memory\nmore of it")

    monkeypatch.setattr(accuracy.fla_peers, "chunk", chunk)
    found = accuracy.measure([accuracy.inputs_of("random", 0, tokens=3, heads=1, device="cpu")], with_fla=True)
    assert found["fla"] == {"error": "OutOfResources: shared memory"}
    assert found["kernel"]["out"][0] < 0.02


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> dict:
    """In the place of fla's kernels the oracle, with a relative error that the test chooses."""
    chosen = {"error": 0.0}

    def chunk(out, final_state, **inputs):
        exact, state = recurrent_kda(**inputs)
        out.copy_(exact * (1 + chosen["error"]))
        final_state.copy_(state * (1 + chosen["error"]))

    monkeypatch.setattr(accuracy.fla_peers, "available", lambda: None)
    monkeypatch.setattr(accuracy.fla_peers, "chunk", chunk)
    return chosen


@pytest.mark.parametrize(("error", "status"), [(0.5, accuracy.NOT_ABOVE), (0.0, accuracy.ABOVE)])
def test_the_command_says_where_the_kernel_is_above(fla, error, status, tmp_path, capsys):
    fla["error"] = error
    arguments = ["--device", "cpu", "--tokens", "40", "--heads", "2", "--seeds", "2", "--only", "betas=near_"]
    assert accuracy.main([*arguments, "--out", str(tmp_path)]) == status
    said = capsys.readouterr().out
    assert ("above fla: betas=near_one: out" in said) == (status == accuracy.ABOVE)
    results = json.loads((tmp_path / accuracy.ACCURACY_FILE).read_text())
    assert list(results["families"]) == ["betas=near_zero", "betas=near_one"]
    measured = results["families"]["betas=near_one"]
    assert 0 < measured["kernel"]["out"][0] < 0.02
    assert measured["fla"]["state"][0] == pytest.approx(error, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu", "--only", "nothing"], "--only: expected part of the name of a family"),
        ([], "--device: expected a machine with an NVIDIA GPU"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, said, fla, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert accuracy.main([*arguments, "--out", str(tmp_path)]) == accuracy.NOT_MEASURED
    assert said in capsys.readouterr().err and not list(tmp_path.iterdir())
