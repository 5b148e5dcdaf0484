"""What the compiler said about the kernel, what it made of it, and how the build finds its tools."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
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


def module(name: str) -> ModuleType:
    """One of build_backend, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "build_backend" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found  # dataclasses look there
    spec.loader.exec_module(found)
    return found


loop_size = module("loop_size")


@pytest.fixture(scope="module")
def tools() -> str:
    """PATH with cuobjdump and nvdisasm."""
    path = loop_size.tools()
    if path is None:
        pytest.skip("no cuobjdump and nvdisasm, neither of a CUDA toolkit nor of Triton")
    return path


@pytest.fixture(scope="module")
def disassembly(compiled: Path, tools: str) -> str:
    return loop_size.disassemble(compiled, tools)


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
    assert spills(report) == {"forward": NONE, "run_short": NONE, "unusual_norms": NONE}, report


def test_every_thread_starts_with_the_registers_of_p(report: str):
    """R takes what the last warpgroup gives back; launched with fewer, it would wait for ever."""
    config = (ROOT / "csrc" / "sm90" / "config.h").read_text()
    registers = {role: int(n) for role, n in re.findall(r"constexpr int k(\w+)Registers = (\d+);", config)}
    assert set(re.findall(r"Used (\d+) registers", report)) == {str(registers["Prepare"])}
    assert registers["Recur"] + 2 * registers["Prepare"] + registers["Last"] == 4 * registers["Prepare"]
    assert registers["RecurApart"] + 2 * registers["Idle"] + registers["Last"] <= 4 * registers["Prepare"]


def test_wgmma_is_not_serialised(report: str):
    """Nor is anything else that ptxas warns of there: a wait injected, registers of a role that it does not heed."""
    assert not [line for line in report.splitlines() if re.search(r"C75\d\d|serialized", line)]


def test_every_kernel_is_for_sm_90a(report: str):
    assert set(re.findall(r"Compiling entry function '\S+' for '(\S+)'", report)) == {"sm_90a"}


def test_the_instructions_are_those_that_are_meant(disassembly: str):
    """wgmma for the state, in the shapes of ptx.h; mma for the rest, X in tf32, decays in fp16; TMA, and a bulk copy to
    the peer.
    """
    assert set(re.findall(r"\bHGMMA\.(\S+)", disassembly)) == {f"64x{n}x16.F32.BF16" for n in (32, 64, 128)}
    assert set(re.findall(r"\bHMMA\.(\S+)", disassembly)) == {
        "16816.F32",
        "16816.F32.BF16",
        "1688.F32.BF16",
        "1688.F32.TF32",
    }
    for name in ("UTMALDG.4D", "UBLKCP", "LDSM", "STSM", "MOVM"):
        assert re.search(rf"\b{re.escape(name)}\b", disassembly), name


def test_the_code_of_a_chunk_fits(compiled: Path, disassembly: str, capsys: pytest.CaptureFixture):
    """The table that the build has left beside the library, shown, is that of the library, and within the limit."""
    path = compiled.with_name("libflash_kda.loop.txt")
    if "FLASH_KDA_LIBRARY" in os.environ and not path.exists():
        pytest.skip("FLASH_KDA_LIBRARY names a library without the table of its code beside it")
    counts = loop_size.all_sizes(disassembly)
    table = loop_size.table(counts)
    with capsys.disabled():
        print(f"\n{table}", end="")
    if not path.read_text().startswith("loop size: no cuobjdump"):  # the build may have had less than there is here
        assert path.read_text() == table
    loop_size.check(counts)


def test_the_table_sums_up():
    table = loop_size.table({"pair": {"R": 400, "P": 700, "X": 10}, "recurs": {"R": 300}})
    rows = dict(re.findall(r"^(\w+(?: \w+)?) +(\d+) +\d+ bytes$", table, re.MULTILINE))
    pair = {"pair R": "400", "pair P": "700", "pair X": "10", "pair total": "1110"}
    assert rows == pair | {"recurs R": "300", "recurs total": "300", "limit": str(loop_size.LIMIT)}
    assert re.search(r"^pair total +1110 +17760 bytes$", table, re.MULTILINE)
    assert loop_size.LIMIT * loop_size.BYTES <= 40 * 1024


