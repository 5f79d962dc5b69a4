"""The rules that PostgreSQL holds by itself: a second session, as whoever may log in, tries to break each, and is refused.

Each test is named after its invariant (docs/invariants.md). What is refused has changed nothing: no key, no rotation, no entry.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg2 import extensions

from keyrotation.adapters.key_store import PostgresRecords
from keyrotation.domain.decision import Request
from keyrotation.domain.errors import KeyRotationError, Refused
from keyrotation.domain.jwks import thumbprint
from keyrotation.domain.ledger import broken_links
from keyrotation.ports import Gate, NewKey

if TYPE_CHECKING:
    from tests.conftest import Database

AT_ONCE = 8
SAY = """SELECT set_config('key_rotation.rotation_id', %s, true), set_config('key_rotation.epoch', %s, true),
                set_config('key_rotation.actor', 'the tests', true), set_config('key_rotation.reason', 'to try it', true);"""
OPEN = (
    "INSERT INTO key_rotation.rotations (kind, actor, reason, lease_until) VALUES (%s, 'the tests', 'to try it', now() + interval '1 hour') RETURNING id, epoch"
)
CLOSE = "UPDATE key_rotation.rotations SET ended_at = now(), outcome = 'done' WHERE id = %s"
INSERT = "INSERT INTO signing_keys (kid, public_jwk, private_key_ciphertext) VALUES (%s, %s, '\\x00')"
DEMOTE = "UPDATE signing_keys SET status = 'previous' WHERE status = 'current'"
PROMOTE = "UPDATE signing_keys SET status = 'current' WHERE kid = %s"
DISABLE = "UPDATE signing_keys SET enabled=FALSE WHERE kid=%s"  # as the runbook has it
COMPROMISE = "UPDATE signing_keys SET status = 'disabled', compromised = TRUE WHERE kid = %s"
REPUBLISH = "UPDATE signing_keys SET status = 'previous' WHERE kid = %s"
NO_WAIT = Gate(timedelta(0), proof=False)


class Work(NamedTuple):
    """A rotation that is open, as the rotator names it."""

    id: str
    epoch: str


def opened(database: Database, kind: str = "rotation") -> Work:
    """A rotation that the rotator has opened."""
    ((number, epoch),) = database.run("rotator", OPEN, kind)
    return Work(str(number), str(epoch))


def refused(database: Database, role: str, statement: str, *values: Any, says: str, code: str | None = None) -> psycopg2.Error:
    """Tries it in a session of that role; it is refused in these words, and nothing has changed."""
    before = database.everything()
    with pytest.raises(psycopg2.Error, match=says) as caught:
        database.run(role, statement, *values)
    assert code is None or caught.value.pgcode == code
    assert database.everything() == before
    return caught.value


def verdicts(database: Database, role: str, work: Sequence[str], tries: Mapping[str, tuple[str, Any]]) -> dict[str, str]:
    """What each try of a session of that role is answered: SQLSTATE and first line, or `let through`. Each is undone."""
    said = {}
    with closing(database.connect(role)) as session, session.cursor() as cursor:
        cursor.execute("SET TRANSACTION READ WRITE;" + SAY, work)
        for name, (statement, values) in tries.items():
            cursor.execute("SAVEPOINT here")
            try:
                cursor.execute(statement, values or None)
                said[name] = "let through"
            except psycopg2.Error as error:
                said[name] = f"{error.pgcode} {error.diag.message_primary}"
            cursor.execute("ROLLBACK TO here")
    return said


NOBODY = ("", "")


def hint(error: psycopg2.Error) -> str:
    """What the refusal says to do next."""
    return error.diag.message_hint or ""


@contextmanager
def at_this_instant(database: Database, role: str, *before: str) -> Iterator[extensions.connection]:
    """A transaction of that role whose now() is the now() of what was prepared in it."""
    with database.acting_as("superuser") as connection:
        for statement in before:
            database.ask(connection, statement)
        database.ask(connection, f"SET LOCAL ROLE keyrotation_{role}")
        yield connection


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Results (or our errors) of so many threads that begin together."""
    start = threading.Barrier(count)

    def one(number: int) -> Any:
        start.wait()
        try:
            return work(number)
        except (KeyRotationError, psycopg2.Error) as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def entries(database: Database) -> list[tuple[Any, ...]]:
    """The ledger, without what is not the same each time."""
    return database.run("auditor", "SELECT event, kid, old_status, new_status, actor, rotation_id, reason FROM key_rotation.ledger ORDER BY seq")


# ------------------------------------------------------------------------------------------------ I1, I2, I3: which keys there are


@pytest.mark.parametrize("role", ["rotator", "identity_admin", "owner", "superuser"])
def test_i01_no_current_key_is_refused_at_commit(database: Database, role: str) -> None:
    """Whoever demotes the current key must promote another one in the same transaction."""
    database.current()
    error = refused(database, role, SAY + DEMOTE, *opened(database), says="without exactly one current key", code="23000")
    assert "promote another key in the same transaction" in hint(error)


@pytest.mark.parametrize("role", ["rotator", "identity_admin", "owner", "superuser"])
def test_i01_two_current_keys_are_refused(database: Database, role: str) -> None:
    """A key is not promoted beside the current one."""
    database.current()
    kid = database.publish()
    refused(database, role, SAY + PROMOTE, *opened(database), kid, says="one_current_key", code="23505")


def test_i01_between_two_statements_there_may_be_none(database: Database) -> None:
    """Only what is committed counts: demoting first and promoting then is the way."""
    old, new = database.current(), database.publish()
    database.run("rotator", SAY + DEMOTE + ";" + PROMOTE, *opened(database), new)
    assert (database.status(old), database.status(new)) == ("previous", "current")


def test_i01_of_promotions_at_once_one_wins(database: Database) -> None:
    """Without any lock of the application: one of eight sessions promotes, the others change nothing, and one key is current."""
    old, new = database.current(), database.publish()
    before = len(entries(database))

    def promote(_: int) -> int:
        with database.connect("identity_admin") as connection, connection.cursor() as cursor:
            cursor.execute(DEMOTE + " AND kid <> %s", (new,))
            cursor.execute(PROMOTE + " AND status = 'next'", (new,))
            return cursor.rowcount

    assert sorted(at_once(AT_ONCE, promote)) == [0] * (AT_ONCE - 1) + [1]
    assert [entry[:2] for entry in entries(database)[before:]] == [("demoted", old), ("promoted", new)]


@pytest.mark.parametrize("role", ["rotator", "identity_admin", "owner", "superuser"])
def test_i02_a_second_next_key_is_refused(database: Database, role: str) -> None:
    """At most one key is next."""
    database.publish()
    key = database.new_key()
    refused(database, role, SAY + INSERT, *opened(database), key.kid, json.dumps(dict(key.public_jwk)), says="one_next_key", code="23505")


