"""Text: an exception or a message in one line."""

from __future__ import annotations

import textwrap


def first_line(message: object) -> str:
    """The first line of a message, printable. An exception is preceded by its type."""
    line = printable(next(iter(text_of(message).strip().splitlines()), ""))
    return f"{type(message).__name__}: {line}".rstrip(": ") if isinstance(message, BaseException) else line


def text_of(message: object) -> str:
    """Its text. An exception of somebody else may not even have one."""
    try:
        return str(message)
    except Exception as error:
        return f"no text, because str() raised {type(error).__name__}"


def printable(line: str) -> str:
    """A line without what no file or terminal takes as text: control characters and halves of characters."""
    return "".join(x if x.isprintable() else x.encode("unicode_escape").decode() for x in line)


def shortened(line: str, most: int) -> str:
    """At most so many characters of a line, cut between two words where that leaves most of it."""
    short = textwrap.shorten(line, most, placeholder=" ...")
    return short if len(short) > most // 2 or len(line) <= most else f"{line[: most - 4]} ..."
