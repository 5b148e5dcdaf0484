"""The benchmark's arithmetic, files and tables. No GPU: times are made up, and tiny calls go through the model."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import cases, speed
from benchmarks import results as benchmark
from benchmarks.cases import SpeedCase, chosen, speed_cases

DEVICE = {"name": "a GPU", "processors": 132, "memory_bytes": 1, "l2_bytes": 10**6, "cuda": "13.0", "driver": "1"}
TINY = {
    case.name: case
    for case in (
        SpeedCase("packed", "six", 1, (3, 0, 5), packed=True, wanted=5.0, hoped=8.0, fla_ms=7.0, flashkda_ms=1.5),
        SpeedCase("batch", "also", 2, (4, 4), packed=False, flashkda_ms=0.5),
        SpeedCase("alone", "scaling", 1, (2,), packed=False, with_fla=False),
    )
}


def a_record(case: SpeedCase, kernel_ms: float, fla_ms: float | None) -> dict:
    """What a measurement of the case leaves in the file."""
    return {
        "group": case.group,
        "heads": case.heads,
        "tokens": case.tokens,
        "sequences": case.sequences,
        "longest": max(case.seq_lens),
        "packed": case.packed,
        "bytes": case.bytes,
        "wanted": case.wanted,
        "hoped": case.hoped,
        "published_fla_ms": case.fla_ms,
        "published_flashkda_ms": case.flashkda_ms,
        "published_cudnn_ms": case.cudnn_ms,
        "published_vllm_ms": case.vllm_ms,
        "wanted_ms": case.wanted_ms,
        "hoped_ms": case.hoped_ms,
        "kernel": {"ms": kernel_ms, "peak_bytes": 5 * 10**8},
        "fla": None if fla_ms is None else {"ms": fla_ms},
        "difference": None if fla_ms is None else {"out": 0.004, "state": 0.003},
        "finite": True,
    }


def results_of(records: dict[str, dict]) -> dict:
    return {
        "version": benchmark.SPEED_VERSION,
        "copy_bytes_per_second": 4e12,
        "environment": {"device": DEVICE},
        "settings": {"calls": 60, "warm_up": 10, "cold": False},
        "cases": records,
    }


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A device that is the CPU, with times that are made up; returns the names of the calls that were timed."""
    timed = []

    def time_calls(call, settings, device):
        timed.append(call.__name__)
        ms = {"kernel": 1.0, "fla": 6.0}[call.__name__]
        return speed.Times(ms=ms, low_ms=0.9, high_ms=1.1, host_ms=0.01, device_ms=0.8)

    monkeypatch.setattr(speed, "find_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(speed, "describe_device", lambda device: DEVICE)
    monkeypatch.setattr(speed, "describe_library", lambda: {"path": "lib.so", "sha256": "0"})
    monkeypatch.setattr(speed, "copy_bandwidth", lambda device: 4e12)
    monkeypatch.setattr(speed, "peak_bytes", lambda call, device: 123)
    monkeypatch.setattr(speed, "time_calls", time_calls)
    # In the place of kernel and fla, which take too long here: both say that everything is 1.
    monkeypatch.setattr(speed.flash_kda, "fwd", lambda out, final_state, **inputs: (out.fill_(1), final_state.fill_(1)))
    monkeypatch.setattr(speed.fla_peers, "chunk_kda", as_fla)
    monkeypatch.setattr(cases, "speed_cases", lambda: TINY)
    return timed


def as_fla(**inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones_like(inputs["v"]), torch.ones_like(inputs["initial_state"])


def measure(folder: Path, *, resume: bool = False, **settings) -> dict:
    said: list[str] = []
    file = folder / benchmark.SPEED_FILE
    results = speed.measure_all(TINY.values(), speed.Settings(**settings), file, resume=resume, say=said.append)
    assert json.loads(file.read_text()) == results
    return results


# Cases.


def test_every_published_time_has_its_case():
    published = json.loads(cases.PEERS_FILE.read_text())
    found = speed_cases()
    assert [case.flashkda_ms for case in found.values()][:6] == [c["flashkda_ms"] for c in published["seed_cases"]]
    assert {name: found[name].flashkda_ms for name in published["other_cases_flashkda_ms"]} == published[
        "other_cases_flashkda_ms"
    ]
    assert found["H96 256 sequences of 1"].seq_lens == (1,) * 256
    assert found["H96 B8 T2048"].seq_lens == (2048,) * 8 and not found["H96 B8 T2048"].packed
    assert {case.tokens for case in found.values() if case.group in ("six", "scaling")} == {8192}


@pytest.mark.parametrize("name", TINY)
def test_the_floor_counts_each_input_and_output_once(name):
    case = TINY[name]
    inputs = speed.speed_inputs(case, torch.device("cpu"))
    tensors = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    moved = sum(x.numel() * x.element_size() for x in tensors)
    moved += inputs["v"].numel() * 2 + inputs["initial_state"].numel() * 4  # out and final_state
    assert case.bytes == moved


def test_the_floor_of_the_published_case_is_the_documented_one():
    assert speed_cases()["H96 fixed"].bytes / 1e9 == pytest.approx(1.02, abs=0.005)


def test_cases_are_chosen_by_group_or_name_in_one_order():
    assert [case.name for case in chosen(["H12 T1024", "six"])] == [*list(speed_cases())[:6], "H12 T1024"]
    assert len(chosen(["all"])) == len(speed_cases())
    with pytest.raises(ValueError, match=r"^--cases: expected one of all, also, checkpoints, few-heads, host, linear"):
        chosen(["seven"])


# Measuring.


def test_inputs_are_those_of_the_published_times():
    case = SpeedCase("", "also", 3, (200, 300), packed=True)
    inputs = speed.speed_inputs(case, torch.device("cpu"))
    assert all(inputs[name].dtype == torch.bfloat16 and inputs[name].shape == (1, 500, 3, 128) for name in "qkvg")
    assert inputs["cu_seqlens"].tolist() == [0, 200, 500]
    assert inputs["initial_state"].std().item() == pytest.approx(0.1, rel=0.02)
    assert inputs["beta"].float().std().item() == pytest.approx(1.0, rel=0.1)
    assert inputs["dt_bias"].min() >= 0 and inputs["dt_bias"].max() < 1
    assert (inputs["lower_bound"], inputs["scale"]) == (-5.0, 128**-0.5)
    batch = speed.speed_inputs(replace(case, seq_lens=(250, 250), packed=False), torch.device("cpu"))
    assert batch["q"].shape == (2, 250, 3, 128) and batch["cu_seqlens"] is None


def test_a_run_measures_kernel_and_fla_and_writes_both(no_gpu, tmp_path):
    results = measure(tmp_path)
    assert no_gpu == ["kernel", "fla", "kernel", "fla", "kernel"]  # the last case is without fla
    record = results["cases"]["packed"]
    times = {"ms": 1.0, "low_ms": 0.9, "high_ms": 1.1, "host_ms": 0.01, "device_ms": 0.8}
    assert record["kernel"] == times | {"peak_bytes": 123}
    assert record["difference"] == {"out": 0.0, "state": 0.0} and record["finite"]
    assert set(record) == set(a_record(TINY["packed"], 1.0, 6.0)) | {"seconds"}
    assert [row.name for row in benchmark.rows(results)] == list(TINY)


def test_the_calls_are_those_of_the_kernel_and_of_fla(no_gpu, monkeypatch):
    """The real ones take the arguments: the model in the place of the kernel, fla's own without its kernels."""
    seen = []
    monkeypatch.undo()
    monkeypatch.setattr(speed, "time_calls", lambda call, settings, device: speed.Times(1.0, 1.0, 1.0, 1.0, 1.0))
    monkeypatch.setattr(speed, "peak_bytes", lambda call, device: 0)
    options = {"chunk_kda": lambda *tensors, **options: seen.append(options) or as_fla(v=tensors[2], **options)}
    monkeypatch.setattr(speed.fla_peers, "_fla", lambda: SimpleNamespace(**options))
    record = speed.measure(TINY["alone"], speed.Settings(), torch.device("cpu"), say=lambda text: None)
    assert record["kernel"]["ms"] == 1.0 and record["fla"] is None
    record = speed.measure(TINY["packed"], speed.Settings(), torch.device("cpu"), say=lambda text: None)
    assert record["difference"]["out"] > 0.1
    flags = ("safe_gate", "state_v_first", "output_final_state", "use_qk_l2norm_in_kernel", "use_gate_in_kernel",
             "use_beta_sigmoid_in_kernel")  # fmt: skip
    assert all(seen[0][flag] is True for flag in flags)


def test_resuming_keeps_what_is_there_and_adds_what_is_missing(no_gpu, tmp_path):
    measure(tmp_path, with_fla=False)
    assert no_gpu == ["kernel"] * 3
    measure(tmp_path, resume=True, with_fla=False)
    assert no_gpu == ["kernel"] * 3
    results = measure(tmp_path, resume=True)  # now fla is wanted: on the same inputs in the same run
    assert no_gpu[3:] == ["kernel", "fla", "kernel", "fla"]
    del results["cases"]["batch"]
    speed.save(tmp_path / benchmark.SPEED_FILE, results)
    measure(tmp_path, resume=True)
    assert no_gpu[7:] == ["kernel", "fla"]
    measure(tmp_path)
    assert no_gpu[9:] == ["kernel", "fla", "kernel", "fla", "kernel"]


def test_an_interruption_leaves_the_cases_before_it(no_gpu, tmp_path, monkeypatch):
    def interrupted(**inputs):
        if inputs["q"].shape[0] == 2:
            raise KeyboardInterrupt
        return as_fla(**inputs)

    monkeypatch.setattr(speed.fla_peers, "chunk_kda", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path)
    assert list(benchmark.load(tmp_path / benchmark.SPEED_FILE)["cases"]) == ["packed"]


def test_what_fla_cannot_do_is_noted_and_the_rest_is_measured(no_gpu, tmp_path, monkeypatch, capsys):
    def out_of_memory(**inputs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(speed.fla_peers, "chunk_kda", out_of_memory)
    results = measure(tmp_path)
    assert results["cases"]["packed"]["fla"] == {"error": "OutOfMemoryError: CUDA out of memory.", "lost": False}
    assert list(results["cases"]) == list(TINY)
    measure(tmp_path, resume=True)
    assert no_gpu == ["kernel"] * 3  # neither is tried again
    assert command.main(["--show", str(tmp_path / benchmark.SPEED_FILE)]) == command.MEASURED
    assert "problem: packed: fla: OutOfMemoryError: CUDA out of memory." in capsys.readouterr().out


def test_a_failing_kernel_fails_the_run_and_is_tried_again(no_gpu, tmp_path, monkeypatch, capsys):
    def refuses(**arguments):
        raise RuntimeError("flash_kda: no")

    working = speed.flash_kda.fwd
    monkeypatch.setattr(speed.flash_kda, "fwd", refuses)
    assert command.main(["--cases", "all", "--out", str(tmp_path)]) == command.FAILED
    assert "problem: alone: kernel: RuntimeError: flash_kda: no" in capsys.readouterr().out
    monkeypatch.setattr(speed.flash_kda, "fwd", working)
    assert command.main(["--cases", "all", "--out", str(tmp_path), "--resume"]) == command.MEASURED


@pytest.mark.parametrize("said", ["CUDA error: an illegal memory access was encountered\nmore", "the launch failed"])
def test_a_lost_device_ends_the_run_with_what_there_is(said, no_gpu, tmp_path, monkeypatch, capsys):
    def illegal(**inputs):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", illegal)
        raise RuntimeError(said)

    monkeypatch.setattr(speed.fla_peers, "chunk_kda", illegal)
    assert command.main(["--cases", "all", "--out", str(tmp_path)]) == command.FAILED
    assert list(benchmark.load(tmp_path / benchmark.SPEED_FILE)["cases"]) == ["packed"]
    assert "packed: CUDA failed for good; --resume continues in a new process" in capsys.readouterr().out


def test_wrong_results_fail_the_run_however_fast(no_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed.flash_kda, "fwd", lambda out, final_state, **inputs: (out.zero_(), final_state.zero_()))
    assert command.main(["--cases", "packed", "--out", str(tmp_path)]) == command.FAILED
    assert "packed: kernel: differs from fla by 1, relative RMS" in capsys.readouterr().out


def test_another_device_is_not_mixed_in(no_gpu, tmp_path, monkeypatch, capsys):
    measure(tmp_path)
    monkeypatch.setattr(speed, "describe_device", lambda device: DEVICE | {"name": "another GPU"})
    assert command.main(["--resume", "--out", str(tmp_path)]) == command.NOT_MEASURED
    assert "--out: expected results of another GPU, got" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert command.main(["--out", str(tmp_path)]) == command.NOT_MEASURED
    assert "speed is measured on an NVIDIA GPU, and PyTorch sees none here" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "[]", '{"version": 99, "cases": {}}', '{"version": 1, "cases": 3}'])
def test_a_foreign_file_is_refused(content, tmp_path, capsys):
    (tmp_path / "x.json").write_text(content)
    assert command.main(["--show", str(tmp_path / "x.json")]) == command.NOT_MEASURED
    said = capsys.readouterr().err
    assert "expected a benchmark of version 1" in said or "expected the JSON of a benchmark" in said


@pytest.mark.parametrize("cold", [False, True])
def test_a_time_is_the_median_over_the_calls(cold, monkeypatch):
    """With a clock for the GPU: the n-th timed call takes n ms, and overwriting the cache 100 ms.

    While the GPU sleeps, calls wait in the queue, and the n-th takes n us.
    """
    clock = {"ms": 0.0, "calls": 0, "slept": 0}

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock["ms"]

        def elapsed_time(self, end):
            return end.at - self.at

    class Cache:
        def zero_(self):
            clock["ms"] += 100

    def call():
        clock["calls"] += 1
        n = clock["calls"] - speed.WARM_UP
        clock["ms"] += (n - 61) / 1000 if clock["slept"] else n

    monkeypatch.setattr(speed, "WARM_SECONDS", 0.0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: clock.update(slept=cycles))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: Cache())
    times = speed.time_calls(call, speed.Settings(calls=61, cold=cold), torch.device("cpu"))
    assert (times.ms, times.low_ms, times.high_ms) == (31, 15.5, 46.5)
    assert times.device_ms == pytest.approx(0.031)
    assert clock["calls"] == speed.WARM_UP + 2 * 61 and times.host_ms > 0
    assert clock["slept"] == pytest.approx(2 * 61 * times.host_ms / 1e3 * speed.MOST_CYCLES, abs=2)
    assert (clock["ms"] > 61 * 100) == cold


