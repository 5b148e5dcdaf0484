"""Which file a target comes from: never another one than was meant, and always shown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flash_kda
from fuzz.targets.registry import BUILTIN, TargetError, load_target

FWD = '''
"""A kernel."""
import flash_kda
def fwd(*args, **kwargs):
    """Theirs."""
    flash_kda.fwd(*args, **kwargs)
'''


def test_a_file_is_a_target(tmp_path, monkeypatch):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "kernel.py").write_text(FWD + f"place = {folder!r}\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    found = [load_target(f"{folder}/kernel.py:fwd") for folder in ("one", "two")]
    assert [target.fwd.__globals__["place"] for target in found] == ["one", "two"]
    assert [target.file for target in found] == [str(tmp_path / name / "kernel.py") for name in ("one", "two")]
    assert [target.name for target in found] == ["one/kernel.py:fwd", "two/kernel.py:fwd"]
    assert load_target("one/kernel.py:fwd,heads=no").promises.heads is False
    assert sys.path[: len(path)] == path  # nothing comes before what came first
    monkeypatch.setattr(sys, "path", path)


def test_a_file_imports_what_lies_beside_it_and_nothing_else_of_that_name(tmp_path, monkeypatch):
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "their_helpers.py").write_text(f"where = {folder!r}\n")
        (tmp_path / folder / "kernel.py").write_text("import their_helpers\n" + FWD)
    monkeypatch.setattr(sys, "path", list(sys.path))
    target = load_target(f"{tmp_path}/first/kernel.py:fwd")
    assert target.fwd.__globals__["their_helpers"].where == "first"
    with pytest.raises(TargetError, match=r"second/kernel.py: expected one their_helpers to import, got .*first"):
        load_target(f"{tmp_path}/second/kernel.py:fwd")
    del sys.modules["their_helpers"]


def test_files_that_are_no_targets(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "fine.py").write_text(FWD)
    for spec, message in (
        (f"{tmp_path}/absent.py:fwd", "absent.py: expected a Python file"),
        (f"{tmp_path}/broken.py:fwd", "cannot import .*broken.py: ZeroDivisionError"),
        (f"{tmp_path}/fine.py:other", "expected a function other in .*fine.py, got none"),
        (f"{tmp_path}/fine.py", "expected flash_kda, .*path/to/file.py:function"),
    ):
        with pytest.raises(TargetError, match=message):
            load_target(spec)


def test_every_target_says_which_file_it_is():
    assert load_target("flash_kda").file.endswith(str(Path(flash_kda.__file__).resolve()))
    for name in BUILTIN:
        assert Path(load_target(name).file.partition(", ")[0]).is_file()
    through = load_target("wrong_targets:raises")
    assert through.file == str(Path(__file__).with_name("wrong_targets.py"))


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )


def test_two_packages_of_one_name_are_not_confused(tmp_path):
    """Measured on hardware: with another flash_kda on PYTHONPATH, this project's kernel was judged in its name."""
    package = tmp_path / "flash_kda"
    package.mkdir()
    (package / "__init__.py").write_text("def fwd(*args, **kwargs):\n    raise RuntimeError('theirs')\n")
    case = tmp_path / "case.json"
    case.write_bytes((Path(__file__).parent / "fixtures" / "batch_of_no_tokens.json").read_bytes())
    done = python("-m", "fuzz", "replay", str(case), "--target", "flash_kda:fwd", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "expected one package flash_kda" in done.stderr and str(package) in done.stderr
    done = python("-m", "fuzz", "replay", str(case), "--target", f"{package}/__init__.py:fwd")
    assert done.returncode == 1 and "RuntimeError: theirs" in done.stdout, done.stdout + done.stderr
