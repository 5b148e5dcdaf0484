"""Make a virtual environment that holds this project, its tools and the PyTorch that suits the machine.

    python3 ci/install.py [.venv]

- PyTorch already importable in the environment: it stays.
- NVIDIA driver present: the CUDA PyTorch of the Python that runs this script, if it has one (the environment then sees
  its packages), else the default build, which is the CUDA one.
- No driver: a CPU build. pip is asked for the build marked `+cpu`, which exists where a CPU build was laid out for pip
  and nowhere else, so that the question itself downloads nothing; if there is none, uv, which knows where the CPU
  builds are kept, installs one.

PyTorch, and a Triton that came with it, are held at their versions while the rest is installed, so that a conflict
stops the installation and does not download another PyTorch. The stamp `installed` in the environment is written last.
Only the standard library is used, because this runs before anything is installed.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_TORCH = "torch==2.13.0+cpu"  # the newest release this project was tested with
EXTRAS = "fuzz,test,dev"


def has_nvidia_driver() -> bool:
    """True if a CUDA program could find a driver here."""
    try:
        ctypes.CDLL("libcuda.so.1")
        return True
    except OSError:
        pass
    nvidia_smi = shutil.which("nvidia-smi")
    return nvidia_smi is not None and subprocess.run([nvidia_smi, "-L"], capture_output=True).returncode == 0


def answers(python: str | Path, expression: str) -> str:
    """What `expression` prints in that Python, empty if it fails."""
    command = [str(python), "-c", f"import torch; print({expression})"]
    # Outside the repository: no folder of ours may be taken for an installed package.
    return subprocess.run(command, capture_output=True, text=True, cwd=tempfile.gettempdir()).stdout.strip()


def pip_install(python: Path, *arguments: str) -> bool:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def require(done: bool, message: str) -> None:
    if not done:
        sys.exit(f"ci/install.py: {message}")


def create(folder: Path, system_site_packages: bool) -> None:
    print(f"creating {folder} from {sys.executable} (Python {sys.version.split()[0]})", flush=True)
    builder = venv.EnvBuilder(system_site_packages=system_site_packages, with_pip=True, symlinks=os.name != "nt")
    try:
        builder.create(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        sys.exit(f"ci/install.py: cannot create {folder}: {error} (on Debian and Ubuntu: apt-get install python3-venv)")


def share_packages(folder: Path) -> None:
    """Lets the environment see the packages of the one that this Python runs in, which `venv` does not: what it calls
    the system is what that one was itself made from. Its own packages come first."""
    (here,) = (folder / "lib").glob("python*/site-packages")
    shared = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    (here / "of_the_parent.pth").write_text("\n".join(shared) + "\n")


def install_torch(python: Path, driver: bool) -> None:
    if driver:
        print("NVIDIA driver found: installing a CUDA PyTorch", flush=True)
        require(pip_install(python, "torch"), "pip could not install PyTorch")
        return
    print(f"no NVIDIA driver: installing a CPU PyTorch, {CPU_TORCH} if pip has it", flush=True)
    if pip_install(python, CPU_TORCH):
        return
    print("pip has no such build; uv knows where the CPU builds are kept", flush=True)
    require(pip_install(python, "uv"), "pip could not install uv, which installs a CPU PyTorch")
    uv = [str(python), "-m", "uv", "pip", "install", "--python", str(python), "--torch-backend=cpu", "torch"]
    require(subprocess.run(uv, cwd=ROOT).returncode == 0, "uv could not install a CPU PyTorch")


def install_project(python: Path) -> None:
    freeze = [str(python), "-m", "pip", "--disable-pip-version-check", "list", "--format=freeze"]
    installed = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout.split()
    held = [line for line in installed if line.startswith(("torch==", "triton=="))]
    print(f"installing flash-kda[{EXTRAS}] beside {' and '.join(held)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(held))
        done = pip_install(python, "--constraint", str(constraints), "--editable", f".[{EXTRAS}]")
    hint = "pip's last lines say why. If it is the CUDA library: FLASH_KDA_BUILD=0 installs without it, for CPUs only"
    require(done, f"pip could not install flash-kda[{EXTRAS}] beside {' and '.join(held)}; {hint}")


def main() -> None:
    require(sys.version_info >= (3, 10), f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path(".venv"), metavar="DIR", help="environment (default .venv)"
    )
    folder = parser.parse_args().folder.absolute()
    python = folder / "bin" / "python"
    driver = has_nvidia_driver()
    if not python.exists():
        cuda_torch_here = answers(sys.executable, "torch.version.cuda") not in ("", "None")
        shared = driver and cuda_torch_here
        create(folder, system_site_packages=shared)
        if shared and sys.prefix != sys.base_prefix:
            share_packages(folder)
    if not answers(python, "torch.__version__"):
        install_torch(python, driver)
    install_project(python)
    version = answers(python, "torch.__version__")
    require(bool(version), f"PyTorch was installed, but {python} cannot import it")
    (folder / "installed").write_text(f"torch {version}\n")
    print(f"{folder} is ready: PyTorch {version}", flush=True)


if __name__ == "__main__":
    main()
