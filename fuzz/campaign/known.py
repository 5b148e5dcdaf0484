"""Known failures: a file that lists the failures of targets, with reasons. They do not count for the verdict.

    # target        check                      reason
    mine:fwd        heads                      sums are ordered by the number of heads
    mine:fwd        accuracy keys=equal        the inverse is in bf16, see issue 12
    mine:fwd        arguments/lower_bound-*    checked by the caller

One failure a line: target, check, fields that the case has, and the reason. A check may have the class of its error
after a colon, as in "accuracy:state" or "raised:RuntimeError". A name with a slash is a row of a report card. Target
and check may have * and ?.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path

from fuzz.campaign.findings import INTERMITTENT, Failure, error_class
from fuzz.cases.case import Case
from fuzz.targets.promises import POSSIBLE_VALUES, bare

FIELDS = tuple(each.name for each in fields(Case))


class KnownError(ValueError):
    """A file of known failures cannot be read, or a line of it makes no sense; the message says which."""


@dataclass(frozen=True)
class Entry:
    """One line. of_case: fields of a case with the words that these have."""

    line: int
    target: str
    check: str
    of_case: tuple[tuple[str, str], ...]
    reason: str

    def covers(self, target: str, checks: tuple[str, ...], case: Case) -> bool:
        """checks: the names under which the failure goes."""
        of_check = self.is_about(target) and any(fnmatchcase(check, self.check) for check in checks)
        return of_check and all(str(getattr(case, name)) == word for name, word in self.of_case)

    def is_about(self, target: str) -> bool:
        """Whether it names the target, with or without the promises of the command line."""
        return any(fnmatchcase(name, self.target) for name in (target, bare(target)))

    def gone(self, path: Path | None) -> str:
        """A line that says that it was not met."""
        what = " ".join([self.check, *("=".join(pair) for pair in self.of_case)])
        return f"{path}:{self.line}: {self.target} {what}: did not fail; if it cannot any more, remove it"


@dataclass
class Known:
    """The known failures, and which of them were met. The empty one knows nothing."""

    path: Path | None = None
    entries: tuple[Entry, ...] = ()
    met: set[Entry] = field(default_factory=set)

    def reason(self, target: str, checks: tuple[str, ...], case: Case) -> str:
        """Why this failure is known; empty where it is not. An entry counts as met from then on."""
        for entry in self.entries:
            if entry.covers(target, checks, case):
                self.met.add(entry)
                return entry.reason
        return ""

    def gone(self, targets: set[str], *, rungs: Collection[str] = (), alone: bool = False) -> Iterator[str]:
        """A line for each entry about these targets that was not met.

        rungs: those of a report card, whose rows are looked at as well. alone: at nothing but these rows.
        """
        for entry in self.entries:
            rung, row, _ = entry.check.partition("/")
            looked_at = any(fnmatchcase(name, rung) for name in rungs) if row else not alone
            if looked_at and entry not in self.met and any(entry.is_about(target) for target in targets):
                yield entry.gone(self.path)

    def covering(self, failure: Failure) -> Iterator[Entry]:
        """The entries that a failure would be known by."""
        for entry in self.entries:
            if entry.covers(failure.target, names_of(failure), failure.case):
                yield entry


def read(path: Path | None) -> Known:
    """The known failures of a file; none without one. Raises KnownError."""
    if path is None:
        return Known()
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise KnownError(
            f"--known: expected a text file, got {path}: {getattr(error, 'strerror', None) or error}"
        ) from error
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        target, check, rest = words[0], "".join(words[1:2]), words[2:]
        of_case = []
        while rest and re.fullmatch(r"\w+=\S*", rest[0]):  # a misspelt one in the reason would cover every case
            name, _, word = rest.pop(0).partition("=")
            if name not in FIELDS:
                raise KnownError(
                    f"--known {path}:{number}: expected a field of a case among {', '.join(FIELDS)}, got {name!r}"
                )
            values = tuple(map(str, POSSIBLE_VALUES.get(name, ())))
            if values and word not in values:
                raise KnownError(f"--known {path}:{number}: {name}: expected one of {', '.join(values)}, got {word!r}")
            of_case.append((name, word))
        if not rest:
            raise KnownError(f"--known {path}:{number}: expected TARGET CHECK [FIELD=VALUE]... REASON, got {line!r}")
        if not any(letter.isalpha() for letter in check):
            raise KnownError(f"--known {path}:{number}: expected the name of a check, got {check!r}")
        entries.append(Entry(number, target, check, tuple(of_case), " ".join(rest)))
    return Known(path, tuple(entries))


def names_of(failure: Failure) -> tuple[str, ...]:
    """The names that a failure goes under: its check, the same with the class of its error, and "intermittent"."""
    name = failure.check["name"]
    return name, f"{name}:{error_class(failure.check)}", *([INTERMITTENT] if failure.intermittent else [])