@pytest.mark.parametrize("claimed", ["its own", "another", "none"])
def test_i02_a_second_key_of_one_rotation_is_refused(database: Database, claimed: str) -> None:
    """A rotation whose key is next no more makes no second one, under whichever rotation's number."""
    ended = opened(database)
    database.run("rotator", CLOSE, ended.id)
    work, first, second = opened(database), database.new_key(), database.new_key()
    database.run("rotator", SAY + INSERT, *work, first.kid, json.dumps(dict(first.public_jwk)))
    database.run("owner", DISABLE, first.kid)
    number = {"its own": work.id, "another": ended.id, "none": None}[claimed]
    insert = "INSERT INTO signing_keys (kid, public_jwk, private_key_ciphertext, rotation_id) VALUES (%s, %s, '\\x00', %s)"
    refused(database, "rotator", SAY + insert, *work, second.kid, json.dumps(dict(second.public_jwk)), number, says="one_key_per_rotation", code="23505")


def thumbprint_of_another(key: NewKey, other: NewKey) -> tuple[str, dict[str, Any]]:
    """One key's public half under another's kid."""
    return other.kid, {**key.public_jwk, "kid": other.kid}


def respelt(key: NewKey) -> tuple[str, dict[str, Any]]:
    """The same point under another spelling, whose thumbprint is another: x with a spare bit set, which a decoder that is not strict does not see."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    x = key.public_jwk["x"]
    jwk = {**key.public_jwk, "x": x[:-1] + alphabet[alphabet.index(x[-1]) + 1]}
    return thumbprint(jwk), {**jwk, "kid": thumbprint(jwk)}


WRONG_KEYS: dict[str, tuple[Callable[[NewKey, NewKey], tuple[str, dict[str, Any]]], str]] = {
    "the kid is another key's thumbprint": (thumbprint_of_another, "kid_is_thumbprint"),
    "the kid is made up": (lambda key, _: ("key-1", {**key.public_jwk, "kid": "key-1"}), "kid_is_thumbprint"),
    "the JWK names another kid": (lambda key, other: (key.kid, {**key.public_jwk, "kid": other.kid}), "public_jwk_is_for_this_use"),
    "the JWK names no kid": (lambda key, _: (key.kid, {k: v for k, v in key.public_jwk.items() if k != "kid"}), "public_jwk_is_for_this_use"),
    "the JWK is for encryption": (lambda key, _: (key.kid, {**key.public_jwk, "use": "enc"}), "public_jwk_is_for_this_use"),
    "the JWK is for RS256": (lambda key, _: (key.kid, {**key.public_jwk, "alg": "RS256"}), "public_jwk_is_for_this_use"),
    "the private half stands in the JWK": (lambda key, _: (key.kid, {**key.public_jwk, "d": "A" * 43}), "public_jwk_is_public"),
    "the JWK says more": (lambda key, _: (key.kid, {**key.public_jwk, "x5u": "https://evil.test"}), "public_jwk_is_public"),
    "RSA": (
        lambda key, _: (key.kid, {"kty": "RSA", "n": "AQAB", "e": "AQAB", "kid": key.kid, "alg": "ES256", "use": "sig"}),
        "kid_is_thumbprint public_jwk_is_p256",
    ),
    "P-384": (lambda key, _: (key.kid, {**key.public_jwk, "crv": "P-384"}), "kid_is_thumbprint public_jwk_is_p256"),
    "x of 42 characters": (lambda key, _: (key.kid, {**key.public_jwk, "x": key.public_jwk["x"][:-1]}), "kid_is_thumbprint public_jwk_is_p256"),
    "y of 44 characters": (lambda key, _: (key.kid, {**key.public_jwk, "y": key.public_jwk["y"] + "="}), "kid_is_thumbprint public_jwk_is_p256"),
    "y missing": (lambda key, _: (key.kid, {k: v for k, v in key.public_jwk.items() if k != "y"}), "kid_is_thumbprint public_jwk_is_p256"),
    "spare bits in x": (lambda key, _: respelt(key), "public_jwk_is_p256"),
}


@pytest.mark.parametrize("role", ["rotator", "identity_admin", "owner", "superuser"])
def test_i03_a_key_that_is_not_es256_under_its_own_thumbprint_is_refused(shared: Database, work: Work, role: str) -> None:
    """A row's kid is the RFC 7638 thumbprint of its own public key, and that key is a P-256 signature key without a private half."""
    tries = {name: change(shared.new_key(), shared.new_key()) for name, (change, _) in WRONG_KEYS.items()}
    found = verdicts(shared, role, work, {name: (INSERT, (kid, json.dumps(jwk))) for name, (kid, jwk) in tries.items()})
    # Of several that are broken, PostgreSQL names the first by name.
    assert {name: said for name, said in found.items() if not any(f'"{rule}"' in said for rule in WRONG_KEYS[name][1].split())} == {}
    assert {said.partition(" ")[0] for said in found.values()} == {"23514"}


@pytest.mark.parametrize("role", ["owner", "superuser"])
@pytest.mark.parametrize(
    "change",
    [
        "kid = 'another'",
        "alg = 'RS256'",
        'public_jwk = public_jwk || \'{"kid": "another"}\'',
        "created_at = now() - interval '1 day'",
    ],
)
def test_i03_what_a_kid_stands_for_never_changes(database: Database, role: str, change: str) -> None:
    """Kid, algorithm, public half and date of birth stay what they are, for everybody."""
    kid = database.current()
    refused(database, role, f"UPDATE signing_keys SET {change} WHERE kid = %s", kid, says="never change")


@pytest.mark.parametrize("role", ["owner", "superuser"])
@pytest.mark.parametrize("removal", ["DELETE FROM signing_keys", "TRUNCATE signing_keys", "TRUNCATE key_rotation.rotations CASCADE"])
def test_i03_no_key_is_ever_removed(database: Database, role: str, removal: str) -> None:
    """So no kid can be used for a second key: DELETE and TRUNCATE are refused for owner and administrator alike."""
    opened(database)
    database.publish()
    error = refused(database, role, removal, says="never deleted")
    assert "UPDATE signing_keys SET enabled = FALSE" in hint(error)


@pytest.mark.parametrize("role", ["owner", "superuser"])
def test_i03_no_rotation_is_ever_deleted(database: Database, role: str) -> None:
    """Rotations are the record, too."""
    opened(database)
    refused(database, role, "DELETE FROM key_rotation.rotations", says="never deleted")


# ------------------------------------------------------------------------------------------------ I7: cleaning up

OVER = "UPDATE signing_keys SET retain_until = now() WHERE status = 'previous'"
LATER = "UPDATE signing_keys SET retain_until = now() + interval '1 microsecond' WHERE status = 'previous'"
UNKNOWN = "UPDATE signing_keys SET retain_until = NULL WHERE status = 'previous'"
KEY_HELD = "UPDATE signing_keys SET cleanup_hold = 'nobody has looked' WHERE status = 'previous'"
ENVIRONMENT_HELD = "UPDATE key_rotation.environment SET hold_reason = 'an audit', hold_by = 'eve', held_at = now()"
EMERGENCY = "INSERT INTO key_rotation.rotations (kind, actor, reason, lease_until) VALUES ('emergency', 'a person', 'stolen', now())"
ROTATION = EMERGENCY.replace("'emergency'", "'rotation'")
CLEANING = {
    "cleaner": "UPDATE signing_keys SET enabled = FALSE WHERE status = %s",
    "identity_admin": "UPDATE signing_keys SET status = 'disabled' WHERE status = %s",
    "rotator": "UPDATE signing_keys SET status = 'disabled', enabled = FALSE WHERE status = %s",
}
CLAIM = (
    "SELECT set_config('key_rotation.rotation_id', id::text, true), set_config('key_rotation.epoch', epoch::text, true) "
    "FROM key_rotation.rotations WHERE ended_at IS NULL"
)


