"""Markdown: tables, and pages in which they stand between two marks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def with_tables(page: str, tables: dict[str, str]) -> str:
    """The page with what stands between `<!-- NAME -->` and `<!-- end -->` replaced by table NAME."""
    for name, text in tables.items():
        before, start, rest = page.partition(f"<!-- {name} -->")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"table {name}: expected <!-- {name} --> ... <!-- end --> in the page, got none; add it")
        page = f"{before}{start}\n{text}\n{end}{after}"
    return page
