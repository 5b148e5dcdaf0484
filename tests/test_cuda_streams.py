"""`flash_kda.fwd` on a GPU among other work: streams, threads, captured graphs, compiled code, autograd."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from on_gpu import (
    MIXED,
    arguments_of,
    assert_same_bits,
    hopper,  # noqa: F401 - a fixture of every test
    on_gpu,
    outputs_for,
    run,
    spread,
)
from test_operator import OPERATOR, in_order

import flash_kda
from flash_kda import library, native
from fuzz.cases.inputs import Inputs, make_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("gap", [0, 1], ids=["in reach", "copied"])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("own_memory", [False, True], ids=["allocator", "workspace"])
def test_nothing_is_waited_for_and_nothing_allocated_beside_the_workspace(own_memory, dtype, gap):
    arguments = arguments_of(on_gpu(cu_seqlens_dtype=dtype))
    for name in ("q", "out", "final_state"):
        arguments[name] = spread(arguments[name], 0, gap)
    if own_memory:
        tensors = {name: arguments.get(name) for name in ("q", "k", "v", "g", "out", "initial_state", "final_state")}
        size = flash_kda.get_workspace_size(**tensors)
        arguments["workspace"] = torch.empty(size, dtype=torch.uint8, device="cuda")
    flash_kda.fwd(**arguments)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]  # counts every request, from the cache too
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)  # a second: a call that waits for the device returns after it
        queued = torch.cuda.Event()
        queued.record()
        flash_kda.fwd(**arguments)
        waited = queued.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited
    assert not own_memory or torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_work_is_queued_on_the_current_stream():
    inputs = on_gpu()
    expected = run(inputs)
    late = replace(inputs, v=torch.zeros_like(inputs.v))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.v.copy_(inputs.v)  # a call on any other stream would not wait for this
        mine = run(late)
    stream.synchronize()
    assert_same_bits(mine, expected)


def test_threads_and_streams_do_not_meet():
    """Each call alone fills the GPU, and hands states over through scratch memory; all wait until all are queued."""
    several = [on_gpu(seed=seed, seq_lens=(1000, 70), heads=70) for seed in range(4)]
    for inputs in several:
        inputs.q = spread(inputs.q, 1, 0)  # so that scratch memory is in play
    expected = [run(inputs) for inputs in several]
    torch.cuda.synchronize()
    failed: list[BaseException] = []

    def work(inputs: Inputs, right) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(200_000_000)
                all_of_mine = [run(inputs) for _ in range(10)]
                torch.cuda.current_stream().synchronize()
            for mine in all_of_mine:
                assert_same_bits(mine, right)
        except BaseException as caught:
            failed.append(caught)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(several, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


def test_a_thread_may_begin_with_a_call():
    """To the driver, a thread that has not called CUDA yet has no context."""
    inputs = on_gpu()
    expected = run(inputs)
    arguments = arguments_of(inputs)
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(flash_kda.fwd, **arguments).result()
    assert_same_bits((arguments["out"], arguments["final_state"]), expected)


def test_the_device_of_the_tensors_is_used():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = on_gpu()
    expected = run(inputs)
    there = make_inputs(MIXED).to("cuda:1")
    out, state = (torch.full_like(x, torch.nan, device="cuda:1") for x in expected)
    run(there, out=out, final_state=state)
    assert torch.cuda.current_device() == 0
    assert_same_bits((out.to("cuda:0"), state.to("cuda:0")), expected)


@pytest.mark.parametrize("own_memory", [False, True], ids=["allocator", "workspace"])
@pytest.mark.parametrize("gap", [0, 1], ids=["in reach", "copied"])
def test_a_captured_call_replays_with_new_contents(gap, own_memory):
    """The second contents are cut into pieces that hand a state over: what the replay before left must not count."""
    first, second = on_gpu(seq_lens=(100, 0, 28)), on_gpu(seq_lens=(1, 120, 7), seed=1)
    static = replace(first)
    read = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "cu_seqlens")
    for name in read:
        x = getattr(first, name)
        setattr(static, name, spread(x, 0, gap) if x.dim() == 4 else x.clone())
    written, memory = outputs_for(static), {}
    if own_memory:
        tensors = (static.q, static.k, static.v, static.g, written["out"], static.initial_state, written["final_state"])
        size = flash_kda.get_workspace_size(*tensors)
        memory["workspace"] = torch.empty(size, dtype=torch.uint8, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(static, **written, **memory)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(static, **written, **memory)
    for inputs in (second, first, second, second):
        for name in read:
            getattr(static, name).copy_(getattr(inputs, name))
        for x in written.values():
            x.fill_(torch.nan)
        for x in memory.values():
            x.fill_(255)
        graph.replay()
        assert_same_bits(written.values(), run(inputs))


def test_a_captured_call_in_place_goes_on_with_every_replay():
    whole = on_gpu(seq_lens=(64,), packed=False, in_place=True)
    out, state = outputs_for(whole).values()
    run(replace(whole, initial_state=state.clone(), in_place=True))  # loads the kernel
    expected = [state.clone()]
    for _ in range(3):
        expected.append(run(replace(whole, initial_state=expected[-1].clone()))[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(whole, out=out, final_state=state)
    for after in expected[1:]:
        graph.replay()
        assert torch.equal(state, after)


@pytest.mark.parametrize("by_environment", [False, True])
def test_a_capture_cannot_wait_for_the_contents_of_offsets(by_environment, monkeypatch):
    inputs = on_gpu()
    written = outputs_for(inputs)
    run(inputs)
    if by_environment:
        monkeypatch.setenv("FLASH_KDA_VALIDATE", "1")
    graph = torch.cuda.CUDAGraph()
    with (
        torch.cuda.graph(graph),
        pytest.raises(ValueError, match=r"^validate: expected False while a CUDA graph is captured"),
    ):
        run(inputs, **written, **({} if by_environment else {"validate": True}))
    monkeypatch.delenv("FLASH_KDA_VALIDATE", raising=False)
    assert_same_bits(run(inputs, **written, validate=True), run(inputs))


def test_a_gpu_without_code_is_one_clear_error(monkeypatch):
    inputs = on_gpu()
    written = outputs_for(inputs)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (10, 0))
    monkeypatch.setattr(native, "run", lambda *arguments: False)  # it may remember this GPU from a call before
    library.check_capability.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"expected compute capability 9\.0 .*, got 10\.0 .*FLA_FLASH_KDA=0"):
            run(inputs, **written)
    finally:
        library.check_capability.cache_clear()
    assert all(x.isnan().all() for x in written.values())


FIRST_CALL = """
import torch
from test_cuda import assert_same_bits, on_gpu, outputs_for, run
inputs = on_gpu()
written = outputs_for(inputs)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    run(inputs, **written)
graph.replay()
assert_same_bits(written.values(), run(inputs))
"""


def test_the_first_call_of_a_process_can_be_captured():
    """It loads the library and the kernel."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # that of the tests
    command = [sys.executable, "-c", FIRST_CALL]
    # A limit of its own: pytest's would leave a hanging process on the GPU.
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_the_same_call_gives_the_same_bits():
    inputs = on_gpu(heads=40)
    expected = run(inputs)
    for _ in range(100):
        assert_same_bits(run(inputs), expected)


