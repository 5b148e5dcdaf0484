"""`flash_kda` as a package: what it shows, what its modules import, and that type checkers may read it."""

from __future__ import annotations

import ast
import graphlib
import importlib.resources
import inspect
import pydoc
import re
from pathlib import Path

import pytest
import torch

import flash_kda

FOLDER = Path(inspect.getfile(flash_kda)).parent
MODULES = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}


def imported(source: str) -> set[str]:
    """The modules of flash_kda that a module imports, at its top or in its functions; "" is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            assert not node.level, "relative imports are not looked through here"
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "flash_kda":
                first = rest.partition(".")[0]
                found.add(first if first in MODULES else "")
    return found


def circle(sources: dict[str, str]) -> list[str] | None:
    try:
        graphlib.TopologicalSorter({name: imported(source) for name, source in sources.items()}).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def sources() -> dict[str, str]:
    return {path.stem.replace("__init__", ""): path.read_text() for path in FOLDER.glob("*.py")}


def test_no_module_imports_itself_through_others():
    assert circle(sources()) is None


@pytest.mark.parametrize("added", ["from flash_kda import arguments", "import flash_kda"])
def test_a_circle_would_be_seen_in_a_function_too(added):
    assert circle({**sources(), "workspace": f"def function():\n    {added}\n"})


def test_help_shows_the_public_names_alone():
    text = pydoc.plain(pydoc.render_doc(flash_kda))
    (functions,) = re.findall(r"^FUNCTIONS\n(.*?)^\S", text, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^    (\w+)\(", functions, re.MULTILINE) == ["fwd", "get_workspace_size"]
    assert "CLASSES" not in text
    (data,) = re.findall(r"^DATA\n(.*?)^\S", text, re.MULTILINE | re.DOTALL)
    assert re.findall(r"^    (\w+) = ", data, re.MULTILINE) == ["__all__"]


def test_the_example_of_the_help_runs():
    example = [line[4:] for line in flash_kda.__doc__.splitlines() if line.startswith("    ")]
    assert len(example) == 5
    exec("\n".join(example), {"torch": torch, "flash_kda": flash_kda})


def test_type_checkers_may_read_it():
    assert any(Path(folder, "py.typed").exists() for folder in flash_kda.__path__)
    assert importlib.resources.files("flash_kda").joinpath("py.typed").is_file()
