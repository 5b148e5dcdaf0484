"""Defects of device code: builds of the kernel with one thing changed, never in the shipped library.

Each is a textual patch of one file of `csrc/`. A copy of the sources is patched and compiled by the project's own
build; the library goes into a cache under a digest of all that it was made of. A process loads one library, so each
defect is judged in a process of its own, on a Hopper GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from fuzz.defects.defect import Defects

ROOT = Path(__file__).resolve().parents[2]
BUILD_SOURCES = ("CMakeLists.txt", "build_backend", "csrc")
CACHE = ROOT / "build" / "defects"
LIBRARY_NAME = "libflash_kda.so"
FETCHING = threading.Lock()  # builds run in threads, and one fetches for all


class BuildError(ValueError):
    """A defect cannot be built; the message says which and why."""


@dataclass(frozen=True)
class Patch:
    """A change of the text of one source file: `old`, which is there once, becomes `new`."""

    file: str
    old: str
    new: str

    def apply(self, sources: Path) -> None:
        """Changes the file under `sources`. Raises BuildError unless `old` is there exactly once."""
        path = sources / self.file
        text = path.read_text() if path.exists() else ""
        count = text.count(self.old)
        if count != 1:
            raise BuildError(f"{self.file}: expected {self.old.strip()!r} once, got it {count} times")
        path.write_text(text.replace(self.old, self.new))


def copy_sources(folder: Path) -> None:
    """What the library is built of, into an empty folder; CUTLASS by a link."""
    for name in BUILD_SOURCES:
        if not (ROOT / name).exists():
            raise BuildError(
                f"{ROOT}: expected {name}, got none; defects of device code need a checkout of the project"
            )
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, folder / name)
    (folder / "third_party").symlink_to(ROOT / "third_party")


def build(patches: tuple[Patch, ...]) -> Path:
    """The library with the patches, compiled unless the cache has it: half a minute. Raises BuildError."""
    with tempfile.TemporaryDirectory(prefix="flash-kda-defect-") as temporary:
        folder = Path(temporary)
        copy_sources(folder)
        for patch in patches:
            patch.apply(folder)
        library = CACHE / digest(folder) / LIBRARY_NAME
        if library.exists():
            return library
        with FETCHING:
            environment = with_tools()
        configure = ["cmake", "-S", folder, "-B", folder / "build", f"-DPython_EXECUTABLE={sys.executable}"]
        if shutil.which("ninja"):
            configure += ["-G", "Ninja"]
        for command in (configure, ["cmake", "--build", folder / "build"]):
            run_command(command, f"{patches}: does not compile", env=environment)
        library.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all, and under a name of its own: builds run in threads, and two may be of the same patches.
        descriptor, new = tempfile.mkstemp(prefix=".new-", dir=library.parent)
        os.close(descriptor)
        shutil.copy2(folder / "build" / LIBRARY_NAME, new)
        os.replace(new, library)
        return library


def run_command(command: list, otherwise: str, **options) -> None:
    """Raises BuildError, which begins with `otherwise`, if the command fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, **options)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise BuildError(f"{otherwise}: {(done.stderr or done.stdout)[-2000:]}")


def with_tools() -> dict[str, str]:
    """The environment for a build. What pip fetches for the project's own build and forgets (nvcc and CUTLASS, where
    there is no toolkit or submodule) is fetched once into a folder of the cache. Raises BuildError."""
    toolchain = ROOT / "build_backend" / "toolchain.py"
    if subprocess.run([sys.executable, toolchain], capture_output=True).returncode == 0:
        return dict(os.environ)
    wanted = runpy.run_path(str(toolchain))["requirements"]()
    wheels = CACHE / f"wheels-{hashlib.sha256(repr(wanted).encode()).hexdigest()[:16]}"
    if not wheels.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=CACHE) as temporary:
            new = Path(temporary) / "wheels"
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", new, *wanted]
            run_command(pip, f"cannot install {' '.join(wanted)}")
            with contextlib.suppress(OSError):  # another process was faster
                new.rename(wheels)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(wheels), *filter(None, [os.environ.get("PYTHONPATH")])])}


def digest(folder: Path) -> str:
    """Of everything in the copied sources."""
    result = hashlib.sha256()
    for path in sorted(path for name in BUILD_SOURCES for path in [folder / name, *(folder / name).rglob("*")]):
        if path.is_file() and "__pycache__" not in path.parts:
            result.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return result.hexdigest()[:16]


@dataclass(frozen=True)
class Patched:
    """Makes `flash_kda.fwd` in a process whose library has the patches."""

    patches: tuple[Patch, ...]

    def __call__(self):
        import flash_kda
        from flash_kda import library

        wanted = str(build(self.patches))
        if library.load.cache_info().currsize and os.environ.get("FLASH_KDA_LIBRARY") != wanted:
            raise BuildError("FLASH_KDA_LIBRARY: expected a process without a library, got one that has loaded another")
        os.environ["FLASH_KDA_LIBRARY"] = wanted
        return flash_kda.fwd


