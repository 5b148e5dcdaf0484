"""Plots of whatever a campaign may have left: nothing yet, nothing finite, everything wrong."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.cases.families import FAMILIES
from fuzz.reporting import plots

PALETTE = plots.colours(["one", "other"])
LAST_FAMILIES = {field: list(families)[-1] for field, families in FAMILIES.items()}
ERRORS = st.sampled_from([0.0, 5e-324, 1e-9, 1e-3, 1.0, 1e30, 1e300, 1.7e308, float("inf"), float("nan")])


def sample(tokens: int = 16, errors: dict | None = None, bounds: dict | None = None, passed: bool = False):
    return plots.Sample("one", tokens, LAST_FAMILIES, passed, errors or {}, bounds or {})


def draw(samples: list[plots.Sample]) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's and matplotlib's, about values that have no place on an axis
        return [
            plots.errors_by_target(samples, "out", "By target", PALETTE),
            plots.errors_by_family(samples, "keys", "out", "By family", PALETTE),
            plots.errors_by_length(samples, "out", "By length", PALETTE),
        ]


@pytest.mark.parametrize(
    "samples",
    [
        [],
        [sample()],
        [sample(tokens=0, errors={"out": 1e-3})],
        [sample(errors={"out": float("nan")}, bounds={"out": float("inf")})],
        [sample(errors={"out": 1.7e308}, bounds={"out": 5e-324})],
        [sample(errors={"out": 1.7e308}, bounds={"out": 1.7e308})] * 2,
        [sample(errors={"out": 0.0}, bounds={"out": 0.0})],
    ],
    ids=["nothing", "no error", "no token", "nothing finite", "huge", "huge twice", "zero"],
)
def test_errors_without_a_place_on_an_axis_do_not_stop_a_report(samples):
    assert all(drawing.startswith("<svg") for drawing in draw(samples))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.builds(sample, st.integers(0, 70000), *[st.dictionaries(st.just("out"), ERRORS)] * 2, st.booleans()))
)
def test_any_errors_are_drawn(samples):
    assert all(drawing.startswith("<svg") for drawing in draw(samples))


def test_a_median_is_that_of_what_is_finite_where_most_is():
    """A length at which most errors are infinite has no median; the others keep theirs."""
    found = [sample(16, {"out": error}) for error in (1e-3, float("inf"), float("inf"))]
    found += [sample(64, {"out": error}) for error in (1e-3, 1e-2, float("inf"))]
    assert plots.medians(found, lambda one: one.errors["out"]) == ([pytest.approx(64.0)], [pytest.approx(1e-2)])