@pytest.mark.parametrize("role", CLEANING)
@pytest.mark.parametrize(
    ("prepared", "which", "says"),
    [
        ((LATER,), "previous", "tokens that it signed may live until"),
        ((UNKNOWN,), "previous", "an instant not yet known"),
        ((OVER, KEY_HELD), "previous", "its cleanup is on hold: nobody has looked"),
        ((OVER, ENVIRONMENT_HELD), "previous", "the environment is on hold"),
        ((OVER,), "next", "it is next, and only a previous key is cleaned up"),
        ((OVER,), "current", "is current and cannot become disabled"),
    ],
    ids=["a microsecond early", "unknown", "key on hold", "environment on hold", "next", "current"],
)
def test_i07_a_key_is_not_cleaned_up(database: Database, role: str, prepared: tuple[str, ...], which: str, says: str) -> None:
    """Our roles disable a key only if it is previous, its time has come, and neither it nor the environment is on hold."""
    database.previous()
    database.publish()
    with at_this_instant(database, role, *prepared, ROTATION, CLAIM) as connection, pytest.raises(psycopg2.Error, match=says) as caught:
        database.ask(connection, CLEANING[role], which)
    assert caught.value.pgcode == ("P0001" if which == "current" else "KR002")


@pytest.mark.parametrize("role", CLEANING)
def test_i07_while_an_emergency_is_open_nothing_is_cleaned_up(database: Database, role: str) -> None:
    """An emergency disables what is compromised, and nobody cleans up meanwhile (I22)."""
    database.previous()
    with at_this_instant(database, role, OVER, EMERGENCY, CLAIM) as connection, pytest.raises(psycopg2.Error, match="an emergency is open") as caught:
        database.ask(connection, CLEANING[role], "previous")
    assert caught.value.pgcode == "KR002"


@pytest.mark.parametrize("role", CLEANING)
def test_i07_at_the_very_instant_it_is_cleaned_up(database: Database, role: str) -> None:
    """The retention ends at retain_until, not after it."""
    kid = database.previous()
    with at_this_instant(database, role, OVER, ROTATION, CLAIM) as connection:
        database.ask(connection, CLEANING[role], "previous")
        assert database.ask(connection, "SELECT status, enabled FROM signing_keys WHERE kid = %s", kid) == [("disabled", False)]


@pytest.mark.parametrize(
    "change",
    [
        "retain_until = now() - interval '1 second'",
        "retain_until = now()",
        "retain_until = NULL",
        "published_seen_at = now() - interval '1 second'",
        "published_seen_at = now() + interval '1 second'",
        "demoted_seen_at = now() - interval '1 second'",
        "accepted_at = '2001-01-01'",
        "canaries_spent = 0",
        "never_promote = FALSE",
    ],
)
def test_i07_the_rotator_takes_no_deadline_back(database: Database, change: str) -> None:
    """What deadlines count from is the database's now (I6, I18); retention, spent canaries and never_promote are not taken back, not even within a rotation."""
    database.previous()
    spent_and_marked = "retain_until = now() + interval '1 hour', canaries_spent = 1, never_promote = TRUE"
    database.run("superuser", f"UPDATE signing_keys SET {spent_and_marked} WHERE status = 'previous'")
    says = "never_promote is for good" if "never_promote" in change else "an instant is noted as it passes"
    refused(database, "rotator", f"{SAY} UPDATE signing_keys SET {change} WHERE status = 'previous'", *opened(database), says=says)


def test_i07_a_first_retention_does_not_end_before_the_demotion(database: Database) -> None:
    """A retention that was never known cannot begin in the past."""
    old = database.current()
    database.current()
    refused(
        database,
        "rotator",
        SAY + "UPDATE signing_keys SET retain_until = now() - interval '1 day' WHERE kid = %s",
        *opened(database),
        old,
        says="an instant is noted as it passes",
    )


# ------------------------------------------------------------------------------------------------ I8: compromised is for ever

REVIVALS = {
    "rotator": [
        "status = 'previous'",
        "status = 'current'",
        "status = 'next'",
        "enabled = TRUE",
        "status = 'previous', enabled = TRUE",
        "compromised = FALSE",
        "compromised = FALSE, status = 'previous'",
    ],
    "cleaner": ["enabled = TRUE"],
    "identity_admin": ["status = 'previous'", "status = 'current'", "status = 'next'"],
}
REVIVALS["owner"] = REVIVALS["superuser"] = [*REVIVALS["rotator"], "private_key_ciphertext = '\\x00', compromised = FALSE, status = 'previous', enabled = TRUE"]


@pytest.mark.parametrize("role", REVIVALS)
def test_i08_a_compromised_key_stays_dead(database: Database, role: str) -> None:
    """No role, and no hand, publishes, enables or promotes it again, or takes the word back."""
    database.current()
    kid = database.compromised()
    tries = {change: (f"UPDATE signing_keys SET {change} WHERE kid = %s", (kid,)) for change in REVIVALS[role]}
    found = verdicts(database, role, opened(database), tries)
    assert set(found.values()) == {f"P0001 signing key {kid} is compromised, for ever: it is never published, enabled or promoted again"}, found


def test_i08_it_does_not_come_back_as_a_new_row(database: Database) -> None:
    """Its kid is taken, for ever."""
    key = database.new_key()
    database.publish(key)
    database.run("owner", COMPROMISE, key.kid)
    refused(database, "owner", INSERT, key.kid, json.dumps(dict(key.public_jwk)), says="signing_keys_pkey", code="23505")


def test_i08_only_a_disabled_key_is_compromised(database: Database) -> None:
    """The word alone, with the key still published, is refused."""
    kid = database.current()
    refused(database, "owner", "UPDATE signing_keys SET compromised = TRUE WHERE kid = %s", kid, says="compromised_is_disabled")


# ------------------------------------------------------------------------------------------------ I10: at once


def test_i10_of_rotations_opened_at_once_one_is_open(database: Database) -> None:
    """Eight runs ask at once: one opens, seven are told to look again."""
    keys = database.key_store()
    found = at_once(AT_ONCE, lambda number: keys.open("rotation", Request(f"run {number}"), None))
    assert sum(rotation is not None for rotation in found) == 1
    assert database.value("auditor", "SELECT count(*) FROM key_rotation.ledger") == 1


def test_i10_of_keys_published_at_once_one_is_next(database: Database) -> None:
    """Eight processes that believe to be the same run publish at once: one key, seven are told so in words."""
    keys = database.key_store()
    rotation = keys.open("rotation", Request("the tests"), None)
    assert rotation is not None
    found = at_once(AT_ONCE, lambda _: keys.insert(rotation, database.new_key(), "to try it"))
    refusal = "no key was published: another one is next already, or this rotation has made its key"
    assert sorted(str(each) for each in found) == ["None"] + [refusal] * (AT_ONCE - 1)
    assert database.value("auditor", "SELECT count(*) FROM signing_keys") == 1


