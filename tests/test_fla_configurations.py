"""One configuration for each of fla's kernels: which one runs, and whose kernels are tuned as before."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from fuzz.targets import fla as fla_peers
from fuzz.targets.fla_configurations import fix_configurations, fixed_configurations

fla_peers.available()  # which makes Triton an interpreter where there is no GPU, before it is imported


class Kernel:
    """What an autotuner decorates: it notes what it is run with, and has no resources for the configurations named."""

    arg_names = ("x", "length")

    def __init__(self, module: str, too_large: tuple[int, ...] = ()):
        def fn(x, length, TILE): ...

        fn.__module__ = module
        self.fn = fn
        self.too_large = too_large
        self.ran: list[int] = []

    def run(self, x, length, TILE, **options):
        from triton.runtime.errors import OutOfResources

        if TILE in self.too_large:
            raise OutOfResources(300_000, 232_448, "shared memory")
        self.ran.append(TILE)
        return TILE


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch):
    """Decorates a kernel with three configurations, of which tuning would take the last."""
    import triton
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(Autotuner, "_bench", lambda self, *args, config, **meta: -config.kwargs["TILE"])
    monkeypatch.setattr(Autotuner, "run", Autotuner.run)  # restored in the end
    fix_configurations()
    fixed = Autotuner.run
    fix_configurations()
    assert Autotuner.run is fixed
    configs = [triton.Config({"TILE": tile}) for tile in (16, 32, 64)]
    return lambda kernel, **options: triton.autotune(configs=list(configs), key=["length"], **options)(kernel)


def test_the_first_configuration_runs_whatever_the_shape(tuner):
    kernel = Kernel("fla.ops.some")
    tuned = tuner(kernel)
    assert [tuned.run("x", length) for length in (1, 5, 1)] == [16] * 3
    assert kernel.ran == [16] * 3  # and nothing besides
    assert len(tuned.configs) == 3


def test_what_asks_for_too_much_is_given_up_for_good(tuner):
    kernel = Kernel("fla.ops.some", too_large=(16,))
    tuned = tuner(kernel)
    assert tuned.run("x", 1) == 32
    kernel.too_large = ()
    assert tuned.run("x", 2) == 32
    assert kernel.ran == [32, 32]


def test_where_none_can_run_the_last_says_why_each_time(tuner):
    from triton.runtime.errors import OutOfResources

    tuned = tuner(Kernel("fla.ops.some", too_large=(16, 32, 64)))
    for _ in range(2):
        with pytest.raises(OutOfResources, match="shared memory"):
            tuned.run("x", 1)


def test_what_fla_itself_rules_out_for_a_call_is_not_run(tuner):
    tuned = tuner(
        Kernel("fla.ops.some"), prune_configs_by={"early_config_prune": lambda configs, named, **_: configs[1:]}
    )
    assert tuned.run("x", 1) == 32


def test_an_error_of_the_kernel_is_not_hidden(tuner):
    kernel = Kernel("fla.ops.some")
    kernel.run = lambda *args, **kwargs: 1 / 0
    tuned = tuner(kernel)
    with pytest.raises(ZeroDivisionError):
        tuned.run("x", 1)
    assert len(tuned.configs) == 3


def test_other_targets_that_call_fla_have_its_kernels_tuned(tuner, monkeypatch):
    from triton.runtime.autotuner import Autotuner

    monkeypatch.setattr(Autotuner, "run", Autotuner.run.fixes)
    tuned = tuner(Kernel("fla.ops.some"))
    with fixed_configurations():
        assert tuned.run("x", 1) == 16
    assert tuned.run("x", 2) == 64


def test_the_kernels_of_others_are_tuned(tuner):
    kernel = Kernel("somebody.kernels")
    assert tuner(kernel).run("x", 1) == 64
