"""The short way of a call, taken: the launch, what PyTorch is told of it, and when it is not taken."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from test_arguments import legal_arguments
from test_ordinary import ORDINARY, PARAMETERS, checkpoints, pools, usual
from torch.utils._python_dispatch import TorchDispatchMode

import flash_kda
from flash_kda import forward, library, native, ordinary, torch_operator

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


# ------------------------------------------------------------------------------------------------- the launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A library that notes its calls in the place of the real one, for tensors on a CPU as if they were on a GPU."""
    noted = SimpleNamespace(calls=[], error=0, keeps_scratch=True, lock=threading.Lock())
    prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

    def called(address, stream):
        with noted.lock:
            noted.calls.append((ctypes.string_at(address, ctypes.sizeof(library.Arguments)), stream))
        if not noted.keeps_scratch and not library.Arguments.from_address(address).scratch:
            return library.NEEDS_SCRATCH
        return noted.error

    function = prototype(called)
    noted.flash_kda_forward = function
    noted.flash_kda_error_string = lambda error: b"said the driver"
    monkeypatch.setattr(library, "load", lambda: noted)
    monkeypatch.setattr(library, "check_capability", lambda index: None)
    monkeypatch.setattr(library, "scratch_bytes", lambda index: 4096)
    monkeypatch.setattr(library, "current_device", lambda: None)  # the index of a CPU
    monkeypatch.setattr(library, "current_stream", lambda index: 1234)
    return noted


@pytest.mark.parametrize("serving", [False, True])
def test_the_kernel_gets_what_the_long_way_gives_it(kernel, monkeypatch, serving):
    call = usual(workspace=torch.zeros(8192, dtype=torch.uint8), **(pools() | checkpoints(2, 4) if serving else {}))
    library.launch(*ordinary.examine(**call), call["q"].device, call["workspace"])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=1234))
    library.forward(**call)
    short, long = ((library.PACKED.unpack(packed), stream) for packed, stream in kernel.calls)
    assert short == long and long[1] == 1234


@pytest.mark.parametrize("keeps", [True, False])
def test_scratch_memory_is_made_where_the_library_keeps_none(kernel, keeps):
    kernel.keeps_scratch = keeps
    call = usual()
    library.launch(*ordinary.examine(**call), call["q"].device, None)
    first, *more = (library.Arguments.from_buffer_copy(packed) for packed, _ in kernel.calls)
    assert first.scratch is None
    assert [x.scratch_bytes for x in more] == ([] if keeps else [4096]) and all(x.scratch for x in more)


def test_a_failed_launch_is_an_error_and_no_write_is_noted(kernel, monkeypatch):
    kernel.error = 700
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    call = usual()
    with pytest.raises(RuntimeError, match=r"^flash_kda: the launch failed: said the driver\. .*FLA_FLASH_KDA=0"):
        ordinary.run(**call, validate=None, workspace=None)
    assert call["out"]._version == legal_arguments()["out"]._version


def test_the_device_of_the_tensors_is_current_during_the_launch(kernel, monkeypatch):
    current = [3]

    @contextlib.contextmanager
    def device(index):
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(library, "current_device", lambda: current[0])
    monkeypatch.setattr(library, "current_stream", lambda index: 10 + current[0])
    call = usual(workspace=torch.zeros(8192, dtype=torch.uint8))
    fields = ordinary.examine(**call)
    library.launch(*fields, SimpleNamespace(index=5), call["workspace"])
    library.launch(*fields, SimpleNamespace(index=3), call["workspace"])
    assert [stream for _, stream in kernel.calls] == [15, 13] and current == [3]


def call_side_by_side(calls, call_once) -> None:
    """Each of `calls` 200 times, in a thread of its own."""

    def work(call):
        for _ in range(200):
            call_once(call)

    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_do_not_meet(kernel):
    """Each thread's arguments are its own, whenever another one is between."""
    several = [usual(scale=float(i + 1), workspace=torch.zeros(8192, dtype=torch.uint8)) for i in range(4)]

    call_side_by_side(
        several, lambda call: library.launch(*ordinary.examine(**call), call["q"].device, call["workspace"])
    )
    launched = (library.Arguments.from_buffer_copy(packed) for packed, _ in kernel.calls)
    count = Counter((a.scale, a.q.data, a.scratch) for a in launched)
    assert count == {(x["scale"], x["q"].data_ptr(), x["workspace"].data_ptr()): 200 for x in several}


@pytest.mark.parametrize("inference", [False, True])
def test_autograd_is_told_of_the_writes(kernel, monkeypatch, inference):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    written = ("out", "final_state", "checkpoint_state")
    with torch.inference_mode(inference):
        call = usual(**checkpoints(2))
    versions = None if inference else [call[name]._version for name in written]
    assert ordinary.run(**call, validate=None, workspace=None)
    if not inference:
        assert [call[name]._version for name in written] == [x + 1 for x in versions]