def test_i10_of_promotions_at_once_one_is_made(database: Database) -> None:
    """Eight processes of one rotation promote at once: one promotion, seven refusals, two entries."""
    keys = database.key_store()
    database.current()
    kid = database.publish()
    rotation = keys.open("rotation", Request("the tests"), None)
    assert rotation is not None
    keys.confirm(rotation, timedelta(0))
    before = len(entries(database))
    found = at_once(AT_ONCE, lambda _: keys.promote(rotation, kid, NO_WAIT, "to try it"))
    assert sum(each is None for each in found) == 1
    assert all(isinstance(each, Refused) for each in found if each is not None)
    assert [entry[0] for entry in entries(database)[before:]] == ["demoted", "promoted"]


def test_i10_of_cleanups_at_once_one_is_made(database: Database) -> None:
    """Eight cleanups of one key: one disables it, seven say that it is not there to be disabled."""
    kid = database.previous()
    key = database.key_store().look().ring.find(kid)
    cleaner = database.cleaner()
    found = at_once(AT_ONCE, lambda number: cleaner.clean_up(key, Request(f"run {number}"), "due", {}))
    assert sorted(found) == [False] * (AT_ONCE - 1) + [True]
    assert [entry[0] for entry in entries(database)].count("disabled") == 1


# ------------------------------------------------------------------------------------------------ I15: the ledger


def test_i15_every_change_of_a_key_is_one_entry(database: Database) -> None:
    """From generated to compromised: kid, old and new state, actor, rotation and reason, in this order and no more."""
    keys = database.key_store()
    first = keys.open("bootstrap", Request("the first run", "run-1"), None)
    assert first is not None
    a, b, c = database.new_key(), database.new_key(), database.new_key()
    keys.insert(first, a, "generating")
    keys.promote(first, a.kid, NO_WAIT, "promoting")
    keys.close(first, "done", "the first key signs")
    second = keys.open("rotation", Request("the second run"), None)
    assert second is not None
    keys.insert(second, b, "generating")
    keys.confirm(second, timedelta(0))
    keys.promote(second, b.kid, NO_WAIT, "promoting")
    keys.roll_back(second, a.kid, "it does not verify")
    keys.confirm(second, timedelta(0))
    keys.hold_cleanup(second, b.kid, "nobody has looked")
    keys.close(second, "rolled back", "rolled back")
    keys.release("eve")
    database.cleaner().clean_up(keys.look().ring.find(b.kid), Request("the cleanup"), "its tokens are dead", {})
    third = keys.open("republish", Request("a person"), None)
    assert third is not None
    keys.republish(third, b.kid, "cleaned up too early")
    keys.close(third, "done", "it verifies again")
    database.publish(c)
    database.run("owner", COMPROMISE, c.kid)
    one, two, three = first.id, second.id, third.id
    hand = "by hand: keyrotation_owner"
    assert entries(database) == [
        ("opened", None, None, None, "the first run", one, "asked for by a person"),
        ("generated", a.kid, None, "next", "the first run", one, "generating"),
        ("promoted", a.kid, "next", "current", "the first run", one, "promoting"),
        ("closed", a.kid, None, None, "the first run", one, "the first key signs"),
        ("opened", None, None, None, "the second run", two, "asked for by a person"),
        ("generated", b.kid, None, "next", "the second run", two, "generating"),
        ("demoted", a.kid, "current", "previous", "the second run", two, "promoting"),
        ("promoted", b.kid, "next", "current", "the second run", two, "promoting"),
        ("demoted", b.kid, "current", "previous", "the second run", two, "it does not verify"),
        ("rolled back to", a.kid, "previous", "current", "the second run", two, "it does not verify"),
        ("cleanup put on hold", b.kid, None, None, "the second run", two, "nobody has looked"),
        ("closed", b.kid, None, None, "the second run", two, "rolled back"),
        ("cleanup released", b.kid, None, None, "eve", None, "released"),
        ("disabled", b.kid, "previous", "disabled", "the cleanup", None, "its tokens are dead"),
        ("opened", None, None, None, "a person", three, "asked for by a person"),
        ("republished", b.kid, "disabled", "previous", "a person", three, "cleaned up too early"),
        ("closed", None, None, None, "a person", three, "it verifies again"),
        ("generated", c.kid, None, "next", hand, None, "by hand"),
        ("disabled as compromised", c.kid, "next", "disabled", hand, None, "by hand, by keyrotation_owner"),
    ]
    assert broken_links(database.records().entries()) == []


def test_i15_the_entry_is_in_the_same_transaction(database: Database) -> None:
    """What is rolled back has no entry; what is seen has one."""
    kid = database.publish()
    session = database.connect("owner")
    database.ask(session, PROMOTE, kid)
    assert database.ask(session, "SELECT event FROM key_rotation.ledger ORDER BY seq DESC LIMIT 1") == [("promoted",)]
    session.rollback()
    assert [entry[0] for entry in entries(database)] == ["generated"]


CHANGES = {
    "generate": "INSERT INTO signing_keys (kid, public_jwk, private_key_ciphertext) VALUES (%(kid)s, %(jwk)s, '\\x00')",
    "promote": DEMOTE + "; UPDATE signing_keys SET status = 'current' WHERE kid = %(next)s",
    "disable": "UPDATE signing_keys SET enabled = FALSE WHERE kid = %(previous)s",
    "compromise": "UPDATE signing_keys SET status = 'disabled', compromised = TRUE WHERE kid = %(next)s",
    "roll back": DEMOTE + "; UPDATE signing_keys SET status = 'current' WHERE kid = %(previous)s",
    "hold a cleanup": "UPDATE signing_keys SET cleanup_hold = 'why not' WHERE kid = %(previous)s",
    "edit": "UPDATE signing_keys SET retain_until = now() WHERE kid = %(previous)s",
    "open": EMERGENCY,
    "hold": ENVIRONMENT_HELD,
}


@pytest.mark.parametrize("change", CHANGES)
def test_i15_without_its_entry_no_change_is_made(database: Database, change: str) -> None:
    """Where the ledger refuses the entry, the whole transaction is undone (F74)."""
    previous, new = database.previous(), database.new_key()
    values = {"kid": new.kid, "jwk": json.dumps(dict(new.public_jwk)), "previous": previous, "next": None if change == "generate" else database.publish()}
    database.run(
        "superuser",
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no room for an entry'; END $$;"
        "CREATE TRIGGER zz_full BEFORE INSERT ON key_rotation.ledger FOR EACH ROW EXECUTE FUNCTION full_disk()",
    )
    before = database.everything()
    with database.connect("owner") as session, session.cursor() as cursor, pytest.raises(psycopg2.Error, match="no room for an entry"):
        cursor.execute(CHANGES[change], values)
    session.rollback()
    assert database.everything() == before


ROLES = ("rotator", "cleaner", "auditor", "reader", "identity_admin")


@pytest.mark.parametrize("role", [*ROLES, "owner", "superuser"])
def test_i15_the_ledger_is_append_only(database: Database, role: str) -> None:
    """No service role has the right, and owner and administrator are refused by trigger."""
    database.publish()
    changes = (
        "UPDATE key_rotation.ledger SET actor = 'nobody'",
        "UPDATE key_rotation.ledger SET hash = hash",
        "DELETE FROM key_rotation.ledger",
        "TRUNCATE key_rotation.ledger",
    )
    found = verdicts(database, role, NOBODY, {change: (change, ()) for change in changes})
    said = "P0001 the ledger is append-only: {} is refused" if role in ("owner", "superuser") else "42501 permission denied for table ledger"
    assert found == {change: said.format(change.split()[0]) for change in changes}