_, PAIR = loop_size.GROUPS["pair"]

# A kernel of one line a role, and what runs seldom.
MADE_UP = """struct Role {
  __device__ __forceinline__ void seldom_called() const {
    work();
  }
  __device__ __forceinline__ void run() {
    before();
    for (;;) {
      work();
      if (seldom(end)) break;
      if (seldom(tail)) seldom_called();
      if (seldom(tail)) {
        work();
      }
      if (!seldom(empty)) {
        work();
      } else {
        work();
      }
    }
  }
};
"""


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    for role in PAIR.values():
        text = MADE_UP.replace("Role", role.struct).replace("run()", f"{role.function}()")
        (tmp_path / role.file).write_text(text if role.loop == "for (" else text.replace("for (;;) {", role.loop))
    starts = [f"    {role.start}s, rank)}}.run();\n" for role in PAIR.values()]
    (tmp_path / "forward.h").write_text("".join(starts))
    return tmp_path


def disassembled(*places: tuple[str, int, int], text: str = "FADD R1, R1, R2") -> str:
    """As nvdisasm writes it: so many instructions of a line of each role, or of `seldom_called` from there."""
    lines = []
    for role, line, count in places:
        file, start = PAIR[role].file, list(PAIR).index(role) + 1
        frames = [(file, line), ("forward.h", start)]
        if line < 5:
            frames.insert(1, (file, 10))
        for inner, outer in itertools.pairwise(frames):
            called = f'inlined at "/csrc/{outer[0]}", line {outer[1]}'
            lines.append(f'\t//## File "/csrc/{inner[0]}", line {inner[1]} {called}')
        lines.append(f'\t//## File "/csrc/forward.h", line {start}')
        lines += [f"        /*{16 * i:04x}*/                   {text} ;" for i in range(count)]
    return "\n".join([".L_x_0:", *lines, ""])


EACH = [(role, 8, 10) for role in PAIR]


def test_what_runs_for_every_chunk_is_counted(made_up: Path):
    assert loop_size.sizes(disassembled(*EACH), PAIR, made_up) == dict.fromkeys(PAIR, 10)
    often = disassembled(*EACH, ("P", 9, 3), ("P", 10, 4), ("P", 15, 5))  # conditions, and the branch that is taken
    assert loop_size.sizes(often, PAIR, made_up)["P"] == 22
    seldom = disassembled(*EACH, ("P", 3, 7), ("P", 6, 7), ("P", 12, 7), ("P", 17, 7))
    apart = disassembled(("P", 8, 7), text="@!P0 NANOSLEEP.SYNCS 0x989680")
    assert loop_size.sizes(seldom + apart, PAIR, made_up)["P"] == 10


def test_too_much_code_fails(made_up: Path):
    loop_size.check({"pair": loop_size.sizes(disassembled(*EACH, ("R", 8, loop_size.LIMIT - 50)), PAIR, made_up)})
    over = {"pair": loop_size.sizes(disassembled(*EACH, ("R", 8, loop_size.LIMIT - 49)), PAIR, made_up)}
    with pytest.raises(
        ValueError, match=f"expected at most {loop_size.LIMIT} instructions for every chunk, got {loop_size.LIMIT + 1}"
    ):
        loop_size.check(over)


def test_a_role_without_instructions_is_no_small_role(made_up: Path):
    with pytest.raises(ValueError, match="no instructions of loads"):
        loop_size.sizes(disassembled(*EACH[:-1]), PAIR, made_up)


def test_without_the_tools_the_build_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(loop_size, "tools", lambda: None)
    loop_size.main(tmp_path / "libflash_kda.so")
    said = capsys.readouterr().out
    assert said == "loop size: no cuobjdump and nvdisasm here\n"
    assert (tmp_path / "libflash_kda.loop.txt").read_text() == said


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
    found = module("toolchain")
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(found.shutil, "which", lambda name: None)
    monkeypatch.setattr(found, "USUAL_NVCC", "/nowhere/nvcc")
    monkeypatch.setattr(found, "SUBMODULE", Path("/nowhere"))
    return found


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