def calls_with_contents() -> list[dict]:
    """That may be wrong, each in one tensor."""
    one = {"cu_seqlens": None, "initial_state": None, "final_state": None}
    return [
        usual(),
        usual(**one, state_indices=torch.tensor([-1])),
        usual(**one, **checkpoints(1)),
    ]


@pytest.mark.parametrize(("validate", "variable", "looked"), [(None, None, False), (True, None, True),
                         (None, "1", True), (False, "1", False), (None, "0", False)])  # fmt: skip
def test_contents_that_are_to_be_checked_go_the_long_way(kernel, monkeypatch, validate, variable, looked):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: True))
    monkeypatch.delenv("FLASH_KDA_VALIDATE", raising=False)
    if variable is not None:
        monkeypatch.setenv("FLASH_KDA_VALIDATE", variable)
    for call in calls_with_contents():
        assert ordinary.run(**call, validate=validate, workspace=None) == (not looked)
    assert ordinary.run(**usual(cu_seqlens=None, initial_state=None, final_state=None), validate=validate,
                        workspace=None)  # fmt: skip


# ---------------------------------------------------------------------------------- when it may pass PyTorch by


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def functionalization():
    torch._enable_functionalization(reapply_views=True)
    try:
        yield
    finally:
        torch._disable_functionalization()


@pytest.mark.parametrize(
    "context",
    [
        contextlib.nullcontext,
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu"),
        lambda: torch.set_grad_enabled(True),
    ],
    ids=["nothing", "no_grad", "inference_mode", "autocast", "grad"],
)
@pytest.mark.parametrize("way", [native, ordinary], ids=["native", "python"])
def test_a_plain_call_passes_pytorchs_dispatcher_by(way, context, monkeypatch):
    """The kernel is the same there."""
    taken = []
    monkeypatch.setattr(way, "run", lambda *arguments: not taken.append(arguments))
    call = usual(**pools(), **checkpoints(2))
    with context():
        flash_kda.fwd(**call)
    assert len(taken) == 1 and call["out"].isnan().all()
    assert len(taken[0]) == len(PARAMETERS)
    assert all(x is call.get(name) for name, x in zip(PARAMETERS, taken[0], strict=True))


@pytest.mark.parametrize(
    "context",
    [Mode, lambda: torch.device("cpu"), torch.profiler.profile, functionalization],
    ids=["dispatch mode", "function mode", "profiler", "functionalization"],
)
def test_who_wants_to_see_the_call_sees_it(context, monkeypatch):
    for way in (native, ordinary):
        monkeypatch.setattr(way, "run", lambda *arguments: pytest.fail("passed by"))
    assert torch_operator.is_direct()
    with context():
        assert not torch_operator.is_direct()
        if context is not functionalization:  # which has tensors of its own
            flash_kda.fwd(**usual())
    assert torch_operator.is_direct()


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.vmap,
        torch.func.functionalize,
        lambda f: lambda x: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
        lambda f: lambda x: torch.jit.trace(f, x, check_trace=False),
    ],
    ids=["vmap", "functionalize", "grad", "jvp", "jit.trace"],
)
def test_transforms_see_the_call(transform):
    seen = []

    def function(x):
        seen.append(torch_operator.is_direct())
        return x * 2

    transform(function)(torch.ones(3))
    assert seen == [False]


def test_a_call_that_is_not_ordinary_takes_the_long_way(monkeypatch):
    taken = []
    long_way = forward._long_way
    monkeypatch.setattr(forward, "_long_way", lambda *arguments: taken.append(arguments) or long_way(*arguments))
    flash_kda.fwd(**usual())  # tensors on a CPU
    assert len(taken) == 1


# --------------------------------------------------------------------------------------------------- on a GPU


def on_gpu(call: dict) -> dict:
    """The same strides there, and one tensor where it was one."""
    moved = {}
    for x in call.values():
        if isinstance(x, torch.Tensor):
            moved[id(x)] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x.detach())
    return {name: moved.get(id(x), x) for name, x in call.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("name", [x for x in ORDINARY if x != "its own workspace"])
def test_both_ways_give_the_same_bits(name, monkeypatch):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.delenv("FLASH_KDA_VALIDATE", raising=False)
    torch.manual_seed(0)
    made = ORDINARY[name]()
    if made["initial_state"] is not None:
        made["initial_state"].normal_()
    results = []
    for way in ("native", "short", "long"):
        call = on_gpu(made)
        for other in {"native": (), "short": (native,), "long": (native, ordinary)}[way]:
            monkeypatch.setattr(other, "run", lambda *arguments: False)
        if way != "long":
            monkeypatch.setattr(forward, "_long_way", lambda *arguments: pytest.fail("not ordinary"))
        if way == "native" and native.examined is not None:
            monkeypatch.setattr(ordinary, "run", lambda *arguments: pytest.fail("not native"))
        flash_kda.fwd(**call)
        monkeypatch.undo()
        results.append((call["out"], call["final_state"], call.get("checkpoint_state")))
    for several in zip(*results, strict=True):
        assert all(x is None for x in several) or all(torch.equal(x, several[0]) for x in several)
