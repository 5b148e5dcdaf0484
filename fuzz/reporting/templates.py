"""Templates of the HTML pages, and nested settings as rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jinja2


def html_environment(*folders: Path) -> jinja2.Environment:
    """Templates from these folders; what they are given is escaped, and a name that is not given is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )


def flat(values: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as pairs of a dotted name and its value."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{key}", "not there" if value is None else str(value)
