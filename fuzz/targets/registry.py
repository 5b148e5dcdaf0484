"""Targets: functions with the signature of `flash_kda.fwd`, and what they promise."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from fuzz.cases.case import Case
from fuzz.cases.plain import PLAIN
from fuzz.targets import loading
from fuzz.targets.adapter import writing
from fuzz.targets.fla_configurations import with_fixed_configurations
from fuzz.targets.promises import BITS, PromiseError, Promises, answer
from fuzz.text import first_line

REQUIRED = ("q", "k", "v", "g", "beta", "scale", "out", "A_log", "dt_bias", "lower_bound")
OPTIONAL = ("initial_state", "final_state", "cu_seqlens")
MODEL_ROWS = 2048  # tokens, each sequence padded to whole chunks, times heads; 0.1 s on one core


class TargetError(ValueError):
    """A target cannot be had; the message is one line that says which and why."""


def anywhere(case: Case) -> str | None:
    """The reach of a target that takes every case."""
    return None


EVERYTHING = Promises()


@dataclass(frozen=True)
class Target:
    """An implementation of `flash_kda.fwd`, and what it promises. Raises TargetError, naming the field.

    fwd: function that is called as `flash_kda.fwd` is, with `out` and `final_state` poisoned by NaN.
    device: "cpu", "cuda" or "cuda:N": the device of its inputs.
    reach: function of a case: None if the case is supported, else the reason why it is skipped. A skipped case is
        shown and counted, and never passed. `promises.reach` is another way to give it.
    note: one line for `python -m fuzz targets`.
    slow: whether properties are checked on a share of the cases only, one at a time.
    exempt: checks that the target is not held to, each with the reason. "arguments" and the properties in `BITS` are
        promises that are not made, and are still measured.
    warm_up: seconds that each of the first calls in a process may take besides the time limit, to compile.
    promises: `Promises`, or a mapping from their names.
    file: file that the target comes from. Every run shows it.
    """

    name: str
    fwd: Callable[..., None]
    device: str
    reach: Callable[[Case], str | None] = anywhere
    note: str = ""
    slow: bool = False
    exempt: Mapping[str, str] = field(default_factory=dict)
    warm_up: float = 0.0
    promises: Promises = EVERYTHING
    file: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", str(self.device)):
            raise TargetError(f"target {self.name!r}: device: expected cpu, cuda or cuda:N, got {self.device!r}")
        try:
            promises = Promises.of(self.promises)
        except PromiseError as error:
            raise TargetError(f"target {self.name!r}: {error}") from error
        exempt = dict(self.exempt)
        if exempt:
            check_exemptions(self.name, exempt)
            given_up = {name: False for name in exempt if name in (*BITS, "arguments")}
            given_up |= {"chunk": None} if "chunk_continuation" in exempt else {}
            promises = replace(promises, **given_up)
            exempt = {name: why for name, why in exempt.items() if promises.keeps(name)}
        if not promises.arguments:
            exempt.setdefault("arguments", "the target does not promise to refuse bad arguments")
        if not callable(self.reach):
            raise TargetError(f"target {self.name!r}: reach: expected a function of a Case, got {self.reach!r}")
        if isinstance(self.reach, Checked):  # of a target that this one replaces
            asked = self.reach.asked
        else:
            asked = tuple(each for each in (promises.reach, self.reach) if each not in (None, anywhere))
        for name, value in (("promises", promises), ("exempt", exempt), ("reach", Checked(self.name, asked))):
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Checked:
    """A reach whose answers are checked: the first reason that one of those asked gives."""

    name: str
    asked: tuple[Callable[[Case], str | None], ...]

    def __call__(self, case: Case) -> str | None:
        for reach in self.asked:
            try:
                reason = answer(reach, case)
            except PromiseError as error:
                raise TargetError(f"target {self.name!r}: {error}") from error
            except Exception as error:
                raise TargetError(f"target {self.name!r}: reach raised {first_line(error)}") from error
            if reason is not None:
                return reason
        return None


def check_exemptions(name: str, exempt: Mapping[str, str]) -> None:
    """Raises TargetError unless every name is that of a check and every reason is text."""
    from fuzz.judging.checks import CHECKS

    for check, reason in exempt.items():
        if check not in CHECKS:
            near = ", ".join(each for each in CHECKS if not each.startswith("arguments."))
            raise TargetError(f"target {name!r}: exempt: expected one of {near} or arguments.NAME, got {check!r}")
        if not (isinstance(reason, str) and reason.strip()):
            raise TargetError(f"target {name!r}: exempt: {check}: expected a reason (text), got {reason!r}")


def load_target(spec: str) -> Target:
    """The target of that name.

    A name is that of a built-in target, `package.module:function` or "path/to/file.py:function". The function may also
    be a `Target`. A function's attribute `promises` has its promises: `Promises` or a mapping. Words after the name
    replace some of them, as in "package.module:function,operands=fp32,heads=no".

    Raises TargetError when there is no such target, or when it cannot run on this machine. It is raised as well for
    another signature, and for promises without meaning.
    """
    given, *words = spec.split(",")
    built_in = given.removesuffix(".fp32")  # which the name of a target has where it runs in fp32
    if built_in in PEERS:
        return PEERS[built_in]()
    if built_in in BUILTIN:
        if words:
            raise TargetError(f"target {spec!r}: expected no promises, got {', '.join(words)}: {given} is built in")
        return BUILTIN[built_in]()
    place, colon, attribute = given.rpartition(":")
    if not (colon and place and attribute):
        ways = f"{', '.join((*BUILTIN, *PEERS))}, package.module:function or path/to/file.py:function"
        raise TargetError(f"target {spec!r}: expected {ways}")
    try:
        module = loading.load(place)
    except loading.LoadError as error:
        raise TargetError(f"target {spec!r}: {error}") from error
    found = getattr(module, attribute, None)
    if isinstance(found, Target):
        file = loading.origin(found.fwd, module)
        return replace(found, name=spec, file=file, promises=promised(spec, found.promises, words))
    if not callable(found):
        got = "none" if found is None else f"a {type(found).__name__}"
        raise TargetError(f"target {spec!r}: expected a function {attribute} in {place}, got {got}")
    problem = signature_problem(found)
    if problem:
        raise TargetError(f"target {spec!r}: expected the signature of flash_kda.fwd, got another one: {problem}")
    device = default_device()
    target = Target(
        name=spec,
        fwd=found,
        device=device,
        file=loading.origin(found, module),
        note=first_line(inspect.getdoc(found) or ""),
        warm_up=WARM_UP if device == "cuda" else 0.0,
        promises=promised(spec, getattr(found, "promises", EVERYTHING), words),
    )
    for case in (PLAIN, replace(PLAIN, packed=True, initial_state=None, layout="strided")):
        target.reach(case)  # now rather than on the first case that comes
    return target


def promised(spec: str, given: object, words: list[str]) -> Promises:
    """What a target declares, with the words of the command line in the place of some of it."""
    named = [word.partition("=")[::2] for word in words]
    try:
        return Promises.of(given).with_words(dict(named))
    except PromiseError as error:
        raise TargetError(f"target {spec!r}: {error}") from error


def signature_problem(function: Callable) -> str | None:
    """What keeps `function` from being called as `flash_kda.fwd` is, by position or by name; None when nothing does."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None  # compiled functions tell nothing about themselves
    optional = {name: name for name in OPTIONAL}
    try:
        by_position = signature.bind(*REQUIRED, **optional).arguments
        signature.bind(**{name: name for name in REQUIRED}, **optional)
    except TypeError as error:
        return f"cannot be called as fwd is: {error}"
    for name, value in by_position.items():
        if value in REQUIRED and value != name:
            return f"argument {REQUIRED.index(value) + 1} is named {name!r}, not {value!r}"
    return None


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _import_operator(name: str):
    try:
        module = importlib.import_module("flash_kda.model" if name == "model" else "flash_kda")
    except Exception as error:
        raise TargetError(f"target {name!r}: cannot import flash_kda: {first_line(error)}") from error
    ours = Path(__file__).resolve().parents[2] / "flash_kda"  # beside this package, wherever it is installed
    if not loading.file_of(module).is_relative_to(ours):
        raise TargetError(f"target {name!r}: expected flash_kda in {ours}, got that in {module.__file__}")
    return module


