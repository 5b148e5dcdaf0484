"""The compiled library and its C interface, as far as a machine without a GPU can tell."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gpus
import pytest
import torch

import flash_kda
from flash_kda import library
from flash_kda.workspace import is_reachable

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SCRATCH = torch.zeros(64, dtype=torch.uint8)
STRUCTS = {
    "flash_kda_tokens": library.Tokens,
    "flash_kda_state": library.State,
    "flash_kda_arguments": library.Arguments,
}
NO_GPU = {35: "no driver", 100: "no device"}  # cudaErrorInsufficientDriver, cudaErrorNoDevice


@pytest.fixture(scope="module")
def compiled() -> ctypes.CDLL:
    if os.environ.get("FLASH_KDA_BUILD") == "0" or not sys.platform.startswith("linux"):
        pytest.skip("a pure Python installation, without the CUDA library")
    return library.load()  # elsewhere a missing library is a failure


def call_arguments(sequences: int = 1, **changes) -> library.Arguments:
    """Arguments of four tokens and one head; they keep the tensors they point to alive."""
    x = torch.zeros(sequences, 4, 1, 128, dtype=torch.bfloat16)
    beta, rate, bias = x[..., 0], torch.zeros(1), torch.zeros(1, 128)
    arguments = library.pack(x, x, x, x, beta, 1.0, x, rate, bias, -5.0, None, None, None, SCRATCH)
    arguments.keep = (x, rate, bias)
    for name, value in changes.items():
        setattr(arguments, name, value)
    return arguments


def test_the_structs_are_those_of_the_header(tmp_path: Path):
    """A C program prints where the compiler puts each field; ctypes must have the same fields at the same places."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler here")
    lines = [
        f'printf("{struct} {name} %zu %zu\\n", offsetof({struct}, {name}), sizeof((({struct}*)0)->{name}));'
        for struct, mirror in STRUCTS.items()
        for name, _ in mirror._fields_
    ]
    lines += [f'printf("{struct} - %zu 0\\n", sizeof({struct}));' for struct in STRUCTS]
    lines += ['printf("version - %d 0\\n", FLASH_KDA_ABI_VERSION);']
    source, program = tmp_path / "layout.c", tmp_path / "layout"
    body = "\n".join(lines)
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "flash_kda.h"\nint main(void) {{\n{body}\nreturn 0;\n}}\n'
    )
    subprocess.run([compiler, "-I", str(CSRC), str(source), "-o", str(program)], check=True)
    said = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    in_c = {(said[i], said[i + 1]): (int(said[i + 2]), int(said[i + 3])) for i in range(0, len(said), 4)}
    in_python = {
        (struct, name): (getattr(mirror, name).offset, getattr(mirror, name).size)
        for struct, mirror in STRUCTS.items()
        for name, _ in mirror._fields_
    }
    in_python |= {(struct, "-"): (ctypes.sizeof(mirror), 0) for struct, mirror in STRUCTS.items()}
    assert in_python | {("version", "-"): (library.ABI_VERSION, 0)} == in_c


@pytest.mark.parametrize("struct", STRUCTS)
def test_no_field_of_the_header_is_missing(struct: str):
    """Names in the header, in its order: a field added at the end would not move the others."""
    header = re.sub(r"//[^\n]*", "", (CSRC / "flash_kda.h").read_text())
    body = re.search(r"typedef struct \{([^}]*)\} " + struct + ";", header)[1]
    declared = [name for line in body.split(";") for name in re.findall(r"(\w+)\s*(?:,|$)", line.strip())]
    assert declared == [name for name, _ in STRUCTS[struct]._fields_]


