"""Measuring speed: this kernel, fla's `chunk_kda` and the floor, in one process on the same inputs.

A time is the median of CUDA events around each of `calls` calls, queued back to back on the same buffers after a
warm-up. So what fits into the L2 cache is found there (a case says how many bytes it moves, and the environment how
large the cache is), and a call that the host queues more slowly than the GPU runs it takes as long as queueing it.
The time on the device alone is measured once more, with calls that wait in the queue.
`cold` overwrites the L2 cache before each call, outside the events.

The floor is the time to read each input once and write each output once at the bandwidth of a copy on this device.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

import flash_kda
from benchmarks.cases import DIM, SpeedCase
from benchmarks.results import SPEED_VERSION, load
from flash_kda import library
from fuzz.campaign.findings import environment
from fuzz.campaign.worker_process import device_error
from fuzz.files import write_whole
from fuzz.targets import fla as fla_peers

WARM_UP = 10  # calls at least ...
WARM_SECONDS = 0.3  # ... and as long as clocks take to rise from those of an idle GPU
MOST_CYCLES = 2e9  # a second, of an H200
COPIED = 2**31  # bytes of the buffer whose copy is timed; far beyond any cache
SCALE = DIM**-0.5
LOWER_BOUND = -5.0
STATE_DTYPE = {2: torch.bfloat16, 4: torch.float32}  # by the bytes of an element


class CannotMeasure(RuntimeError):
    """Nothing can be measured here; the message is one line that says why."""


class DeviceLost(RuntimeError):
    """CUDA failed in a way that every later call of this process will meet again."""


@dataclass(frozen=True)
class Settings:
    calls: int = 60
    with_fla: bool = True
    cold: bool = False
    peers: tuple[str, ...] = ()
    """Names of targets that are timed beside the kernel."""


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: median and quartiles between events, the mean that queueing it takes the host, and the
    median between events while the device always has more to do, which does not wait for the host.
    """

    ms: float
    low_ms: float
    high_ms: float
    host_ms: float
    device_ms: float


def measure_all(
    cases: Iterable[SpeedCase], settings: Settings, file: Path, *, resume: bool, say: Callable[[str], None]
) -> dict:
    """Measures the cases and returns what `file` then holds; it is written after each case.

    resume: what the file holds already is kept and not measured again, unless the kernel failed there, or fla is wanted
    and was left out. Raises CannotMeasure without a Hopper GPU or when the file is of another device, ValueError when
    it cannot be read.
    """
    device = find_device()
    here = describe_device(device)
    results = load(file) if resume and file.exists() else {"version": SPEED_VERSION, "cases": {}}
    before = results.get("environment", {}).get("device", here)
    if before["name"] != here["name"]:
        raise CannotMeasure(
            f"--out: expected results of {here['name']}, got {file} of {before['name']}; name another folder"
        )
    if results["cases"] and results["settings"]["cold"] != settings.cold:
        raise CannotMeasure(
            f"--cold: expected {'no ' * settings.cold}--cold, as in {file}, got {'' if settings.cold else 'none'}"
        )
    say(f"{here['name']}: timing a copy")
    results |= {
        "measured_at": time.time(),
        "environment": environment([here["name"]]) | {"device": here, "library": describe_library()},
        "settings": {"calls": settings.calls, "warm_up": WARM_UP, "cold": settings.cold},
        "copy_bytes_per_second": copy_bandwidth(device),
    }
    save(file, results)
    cases = list(cases)
    for number, case in enumerate(cases, 1):
        place = f"[{number}/{len(cases)}] {case.name}"
        if is_measured(results["cases"].get(case.name), case, settings):
            say(f"{place}: kept")
            continue
        record = measure(case, settings, device, say=lambda text, place=place: say(f"{place}: {text}"))
        results["cases"][case.name] = record
        save(file, results)
        if record["kernel"].get("lost") or (record["fla"] or {}).get("lost"):
            raise DeviceLost(f"{case.name}: CUDA failed for good; --resume continues in a new process")
    return results


def is_measured(record: dict | None, case: SpeedCase, settings: Settings) -> bool:
    """Whether a record is complete. What fla cannot do is not tried again; where the kernel failed, it is."""
    wants_fla = settings.with_fla and case.with_fla
    return record is not None and "ms" in record["kernel"] and (record["fla"] is not None or not wants_fla)


