"""The demo: what makes its report good, what a person reads, and once for real that it ends well and leaves nothing."""

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sandbox.demo_eyes import Audit, Key, Run, Step, read_audit
from sandbox.demo_report import ENOUGH, Figures, Share, figures_table, of_run, problems, time_table
from sandbox.demo_stage import Counters, Stage
from sandbox.demo_story import counters, news_of, parts_ready
from sandbox.processes import everyone
from sandbox.traffic import Report

CHECKOUT = Path(__file__).parents[2]
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
OLD, NEW = "old-key-0123456789", "new-key-0123456789"


def counts(**changed: int) -> dict[str, int]:
    """The counters of a report."""
    return {"sent": 4000, "accepted": 4000, "rejected": 0, "expired": 0, "other": 0, "errors": 0, "token_errors": 0, **changed}


def traffic(totals: Mapping[str, int] = {}, old: Mapping[str, int] = {}, new: Mapping[str, int] = {}, finished: bool = True) -> dict[str, Any]:
    """What sandbox.traffic reports."""
    return {
        "finished": finished,
        "totals": counts(**totals),
        "kids": {OLD: counts(accepted=2000, **old), NEW: {**counts(accepted=2000), **new}},
        "gateways": {"http://a": counts(), "http://b": counts()},
    }


def run(state: str = "COMPLETED", steps: tuple[Step, ...] = ()) -> Run:
    """A flow run of ten seconds, two of them until its process was there."""
    return Run("id", "rotate", state, "the reason", 10.0, 12.0, 20.0, steps, None)


GOOD = Figures(
    traffic=traffic(),
    runs={"rotation": run(), "cleanup": run()},
    before=(Key(OLD, "current", True, 1.0),),
    after=(Key(OLD, "disabled", False, 3.0), Key(NEW, "current", True, 2.0)),
    jwks=frozenset({NEW}),
    signer=NEW,
    entries=15,
    audit=Audit(True, 23),
)
STILL_PREVIOUS = (Key(OLD, "previous", True, 3.0), Key(NEW, "current", True, 2.0))
NOT_ROTATED = (Key(OLD, "current", True, 3.0), Key(NEW, "next", True, 2.0))

BAD: Mapping[str, tuple[Figures, str]] = {
    "a valid token was rejected": (replace(GOOD, traffic=traffic(old={"rejected": 1})), "1 valid tokens were rejected"),
    "too few tokens were verified": (replace(GOOD, traffic=traffic(totals={"accepted": ENOUGH - 1})), f"fewer than {ENOUGH:,}"),
    "a connection broke": (replace(GOOD, traffic=traffic(totals={"errors": 2})), "2 requests had no answer"),
    "a gateway answered neither yes nor no": (replace(GOOD, traffic=traffic(totals={"other": 3})), "3 requests were answered by something else"),
    "no token could be had": (replace(GOOD, traffic=traffic(totals={"token_errors": 4})), "4 token requests failed"),
    "the traffic died": (replace(GOOD, traffic=traffic(finished=False)), "the traffic died"),
    "the new key was never used": (replace(GOOD, traffic=traffic(new={"accepted": 0})), "no token of key new-key- was verified"),
    "the rotation failed": (replace(GOOD, runs={"rotation": run("FAILED")}), "the rotation ended FAILED: the reason"),
    "the cleanup crashed": (replace(GOOD, runs={"cleanup": run("CRASHED")}), "the cleanup ended CRASHED"),
    "the JWKS shows a key too many": (replace(GOOD, jwks=frozenset({OLD, NEW})), "the JWKS holds new-key-, old-key-, the database publishes new-key-"),
    "the JWKS lacks a key": (replace(GOOD, jwks=frozenset()), "the JWKS holds none"),
    "another key signs": (replace(GOOD, signer=OLD), "fresh tokens name key old-key-"),
    "the old key was not cleaned up": (replace(GOOD, after=STILL_PREVIOUS, jwks=frozenset({OLD, NEW})), "the old key old-key- is still published"),
    "nothing was rotated": (replace(GOOD, after=NOT_ROTATED, jwks=frozenset({OLD, NEW}), signer=OLD), "the key that signs is the one that signed before"),
    "the ledger is not whole": (replace(GOOD, audit=Audit(False, 23, "entry 7 was edited")), "the audit of the ledger failed: entry 7 was edited"),
    "a process is left": (replace(GOOD, left=("kms (pid 7)",)), "something is left: kms (pid 7)"),
}