@pytest.mark.parametrize("option", [None, "validate", "workspace"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cu_seqlens_dtype": "int32"},
        {"packed": False, "seq_lens": (70,)},
        {"in_place": True},
        {"final_state": None},
    ],
    ids=str,
)
def test_pytorchs_checks_of_a_registered_operator(changes, option):
    arguments = arguments_of(on_gpu(**changes))
    options = {}
    if option == "validate":
        options["validate"] = True
    elif option == "workspace":
        tensors = ("q", "k", "v", "g", "out", "initial_state", "final_state")
        size = flash_kda.get_workspace_size(**{name: arguments[name] for name in tensors})
        options["workspace"] = torch.zeros(size, dtype=torch.uint8, device="cuda")
    checked = torch.library.opcheck(OPERATOR, in_order(arguments), options)
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_calls_give_the_same_bits(backend, in_place):
    def step(arguments):
        out = torch.empty_like(arguments["v"])
        flash_kda.fwd(**{**arguments, "out": out})
        return out + 1

    def run_step(function):
        arguments = arguments_of(on_gpu(in_place=in_place))
        del arguments["out"]
        return function(arguments), arguments["final_state"]

    torch._dynamo.reset()
    assert_same_bits(run_step(torch.compile(step, fullgraph=True, backend=backend)), run_step(step))


def test_tensors_made_in_inference_mode_are_written_to_outside_it_too():
    """Also where the kernel cannot reach them, and what it wrote is copied there."""
    expected = run(on_gpu())
    with torch.inference_mode():
        arguments = arguments_of(on_gpu())
        for name in ("out", "final_state"):
            x = arguments[name]
            arguments[name] = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype, device="cuda")[1:].view(x.shape)
    flash_kda.fwd(**arguments)
    assert_same_bits((arguments["out"], arguments["final_state"]), expected)


def test_autograd_knows_of_the_writes():
    arguments = arguments_of(on_gpu())
    arguments["q"].requires_grad_()
    versions = [arguments[name]._version for name in ("out", "final_state")]
    flash_kda.fwd(**arguments)
    assert not arguments["out"].requires_grad
    assert all(arguments[n]._version > v for n, v in zip(("out", "final_state"), versions, strict=True))
    with torch.inference_mode():
        inside = run(on_gpu())
    assert_same_bits(inside, (arguments["out"], arguments["final_state"]))
