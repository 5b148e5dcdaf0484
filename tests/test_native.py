"""The short way in C++ (`flash_kda/native.cpp`): what it launches, when it does not, and where it cannot serve.

What it takes and how it packs that: test_ordinary.py. Here tensors on a CPU pass for tensors on a GPU: a copy of the
compiled file reads them through a table of functions that says so.
"""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import struct
import sys
from collections import Counter

import pytest
import torch
from test_ordinary import PARAMETERS, checkpoints, pools, usual
from test_short_way import call_side_by_side, calls_with_contents, kernel  # noqa: F401 (one is a fixture)

import flash_kda
from flash_kda import library, native, ordinary

TABLE = "IIPPPPPP"  # DLPackExchangeAPI
VIEW = 6  # dltensor_from_py_object_no_sync
CPU, CUDA = 1, 2  # DLDeviceType
DEVICE = 3
FILE = library.installed(native.NAME)
CAPSULE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
needs_native = pytest.mark.skipif(FILE is None or CAPSULE is None, reason="no native.cpp here, or an older PyTorch")


def test_it_serves_here():
    if os.environ.get("FLASH_KDA_BUILD") == "0" or not sys.platform.startswith("linux"):
        pytest.skip("a pure Python installation")
    assert FILE is not None
    if CAPSULE is None:
        pytest.skip("this PyTorch has no table of functions for DLPack")
    assert native.examined is not None


def table() -> tuple[int, ...]:
    return struct.unpack(TABLE, ctypes.string_at(native.address(CAPSULE), struct.calcsize(TABLE)))


@pytest.fixture
def run(kernel, monkeypatch, tmp_path):  # noqa: F811
    """`native.run` for which every tensor of a CPU is on a GPU of index DEVICE."""
    monkeypatch.delenv("FLASH_KDA_VALIDATE", raising=False)
    entries = list(table())
    prototype = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    view = prototype(entries[VIEW])

    @prototype
    def on_gpu(tensor, out):
        try:
            view(tensor, out)
        except Exception:
            return -1
        (ctypes.c_int32 * 2).from_address(out + 8)[:] = kernel.elsewhere.get(tensor, (CUDA, DEVICE))
        return 0

    entries[VIEW] = ctypes.cast(on_gpu, ctypes.c_void_p).value
    changed = ctypes.create_string_buffer(struct.pack(TABLE, *entries))
    functions = native.load(shutil.copy(FILE, tmp_path), ctypes.addressof(changed))
    kernel.elsewhere, kernel.keep = {}, (on_gpu, changed, functions)
    return functions[0]


def given(call: dict, **options) -> tuple:
    return tuple({**dict.fromkeys(PARAMETERS), **call, **options}[name] for name in PARAMETERS)


@needs_native
@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize("own_memory", [False, True])
def test_the_kernel_gets_what_pythons_way_gives_it(run, kernel, own_memory, serving):  # noqa: F811
    memory = torch.zeros(8192, dtype=torch.uint8) if own_memory else None
    call = usual(**(pools() | checkpoints(2, 4) if serving else {}))
    assert run(*given(call, workspace=memory)) is True
    library.launch(*ordinary.examine(**call), call["q"].device, memory)
    (packed, stream), (expected, _) = kernel.calls
    a, b = (library.Arguments.from_buffer_copy(x) for x in (packed, expected))
    assert stream == 1234 and (a.device, b.device) == (DEVICE, 0)
    a.device = 0
    assert library.PACKED.unpack(a) == library.PACKED.unpack(b)


@needs_native
def test_a_failed_launch_is_an_error(run, kernel):  # noqa: F811
    kernel.error = 700
    with pytest.raises(RuntimeError, match=r"^flash_kda: the launch failed: said the driver\. .*FLA_FLASH_KDA=0"):
        run(*given(usual()))


@needs_native
@pytest.mark.parametrize("error", [100005, library.NEEDS_SCRATCH], ids=["other device", "no kept scratch memory"])
def test_what_another_way_can_do_is_left_to_it(run, kernel, error):  # noqa: F811
    kernel.error = error
    assert run(*given(usual())) is False and len(kernel.calls) == 1


@needs_native
@pytest.mark.parametrize(("validate", "variable", "looked"), [(None, None, False), (True, None, True),
                         (None, "1", True), (False, "1", False), (None, "0", False), (None, "", False)])  # fmt: skip
