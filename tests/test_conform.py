"""A card grades a target for its own faults, whatever it does."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from test_ladder import ROWS

from fuzz.__main__ import main
from fuzz.campaign.job import WorkerError
from fuzz.conformance import card as cards
from fuzz.conformance import conform as conforming
from fuzz.conformance.conform import FAIL, PASS, UNREACHABLE, Card, CardPlan, Grade, conform
from fuzz.conformance.junit import write_junit
from fuzz.conformance.ladder import LADDER_VERSION, Row, ladder, packed

TESTS = Path(__file__).parent

SOME = (
    "arguments/q-dtype",
    "arguments/initial_state-device",
    "arguments/lower_bound-nan",
    "edges/empty-sequence",
    "edges/length-65",
    "edges/64-bit-offsets",
    "families/keys-equal",
    "properties/heads",
    "fuzz/random",
)

THEIRS = """
import flash_kda
import wrong_targets
from fuzz.targets.registry import Target

def fwd(*args, **kwargs):
    flash_kda.fwd(*args, **kwargs)

def careless(*args, **kwargs):
    given = wrong_targets.arguments(args, kwargs)
    flash_kda.fwd(**{**given, "q": given["q"].bfloat16()})

def needs_more(*args, **kwargs):
    import a_package_that_nobody_has

def short(case):
    return "no more than 30 tokens" if case.tokens > 30 else None

