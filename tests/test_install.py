"""The choice of PyTorch by ci/install.py, with every command recorded instead of run."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "ci" / "install.py"


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_install", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def commands(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been run, all of it successful but a request for a build marked +cpu."""
    recorded = []

    def run(command: list[str], **options) -> subprocess.CompletedProcess:
        recorded.append(" ".join(command[1:]))
        return subprocess.CompletedProcess(command, 1 if command[-1].endswith("+cpu") else 0, stdout="torch==2.9.1\n")

    monkeypatch.setattr(install.subprocess, "run", run)
    return recorded


def test_with_a_driver_the_default_build_is_installed(install: ModuleType, commands: list[str]) -> None:
    install.install_torch(Path("python"), driver=True)
    assert len(commands) == 1 and commands[0].endswith("install --quiet torch")


def test_without_a_driver_only_cpu_builds_are_asked_for(install: ModuleType, commands: list[str]) -> None:
    install.install_torch(Path("python"), driver=False)
    build, uv, fallback = commands
    assert build.endswith(install.CPU_TORCH) and install.CPU_TORCH.endswith("+cpu")
    assert uv.endswith("install --quiet uv")
    assert "--torch-backend=cpu torch" in fallback


def test_a_cpu_build_that_pip_has_ends_the_search(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(install, "pip_install", lambda python, *what: asked.append(what) or True)
    install.install_torch(Path("python"), driver=False)
    assert asked == [(install.CPU_TORCH,)]


def test_torch_is_held_while_the_rest_is_installed(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "numpy==2.0.0\ntorch==2.9.1+cu130\ntorchvision==0.24.0\ntriton==3.5.1\n"
    done = subprocess.CompletedProcess([], 0, stdout=listed)
    monkeypatch.setattr(install.subprocess, "run", lambda *args, **options: done)
    held = []

    def pip_install(python: Path, flag: str, constraints: str, *rest: str) -> bool:
        assert flag == "--constraint" and rest == ("--editable", f".[{install.EXTRAS}]")
        held.extend(Path(constraints).read_text().split())
        return True

    monkeypatch.setattr(install, "pip_install", pip_install)
    install.install_project(Path("python"))
    assert held == ["torch==2.9.1+cu130", "triton==3.5.1"]


def test_an_environment_made_from_an_environment_sees_its_packages(install: ModuleType, tmp_path: Path) -> None:
    """This Python stands for the parent: what is imported from it must be found where it lies."""
    folder = tmp_path / "new"
    install.venv.EnvBuilder(with_pip=False).create(folder)
    answer = [str(folder / "bin" / "python"), "-c", "import pytest; print(pytest.__file__)"]
    assert subprocess.run(answer, capture_output=True).returncode != 0
    install.share_packages(folder)
    assert subprocess.run(answer, capture_output=True, text=True).stdout.strip() == pytest.__file__


def test_a_failed_step_stops_with_one_line(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "pip_install", lambda *arguments: False)
    with pytest.raises(SystemExit, match=r"^ci/install.py: pip could not install PyTorch$"):
        install.install_torch(Path("python"), driver=True)
