"""Options that several commands share, their checks, and the exit statuses."""

from __future__ import annotations

import re

import typer

AGREED, DISAGREED, NOT_DONE = 0, 1, 2
INTERRUPTED = 130  # what typer makes of Ctrl-C
MOST_JOBS = 4  # worker processes for each core


def option(default, metavar: str | None, text: str, *names: str):
    """An option of a command with its default, the word for its value (None for a flag), and its help."""
    return typer.Option(default, *names, metavar=metavar, help=text)


TARGET_OPTION = option(
    None,
    "NAME",
    "Target under test: built in, package.module:function or path/to/file.py:function; repeatable. Default: flash_kda.",
)
ONE_TARGET = option(None, "NAME", "Target to judge. Default: the target of the finding, or flash_kda.")
PROMISE = option(
    None,
    "NAME=VALUE",
    "Promise of the named targets, such as operands=fp32, heads=no or chunk=none; repeatable. "
    "Default: their attribute promises, or everything.",
)
KNOWN = option(None, "FILE", "File of known failures: TARGET CHECK REASON, one a line.")
TIME_LIMIT = option("60s", "TIME", "Time limit for one target on one case.")


class UsageError(ValueError):
    """An option makes no sense; the message is one line."""


def with_promises(targets: list[str] | None, promises: list[str] | None) -> list[str]:
    """The names of the targets, followed by what they promise, as `fuzz.targets.registry.load_target` reads it."""
    expect(bool(targets) or not promises, "--promise", "a target with --target that it is a promise of", "none")
    return [",".join([target, *(promises or ())]) for target in targets or ()]


def expect(condition: bool, option: str, expected: str, got: object) -> None:
    """Raises UsageError unless the condition holds."""
    if not condition:
        raise UsageError(f"{option}: expected {expected}, got {got}")


def seconds(option: str, text: str) -> float:
    """The seconds in "90", "90s", "5m" or "2h". Raises UsageError unless they are more than 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    value = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    expect(0 < value < 1e8, option, "a time greater than 0, such as 60s, 5m or 2h", text)
    return value


def expect_jobs(jobs: int | None, cores: int) -> None:
    """Raises UsageError for more worker processes than this machine can start within a few minutes."""
    most = MOST_JOBS * cores
    expect(jobs is None or 1 <= jobs <= most, "--jobs", f"1 to {most} ({MOST_JOBS} for each of {cores} cores)", jobs)
