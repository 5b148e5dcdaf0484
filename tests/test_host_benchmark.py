"""`python -m benchmarks.host` on a machine without a GPU: what it times runs, how it times, and what it says there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_short_way import kernel  # noqa: F401 (a fixture)

from benchmarks import host
from flash_kda import native, ordinary, torch_operator


def test_without_a_gpu_it_says_so_in_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "benchmarks.host"], cwd=root, capture_output=True, text=True)
    assert done.returncode == host.NOT_MEASURED
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("python -m benchmarks.host: ") and "GPU" in line


def test_too_few_calls_are_refused(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        host.main(["--calls", "999"])
    assert ended.value.code == host.NOT_MEASURED
    assert "--calls: expected at least 1000, got 999" in capsys.readouterr().err


def test_its_calls_are_ordinary():
    made = host.calls_on(torch.device("cpu"))
    assert all(ordinary.examine(**call) is not None for call in made.values())
    *_, strided, serving = made.values()
    assert not any(strided[name].is_contiguous() for name in "qkv")
    assert {"state_indices", "checkpoint_state", "checkpoint_offsets"} <= serving.keys()


def test_its_rows_run(kernel, monkeypatch):  # noqa: F811
    """Each once, as on a GPU; the long way ends where PyTorch would dispatch."""
    taken = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.setattr(torch_operator, "fwd", lambda *arguments, **options: taken.append(options))
    names = []
    for name, timed in host.rows(torch.device("cpu")):
        timed()
        names.append(name)
    assert len(set(names)) == len(names) and len(taken) == 1
    assert len(kernel.calls) == len(host.calls_on(torch.device("cpu"))) + 2  # without native.cpp, and the launch alone


def test_its_parts_run(kernel):  # noqa: F811
    call = next(iter(host.calls_on(torch.device("cpu")).values()))
    names = []
    for name, timed in host.parts(call):
        timed()
        names.append(name)
    assert len(set(names)) == len(names) and len(kernel.calls) == 1
    assert any(name.startswith("part: launch") for name in names)
    for word in ("checks", "struct", "allocation"):
        assert any(word in name for name in names)
    assert ("part: checks" in names) == (native.examined is not None)


def test_the_gpu_is_waited_for_outside_of_what_is_timed(monkeypatch: pytest.MonkeyPatch):
    """A clock that only calls and waits move: a call takes 1 us, each tenth 9 us, and a wait a second."""
    now, events = [0], []

    def timed():
        now[0] += 9000 if len(events) % 10 == 9 else 1000
        events.append("call")

    def wait():
        now[0] += 10**9
        waits.append(len(events))

    waits: list[int] = []
    monkeypatch.setattr(host.time, "perf_counter_ns", lambda: now[0])
    median, p90 = host.host_time(timed, 1000, wait)
    assert (median, p90) == (1.0, pytest.approx(8.2))
    assert len(events) == host.WARM_UP + 1000
    assert max(b - a for a, b in zip([0, *waits], waits, strict=False)) == host.IN_A_ROW and waits[-1] == len(events)


@pytest.mark.gpu
def test_it_measures(capsys: pytest.CaptureFixture):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    assert host.main(["--calls", "1000"]) == host.MEASURED
    said = capsys.readouterr().out
    assert "contiguous, fp32 states, cu_seqlens" in said and "part: launch" in said
