"""The shell: what each command shows, how it ends, and that those that look write nothing."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
from typing import Any
from urllib.parse import quote

import pytest

from keyrotation.cli.report import printable
from keyrotation.steps.announce import publish_head
from tests.cli.conftest import CLIENT_SECRET, CONSOLE_SCRIPT, ENCRYPTER, SLACK_TOKEN, Shell, World
from tests.conftest import PASSWORD

LOOKING = ("plan", "status", "history", "audit", "doctor")
EVERY = (*((command,) for command in LOOKING), ("hold", "--reason", "a test"), ("release",), ("republish", "some-kid"))
HEAVY = ("prefect", "google.cloud", "google.api_core", "grpc", "hvac", "slack_sdk")


# ---- how a command ends


@pytest.mark.parametrize(
    "arguments", [(), ("status",), ("dance", "test"), ("hold", "test"), ("hold", "test", "--reason", " "), ("history", "test", "--limit", "0")]
)
def test_a_usage_error_is_one_sentence_and_status_2(shell: Shell, arguments: tuple[str, ...]) -> None:
    """A command that is not whole changes nothing, and says what is missing."""
    assert "--help" in shell.refused(*arguments, status=2)


@pytest.mark.parametrize("name", ["nowhere", "../etc", "Test", ""])
def test_an_environment_that_is_not_there_is_status_2(shell: Shell, name: str) -> None:
    """A name without a file is a settings error, for every command."""
    for command in EVERY:
        assert "environment" in shell.refused(command[0], name, *command[1:], status=2)


def test_an_unknown_setting_is_status_2(shell: Shell) -> None:
    """A misspelt setting is named, by every command."""
    shell.set(policy__cleanup_afterr="48h")
    for command in EVERY:
        assert "policy.cleanup_afterr is not a setting" in shell.refused(command[0], "test", *command[1:], status=2)


def test_a_secret_that_leads_nowhere_is_status_2(shell: Shell) -> None:
    """A missing secret is a settings error that names the reference; only the doctor goes on."""
    shell.set(database__url="env:NOT_SET", database__auditor_url="env:NOT_SET")
    for command in EVERY:
        if command != ("doctor",):
            assert "env:NOT_SET leads nowhere" in shell.refused(command[0], "test", *command[1:], status=2)


def test_an_unreachable_database_is_status_1(shell: Shell) -> None:
    """A database that does not answer is told in one sentence, without its password; only the doctor goes on."""
    url = shell.secret("away", "postgresql://keyrotation_rotator:hidden-password@127.0.0.1:1/test")
    shell.set(database__url=url, database__auditor_url=url)
    for command in EVERY:
        if command != ("doctor",):
            said = shell.refused(command[0], "test", *command[1:], status=1)
            assert "127.0.0.1:1/test" in said
            assert "does not answer" in said
            assert "hidden-password" not in said


def test_a_database_of_another_environment_is_refused(shell: Shell) -> None:
    """Nobody reads or holds an environment by the file of another one (F66)."""
    (shell.folder / "other.toml").write_text((shell.folder / "test.toml").read_text())
    for command in (("status", "other"), ("plan", "other"), ("hold", "other", "--reason", "mixed up")):
        assert "'other'" in shell.refused(*command, status=2)


def test_a_mistake_of_ours_is_told_by_its_class_alone(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected error shows its class and our line; its text, which may quote a secret, is not shown."""

    def fails(name: str) -> Any:
        raise ZeroDivisionError(CLIENT_SECRET)

    monkeypatch.setattr("keyrotation.cli.looking.for_reading", fails)
    said = shell.refused("status", "test", status=1)
    assert "ZeroDivisionError" in said
    assert CLIENT_SECRET not in said


def test_looking_writes_nothing(world: World) -> None:
    """No command that looks leaves a trace in the database."""
    before = world.shell.database.everything()
    for command in LOOKING:
        status, out, err = world.shell.run(command, "test")
        assert status == 0, out + err
    assert world.shell.database.everything() == before