def test_warming_up_lasts_until_the_clocks_are_up(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: 0.1 * next(ticks))  # ten calls, and a look at the clock
    monkeypatch.setattr(speed, "WARM_SECONDS", 0.35)
    monkeypatch.setattr(
        torch.cuda, "Event", lambda enable_timing: SimpleNamespace(record=int, elapsed_time=lambda _: 1)
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    calls = itertools.count()
    speed.time_calls(lambda: next(calls), speed.Settings(calls=3), torch.device("cpu"))
    assert next(calls) == 4 * speed.WARM_UP + 2 * 3


def test_difference_is_the_relative_rms():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 70, 3, 128, generator=generator) for _ in range(2))
    assert speed.difference(x, y) == pytest.approx(((x - y).norm() / y.norm()).item(), rel=1e-5)
    assert speed.difference(x, y / 0) is None


# What a file says.


def six_of(kernel_ms: float = 0.4, **changes: float) -> dict[str, dict]:
    found = {case.name: case for case in chosen(["six"])}
    return {name: a_record(case, changes.get(name, kernel_ms), case.fla_ms) for name, case in found.items()}


def test_ratios_are_what_they_say():
    row = benchmark.rows(results_of({"packed": a_record(TINY["packed"], 2.0, 11.0)}))[0]
    assert (row.ratio, row.to_flashkda) == (5.5, 0.75)
    assert row.floor_ms == pytest.approx(1e3 * TINY["packed"].bytes / 4e12)
    assert row.of_floor == pytest.approx(row.floor_ms / 2.0)
    assert row.fits_l2 and not row.equal_lengths
    without = benchmark.rows(results_of({"packed": a_record(TINY["packed"], 2.0, None)}))[0]
    assert without.fla_ms is None and without.ratio == 3.5  # against the published 7.0