@pytest.mark.parametrize("role", ["rotator", "cleaner"])
def test_i15_what_the_database_writes_nobody_forges(shared: Database, role: str) -> None:
    """The columns that an entry gets from the database are not the writers' to give."""
    columns = ("seq", "at", "environment", "old_status", "new_status", "previous_hash", "hash")
    forged = "INSERT INTO key_rotation.ledger (event, actor, {}) VALUES ('promoted', 'nobody', NULL)"
    tries: dict[str, tuple[str, Any]] = {column: (forged.format(column), ()) for column in columns}
    assert verdicts(shared, role, NOBODY, tries) == dict.fromkeys(columns, "42501 permission denied for table ledger")


@pytest.mark.parametrize("role", ["rotator", "owner"])
def test_i15_who_was_logged_in_stands_in_every_entry(database: Database, role: str) -> None:
    """A writer chooses the actor's words, and not the login under evidence."""
    database.run(role, "INSERT INTO key_rotation.ledger (event, actor, evidence) VALUES ('seen', 'somebody else', '{\"db_user\": \"somebody else\"}')")
    assert database.value("auditor", "SELECT evidence ->> 'db_user' FROM key_rotation.ledger") == f"keyrotation_{role}"


def test_i15_an_entry_by_the_owners_hand_is_chained_like_any_other(database: Database) -> None:
    """Number, instant, environment and hashes that a hand gives are not taken."""
    database.run(
        "owner",
        "INSERT INTO key_rotation.ledger (seq, at, environment, event, actor, previous_hash, hash) "
        "VALUES (77, '2001-01-01', 'production', 'seen', 'nobody', 'me', 'me')",
    )
    assert database.run("auditor", "SELECT seq, environment, at > now() - interval '1 minute' FROM key_rotation.ledger") == [(1, "test", True)]
    assert broken_links(database.records().entries()) == []


@pytest.mark.parametrize(
    ("change", "columns"),
    [
        ("retain_until = now()", ["retain_until"]),
        ("private_key_ciphertext = '\\x01', sealed_by = 'another'", ["private_key_ciphertext", "sealed_by"]),
        ("never_promote = TRUE, published_seen_at = now()", ["never_promote", "published_seen_at"]),
    ],
)
def test_i15_what_a_hand_edits_is_recorded(database: Database, change: str, columns: list[str]) -> None:
    """The columns are named, and what they hold is not shown."""
    kid = database.previous()
    database.run("owner", "UPDATE signing_keys SET retain_until = '2100-01-01' WHERE kid = %s", kid)
    database.run("owner", f"UPDATE signing_keys SET {change} WHERE kid = %s", kid)
    ((event, about, actor, evidence),) = database.run("auditor", "SELECT event, kid, actor, evidence FROM key_rotation.ledger ORDER BY seq DESC LIMIT 1")
    assert (event, about, actor) == ("edited", kid, "by hand: keyrotation_owner")
    assert evidence == {"columns": columns, "db_user": "keyrotation_owner"}


def test_i15_what_the_rotator_notes_is_no_change_of_the_key(database: Database) -> None:
    """Seeing a key published, or spending a canary, writes no entry of its own."""
    keys = database.key_store()
    kid = database.publish(database.new_key(canaries=2))
    rotation = keys.open("rotation", Request("the tests"), None)
    assert rotation is not None
    before = len(entries(database))
    keys.confirm(rotation, timedelta(0))
    keys.spend_canaries(rotation, kid, 1)
    assert len(entries(database)) == before


# ---- the hash chain

anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=30)
words = st.one_of(anything, st.sampled_from(["", "it's", 'say "no"', "a\nb\r\n", "%s :kid \\", "kid=3:abc\nevent-\n", "Ä漢字🔑", "\u202e\u0301"]))
nested = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def shared(database_factory: Callable[..., Database]) -> Database:
    """A database for those tests of this module that need none of their own."""
    return database_factory()


@pytest.fixture(scope="module")
def work(shared: Database) -> Work:
    """A rotation that is open there."""
    return opened(shared)


@pytest.fixture(scope="module")
def records(shared: Database) -> PostgresRecords:
    """What the auditor reads there."""
    return shared.records()


@settings(max_examples=30, deadline=None)
@given(
    event=words,
    actor=words,
    kid=words | st.none(),
    reason=words | st.none(),
    run=words | st.none(),
    rotation=st.integers(1, 2**63 - 1) | st.none(),
    evidence=st.dictionaries(words, nested, max_size=3),
)
def test_i15_code_and_database_make_the_same_hash(
    shared: Database,
    records: PostgresRecords,
    event: str,
    actor: str,
    kid: str | None,
    reason: str | None,
    run: str | None,
    rotation: int | None,
    evidence: dict[str, Any],
) -> None:
    """keyrotation.domain.ledger computes each entry's hash as the database did, whatever stands in it."""
    seq, _ = records.head()
    shared.run(
        "rotator",
        "INSERT INTO key_rotation.ledger (event, actor, kid, reason, flow_run_id, rotation_id, evidence) VALUES (%s, %s, %s, %s, %s, %s, %s)",
        event,
        actor,
        kid,
        reason,
        run,
        rotation,
        json.dumps(evidence),
    )
    (entry,) = records.entries(after=seq)
    assert (entry.event, entry.actor, entry.kid, entry.reason, entry.flow_run_id, entry.rotation_id) == (event, actor, kid, reason, run, rotation)
    assert entry.computed_hash() == entry.hash
    assert (entry.seq, entry.hash) == records.head()


@pytest.mark.parametrize(
    "column", ["at", "environment", "rotation_id", "kid", "event", "old_status", "new_status", "actor", "flow_run_id", "reason", "evidence"]
)
def test_i15_every_column_is_under_the_hash(database: Database, column: str) -> None:
    """An edit of any column, by somebody who can switch triggers off, is found."""
    database.current()
    otherwise = {"at": "at + interval '1 microsecond'", "rotation_id": "coalesce(rotation_id, 0) + 1", "evidence": "evidence || '{\"more\": 1}'"}
    changed = otherwise.get(column, f"coalesce({column}, '') || 'x'")
    database.run("superuser", f"SET session_replication_role = replica; UPDATE key_rotation.ledger SET {column} = {changed} WHERE seq = 2")
    assert broken_links(database.records().entries()) == ["entry 2 was edited: its content does not match its hash"]


def test_i15_two_writers_do_not_fork_the_chain(database: Database) -> None:
    """Entries written at once come one after the other, with neither fork nor gap (F75)."""

    def write(number: int) -> None:
        with database.connect(("rotator", "cleaner")[number % 2]) as session:
            for entry in range(15):
                database.ask(session, "INSERT INTO key_rotation.ledger (event, actor) VALUES (%s, %s)", f"entry {entry}", f"writer {number}")
                session.commit()

    assert at_once(4, write) == [None] * 4
    assert database.records().head()[0] == 60
    assert broken_links(database.records().entries()) == []


