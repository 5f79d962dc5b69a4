"""The doctor: every part that is broken shows as one line with the next thing to do, and the rest is looked at all the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from keyrotation import doctor
from keyrotation.adapters import schema
from keyrotation.settings import load
from tests.cli.conftest import Shell, World

FLOWS = Path(__file__).resolve().parents[2] / "flows"


def found(world: World | Shell) -> dict[str, dict[str, Any]]:
    """The doctor's lines by name; each one that is not ok is a sentence."""
    shell = world.shell if isinstance(world, World) else world
    status, out, err = shell.run("doctor", "test", "--format", "json")
    report = json.loads(out)
    assert status == (0 if report["well"] else 1)
    assert err == ""
    return {line["name"]: line for line in report["checks"]}


def failed(world: World | Shell) -> dict[str, str]:
    """What is not well by its own fault."""
    return {name: line["message"] for name, line in found(world).items() if not line["ok"] and line["made"]}


def not_looked_at(world: World | Shell) -> set[str]:
    """The checks that another one stood in the way of."""
    return {name for name, line in found(world).items() if not line["made"]}


# ---- all is well


def test_a_whole_world_is_well(world: World) -> None:
    """Every check is ok; the text says so in lines that begin with the verdict."""
    status, out, err = world.shell.run("doctor", "test")
    assert (status, err) == (0, ""), out
    lines = out.splitlines()
    assert lines[0] == "Doctor for test"
    assert lines[-1].endswith("checks are well.")
    assert not [line for line in lines if line.startswith("not ok")]
    for name in ("settings", "secret database.url", "database as auditor", "sealer", "JWKS and database", "probe routes", "Slack", "Prefect deployments"):
        assert any(re.match(rf"ok +{name} ", line) for line in lines)


def test_the_json_is_stable(world: World) -> None:
    """Each line has a name, ok, a message, and whether it was looked at."""
    report = world.shell.json("doctor", "test")
    assert set(report) == {"environment", "well", "checks"}
    assert report["well"] is True
    assert {frozenset(line) for line in report["checks"]} == {frozenset({"name", "ok", "message", "made"})}


def test_every_flow_is_expected_as_a_deployment() -> None:
    """A flow that is added to flows/ is looked for by the doctor, too."""
    names = [re.findall(r'^@flow\(\s*name="([\w-]+)"', file.read_text(), re.MULTILINE) for file in FLOWS.glob("*.py")]
    assert {name for found_here in names for name in found_here} == set(doctor.FLOWS)


def test_the_waits_are_explained(world: World) -> None:
    """The settings' line shows the sums."""
    line = found(world)["settings"]["message"]
    assert "11s = gateway cache 10s + clock skew 1s" in line
    assert "31s = token lifetime 30s + clock skew 1s" in line


# ---- the file


def test_a_warning_is_shown(world: World) -> None:
    """A cleanup_after that is raised is told, and is no failure."""
    world.shell.set(policy__cleanup_after="10s")
    line = found(world)["settings"]
    assert line["ok"]
    assert "WARNING: policy.cleanup_after 10s is raised to 31s" in line["message"]


def test_a_missing_secret_stops_only_what_needs_it(world: World) -> None:
    """One secret that leads nowhere is one failed line; what stands on it is not looked at; the rest is."""
    world.shell.set(database__cleaner_url="env:NOT_SET")
    assert set(failed(world)) == {"secret database.cleaner_url"}
    assert not_looked_at(world) == {"database as cleaner"}


# ---- the database


def test_an_unreachable_database_is_one_failure(world: World) -> None:
    """Where the rotator's login does not connect, the parts that have no need of it are still looked at."""
    world.shell.set(database__url=world.shell.secret("away", "postgresql://keyrotation_rotator:x@127.0.0.1:1/test"))
    assert set(failed(world)) == {"database as rotator"}
    assert {"current key", "JWKS and database", "database schema"} <= not_looked_at(world)


def test_mixed_up_logins_are_found(world: World) -> None:
    """The cleaner's URL with the rotator's login: too much for the one and not its role (I17)."""
    world.shell.set(database__cleaner_url=world.shell.settings["database.url"])
    said = failed(world)["database as cleaner"]
    assert "lacks membership of keyrotation_cleaner" in said
    assert "membership of keyrotation_rotator, which it must not" in said


def test_the_owners_login_is_no_rotator(world: World) -> None:
    """A login that is the owner would count as a person's hands, and read the private halves."""
    world.shell.set(database__url=str(world.shell.database.secret("owner")))
    assert "membership of keyrotation_owner" in failed(world)["database as rotator"]


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("GRANT SELECT (private_key_ciphertext) ON signing_keys TO keyrotation_rotator", "SELECT of the sealed private halves, which it must not"),
        ("GRANT DELETE ON signing_keys TO keyrotation_rotator", "DELETE of keys, which it must not"),
        ("REVOKE INSERT (event) ON key_rotation.ledger FROM keyrotation_rotator", "lacks INSERT of ledger entries"),
    ],
)
def test_a_wrong_grant_is_named(world: World, statement: str, words: str) -> None:
    """A grant too many and one too few are named, and sql/grants.sql with them (I17)."""
    world.shell.database.run("superuser", statement)
    said = failed(world)["database as rotator"]
    assert words in said
    assert "sql/grants.sql" in said