# What is read too early or overwritten too soon is wrong now and then, and sometimes every time.
RACE = "determinism accuracy written"
HANG = f"{RACE} timeout died"

DEVICE = Defects("device")


def plant(name: str, expected: str, sentence: str, *patches: tuple[str, str, str], failure: str | None = None) -> None:
    """Patches are of files in `csrc/sm90`: the name of one, what is there once, and what it becomes."""
    DEVICE.add(
        name,
        expected,
        Patched(tuple(Patch(f"csrc/sm90/{file}", old, new) for file, old, new in patches)),
        sentence,
        failure,
    )


plant(
    "device_missing_proxy_fence",
    RACE,
    "Ordinary stores to shared memory are not made visible to wgmma and bulk copies before these read them.",
    ("ptx.h", "  fence_async();\n  warp_done(barrier);\n", "  warp_done(barrier);\n"),
    failure="Missing proxy fence",
)
plant(
    "device_missing_barrier",
    RACE,
    "Sums of L and M over other channels are added before their warps have stored them.",
    (
        "prepare.h",
        "    sync_team();\n#pragma unroll\n    for (int i = 0; i < kPieces; ++i) {\n      const float4 y",
        "#pragma unroll\n    for (int i = 0; i < kPieces; ++i) {\n      const float4 y",
    ),
)
plant(
    "device_sums_overwritten_too_soon",
    RACE,
    "Sums of the second exchange go where those of the first lie, which the other warp may not have read.",
    ("prepare.h", "given(X, quarter ^ 1, i / 2) = {", "given(X, quarter, i / 2) = {"),
    ("prepare.h", "given(X, quarter ^ 3, i / 2);", "given(X, quarter ^ 2, i / 2);"),
)
plant(
    "device_inverted_too_soon",
    HANG,
    "L of a chunk is inverted, and its K~ multiplied, before the team has stored them.",
    ("invert.h", "      Barrier::wait(&s.bar_L_ready[own.parity][own.stage], own.team_parity);\n", ""),
)
plant(
    "device_sent_too_soon",
    HANG,
    "A chunk is sent to the peer before the peer has given back the stage that it goes to.",
    ("pair.h", "if (n >= kReceivedStages) Barrier::wait(&s.bar_used[to], there.parity ^ 1);", ""),
)
plant(
    "device_wrong_phase",
    HANG,
    "Operands are waited for with the parity of the round before.",
    (
        "pair.h",
        "Barrier::wait(&s.bar_prepared[at.stage()], at.parity());",
        "Barrier::wait(&s.bar_prepared[at.stage()], at.parity() ^ 1);",
    ),
)
plant(
    "device_stage_loaded_too_soon",
    HANG,
    "Values of the third chunk are loaded into the first stage before the first chunk has left it.",
    ("load.h", "    if (c >= kValueStages) {\n", "    if (c > kValueStages) {\n"),
)
plant(
    "device_stale_stage",
    "accuracy",
    "The factors of rows and channels are always those of the first stage of the pipeline.",
    ("recur.h", "s.factors[stage];", "s.factors[stage < kOwnStages ? 0 : stage];"),
)
plant(
    "device_state_taken_over_too_soon",
    RACE,
    "A sequence that goes on in another cluster does not wait for its state.",
    ("recur_parts.h", "while (!load_acquire(p.handed_over + from)) {", "while (false) {"),
)
plant(
    "device_ring_flag_missed",
    HANG,
    "Chunks are fetched from the ring without a look at the flags that say that they have come.",
    (
        "ring.h",
        "      if (n == there && !run.chunk.is_end()) there += ring.wait_ready(n);\n",
        "",
    ),
)
plant(
    "device_ring_place_overwritten",
    HANG,
    "A chunk is written into the ring whether or not the chunk before it there has been taken.",
    ("ring.h", "      ring.wait_free(place.chunk);\n", ""),
)
plant(
    "device_ring_ready_too_soon",
    HANG,
    "The flag of a place in the ring is set while the chunk is still being written there.",
    ("ring.h", "      wait_bulk();\n", ""),
)
plant(
    "device_tail_over_next_sequence",
    "accuracy outputs_within packing determinism",
    "Rows of a chunk beyond the end of the sequence are stored.",
    ("recur_parts.h", "if (int(8 * j + row) < x.valid) {", "if (x.valid > 0) {"),
    failure="Tail rows of one sequence",
)
plant(
    "device_tail_not_cleared",
    "accuracy packing",
    "Rows of a chunk beyond the end of the sequence keep what follows it in memory.",
    ("norms.h", "if (int(lane) >= from) *", "if (int(lane) >= kChunk) *"),
)
plant(
    "device_offset_of_32_bits",
    "wide_offsets died",
    "The offset of an initial state is a 32-bit number.",
    (
        "recur_parts.h",
        "const int64_t offset = of * p.initial_stride_sequence +",
        "const int32_t offset = of * p.initial_stride_sequence +",
    ),
    failure="32-bit element offsets",
)
plant(
    "device_wrong_swizzle",
    "accuracy",
    "The tile of the values is read without the swizzle with which it was loaded.",
    (
        "recur_parts.h",
        "v.bytes + swizzled(16 * i + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2)",
        "v.bytes + (16 * i + lane / 16 * 8 + lane % 8) * 128 + (2 * warp + lane / 8 % 2) * 16",
    ),
)
plant(
    "device_wrong_sign",
    "accuracy",
    "What the state already says of the keys is added to the values, not taken from them.",
    (
        "recur.h",
        "V_part[2 * i] - OU[16 + 2 * i], V_part[2 * i + 1] - OU",
        "V_part[2 * i] + OU[16 + 2 * i], V_part[2 * i + 1] + OU",
    ),
)
plant(
    "device_first_part_twice",
    "accuracy",
    "Values are multiplied twice by the first part of the inverse times beta, and never by the second one.",
    ("recur.h", "(V_part, V, x.X, 2, true)", "(V_part, V, x.X, 0, true)"),
)
plant(
    "device_missed_last_chunk",
    "written accuracy",
    "A sequence whose last chunk has 16 tokens or less ends a chunk too early.",
    (
        "scheduler.h",
        "(length + kChunk - 1) / kChunk",
        "(length + kChunk - 1 - (length > kBlock) * kBlock) / kChunk",
    ),
)
plant(
    "device_state_before_last_update",
    "accuracy continuation beta_off",
    "The final state is stored before the last chunk's update.",
    (
        "recur_parts.h",
        "        work(S, output, out, at, c);\n",
        "        if (at.is(Chunk::kEnds)) store_state(at, S);\n        work(S, output, out, at, c);\n",
    ),
    (
        "recur_parts.h",
        "          store_state(at, S);\n",
        "          if (!at.is(Chunk::kEnds)) store_state(at, S);\n",
    ),
    failure="State checkpoint",
)
plant(
    "device_state_not_recalled",
    "checkpoints",
    "After a checkpoint inside a chunk, the state goes on from the checkpoint.",
    ("recur_parts.h", "    if (at.is(Chunk::kAside)) recall(p.kept, cta, S);\n", ""),
)
plant(
    "device_first_checkpoint_alone",
    "checkpoints",
    "Every checkpoint of a sequence is written in the place of the first one.",
    ("recur_parts.h", "at.slot() * p.checkpoint_stride", "0 * p.checkpoint_stride"),
)
plant(
    "device_negative_index_is_row_0",
    "state_pool",
    "A sequence whose index is negative reads and writes row 0 of the pool.",
    ("scheduler.h", "return row < rows ? row : -1;", "return row < 0 ? 0 : row < rows ? row : -1;"),
)
plant(
    "device_anchor_of_a_later_row",
    "causality",
    "Exponentials are counted from the last row of their block, and rounded before the mask.",
    (
        "prepare.h",
        "  // of the last row\n      }\n",
        "\n        for (auto& x : d[b]) {\n"
        "          const float2 anchored = unpack_bf16(pack_bf16(x[0] / whole[b].x, x[1] / whole[b].y));\n"
        "          x[0] = anchored.x * whole[b].x, x[1] = anchored.y * whole[b].y;\n"
        "        }\n      }\n",
    ),
    failure="Exponentials anchored",
)
plant(
    "device_sequence_search_off_by_one",
    "accuracy written outputs_within determinism timeout died",
    "The sums by which the sequence of a place in the list of chunks is found leave out a lane's own neighbour.",
    (
        "scheduler.h",
        "if (lane >= lanes) of_costs += below, of_shorts += below_short, of_longs += below_long;",
        "if (lane > lanes) of_costs += below, of_shorts += below_short, of_longs += below_long;",
    ),
)
plant(
    "device_short_state_before_last_update",
    "accuracy continuation",
    "The final state of a short sequence is stored before its tokens are worked on.",
    (
        "short.h",
        "        recur(sequence, buffer);\n        store_states(sequence);\n",
        "        store_states(sequence);\n        recur(sequence, buffer);\n",
    ),
)
plant(
    "device_short_state_of_first_head",
    "accuracy heads",
    "A short sequence begins with the state of the first head.",
    (
        "short.h",
        "of * p.initial_stride_sequence + head * p.initial_stride_head +",
        "of * p.initial_stride_sequence +",
    ),
)
plant(
    "device_short_tokens_too_soon",
    RACE,
    "A short sequence begins before other warps have stored its tokens.",
    ("short.h", "        sync_threads(kBarrierShort + group, kShortWarps * kWarp);\n", ""),
)
plant(
    "device_short_sequence_left_out",
    "written accuracy packing determinism",
    "A piece of the list of short sequences that begins inside the cost of one leaves out the next one too.",
    (
        "scheduler.h",
        "      if (++begin.head == p.heads) begin = {begin.sequence + 1, 0, 0};\n",
        "      if ((begin.head += 2) >= p.heads) begin = {begin.sequence + 1, 0, 0};\n",
    ),
)
