"""The emulator and the kernel were written by the same hands: what both take for granted of the hardware's layouts is
held to CuTe here. Needs nvcc and the CUTLASS headers, and no GPU.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fuzz.defects.device import Patch

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "tests/emulator/layouts.cu"


@pytest.fixture(scope="module")
def compiler() -> list[str]:
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "build_backend" / "toolchain.py")
    toolchain = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(toolchain)
    nvcc = toolchain.toolkit_nvcc() or toolchain.wheel_nvcc()
    headers = toolchain.submodule_headers() or toolchain.wheel_headers()
    if nvcc is None or headers is None:
        pytest.skip(f"needs {'nvcc' if nvcc is None else 'the CUTLASS headers: git submodule update --init'}")
    options = ("-std=c++17", "--expt-relaxed-constexpr", "-gencode", "arch=compute_90a,code=sm_90a", f"-I{headers}")
    return [str(nvcc), *options]


def compare(compiler: list[str], folder: Path, change: Callable[[Path], None] = lambda sources: None):
    """Compiles and runs the program on a copy of the sources. The finished process."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "tests" / "emulator", folder / "tests" / "emulator")
    change(folder)
    subprocess.run([*compiler, "-o", str(folder / "layouts"), str(folder / PROGRAM)], check=True, timeout=300)
    return subprocess.run([folder / "layouts"], capture_output=True, text=True, timeout=60)


def test_layouts_are_those_of_cute(compiler, tmp_path):
    done = compare(compiler, tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.endswith("all the same\n") and done.stdout.count(" 0 wrong") == 30


def test_what_differs_is_seen(compiler, tmp_path):
    """In the emulator's fragments, in the kernel's descriptors, and in its tiles."""

    def change(sources: Path) -> None:
        Patch("tests/emulator/fragments.h", "{n * 4 + k % 4, k / 4}", "{n * 4 + k / 2, k % 2}").apply(sources)
        Patch("csrc/sm90/ptx.h", "(1u << 30) + (kStride >> 4)", "(1u << 29) + (kStride >> 4)").apply(sources)
        Patch("csrc/sm90/bits.h", "((row & 7) << 4)) ^ (unit << 4)", "((row & 3) << 4)) ^ (unit << 4)").apply(sources)

    done = compare(compiler, tmp_path, change)
    wrong = [line for line in done.stdout.splitlines() if line.endswith("wrong") and not line.endswith(" 0 wrong")]
    assert done.returncode == 1 and len(wrong) == 1 + 4 + 1, done.stdout
