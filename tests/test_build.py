"""What the compiler said about the kernel, what it made of it, and how the build finds its tools."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from flash_kda import library

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Spills:
    """Bytes of one kernel, per thread."""

    stack: int
    stores: int
    loads: int


NONE = Spills(0, 0, 0)


@pytest.fixture(scope="module")
def compiled() -> Path:
    if os.environ.get("FLASH_KDA_BUILD") == "0" or not sys.platform.startswith("linux"):
        pytest.skip("a pure Python installation, without the CUDA library")
    return library.path()  # elsewhere a missing library is a failure


@pytest.fixture(scope="module")
def report(compiled: Path) -> str:
    path = compiled.with_name("libflash_kda.ptxas.txt")
    if "FLASH_KDA_LIBRARY" in os.environ and not path.exists():
        pytest.skip("FLASH_KDA_LIBRARY names a library without the compiler's report beside it")
    return path.read_text()


@pytest.fixture(scope="module")
def disassembly(compiled: Path) -> str:
    triton = importlib.util.find_spec("triton")
    carried = [str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")] if triton else []
    folders = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", *carried])
    cuobjdump = shutil.which("cuobjdump", path=folders)
    if cuobjdump is None:
        pytest.skip("no cuobjdump, neither of a CUDA toolkit nor of Triton")
    environment = {**os.environ, "PATH": folders}  # it calls nvdisasm
    command = [cuobjdump, "-sass", str(compiled)]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def spills(report: str) -> dict[str, Spills]:
    """By the kernel's name, from the mangled name and the line after it in the output of `ptxas -v`."""
    found = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        report,
    )
    return {unmangled(name): Spills(*map(int, numbers)) for name, *numbers in found}


def unmangled(name: str) -> str:
    """`forward` of `_ZN9flash_kda7forwardENS_6ParamsE`: the last name of the namespaces at the start."""
    rest = re.sub(r"^_ZN?", "", name)
    last = name
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        last, rest = rest[length.end() : end], rest[end:]
    return last


def test_the_parser_reads_what_ptxas_writes():
    sample = """ptxas info    : Compiling entry function '_ZN9flash_kda7forwardENS_6ParamsE' for 'sm_90a'
ptxas info    : Function properties for _ZN9flash_kda7forwardENS_6ParamsE
    408 bytes stack frame, 732 bytes spill stores, 816 bytes spill loads
ptxas info    : Function properties for _ZN9flash_kda4scanILi4EEEvNS_6ParamsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"""
    assert spills(sample) == {"forward": Spills(408, 732, 816), "scan": NONE}


def test_nothing_is_spilled(report: str):
    assert spills(report) == {"forward": NONE}, report


def test_every_thread_starts_with_the_registers_of_p(report: str):
    """R takes what the last warpgroup gives back; launched with fewer, it would wait for ever."""
    config = (ROOT / "csrc" / "sm90" / "config.h").read_text()
    registers = {role: int(n) for role, n in re.findall(r"constexpr int k(\w+)Registers = (\d+);", config)}
    assert re.findall(r"Used (\d+) registers", report) == [str(registers["Prepare"])]
    assert registers["Recur"] + 2 * registers["Prepare"] + registers["Last"] == 4 * registers["Prepare"]


def test_wgmma_is_not_serialised(report: str):
    """Nor is anything else that ptxas warns of there: a wait injected, registers of a role that it does not heed."""
    assert not [line for line in report.splitlines() if re.search(r"C75\d\d|serialized", line)]


def test_every_kernel_is_for_sm_90a(report: str):
    assert set(re.findall(r"Compiling entry function '\S+' for '(\S+)'", report)) == {"sm_90a"}


def test_the_products_are_wgmma_and_the_loads_are_tma(disassembly: str):
    assert re.search(r"\bHGMMA\.64x\d+x\d+\.F32", disassembly)
    assert "UTMALDG" in disassembly


def test_the_installed_wheel_serves_every_python(compiled: Path):
    try:
        wheel = metadata.distribution("flash-kda").read_text("WHEEL")
    except metadata.PackageNotFoundError:
        pytest.skip("flash-kda runs from its checkout and is not installed")
    tags = re.findall(r"^Tag: (.*)$", wheel, re.MULTILINE)
    assert tags and all(tag.startswith("py3-none-") and "any" not in tag for tag in tags)
    assert "Root-Is-Purelib: false" in wheel


def test_without_the_build_the_wheel_is_pure_python(tmp_path: Path):
    pytest.importorskip("scikit_build_core")
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*wheel, str(ROOT)], check=True, env={**os.environ, "FLASH_KDA_BUILD": "0"})
    (made,) = tmp_path.iterdir()
    assert made.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(made).namelist())
    assert {"flash_kda/forward.py", "flash_kda/py.typed", "oracle/__init__.py", "fuzz/__main__.py"} <= names
    assert {"fuzz/campaign/engines/ray.py", "fuzz/reporting/report.html.j2", "fuzz/py.typed"} <= names
    assert {"benchmarks/fragment.html.j2", "benchmarks/analysis/bounds.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".txt")) and "dist-info" not in name]
    assert {name.split("/")[0] for name in names} <= {"flash_kda", "oracle", "fuzz", "benchmarks", *dist_info(names)}


def dist_info(names: set[str]) -> set[str]:
    return {name.split("/")[0] for name in names if ".dist-info/" in name}


@pytest.fixture
def toolchain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the build that finds tools, on a machine without any; each test adds what it needs."""
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "build_backend" / "toolchain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module, "USUAL_NVCC", "/nowhere/nvcc")
    monkeypatch.setattr(module, "SUBMODULE", Path("/nowhere"))
    return module


def make_nvcc(path: Path, release: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    path.chmod(0o755)
    return path


def test_a_bare_machine_needs_all_wheels(toolchain: ModuleType):
    assert toolchain.requirements() == [*toolchain.CUDA_WHEELS, *toolchain.CUTLASS_WHEELS]


def test_a_toolkit_spares_its_wheels(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    nvcc = make_nvcc(tmp_path / "bin" / "nvcc", "12.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolchain.toolkit_nvcc() == nvcc
    assert toolchain.requirements() == list(toolchain.CUTLASS_WHEELS)


def test_a_toolkit_that_is_too_old_does_not_count(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("CUDACXX", str(make_nvcc(tmp_path / "old", "11.8")))
    newer = make_nvcc(tmp_path / "newer", "13.0")
    assert toolchain.toolkit_nvcc() is None
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: str(newer))
    assert toolchain.toolkit_nvcc() == newer


def test_a_submodule_spares_its_wheel(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    header = tmp_path / "include" / "cutlass" / "cutlass.h"
    header.parent.mkdir(parents=True)
    header.touch()
    monkeypatch.setattr(toolchain, "SUBMODULE", tmp_path)
    assert toolchain.requirements() == list(toolchain.CUDA_WHEELS)


def test_nothing_at_all_is_said_clearly(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(toolchain, "wheel_nvcc", lambda: None)
    with pytest.raises(SystemExit, match=r"no CUDA compiler: no nvcc 12\.5 or newer.*nvidia-cuda-nvcc==13\.0"):
        toolchain.main()
    monkeypatch.setattr(toolchain, "wheel_nvcc", lambda: Path("/somewhere/nvcc"))
    monkeypatch.setattr(toolchain, "wheel_headers", lambda: None)
    with pytest.raises(SystemExit, match=r"no CUTLASS headers.*git submodule update.*nvidia-cutlass==4\.2\.0\.0"):
        toolchain.main()