small = Target("", fwd, "cpu", reach=short, exempt={"arguments": "checked elsewhere", "heads": "it has one"})
"""


@pytest.fixture(scope="module")
def climb(tmp_path_factory):
    """Holds a target to a few rows, once; the card and its folder."""
    folder = tmp_path_factory.mktemp("conform")
    (folder / "their_kernels.py").write_text(THEIRS)
    done: dict[str, tuple[Card, Path]] = {}

    def on(target: str, rows: tuple[str, ...] = SOME) -> tuple[Card, Path]:
        if target not in done:
            out = folder / f"card{len(done)}"
            with pytest.MonkeyPatch.context() as patch:
                patch.syspath_prepend(folder)
                patch.setattr(conforming, "ladder", lambda *a: [row for row in ladder(*a) if row.id in rows])
                patch.setattr(conforming, "SHRINK_LIMIT", 5.0)
                card = conform(CardPlan(target, out, fuzz_cases=3, time_limit=60.0))
                cards.write_card(card, out)
            done[target] = card, out
        return done[target]

    return on


def grades(card: Card) -> dict[str, str]:
    return {row.id: row.grade for row in card.rows}


@pytest.mark.parametrize("target", ["flash_kda", "model", "fla.naive"])
def test_the_published_cards_are_of_this_code(target, tmp_path, monkeypatch):
    """As far as the quickest rung tells: a card is made by hand, and what it is of goes on changing."""
    monkeypatch.setattr(conforming, "ladder", lambda *a: [row for row in ladder(*a) if row.rung == "arguments"])
    monkeypatch.setattr(conforming, "SHRINK_LIMIT", 0.0)
    now = conform(CardPlan(target, tmp_path / "card", fuzz_cases=1, time_limit=60.0))
    published = json.loads((TESTS.parent / "docs" / "data" / "conformance.json").read_text())[target]
    assert grades(now) == {row["id"]: row["grade"] for row in published["rows"] if row["id"].startswith("arguments/")}


def test_a_correct_target_passes(climb):
    card, out = climb("flash_kda:fwd")
    assert grades(card) == dict.fromkeys(SOME, PASS)
    assert card.reached and not card.failed and card.status == "complete"
    by_id = {row.id: row for row in card.rows}
    assert 0 < by_id["families/keys-equal"].score < 1 and by_id["families/keys-equal"].judged == 4
    assert by_id["properties/heads"].score is None  # it measures nothing
    assert not (out / "findings").exists()


def test_a_wrong_target_fails_where_it_is_wrong_and_only_there(climb, monkeypatch):
    card, out = climb("wrong_targets:state_transposed")
    found = grades(card)
    for row in ("edges/empty-sequence", "edges/length-65", "families/keys-equal", "fuzz/random"):
        assert found[row] == FAIL
    for row in ("arguments/q-dtype", "properties/heads"):
        assert found[row] == PASS
    assert card.failed
    saved = next(row for row in card.rows if row.id == "edges/length-65").findings[0]
    assert saved.shrunk and sum(saved.case_json["seq_lens"]) <= 1 and saved.check == "accuracy"
    monkeypatch.chdir(out)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["replay", saved.folder]) == 1
    assert "accuracy" in printed.getvalue()
    assert saved.replay == f"python -m fuzz replay {out / saved.folder}"


def test_a_bad_argument_that_is_accepted_is_a_finding_that_replays(climb, monkeypatch):
    card, out = climb("their_kernels:careless", ("arguments/q-dtype", "edges/length-1"))
    found = grades(card)
    assert found == {"arguments/q-dtype": FAIL, "edges/length-1": PASS}
    saved = next(row for row in card.rows if row.id == "arguments/q-dtype").findings[0]
    monkeypatch.syspath_prepend(out.parent)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["replay", str(out / saved.folder)]) == 1
    assert "arguments.q-dtype: q is torch.float64, not bf16: nothing was raised" in printed.getvalue()


def test_a_crash_is_a_grade_and_not_the_end(climb):
    card, _ = climb("wrong_targets:segfaults", ("edges/empty-sequence", "edges/length-65"))
    by_id = {row.id: row for row in card.rows}
    # It dies where there is no initial state, and so in some of these.
    assert by_id["edges/empty-sequence"].grade == FAIL and by_id["edges/empty-sequence"].findings[0].check == "died"
    assert by_id["edges/empty-sequence"].judged == 3 and by_id["edges/empty-sequence"].failed == 1
    assert by_id["edges/length-65"].grade == PASS
    assert card.status == "complete"


def test_what_is_unsupported_is_no_pass(climb):
    card, _ = climb("their_kernels:small")
    by_id = {row.id: row for row in card.rows}
    assert by_id["arguments/q-dtype"].grade == UNREACHABLE and by_id["arguments/q-dtype"].reason == "checked elsewhere"
    assert by_id["arguments/lower_bound-nan"].grade == PASS  # which nobody is exempt from
    assert by_id["properties/heads"].grade == UNREACHABLE
    assert by_id["properties/heads"].reason == "not promised: the same bits; no more than 30 tokens"
    assert by_id["edges/length-65"].grade == UNREACHABLE
    assert by_id["edges/length-65"].reason == "no more than 30 tokens"
    assert (by_id["families/keys-equal"].grade, by_id["families/keys-equal"].judged) == (PASS, 1)
    assert by_id["families/keys-equal"].reason == "no more than 30 tokens"
    assert card.reached and not card.failed
    cards.print_card(card, Console(file=(printed := io.StringIO()), width=120))
    text = printed.getvalue()
    assert "unreachable  2 rows (arguments/q-dtype, arguments/initial_state-device): checked elsewhere" in text
    assert re.search(r"in part .* no more than 30 tokens", text)


def test_a_missing_dependency_is_unreachable_and_the_card_no_success(climb):
    card, _ = climb("their_kernels:needs_more", ("edges/length-65",))
    by_id = {row.id: row for row in card.rows}
    assert by_id["edges/length-65"].grade == UNREACHABLE
    assert by_id["edges/length-65"].reason.startswith("ModuleNotFoundError: No module named 'a_package")
    assert not card.count(PASS) and not card.reached


def test_hangs_end_a_rung_and_not_the_card(tmp_path, monkeypatch):
    rows = [Row(f"edges/{n}", "a hang", (packed(n + 1),)) for n in range(4)]
    rows.append(Row("properties/written", "no hang", (packed(5),), (), ("written",)))
    monkeypatch.setattr(conforming, "LIVES", 2)
    monkeypatch.setattr(conforming, "ladder", lambda *a: rows)
    monkeypatch.setattr(conforming, "TIME_LIMIT", 1.0)
    card = conform(CardPlan("wrong_targets:hangs", tmp_path / "card", fuzz_cases=1, time_limit=1.0))
    assert [row.grade for row in card.rows] == [FAIL, FAIL, UNREACHABLE, UNREACHABLE, FAIL]
    assert card.rows[2].reason == "not run, after 2 hangs or crashes on this rung"


def test_the_harness_is_not_blamed_on_the_target(monkeypatch):
    verdict = {
        "checks": [{"name": "harness", "passed": False, "errors": {}, "bounds": {}, "detail": "E: in the oracle"}]
    }
    result = conforming.Result(packed(3), "theirs", "failed", "harness", verdict)
    row = Row("edges/x", "x", (packed(3),))
    assert conforming.outcome_of(row, result) == ("broken", "the harness failed: E: in the oracle")
    card = Card(CardPlan("theirs", Path()), status="broken", rows=[Grade("edges/x", "x", PASS)])
    assert not card.reached


class Page(HTMLParser):
    """What a page would fetch, and its text."""

    def __init__(self):
        super().__init__()
        self.fetched, self.text, self.ids, self.links, self.viewport = [], [], set(), set(), ""

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if "id" in given:
            self.ids.add(given["id"])
        if tag == "a" and given.get("href", "").startswith("#"):
            self.links.add(given["href"][1:])
        elif tag != "a":
            self.fetched += [given[name] for name in ("src", "href") if name in given and given[name] != "data:,"]
        if given.get("name") == "viewport":
            self.viewport = given["content"]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_fetches_nothing(climb):
    card, out = climb("wrong_targets:state_transposed")
    page = Page()
    page.feed((out / "conform.html").read_text())
    assert not page.fetched and "http" not in (out / "conform.html").read_text()
    assert page.viewport.startswith("width=device-width") and page.links <= page.ids
    text = " ".join(" ".join(page.text).split())
    for row in card.rows:
        assert row.id in page.ids and row.title in text
        for saved in row.findings:
            assert saved.replay in text and saved.detail in text
    assert cards.headline(card) in text


def test_the_page_escapes(climb):
    card = Card(CardPlan("<b>&", Path()), target={"name": "<b>&", "device": "cpu", "note": "<i>"}, status="complete")
    card.rows = [Grade("edges/x", "<script>", UNREACHABLE, reason="a < b")]
    page = cards.page(card)
    assert "<script>" not in page and "&lt;script&gt;" in page and "<b>" not in page and "a &lt; b" in page


def test_json_and_page_hold_every_row(climb):
    card, out = climb("wrong_targets:state_transposed")
    read = json.loads((out / "conform.json").read_text(), parse_constant=pytest.fail)
    assert read["ladder_version"] == LADDER_VERSION and read["status"] == "complete"
    assert {row["id"]: row["grade"] for row in read["rows"]} == grades(card)
    assert read["summary"] == {grade: card.count(grade) for grade in (PASS, FAIL, UNREACHABLE)}
    assert read["environment"]["versions"]["torch"] and read["target"]["device"] == "cpu"
    page = (out / "conform.html").read_text()
    assert all(row.id in page for row in card.rows)


def test_a_score_that_is_not_finite_is_valid_json():
    card = Card(CardPlan("theirs", Path()), rows=[Grade("edges/x", "x", FAIL, score=float("inf"))])
    assert json.loads(json.dumps(card.to_dict(), allow_nan=False, default=str))["rows"][0]["score"] == "not finite"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "nonsense"], "expected flash_kda, model"),
        (["--target", "flash_kda", "--fuzz-cases", "0"], "--fuzz-cases: expected 1 or more, got 0"),
        (["--target", "flash_kda", "--seed", "-1"], "--seed: expected 0 or more, got -1"),
        (["--target", "flash_kda", "--time-limit", "soon"], "--time-limit: expected a time"),
        ([], "--target"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["conform", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("python -m fuzz: ") and error.count("python -m fuzz") == 1
    assert not list(tmp_path.glob("*/*"))


def test_a_card_is_never_written_over(tmp_path, capsys):
    (tmp_path / "conform.json").write_text("{}")
    assert main(["conform", "--target", "flash_kda", "--out", str(tmp_path)]) == 2
    assert "--out: expected a folder without results" in capsys.readouterr().err
    assert (tmp_path / "conform.json").read_text() == "{}"


def test_where_no_card_can_be_written_none_is_made(tmp_path, capsys):
    (tmp_path / "kernel.py").touch()
    for out in (tmp_path / "kernel.py", tmp_path / "kernel.py" / "card"):
        assert main(["conform", "--target", "flash_kda", "--out", str(out)]) == 2
        assert f"--out: expected a folder that can be written to, got {out}" in capsys.readouterr().err


@pytest.mark.parametrize(("target", "status"), [("flash_kda:fwd", 0), ("wrong_targets:gives_nan", 1)])
def test_the_exit_status_says_it(target, status, tmp_path, monkeypatch, capsys):
    wanted = ("edges/length-16", "edges/length-17")
    monkeypatch.setattr(conforming, "SHRINK_LIMIT", 2.0)
    monkeypatch.setattr(conforming, "ladder", lambda *a: [row for row in ladder(*a) if row.id in wanted])
    assert main(["conform", "--target", target, "--fuzz-cases", "1", "--out", str(tmp_path / "card")]) == status
    printed = capsys.readouterr().out
    assert ("All reachable rows pass: 2 pass" if status == 0 else "Some rows fail: ") in printed
    assert f"card: {tmp_path / 'card' / 'conform.html'}" in printed


def test_an_interrupt_leaves_a_card_that_says_so(tmp_path):
    out = tmp_path / "card"
    command = [sys.executable, "-m", "fuzz", "conform", "--target", "flash_kda:fwd", "--out", str(out)]
    source = f"""
