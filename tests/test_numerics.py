"""docs/numerics.md says what docs/data/numerics.json holds, and that holds what the page claims."""

from __future__ import annotations

from benchmarks.analysis.numerics import SHIPPED, tables_of
from benchmarks.analysis.pages import DOCS, load
from fuzz.cases.families import PUBLISHED
from fuzz.reporting.markdown import with_tables

RESULTS = load(DOCS, "numerics")


def test_the_tables_of_the_page_are_those_of_the_results():
    page = (DOCS / "numerics.md").read_text()
    assert with_tables(page, tables_of(RESULTS)) == page


def test_what_ships_is_below_every_peer_and_below_bf16_everywhere():
    rows = RESULTS["families"]
    for name in ("all bf16: X, X b and merges too", "fla, measured on an H200", "FlashKDA, measured on an H200"):
        for family in PUBLISHED:
            for quantity in ("out", "state"):
                for shipped, other in zip(rows[SHIPPED][family][quantity], rows[name][family][quantity], strict=True):
                    assert shipped < other, (name, family, quantity)
