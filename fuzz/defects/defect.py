"""A planted defect: what it is, which check should find it, and how it gets into the operator.

The operator is `flash_kda.fwd` on CPU tensors, so the argument checks and the chunk algorithm of `flash_kda.model`. A
defect changes its arguments, its results, or one stage of the model while the call lasts; nothing is copied.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch

import flash_kda
from flash_kda import arguments, model
from fuzz.cases.inputs import sequence_ranges

KINDS = ("numerics", "indexing", "semantics", "serving", "time", "device")

Make = Callable[[], Callable[..., None]]

SIGNATURE = inspect.signature(flash_kda.fwd)


@dataclass(frozen=True)
class Defect:
    """One thing that is wrong.

    sentence: what it does, for a person. expected: the checks (of `fuzz.judging.judge` and `fuzz.judging.properties`)
    of which at least one has to find it. make: a fresh `fwd` with the defect; what it remembers between calls, a
    second one does not know. failure: the row of "Known failures" in docs/operator.md that it stands for, by its
    first words.
    """

    name: str
    sentence: str
    expected: tuple[str, ...]
    make: Make
    failure: str | None = None
    kind: str = ""


class Defects(dict[str, Defect]):
    """Planted defects of one kind, by name. Names of expected checks have spaces between them."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def add(self, name: str, expected: str, make: Make, sentence: str, failure: str | None = None) -> None:
        self[name] = Defect(name, sentence, tuple(expected.split()), make, failure, self.kind)

    def plant(self, expected: str, how: Callable[[Callable], Make], failure: str | None = None) -> Callable:
        """A decorator: `how` makes a defect of a function. Its name and the first line of its docstring are those of
        the defect."""

        def planted(function: Callable) -> Callable:
            sentence = " ".join(inspect.getdoc(function).partition("\n\n")[0].split())
            self.add(function.__name__, expected, how(function), sentence, failure)
            return function

        return planted


class Given(SimpleNamespace):
    """The arguments of one call of `flash_kda.fwd`, by name."""

    @staticmethod
    def of(*args, **kwargs) -> Given:
        bound = SIGNATURE.bind(*args, **kwargs)
        bound.apply_defaults()
        return Given(**bound.arguments)

    def has(self, *names: str) -> bool:
        return all(getattr(self, name) is not None for name in names)

    def sequences(self) -> list[tuple[int, int]]:
        """First row and last row + 1 of each, in the flattened token axis."""
        return sequence_ranges(self.q, self.cu_seqlens)

    def rows(self) -> torch.Tensor:
        """`out` with one axis of tokens, `[B * T, H, V]`."""
        return self.out.flatten(0, 1)


def wrapped(before: Callable[[Given], None] | None = None, after: Callable[[Given], None] | None = None) -> Make:
    """The operator with its arguments changed before the call, or what it was given looked at and written to after.

    Arguments are checked before they are changed, so that a bad one is refused as ever.
    """

    def make():
        def fwd(*args, **kwargs):
            given = Given.of(*args, **kwargs)
            arguments.check_arguments(**vars(given))
            asked = Given(**vars(given))
            if before is not None:
                before(asked)
            flash_kda.fwd(**vars(asked))
            if after is not None:
                after(given)

        return fwd

    return make


def before(*needed: str) -> Callable[[Callable[[Given], None]], Make]:
    """Arguments are changed before the call, if none of `needed` is None."""
    return lambda change: wrapped(before=lambda given: change(given) if given.has(*needed) else None)


def after(*needed: str) -> Callable[[Callable[[Given], None]], Make]:
    """Results are changed after the call, if none of `needed` is None."""
    return lambda change: wrapped(after=lambda given: change(given) if given.has(*needed) else None)


def changed(**functions: Callable) -> Make:
    """The arguments of these names replaced by a function of them; what is None stays None."""

    def change(given):
        for name, function in functions.items():
            if given.has(name):
                setattr(given, name, function(getattr(given, name)))

    return wrapped(before=change)


def argument(*names: str) -> Callable[[Callable], Make]:
    """The function is of each of these arguments, and gives another in its place."""
    return lambda function: changed(**dict.fromkeys(names, function))


def remembering(new: Callable[[], tuple[Callable | None, Callable | None]]) -> Make:
    """As `wrapped`, with (before, after) made anew for each target, so that they may remember earlier calls."""
    return lambda: wrapped(*new())()


def itself(make: Make) -> Make:
    """The function makes the operator with the defect."""
    return make


def staged(stages: dict[str, Callable]) -> Make:
    """The operator with stages of the model, such as `Decays.of`, replaced.

    Each replacement is given the function that it replaces, and then its arguments.
    """

    def make():
        def fwd(*args, **kwargs):
            with ExitStack() as stack:
                for name, function in stages.items():
                    stack.enter_context(replaced(model, name, function))
                flash_kda.fwd(*args, **kwargs)

        return fwd

    return make


def stage(name: str) -> Callable[[Callable], Make]:
    """The function replaces a stage of the model."""
    return lambda function: staged({name: function})


def constant(owner=model, **values) -> Make:
    """The operator with constants of the model, or of another module, set to other values."""

    def make():
        def fwd(*args, **kwargs):
            kept = {name: getattr(owner, name) for name in values}
            try:
                for name, value in values.items():
                    setattr(owner, name, value)
                flash_kda.fwd(*args, **kwargs)
            finally:
                for name, value in kept.items():
                    setattr(owner, name, value)

        return fwd

    return make


def formats(**operands: Callable) -> Make:
    """The operator with operands of the model rounded in another way."""
    return constant(FORMATS=replace(model.FORMATS, **operands))


def unchecked(name: str) -> Make:
    """The operator with one of its argument checks left out."""
    return constant(arguments, **{name: lambda *args, **kwargs: None})


@contextmanager
def replaced(owner, name: str, function: Callable) -> Iterator[None]:
    """`owner.name` is `function`, called with the original in front of its arguments."""
    parent, _, attribute = name.rpartition(".")
    owner = getattr(owner, parent) if parent else owner
    kept = inspect.getattr_static(owner, attribute)
    original = getattr(owner, attribute)

    def replacement(*args, **kwargs):
        return function(original, *args, **kwargs)

    setattr(owner, attribute, staticmethod(replacement) if isinstance(kept, staticmethod) else replacement)
    try:
        yield
    finally:
        setattr(owner, attribute, kept)
