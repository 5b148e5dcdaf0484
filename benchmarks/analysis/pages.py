"""Pages of numbers: where a measurement is written, and the page of the documentation with its tables."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fuzz.files import lines_of, write_whole
from fuzz.reporting.markdown import with_tables

DOCS = Path(__file__).parents[2] / "docs"


def parser(module: str, doc: str) -> argparse.ArgumentParser:
    """Of a command whose results go to a folder: data/NAME.json, and the page NAME.md."""
    usage = {"description": doc, "formatter_class": argparse.RawDescriptionHelpFormatter}
    made = argparse.ArgumentParser(f"python -m {module}", **usage)
    folder = "folder for the results and the page (default runs/analysis); docs publishes them"
    made.add_argument("--out", type=Path, metavar="DIR", default=Path("runs/analysis"), help=folder)
    return made


def load(out: Path, name: str) -> dict:
    """The results that are in the folder already; empty where there are none."""
    path = out / "data" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save(out: Path, name: str, results: dict, depth: int) -> None:
    """depth: down to which each entry has a line of its own."""
    write_whole(out / "data" / f"{name}.json", lines_of(results, depth))


def write_page(out: Path, name: str, tables: dict[str, str]) -> None:
    """Prints the tables, and writes the page of the documentation with them to the folder."""
    for title, text in tables.items():
        print(f"{title}\n\n{text}\n")
    write_whole(out / f"{name}.md", with_tables((DOCS / f"{name}.md").read_text(), tables))
