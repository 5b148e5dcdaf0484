"""The house: no package imports in a circle, no file is long, and no name is taken."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("oracle", "flash_kda", "fuzz", "benchmarks", "ci", "build_backend")


def modules(root: Path, packages: tuple[str, ...]) -> dict[str, Path]:
    """Every module of the packages by its dotted name."""
    found = {}
    for path in (path for package in packages for path in (root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(module: str, path: Path, known: Mapping[str, Path]) -> set[str]:
    """The known modules that a module imports, wherever in it; what only a type checker reads is left out."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            # `from package import module` needs the module, and the package only for other names
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= (names & known.keys()) or {base}
    return (found & known.keys()) - {module}


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from nodes(node)


def circle(root: Path, packages: tuple[str, ...]) -> list[str]:
    """The modules of one circle in their order; empty where there is none."""
    known = modules(root, packages)
    try:
        TopologicalSorter({name: imports(name, path, known) for name, path in known.items()}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_module_imports_itself_in_the_end():
    assert len(modules(ROOT, PACKAGES)) > 70
    assert circle(ROOT, PACKAGES) == []


@pytest.mark.parametrize("where", ["{}", "def f():\n    {}", "try:\n    pass\nexcept ImportError:\n    {}"])
@pytest.mark.parametrize(
    "line", ["import p.a", "from p.a import x", "from p import a", "from . import a", "from .a import x"]
)
def test_a_circle_is_seen_wherever_the_import_stands(tmp_path, where, line):
    package = tmp_path / "p"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text("import p.b\n")
    (package / "b.py").write_text(where.format(line))
    assert set(circle(tmp_path, ("p",))) == {"p.a", "p.b"}
    (package / "b.py").write_text(f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    {line}\n")
    assert circle(tmp_path, ("p",)) == []


MOST_LINES = 450


def test_no_file_is_long():
    """Tables of data may be."""
    sources = [path for folder in (*PACKAGES, "tests", "csrc") for path in (ROOT / folder).rglob("*.*")]
    sources = [path for path in sources if path.suffix in (".py", ".h", ".cu", ".cpp", ".j2", ".sh")]
    assert len(sources) > 200
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert {path: count for path, count in lines.items() if count > MOST_LINES} == {}


def test_generated_files_are_small_and_marked():
    generated = [path for path in (ROOT / "docs" / "data").rglob("*.*") if path.suffix in (".json", ".svg")]
    assert len(generated) > 5 and sum(len(path.read_text().splitlines()) for path in generated) < 10_000
    assert "docs/data/** linguist-generated" in (ROOT / ".gitattributes").read_text()


def test_no_module_has_the_name_of_one_of_the_standard_library():
    names = {path.stem for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert names & sys.stdlib_module_names == set()


WITH_A_FINDING = """
import sys
from fuzz.__main__ import main
options = ["--cases", "40", "--jobs", "1", "--seed", "3", "--out", sys.argv[1]]
status = main(["run", "--target", "wrong_targets:raises", *options])
print(status, "torch" in sys.modules)
"""


def test_a_campaign_with_a_finding_leaves_pytorch_to_its_workers(tmp_path):
    path = [str(ROOT), str(ROOT / "tests")]
    program = f"import sys; sys.path[:0] = {path}\n{WITH_A_FINDING}"
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines()[-1:] == ["1 False"], done.stdout + done.stderr
    (finding, *_) = (tmp_path / "run" / "findings").iterdir()
    assert (finding / "inputs.safetensors").stat().st_size > 0
