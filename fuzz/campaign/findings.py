"""Findings: folders with everything that reproduces a failure.

    case.json            the smallest case that fails
    original.json        the case that the campaign failed on
    inputs.safetensors   the exact inputs of the smallest case
    finding.json         target with its file and references, check, errors and bounds, properties, environment, and the
                         command that replays it;
                         of a target that raised, its traceback and the settings of the process; of a failure that does
                         not repeat, how often it does
    error_map.json       where the errors are, for the report
    repro.py             a call of the target on these inputs, without this harness

A folder is written under another name, brought to the disk, and then renamed: it is there whole or not at all.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.campaign.job import Result
from fuzz.campaign.repro import repro
from fuzz.cases.case import Case
from fuzz.cases.families import FAMILIES
from fuzz.files import lines_of
from fuzz.text import first_line

FINDING_VERSION = 1
ERROR_MAP = "error_map.json"
UNJUDGED = ("raised", "timeout", "died", "harness")  # checks whose detail is 'class: explanation'
INTERMITTENT = (
    "intermittent"  # of a failure that does not repeat on the same inputs: its group, and its finding's state
)
PACKAGES = ("torch", "numpy", "hypothesis", "triton", "fla-core", "safetensors")


class FindingError(ValueError):
    """A file or a folder is no finding and no case; the message is one line that says which and why."""


@dataclass(frozen=True)
class Failure:
    """One failed check of one target on one case."""

    case: Case
    target: str
    check: dict  # fuzz.judging.verdict.Check as a dict
    properties: tuple[str, ...]  # that were being checked
    error_map: dict | None = field(default=None, compare=False)  # of `fuzz.judging.error_map`
    context: dict | None = field(default=None, compare=False)  # of `Result`
    repeats: tuple[int, int] | None = None  # how often it failed again on the same inputs, and of how many times

    @property
    def intermittent(self) -> bool:
        """Whether it did not fail each time on the same inputs."""
        return self.repeats is not None and self.repeats[0] < self.repeats[1]

    @property
    def group(self) -> tuple[str, str, str]:
        """What failed. Of the failures that are alike in this, `needs` of the smallest tells the families apart.

        Chance decides which check sees an intermittent fault, so those of one target are all alike.
        """
        if self.intermittent:
            return self.target, INTERMITTENT, ""
        return self.target, self.check["name"], error_class(self.check)


def failures(result: Result) -> list[Failure]:
    return [
        Failure(result.case, result.target, check, result.properties, result.error_map, result.context, result.repeats)
        for check in result.failed_checks
    ]


def first_failure(result: Result) -> Failure | None:
    """What a result is counted under: a target that is wrong by the oracle breaks most properties for that reason."""
    return next(iter(failures(result)), None)


def error_class(check: dict) -> str:
    """What kind of failure a check met: the exception, the signal, or whether `out` or the state is beyond its bounds.

    "out" and "out_window" are both of "out", so a bug that is seen now in the one and now in the other is one group.
    """
    if check["name"] in UNJUDGED:
        return check["detail"].partition(":")[0]
    if check["name"] in ("accuracy", "gain"):
        bounds = check["bounds"]
        beyond = (name for name, error in check["errors"].items() if name in bounds and not error <= bounds[name])
        return next(beyond, "").split("_")[0]
    return ""


def needs(case: Case) -> dict[str, str]:
    """The families of a case that are not the plain ones: of a shrunk case, those that the failure depends on."""
    return {name: getattr(case, name) for name, names in FAMILIES.items() if getattr(case, name) != names[0]}


def family(needed: Mapping[str, str]) -> str:
    """Families in words, such as "keys equal, gates resets"; empty for the plain ones."""
    return ", ".join(f"{name} {value}" for name, value in needed.items())


def finding_id(failure: Failure, digest: str) -> str:
    """A folder name that says what it holds."""
    words = (*failure.group, digest[:8])
    return "-".join(re.sub(r"[^\w.]+", "_", word) for word in words if word)


def environment(devices: Sequence[str] = ()) -> dict:
    """Versions, machine, devices and the commit of the project: what a failure may depend on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "devices": list(devices),
        "versions": {name: _version(name) for name in PACKAGES},
        "git": _git_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout this file is in, with "-dirty" when tracked files differ; None outside a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def save(
    folder: Path,
    failure: Failure,
    original: Case,
    *,
    environment: dict,
    write_inputs: Callable[[Path], None],
    state: str = "waiting",
    previous: Sequence[str] = (),
    origin: Mapping[str, object] | None = None,
) -> None:
    """Writes a finding, replacing what an earlier call wrote there; the inputs of the same case stay what they are.

    origin: "file", where the target came from, and "folder", the working directory; "reference", whether it had no say
    in the verdict; "beside", the names of the references that were judged on the same cases.
    """
    new = folder.with_name(f".new-{folder.name}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    _write_json(new / "case.json", failure.case.to_dict())
    _write_json(new / "original.json", original.to_dict())
    if folder.exists() and load_case_file(folder / "case.json", inputs_saved=True).case == failure.case:
        shutil.copyfile(folder / "inputs.safetensors", new / "inputs.safetensors")
    else:
        write_inputs(new / "inputs.safetensors")
    check = failure.check
    finding = {
        "version": FINDING_VERSION,
        "target": failure.target,
        "check": check["name"],
        "error_class": error_class(check),
        "detail": check["detail"],
        "errors": check["errors"],
        "bounds": check["bounds"],
        "properties": list(failure.properties),
        "repeats": failure.repeats,
        **(failure.context or {}),
        "shrunk": state == "shrunk",
        "state": state,
        "previous": list(previous),
        **(origin or {}),
        "environment": environment,
        "replay": f"python -m fuzz replay {folder}",
    }
    _write_json(new / "finding.json", finding)
    if failure.error_map:
        _write_json(new / ERROR_MAP, failure.error_map)
    (new / "repro.py").write_text(repro(failure, str((origin or {}).get("folder", ""))))
    for path in (*new.iterdir(), new):
        _to_disk(path)
    if folder.exists():
        # Two folders cannot change places in one step: for a moment both are there under other names, which
        # `recover` puts right after a kill in between.
        old = folder.with_name(f".old-{folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        new.rename(folder)
        _to_disk(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    else:
        new.rename(folder)
        _to_disk(folder.parent)


def recover(folder: Path, *, tidy: bool = False) -> None:
    """Gives back their names to findings whose replacement was cut short by a kill.

    tidy: also removes what was only half written. Nobody may be writing there.
    """
    for old in folder.glob(".old-*"):
        place = old.with_name(old.name.removeprefix(".old-"))
        with suppress(FileNotFoundError):  # the writer is at work, and has just done it
            if not place.exists():
                old.rename(place)
    if tidy:
        for half in (*folder.glob(".new-*"), *folder.glob(".old-*")):
            shutil.rmtree(half)


def load_failure(saved: SavedFinding) -> Failure:
    """The failure that a finding was saved for."""
    finding = saved.finding or {}
    check = {
        "name": finding["check"],
        "passed": False,
        "errors": finding.get("errors", {}),
        "bounds": finding.get("bounds", {}),
        "detail": finding.get("detail", ""),
    }
    context = {key: finding[key] for key in ("traceback", "settings") if key in finding}
    repeats = tuple(finding["repeats"]) if finding.get("repeats") else None
    properties = tuple(finding["properties"])
    return Failure(saved.case, finding["target"], check, properties, error_map_of(saved.path), context or None, repeats)


def error_map_of(folder: Path) -> dict | None:
    """The error map of a finding; None where it has none."""
    path = folder / ERROR_MAP
    if path.exists():
        return _read_json(path)
    return _read_json(folder / "finding.json").get("error_map")  # where it was kept before


def _write_json(path: Path, value) -> None:
    path.write_text(lines_of(value, depth=1, allow_nan=True))


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class SavedFinding:
    """Something that can be replayed. `finding` and `inputs` are None for a bare case file."""

    path: Path
    case: Case
    inputs: Path | None = None
    finding: dict | None = None


def is_intermittent(saved: SavedFinding) -> bool:
    """Whether it is a finding that did not fail each time on the same inputs."""
    return saved.finding is not None and saved.finding.get("state") == INTERMITTENT


def origin_of(saved: SavedFinding) -> dict[str, object]:
    """What a finding says of where it comes from, as `save` takes it; older findings say nothing."""
    return {
        key: saved.finding[key] for key in ("file", "folder", "reference", "beside") if key in (saved.finding or {})
    }


def load(path: Path) -> SavedFinding:
    """A finding folder or a case file. Raises FindingError."""
    if path.is_dir() and not (path / "finding.json").exists():
        raise FindingError(f"{path}: expected a finding's folder or a case file, got a folder without finding.json")
    return load_finding(path) if path.is_dir() else load_case_file(path)


def load_finding(folder: Path) -> SavedFinding:
    finding = _read_json(folder / "finding.json")
    missing = [key for key in ("target", "check", "properties") if key not in finding]
    if missing or finding.get("version") != FINDING_VERSION:
        got = f"one without {', '.join(missing)}" if missing else f"version {finding.get('version')!r}"
        raise FindingError(f"{folder / 'finding.json'}: expected a finding of version {FINDING_VERSION}, got {got}")
    inputs = folder / "inputs.safetensors"
    if not inputs.is_file():
        raise FindingError(
            f"{inputs}: expected the inputs of the finding, got no file; without them it cannot be replayed"
        )
    return SavedFinding(folder, load_case_file(folder / "case.json", inputs_saved=True).case, inputs, finding)


def load_case_file(path: Path, *, inputs_saved: bool = False) -> SavedFinding:
    """A file with a case, bare or as a fixture: {"why": ..., "case": {...}}.

    inputs_saved: the case may be of another generator, see `Case.from_dict`.
    """
    value = _read_json(path)
    fields = value["case"] if isinstance(value.get("case"), dict) else value
    try:
        return SavedFinding(path, Case.from_dict(fields, inputs_saved=inputs_saved))
    except (ValueError, TypeError) as error:
        raise FindingError(f"{path}: {first_line(str(error))}") from error


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FindingError(f"{path}: expected a file or a folder, got none") from error
    except (OSError, UnicodeDecodeError) as error:
        raise FindingError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except json.JSONDecodeError as error:
        raise FindingError(f"{path}: expected JSON, got other text: {error}") from error
    if not isinstance(value, dict):
        raise FindingError(f"{path}: expected a case or a finding, got a JSON {type(value).__name__}")
    return value


def find(path: Path) -> list[SavedFinding]:
    """Everything to replay at `path`: itself, or all findings and case files in the folder and below it."""
    if not path.exists():
        raise FindingError(f"{path}: expected a file or a folder, got none")
    if not path.is_dir():
        return [load_case_file(path)]
    recover(path)
    if (path / "finding.json").exists():
        return [load_finding(path)]
    if any((path / name).exists() for name in ("campaign.sqlite", "conform.json")) and (path / "findings").is_dir():
        path = path / "findings"  # of a run folder or a card's, which hold other JSON files too
    found = []
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            found += _below(entry)
        elif entry.suffix == ".json":
            found.append(load_case_file(entry))
    if not found:
        raise FindingError(f"{path}: expected a finding or a case file, got a folder without any")
    return found


def _below(folder: Path) -> list[SavedFinding]:
    try:
        return find(folder)
    except FindingError:
        if (folder / "finding.json").exists() or any(folder.rglob("*.json")):
            raise
        return []
