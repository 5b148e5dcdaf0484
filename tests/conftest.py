"""Settings that every test needs before it imports anything of the project."""

from __future__ import annotations

import os

import matplotlib
import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton decides when it is imported whether it compiles or interprets; importing PyTorch does not import it yet.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

matplotlib.use("Agg")

# `ci` draws the same examples every time, so that a red run is red again; `default` looks further with every run.
# No deadline in either: the first call of an example pays for imports and for Triton's interpreter.
settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True, database=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


def pytest_configure() -> None:
    # One thread a worker: with more, the workers of `pytest -n auto` would fight for the same cores.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that a test starts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and PyTorch sees none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