class TestTheVerdict:
    """Good is only what is good in everything."""

    def test_a_good_report_has_no_problems(self) -> None:
        """Nobody was hurt, enough was tried, everything is where it belongs."""
        assert problems(GOOD) == []

    @pytest.mark.parametrize(("figures", "said"), BAD.values(), ids=BAD.keys())
    def test_each_bad_figure_spoils_it(self, figures: Figures, said: str) -> None:
        """And is named in the reason."""
        assert said in "; ".join(problems(figures))

    def test_a_bad_figure_spoils_nothing_else(self) -> None:
        """One reason for one fault."""
        assert len(problems(BAD["a valid token was rejected"][0])) == 1

    @pytest.mark.parametrize(
        ("status", "printed", "complained", "expected"),
        [
            (0, '{"whole": true, "entries": 23, "problems": []}', "", Audit(True, 23)),
            (1, '{"whole": false, "entries": 23, "problems": ["entry 7 was edited"]}', "", Audit(False, 23, "entry 7 was edited")),
            (1, '{"whole": true, "entries": 23, "problems": []}', "", Audit(False, 23)),
            (2, "", "keyrotation: no such environment\n", Audit(False, 0, "keyrotation: no such environment")),
            (1, "", "", Audit(False, 0, "it said nothing and ended with 1")),
        ],
    )
    def test_the_audit_is_believed_only_if_it_says_so_and_ends_well(self, status: int, printed: str, complained: str, expected: Audit) -> None:
        """Its exit status and its answer both count."""
        assert read_audit(status, printed, complained) == expected


