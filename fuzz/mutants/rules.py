"""Rules: how sources are mutated. Each mutant is one change of the text of one file.

C++ is searched as text, without its comments and strings. Python is searched by its syntax tree.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = "flash_kda/model.py"
LEFT_OUT = ("ptx.h", "timeline.h", "flash_kda.h")  # replaced in the emulator, only measured, or only declared


@cache
def text_of(file: str) -> str:
    """A source as it was when it was first asked for: it may be edited while a run goes on."""
    return (ROOT / file).read_text()


@dataclass(frozen=True)
class Mutant:
    """Characters `start` to `end` of a file become `new`. rule: the name of the kind of change."""

    file: str
    rule: str
    start: int
    end: int
    old: str
    new: str
    line: int

    @property
    def id(self) -> str:
        """Stays the same while other lines of the file change."""
        text = text_of(self.file)
        begin = text.rfind("\n", 0, self.start) + 1
        line = text[begin:].partition("\n")[0]
        same_before = text[:begin].splitlines().count(line)
        told = f"{self.file} {self.rule} {line} {same_before} {self.start - begin} {self.old} {self.new}"
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    def apply(self, text: str) -> str:
        """The text of the file with the change. Raises ValueError if the text is another one."""
        if text[self.start : self.end] != self.old:
            raise ValueError(f"{self.file}: expected {self.old!r} at character {self.start}; the source has changed")
        return text[: self.start] + self.new + text[self.end :]


@dataclass(frozen=True)
class Rule:
    """A pattern of C++, and what its match becomes: a template for `re.Match.expand`."""

    name: str
    pattern: str
    new: str


PART = r"[A-Za-z_][\w.]*(?:\[[\w.]+\])?|\d+"  # a name, a member, an element, or a number
CONSTANT = r"(?:k[A-Z]\w*|\d+)\b"

OF_NUMBERS = "pack_bf16|short_boundary|swizzled|sync_threads"
"""Functions whose arguments can be swapped: other ones take an object, and would not compile."""


RULES = (
    Rule(
        "wait removed",
        r"(?<![\w.:])(?<!= )(?!__shfl|__all|__any|__ballot|fence)(?:\w+(?:::|\.))*\w*(?:sync|wait)\w*(?:<\w+>)?"
        r"\((?:[^;{}]|\n)*\);",
        ";",
    ),
    Rule("arrival removed", r"(?<![\w.:])(?:\w+(?:::|\.))*\w*(?:arrive|warp_done)\w*\((?:[^;{}]|\n)*\);", ";"),
    Rule("fence removed", r"\b(?:\w+::)*\w*fence\w*\([^;{}]*\);", ";"),
    Rule("< for <=", r" < (?=[\w(])", " <= "),
    Rule("< for <=", r" <= ", " < "),
    Rule("< for <=", r" > (?=[\w(])", " >= "),
    Rule("< for <=", r" >= ", " > "),
    Rule("off by one", r"(?<![\w.])(\d+)(?![\w.])", r"(\1 + 1)"),
    Rule("off by one", r"\[(?!k[A-Z])([a-z]\w*)\]", r"[\1 + 1]"),
    Rule(
        "operands swapped",
        rf"(?<![\w.\])] )\b(?!{CONSTANT} . {CONSTANT})({PART}) ([-/%]) ({PART})(?![\w.\[(])",
        r"\3 \2 \1",
    ),
    Rule("operands swapped", rf"\b({OF_NUMBERS})\(({PART}), ({PART})\)", r"\1(\3, \2)"),
    Rule("sign flipped", r" \+ ", " - "),
    Rule("sign flipped", r"(?<=[\w\])]) - ", " + "),
    Rule("sign flipped", r"(?<=[(,=] )-(?=[A-Za-z(])", ""),
    Rule("parity flipped", r"\b((?:\w+\.)+parity)\b(?! =)", r"(\1 ^ 1)"),
    Rule("parity flipped", r"(% 2|& 1)(?=[);, ])", r"\1 ^ 1"),
    Rule("mask dropped", r"\bif \(((?:[^(){};]|\([^(){};]*\))*<(?:[^(){};]|\([^(){};]*\))*)\)", "if (true)"),
    Rule("mask dropped", rf"(?<=[=(,] )((?:[^?;{{}}(),=]|\([^?;{{}}()]*\))+) \? ({PART}) : (0(?:\.f)?)", r"\2"),
    Rule("loop one short", r"(?<=; )(\w+) < ([^;{}]+)(?=; (?:\+\+|\w+ \+= ))", r"\1 < (\2) - 1"),
    Rule("loop one short", r"(?<=for \(int )(\w+) = 0(?=; )", r"\1 = 1"),
    Rule("rounding left out", r"\brounded_to_tf32\(", "("),
    Rule(
        "rounding doubled",
        r"(?<=\bfloat )(\w+) = ([^;,?{}\[]* \* [^;,?{}\[]*)(?=;)",
        r"\1 = unpack_bf16(pack_bf16(\2, 0.f)).x",
    ),
    Rule(
        "rounding doubled",
        r"([A-Za-z]\w*\[[^\[\];]+\]) \*= ([A-Za-z][\w\[\]]*\.[xyzw])(?=[;,])",
        r"\1 = unpack_bf16(pack_bf16(\1 * \2, 0.f)).x",
    ),
)


def sources() -> list[str]:
    """Files that mutants are made of: what the emulator runs, and the model."""
    kernel = sorted(path for path in (ROOT / "csrc").rglob("*.h") if path.name not in LEFT_OUT)
    return [str(path.relative_to(ROOT)) for path in kernel] + [MODEL]


def mutants(file: str) -> list[Mutant]:
    """All of one file."""
    text = text_of(file)
    found = of_python(text) if file.endswith(".py") else of_cpp(text)
    return [
        Mutant(file, rule, start, end, text[start:end], new, text.count("\n", 0, start) + 1)
        for rule, start, end, new in found
        if text[start:end] != new
    ]


def drawn(count: int, seed: int, files: list[str], without: Collection[str] = ()) -> list[Mutant]:
    """`count` of them without repetition: a rule at random, then one of its mutants at random.

    A change of some lines of the sources leaves most of the draw as it was. without: ids of those that are not drawn.
    """
    by_rule: dict[str, list[Mutant]] = {}
    for mutant in (each for file in files for each in mutants(file)):
        if mutant.id not in without:
            by_rule.setdefault(mutant.rule, []).append(mutant)
    draw, chosen = random.Random(seed), []
    for of_rule in by_rule.values():
        of_rule.sort(key=lambda mutant: hashlib.sha256(f"{seed} {mutant.id}".encode()).digest())
    while len(chosen) < count and by_rule:
        rule = draw.choice(sorted(by_rule))
        chosen.append(by_rule[rule].pop())
        if not by_rule[rule]:
            del by_rule[rule]
    return chosen


def of_cpp(text: str) -> Iterator[tuple[str, int, int, str]]:
    code = re.sub(
        r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|^\s*#[^\n]*|static_assert\([^;]*\);|template <[^\n]*>"
        r"|\b(?:float|uint32_t) \(?&?\w+\)?(?:\[\d+\])+",  # what has another size takes part in no call
        lambda match: re.sub(r"[^\n]", "\x00", match[0]),
        text,
        flags=re.DOTALL | re.MULTILINE,
    )
    seen = set()
    for rule in RULES:
        for match in re.finditer(rule.pattern, code):
            new = match.expand(rule.new)
            if "\x00" not in match[0] and (match.span(), new) not in seen:
                seen.add((match.span(), new))
                yield rule.name, *match.span(), new


COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}
OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.MatMult: "@"}
MASKS = {"where": "{0}", "tril": "{0}", "clamp": "{0}"}


WHOLE = {"row", "tokens", "batch", "i", "position", "lower_bound"}
"""Names of the model, beside constants, that stand for no tensor of fp32: they cannot be rounded."""


def is_whole(node: ast.BinOp) -> bool:
    names = [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]
    return isinstance(node.left, ast.List) or all(name.isupper() or name in WHOLE for name in names)


def of_python(text: str) -> Iterator[tuple[str, int, int, str]]:
    """Docstrings, type hints and module constants but the first ones are left alone."""
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    if len(text) != len(text.encode()):
        raise ValueError(f"{MODEL}: expected ASCII")
    tree = ast.parse(text)

    def span(node) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def code(node) -> str:
        return text[slice(*span(node))]

    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in (inner for function in functions for part in function.body for inner in ast.walk(part)):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS and len(node.ops) == 1:
            left, right = code(node.left), code(node.comparators[0])
            yield "< for <=", *span(node), f"{left} {COMPARISONS[type(node.ops[0])]} {right}"
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield "off by one", *span(node), f"({node.value} + 1)"
        elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            left, right, sign = code(node.left), code(node.right), OPERATORS[type(node.op)]
            if sign in "-/@":
                yield "operands swapped", *span(node), f"(({right}) {sign} ({left}))"
            if sign in "+-":
                yield "sign flipped", *span(node), f"(({left}) {'-' if sign == '+' else '+'} ({right}))"
            if sign in "*@" and not is_whole(node):
                yield "rounding doubled", *span(node), f"(({left}) {sign} ({right})).bfloat16().float()"
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield "sign flipped", *span(node), f"({code(node.operand)})"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, called = code(node.func.value), node.func.attr
            if owner == "FORMATS" and len(node.args) == 1:
                yield "rounding left out", *span(node), f"({code(node.args[0])})"
            elif called in MASKS:
                yield "mask dropped", *span(node), owner
        elif isinstance(node, ast.Call) and code(node.func) == "range":
            *first, last = (code(each) for each in node.args)
            yield "loop one short", *span(node), f"range({', '.join([*first, f'({last}) - 1'])})"