def test_contents_that_are_to_be_checked_go_the_long_way(run, monkeypatch, validate, variable, looked):
    if variable is not None:
        monkeypatch.setenv("FLASH_KDA_VALIDATE", variable)
    for call in calls_with_contents():
        assert run(*given(call, validate=validate)) == (not looked)
    assert run(*given(usual(cu_seqlens=None, initial_state=None, final_state=None), validate=validate)) is True


@needs_native
def test_a_workspace_must_be_large_enough(run, kernel):  # noqa: F811
    memory = torch.zeros(8192, dtype=torch.uint8)
    assert run(*given(usual(), workspace=memory[:4095])) is False and not kernel.calls
    assert run(*given(usual(), workspace=memory[:4096])) is True


@needs_native
def test_a_device_without_code_is_left_to_pythons_way(run, kernel, monkeypatch):  # noqa: F811
    """Which says what is wrong. A later call asks again."""

    def refuse(index):
        raise RuntimeError(f"nothing for {index}")

    with monkeypatch.context() as patch:
        patch.setattr(library, "check_capability", refuse)
        assert run(*given(usual())) is False and not kernel.calls
    assert run(*given(usual())) is True


@needs_native
@pytest.mark.parametrize("device", [(CPU, 0), (CUDA, DEVICE + 1)], ids=["CPU", "GPU"])
def test_one_argument_on_another_device(run, kernel, device):  # noqa: F811
    call = usual(workspace=torch.zeros(8192, dtype=torch.uint8), **pools(), **checkpoints(2))
    assert run(*given(call)) is True
    for x in call.values():
        if isinstance(x, torch.Tensor):
            kernel.elsewhere = {id(x): device}
            assert run(*given(call)) is False


@needs_native
def test_what_is_no_call(run):
    assert run() is False and run(*given(usual())[:-1]) is False
    assert run(*[None] * len(PARAMETERS)) is False and run(*[object()] * len(PARAMETERS)) is False


@needs_native
def test_references_are_given_back(run):
    call = given(usual(workspace=torch.zeros(8192, dtype=torch.uint8), **pools(), **checkpoints(2)))
    counted = [*call, None, True, False]
    gc.collect()  # what the tests before left would be collected in between
    before = [sys.getrefcount(x) for x in counted]
    for _ in range(1000):
        run(*call)
        run(*call[::-1])
    assert all(abs(sys.getrefcount(x) - n) < 100 for x, n in zip(counted, before, strict=True))


@needs_native
def test_threads_do_not_meet(run, kernel):  # noqa: F811
    several = [usual(scale=float(i + 1)) for i in range(4)]

    call_side_by_side([given(call) for call in several], lambda call: run(*call))
    launched = (library.Arguments.from_buffer_copy(packed) for packed, _ in kernel.calls)
    count = Counter((a.scale, a.q.data) for a in launched)
    assert count == {(x["scale"], x["q"].data_ptr()): 200 for x in several}


@needs_native
def test_it_is_what_fwd_calls_first(run, kernel, monkeypatch):  # noqa: F811
    monkeypatch.setattr(native, "run", run)
    monkeypatch.setattr(ordinary, "run", lambda *arguments: pytest.fail("another way"))
    call, written = usual(**pools(), **checkpoints(2)), ("out", "final_state", "checkpoint_state")
    versions = [call[name]._version for name in written]
    flash_kda.fwd(**call)
    assert len(kernel.calls) == 1
    assert [call[name]._version for name in written] == [x + 1 for x in versions]


@needs_native
@pytest.mark.parametrize("what", ["no file", "no library", "an older PyTorch", "another capsule", "another DLPack"])
def test_where_it_cannot_serve_it_says_so(what, monkeypatch, tmp_path):
    file, api = shutil.copy(FILE, tmp_path), None
    if what == "no file":
        file = None
    elif what == "no library":
        (tmp_path / "text.so").write_text("not a library")
        file = tmp_path / "text.so"
    elif what == "an older PyTorch":
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    elif what == "another capsule":
        monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", torch.utils.dlpack.to_dlpack(torch.zeros(2)))
    else:
        entries = ctypes.create_string_buffer(struct.pack(TABLE, 2, *table()[1:]))
        api = ctypes.addressof(entries)
    assert native.load(file, api) is None
    assert native._never(*given(usual())) is False
