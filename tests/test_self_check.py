"""The self-check on a GPU, without one: builds side by side, defects that hang, and what cannot be built."""

from __future__ import annotations

import ast
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from judged_targets import a_case

from fuzz.__main__ import main
from fuzz.campaign.job import Result, unjudged
from fuzz.commands.self_check import DEVICE_JOBS
from fuzz.defects import device
from fuzz.defects.catalogue import spec
from fuzz.self_check import record
from fuzz.self_check import report as self_check_report
from fuzz.self_check import run as self_check

NAME = next(iter(device.DEVICE))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """In the place of CMake: it writes a library in two steps. The sources are one file, the cache a new folder."""

    def compile(command, **options):
        if "--build" not in command:
            return SimpleNamespace(returncode=0)
        library = command[2] / device.LIBRARY
        library.parent.mkdir()
        library.write_bytes(b"library" * 100_000)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", compile)
    monkeypatch.setattr(device, "SOURCES", ("CMakeLists.txt",))
    monkeypatch.setattr(device, "CACHE", tmp_path / "cache")


def test_builds_of_the_same_defect_at_once_are_whole(compiler, monkeypatch):
    together = threading.Barrier(6)
    replace = device.os.replace

    def all_at_once(*paths):
        together.wait(10)
        replace(*paths)

    monkeypatch.setattr(device.os, "replace", all_at_once)
    with ThreadPoolExecutor(6) as threads:
        libraries = set(threads.map(lambda _: device.build(()), range(6)))
    (library,) = libraries
    assert library.read_bytes() == b"library" * 100_000
    assert list(library.parent.iterdir()) == [library]


def test_what_cannot_be_built_is_one_line(monkeypatch, tmp_path, capsys):
    def build(patches):
        raise device.BuildError("does not compile:\nerror: no\n")

    monkeypatch.setattr(self_check, "default_device", lambda: "cuda")
    monkeypatch.setattr(self_check, "build", build)
    arguments = ["self-check", "--device", "--defect", NAME, "--seeds", "1", "--out", str(tmp_path / "out.json")]
    assert main(arguments) == 2
    assert capsys.readouterr().err == "python -m fuzz: does not compile: error: no\n"


def test_few_workers_share_a_gpu(monkeypatch, tmp_path):
    plans = []
    monkeypatch.setattr("fuzz.campaign.devices.cores", lambda: 64)

    def run(plan, show):
        plans.append(plan)
        return SimpleNamespace(interrupted=False)

    monkeypatch.setattr(self_check, "run_self_check", run)
    monkeypatch.setattr(self_check_report, "conclude", lambda progress: True)
    for options in (["--device"], ["--device", "--jobs", "9"], []):
        assert main(["self-check", *options, "--out", str(tmp_path / "out.json")]) == 0
    assert [plan.jobs for plan in plans] == [DEVICE_JOBS, 9, 64]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch):
    """The hunt for a defect of which each case hangs but every third passes, which only `expected` should find."""

    class Worker:
        def __init__(self, targets, **options): ...
        def close(self): ...

    def judge_job(worker, job, until):
        case, name = job.case, spec(NAME)
        return [unjudged(case, name, (), "timeout", "") if case.seed % 3 else Result(case, name, "passed")]

    monkeypatch.setattr(self_check, "Worker", Worker)
    monkeypatch.setattr(self_check, "wait_until_ready", lambda *args: None)
    monkeypatch.setattr(self_check, "judge_job", judge_job)

    def hunt(expected):
        found = []
        defect = SimpleNamespace(name=NAME, expected=expected)
        cases = (a_case(seed=seed) for seed in range(100))
        self_check.track([defect], cases, 0, 0, threading.Event(), found.append)
        return found

    return hunt


def test_a_defect_that_only_hangs_is_given_up(judged):
    (hunt,) = judged(("determinism",))
    assert hunt.judged == 8 and hunt.found == 2 and hunt.right is None  # five of the eight hung


def test_a_defect_that_should_hang_is_found_when_it_does(judged):
    (hunt,) = judged(("timeout",))
    assert hunt.right == hunt.judged == 2


def test_it_measures_in_a_new_folder_unless_told_otherwise(monkeypatch, tmp_path):
    """Results of an earlier run are read only where an option names them."""
    plans = []

    def run(plan, show):
        plans.append(plan)
        return SimpleNamespace(interrupted=False)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(self_check, "run_self_check", run)
    monkeypatch.setattr(self_check_report, "conclude", lambda progress: True)
    for options in ([], [], ["--publish"]):
        assert main(["self-check", *options]) == 0
    first, second, published = (plan.out for plan in plans)
    assert first != second and first.parent.parent == second.parent.parent == Path("runs") and not first.exists()
    assert published == record.ROOT / "docs" / "data" / "self_check.json"
    assert main(["self-check", "--publish", "--out", "x.json"]) == 2


def test_the_digest_is_that_of_the_code_alone(tmp_path, monkeypatch):
    (tmp_path / "oracle").mkdir()
    (tmp_path / "csrc").mkdir()
    python, cuda = tmp_path / "oracle" / "a.py", tmp_path / "csrc" / "a.h"
    monkeypatch.setattr(record, "ROOT", tmp_path)

    def digest(of_python: str, of_cuda: str = "int x;") -> str:
        python.write_text(of_python)
        cuda.write_text(of_cuda)
        return record.sources(device=True)

    first = digest('"""A module."""\n\n\ndef f(x):\n    """Twice."""\n    return 2 * x\n')
    assert first == digest('"""Another."""\n\n# why\ndef f(x):\n    return 2 * x  # so\n')
    assert first == digest("def f(x):\n    return (2 * x)\n", "int x;  // why\n/* and\nhow */")
    assert first != digest("def f(x):\n    return 3 * x\n")
    assert first != digest("def f(x):\n    return 2 * x\n", "int y;")
    assert digest("def f(x):\n    return 'text'\n") != digest("def f(x):\n    return 'other'\n")


def test_the_published_file_is_small():
    lines = (record.ROOT / "docs" / "data" / "self_check.json").read_text().splitlines()
    found = record.load(record.ROOT / "docs" / "data" / "self_check.json")
    seeds = sum(len(hunts) for hunts in found.hunts.values())
    assert len(lines) < seeds + len(found.shrunk) + 40 and max(map(len, lines)) < 1000


def test_the_digest_is_that_of_every_version_of_python(tmp_path, monkeypatch):
    """Python 3.12 gave functions a field of type parameters, and so every file another digest."""
    source = tmp_path / "some.py"
    source.write_text("def f(x):\n    return x\n")
    before = record.code_of(source)
    monkeypatch.setattr(ast.FunctionDef, "_fields", (*ast.FunctionDef._fields, "more"))
    monkeypatch.setattr(ast.FunctionDef, "more", [], raising=False)
    assert record.code_of(source) == before
    source.write_text("def f(x):\n    return x + 1\n")
    assert record.code_of(source) != before
