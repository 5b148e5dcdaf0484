"""What a call of `flash_kda.fwd` costs the host, and its parts: `python -m benchmarks.host`. Needs a Hopper GPU.

Prints the median and the 90th percentile, in microseconds, of at least 1000 calls. Every 50 calls it waits for the GPU
outside the timed region, so that no call waits for room in the GPU's queue. Exit status: 0 measured, 2 nothing could be
measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from inspect import signature

import torch

import flash_kda
from benchmarks.speed import CannotMeasure, describe_device, find_device
from benchmarks.table import Table
from flash_kda import arguments, forward, library, native, ordinary, torch_operator

MEASURED, NOT_MEASURED = 0, 2
LEAST_CALLS = 1000
WARM_UP = 200
IN_A_ROW = 50  # calls between two waits for the GPU
HEADS, DIM, LENGTHS = 12, 128, (1000, 24, 0, 1024)


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument(
        "--calls",
        type=int,
        default=2000,
        metavar="N",
        help=f"timed calls of each row, at least {LEAST_CALLS} (default 2000)",
    )
    calls = parser.parse_args(given).calls
    if calls < LEAST_CALLS:
        parser.error(f"--calls: expected at least {LEAST_CALLS}, got {calls}. Pass a larger number.")
    try:
        measure(calls)
    except CannotMeasure as error:
        print(f"python -m benchmarks.host: {error}", file=sys.stderr)
        return NOT_MEASURED
    return MEASURED


def measure(calls: int = 2000) -> None:
    """Prints the table. Raises CannotMeasure where there is nothing to measure on."""
    device = find_device()
    print(f"{describe_device(device)['name']}, PyTorch {torch.__version__}, Python {sys.version.split()[0]}")
    print(f"host time of {calls} calls each, {sum(LENGTHS)} tokens, {HEADS} heads", flush=True)
    table = Table(["what", "median us", "p90 us"])
    for name, timed in rows(device):
        median, p90 = host_time(timed, calls, lambda: torch.cuda.synchronize(device))
        table.rows.append([name, f"{median:.2f}", f"{p90:.2f}"])
    table.print()


def rows(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is timed, by name. The calls come first, then the parts of the first of them."""
    made = calls_on(device)
    for name, call in made.items():
        yield name, lambda call=call: flash_kda.fwd(**call)
    first = next(iter(made.values()))
    options = dict.fromkeys(signature(flash_kda.fwd).parameters.keys() - first.keys())
    yield "the first, without native.cpp", lambda: ordinary.run(**first, **options)
    yield "the first, the long way", lambda: forward._long_way(**first, **options)
    yield from parts(first)
    out = first["out"]
    yield "for comparison: out.zero_()", out.zero_
    if device.type == "cuda":
        yield "for comparison: an empty kernel", lambda: torch.cuda._sleep(0)


def calls_on(device: torch.device) -> dict[str, dict]:
    """Arguments of `flash_kda.fwd` by what is said of them."""

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, HEADS, DIM, device=device).bfloat16()

    def state() -> torch.Tensor:
        return torch.zeros(len(LENGTHS), HEADS, DIM, DIM, device=device)

    total = sum(LENGTHS)
    common = {
        "scale": DIM**-0.5,
        "lower_bound": -5.0,
        "A_log": torch.zeros(HEADS, device=device),
        "dt_bias": torch.zeros(HEADS, DIM, device=device),
        "initial_state": None,
        "final_state": None,
        "cu_seqlens": None,
    }
    packed = common | {name: tokens(1, total) for name in ("q", "k", "v", "g", "out")}
    packed |= {
        "beta": torch.randn(1, total, HEADS, device=device).bfloat16(),
        "initial_state": state(),
        "final_state": state(),
        "cu_seqlens": torch.tensor([0, *LENGTHS], dtype=torch.int64).cumsum(0).to(device),
    }
    fixed = common | {name: tokens(2, total // 2) for name in ("q", "k", "v", "g", "out")}
    fixed |= {"beta": torch.randn(2, total // 2, HEADS, device=device).bfloat16()}
    fused = torch.randn(1, total, HEADS, 3 * DIM, device=device).bfloat16()
    strided = packed | dict(zip("qkv", fused.split(DIM, -1), strict=True))
    pool = torch.zeros(2 * len(LENGTHS), HEADS, DIM, DIM, device=device)
    serving = strided | {
        "initial_state": pool,
        "final_state": pool,
        "state_indices": torch.arange(len(LENGTHS), dtype=torch.int32, device=device),
        "checkpoint_state": state(),
        "checkpoint_offsets": torch.full((len(LENGTHS),), 512, dtype=torch.int32, device=device),
    }
    return {
        "contiguous, fp32 states, cu_seqlens": packed,
        "batch of 2, no states": fixed,
        "q, k, v slices of one projection, fp32 states, cu_seqlens": strided,
        "the same with a pool of states in place and a checkpoint a sequence": serving,
    }


def parts(call: dict) -> Iterator[tuple[str, Callable[[], object]]]:
    """The pieces of an ordinary call, each alone."""
    device = call["q"].device
    index = device.index
    size = library.scratch_bytes(index)
    fields, serving = ordinary.examine(**call)
    packed = library.PACKED.pack(*fields, 0, size, *serving)
    kernel = library.load().flash_kda_forward
    stream = library.current_stream(index)
    examined = native.examined
    given = [call.get(name) for name in signature(flash_kda.fwd).parameters]
    yield "part: whether PyTorch can be passed by", lambda: torch.compiler.is_compiling() or torch_operator.is_direct()
    if examined is not None:
        yield "part: checks", lambda: examined(*given)
    yield "part: device and stream", lambda: (library.current_device(), library.current_stream(index))
    yield "part: launch, all of the C side", lambda: kernel(packed, stream)
    yield "part: autograd's versions", lambda: ordinary.note_writes(call["out"], call["final_state"])
    yield "without native.cpp: checks", lambda: ordinary.examine(**call)
    yield "without native.cpp: argument struct", lambda: library.PACKED.pack(*fields, 0, size, *serving)
    yield "without native.cpp: whether contents are to be checked", lambda: arguments.wants_validation(None)
    yield "the full checks", lambda: arguments.check_arguments(**call)
    yield "while captured: allocation", lambda: torch.empty(size, dtype=torch.uint8, device=device)


def host_time(timed: Callable[[], object], calls: int, wait: Callable[[], None]) -> tuple[float, float]:
    """Median and 90th percentile in microseconds. `wait` is called before the first, after every IN_A_ROW and at last.

    An empty function's time is not taken off: it is some 0.05 us.
    """
    for _ in range(WARM_UP // IN_A_ROW):
        for _ in range(IN_A_ROW):
            timed()
        wait()
    clock = time.perf_counter_ns
    times = []
    while len(times) < calls:
        for _ in range(min(IN_A_ROW, calls - len(times))):
            began = clock()
            timed()
            times.append(clock() - began)
        wait()
    return statistics.median(times) / 1e3, statistics.quantiles(times, n=10)[-1] / 1e3


if __name__ == "__main__":
    sys.exit(main())