def test_the_geometric_mean_is_of_all_six_or_none():
    records = six_of()
    ratios = [record["fla"]["ms"] / 0.4 for record in records.values()]
    assert benchmark.geometric_mean(benchmark.rows(results_of(records))) == pytest.approx(math.prod(ratios) ** (1 / 6))
    del records["H64 mixed"]
    assert benchmark.geometric_mean(benchmark.rows(results_of(records))) is None


def goal(results: dict, start: str) -> benchmark.Goal:
    return next(goal for goal in benchmark.goals(results) if goal.text.startswith(start))


def test_goals_are_met_missed_or_unknown():
    met = results_of(six_of(0.3))
    assert goal(met, "5 times fla").met and goal(met, "no case slower").met
    assert goal(met, "each of the six as many times fla as wanted").met
    missed = results_of(six_of(0.3, **{"H64 mixed": 1.1}))
    assert goal(missed, "each of the six as many times fla as wanted: below: H64 mixed").met is False
    assert goal(missed, "no case slower than FlashKDA's published time: H64 mixed (0.93)").met is False
    nothing = results_of({})
    assert [goal.met for goal in benchmark.goals(nothing)] == [None] * 7
    assert goal(met, "cost linear").met is None
    assert goal(met, "scratch memory").text.endswith("500.0 MB") and goal(met, "scratch memory").met


