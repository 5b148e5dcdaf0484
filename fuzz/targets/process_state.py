"""Process-wide state that one target could change for all others. It is put back after each use of the target."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import overrides
from torch.utils import _python_dispatch as dispatch
from torch.utils._device import DeviceContext

FLAGS = (
    "cuda.matmul.allow_tf32",
    "cudnn.allow_tf32",
    "cuda.matmul.allow_bf16_reduced_precision_reduction",
    "cuda.matmul.allow_fp16_reduced_precision_reduction",
)
"""Settings of `torch.backends`."""

PRECISIONS = (
    ("generic", "all"),
    *itertools.product(("cuda", "mkldnn"), ("all", "matmul", "conv", "rnn")),
)
"""What newer versions of PyTorch have a precision for. Their properties take fifty times as long to read."""


@dataclass(frozen=True)
class Setting:
    """One part of the state. get: its value, which compares with others. put: from such a value.

    ours: the harness changes it itself between two uses of a target. What it does not is read only once before.
    """

    name: str
    get: Callable[[], object]
    put: Callable[[object], None]
    ours: bool = True


def of_backend(path: str) -> tuple[object, str]:
    """The object below `torch.backends`, and the name of its attribute."""
    *above, name = path.split(".")
    place = torch.backends
    for part in above:
        place = getattr(place, part)
    return place, name


def flag(path: str) -> bool | None:
    """None where the older settings and the newer ones contradict each other."""
    with suppress(RuntimeError):
        return getattr(*of_backend(path))
    return None


def precision() -> tuple:
    """TF32 and the precision of products, by PyTorch's older and its newer settings."""
    products = None
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    get = getattr(torch._C, "_get_fp32_precision_getter", None)
    return products, [flag(path) for path in FLAGS], [] if get is None else [get(*of) for of in PRECISIONS]


def put_precision(value: tuple) -> None:
    products, flags, newer = value

    def put_newer() -> None:
        for of, text in zip(PRECISIONS, newer, strict=False):
            torch._C._set_fp32_precision_setter(*of, text)

    put_newer()
    if precision() != value:
        if products is not None:  # which sets several of the newer settings
            torch.set_float32_matmul_precision(products)
        for path, on in zip(FLAGS, flags, strict=True):
            if on is not None:
                setattr(*of_backend(path), on)
        put_newer()


def environment() -> dict:
    """As bytes; `os.environb` would take as long as all other settings together."""
    return os.environ._data.copy()


def put_environment(value: dict) -> None:
    for name in os.environb.keys() - value.keys():
        del os.environb[name]
    for name, text in value.items():
        if os.environb.get(name) != text:
            os.environb[name] = text


def default_device() -> str:
    return str(torch.get_default_device())


def put_default_device(value: str) -> None:
    torch.set_default_device(None if value == "cpu" else value)
    if default_device() != value:  # `with torch.device(...)`, of which nothing was told that it ended
        put_stack(overrides, [mode for mode in function_modes() if not isinstance(mode, DeviceContext)])


def function_modes() -> list:
    return overrides._get_current_function_mode_stack()


def modes() -> tuple[list, list]:
    """What sees each call of PyTorch in this thread, but for the default device."""
    seeing = [mode for mode in function_modes() if not isinstance(mode, DeviceContext)]
    return seeing, dispatch._get_current_dispatch_mode_stack()


def put_modes(value: tuple[list, list]) -> None:
    device = [mode for mode in function_modes() if isinstance(mode, DeviceContext)]
    put_stack(overrides, device + value[0])
    put_stack(dispatch, value[1])


def put_stack(kind, stack: list) -> None:
    """kind: the module of PyTorch that has the stack of such modes."""
    now = {overrides: overrides._get_current_function_mode_stack, dispatch: dispatch._get_current_dispatch_mode_stack}
    for _ in now[kind]():
        kind._pop_mode()
    for mode in stack:
        kind._push_mode(mode)


def flushes_to_zero() -> bool:
    """Whether subnormal numbers are taken for zero, as they are by a mode of the processor."""
    smallest = sys.float_info.min
    return smallest / 2 == 0.0 or smallest / 2 * 2 == 0.0


def deterministic() -> tuple:
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return *algorithms, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark


def put_deterministic(value: tuple) -> None:
    on, warn_only, torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = value
    # `torch.use_deterministic_algorithms` imports the compiler of PyTorch, which takes seconds, and tells it the mode.
    torch._C._set_deterministic_algorithms(on, warn_only=warn_only)
    if compiler := sys.modules.get("torch._inductor.config"):
        compiler.deterministic = on


def grad_mode() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def put_grad_mode(value: tuple[bool, bool]) -> None:
    on, inference = value
    if torch.is_inference_mode_enabled() != inference:
        ENTERED.append(torch.inference_mode(inference))  # nobody else can leave a mode than who entered it
        ENTERED[-1].__enter__()
    torch.set_grad_enabled(on)


