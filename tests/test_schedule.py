"""The schedule of the CUDA kernel by itself, in random batches. Needs a C++ compiler, and no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest

from fuzz.defects.device import Patch


def chunks(folder: Path, *patches: Patch) -> subprocess.CompletedProcess:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler here")
    shutil.copytree(emulated.CSRC, folder / "csrc")
    for patch in patches:
        patch.apply(folder)
    includes = ("-I", str(folder / "csrc"), "-I", str(emulated.EMULATOR))
    program = str(emulated.EMULATOR / "schedule.cpp")
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-w", *includes, "-o", str(folder / "schedule"), program], check=True
    )
    return subprocess.run([folder / "schedule"], capture_output=True, text=True, timeout=60)


def test_every_chunk_is_given_out_once_and_in_order(tmp_path):
    done = chunks(tmp_path)
    assert (done.returncode, done.stdout) == (0, "20000 batches\n")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(part == kHandedOver ? stop.chunk : sequence.chunks())", "(sequence.chunks())"),
        ("(is_first || at.chunk == 0 ? Chunk::kFirst : 0)", "(at.chunk == 0 ? Chunk::kFirst : 0)"),
        ("left -= kChunk;", "left -= kBlock;"),
        ("part = has_taken_over ? kTakenOver : kDone;", "part = kDone;"),
        ("if (left <= kChunk) flags |= Chunk::kEnds;", "if (left < kChunk) flags |= Chunk::kEnds;"),
        ("if (more == 0) flags |= Chunk::kLast;", "if (left <= kChunk) flags |= Chunk::kLast;"),
        ("next_is_another = has_taken_over;", "next_is_another = false;"),
        ("if ((next.offset - 1) / kChunk + aside >= at.chunk) break;", "break;"),
        ("if (x > offset && x <= length) {", "if (x > offset) {"),
        ("for (; slot < p.checkpoints; ++slot) {", "for (++slot; slot < p.checkpoints; ++slot) {"),
        ("if (before < tokens) {", "if (false) {"),
        ("aside += next.is_aside(int(length));", "aside += 0;"),
        ("if (seldom(checkpoint)) checkpoints.seek(p, chunk.sequence, length);", ""),
        ("whole -= aside;", ""),
    ],
)
def test_a_wrong_schedule_is_noticed(tmp_path, old, new):
    done = chunks(tmp_path, Patch("csrc/sm90/scheduler.h", old, new))
    assert done.returncode == 1 and done.stdout.startswith("batch ")
