"""Settings that every test needs before it imports anything of the project."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import gpus

gpus.take_turn()  # before anything can start CUDA

import matplotlib  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

GPU_IS_HERE = torch.cuda.is_available()

# Triton decides when it is imported whether it compiles or interprets; importing PyTorch does not import it yet. Where
# there is a GPU it compiles: the first to import it must not be a test from which the GPU is hidden.
if not GPU_IS_HERE:
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401
        from torch.utils._triton import has_triton

        has_triton()  # PyTorch keeps the answer, and which GPUs it compiles for

# A shell starts what is to run in the background (`pytest &`, nohup) with Ctrl-C ignored, all that tests start inherit
# that, and some of it is to be interrupted.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests change their folder, and start processes there.
if library := os.environ.get("FLASH_KDA_LIBRARY"):
    os.environ["FLASH_KDA_LIBRARY"] = os.path.abspath(library)

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
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each worker starts a pool of its own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if GPU_IS_HERE:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and PyTorch sees none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """What is not marked `gpu` runs everywhere as it does on a machine without one, its fixtures too."""
    if not GPU_IS_HERE:
        return (yield)
    if gpus.context_is_lost():
        os._exit(1)  # pytest-xdist starts another worker; the test that was next is reported as one that ended it
    if item.get_closest_marker("gpu"):
        return (yield)
    with gpus.hidden():
        return (yield)


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return gpus.most_workers((yield))


@pytest.fixture(autouse=True)
def gpu_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests marked `gpu` leave no memory behind that another worker could use; `gpu(gib=N)` waits for N GiB."""
    marker = request.node.get_closest_marker("gpu")
    if marker is None or not GPU_IS_HERE:
        yield
        return
    gib = marker.kwargs.get("gib", 0)
    if gib:
        with gpus.memory(gib, lambda: torch.cuda.mem_get_info()[0]) as enough:
            if not enough:
                pytest.skip(f"needs {gib} GiB of free GPU memory")
            yield
            torch.cuda.empty_cache()
    else:
        yield
        torch.cuda.empty_cache()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of many small tensors, which more threads only slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