@pytest.mark.parametrize(("slope", "within"), [(1.04, True), (1.06, False), (0.94, False)])
def test_cost_is_linear_within_five_percent(slope, within):
    records = six_of(0.4)
    long = speed_cases()["H96 T131072"]
    records[long.name] = a_record(long, 0.4 * 16 * slope, None)
    found = goal(results_of(records), "cost linear in T, H = 96, 8192 to 131072")
    assert found.met is within and found.text.endswith(f"{abs(slope - 1):.1%}")


# What is shown.


def test_the_table_marks_what_is_below_and_what_is_published(capsys):
    records = six_of(0.3, **{"H96 fixed": 1.5})
    records["H64 fixed"] = a_record(speed_cases()["H64 fixed"], 0.3, None)
    header, rows = (table := command.table_of(benchmark.rows(results_of(records)))).header, table.rows
    cells = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert cells["H96 fixed"]["x fla"] == "!1.75" and cells["H96 fixed"]["x FlashKDA"] == "!0.94"
    assert cells["H64 fixed"]["fla ms"] == "(1.738)" and cells["H64 fixed"]["x fla"] == "(5.79)"
    assert cells["H96 mixed"]["x fla"] == "8.85" and cells["H96 mixed"]["wanted"] == "5"


def test_without_matplotlib_there_is_a_line_in_the_place_of_the_plot(tmp_path, capsys, monkeypatch):
    file = tmp_path / benchmark.SPEED_FILE
    file.write_text(json.dumps(results_of(six_of())))
    monkeypatch.setitem(__import__("sys").modules, "benchmarks.plot", None)
    assert command.main(["--show", str(file)]) == command.MEASURED
    assert "no plot, as benchmarks.plot is not installed" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [benchmark.SPEED_FILE]