def test_secrets_are_in_no_output(world: World) -> None:
    """No form of no command shows a secret's value."""
    shell = world.shell
    secrets = [CLIENT_SECRET, SLACK_TOKEN, ENCRYPTER, PASSWORD, quote(PASSWORD, safe="")]
    for command in LOOKING:
        for form in ("text", "json"):
            assert not [secret for secret in secrets if secret in "".join(map(str, shell.run(command, "test", "--format", form)))]


def test_a_text_from_outside_steers_no_terminal() -> None:
    """Control characters of a reason are replaced."""
    assert printable("fine \x1b[31mred\x07\r\nnext →") == "fine \ufffd[31mred\ufffd\ufffd\ufffdnext →"


# ---- the process


def test_the_command_starts_without_heavy_libraries() -> None:
    """Neither the parser nor a command that looks imports Prefect, Google's client, hvac or the Slack SDK."""
    code = f"import sys, keyrotation.cli, keyrotation.cli.looking, keyrotation.cli.changing; sys.exit(str([m for m in {HEAVY} if m in sys.modules] or ''))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr.strip() == ""


def test_the_parser_starts_alone() -> None:
    """Help and usage errors come before the database's and the settings' libraries are imported."""
    code = "import sys, keyrotation.cli; sys.exit(str([m for m in ('sqlalchemy', 'pydantic', 'requests', 'rich') if m in sys.modules] or ''))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr.strip() == ""


