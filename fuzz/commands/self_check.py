"""`python -m fuzz self-check`: planted defects, and what finds them."""

from __future__ import annotations

from pathlib import Path

import typer

from fuzz.commands.options import AGREED, DISAGREED, NOT_DONE, expect, expect_jobs, option

DEVICE_JOBS = 4  # on a GPU: a kernel that hangs takes its share of the time from all others


def self_check(
    defect: list[str] | None = option(None, "NAME", "Planted defect; repeatable. Default: all."),
    seeds: int = option(5, "N", "Number of seeds for each defect."),
    cases: int = option(500, "N", "Greatest number of cases for each defect and seed."),
    device: bool = option(False, None, "Defects of device code, on a GPU, instead of those on a CPU.", "--device"),
    noise: bool = option(False, None, "Search for the smallest error that is seen.", "--noise"),
    false_alarms: int = option(0, "N", "Number of cases on which each correct target is judged."),
    jobs: int | None = option(
        None, "N", f"Number of worker processes. Default: one per core, with --device {DEVICE_JOBS} at most."
    ),
    out: Path | None = option(
        None, "FILE", "JSON file, resumed if it exists, with a page beside it. Default: a new folder in runs/."
    ),
    publish: bool = option(False, None, "Results in docs/ of this checkout, resumed if they exist.", "--publish"),
    campaign: list[Path] | None = option(
        None, "PATH", "Run folder, or file of campaigns, for the table of all numbers; nothing is measured. Repeatable."
    ),
) -> None:
    """Plant defects, and measure what finds them.

    The file and its page say which check finds each defect, and after how many cases.
    """
    from fuzz.campaign.devices import cores
    from fuzz.campaign.run_folder import new_folder
    from fuzz.self_check import report as reporting
    from fuzz.self_check import run as checking
    from fuzz.self_check.record import ROOT

    for name, value in {"--seeds": seeds, "--cases": cases}.items():
        expect(value >= 1, name, "1 or more", value)
    expect_jobs(jobs, cores())
    expect(false_alarms >= 0, "--false-alarms", "0 or more", false_alarms)
    expect(not (out and publish), "--out and --publish", "one of them", "both")
    name = "self_check_device.json" if device else "self_check.json"
    if publish:
        out = ROOT / "docs" / "data" / name
        expect(out.parent.is_dir(), "--publish", "a checkout with docs/data", ROOT)
    if campaign:
        print(reporting.add_to_table(campaign, out))
        return
    defects = tuple(dict.fromkeys(defect or ()))
    jobs = jobs or (min(DEVICE_JOBS, cores()) if device else cores())
    if out is None:
        checking.expect_defects(defects, device)  # before a folder is made
        out = new_folder(Path("runs"), "self_check-") / name
    plan = checking.SelfCheckPlan(out, defects, seeds, cases, jobs, device, noise, false_alarms)
    with reporting.live() as show:
        progress = checking.run_self_check(plan, show)
    fine = reporting.conclude(progress)
    raise typer.Exit(NOT_DONE if progress.interrupted else AGREED if fine else DISAGREED)