import sys, fuzz.conformance.conform, fuzz.__main__
from pathlib import Path
climb = fuzz.conformance.conform.Climb.climb
def told(self, row):
    if len(self.card.rows) == 2:
        Path({str(tmp_path / "begun")!r}).touch()
    return climb(self, row)
fuzz.conformance.conform.Climb.climb = told
sys.exit(fuzz.__main__.main({command[3:]!r}))
"""
    environment = dict(os.environ, PYTHONPATH=str(TESTS.parent))
    process = subprocess.Popen(
        [sys.executable, "-c", source], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while not (tmp_path / "begun").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2, printed
    read = json.loads((out / "conform.json").read_text())
    assert read["status"] == "interrupted" and 0 < len(read["rows"]) < len(ROWS)
    assert "Interrupted after" in printed


def test_a_target_that_cannot_be_had_raises(tmp_path):
    with pytest.raises(WorkerError, match="cannot import no_such_module"):
        conform(CardPlan("no_such_module:fwd", tmp_path))


def test_known_failures_are_no_verdict_and_those_that_are_gone_are_reported(tmp_path, monkeypatch):
    """Measured on hardware: a kernel with six known failures could never be green."""
    monkeypatch.syspath_prepend(TESTS)
    rows = ("arguments/q-dtype", "edges/length-65", "properties/heads")
    monkeypatch.setattr(conforming, "ladder", lambda *a: [row for row in ladder(*a) if row.id in rows])
    monkeypatch.setattr(conforming, "SHRINK_LIMIT", 0.0)
    known, target = tmp_path / "known.txt", "wrong_targets:state_transposed"
    known.write_text(f"{target} edges/length-6* reads the state as [K, V]\n{target} properties/heads never\n")

    card = conform(CardPlan(target, tmp_path / "all", fuzz_cases=1, known=known))
    assert grades(card)["edges/length-65"] == FAIL and not card.failed and card.reached
    (note,) = card.notes
    assert ":2: wrong_targets:state_transposed properties/heads: did not fail" in note
    cards.print_card(card, Console(file=(printed := io.StringIO()), width=200))
    assert "All failures are known" in printed.getvalue()
    assert "fail (known: reads the state as [K, V])  edges/length-65" in printed.getvalue()
    assert f"target {target}: {TESTS / 'wrong_targets.py'}" in printed.getvalue()
    write_junit(card, tmp_path / "junit.xml")
    text = (tmp_path / "junit.xml").read_text()
    assert "known failure: reads the state as [K, V]" in text and "<failure" not in text

    known.write_text(f"{target} raised another thing\n")
    assert conform(CardPlan(target, tmp_path / "others", fuzz_cases=1, known=known)).failed
