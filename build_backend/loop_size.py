"""How many instructions of the kernel run for every chunk, by role: what has to stay in the instruction cache.

Nothing runs for it. The library is disassembled with its line information, an instruction belongs to the role from
whose `run()` in forward.h it was inlined, and those count whose source lies in the role's loop and is guarded by no
`seldom(...)`. The build ends with it, and keeps the table beside the library:

    python build_backend/loop_size.py build/manual/libflash_kda.so
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "sm90"
BYTES = 16  # of an instruction

# All roles run at once on the same multiprocessor, and share its instruction cache: what all of them may have together.
# Beyond 40 KB, 2,560 instructions, every chunk fetches code anew.
LIMIT = 2200


class Role(NamedTuple):
    start: str  # how forward.h starts it
    # Where its loop is: the first one of a function of a struct
    file: str
    struct: str
    function: str = "run"
    loop: str = "for ("


LOOP_OF_R = ("recur_parts.h", "RecurParts", "recur", "do {")

# What runs on one multiprocessor: the kernel, by a part of its mangled name, and the roles.
GROUPS = {
    "pair": (
        "forwardILb0E",
        {
            "R": Role("Recur(", *LOOP_OF_R),
            "P": Role("Prepare(", "prepare.h", "Prepare", loop="do {"),
            "X": Role("Invert(", "invert.h", "Invert"),
            "copies": Role("Copies{", "pair.h", "Copies"),
            "loads": Role("Load{", "load.h", "Load"),
        },
    ),
    "prepares": (
        "forwardILb1E",
        {
            "P": Role("Prepare(", "prepare.h", "Prepare", loop="do {"),
            "X": Role("Invert(", "invert.h", "Invert"),
            "send": Role("Send{", "ring.h", "Send"),
            "loads": Role("LoadOwn{", "ring.h", "LoadOwn"),
        },
    ),
    "recurs": (
        "forwardILb1E",
        {"R": Role("RecurApart(", *LOOP_OF_R), "fetch": Role("Fetch{", "ring.h", "Fetch")},
    ),
}
Counts = dict[str, int]  # instructions by role

Frame = tuple[str, int]  # file and line
Stack = tuple[Frame, ...]  # where an instruction comes from: innermost first, each inlined into the next one


# Blocks that lie apart: what a wait does whose barrier is not ready at once, and what lanes do that have come apart.
SELDOM_BLOCK = re.compile(r"\bNANOSLEEP\b|\bWARPSYNC\.COLLECTIVE\b|\bENDCOLLECTIVE\b")


def instructions(disassembly: str) -> Iterator[Stack]:
    """Where each instruction comes from in what `nvdisasm -c -gi` says, but for those blocks."""
    stack: list[Frame] = []
    complete = True  # the next line of a file begins another stack
    block: list[Stack] = []
    seldom = False
    for line in [*disassembly.splitlines(), ".end:"]:
        if found := re.match(r'\s*//## File "([^"]+)", line (\d+)', line):
            if complete:
                stack = []
            stack.append((found[1].rsplit("/", 1)[-1], int(found[2])))
            complete = False
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+\S", line):
            complete = True
            block.append(tuple(stack))
            seldom = seldom or SELDOM_BLOCK.search(line) is not None
        elif re.match(r"\.\w+:", line):
            if not seldom:
                yield from block
            block, seldom = [], False


def end_of(text: str, start: int, opening: str, closing: str) -> int:
    """Past the bracket that closes the first opening one from `start` on."""
    depth, at = 0, text.index(opening, start)
    while True:
        depth += {opening: 1, closing: -1}.get(text[at], 0)
        at += 1
        if depth == 0:
            return at


def line_of(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


@dataclass(frozen=True)
class Source:
    """Of one file: the lines that seldom run, what is called seldom from a line that always runs, and its functions."""

    seldom_lines: frozenset[int]
    seldom_calls: dict[int, frozenset[str]]
    functions: tuple[tuple[int, int, str], ...]  # first and last line, and name

    @staticmethod
    def of(text: str) -> Source:
        text = re.sub(r"//.*", lambda comment: " " * len(comment[0]), text)
        lines: set[int] = set()
        calls: dict[int, frozenset[str]] = {}
        for found in re.finditer(r"\bif \((!?)seldom\(", text):
            condition = end_of(text, found.start(), "(", ")")
            start, end = statement(text, condition)
            if found[1]:  # what the other branch does is seldom
                other = re.compile(r"\s*else\b").match(text, end)
                if other is None:
                    continue
                condition = other.end()
                start, end = statement(text, condition)
            first, last = line_of(text, condition), line_of(text, end)
            lines.update(range(first + 1, last + 1 if text[start] != "{" else last))
            if line_of(text, start) == first and text[start] != "{":
                calls[first] = frozenset(re.findall(r"(\w+)\(", text[start:end]))
        functions = []
        for found in re.finditer(r"__forceinline__ [^;{}()=]*?(\w+)\(", text):
            body = end_of(text, found.end() - 1, "(", ")")
            if text.find("{", body) < 0:
                continue
            functions.append((line_of(text, found.start()), line_of(text, end_of(text, body, "{", "}")), found[1]))
        return Source(frozenset(lines), calls, tuple(functions))

    def function(self, line: int) -> str:
        inner = [each for each in self.functions if each[0] <= line <= each[1]]
        return max(inner)[2] if inner else ""


def statement(text: str, at: int) -> tuple[int, int]:
    """Where the statement from `at` on begins and ends."""
    start = at + len(text[at:]) - len(text[at:].lstrip())
    return start, end_of(text, start, "{", "}") if text[start] == "{" else text.index(";", start) + 1


def loop(text: str, role: Role) -> range:
    """The lines of the role's loop."""
    function = text.index(f" void {role.function}(", text.index(f"struct {role.struct} "))
    start = text.index(role.loop, function)
    return range(line_of(text, start), line_of(text, end_of(text, start, "{", "}")) + 1)


