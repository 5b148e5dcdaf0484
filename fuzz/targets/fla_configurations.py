"""One configuration for each of fla's Triton kernels, in the place of Triton's tuning.

Triton times every configuration of a kernel anew for each head count and form of a call. A campaign would spend its
minutes on that. The configuration also decides the order of additions. So a packed call and the same call as a batch
would differ in their last bits, and so would a finding on another day.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps


@contextmanager
def fixed_configurations() -> Iterator[None]:
    """`fix_configurations` until the block ends, so that other targets which call fla's kernels have them tuned."""
    from triton.runtime.autotuner import Autotuner

    before = Autotuner.run
    fix_configurations()
    try:
        yield
    finally:
        Autotuner.run = before


def with_fixed_configurations(function: Callable) -> Callable:
    """The function, in whose calls fla's kernels have the first of their configurations that can."""

    @wraps(function)
    def fixed(*args, **kwargs):
        with fixed_configurations():
            return function(*args, **kwargs)

    return fixed


def fix_configurations() -> None:
    """From now on fla's kernels run in this process with the first of their configurations that can.

    One that asks for more than the GPU has, or does not compile, is given up for good. Other kernels are still tuned.
    A second time changes nothing.
    """
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.errors import OutOfResources, PTXASError

    tuned = Autotuner.run
    if hasattr(tuned, "fixes"):
        return

    def run(self, *args, **kwargs):
        if not self.base_fn.__module__.startswith("fla."):
            return tuned(self, *args, **kwargs)
        configs = self.configs
        self.nargs = dict(zip(self.arg_names, args))  # noqa: B905 - as Triton does; what pruning looks at
        config = self.prune_configs(kwargs)[0]
        self.configs = [config]  # of which Triton has nothing to choose
        try:
            return tuned(self, *args, **kwargs)
        except (CompileTimeAssertionFailure, OutOfResources, PTXASError):  # what tuning passes over
            others = [each for each in configs if each is not config]
            if not others:
                raise
            configs = others
        finally:
            self.configs = configs
        return run(self, *args, **kwargs)

    run.fixes = tuned
    Autotuner.run = run
