"""Text: an exception or a message in one line."""

from __future__ import annotations


def first_line(message: object) -> str:
    """The first line of a message. An exception is preceded by its type."""
    line = next(iter(str(message).strip().splitlines()), "")
    return f"{type(message).__name__}: {line}".rstrip(": ") if isinstance(message, BaseException) else line