def test_packed_arguments_say_what_the_tensors_are():
    x = torch.zeros(1, 8, 4, 640, dtype=torch.bfloat16)
    q, k, v, g = (x[..., 128 * i : 128 * (i + 1)] for i in range(4))
    beta, out = x[..., 600], torch.zeros(1, 8, 4, 128, dtype=torch.bfloat16)
    rate, bias = torch.zeros(4), torch.zeros(4, 256)[:, :128]
    states = torch.zeros(2, 4, 128, 128), torch.zeros(2, 4, 128, 128, dtype=torch.bfloat16)
    offsets = torch.tensor([0, 3, 8], dtype=torch.int32)
    a = library.pack(q, k, v, g, beta, 0.5, out, rate, bias, -2.0, *states, offsets, SCRATCH)
    assert (a.abi_version, a.heads, a.batch, a.tokens, a.sequences) == (library.ABI_VERSION, 4, 1, 8, 2)
    for name, tensor in {"q": q, "k": k, "v": v, "g": g, "beta": beta, "out": out}.items():
        field = getattr(a, name)
        strides = (field.stride_batch, field.stride_token, field.stride_head)
        assert (field.data, strides) == (tensor.data_ptr(), tensor.stride()[:3])
    assert (a.A_log, a.dt_bias, a.dt_bias_stride) == (rate.data_ptr(), bias.data_ptr(), 256)
    assert (a.cu_seqlens, a.cu_seqlens_is_64_bit) == (offsets.data_ptr(), 0)
    assert (a.scale, a.lower_bound) == (0.5, -2.0)
    assert (a.scratch, a.scratch_bytes) == (SCRATCH.data_ptr(), 64)
    for field, tensor, dtype in zip((a.initial_state, a.final_state), states, (2, 1), strict=True):
        strides = (field.stride_sequence, field.stride_head, field.stride_value)
        assert (field.data, strides, field.dtype) == (tensor.data_ptr(), (65536, 16384, 128), dtype)


def test_what_is_absent_is_packed_as_null():
    a = call_arguments(sequences=3)
    assert (a.cu_seqlens, a.initial_state.data, a.initial_state.dtype, a.final_state.dtype) == (None, None, 0, 0)
    assert a.sequences == 3


def test_arguments_of_another_version_are_refused(compiled: ctypes.CDLL):
    error = compiled.flash_kda_forward(ctypes.byref(call_arguments(abi_version=library.ABI_VERSION + 1)), None)
    assert "version" in compiled.flash_kda_error_string(error).decode()


def test_without_a_gpu_a_call_returns_an_error_that_says_so(compiled: ctypes.CDLL):
    if gpus.visible():
        pytest.skip("there is a GPU")
    error = compiled.flash_kda_forward(ctypes.byref(call_arguments()), None)
    assert error in NO_GPU
    assert re.search("driver|device", compiled.flash_kda_error_string(error).decode())


def test_without_sequences_there_is_nothing_to_launch(compiled: ctypes.CDLL):
    assert compiled.flash_kda_forward(ctypes.byref(call_arguments(sequences=0)), None) == 0


def test_the_library_exports_its_interface_alone(compiled: ctypes.CDLL):
    """A symbol of the static CUDA runtime that got out would meet that of PyTorch's runtime."""
    if shutil.which("nm") is None:
        pytest.skip("no nm here")
    listed = subprocess.run(["nm", "-D", "--defined-only", compiled._name], check=True, capture_output=True, text=True)
    assert sorted(line.split()[-1] for line in listed.stdout.splitlines()) == [
        "flash_kda_error_string",
        "flash_kda_forward",
        "flash_kda_scratch_bytes",
        "flash_kda_use_way",
    ]


def test_a_missing_library_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("FLASH_KDA_LIBRARY", raising=False)
    monkeypatch.setattr(flash_kda, "__path__", [str(tmp_path)])
    with pytest.raises(
        RuntimeError, match=r"expected libflash_kda\.so in .*, got none\. .*pure Python.*pip install.*FLA_FLASH_KDA=0"
    ):
        library.path()