def test_i15_a_writer_that_gives_up_leaves_no_gap(database: Database) -> None:
    """The next writer waits for it, and takes its number."""
    first = database.connect("rotator")
    database.ask(first, "INSERT INTO key_rotation.ledger (event, actor) VALUES ('seen', 'the first')")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(database.run, "cleaner", "INSERT INTO key_rotation.ledger (event, actor) VALUES ('seen', 'the second')")
        while not database.value("superuser", "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"):
            assert not waiting.done()
        first.rollback()
        waiting.result(timeout=10)
    assert database.run("auditor", "SELECT seq, actor FROM key_rotation.ledger") == [(1, "the second")]


# ------------------------------------------------------------------------------------------------ I17: who may what

COLUMNS = {
    "public.signing_keys": "kid alg public_jwk private_key_ciphertext sealed_by status enabled created_at published_at published_seen_at accepted_at promoted_at demoted_at "
    "demoted_seen_at retain_until disabled_at disabled_seen_at disabled_reason compromised never_promote cleanup_hold canaries canaries_spent rotation_id",
    "key_rotation.environment": "one_row name hold_reason hold_by held_at",
    "key_rotation.rotations": "id kind epoch opened_at actor flow_run_id reason lease_until old_kid new_kid rolled_back ended_at outcome message",
    "key_rotation.ledger": "seq at environment rotation_id kid event old_status new_status actor flow_run_id reason evidence previous_hash hash",
    "key_rotation.ledger_head": "one_row seq hash",
}
ALL = "*"
PUBLIC_FACTS = COLUMNS["public.signing_keys"].replace("private_key_ciphertext ", "").replace("canaries ", "")
OWN_ENTRIES = "rotation_id kid event actor flow_run_id reason evidence"
# What each role may, by table and verb. All that is not here is refused, and each cell is tried: column by column, and DELETE and TRUNCATE.
MAY: dict[str, dict[str, dict[str, str]]] = {
    "rotator": {
        "public.signing_keys": {
            "SELECT": PUBLIC_FACTS + " canaries",
            "INSERT": "kid alg public_jwk private_key_ciphertext sealed_by canaries rotation_id",
            "UPDATE": "status enabled published_seen_at accepted_at demoted_seen_at retain_until disabled_seen_at disabled_reason compromised never_promote "
            "cleanup_hold canaries_spent",
        },
        "key_rotation.environment": {"SELECT": ALL, "UPDATE": "hold_reason hold_by held_at"},
        "key_rotation.rotations": {
            "SELECT": ALL,
            "INSERT": "kind actor flow_run_id reason lease_until",
            "UPDATE": "epoch actor flow_run_id lease_until old_kid new_kid rolled_back ended_at outcome message",
        },
        "key_rotation.ledger": {"SELECT": ALL, "INSERT": OWN_ENTRIES},
        "key_rotation.ledger_head": {"SELECT": ALL},
    },
    "cleaner": {
        "public.signing_keys": {"SELECT": PUBLIC_FACTS, "UPDATE": "enabled"},
        "key_rotation.environment": {"SELECT": ALL},
        "key_rotation.rotations": {"SELECT": ALL},
        "key_rotation.ledger": {"SELECT": ALL, "INSERT": OWN_ENTRIES},
        "key_rotation.ledger_head": {"SELECT": ALL},
    },
    "auditor": {
        "public.signing_keys": {"SELECT": PUBLIC_FACTS},
        "key_rotation.environment": {"SELECT": ALL},
        "key_rotation.rotations": {"SELECT": ALL},
        "key_rotation.ledger": {"SELECT": ALL},
        "key_rotation.ledger_head": {"SELECT": ALL},
    },
    "reader": {
        "public.signing_keys": {"SELECT": PUBLIC_FACTS + " private_key_ciphertext"},
        "key_rotation.environment": {"SELECT": "name"},
        "key_rotation.rotations": {},
        "key_rotation.ledger": {},
        "key_rotation.ledger_head": {},
    },
    "identity_admin": {
        "public.signing_keys": {
            "SELECT": PUBLIC_FACTS + " private_key_ciphertext",
            "INSERT": "kid alg public_jwk private_key_ciphertext sealed_by status",
            "UPDATE": "status",
        },
        "key_rotation.environment": {"SELECT": ALL},
        "key_rotation.rotations": {"SELECT": ALL},
        "key_rotation.ledger": {},
        "key_rotation.ledger_head": {},
    },
}
TRIED = {
    "SELECT": "SELECT {column} FROM {table} WHERE FALSE",
    "INSERT": "INSERT INTO {table} ({column}) OVERRIDING SYSTEM VALUE SELECT NULL WHERE FALSE",
    "UPDATE": "UPDATE {table} SET {column} = DEFAULT WHERE FALSE",
    "DELETE": "DELETE FROM {table} WHERE FALSE",
    "TRUNCATE": "TRUNCATE {table}",
}


@pytest.mark.parametrize("table", COLUMNS)
@pytest.mark.parametrize("role", MAY)
def test_i17_each_role_may_just_this(shared: Database, role: str, table: str) -> None:
    """Role × verb × table × column: what the table above says, and nothing else."""
    columns = COLUMNS[table].split()
    there = shared.run("superuser", "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped", table)
    assert {name for (name,) in there} == set(columns)
    tries: dict[str, tuple[str, Any]] = {}
    granted = set()
    for verb, statement in TRIED.items():
        may = columns if MAY[role][table].get(verb) == ALL else MAY[role][table].get(verb, "").split()
        assert set(may) <= set(columns)
        granted |= {f"{verb} {column}" for column in may}
        tries |= {f"{verb} {column}": (statement.format(table=table, column=column), ()) for column in (columns if "{column}" in statement else [""])}
    found = verdicts(shared, role, NOBODY, tries)
    assert {what for what, said in found.items() if said == "let through"} == granted
    assert {said.partition(" ")[0] for what, said in found.items() if what not in granted} <= {"42501"}


NOT_THEIRS = (
    "CREATE TABLE public.mine ()",
    "CREATE TABLE key_rotation.mine ()",
    "CREATE SCHEMA mine",
    "ALTER TABLE public.signing_keys ADD COLUMN mine text",
    "ALTER TABLE public.signing_keys DISABLE TRIGGER guard_2_change",
    "ALTER TABLE key_rotation.ledger DISABLE TRIGGER ALL",
    "DROP TRIGGER append_only ON key_rotation.ledger",
    "DROP TABLE key_rotation.ledger",
    "DROP INDEX public.one_current_key",
    "DROP FUNCTION key_rotation.is_by_hand CASCADE",
    "CREATE OR REPLACE FUNCTION key_rotation.is_by_hand() RETURNS boolean LANGUAGE sql RETURN true",
    "CREATE FUNCTION public.pg_has_role(name, text, text) RETURNS boolean LANGUAGE sql RETURN true",
    "SET ROLE keyrotation_owner",
    "SET SESSION AUTHORIZATION keyrotation_owner",
    "SET session_replication_role = replica",
    "GRANT keyrotation_owner TO CURRENT_USER",
    "GRANT SELECT ON public.signing_keys TO PUBLIC",
    "ALTER ROLE keyrotation_owner PASSWORD 'mine'",
    "COPY public.signing_keys TO PROGRAM 'cat'",
)