def test_the_plot_is_drawn_and_is_the_same_again(tmp_path):
    from benchmarks.plot import plot

    records = six_of()
    for case in chosen(["also", "linear"]):
        records[case.name] = a_record(case, 0.5 * case.tokens / 8192, None)
    svg, png = plot(results_of(records), tmp_path / benchmark.SPEED_FILE)
    first = svg.read_bytes(), png.read_bytes()
    assert b"<svg" in first[0] and first[1].startswith(b"\x89PNG")
    plot(results_of(records), tmp_path / benchmark.SPEED_FILE)
    assert (svg.read_bytes(), png.read_bytes()) == first


def test_other_targets_are_timed_beside_the_kernel(monkeypatch):
    def time_calls(call, settings, device):
        call()
        return speed.Times(1.0, 1.0, 1.0, 1.0, 1.0)

    monkeypatch.setattr(speed, "time_calls", time_calls)
    monkeypatch.setattr(speed, "peak_bytes", lambda call, device: 0)
    settings = speed.Settings(with_fla=False, peers=("model", "no_such_target"))
    record = speed.measure(TINY["alone"], settings, torch.device("cpu"), say=lambda text: None)
    assert record["peers"]["model"]["ms"] == 1.0
    assert "no_such_target" in record["peers"]["no_such_target"]["error"]