def test_what_is_not_the_library_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """No file, a file of something else, and a library without these functions."""
    (tmp_path / "text.so").write_text("not a library")
    for named in (tmp_path / "nowhere.so", tmp_path / "text.so", "libc.so.6"):
        monkeypatch.setenv("FLASH_KDA_LIBRARY", str(named))
        with pytest.raises(
            RuntimeError, match=r"^flash_kda: expected the library of this version at .*, got: .*FLA_FLASH_KDA=0"
        ):
            library.load.__wrapped__()


def test_a_gpu_without_code_is_one_clear_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA A100")
    with pytest.raises(RuntimeError, match=r"capability 9\.0 .*, got 8\.0 \(cuda:7, NVIDIA A100\)\. .*FLA_FLASH_KDA=0"):
        library.check_capability(7)


def tokens(offset: int = 0, stride: int = 128) -> torch.Tensor:
    """`[2, 3, 4, 128]` that starts `offset` elements into an aligned buffer, its heads `stride` apart."""
    buffer = torch.zeros(offset + 24 * stride + 64, dtype=torch.bfloat16)
    start = (-buffer.data_ptr() // 2) % 8 + offset
    return buffer[start:].as_strided((2, 3, 4, 128), (12 * stride, 4 * stride, stride, 1), start)


@pytest.mark.parametrize(
    ("x", "reached"),
    [
        (tokens(), True),
        (tokens(offset=8), True),
        (tokens(offset=2), False),
        (tokens(offset=1), False),
        (tokens(stride=136), True),
        (tokens(stride=130), False),
        (tokens(stride=129), False),
        (tokens(stride=129)[:1, :1, :1], True),
        (tokens()[:, :, :1].expand(2, 3, 4, 128), False),
    ],
    ids=["contiguous", "+8", "+2", "+1", "stride 136", "stride 130", "stride 129", "sizes of one", "expanded"],
)
def test_what_the_kernel_reaches(x: torch.Tensor, reached: bool):
    assert is_reachable(x) == reached


class OnGpu:
    """A CPU tensor that says it is on a GPU."""

    def __init__(self, x: torch.Tensor) -> None:
        self.tensor, self.device = x, torch.device("cuda", 0)

    def __getattr__(self, name: str):
        return getattr(self.tensor, name)


def test_scratch_grows_with_the_processors(compiled: ctypes.CDLL):
    one, two, three = (compiled.flash_kda_scratch_bytes(n) for n in (1, 2, 3))
    assert three - two == two - one == 2 * 64 * 128 * 4  # two states of 64 value columns


def test_workspace_size_is_that_of_the_kernel_and_the_copies(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(library, "scratch_bytes", {0: 1000}.__getitem__)
    near, far = OnGpu(tokens()), OnGpu(tokens(offset=1))
    size = 2 * 3 * 4 * 128 * 2
    assert flash_kda.get_workspace_size(near, near, near, near, near) == 1000
    assert flash_kda.get_workspace_size(near, far, near, far, far) == 1000 + 3 * size
    states = torch.zeros(2 * 4 * 128 * 129)[1:].as_strided((2, 4, 128, 128), (4 * 128 * 129, 128 * 129, 129, 1))
    assert flash_kda.get_workspace_size(near, near, near, near, near, states, far) == 1000  # never copied
    on_cpu = tokens(offset=1)
    assert flash_kda.get_workspace_size(on_cpu, on_cpu, on_cpu, on_cpu, on_cpu) == 0


def test_workspace_size_of_contiguous_tensors_by_integers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert flash_kda.get_workspace_size(8192, 96) == flash_kda.get_workspace_size(T_total=1, H=1, N=3) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(library, "current_device", lambda: 2)
    monkeypatch.setattr(library, "scratch_bytes", {2: 1000}.__getitem__)
    assert flash_kda.get_workspace_size(8192, 96, 8) == 1000
    with pytest.raises(ValueError, match=r"^H: expected a number that is not negative, got -1"):
        flash_kda.get_workspace_size(8192, -1)
    with pytest.raises(TypeError, match=r"^T_total: expected an integer, got float"):
        flash_kda.get_workspace_size(8192.0, 1)
