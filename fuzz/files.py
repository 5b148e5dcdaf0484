"""Files: written in one step, and JSON with few lines."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a text file under another name first, so that no reader and no kill sees a part of it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".new-{path.name}")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def lines_of(value: object, depth: int, *, allow_nan: bool = False, longest: float = math.inf) -> str:
    """JSON with one line for each entry down to this depth, so that large files stay short and differences readable.

    An entry of more than `longest` characters takes a line for each of its own entries.
    """
    return _lines(value, depth, "", allow_nan, longest) + "\n"


def _lines(value: object, depth: int, indent: str, allow_nan: bool, longest: float) -> str:
    line = json.dumps(value, allow_nan=allow_nan)
    if not value or not isinstance(value, (dict, list)) or (depth <= 0 and len(line) <= longest):
        return line
    deeper = indent + " "
    if isinstance(value, dict):
        entries = [
            f"{json.dumps(str(key))}: {_lines(entry, depth - 1, deeper, allow_nan, longest)}"
            for key, entry in value.items()
        ]
        opening, closing = "{", "}"
    else:
        entries = [_lines(entry, depth - 1, deeper, allow_nan, longest) for entry in value]
        opening, closing = "[", "]"
    inside = f",\n{deeper}".join(entries)
    return f"{opening}\n{deeper}{inside}\n{indent}{closing}"