@pytest.mark.parametrize("role", MAY)
def test_i17_no_role_changes_the_schema_or_itself(shared: Database, role: str) -> None:
    """Tables, triggers, functions, grants and roles are the owner's and the administrator's."""
    found = verdicts(shared, role, NOBODY, {statement: (statement, ()) for statement in NOT_THEIRS})
    assert {statement: said for statement, said in found.items() if not said.startswith(("42501", "42503"))} == {}


@pytest.mark.parametrize("role", ["auditor", "reader"])
def test_i17_who_only_reads_is_in_a_read_only_transaction(shared: Database, role: str) -> None:
    """A second fence behind the grants."""
    assert shared.value(role, "SHOW transaction_read_only") == "on"


@pytest.mark.parametrize("role", ["rotator", "cleaner", "identity_admin"])
def test_i17_a_writers_transaction_ends_by_itself(shared: Database, role: str) -> None:
    """A writer that was frozen does not hold its locks against an emergency."""
    assert (shared.value(role, "SHOW transaction_timeout"), shared.value(role, "SHOW lock_timeout")) == ("10s", "3s")


def test_i17_a_login_of_ones_own_has_the_guards_of_its_role(database: Database) -> None:
    """Membership counts, not the name: a login IN ROLE keyrotation_rotator writes only with the fence, and is no hand."""
    login, kid = f"rotator_of_{database.name}", database.current()
    database.run("superuser", f"CREATE ROLE {login} LOGIN PASSWORD 'x' IN ROLE keyrotation_rotator")
    work = opened(database)
    with psycopg2.connect(database.server.url(login, "x", database.name)) as session, pytest.raises(psycopg2.Error, match="superseded"):
        database.ask(session, "UPDATE signing_keys SET accepted_at = now() WHERE kid = %s", kid)
    session.rollback()
    with session:
        database.ask(session, SAY + "UPDATE signing_keys SET accepted_at = now() WHERE kid = %s", *work, kid)
    session.close()
    assert database.row(kid)["accepted_at"]


# ------------------------------------------------------------------------------------------------ I22: the fence

FENCED = {
    "publish": "INSERT INTO signing_keys (kid, public_jwk, private_key_ciphertext) VALUES (%(kid)s, %(jwk)s, '\\x00')",
    "promote": DEMOTE + "; UPDATE signing_keys SET status = 'current' WHERE kid = %(next)s",
    "roll back": DEMOTE + "; UPDATE signing_keys SET status = 'current' WHERE kid = %(previous)s",
    "republish": "UPDATE signing_keys SET status = 'previous' WHERE kid = %(disabled)s",
    "disable": "UPDATE signing_keys SET enabled = FALSE WHERE kid = %(previous)s",
    "compromise": "UPDATE signing_keys SET status = 'disabled', compromised = TRUE WHERE kid = %(next)s",
    "see published": "UPDATE signing_keys SET published_seen_at = now() WHERE kid = %(next)s",
    "see demoted": "UPDATE signing_keys SET demoted_seen_at = now() WHERE kid = %(previous)s",
    "see disabled": "UPDATE signing_keys SET disabled_seen_at = now() WHERE kid = %(disabled)s",
    "accept": "UPDATE signing_keys SET accepted_at = now() WHERE kid = %(next)s",
    "retain": "UPDATE signing_keys SET retain_until = now() + interval '1 day' WHERE kid = %(previous)s",
    "never promote": "UPDATE signing_keys SET never_promote = TRUE WHERE kid = %(previous)s",
    "hold a cleanup": "UPDATE signing_keys SET cleanup_hold = 'late' WHERE kid = %(previous)s",
    "spend a canary": "UPDATE signing_keys SET canaries_spent = 1 WHERE kid = %(next)s",
    "change a reason": "UPDATE signing_keys SET disabled_reason = 'late' WHERE kid = %(disabled)s",
}


@pytest.mark.parametrize("claim", ["nothing", "a stale epoch", "an epoch to come", "a rotation that has ended"])
def test_i22_without_the_current_epoch_the_rotator_changes_nothing(database: Database, claim: str) -> None:
    """A process that wakes late, or never was told, is refused by the table itself, in every column that it may write."""
    ended = opened(database)
    database.run("rotator", CLOSE, ended.id)
    disabled, previous, new, following = database.previous(), database.previous(), database.new_key(), database.publish(database.new_key(canaries=2))
    database.run("owner", DISABLE, disabled)
    work = opened(database)
    database.run("rotator", "UPDATE key_rotation.rotations SET epoch = 2 WHERE id = %s", work.id)
    said = {"nothing": NOBODY, "a stale epoch": work, "an epoch to come": (work.id, "3"), "a rotation that has ended": ended}[claim]
    values = {"kid": new.kid, "jwk": json.dumps(dict(new.public_jwk)), "next": following, "previous": previous, "disabled": disabled}
    before = database.everything()
    found = verdicts(database, "rotator", said, {change: (statement, values) for change, statement in FENCED.items()})
    assert found == dict.fromkeys(FENCED, "KR001 superseded: this transaction does not hold the open rotation")
    assert database.everything() == before


def test_i22_the_fence_covers_all_that_the_rotator_may_change(shared: Database) -> None:
    """The list above is whole: it names each column that the rotator may UPDATE."""
    touched = " ".join(FENCED.values())
    assert [column for column in MAY["rotator"]["public.signing_keys"]["UPDATE"].split() if f"{column} =" not in touched] == []


def test_i22_with_it_the_rotator_does(database: Database) -> None:
    """The same session with the epoch of now is let through."""
    kid = database.publish()
    work = opened(database)
    database.run("rotator", "UPDATE key_rotation.rotations SET epoch = 2 WHERE id = %s", work.id)
    database.run("rotator", SAY + "UPDATE signing_keys SET published_seen_at = now() WHERE kid = %s", work.id, "2", kid)
    assert database.row(kid)["published_seen_at"]


@pytest.mark.parametrize("change", ["epoch = 1", "ended_at = NULL, outcome = NULL", "message = 'late'", "kind = 'emergency'", "lease_until = now()"])
def test_i22_a_rotation_that_has_ended_stays_so(database: Database, change: str) -> None:
    """Nobody opens it again, and its epoch is never lowered, by whichever hand."""
    work = opened(database)
    database.run("rotator", "UPDATE key_rotation.rotations SET epoch = 2 WHERE id = %s", work.id)
    if change == "epoch = 1":
        refused(database, "owner", f"UPDATE key_rotation.rotations SET {change}", says="has ended, or its epoch", code="KR001")
    database.run("rotator", CLOSE, work.id)
    refused(database, "owner", f"UPDATE key_rotation.rotations SET {change}", says="has ended, or its epoch", code="KR001")


def test_i22_a_second_rotation_is_not_opened(database: Database) -> None:
    """One is open at most, whatever its kind: an emergency has to take over or to close it."""
    opened(database, "emergency")
    refused(database, "rotator", OPEN, "rotation", says="one_open_rotation", code="23505")