class TestWhatAPersonReads:
    """Sentences, counters, tables."""

    def test_a_step_says_only_what_is_new(self) -> None:
        """A sentence that was handed on is not told again; one that only looks alike is told whole."""
        assert news_of("the key signs; the gateways know it", ["published", "the key signs"]) == "the gateways know it"
        assert news_of("the key signs", ["the key signs"]) == ""
        assert news_of("the key signs (rotation 2)", ["the key signs"]) == "the key signs (rotation 2)"
        assert news_of("published", []) == "published"

    def test_the_parts_of_a_starting_world_are_read_from_its_log(self) -> None:
        """In their order; its closing words are no parts."""
        assert parts_ready("[  1.0 s] kms ready, 0.9 s\n[  2.0 s] slack ready, 1.0 s\nThe sandbox is up after 2 s.\n") == ["kms", "slack"]

    def test_the_counters_are_those_of_the_last_whole_second(self) -> None:
        """The second under way would show too few."""
        timeline = [{"kids": {OLD: {"sent": 90}}}, {"kids": {OLD: {"sent": 40}, NEW: {"sent": 50}}}, {"kids": {NEW: {"sent": 3}}}]
        shown = counters(Report({**traffic(), "timeline": timeline}))
        assert shown == Counters(4000, 4000, 0, 0, {OLD: 40, NEW: 50})

    def test_names_are_short_and_instants_are_seconds_of_the_demo(self) -> None:
        """A kid and an address of 40 characters, and dates, make no sentence readable."""
        stage = plain()[0]
        stage.call(NEW, "new-key-")
        begun = stage.since(0)
        assert stage.short(f"key {NEW} signs") == "key new-key- signs"
        assert stage.short("until 1970-01-01 00:00:00 UTC") == f"until T+{begun:.0f} s"

    def test_without_a_terminal_each_event_is_a_line_and_nothing_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No colours, no control characters, no trailing blanks, whatever the environment asks for."""
        monkeypatch.setenv("FORCE_COLOR", "1")
        stage, out = plain()
        with stage:
            stage.chapter("The rotation", "It begins.")
            stage.busy("plan")
            stage.event("generate, 1.0 s: " + "a long sentence " * 20, "✓")
            stage.why("because")
            stage.message("#key-rotation", ":key: done", reply=False, at=0.0)
            stage.show(figures_table(GOOD))
            stage.verdict(True, "GOOD")
        lines = out.getvalue().splitlines()
        assert not CONTROL.search(out.getvalue())
        assert sum("generate" in line for line in lines) == 1
        assert all(line == line.rstrip() for line in lines if "generate" not in line)
        assert any("✓ generate" in line and "T+0." in line for line in lines)

    def test_in_a_terminal_the_traffic_is_always_in_sight(self) -> None:
        """The footer shows the counters and what is under way."""
        out = io.StringIO()
        with Stage(out, terminal=True) as stage:
            stage.count(Counters(10, 10, 0, 0, {NEW: 5}))
            stage.busy("promote")
        assert "10 sent · 10 accepted" in out.getvalue()
        assert "promote" in out.getvalue()

    def test_where_the_time_went_names_each_step(self) -> None:
        """From the hour of the run to its end, the start of its process first; what took no time is left out."""
        step = Step("1", "generate", "COMPLETED", "", 13.0, 17.0)
        shares = of_run("the rotation", run(steps=(step, replace(step, name="announce", ended_at=13.0))))
        assert shares[:3] == [Share("the rotation", 10.0), Share("the worker starts a process for it", 2.0, True), Share("generate", 4.0, True)]
        assert "announce" not in drawn(time_table(shares))
        assert "4.0 s" in drawn(time_table(shares))


def plain() -> tuple[Stage, io.StringIO]:
    """A stage without a terminal, and what it says."""
    out = io.StringIO()
    return Stage(out), out


def drawn(table: Any) -> str:
    """A table as text."""
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


@pytest.mark.long
class TestForReal:
    """`python -m sandbox demo`, as `make demo` calls it, without a terminal."""

    def test_it_ends_well_and_leaves_nothing(self, tmp_path: Path) -> None:
        """Exit 0, no valid token rejected, several thousand verified; no process, no folder, no control characters."""
        done = subprocess.run(DEMO, cwd=CHECKOUT, env=at(tmp_path), capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stderr == ""
        assert not CONTROL.search(done.stdout)
        assert figure(done.stdout, "tokens verified") >= ENOUGH
        assert figure(done.stdout, "valid tokens rejected") == 0
        assert "GOOD: a key was rotated" in done.stdout
        assert left_at(tmp_path) == []

    @pytest.mark.parametrize("when", ["slack: ", "the rotation starts"])
    def test_ctrl_c_ends_it_at_any_time(self, tmp_path: Path, when: str) -> None:
        """Exit 130; no process and no folder is left, whether the world was starting or working, and however often it is pressed."""
        demo = subprocess.Popen(DEMO, cwd=CHECKOUT, env=at(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert demo.stdout is not None
        seen = ""
        for moment in (when, "everything is being stopped"):
            seen += read_until(demo.stdout, moment)
            demo.send_signal(signal.SIGINT)
        rest, errors = demo.communicate(timeout=90)
        assert demo.returncode == 130, seen + rest + errors
        assert errors == ""
        assert "Interrupted. Everything is stopped." in rest
        assert left_at(tmp_path) == []


DEMO = [sys.executable, "-u", "-m", "sandbox", "demo"]


def at(folder: Path) -> dict[str, str]:
    """An environment whose temporary folder is that one."""
    return {**os.environ, "TMPDIR": str(folder)}


def read_until(lines: Any, words: str) -> str:
    """The lines up to the first one with these words."""
    seen = ""
    for line in lines:
        seen += line
        if words in line:
            break
    return seen


def figure(printed: str, name: str) -> int:
    """A number of the printed report."""
    found = re.search(rf"^\s*{name}\s+([\d,]+)", printed, re.MULTILINE)
    assert found, printed
    return int(found[1].replace(",", ""))


def left_at(folder: Path) -> list[str]:
    """What is left of a demo that had its temporary folder there: the folder itself, and processes that carry its mark."""
    mark = f"SANDBOX_FAMILY={folder}".encode()
    left = [str(each) for each in folder.glob("keyrotation-demo-*")]
    for pid in everyone():
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        left += [f"pid {pid}" for variable in variables if variable.startswith(mark)]
    return left
