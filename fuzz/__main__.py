"""Fuzzer and judge for kernels of Kimi Delta Attention.

Exit status: 0 nothing disagreed, 1 something did, 2 nothing was judged or the command could not be carried out.
"""

from __future__ import annotations

import bdb
import os
import sqlite3
import sys

import typer

from fuzz.commands import conform, mutants, replay, run, self_check
from fuzz.commands.options import AGREED, INTERRUPTED, NOT_DONE

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, help=__doc__)
for command in (run.run, replay.replay, replay.minimize, run.report, conform.conform):
    app.command()(command)
app.command("self-check")(self_check.self_check)
app.command()(mutants.mutants)
app.command()(conform.targets)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status. An error is one line on stderr; no arguments show the help."""
    from fuzz.campaign.job import WorkerError

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = app(arguments or ["--help"], prog_name="python -m fuzz", standalone_mode=False) or AGREED
        if status != INTERRUPTED:
            return status
        message = "interrupted"
    except (ValueError, sqlite3.Error, WorkerError) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (KeyboardInterrupt, bdb.BdbQuit):  # a person at the keyboard, or at a debugger
        message = "interrupted"
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own errors have it, in every version
            raise
        message = error.format_message()
    lines = message.strip().splitlines() or ["failed"]
    print(f"python -m fuzz: {' '.join(line.strip() for line in lines)}", file=sys.stderr)
    return NOT_DONE


def console() -> int:
    """The console script `kda-fuzz`: targets are found in the working directory, as with `python -m fuzz`."""
    sys.path.insert(0, os.getcwd())
    return main()


if __name__ == "__main__":
    sys.exit(main())
