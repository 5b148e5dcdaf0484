"""Groups of the benchmark that are about this kernel alone: few heads, and the host time of a call."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_benchmarks import a_record, goal, no_gpu, results_of, six_of  # noqa: F401 (one is a fixture)

from benchmarks import __main__ as command
from benchmarks import cases, host, speed
from benchmarks import results as benchmark
from benchmarks.cases import chosen, speed_cases


def test_few_heads_have_their_goals_and_peers():
    found = chosen(["few-heads"])
    shapes = {(case.tokens, case.heads, case.sequences) for case in found}
    assert shapes == set(cases.FEW_HEADS_GOALS) and len(found) == len(shapes) == 13
    assert all(0 < case.hoped_ms <= case.wanted_ms and len(set(case.seq_lens)) == 1 for case in found)
    several = speed_cases()["few H12 T8192 N4"]
    assert several.seq_lens == (2048,) * 4 and several.packed
    assert (several.cudnn_ms, several.vllm_ms, several.wanted_ms) == (0.1666, 0.1592, 0.1)
    one, elsewhere = speed_cases()["few H12 T8192"], speed_cases()["H12 T8192"]
    assert one.flashkda_ms == pytest.approx(elsewhere.flashkda_ms, rel=0.02)


def few_heads(**device_ms: float) -> dict[str, dict]:
    """All of them as fast as wanted, but for those that are named by heads and tokens."""
    records = {case.name: a_record(case, 9.0, None) for case in chosen(["few-heads"])}
    for name, record in records.items():
        on_device = device_ms.get(name[4:].replace(" ", ""), record["wanted_ms"])
        record["kernel"] |= {"device_ms": on_device, "host_ms": 0.02}
    return records


def test_few_heads_are_measured_on_the_device():
    start = "few heads on the device in the time wanted: "
    met = goal(results_of(few_heads()), start)
    assert met.met and met.text == start + "in 13 cases"
    missed = goal(results_of(few_heads(H4T1024=0.026)), start)
    assert missed.met is False and missed.text == start + "not in few H4 T1024"
    records = few_heads()
    del records["few H4 T1024"]["kernel"]["device_ms"]
    assert goal(results_of(records), start).met is None
    row = next(row for row in benchmark.rows(results_of(few_heads())) if row.name == "few H12 T8192")
    assert row.to_flashkda == pytest.approx(0.8563 / 0.15) and row.against(row.published_cudnn_ms) > 1
    assert not benchmark.by_length(benchmark.rows(results_of(records)), 12)


def test_few_heads_have_a_table_beside_their_peers(tmp_path, capsys):
    table = command.table_of_few_heads(benchmark.rows(results_of(few_heads(H12T8192=0.2))))
    cells = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    row = cells["few H12 T8192"]
    assert (row["device ms"], row["wanted"], row["cuDNN ms"], row["x cuDNN"]) == ("!0.200", "0.150", "0.157", "!0.78")
    assert (row["x vLLM"], row["kernel ms"], row["host us"]) == ("2.11", "9.000", "20")
    assert cells["few H4 T1024"]["device ms"] == "0.025"
    file = tmp_path / benchmark.SPEED_FILE
    file.write_text(json.dumps(results_of(six_of() | few_heads())))
    assert command.main(["--show", str(file)]) == command.MEASURED
    said = capsys.readouterr().out
    assert said.count("few H8 T4096 ") == 1 and said.index("H96 fixed") < said.index("few H8 T4096 ")


def test_short_sequences_have_their_goals():
    found = {case.name: case for case in chosen(["short"])}
    assert set(found) == set(cases.SHORT_GOALS)
    assert found[cases.BESIDE].tokens == 8192 + 32 and found[cases.ALONE].seq_lens == (8192,)
    fp32, bf16 = (found[f"H96 256 sequences of 1{states}"] for states in ("", ", bf16 states"))
    assert fp32.bytes - bf16.bytes == 2 * 256 * 96 * 128 * 128 * 2
    drawn = speed.speed_inputs(replace(bf16, heads=1, seq_lens=(1, 1)), torch.device("cpu"))
    assert drawn["initial_state"].dtype == torch.bfloat16
    records = {name: a_record(case, 1.0, None) for name, case in found.items()}
    records[cases.BESIDE]["kernel"]["ms"] = 1.11
    told = {goal.text: goal.met for goal in benchmark.goals(results_of(records))}
    assert told["H96 512 sequences of 16: at most 2.8 ms: 1.000 ms"] is True
    assert told["H12 300 sequences of 17: at most 0.25 ms: 1.000 ms"] is False
    assert told[f"{cases.BESIDE}: at most 10% over H12 T8192: 11.0%"] is False


@pytest.mark.parametrize("words", [["host"], ["host", "six"]])
def test_the_host_time_of_a_call_is_a_group(words, no_gpu, tmp_path, monkeypatch):  # noqa: F811
    measured = []
    monkeypatch.setattr(host, "measure", lambda: measured.append("host"))
    monkeypatch.setattr(cases, "speed_cases", lambda: {"H96 fixed": no_gpu_case()})
    assert command.main(["--cases", *words, "--out", str(tmp_path), "--no-fla"]) == command.MEASURED
    assert measured == ["host"] and (tmp_path / benchmark.SPEED_FILE).exists() == ("six" in words)
    assert no_gpu == ["kernel"] * ("six" in words)


def no_gpu_case() -> cases.SpeedCase:
    return cases.SpeedCase("H96 fixed", "six", 1, (3,), packed=False)