def section(disassembly: str, kernel: str) -> str:
    """The code of the kernel with this in its mangled name. Raises ValueError if there is not one."""
    found = [part for part in disassembly.split("\t.section\t")[1:] if re.match(rf"\.text\.\w*{kernel}", part)]
    if len(found) != 1:
        raise ValueError(f"{kernel}: expected the code of one kernel, got {len(found)}")
    return found[0]


def all_sizes(disassembly: str, folder: Path = SOURCES) -> dict[str, Counts]:
    """Instructions that run for every chunk, by group and role. Raises ValueError where a role has none."""
    return {group: sizes(section(disassembly, kernel), roles, folder) for group, (kernel, roles) in GROUPS.items()}


def sizes(disassembly: str, roles: dict[str, Role], folder: Path = SOURCES) -> Counts:
    """The same of one kernel's code."""
    texts = {path.name: path.read_text() for path in folder.glob("*.h")}
    sources = {name: Source.of(text) for name, text in texts.items()}
    starts = {
        line: name
        for line, text in enumerate(texts["forward.h"].splitlines(), 1)
        for name, role in roles.items()
        if role.start in text and ".run(" in text
    }
    loops = {name: (role.file, loop(texts[role.file], role)) for name, role in roles.items()}

    def seldom(stack: Stack) -> bool:
        for depth, (file, line) in enumerate(stack):
            source = sources.get(file)
            if source is None:
                continue
            if line in source.seldom_lines:
                return True
            if depth and line in source.seldom_calls:
                inner, at = stack[depth - 1]
                if inner in sources and sources[inner].function(at) in source.seldom_calls[line]:
                    return True
        return False

    result = Counter(dict.fromkeys(roles, 0))
    for stack in instructions(disassembly):
        for depth, (file, line) in enumerate(stack[1:], 1):
            role = starts.get(line) if file == "forward.h" else None
            if role is not None:
                own, lines = loops[role]
                within = any(inner == own and at in lines for inner, at in stack[:depth])
                result[role] += within and not seldom(stack[:depth])
    missing = [role for role, count in result.items() if not count]
    if missing:
        raise ValueError(
            f"no instructions of {', '.join(missing)}: is there line information, and are the names right?"
        )
    return dict(result)


def table(counts: dict[str, Counts]) -> str:
    def row(name: str, count: int) -> str:
        return f"{name:<15} {count:>5} {count * BYTES:>7} bytes\n"

    said = "instructions that run for every chunk, by multiprocessor and role\n"
    for group, of_roles in counts.items():
        said += "".join(row(f"{group} {role}", count) for role, count in of_roles.items())
        said += row(f"{group} total", sum(of_roles.values()))
    return said + row("limit", LIMIT)


def check(counts: dict[str, Counts]) -> None:
    """Raises ValueError if there are more than may be."""
    for group, of_roles in counts.items():
        if (total := sum(of_roles.values())) > LIMIT:
            raise ValueError(f"LIMIT: expected at most {LIMIT} instructions for every chunk, got {total} ({group})")


def tools() -> str | None:
    """PATH with cuobjdump and nvdisasm, which it calls: of PATH, of the CUDA toolkit, or those that Triton carries."""
    triton = importlib.util.find_spec("triton")
    carried = [str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")] if triton and triton.origin else []
    folders = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", *carried])
    return folders if all(shutil.which(name, path=folders) for name in ("cuobjdump", "nvdisasm")) else None


def disassemble(library: Path, path: str) -> str:
    environment = {**os.environ, "PATH": path}
    with tempfile.TemporaryDirectory() as folder:
        extract = [shutil.which("cuobjdump", path=path), "-xelf", "all", str(library.resolve())]
        subprocess.run(extract, check=True, cwd=folder, capture_output=True, env=environment)
        cubins = sorted(map(str, Path(folder).glob("*.cubin")))
        show = [shutil.which("nvdisasm", path=path), "-c", "-gi"]
        shown = [
            subprocess.run([*show, cubin], check=True, capture_output=True, text=True, env=environment)
            for cubin in cubins
        ]
    return "".join(one.stdout for one in shown)


def main(library: Path) -> None:
    """Print the table, and write it beside the library. Without the tools one line says so: a build needs none."""
    path = tools()
    try:
        said = table(all_sizes(disassemble(library, path))) if path else "loop size: no cuobjdump and nvdisasm here\n"
    except (ValueError, LookupError, OSError, subprocess.CalledProcessError) as error:
        said = f"loop size: not known: {error}\n"
    library.with_name("libflash_kda.loop.txt").write_text(said)
    print(said, end="")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