def test_a_database_of_another_environment_is_found(world: World) -> None:
    """The name in the database is the file's (F66)."""
    world.shell.database.run("superuser", "SET session_replication_role = replica; UPDATE key_rotation.environment SET name = 'staging'")
    assert "'staging'" in failed(world)["database as rotator"]


DRIFTS = {
    "DROP TRIGGER append_only ON key_rotation.ledger": "trigger append_only on key_rotation.ledger is missing",
    "DROP INDEX public.one_current_key": "unique index one_current_key on public.signing_keys is missing",
    "ALTER TABLE signing_keys DROP CONSTRAINT kid_is_thumbprint": "constraint kid_is_thumbprint on public.signing_keys is missing",
    "ALTER TABLE signing_keys DISABLE TRIGGER guard_2_change": "trigger guard_2_change on public.signing_keys is switched off",
    "ALTER TABLE signing_keys DROP COLUMN disabled_seen_at": "column disabled_seen_at of public.signing_keys is missing",
    "CREATE OR REPLACE FUNCTION key_rotation.refuse_ledger_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN old; END'":
        "function key_rotation.refuse_ledger_change is another one than the file's",
}  # fmt: skip


@pytest.mark.parametrize("statement", DRIFTS)
def test_a_drifted_schema_is_found(shell: Shell, statement: str) -> None:
    """A guard that is missing, switched off or exchanged is named (F65)."""
    shell.database.run("superuser", statement)
    assert DRIFTS[statement] in failed(shell)["database schema"]


def test_the_expected_schema_is_the_files(database: Any) -> None:
    """What the doctor expects is what sql/schema.sql makes in a fresh database: nothing is forgotten, nothing made up."""
    adapter = database.adapter("rotator")
    rows = adapter.read(lambda connection: connection.execute(schema._query("found")).all())
    there = {(row.kind, row.name) for row in rows}
    by_postgres = {part for part in there if re.search(r"_(pkey|key|check|by_\w+) on ", part[1])}  # PostgreSQL's own names, and indexes for speed only
    assert schema.expected() <= there
    assert not there - schema.expected() - by_postgres
    assert schema.flaws_of_schema(adapter) == []
    assert {row.name for row in rows if row.kind == "function" and row.body} == set(schema.bodies())


def test_no_key_yet(shell: Shell) -> None:
    """An environment without a key is told what to run."""
    assert "bootstrap-signing-keys" in failed(shell)["current key"]


def test_an_old_key_is_found(world: World) -> None:
    """A current key beyond max_key_age is a failure."""
    world.shell.database.run("superuser", "UPDATE signing_keys SET promoted_at = now() - interval '31 days'")
    assert "max_key_age" in failed(world)["current key"]


def test_the_versions_to_keep_are_listed(world: World) -> None:
    """The sealing key's versions that rows still need are named (I24)."""
    assert re.search(r"cryptoKeyVersions/1 \(1 key\)", found(world)["sealed keys"]["message"])


# ---- the outside


def test_a_sealer_that_refuses_is_found(world: World) -> None:
    """A KMS that does not let us encrypt is told with the grant that is missing."""
    (world.shell.folder / "kms_token").write_text("a stranger's")
    assert set(failed(world)) == {"sealer"}


def test_an_identity_service_that_is_away_is_one_failure(world: World) -> None:
    """The JWKS is the failure; tokens, clocks and gateways are not looked at."""
    world.identity_meets(jwks={"status": 503})
    assert set(failed(world)) == {"JWKS"}
    assert {"token endpoint", "clocks", "gateways", "canaries"} <= not_looked_at(world)


def test_a_jwks_that_is_not_the_databases_is_found(world: World) -> None:
    """A key that the identity service does not serve is named (I4)."""
    kid = world.shell.database.publish()
    served = world.shell.env().identity.published().jwks.keys
    world.identity_meets(jwks={"jwks": {"keys": [dict(served[world.kid])]}})
    assert f"lacks key {kid}" in failed(world)["JWKS and database"]


def test_a_token_that_lives_too_long_is_found(world: World) -> None:
    """The life of a real token is held against policy.token_lifetime."""
    world.shell.set(policy__token_lifetime="10s")
    assert "lives 30s, longer than policy.token_lifetime 10s" in failed(world)["token endpoint"]


def test_a_wrong_client_secret_is_found(world: World) -> None:
    """The token endpoint's refusal names the client and the setting."""
    (world.shell.folder / "client_secret").write_text("wrong")
    assert "identity.client_secret" in failed(world)["token endpoint"]


def test_a_wrong_signature_is_found(world: World) -> None:
    """A token that does not verify with the JWKS is a failure."""
    world.identity_meets(token={"sign_wrong": True})
    assert "signature" in failed(world)["token endpoint"]


