"""The ladder means what it says and stays what it is."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from fuzz.cases.families import FAMILIES
from fuzz.conformance.conform import FAIL
from fuzz.conformance.ladder import LADDER_VERSION, PROPERTY_TITLES, RUNGS, Row, ladder, packed
from fuzz.judging.checks import CHECKS, applicable
from fuzz.judging.properties import PROPERTIES
from fuzz.targets.registry import BUILTIN

TESTS = Path(__file__).parent

SPECIFICATION = (TESTS.parent / "docs" / "operator.md").read_text()

ROWS = ladder("cpu", (), "cpu")

PINNED = {
    1: "52feff03c4ef3c73bbfa5aa6c7630c37b4a3652223fa82f5ceba2d86654bb7a9",
    2: "0f9b787f3a146a58aa3cc6322c34871e88bc06150276722d16e390be980b7443",
    3: "bd5ace6540e6383c4d6a13c3126b0bf2beb525489136d72d7bed3ba4fc52ffa5",
    4: "76f98002f0f8caac14c4a2092b759e437396d9e817b0c2bb6971f9ea949e3da8",
    5: "76f98002f0f8caac14c4a2092b759e437396d9e817b0c2bb6971f9ea949e3da8",  # the rows of 4: a property asks for more
    6: "59c34338b14a0092c4a896fdce1a0cff43e7facf287ee3cef7674deb52a4b215",
    7: "40667a7cdd9ae07b724eb8174ca866be1acea19dd407a4bdd37535a6eca37476",
    8: "cc94aee6cf020e72f5bd7132fcea7c961befa8143b5ead817fb16a5138c5cab1",
}
"""SHA-256 of the rows of each version of the ladder, the random ones left out."""


def digest(rows: list[Row]) -> str:
    told = [
        (row.id, row.properties, row.checks, [case.to_dict() for case in row.cases])
        for row in rows
        if row.rung != "fuzz"
    ]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def test_rows_change_with_the_version_only():
    """If this fails, increment LADDER_VERSION and pin the digest of the new ladder beside the old ones."""
    assert {LADDER_VERSION: digest(ROWS + ladder("cuda", (), "gpu"))}.items() <= PINNED.items()


def test_the_published_cards_are_of_this_ladder_and_of_every_built_in_target():
    published = json.loads((Path(__file__).parents[1] / "docs" / "data" / "conformance.json").read_text())
    assert {name.removesuffix(".fp32") for name in published} == set(BUILTIN)
    for name, card in published.items():
        assert card["ladder_version"] == LADDER_VERSION, name
        assert [row["id"] for row in card["rows"]] == [row.id for row in ROWS], name
    for name in ("flash_kda", "model"):
        assert published[name]["summary"][FAIL] == 0, name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_ids_are_unique_and_the_same_on_every_device(device):
    rows = ladder(device, (packed(3),), "cpu")
    ids = [row.id for row in rows]
    assert len(set(ids)) == len(ids) and ids == [row.id for row in ROWS]
    assert list(dict.fromkeys(row.rung for row in rows)) == list(RUNGS)
    for row in rows:
        assert row.title and row.cases
        assert all(name in CHECKS for name in (row.properties if isinstance(row.properties, tuple) else ()))
        # Otherwise the row would be unreachable for everybody, or decided by nothing.
        assert all(applicable(name, case) for case in row.cases for name in row.checks if name in CHECKS)


def test_every_family_and_every_property_has_a_row():
    ids = {row.id: row for row in ROWS}
    for kind, names in FAMILIES.items():
        for name in names:
            cases = ids[f"families/{kind}-{name}"].cases
            assert all(getattr(case, kind) == name for case in cases)
            assert kind != "states" or all(case.initial_state for case in cases)
    assert set(PROPERTY_TITLES) == set(PROPERTIES) - {"in_place", "wide_offsets", "arguments"}
    assert ids["edges/in-place"].properties == ("in_place",)
    assert ids["edges/64-bit-offsets"].properties == ("wide_offsets",)
    numbered = {int(re.match(r"(\d+)\. ", row.title)[1]) for row in ROWS if row.rung == "properties"}
    listed = re.findall(r"^(\d+)\. ", SPECIFICATION.partition("## Properties")[2].partition("## Known")[0], re.M)
    assert numbered == set(map(int, listed)) == set(range(1, 15))


def test_every_edge_of_the_specification_has_a_row():
    edges = SPECIFICATION.partition("## Edges that must hold")[2].partition("## Errors")[0]
    assert len(re.findall(r"^- ", edges, re.M)) == 8, "the edges have changed, and the ladder must follow"
    cases = [case for row in ROWS if row.rung == "edges" for case in row.cases]
    assert any(0 in case.seq_lens and case.tokens for case in cases) and any(not case.tokens for case in cases)
    lengths = {length for case in cases for length in case.seq_lens}
    assert set(range(66)) <= lengths
    (many,) = (row.cases[0] for row in ladder("cuda", (), "gpu") if row.id == "edges/many-sequences")
    assert many.n_seqs == 20_000
    assert any(case.lower_bound == 0 for case in cases) and any(case.in_place for case in cases)
    assert any(case.gates == "plus_infinity" and case.lower_bound == -5 for case in cases)
    assert {"zero_rows", "equal", "collinear", "collinear_strong"} <= {case.keys for case in cases}
    assert any(case.layout == "strided" for case in cases)
    assert any(row.properties == ("wide_offsets",) for row in ROWS)


def test_the_published_shapes_are_the_published_ones_on_a_gpu():
    shapes = {row.id: row.cases[0] for row in ladder("cuda", (), "gpu") if row.rung == "shapes"}
    assert {(case.seq_lens, case.heads) for case in shapes.values()} == {
        (lens, heads) for lens in ((8192,), (1300, 547, 2048, 963, 271, 3063), (1024,) * 8) for heads in (64, 96)
    }
    assert not any(row.note for row in ladder("cuda", (), "gpu"))
    assert all("as on a CPU" in row.note for row in ROWS if row.rung == "shapes")
