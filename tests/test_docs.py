"""The pages: links lead somewhere, named files and commands exist with their options, and the README is short."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
from functools import cache
from pathlib import Path

import pytest
import typer

from fuzz.__main__ import app

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
FOLDERS = ("benchmarks", "build_backend", "ci", "csrc", "docs", "flash_kda", "fuzz", "oracle", "tests")
MOST_LINES = 150  # of the README


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def dead_links(text: str, folder: Path) -> list[str]:
    """Links to files that are not there, or to headings that their page does not have."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, part = link.partition("#")
        path = folder / file
        if link.startswith(("http://", "https://")):
            continue
        missing = bool(file) and not path.exists()
        headings = [] if missing or not part else re.findall(r"^#+ (.+)$", path.read_text() if file else text, re.M)
        if missing or (part and part not in map(anchor, headings)):
            dead.append(link)
    return dead


def missing_files(text: str) -> list[str]:
    """Files and folders of the checkout that are named in a page, and are not there."""
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)}|\.ci)/[\w./*-]*)`", text)
    return [name for name in named if not any(ROOT.glob(name.rstrip("/")))]


def commands(text: str) -> list[str]:
    """Every call of a module or of `kda-fuzz`, without what follows a comment or a pipe."""
    calls = re.findall(r"python -m ((?:fuzz|benchmarks)[.\w]*(?![.\w])[^`\n#|]*)|\b(kda-fuzz [^`\n#|]*)", text)
    return [module or script for module, script in calls]


@cache
def help_of(module: str) -> str:
    """What `python -m MODULE --help` prints, of a measurement."""
    name = f"{module}.__main__" if module == "benchmarks" else module
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--help"])
    assert not ended.value.code
    return printed.getvalue()


def unknown(command: str) -> list[str]:
    """What of a command does not exist: its module, its subcommand, or options."""
    module, *words = command.split()
    given = set(re.findall(r"--[a-z][a-z-]*", command))
    if module in ("fuzz", "kda-fuzz"):
        subcommands = typer.main.get_command(app).commands
        subcommand = next(iter(words), "").strip("[]")
        if not re.fullmatch(r"[a-z-]+", subcommand):
            return []  # the module is named alone
        if subcommand not in subcommands:
            return [subcommand]
        return sorted(given - {name for option in subcommands[subcommand].params for name in option.opts})
    return sorted(given - set(re.findall(r"--[a-z][a-z-]*", help_of(module))))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert dead_links(text_of(page), (ROOT / page).parent) == []


@pytest.mark.parametrize("page", PAGES)
def test_named_files_are_there(page):
    assert missing_files(text_of(page)) == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page):
    assert {command: wrong for command in commands(text_of(page)) if (wrong := unknown(command))} == {}


def test_make_has_the_targets_that_are_named():
    targets = re.findall(r"^([a-z]+):", text_of("Makefile"), re.M)
    named = {
        name
        for page in PAGES
        for name in re.findall(r"(?:^ *|`|&& |\$ )make ([a-z]+)(?= *(?:$|#|`|&))", text_of(page), re.M)
    }
    assert {"install", "test", "fuzz", "lint"} <= named <= set(targets)


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= MOST_LINES


def test_what_is_wrong_is_seen(tmp_path):
    (tmp_path / "page.md").write_text("# One Thing\n")
    links = "[a](page.md#one-thing) [b](page.md#another) [c](none.md) [d](https://x.y/z)"
    assert dead_links(links, tmp_path) == ["page.md#another", "none.md"]
    assert missing_files("`fuzz/cases/case.py`, `fuzz/none.py`, `docs/*.md`, `csrc/none/`") == [
        "fuzz/none.py",
        "csrc/none/",
    ]
    assert commands(
        "`python -m fuzz run --nonsense 1` and kda-fuzz walk\n    python -m benchmarks --none  # --some"
    ) == [
        "fuzz run --nonsense 1",
        "kda-fuzz walk",
        "benchmarks --none  ",
    ]
    assert unknown("fuzz run --nonsense 1 --seed 2") == ["--nonsense"]
    assert unknown("kda-fuzz walk") == ["walk"]
    assert unknown("benchmarks --none --cases six") == ["--none"]