def test_a_wrong_clock_is_found(world: World) -> None:
    """An identity service whose clock is an hour off is told with the figure (F80)."""
    world.identity_meets(jwks={"clock_offset": -3600})
    assert re.search(r"identity service is -3[56]\d\d\.\d s off", failed(world)["clocks"])


def test_a_gateway_that_refuses_is_named(world: World) -> None:
    """One gateway of two that does not accept a fresh token is named."""
    world.gateways[1].api_audiences = ["somebody else"]
    assert world.gateways[1].peer.url in failed(world)["gateways"]


def test_a_probe_route_that_takes_api_tokens_is_found(world: World) -> None:
    """A probe route that accepts an API token proves nothing."""
    world.gateways[0].canary_audiences = ["api", "key-rotation-canary"]
    said = failed(world)["probe routes"]
    assert "accepts an API token" in said
    assert world.gateways[0].peer.url in said


def test_an_api_that_takes_canaries_is_an_alarm(world: World) -> None:
    """Where a canary was shown before, it must open no API."""
    assert "no gateway has been shown a canary" in found(world)["canaries"]["message"]
    env = world.shell.env()
    rotation = world.shell.opened(env)
    env.keys.spend_canaries(rotation, world.kid, 1)
    env.keys.close(rotation, "done", "the tests")
    assert "the API refuses a canary" in found(world)["canaries"]["message"]
    world.gateways[0].api_audiences = ["api", "key-rotation-canary"]
    assert "ALARM" in failed(world)["canaries"]


def test_slack_that_refuses_is_found(world: World) -> None:
    """A token that Slack does not know is told with its reference."""
    world.shell.set(slack__token=world.shell.secret("other_slack_token", "xoxb-of-somebody-else"))
    assert "other_slack_token" in failed(world)["Slack"]


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        ({"status": 503}, "Prefect API", "HTTP 503"),
        ({"status": 401}, "Prefect API", "PREFECT_API_AUTH_STRING"),
        ({"missing": "/api/health"}, "Prefect API", "ends in /api"),
        ({"missing": "cleanup-old-keys"}, "Prefect deployments", "no deployment cleanup-old-keys/test"),
        ({"deployment": {"paused": True, "work_pool_name": "tests"}}, "Prefect deployments", "is paused"),
        ({"missing": "work_pools"}, "Prefect workers", "does not exist"),
        ({"pool": {"status": "NOT_READY"}}, "Prefect workers", "no worker that polls it"),
        ({"pool": {"status": "READY", "is_paused": True}}, "Prefect workers", "is paused"),
    ],
)
def test_prefect(world: World, change: dict[str, Any], line: str, words: str) -> None:
    """What is missing at Prefect is one failure, with the next thing to do."""
    for name, value in change.items():
        setattr(world.prefect, name, value)
    said = failed(world)
    assert set(said) == {line}
    assert words in said[line]


def test_a_folder_that_is_not_there_is_found(world: World) -> None:
    """The head of the ledger can be put down only where its folder is."""
    world.shell.set(audit__head_file=str(world.shell.folder / "nowhere" / "head.json"))
    assert "audit.head_file" in failed(world)["files outside"]


def test_what_is_not_configured_is_well(world: World) -> None:
    """Slack, Prefect, gateways and records outside are optional: the line says what follows from it."""
    sections = ("slack.", "prefect.", "audit.", "tombstones.", "gateways.urls", "gateways.probe_path", "database.auditor_url")
    world.shell.settings = {name: value for name, value in world.shell.settings.items() if not name.startswith(sections)}
    world.shell.write()
    lines = found(world)
    assert all(line["ok"] for line in lines.values())
    assert "nobody is told" in lines["Slack"]["message"]
    assert "waiting time alone" in lines["gateways"]["message"]


def test_a_check_that_breaks_is_a_line(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in a check does not end the doctor, and its text is not shown."""
    monkeypatch.setattr(doctor, "checks", lambda settings: (doctor.Check("odd", lambda world: str(1 / 0)), doctor.Check("settings", doctor.sums)))
    assert "ZeroDivisionError" in failed(world)["odd"]
    assert found(world)["settings"]["ok"]


def test_every_secret_of_the_file_is_looked_at(world: World) -> None:
    """Also those of a refresh rung, which stand in a list."""
    world.shell.settings["gateways.refresh"] = []
    world.shell.write()
    text = (
        (world.shell.folder / "test.toml")
        .read_text()
        .replace("refresh = []", 'refresh = [{ kind = "webhook", url = "http://127.0.0.1:1/", secret = "env:NOT_SET" }]')
    )
    (world.shell.folder / "test.toml").write_text(text)
    names = [name for name, _ in doctor.secrets_of(load("test"))]
    assert "gateways.refresh[0].secret" in names
    assert "database.cleaner_url" in names
    assert "env:NOT_SET" in failed(world)["secret gateways.refresh[0].secret"]