def measure(case: SpeedCase, settings: Settings, device: torch.device, *, say: Callable[[str], None]) -> dict:
    """One case. What raises is recorded in its place and ends nothing: {"error": one line}."""
    began = time.monotonic()
    copied = ("group", "heads", "tokens", "sequences", "packed", "bytes", "wanted", "hoped", "wanted_ms", "hoped_ms")
    published = ("fla", "flashkda", "cudnn", "vllm")
    record = {
        **{key: getattr(case, key) for key in copied},
        **{f"published_{peer}_ms": getattr(case, f"{peer}_ms") for peer in published},
        "longest": max(case.seq_lens),
        "kernel": {},
        "fla": None,
        "difference": None,
    }
    with_fla = settings.with_fla and case.with_fla
    results: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    try:
        inputs = speed_inputs(case, device)
        out = torch.empty_like(inputs["v"])
        state = torch.empty_like(inputs["initial_state"])
        checkpoints = checkpoints_of(case, state) if case.checkpoint else {}
    except Exception as error:
        record["kernel"] = error_of(error)
        say(f"inputs failed: {record['kernel']['error']}")
        return record

    def kernel() -> tuple[torch.Tensor, torch.Tensor]:
        flash_kda.fwd(**inputs, out=out, final_state=state, **checkpoints)
        return out, state

    def fla() -> tuple[torch.Tensor, torch.Tensor]:
        return fla_peers.chunk_kda(**inputs)

    for name, call in {"kernel": kernel, **({"fla": fla} if with_fla else {})}.items():
        if name == "fla":
            say("fla compiles and tunes, about a minute for a new number of heads")
        try:
            results[name] = call()
            synchronize(device)
            record[name] = {**time_calls(call, settings, device).__dict__, "peak_bytes": peak_bytes(call, device)}
            if name == "kernel" and device.type == "cuda":  # its library keeps memory beside PyTorch's allocator
                record[name]["peak_bytes"] += library.scratch_bytes(device.index)
            say(f"{name} {record[name]['ms']:.3f} ms")
        except Exception as error:
            record[name] = error_of(error)
            say(f"{name} failed: {record[name]['error']}")
            if record[name]["lost"]:
                return record
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if "kernel" in results:
        record["finite"] = all(bool(x.isfinite().all()) for x in results["kernel"])
    if len(results) == 2:
        pairs = zip(("out", "state"), results["kernel"], results["fla"], strict=True)
        record["difference"] = {name: difference(mine, theirs) for name, mine, theirs in pairs}
    for name in settings.peers:
        record.setdefault("peers", {})[name] = time_peer(name, inputs, out, state, settings, device)
        say(", ".join(f"{name} {what} {value}" for what, value in record["peers"][name].items()))
    record["seconds"] = round(time.monotonic() - began, 1)
    return record


def time_peer(name: str, inputs: dict, out: torch.Tensor, state: torch.Tensor, settings: Settings, device) -> dict:
    """Times of a target on the same inputs, its conversions included; {"error": one line} if it raises."""
    from fuzz.targets.registry import load_target

    try:
        fwd = load_target(name).fwd
        return time_calls(lambda: fwd(**inputs, out=out, final_state=state), settings, device).__dict__
    except Exception as error:
        return error_of(error)


