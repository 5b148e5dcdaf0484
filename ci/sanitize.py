"""NVIDIA's compute-sanitizer over the kernel, on small cases that cover every path through it.

    python ci/sanitize.py [TOOL]... [--logs DIR]    memcheck, racecheck, synccheck and initcheck, side by side
    python ci/sanitize.py --cases                   the cases alone, without a tool

Each tool runs the cases in a process of its own, on memory that PyTorch does not cache, so that every tensor has bounds
of its own. Inputs are made on the host and copied, results judged there: the kernel is nearly all that runs on the GPU.
Exit status: 0 every tool silent and every result right, 1 not so, 2 it could not be run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
NOTHING_FOUND = re.compile(r"^=+ .*SUMMARY: 0 ", re.MULTILINE)  # a tool that lost its program ends with 0 as well
REPORTED = 9  # the tool's exit status when it has something to report
TOOL_LIMIT = 900.0  # seconds for a tool
SILENT, NOISY, NOT_RUN = 0, 1, 2
MOST_LINES = 40  # of a report that are shown; the log has all
WRONG = re.compile(r": (raised|\w+ is wrong by) ")  # in what the cases print
ERROR_AT_MOST = 0.02  # relative RMS: whether a result is that of the operator at all; the tests judge it closely


POOL = 8  # rows of a pool of states
NOT_WRITTEN = 7.0  # what states hold that are not to be written


@dataclass(frozen=True)
class SanitizedCall:
    """Changes to the plain case, and what serving engines pass besides.

    offsets, rows and checkpoints: contents of `cu_seqlens`, `state_indices` and `checkpoint_offsets`; None: the case's
    own. wrong: nobody says what is computed from them. captured: the call is replayed from a CUDA graph.
    """

    changes: dict = field(default_factory=dict)
    offsets: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    checkpoints: tuple[tuple[int, ...], ...] | None = None
    wrong: bool = False
    captured: bool = False


def any_numbers(seed: int, count: int, bits: int = 64) -> tuple[int, ...]:
    """Integers of that many bits: some near what would be right, some anywhere."""
    draw = random.Random(seed)
    return tuple(draw.randint(-(2 ** (n - 1)), 2 ** (n - 1) - 1) for n in draw.choices((6, 9, 32, bits), k=count))


def any_checkpoints(seed: int, bits: int = 64) -> tuple[tuple[int, ...], ...]:
    return tuple(any_numbers(1000 * seed + n, 4, bits) for n in range(5))


def checked_cases() -> dict[str, SanitizedCall]:
    one = {"packed": False}
    states = [(initial, final) for initial in (None, "bf16", "fp32") for final in (None, "bf16", "fp32")]
    lengths = (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129)
    some = ((16, 32, 64), (0, 16, -1), (6, 0, -16), (32, 48, 64), (16, 112, 128))
    return {
        "packed, int64": SanitizedCall(),
        "packed, int32": SanitizedCall({"cu_seqlens_dtype": "int32"}),
        **{f"one of {n}": SanitizedCall({**one, "seq_lens": (n,), "heads": 1}) for n in lengths},
        "batch": SanitizedCall({**one, "seq_lens": (70, 70)}),
        "long": SanitizedCall({**one, "seq_lens": (1100,), "heads": 1}),
        **{
            f"state {initial} to {final}": SanitizedCall({"initial_state": initial, "final_state": final, "heads": 1})
            for initial, final in states
        },
        "state in place, fp32": SanitizedCall({"in_place": True}),
        "state in place, bf16": SanitizedCall({"in_place": True, "initial_state": "bf16", "final_state": "bf16"}),
        **{f"strided {seed}": SanitizedCall({"layout": "strided", "seed": seed, "heads": 2}) for seed in range(4)},
        "no decay": SanitizedCall({"lower_bound": 0.0}),
        "decay at the bound": SanitizedCall({"gates": "plus_infinity"}),
        "identical keys": SanitizedCall({"keys": "equal", "gates": "equal", "betas": "constant_6"}),
        "zero rows": SanitizedCall({"keys": "zero_rows", "queries": "zero_rows"}),
        "huge values": SanitizedCall({"values": "huge", "states": "huge"}),
        "no tokens": SanitizedCall({"seq_lens": (0, 0)}),
        "more sequences than processors": SanitizedCall({"seq_lens": tuple(n % 21 for n in range(150)), "heads": 2}),
        "more heads than processors": SanitizedCall({"seq_lens": (17, 3), "heads": 140}),
        "captured": SanitizedCall(captured=True),
        "checkpoints": SanitizedCall(checkpoints=some),
        "checkpoints, one for each, bf16": SanitizedCall(
            {"initial_state": "bf16", "final_state": "bf16"}, checkpoints=tuple(row[1:2] for row in some)
        ),
        "a pool": SanitizedCall(rows=(6, -1, 0, 3, 7)),
        "a pool in place, with checkpoints": SanitizedCall({"in_place": True}, rows=(2, 1, -7, 3, 0), checkpoints=some),
        "a pool and checkpoints, captured": SanitizedCall(rows=(1, 0, -1, 5, 4), checkpoints=some, captured=True),
        "offsets that decrease": SanitizedCall({"seq_lens": (64, 64)}, offsets=(0, 100, 50, 128), wrong=True),
        "offsets that end late": SanitizedCall({"seq_lens": (64, 64)}, offsets=(0, 64, 5000), wrong=True),
        "offsets far out, int32": SanitizedCall(
            {"seq_lens": (64, 64), "cu_seqlens_dtype": "int32"}, offsets=(-(2**31), 2**30, 2**31 - 1), wrong=True
        ),
        "offsets below zero": SanitizedCall({"seq_lens": (64, 64)}, offsets=(-(2**40), 64, 128), wrong=True),
        "offsets far out": SanitizedCall({"seq_lens": (64, 64)}, offsets=(0, 2**62, 2**63 - 1), wrong=True),
        "rows past the pool": SanitizedCall(rows=(POOL, POOL + 1, 2**31, 2**40, 2**63 - 1), wrong=True),
        "rows below zero": SanitizedCall(rows=(-1, -POOL, -(2**31) - 1, -(2**40), -(2**63)), wrong=True),
        "a row named by all": SanitizedCall({"in_place": True}, rows=(3,) * 5, wrong=True),
        "checkpoints past the end": SanitizedCall(
            checkpoints=((80, 96, 2**62), (16, 2**31, 2**40), (16, 32, 48), (80, 2**63 - 1, 96), (144, 160, 176)),
            wrong=True,
        ),
        "checkpoints below zero": SanitizedCall(
            checkpoints=((-1, -16, -(2**31)),) * 2 + ((-(2**63), -64, 1),) * 3, wrong=True
        ),
        "checkpoints that do not increase": SanitizedCall(
            checkpoints=((64, 16, 16), (0, 0, 0), (5, 4, 5), (33, 17, 64), (128, 127, 129)), wrong=True
        ),
        **{
            f"any numbers, {bits} bits, {seed}": SanitizedCall(
                {"cu_seqlens_dtype": f"int{bits}", "in_place": seed % 2 == 1},
                offsets=any_numbers(seed, 6, bits) if seed % 3 == 2 else None,
                rows=any_numbers(seed + 100, 5, bits),
                checkpoints=any_checkpoints(seed, bits),
                wrong=True,
            )
            for bits in (32, 64)
            for seed in range(6)
        },
    }


def plain_case():
    from fuzz.cases.plain import PLAIN

    return replace(PLAIN, seq_lens=(70, 0, 5, 64, 129), heads=3, packed=True)


def run_cases(device: str) -> int:
    """Runs the cases and judges their results; how many were wrong."""
    sys.path.insert(0, str(ROOT))
    import torch

    if device == "cuda":
        torch.set_num_threads(2)  # the tools run side by side
    wrong = 0
    for name, checked in checked_cases().items():
        began = time.perf_counter()
        try:
            problem = run_case(checked, device)
        except Exception as error:
            problem = f"raised {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        wrong += problem is not None
        print(f"{name}: {problem or 'right'} ({time.perf_counter() - began:.1f} s)", flush=True)
    return wrong


def run_case(checked: SanitizedCall, device: str) -> str | None:
    """What is wrong with the result of a case, or None."""
    import torch

    import flash_kda
    from fuzz.cases.inputs import make_inputs
    from oracle import recurrent_kda

    if checked.wrong and device == "cpu":
        return None  # contents of a CPU tensor are always validated
    case = replace(plain_case(), **checked.changes)
    inputs = make_inputs(case)
    integers = torch.int32 if case.cu_seqlens_dtype == "int32" else torch.int64
    named = {"state_indices": checked.rows, "checkpoint_offsets": checked.checkpoints}
    serving = {name: torch.tensor(x, dtype=integers) for name, x in named.items() if x is not None}
    if checked.offsets is not None:
        inputs.cu_seqlens = torch.tensor(checked.offsets, dtype=integers)
    sequences = case.n_seqs if checked.offsets is None else len(checked.offsets) - 1
    rows = sequences if checked.rows is None else POOL
    of_state = (case.heads, 128, 128)
    if inputs.initial_state is not None and len(inputs.initial_state) != rows:
        inputs.initial_state = inputs.initial_state[torch.arange(rows) % case.n_seqs]
    final_state = inputs.initial_state if case.in_place else None
    if final_state is None and inputs.final_state_dtype is not None:
        final_state = torch.full((rows, *of_state), NOT_WRITTEN, dtype=inputs.final_state_dtype)
    expected = {}
    if not checked.wrong:
        tensors = (
            "q",
            "k",
            "v",
            "g",
            "beta",
            "scale",
            "A_log",
            "dt_bias",
            "lower_bound",
            "initial_state",
            "cu_seqlens",
        )
        exact, state, *checkpoints = recurrent_kda(**{name: getattr(inputs, name) for name in tensors}, **serving)
        expected["out"] = exact
        if final_state is not None:
            expected["final_state"] = final_state.double()
            for n, row in enumerate(range(sequences) if checked.rows is None else checked.rows):
                if row >= 0:
                    expected["final_state"][row] = state[n]
        if checkpoints:
            expected["checkpoint_state"] = checkpoints[0].nan_to_num(nan=NOT_WRITTEN)

    there = inputs.to(device)
    given = {name: getattr(there, name) for name in ("q", "k", "v", "g", "beta", "scale", "A_log", "dt_bias")}
    given |= {name: getattr(there, name) for name in ("lower_bound", "initial_state", "cu_seqlens")}
    given |= {name: x.to(device) for name, x in serving.items()}
    given["out"] = torch.full(inputs.v.shape, torch.nan, dtype=torch.bfloat16).to(device)
    if case.in_place:
        given["final_state"] = given["initial_state"]
    elif final_state is not None:
        given["final_state"] = final_state.to(device)
    if checked.checkpoints is not None:
        shape = (*serving["checkpoint_offsets"].shape, *of_state)
        dtype = torch.bfloat16 if case.final_state == "bf16" else torch.float32
        given["checkpoint_state"] = torch.full(shape, NOT_WRITTEN, dtype=dtype).to(device)

    if checked.captured and device == "cuda":
        # Memory that is not cached cannot be allocated in a capture, and the first call loads the kernel.
        tensors = (*(given[name] for name in "qkvg"), given["out"])
        workspace = torch.empty(flash_kda.get_workspace_size(*tensors), dtype=torch.uint8, device=device)
        flash_kda.fwd(**given, validate=False, workspace=workspace)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            flash_kda.fwd(**given, validate=False, workspace=workspace)
        graph.replay()
    else:
        flash_kda.fwd(**given, validate=False)
    if device == "cuda":
        torch.cuda.synchronize()
    for name, exact in expected.items():
        mine = given[name].cpu()
        error = ((mine.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item() if exact.numel() else 0.0
        if not error <= ERROR_AT_MOST:
            return f"{name} is wrong by {error:.2g}, relative RMS"
    return None


def find_sanitizer() -> str | None:
    """The toolkit's, or that of the wheel nvidia-cuda-sanitizer-api beside this Python."""
    packages = Path(sysconfig.get_path("purelib"), "nvidia")
    places = ["/usr/local/cuda/bin", *map(str, sorted(packages.glob("*/bin")))]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def command_for(sanitizer: str, tool: str) -> list[str]:
    options = ["--tool", tool, "--error-exitcode", str(REPORTED), "--print-limit", "20", "--launch-timeout", "120"]
    if tool == "memcheck":
        # Errors of API calls that PyTorch makes to see what there is are none; those of ours raise.
        options += ["--padding", "256", "--report-api-errors", "no"]
    return [sanitizer, *options, "--target-processes", "application-only", sys.executable, __file__, "--cases"]