def _flash_kda() -> Target:
    module = _import_operator("flash_kda")
    fwd, file = module.fwd, str(loading.file_of(module))
    device = default_device()
    if device == "cuda":
        from flash_kda import library

        try:
            library.check_capability(0)
            library.load()
            file = f"{library.path()}, {file}"
        except RuntimeError as error:
            raise TargetError(f"target 'flash_kda': {first_line(str(error))}") from error
    runs = "the CUDA kernel" if device == "cuda" else "the model, on CPU tensors"
    note = f"flash_kda.fwd, the public door; runs {runs}"
    return Target("flash_kda", fwd, device, note=note, warm_up=WARM_UP if device == "cuda" else 0.0, file=file)


def _model() -> Target:
    model = _import_operator("model")
    from flash_kda.arguments import check_arguments

    fwd = writing(model.forward, check_arguments)
    note = "flash_kda.model.forward, the kernel's chunk algorithm in PyTorch, behind the same checks of arguments"
    beside_gpu = default_device() == "cuda"
    reach, warm_up = (partial(_model_reach, model.CHUNK), WARM_UP) if beside_gpu else (anywhere, 0.0)
    file = str(loading.file_of(model))
    return Target("model", fwd, "cpu", reach=reach, note=note, slow=beside_gpu, warm_up=warm_up, file=file)