ENTERED: list[torch.inference_mode] = []


def autocast() -> tuple[bool, bool]:
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def put_autocast(value: tuple[bool, bool]) -> None:
    for device, on in zip(("cpu", "cuda"), value, strict=True):
        torch.set_autocast_enabled(device, on)


def put_filters(value: list) -> None:
    warnings.filters[:] = value
    if hasattr(warnings, "_filters_mutated"):  # which makes Python forget what it has warned of
        warnings._filters_mutated()


def numpy_errors() -> tuple:
    return np.geterr(), np.geterrcall()


def put_numpy_errors(value: tuple) -> None:
    np.seterr(**value[0])
    np.seterrcall(value[1])


def numpy_seed() -> tuple:
    kind, keys, *rest = np.random.get_state()
    return (kind, keys.tobytes(), *rest)


def put_numpy_seed(value: tuple) -> None:
    kind, keys, *rest = value
    np.random.set_state((kind, np.frombuffer(keys, dtype=np.uint32), *rest))


def torch_seed() -> list[bytes]:
    """The CPU's, and those of the GPUs that were used."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return [state.numpy().tobytes() for state in states]


def put_torch_seed(value: list[bytes]) -> None:
    first, *others = (torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in value)
    torch.set_rng_state(first)
    for number, state in enumerate(others):
        torch.cuda.set_rng_state(state, number)


def current_device() -> tuple:
    """The current GPU, and the stream of each; nothing where no GPU was used."""
    if not torch.cuda.is_initialized():
        return ()
    return torch.cuda.current_device(), [torch.cuda.current_stream(n) for n in range(torch.cuda.device_count())]


def put_current_device(value: tuple) -> None:
    if not value:  # what was not used yet has its defaults
        if not torch.cuda.is_initialized():
            return
        value = 0, [torch.cuda.default_stream(n) for n in range(torch.cuda.device_count())]
    device, streams = value
    for stream in streams:
        torch.cuda.set_stream(stream)
    torch.cuda.set_device(device)


LIBC = ctypes.CDLL(None)

SETTINGS = (
    Setting("modes of PyTorch", modes, put_modes),  # first: what reads the others may be seen by them
    Setting("environment", environment, put_environment),
    Setting("working directory", os.getcwd, os.chdir),
    Setting("default dtype", torch.get_default_dtype, torch.set_default_dtype),
    Setting("default device", default_device, put_default_device),
    Setting("flush-to-zero", flushes_to_zero, torch.set_flush_denormal),
    Setting("rounding mode", lambda: LIBC.fegetround(), lambda value: LIBC.fesetround(value)),
    Setting("precision of products", precision, put_precision),
    Setting("deterministic mode", deterministic, put_deterministic),
    Setting("grad mode", grad_mode, put_grad_mode),
    Setting("autocast", autocast, put_autocast),
    Setting("warning filters", lambda: list(warnings.filters), put_filters),
    Setting("NumPy's error state", numpy_errors, put_numpy_errors),
    Setting("random seed of Python", random.getstate, random.setstate, ours=False),
    Setting("random seed of NumPy", numpy_seed, put_numpy_seed, ours=False),
    Setting("random seed of PyTorch", torch_seed, put_torch_seed),
    Setting("current GPU and stream", current_device, put_current_device),
    Setting("number of threads", torch.get_num_threads, torch.set_num_threads),
)


AT_FIRST: dict[str, object] = {}  # the values of settings that the harness does not change


@contextmanager
def put_back(changed: set[str]) -> Iterator[None]:
    """Puts back what the block changes of `SETTINGS`, and adds the names of these to `changed`.

    Environment variables that were changed are named. What cannot be read before the block is left alone after it.
    """
    before = []
    for setting in SETTINGS:
        if setting.ours:
            value = read(setting)
        else:
            if setting.name not in AT_FIRST:
                AT_FIRST[setting.name] = read(setting)
            value = AT_FIRST[setting.name]
        before.append(value)
    try:
        yield
    finally:
        for setting, value in zip(SETTINGS, before, strict=True):
            if value is not None and (now := read(setting)) != value:
                changed.add(name_of(setting, value, now))
                with suppress(OSError, RuntimeError):  # a working directory that is gone, a GPU that is lost
                    setting.put(value)


def read(setting: Setting) -> object:
    """The value of a setting; None where it has none, as a working directory that was removed."""
    try:
        return setting.get()
    except (OSError, RuntimeError):
        return None


def name_of(setting: Setting, before: object, now: object) -> str:
    if setting.name != "environment":
        return setting.name
    names = sorted(os.fsdecode(name) for name in {*before, *now} if before.get(name) != now.get(name))
    return f"environment ({', '.join(names)})"