def checkpoints_of(case: SpeedCase, state: torch.Tensor) -> dict[str, torch.Tensor]:
    """One for each sequence, before its middle. `state`: the final states."""
    offsets = torch.tensor([length // 2 // 64 * 64 for length in case.seq_lens], dtype=torch.int32)
    return {"checkpoint_state": torch.empty_like(state), "checkpoint_offsets": offsets.to(state.device)}


def speed_inputs(case: SpeedCase, device: torch.device) -> dict:
    """Arguments of `flash_kda.fwd` but for its outputs, drawn on the device as `h200_peers.json` says.

    q, k, v, g, beta standard normal, rounded to bf16; A_log and dt_bias uniform in [0, 1); initial state 0.1 x normal.
    """
    generator = torch.Generator(device).manual_seed(0)
    batch, tokens = (1, case.tokens) if case.packed else (case.sequences, case.seq_lens[0])

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device)

    tensors = {name: normal(batch, tokens, case.heads, DIM).bfloat16() for name in ("q", "k", "v", "g")}
    offsets = torch.tensor([0, *case.seq_lens]).cumsum(0).to(device)
    return {
        **tensors,
        "beta": normal(batch, tokens, case.heads).bfloat16(),
        "scale": SCALE,
        "A_log": uniform(case.heads),
        "dt_bias": uniform(case.heads, DIM),
        "lower_bound": LOWER_BOUND,
        "initial_state": normal(case.sequences, case.heads, DIM, DIM).mul_(0.1).to(STATE_DTYPE[case.state_bytes]),
        "cu_seqlens": offsets if case.packed else None,
    }


def time_calls(call: Callable[[], object], settings: Settings, device: torch.device) -> Times:
    """Times a call that has run once before."""
    cache = None
    if settings.cold:
        cache = torch.empty(4 * l2_bytes(torch.cuda.get_device_properties(device)), dtype=torch.uint8, device=device)
    began = time.perf_counter()
    while True:
        for _ in range(WARM_UP):
            call()
        torch.cuda.synchronize(device)
        if time.perf_counter() - began >= WARM_SECONDS:
            break
    ms, host = between_events(call, settings, device, cache)
    low, median, high = statistics.quantiles(ms, n=4) if len(ms) > 1 else ms * 3
    # The device sleeps for twice the time that the host has just needed to queue all calls.
    waiting, _ = between_events(call, settings, device, cache, sleep=2 * host)
    return Times(
        ms=median, low_ms=low, high_ms=high, host_ms=1e3 * host / len(ms), device_ms=statistics.median(waiting)
    )


def between_events(
    call: Callable[[], object], settings: Settings, device: torch.device, cache: torch.Tensor | None, sleep: float = 0.0
) -> tuple[list[float], float]:
    """Milliseconds of each call, sorted, and the seconds that the host took to queue all of them.

    sleep: seconds for which the device has something else to do first.
    """
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(settings.calls)]
    if sleep:
        torch.cuda._sleep(int(sleep * MOST_CYCLES))
    began = time.perf_counter()
    for start, end in events:
        if cache is not None:
            cache.zero_()
        start.record()
        call()
        end.record()
    host = time.perf_counter() - began
    torch.cuda.synchronize(device)
    return sorted(start.elapsed_time(end) for start, end in events), host


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """What a call takes from PyTorch's allocator at most: scratch memory and, where it makes them, its outputs."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy from one buffer of COPIED bytes to another."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    times = time_calls(lambda: target.copy_(source), Settings(calls=20), device)
    return 2 * COPIED / (times.ms / 1e3)


def difference(mine: torch.Tensor, theirs: torch.Tensor) -> float | None:
    """Relative RMS difference of two results; None where it is not finite. Slice by slice, as they may fill the GPU."""
    squares = torch.zeros(2, dtype=torch.float64, device=mine.device)
    mine, theirs = (x.reshape(-1, x.shape[-1]) for x in (mine, theirs))
    for x, y in zip(mine.split(2**20), theirs.split(2**20), strict=True):
        y = y.float()
        squares += torch.stack([(x.float() - y).square().sum(dtype=torch.float64), y.square().sum(dtype=torch.float64)])
    ratio = (squares[0] / squares[1]).sqrt()
    return ratio.item() if ratio.isfinite() else None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def error_of(error: Exception) -> dict:
    """What stands in the place of times. lost: the CUDA context can do no more."""
    lines = str(error).strip().splitlines() or [""]
    lost = "CUDA error" in str(error) and not isinstance(error, torch.cuda.OutOfMemoryError)
    return {"error": f"{type(error).__name__}: {lines[0]}", "lost": lost or device_error() is not None}


def find_device() -> torch.device:
    """The current CUDA device. Raises CannotMeasure when there is none, or the kernel cannot run on it."""
    if not torch.cuda.is_available():
        raise CannotMeasure("speed is measured on an NVIDIA GPU, and PyTorch sees none here")
    device = torch.device("cuda", torch.cuda.current_device())
    try:
        library.check_capability(device.index)
        library.load()
    except (RuntimeError, OSError) as error:
        raise CannotMeasure(str(error)) from error
    return device


def describe_device(device: torch.device) -> dict:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": l2_bytes(properties),
        "cuda": torch.version.cuda,
        "driver": driver(),
    }


def l2_bytes(properties) -> int:
    """Of the second-level cache of a device with these properties; an H200's where PyTorch is too old to tell."""
    return getattr(properties, "L2_cache_size", 60 * 2**20)


def driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    question = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(question, capture_output=True, text=True).stdout.split()
    return answer[0] if answer else None


def describe_library() -> dict:
    """Which build was measured."""
    path = library.path()
    return {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def save(file: Path, results: dict) -> None:
    """Replaces the file in one step, so that an interruption leaves the old one or the new one."""
    write_whole(file, json.dumps(results, indent=1) + "\n")