def _model_reach(chunk: int, case: Case) -> str | None:
    """Beside targets on a GPU the model would be all that a campaign waits for."""
    chunks = sum(-(-length // chunk) for length in case.seq_lens)
    if chunk * chunks * case.heads > MODEL_ROWS:
        return "too large for the model, which runs on the CPU, beside targets on a GPU"
    return None


def _fla(kernel: str) -> Target:
    try:
        from fuzz.targets import fla as fla_peers
    except Exception as error:
        raise TargetError(f"target fla.{kernel}: cannot import fuzz.targets.fla: {first_line(error)}") from error
    reason = fla_peers.available()
    if reason is not None:
        raise TargetError(f"target fla.{kernel}: {reason}")
    device = default_device()
    interpreted = device == "cpu" and kernel != "naive"
    fwd = getattr(fla_peers, kernel)
    return Target(
        # The interpreter cannot multiply bf16 matrices, so there the chunk kernel gets its operands in fp32.
        name="fla.chunk.fp32" if interpreted and kernel == "chunk" else f"fla.{kernel}",
        fwd=with_fixed_configurations(fwd) if device == "cuda" else fwd,
        device=device,
        reach=getattr(fla_peers, f"{kernel}_reach"),
        note=FLA_NOTES[kernel] + ", through Triton's interpreter" * interpreted,
        slow=interpreted or (device == "cuda" and kernel == "naive"),
        exempt=FLA_EXEMPT.get(kernel, {}),
        warm_up=FLA_WARM_UP if device == "cuda" else WARM_UP,
        promises=fla_promises(kernel, interpreted),
        file=importlib.util.find_spec("fla").origin or "",
    )


def fla_promises(kernel: str, interpreted: bool) -> Promises:
    """What fla says of its functions. They have arguments and errors of their own, and the adapter adds none."""
    if kernel == "chunk":
        # Interpreted, NumPy adds in another order for other columns: measured, 622 of 16384 elements of the state
        # differ in their last bit.
        format = "fp32" if interpreted else "bf16"
        return Promises(operands=format, inverse=format, value_columns=not interpreted, arguments=False)
    # Neither has chunks. PyTorch may add in another order in a tensor of another length: measured for `naive`, 120 of
    # 32768 elements of the state differ in their last bit after a cut at 64.
    return Promises(operands="fp32", chunk=None, arguments=False)


def _peer(name: str) -> Target:
    from fuzz.targets import peers

    reason = peers.available(name)
    if reason is not None:
        raise TargetError(f"target {name}: {reason}")
    return Target(
        name,
        peers.FUNCTIONS[name],
        "cuda",
        reach=peers.REACH[name],
        note=peers.origin(name),
        file=peers.origin(name),
        warm_up=FLA_WARM_UP,
        promises=peers.PROMISES[name],
    )


WARM_UP = 60.0  # seconds: a function on a GPU may be compiled when it is called, and fla is imported then
FLA_WARM_UP = 300.0  # on a GPU it compiles a dozen Triton kernels as well, in every worker at once

FLA_NOTES = {
    "chunk": "fla.ops.kda.chunk_kda, Triton",
    "recurrent": "fla.ops.kda.fused_recurrent_kda, Triton",
    "naive": "fla.ops.kda.naive, fla's own PyTorch reference in fp32",
}

FLA_EXEMPT = {
    "naive": dict.fromkeys(
        (f"arguments.cu_seqlens-{what}" for what in ("start", "negative", "decreasing", "past-the-end")),
        "fla's reference knows no packed sequences, so the adapter takes them apart",
    ),
}

BUILTIN: dict[str, Callable[[], Target]] = {
    "flash_kda": _flash_kda,
    "model": _model,
    **{f"fla.{kernel}": partial(_fla, kernel) for kernel in FLA_NOTES},
}

PEERS: dict[str, Callable[[], Target]] = {name: partial(_peer, name) for name in ("vllm.flashkda", "cudnn.kda")}
"""Other people's kernels. They run where `--target` names them."""
