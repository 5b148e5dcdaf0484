"""Defects of device code: builds of the kernel with one thing changed, never in the shipped library.

Each is a textual patch of one file of `csrc/`. A copy of the sources is patched and compiled by the project's own
build; the library goes into a cache under a digest of all that it was made of. A process loads one library, so each
defect is judged in a process of its own, on a Hopper GPU.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fuzz.defects.defect import Defect, Make

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("CMakeLists.txt", "build_backend", "csrc")
CACHE = ROOT / "build" / "defects"
LIBRARY = "libflash_kda.so"


class BuildError(RuntimeError):
    """A defect cannot be built; the message says which and why."""


@dataclass(frozen=True)
class Patch:
    """A change of the text of one source file: `old`, which is there once, becomes `new`."""

    file: str
    old: str
    new: str

    def apply(self, sources: Path) -> None:
        """Changes the file under `sources`. Raises BuildError unless `old` is there exactly once."""
        path = sources / self.file
        text = path.read_text() if path.exists() else ""
        count = text.count(self.old)
        if count != 1:
            raise BuildError(f"{self.file} has {count} times, not once: {self.old.strip()!r}")
        path.write_text(text.replace(self.old, self.new))


def copy_sources(folder: Path) -> None:
    """What the library is built of, without CUTLASS, into an empty folder."""
    for name in SOURCES:
        if not (ROOT / name).exists():
            raise BuildError(f"{ROOT}: no {name} here; defects of device code need a checkout of the project")
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, folder / name)
    (folder / "third_party").symlink_to(ROOT / "third_party")


def build(patch: Patch) -> Path:
    """The library with the patch, compiled unless the cache has it. About half a minute. Raises BuildError."""
    with tempfile.TemporaryDirectory(prefix="flash-kda-defect-") as temporary:
        folder = Path(temporary)
        copy_sources(folder)
        patch.apply(folder)
        library = CACHE / digest(folder) / LIBRARY
        if library.exists():
            return library
        commands = (
            ["cmake", "-S", folder, "-B", folder / "build", f"-DPython_EXECUTABLE={sys.executable}"],
            ["cmake", "--build", folder / "build"],
        )
        for command in commands:
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except OSError as error:
                raise BuildError(f"{command[0]}: {error.strerror}") from error
            if done.returncode:
                raise BuildError(f"{patch.file}: does not compile any more: {(done.stderr or done.stdout)[-2000:]}")
        library.parent.mkdir(parents=True, exist_ok=True)
        new = library.with_name(f".new-{os.getpid()}")
        shutil.copy2(folder / "build" / LIBRARY, new)
        os.replace(new, library)
        return library


def digest(folder: Path) -> str:
    result = hashlib.sha256()
    for path in sorted(path for name in SOURCES for path in [folder / name, *(folder / name).rglob("*")]):
        if path.is_file() and "__pycache__" not in path.parts:
            result.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return result.hexdigest()[:16]


def patched(file: str, old: str, new: str) -> Make:
    """`flash_kda.fwd` in a process whose library has the patch."""
    patch = Patch(file, old, new)

    def make():
        import flash_kda
        from flash_kda import library

        wanted = str(build(patch))
        if library.load.cache_info().currsize and os.environ.get("FLASH_KDA_LIBRARY") != wanted:
            raise BuildError("this process has another library loaded; a defect of device code needs one of its own")
        os.environ["FLASH_KDA_LIBRARY"] = wanted
        return flash_kda.fwd

    make.patch = patch
    return make


DEFECTS: tuple[Defect, ...] = ()