def test_ctrl_c_is_quiet(shell: Shell) -> None:
    """SIGINT ends a command that waits with status 130 and without a word."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        shell.set(database__auditor_url=shell.secret("silent", f"postgresql://keyrotation_auditor@127.0.0.1:{port}/test"))
        process = shell.script("status", "test")
        connection, _ = silent.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_broken_pipe_is_quiet(world: World) -> None:
    """A reader that goes away ends the command without a word."""
    process = world.shell.script("history", "test")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(20), err) == (141, "")


def on_a_terminal(columns: int, *arguments: str) -> str:
    """What the command shows on a terminal that is so wide."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns)}
    with subprocess.Popen([CONSOLE_SCRIPT, *arguments], stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        shown = b""
        while chunk := _read(master):
            shown += chunk
        assert process.wait(20) == 0, shown
    os.close(master)
    return shown.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other side has closed it
        return b""


def test_a_file_gets_no_colours_and_a_terminal_does(world: World) -> None:
    """Escape sequences go to terminals only; lines of a file end without spaces and fit into 100 columns."""
    out, _ = world.shell.script("status", "test", env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"}).communicate(timeout=20)
    assert "\x1b" not in out
    assert all(len(line) <= 100 and line == line.rstrip() for line in out.splitlines())
    assert "\x1b[" in on_a_terminal(100, "status", "test")


@pytest.mark.parametrize("arguments", [("status",), ("history", "--keys"), ("doctor",)])
def test_no_kid_is_wrapped_apart(world: World, arguments: tuple[str, ...]) -> None:
    """Also on a narrow terminal a kid stands whole in its line."""
    shown = on_a_terminal(72, arguments[0], "test", *arguments[1:])
    assert shown.count(world.kid) > 0
    assert shown.count(world.kid[:12]) == shown.count(world.kid) == shown.count(world.kid[-12:])


# ---- plan


def test_plan_shows_the_sums_and_the_steps(world: World) -> None:
    """A plan names the key, the instants with their sums, the steps, and that nothing was changed."""
    status, out, err = world.shell.run("plan", "test")
    assert (status, err) == (0, "")
    for words in (world.kid, "rotating as asked", "+ gateway cache 10s + clock skew 1s", "promote", "clean up", "Nothing was changed."):
        assert words in " ".join(out.split())


def test_plan_as_json(world: World) -> None:
    """The plan's keys are stable, its instants are ISO 8601."""
    plan = world.shell.json("plan", "test")
    assert set(plan) == {
        "environment",
        "action",
        "reason",
        "message",
        "acts",
        "current_kid",
        "next_kid",
        "earliest_promotion",
        "earliest_cleanup",
        "alarm",
        "steps",
        "changed",
    }
    assert (plan["action"], plan["current_kid"], plan["changed"]) == ("rotate", world.kid, False)
    assert plan["earliest_promotion"]["at"].endswith("+00:00")
    assert [step["step"] for step in plan["steps"]][:2] == ["generate", "wait for gateway cache"]


def test_plan_only_if_due_of_a_fresh_key(world: World) -> None:
    """A schedule's run would do nothing for a fresh key, and that is well."""
    plan = world.shell.json("plan", "test", "--only-if-due")
    assert (plan["action"], plan["reason"], plan["steps"], plan["earliest_promotion"]) == ("nothing", "not due", [], None)


def test_plan_on_hold_is_not_well_for_a_person(world: World) -> None:
    """A person's run would fail on hold (status 1), a schedule's would end well (status 0)."""
    world.shell.run("hold", "test", "--reason", "an audit")
    assert world.shell.json("plan", "test", status=1)["action"] == "on hold"
    assert world.shell.json("plan", "test", "--only-if-due")["action"] == "on hold"


def test_plan_refuses_where_the_world_is_not_fit(world: World) -> None:
    """A gateway that refuses a fresh token stops the plan with one sentence."""
    world.gateways[1].api_audiences = ["somebody else"]
    assert "does not accept a fresh token" in world.shell.refused("plan", "test", status=1)


def test_plan_without_any_key_says_what_to_run(shell: Shell) -> None:
    """An environment that was never bootstrapped is told so."""
    assert "bootstrap-signing-keys" in shell.refused("plan", "test", status=1)


def test_plan_of_a_dead_run_takes_over(world: World) -> None:
    """What a run that is gone has left would be finished."""
    shell = world.shell
    shell.opened()
    shell.database.run("superuser", "UPDATE key_rotation.rotations SET lease_until = now() WHERE ended_at IS NULL")
    plan = shell.json("plan", "test")
    assert (plan["action"], [step["step"] for step in plan["steps"]]) == ("resume", ["take over"])


# ---- status


def test_status_at_a_glance(world: World) -> None:
    """The keys, their ages and deadlines, and the last outcome, in one table."""
    old, new = world.kid, world.shell.rotate()
    status, out, _ = world.shell.run("status", "test")
    text = " ".join(out.split())
    assert status == 0
    for words in (
        f"current {new} for",
        "rotated every 7d",
        f"previous {old} kept until",
        "hold none",
        "under way nothing",
        "rotation 2",
        "from then on a scheduled run rotates",
    ):
        assert words in text


def test_status_as_json(world: World) -> None:
    """The status's keys are stable; a duration is in seconds."""
    status = world.shell.json("status", "test")
    assert set(status) == {
        "environment", "now", "well", "troubles", "waiting_for_a_person", "hold", "open_rotation", "current", "next", "previous", "due_at", "rotate_every",
        "max_key_age", "last_rotation"}  # fmt: skip
    assert (status["current"]["kid"], status["rotate_every"], status["last_rotation"]["kind"], status["well"]) == (world.kid, 604800.0, "bootstrap", True)


@pytest.mark.parametrize("command", [("status",), ("history",), ("history", "--keys"), ("audit",)])
def test_reading_needs_the_auditors_login_only(world: World, command: tuple[str, ...]) -> None:
    """Whoever audits has no credentials of the rotator."""
    world.shell.set(database__url="env:NOT_HERE", database__cleaner_url="env:NOT_HERE")
    status, out, err = world.shell.run(command[0], "test", *command[1:])
    assert (status, err) == (0, ""), out


def test_status_without_any_key_is_not_well(shell: Shell) -> None:
    """No current key is trouble, and the text says what to run."""
    assert "bootstrap-signing-keys" in shell.json("status", "test", status=1)["troubles"][0]


def test_status_of_an_old_key_is_not_well(world: World) -> None:
    """A current key beyond max_key_age is trouble."""
    world.shell.database.run("superuser", "UPDATE signing_keys SET promoted_at = now() - interval '31 days'")
    assert "max_key_age" in world.shell.json("status", "test", status=1)["troubles"][0]


def test_status_of_a_run_that_is_gone_is_not_well(world: World) -> None:
    """An open rotation is no trouble while somebody works on it, and is once its lease is over."""
    world.shell.opened()
    assert world.shell.json("status", "test")["open_rotation"]["kind"] == "rotation"
    world.shell.database.run("superuser", "UPDATE key_rotation.rotations SET lease_until = now() WHERE ended_at IS NULL")
    assert "is gone" in world.shell.json("status", "test", status=1)["troubles"][0]


def test_status_says_what_waits_for_a_person(world: World) -> None:
    """A held cleanup is trouble and waits for release; with cleanup = "manual" a key whose time has come waits for its cleanup."""
    shell, old = world.shell, world.kid
    shell.rotate()
    shell.set(policy__cleanup="manual")
    assert shell.json("status", "test")["waiting_for_a_person"] == []
    shell.database.run("superuser", "UPDATE signing_keys SET retain_until = now() WHERE status = 'previous'")
    assert f"kid = {old}" in shell.json("status", "test")["waiting_for_a_person"][0]
    shell.database.run("superuser", "UPDATE signing_keys SET cleanup_hold = 'look at it' WHERE status = 'previous'")
    status = shell.json("status", "test", status=1)
    assert "release test" in status["waiting_for_a_person"][0]
    assert "look at it" in status["troubles"][0]


def test_status_of_a_failed_rotation_is_not_well(world: World) -> None:
    """A last rotation that did not end done is trouble."""
    env = world.shell.env()
    env.keys.close(world.shell.opened(env), "failed", "a gateway was away")
    assert "ended failed" in world.shell.json("status", "test", status=1)["troubles"][0]


# ---- history


def test_history_is_newest_first(world: World) -> None:
    """Each rotation with who, why, its keys, its outcome and how long it took."""
    new = world.shell.rotate()
    status, out, _ = world.shell.run("history", "test")
    assert status == 0
    assert out.index("rotation 2") < out.index("bootstrap 1")
    for words in ("the tests", "a test wants it", f"old key {world.kid}", f"new key {new}", "took", "done"):
        assert words in " ".join(out.split())


def test_history_as_json_and_limited(world: World) -> None:
    """--limit counts rotations; the duration is in seconds."""
    for _ in range(2):
        world.shell.rotate()
    rotations = world.shell.json("history", "test", "--limit", "2")["rotations"]
    assert [rotation["id"] for rotation in rotations] == [3, 2]
    assert {"id", "kind", "opened_at", "ended_at", "actor", "reason", "outcome", "message", "old_kid", "new_kid", "duration"} <= set(rotations[0])
    assert isinstance(rotations[0]["duration"], float)


def test_history_of_all_keys(world: World) -> None:
    """--keys lists every key with its instants, also those that are gone, newest first."""
    old, new = world.kid, world.shell.rotate()
    world.shell.clean_up(old)
    keys = world.shell.json("history", "test", "--keys")["keys"]
    assert [(key["kid"], key["status"]) for key in keys] == [(new, "current"), (old, "disabled")]
    _, out, _ = world.shell.run("history", "test", "--keys")
    assert f"{old}  disabled" in out
    assert "by hand" in out


def test_history_of_nothing(shell: Shell) -> None:
    """An environment without a past says so, and that is well."""
    assert shell.run("history", "test") == (0, "no rotation was ever opened here\n", "")
    assert shell.json("history", "test", "--keys")["keys"] == []


# ---- audit


def test_audit_of_a_whole_ledger(world: World) -> None:
    """A whole chain is well: number of entries, first and last instant, the head."""
    audit = world.shell.json("audit", "test")
    assert set(audit) == {"environment", "whole", "entries", "first_at", "last_at", "head", "published_head", "problems"}
    assert (audit["whole"], audit["problems"], audit["head"]["seq"]) == (True, [], audit["entries"])
    status, out, _ = world.shell.run("audit", "test")
    assert status == 0
    assert "none was edited" in out


def test_audit_of_an_empty_ledger(shell: Shell) -> None:
    """A ledger without an entry is whole."""
    assert shell.json("audit", "test")["entries"] == 0


EDITS = {
    "edited": ("UPDATE key_rotation.ledger SET reason = 'nothing' WHERE seq = 2", "entry 2 was edited"),
    "taken out": ("DELETE FROM key_rotation.ledger WHERE seq = 2", "entry 2 is missing"),
    "cut off at the end": ("DELETE FROM key_rotation.ledger WHERE seq = (SELECT max(seq) FROM key_rotation.ledger)", "missing at the end"),
    "head set back": ("UPDATE key_rotation.ledger_head SET seq = 2, hash = (SELECT hash FROM key_rotation.ledger WHERE seq = 2)", "set back"),
    "head exchanged": ("UPDATE key_rotation.ledger_head SET hash = repeat('a', 64)", "does not match"),
    "emptied": ("DELETE FROM key_rotation.ledger", "are missing at the end"),
}


@pytest.mark.parametrize("name", EDITS)
def test_audit_finds(world: World, name: str) -> None:
    """What an administrator did past the triggers is found by number, and is status 1."""
    statement, words = EDITS[name]
    world.shell.database.run("superuser", f"SET session_replication_role = replica; {statement}")
    audit = world.shell.json("audit", "test", status=1)
    assert any(words in problem for problem in audit["problems"]), audit["problems"]
    status, out, _ = world.shell.run("audit", "test")
    assert status == 1
    assert "not ok" in out


def test_audit_holds_the_ledger_against_the_head_kept_outside(world: World) -> None:
    """Whoever rewrites ledger and head together is found by what was published before."""
    shell = world.shell
    assert shell.json("audit", "test")["published_head"] is None
    publish_head(shell.env())
    published = shell.json("audit", "test")["published_head"]
    assert published["seq"] == shell.json("audit", "test")["entries"]
    (shell.folder / "head.json").write_text(json.dumps({"seq": 2, "hash": "a" * 64}))
    assert "entry 2 does not match the head kept outside" in shell.json("audit", "test", status=1)["problems"][0]
    (shell.folder / "head.json").write_text(json.dumps({**published, "seq": 1000}))
    assert "missing at the end" in shell.json("audit", "test", status=1)["problems"][0]
    (shell.folder / "head.json").write_text("rubbish")
    assert "is not a published head" in shell.json("audit", "test", status=1)["problems"][0]


# ---- hold, release


def test_hold_and_release(world: World) -> None:
    """A hold names who and why in the ledger; releasing it says what was lifted."""
    shell = world.shell
    status, out, _ = shell.run("hold", "test", "--reason", "migration of the gateways")
    assert status == 0
    assert "migration of the gateways" in out
    assert "shell: " in out
    assert shell.json("status", "test")["hold"]["reason"] == "migration of the gateways"
    status, out, _ = shell.run("release", "test", "--reason", "it is over")
    assert status == 0
    assert "migration of the gateways" in out
    assert "Nothing is on hold any more" in out
    assert shell.json("status", "test")["hold"] is None
    assert [(event, reason) for event, _, reason in shell.entries()][-3:] == [
        ("put on hold", "migration of the gateways"), ("released", "released"), ("reason of the release", "it is over")]  # fmt: skip


def test_holding_twice_replaces_the_reason(world: World) -> None:
    """The second reason counts, and what it replaced is told."""
    world.shell.run("hold", "test", "--reason", "one")
    assert world.shell.json("hold", "test", "--reason", "two")["replaced"] == "one"
    assert world.shell.json("status", "test")["hold"]["reason"] == "two"


def test_a_hold_says_that_work_under_way_goes_on(world: World) -> None:
    """A hold does not stop what has begun."""
    world.shell.opened()
    assert "goes on to its end" in world.shell.run("hold", "test", "--reason", "stop")[1]


def test_releasing_nothing_is_status_1(world: World) -> None:
    """A release that finds no hold has not done what was asked."""
    assert "nothing is on hold" in world.shell.refused("release", "test", status=1)


def test_release_lifts_held_cleanups(world: World) -> None:
    """The cleanups that a rotation put on hold are named."""
    world.shell.rotate()
    world.shell.database.run("superuser", "UPDATE signing_keys SET cleanup_hold = 'unproven' WHERE status = 'previous'")
    assert world.shell.json("release", "test")["released_cleanups"] == [world.kid]


# ---- republish


def test_republish_brings_a_key_back(world: World) -> None:
    """A key that was cleaned up too early is in the JWKS again, without its private half, and is kept for the tokens' time."""
    shell, old = world.shell, world.kid
    shell.rotate()
    shell.clean_up(old)
    status, out, err = shell.run("republish", "test", old)
    assert (status, err) == (0, "")
    assert "never signs again" in out
    assert "kept until" in out
    row = shell.database.row(old)
    assert (row["status"], row["never_promote"], row["private_key_ciphertext"]) == ("previous", True, None)
    assert row["retain_until"] is not None
    assert old in shell.env().identity.published().jwks.kids
    last = shell.json("history", "test")["rotations"][0]
    assert (last["kind"], last["outcome"], last["new_kid"]) == ("republish", "done", old)
    assert shell.json("audit", "test")["whole"]


def test_republish_as_json(world: World) -> None:
    """The answer's keys are stable."""
    world.shell.rotate()
    world.shell.clean_up(world.kid)
    assert set(world.shell.json("republish", "test", world.kid)) == {"environment", "kid", "status", "message", "known_everywhere", "retain_until"}


def test_republish_refuses_a_compromised_key(world: World) -> None:
    """Compromised is for ever (I8)."""
    kid = world.shell.database.compromised()
    assert "compromised, for ever" in world.shell.refused("republish", "test", kid, status=1)


@pytest.mark.parametrize("kid", ["no-such-key", f"-{'a' * 42}", "x" * 500, "'; DROP TABLE signing_keys; --"])
def test_republish_refuses_an_unknown_key(world: World, kid: str) -> None:
    """A kid that is no key's is refused, and what is published is named."""
    assert world.kid in world.shell.refused("republish", "test", kid, status=1)


def test_republish_refuses_a_key_that_is_published(world: World) -> None:
    """There is nothing to bring back."""
    assert "is current" in world.shell.refused("republish", "test", world.kid, status=1)


def test_republish_refuses_a_key_that_never_signed(world: World) -> None:
    """A next key that was disabled by hand has no tokens."""
    kid = world.shell.database.publish()
    world.shell.clean_up(kid)
    assert "never signed" in world.shell.refused("republish", "test", kid, status=1)


def test_republish_refuses_while_another_works(world: World) -> None:
    """A rotation under way, and a hold, are left alone."""
    world.shell.rotate()
    world.shell.clean_up(world.kid)
    world.shell.run("hold", "test", "--reason", "wait")
    assert "on hold" in world.shell.refused("republish", "test", world.kid, status=1)
    world.shell.run("release", "test")
    world.shell.opened()
    assert "is not over yet" in world.shell.refused("republish", "test", world.kid, status=1)


def test_republish_finishes_what_a_dead_republishing_left(world: World) -> None:
    """A shell that was killed in the middle is finished by calling it again."""
    shell, old = world.shell, world.kid
    shell.rotate()
    shell.clean_up(old)
    env = shell.env()
    begun = shell.opened(env, "republish")
    env.keys.adopt(begun, old)
    env.keys.republish(begun, old, "killed after this")
    shell.database.run("superuser", "UPDATE key_rotation.rotations SET lease_until = now() WHERE ended_at IS NULL")
    assert shell.run("republish", "test", old)[0] == 0
    assert shell.json("status", "test")["open_rotation"] is None
    assert shell.database.row(old)["retain_until"] is not None


def test_output_is_json_on_one_stream_only(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """What is not the answer goes to stderr: a warning does not break the JSON."""
    world.shell.set(policy__cleanup_after="10s")
    status, out, _ = world.shell.run("status", "test", "--format", "json")
    assert status == 0
    assert json.loads(out)["environment"] == "test"
    assert "cleanup_after" in caplog.text