def test_i22_a_persons_release_needs_no_rotation(database: Database) -> None:
    """A cleanup's hold is lifted by a person, at any time."""
    kid = database.previous()
    database.run("owner", "UPDATE signing_keys SET cleanup_hold = 'look first' WHERE kid = %s", kid)
    database.run("rotator", "UPDATE signing_keys SET cleanup_hold = NULL WHERE kid = %s", kid)
    assert entries(database)[-1][:2] == ("cleanup released", kid)


# ------------------------------------------------------------------------------------------------ the runbook, by hand


@pytest.mark.parametrize("which", ["next", "previous", "previous, before its time", "previous, on hold"])
def test_i07_the_runbooks_update_by_hand_disables_at_once(database: Database, which: str) -> None:
    """UPDATE signing_keys SET enabled=FALSE WHERE kid='…' works for a next and a previous key, erases the private half, and is recorded as by hand, by whom."""
    kid = database.previous() if which.startswith("previous") else database.current() and database.publish()
    if "before" in which:
        database.run("superuser", "UPDATE signing_keys SET retain_until = now() + interval '1 day' WHERE kid = %s", kid)
    if "hold" in which:
        database.run("superuser", KEY_HELD + ";" + ENVIRONMENT_HELD)
    database.run("owner", f"UPDATE signing_keys SET enabled=FALSE WHERE kid='{kid}'")
    row = database.row(kid)
    assert (row["status"], row["enabled"], row["compromised"], row["private_key_ciphertext"]) == ("disabled", False, False, None)
    assert row["disabled_reason"] == "by hand, by keyrotation_owner"
    assert row["public_jwk"]["kid"] == kid
    assert entries(database)[-1] == ("disabled", kid, which.partition(",")[0], "disabled", "by hand: keyrotation_owner", None, "by hand, by keyrotation_owner")


def test_i15_a_persons_own_login_is_named(database: Database) -> None:
    """Where people have logins of their own in the owner's role, the record says who it was."""
    alice, kid = f"alice_{database.name}", database.current() and database.publish()
    database.run("superuser", f"CREATE ROLE {alice} LOGIN PASSWORD 'x' IN ROLE keyrotation_owner")
    session = psycopg2.connect(database.server.url(alice, "x", database.name))
    with session:
        database.ask(session, DISABLE, kid)
    session.close()
    assert entries(database)[-1][4] == f"by hand: {alice}"


@pytest.mark.parametrize("role", ["owner", "superuser"])
@pytest.mark.parametrize(
    "statement", [DISABLE, COMPROMISE, "UPDATE signing_keys SET status = 'disabled' WHERE kid = %s", "UPDATE signing_keys SET enabled = FALSE WHERE %s <> ''"]
)
def test_i01_the_current_key_is_not_disabled_by_hand(database: Database, role: str, statement: str) -> None:
    """It signs: the refusal says so, and what to do."""
    kid = database.current()
    error = refused(database, role, statement, kid, says=f"signing key {kid} is current and cannot become disabled")
    assert hint(error) == ("tokens are signed with it now. Rotate first (keyrotation plan shows how); is it compromised, run the emergency-rotation deployment")


@pytest.mark.parametrize("role", ["owner", "superuser"])
def test_i08_a_disabled_key_is_not_enabled_by_hand(database: Database, role: str) -> None:
    """UPDATE … SET enabled=TRUE is refused, with the command that brings a key back."""
    kid = database.previous()
    database.run("owner", DISABLE, kid)
    error = refused(database, role, "UPDATE signing_keys SET enabled=TRUE WHERE kid=%s", kid, says=f"signing key {kid} is not enabled by hand")
    assert hint(error) == f"to bring back a key that was cleaned up too early: keyrotation republish ENVIRONMENT {kid}"


def test_i08_republish_brings_a_key_back_for_verification_only(database: Database) -> None:
    """Within a rotation the rotator publishes a disabled key again: previous, without private half, its waiting begun anew, never to be promoted."""
    kid = database.previous()
    database.run("owner", DISABLE, kid)
    before = database.row(kid)
    database.run("rotator", SAY + REPUBLISH, *opened(database, "republish"), kid)
    row = database.row(kid)
    assert (row["status"], row["enabled"], row["never_promote"], row["private_key_ciphertext"]) == ("previous", True, True, None)
    assert row["published_at"] > before["published_at"]
    assert row["demoted_at"] > before["demoted_at"]
    assert (row["published_seen_at"], row["accepted_at"], row["retain_until"], row["disabled_at"], row["disabled_reason"]) == (None,) * 5
    refused(database, "owner", DEMOTE + ";" + PROMOTE, kid, says="never promoted again")


@pytest.mark.parametrize("role", ["identity_admin", "cleaner"])
def test_i08_no_other_role_republishes(database: Database, role: str) -> None:
    """A key that was cleaned up is brought back by a rotation of ours or by hand, and by no service."""
    kid = database.previous()
    database.run("owner", DISABLE, kid)
    statement = "UPDATE signing_keys SET enabled = TRUE WHERE kid = %s" if role == "cleaner" else REPUBLISH
    error = refused(database, role, SAY + statement, *opened(database, "republish"), kid, says="is not enabled by hand|is disabled and not published again")
    assert "keyrotation republish ENVIRONMENT" in hint(error)


@pytest.mark.parametrize("role", ["rotator", "owner"])
def test_i08_a_key_that_never_signed_is_not_republished(database: Database, role: str) -> None:
    """There is no token that it could verify; the refusal says so."""
    kid = database.publish()
    database.run("owner", DISABLE, kid)
    refused(database, role, SAY + REPUBLISH, *opened(database, "republish"), kid, says="never signed: there is no token that it could verify")


def test_i13_a_key_that_was_rolled_back_never_signs_again(database: Database) -> None:
    """After a roll back the failed key is previous for good: neither the rotator, nor the service, nor a hand promotes it."""
    keys = database.key_store()
    old, failed = database.current(), database.publish()
    rotation = keys.open("rotation", Request("the tests"), None)
    assert rotation is not None
    keys.confirm(rotation, timedelta(0))
    keys.promote(rotation, failed, NO_WAIT, "promoting")
    keys.roll_back(rotation, old, "it does not verify")
    row = database.row(failed)
    assert (row["status"], row["never_promote"], database.status(old)) == ("previous", True, "current")
    work = Work(str(rotation.id), str(rotation.epoch))
    for role in ("rotator", "identity_admin", "owner", "superuser"):
        refused(database, role, SAY + DEMOTE + ";" + PROMOTE, *work, failed, says="rolled back once and is never promoted again")
    for role in ("rotator", "owner", "superuser"):
        refused(database, role, SAY + "UPDATE signing_keys SET never_promote = FALSE WHERE kid = %s", *work, failed, says="never_promote is for good")
    with pytest.raises(Refused, match="cannot be rolled back to"):
        keys.roll_back(rotation, failed, "the other way")


def test_i15_no_entry_without_the_environments_name(database_factory: Callable[..., Database]) -> None:
    """A database that nobody named takes no key, and says what to do."""
    nameless = database_factory()
    nameless.run("superuser", "DELETE FROM key_rotation.environment")
    key = nameless.new_key()
    error = refused(nameless, "owner", INSERT, key.kid, json.dumps(dict(key.public_jwk)), says="no environment name yet")
    assert "INSERT INTO key_rotation.environment (name)" in hint(error)
