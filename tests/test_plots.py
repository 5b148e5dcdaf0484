"""Plots of whatever a campaign may have left: nothing yet, nothing finite, everything wrong."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.cases.families import FAMILIES
from fuzz.reporting import plots, summary

PALETTE = plots.colours(["one", "other"])
LAST_FAMILIES = {field: list(families)[-1] for field, families in FAMILIES.items()}
ERRORS = st.sampled_from([0.0, 5e-324, 1e-9, 1e-3, 1.0, 1e30, 1e300, 1.7e308, float("inf"), float("nan")])


def sample(tokens: int = 16, errors: dict | None = None, bounds: dict | None = None, passed: bool = False):
    return plots.Sample("one", tokens, LAST_FAMILIES, passed, errors or {}, bounds or {})


def draw(samples: list[plots.Sample], palette: dict[str, str] = PALETTE) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy's and matplotlib's, about values that have no place on an axis
        return [
            plots.errors_by_target(samples, "out", "By target", palette),
            plots.errors_by_family(samples, "keys", "out", "By family", palette),
            plots.errors_by_length(samples, "out", "By length", palette),
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


@pytest.mark.parametrize("targets", [1, 2, 8, 14])
@pytest.mark.parametrize("length", [3, 24, 60, 150])
def test_names_of_any_length_leave_room_for_the_plot(targets, length):
    """A file and promises make long names: with a line each they took the whole height of a plot of one family."""
    names = [f"{number}{'x' * length}" for number in range(targets)]
    draw([replace(sample(errors={"out": 1e-3}), target=name) for name in names], plots.colours(names))


def test_a_median_is_that_of_what_is_finite_where_most_is():
    """A length at which most errors are infinite has no median; the others keep theirs."""
    found = [sample(16, {"out": error}) for error in (1e-3, float("inf"), float("inf"))]
    found += [sample(64, {"out": error}) for error in (1e-3, 1e-2, float("inf"))]
    assert plots.medians(found, lambda one: one.errors["out"]) == ([pytest.approx(64.0)], [pytest.approx(1e-2)])


@pytest.fixture
def every_point_is_inside(monkeypatch):
    """Looks at each drawing before it becomes SVG: all that was drawn lies within the limits of the axes."""
    drawn = []
    svg = plots.Drawing.svg

    def look(drawing: plots.Drawing) -> str:
        drawing.figure.draw_without_rendering()
        for axes in drawing.figure.axes:
            points = [line.get_xydata() for line in axes.lines]
            points += [collection.get_offsets() for collection in axes.collections if len(collection.get_offsets()) > 1]
            shown = [axes.transData.transform(np.asarray(found, dtype=float).reshape(-1, 2)) for found in points]
            shown += [patch.get_transform().transform_path(patch.get_path()).vertices for patch in axes.patches]
            for found in shown:
                place = axes.transAxes.inverted().transform(found)  # from 0 to 1 along both axes
                assert np.all((place > -1e-6) & (place < 1 + 1e-6)), (drawing.title, axes.get_xlim(), place)
                drawn.append(len(place))
        return svg(drawing)

    monkeypatch.setattr(plots.Drawing, "svg", look)
    return drawn


@pytest.mark.parametrize("spread", [1.0, 1e3, 1e9])
def test_every_point_is_inside_its_axes(spread, every_point_is_inside):
    """Errors far from the bounds and from each other, as a right target and a wrong one give them."""
    samples = [
        sample(tokens, {"out": 2e-4 * spread ** (index / 9)}, {"out": 0.02}, passed=index < 5)
        for index, tokens in enumerate((1, 2, 3, 17, 64, 65, 500, 2100, 70000, 5))
    ]
    draw(samples)
    draw(samples[:1])
    edges = np.linspace(0.0, 60.0, 61)
    plots.cases_per_second(edges, np.arange(60.0), 3 * np.arange(60.0))
    plots.time_by_phase(edges, {phase: np.arange(60.0) for phase in plots.PHASE_COLOURS})
    assert len(every_point_is_inside) > 30


def test_an_error_map_of_one_token_counts_in_whole_tokens(monkeypatch):
    ticks = []
    svg = plots.Drawing.svg

    def look(drawing: plots.Drawing) -> str:
        low, high = sorted(drawing.axes.get_ylim())
        ticks.extend(float(tick) for tick in drawing.axes.get_yticks() if low <= tick <= high)
        return svg(drawing)

    monkeypatch.setattr(plots.Drawing, "svg", look)
    plots.error_map(np.full((1, 128), 0.5), "one token", "salt")
    assert ticks == [0.0]


def test_no_more_workers_are_busy_than_there_are():
    """One worker: two results of 10 s each, after 10 s and 20 s, the second with a long oracle."""
    seconds = {phase: np.zeros(20) for phase in summary.PHASE_TITLES}
    found = summary.Summary({}, edges=np.linspace(0.0, 20.0, 21), seconds_over_time=seconds)
    summary.spread(found, {"generate": 1.0, "oracle": 1.5, "target": 7.5, "judge": None, "tune": None}, 10.0)
    summary.spread(found, {"generate": None, "oracle": 9.0, "target": 0.5, "judge": 0.5, "tune": None}, 20.0)
    assert sum(seconds.values()) == pytest.approx(np.ones(20))
    assert seconds["oracle"].sum() == pytest.approx(10.5) and seconds["generate"][0] == pytest.approx(1.0)
    summary.spread(found, {"target": 50.0}, 5.0)  # begun before the campaign was resumed
    assert sum(seconds.values()).sum() == pytest.approx(70.0)
