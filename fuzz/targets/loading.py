"""Loading: the module that a target is in, by name or by file, and which file that turned out to be."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from fuzz.text import first_line


class LoadError(ValueError):
    """A module cannot be had, or is not the one that was meant; the message is part of a line."""


def load(place: str) -> ModuleType:
    """The module `package.module`, or that of the file `path/to/file.py`. Raises LoadError."""
    return from_file(Path(place)) if place.endswith(".py") else by_name(place)


def by_name(name: str) -> ModuleType:
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise LoadError(f"cannot import {name}: {first_line(error)}") from error
    package = name.partition(".")[0]
    loaded = file_of(sys.modules[package])
    for other in on_path(package) if loaded is not None else ():
        if other != loaded:
            file = other.parent / "FILE.py" if other.name == "__init__.py" else other
            example = f"Give the file, as in {file}:NAME"
            raise LoadError(f"expected one package {package} on the path, got {loaded} and {other}. {example}")
    return module


def on_path(package: str) -> list[Path]:
    """Every file that a package of this name has on `sys.path`, in its order, whatever was imported already."""
    specs = (PathFinder.find_spec(package, [folder]) for folder in sys.path)
    return [file for spec in specs if spec is not None and (file := file_of_spec(spec)) is not None]


def from_file(path: Path) -> ModuleType:
    """The file as a module of its own, beside whose directory it can import what lies there."""
    path = path.resolve()
    if not path.is_file():
        raise LoadError(f"{path}: expected a Python file, got none")
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"  # two files may have one name
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise LoadError(f"cannot import {path}: {first_line(error)}") from error
    finally:
        sys.path.remove(folder)
        sys.path.append(folder)  # for what its functions import later; before what comes here no more
    for other in imported(path):
        loaded, spec = file_of(sys.modules.get(other)), PathFinder.find_spec(other, [folder])
        beside = None if spec is None else file_of_spec(spec)
        if loaded is not None and beside is not None and loaded != beside:
            raise LoadError(f"{path}: expected one {other} to import, got {loaded}, which was loaded, and {beside}")
    return module


def imported(path: Path) -> set[str]:
    """The packages that a file names in its imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def file_of(module: ModuleType | None) -> Path | None:
    """The file of a module; None for one without, as those that are built into Python."""
    file = getattr(module, "__file__", None)
    return None if file is None else Path(file).resolve()


def file_of_spec(spec: ModuleSpec) -> Path | None:
    return Path(spec.origin).resolve() if spec.has_location and spec.origin else None


def origin(function: Callable, module: ModuleType) -> str:
    """The file that a function comes from, and that of its module where it is another."""
    place = file_of(module)
    code = getattr(inspect.unwrap(function), "__code__", None)
    source = None if code is None or code.co_filename.startswith("<") else Path(code.co_filename).resolve()
    if place is None or source is None or place == source:
        return str(place or source or "built into Python")
    return f"{source} (by way of {place})"
