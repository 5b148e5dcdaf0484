"""Where nvcc and the CUTLASS headers are: on this machine, or in wheels.

The build asks twice: the backend, for the wheels that are missing (`requirements`), and CMake, for the paths, by
running this file. A CUDA toolkit or a CUTLASS submodule that is there is used; what is not there comes from wheels.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUBMODULE = ROOT / "third_party" / "cutlass"
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
LEAST_CUDA = (12, 5)  # the first with cudaGetDriverEntryPointByVersion

CUTLASS_WHEELS = ("nvidia-cutlass==4.2.0.0",)  # the headers of the submodule's tag
CUDA_WHEELS = tuple(f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl"))


def requirements() -> list[str]:
    """The wheels that the build needs because the machine and the checkout lack what they hold."""
    needed = []
    if toolkit_nvcc() is None:
        needed += CUDA_WHEELS
    if submodule_headers() is None:
        needed += CUTLASS_WHEELS
    return needed


def toolkit_nvcc() -> Path | None:
    """nvcc of the CUDA toolkit that the environment names, else of the one in PATH, else of the usual place."""
    candidates = [os.environ.get("CUDACXX")]
    candidates += [f"{os.environ[name]}/bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates += [shutil.which("nvcc"), USUAL_NVCC]
    return next((Path(path) for path in candidates if path and cuda_version(path) >= LEAST_CUDA), None)


def cuda_version(nvcc: str | Path) -> tuple[int, int]:
    """The release of a compiler; (0, 0) if it does not run."""
    try:
        answer = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout
    except OSError:
        return (0, 0)
    release = re.search(r"release (\d+)\.(\d+)", answer)
    return (int(release[1]), int(release[2])) if release else (0, 0)


def wheel_nvcc() -> Path | None:
    """nvcc of the wheels, if they are installed beside this Python."""
    return _in_package("nvidia", "cu13/bin/nvcc")


def submodule_headers() -> Path | None:
    headers = SUBMODULE / "include"
    return headers if (headers / "cutlass" / "cutlass.h").exists() else None


def wheel_headers() -> Path | None:
    return _in_package("cutlass_library", "source/include")


def _in_package(package: str, path: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations or [] if spec else []
    return next((Path(folder) / path for folder in folders if (Path(folder) / path).exists()), None)


def main() -> None:
    """Print the paths of nvcc, of the folder of its runtime library (may be empty) and of the CUTLASS headers."""
    nvcc = toolkit_nvcc() or wheel_nvcc()
    if nvcc is None:
        least = ".".join(map(str, LEAST_CUDA))
        sys.exit(f"no CUDA compiler: no nvcc {least} or newer is here, nor the wheels {' '.join(CUDA_WHEELS)}")
    headers = submodule_headers() or wheel_headers()
    if headers is None:
        sys.exit(f"no CUTLASS headers: neither in {SUBMODULE} (git submodule update --init) nor in {CUTLASS_WHEELS[0]}")
    # The wheels have lib where nvcc looks in lib64.
    libraries = nvcc.parent.parent / "lib"
    print(nvcc)
    print(libraries if (libraries / "libcudart_static.a").exists() else "")
    print(headers)


if __name__ == "__main__":
    main()
