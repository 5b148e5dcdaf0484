"""The record of a self-check: everything that is known so far, in one JSON file, and the state of the code it is of."""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fuzz.campaign.job import Result
from fuzz.files import lines_of, write_whole

RECORD_VERSION = 2
ROOT = Path(__file__).resolve().parents[2]

# What a result depends on: the file of a self-check holds those of one state of these alone.
DIGESTED = (
    *("oracle/*.py", "fuzz/defects/*.py", *(f"flash_kda/{name}.py" for name in ("arguments", "formats", "model"))),
    *("fuzz/cases/*.py", "fuzz/judging/*.py"),
    *(f"fuzz/campaign/{name}.py" for name in ("pool", "smallest_case", "worker")),
    "fuzz/targets/registry.py",
)

ON_A_DEVICE = ("csrc/*.*", "csrc/*/*.*", "flash_kda/*.py", "fuzz/defects/device.py")
"""What only kernels depend on: the model is called behind `check_arguments`, and not through the public door."""


class SelfCheckError(ValueError):
    """A self-check cannot be run as asked; the message is one line that says why."""


@dataclass
class Hunt:
    """What became of one defect with the cases of one seed. All counts are of cases, 1 for the first.

    found: until any check failed, and by: which. right: until one that should find it failed, and right_by: which.
    judged: how many there were. case: the one that `right` counts to.
    """

    defect: str
    seed: int
    judged: int = 0
    found: int | None = None
    by: list[str] = field(default_factory=list)
    right: int | None = None
    right_by: list[str] = field(default_factory=list)
    case: dict | None = None

    def take(self, result: Result, expected: Sequence[str]) -> None:
        self.judged += 1
        failed = [check["name"] for check in result.failed_checks]
        if failed and self.found is None:
            self.found, self.by = self.judged, failed
        if found := [check for check in failed if check in expected]:
            self.right, self.right_by, self.case = self.judged, found, result.case.to_dict()

    def to_dict(self, *, with_case: bool) -> dict:
        """For the file, without what is empty."""
        fields = asdict(self) if with_case else {**asdict(self), "case": None}
        return {name: value for name, value in fields.items() if value is not None and value != []}


@dataclass
class Alarms:
    """A correct target: cases judged, skipped, and what failed although nothing is wrong."""

    target: str
    judged: int = 0
    skipped: int = 0
    failures: list[dict] = field(default_factory=list)

    @property
    def cases(self) -> int:
        return self.judged + self.skipped


@dataclass
class Record:
    """Everything that is known so far, as it is in the file."""

    sources: str
    profile: str
    cases: int
    environment: dict = field(default_factory=dict)
    hunts: dict[str, dict[int, Hunt]] = field(default_factory=dict)
    shrunk: dict[str, dict] = field(
        default_factory=dict
    )  # defect -> tokens, heads, check, finished, case: how it differs from the plain one
    noise: dict[str, dict[str, Hunt]] = field(default_factory=dict)  # family -> name of the noise -> hunt
    alarms: dict[str, Alarms] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """For the file: one entry for each defect and seed. A case that is not needed any more is left out."""
        hunts = [
            hunt.to_dict(with_case=defect not in self.shrunk)
            for defect, by_seed in self.hunts.items()
            for hunt in by_seed.values()
        ]
        noise = {
            family: {key: [hunt.judged, hunt.right] for key, hunt in found.items()}
            for family, found in self.noise.items()
        }
        return {"version": RECORD_VERSION, **asdict(self), "hunts": hunts, "noise": noise}

    @classmethod
    def from_dict(cls, data: dict) -> Record:
        hunts: dict[str, dict[int, Hunt]] = {}
        for entry in data["hunts"]:
            hunts.setdefault(entry["defect"], {})[entry["seed"]] = Hunt(**entry)
        noise = {
            family: {key: Hunt(key, 0, judged, right=right) for key, (judged, right) in found.items()}
            for family, found in data["noise"].items()
        }
        alarms = {target: Alarms(**found) for target, found in data["alarms"].items()}
        given = {key: value for key, value in data.items() if key != "version"}
        return cls(**{**given, "hunts": hunts, "noise": noise, "alarms": alarms})


def sources(device: bool) -> str:
    """Which state of the code the results belong to: a digest of all that they depend on."""
    digest = hashlib.sha256()
    patterns = (*DIGESTED, *ON_A_DEVICE) if device else DIGESTED
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    if not device:
        paths.discard(ROOT / "fuzz/defects/device.py")
    for path in sorted(paths):
        digest.update(f"{path.relative_to(ROOT)}\n{code_of(path)}\n".encode())
    return digest.hexdigest()[:16]


def code_of(path: Path) -> str:
    """What a source does: the syntax tree of Python without docstrings, and other sources without comments."""
    text = path.read_text()
    if path.suffix != ".py":
        return " ".join(re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.S).split())
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [each for each in node.body if not is_text(each)] or [ast.Pass()]
    return tree_as_text(tree)


def tree_as_text(node: object) -> str:
    """A syntax tree, alike for all versions of Python: newer ones have more fields, empty for older sources."""
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return f"{type(node).__name__}({', '.join(f'{name}={tree_as_text(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{', '.join(map(tree_as_text, node))}]"
    return repr(node)


def is_text(node: ast.stmt) -> bool:
    """Whether a statement is a string alone, which is a docstring and does nothing."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def load(path: Path) -> Record:
    """The record in a file. Raises SelfCheckError when it holds something else, OSError when it cannot be read."""
    try:
        data = json.loads(path.read_text())
        if data["version"] != RECORD_VERSION:
            raise SelfCheckError(f"{path}: expected a self-check of version {RECORD_VERSION}, got {data['version']!r}")
        return Record.from_dict(data)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise SelfCheckError(
            f"{path}: expected the file of a self-check, got another one ({type(error).__name__}: {error})"
        ) from error


def save(path: Path, record: Record) -> None:
    """Whole or not at all: under another name first."""
    write_whole(path, lines_of(record.to_dict(), depth=2, longest=900))