def run_tools(sanitizer: str, tools: list[str], logs: Path) -> int:
    """Runs the tools at the same time; each says how it ended as soon as it did."""
    logs.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    began = time.monotonic()
    running = {}
    for tool in tools:
        log = (logs / f"{tool}.log").open("w")
        with log:
            running[tool] = subprocess.Popen(
                command_for(sanitizer, tool),
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    noisy = []
    try:
        while running:
            for tool, process in list(running.items()):
                status = process.poll()
                if status is None and time.monotonic() - began > TOOL_LIMIT:
                    end(process)
                    status = f"still running after {TOOL_LIMIT:.0f} s"
                if status is None:
                    continue
                del running[tool]
                seconds = time.monotonic() - began
                log = logs / f"{tool}.log"
                said = log.read_text(errors="replace")
                if status == 0 and NOTHING_FOUND.search(said):
                    print(f"{tool}: silent ({seconds:.0f} s)", flush=True)
                    continue
                status = "0, but its summary is missing" if status == 0 else status
                noisy.append(tool)
                print(f"{tool}: NOT SILENT: exit status {status} ({seconds:.0f} s), {log}", flush=True)
                for line in told(said)[:MOST_LINES]:
                    print(f"    {line}", flush=True)
            time.sleep(0.2)
    finally:
        for process in running.values():
            end(process)
    return len(noisy)


def end(process: subprocess.Popen) -> None:
    """Kills a tool with all it started: the Python that runs the cases would outlive it, and keep the GPU."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def told(log: str) -> list[str]:
    """The lines of a log that matter: the tool's, results that are wrong, and what Python said at its end."""
    lines = [line for line in log.splitlines() if line.startswith("=========") or WRONG.search(line)]
    return lines if len(lines) > 3 else lines + log.splitlines()[-10:]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", metavar="TOOL", help=f"tool: {', '.join(TOOLS)} (default all)")
    parser.add_argument("--cases", action="store_true", help="run of the cases without a tool")
    parser.add_argument(
        "--device",
        default="cuda",
        choices=("cuda", "cpu"),
        help="device for --cases; cpu runs the model (default cuda)",
    )
    parser.add_argument(
        "--logs",
        type=Path,
        default=ROOT / "runs" / "sanitizer",
        metavar="DIR",
        help="folder of the logs (default runs/sanitizer)",
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.tools) - set(TOOLS):
        parser.error(f"TOOL: expected one of {', '.join(TOOLS)}, got {', '.join(sorted(unknown))}")
    if options.cases:
        return NOISY if run_cases(options.device) else SILENT
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(
            "ci/sanitize.py: no compute-sanitizer: it comes with the CUDA toolkit, or pip install "
            "nvidia-cuda-sanitizer-api",
            file=sys.stderr,
        )
        return NOT_RUN
    return NOISY if run_tools(sanitizer, options.tools or list(TOOLS), options.logs) else SILENT


if __name__ == "__main__":
    # The tools have sessions of their own, which no signal to this one reaches.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
