"""The self-check on a GPU, without one: builds side by side, defects that hang, and what cannot be built."""

from __future__ import annotations

import ast
import json
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
from fuzz.self_check.overview import overview
from fuzz.self_check.record import Alarms, Hunt, Record

NAME = next(iter(device.DEVICE))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """In the place of CMake: it writes a library in two steps. The sources are one file, the cache a new folder."""

    def compile(command, **options):
        if "--build" not in command:
            return SimpleNamespace(returncode=0)
        library = command[2] / device.LIBRARY_NAME
        library.parent.mkdir()
        library.write_bytes(b"library" * 100_000)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", compile)
    monkeypatch.setattr(device, "BUILD_SOURCES", ("CMakeLists.txt",))
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


@pytest.mark.parametrize("pattern", record.DIGESTED + record.ON_A_DEVICE)
def test_the_digest_has_files_of_every_pattern(pattern: str):
    """A renamed file would otherwise leave the digest without a sign."""
    assert list(record.ROOT.glob(pattern))


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
    alarms = sum(len(each.failures) for each in found.alarms.values())
    assert len(lines) < seeds + len(found.shrunk) + 4 * alarms + 40 and max(map(len, lines)) < 1000


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


def test_the_table_has_each_number_with_its_command(tmp_path):
    """From the files in docs/data: those that are there."""
    found = {0: Hunt("scale_twice", 0, judged=3, right=3), 1: Hunt("scale_twice", 1, judged=9, right=9)}
    hunts = {"scale_twice": found}
    record = Record("sources", "cpu", 500, hunts=hunts, alarms={"model": Alarms("model", judged=20_000)})
    table = overview(record, tmp_path).splitlines()
    assert len(table) == 4
    said = "1 of 1; 2 of 2 searches, median 6 cases, worst 9"
    assert table[2].startswith(f"| planted defects, found with every seed | {said} |")
    assert table[3].endswith("| 0 in 20000 cases | `python -m fuzz self-check --false-alarms 20000 --publish` |")
    mutants = {"20": [{"outcome": "killed", "cases": 2}, {"outcome": "survived", "cases": 500}], "21": []}
    (tmp_path / "mutants.json").write_text(json.dumps(mutants))
    (tmp_path / "held_out.json").write_text('[{"set": "first", "defects": 70, "found": 38, "after_changes": 60}]')
    text = overview(record, tmp_path)
    assert "| mutants, seed 20 | 2: 1 killed, 1 survived; median 2 cases, worst 2 |" in text
    assert "--seed 21 --without runs/mutants-20.jsonl`" in text
    assert "| 38 of 70 at first, 60 after changes |" in text


def test_a_campaign_gets_its_row(tmp_path):
    run, file = tmp_path / "run", tmp_path / "campaigns.json"
    assert main(["run", "--target", "model", "--cases", "3", "--seed", "5", "--jobs", "1", "--out", str(run)]) == 0
    assert main(["self-check", "--campaign", str(run), "--out", str(file)]) == 0
    assert main(["self-check", "--campaign", str(run), "--campaign", str(file), "--out", str(file)]) == 0  # once
    (entry,) = json.loads(file.read_text())
    assert (entry["targets"], entry["cases"], entry["findings"], entry["seed"]) == (["model"], 3, 0, 5)
    (row,) = overview(Record("sources", "cpu", 500), tmp_path).splitlines()[2:]
    command = "`python -m fuzz run --target model --cases 3 --seed 5 --profile cpu`"
    assert row == f"| campaign, model on cpu | 0 findings in 3 cases | {command} |"
