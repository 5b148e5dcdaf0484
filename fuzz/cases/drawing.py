"""Drawing: the cases of a campaign, in batches, each with a seed of its own, so that any process can draw any batch."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import hypothesis
from hypothesis import HealthCheck, Phase, given
from hypothesis.strategies import SearchStrategy

from fuzz.cases.case import Case
from fuzz.cases.strategies import PROFILES, cases
from fuzz.processes import die_with_parent

BATCH = 100  # cases that Hypothesis draws at a time
SIMPLE = 16  # cases at the beginning of a batch that others may begin with too; all later ones have seeds of their own


def examples(strategy: SearchStrategy[Case], seed: int, count: int) -> list[Case]:
    """`count` cases of a strategy, or a few less where Hypothesis finds no more. None is shrunk or remembered."""
    drawn: list[Case] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        phases=(Phase.generate,),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Case) -> None:
        drawn.append(case)

    collect()
    return drawn


def draw_cases(profile: str, seed: int, count: int) -> list[Case]:
    """`count` cases of a profile, or a few less. The same seed draws the same cases."""
    return examples(cases(PROFILES[profile]), seed, count)


def draw_batch(profile: str, seed: int, batch: int) -> list[Case]:
    """The cases of one batch of the campaign with that seed, none twice."""
    return list(dict.fromkeys(draw_cases(profile, (seed << 32) + batch, BATCH)))


def all_cases(profile: str, seed: int) -> Iterator[Case]:
    """Cases without end, none twice."""
    seen = set()
    batch = 0
    while True:
        for case in draw_batch(profile, seed, batch):
            if case not in seen:
                seen.add(case)
                yield case
        batch += 1


def prepare_process(parent: int) -> None:
    """For a process that only draws: it ends with its parent, which alone answers to Ctrl-C."""
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
