"""The adapters of keyrotation/adapters/key_store.py on a real PostgreSQL: what each call does, refuses, and says where it could not."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from urllib.parse import quote

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

from keyrotation.adapters.key_store import PostgresKeyStore
from keyrotation.connections import database as adapter
from keyrotation.connections.queries import query
from keyrotation.domain.decision import Request, Rotation
from keyrotation.domain.errors import Busy, Denied, KeyRotationError, Refused, SettingsError, Superseded, Unreachable, WorldError
from keyrotation.domain.keys import Status
from keyrotation.domain.ledger import broken_links
from keyrotation.ports import Gate, NewKey
from keyrotation.secrets import SecretRef
from sandbox.processes import free_port

if TYPE_CHECKING:
    from tests.conftest import Database

ME, ANOTHER = Request("me", "run-1"), Request("another", "run-2")
HOUR = timedelta(hours=1)
NO_WAIT = Gate(timedelta(0), proof=False)
LEASE_OVER = "UPDATE key_rotation.rotations SET lease_until = now()"


def opened(keys: PostgresKeyStore, request: Request = ME) -> Rotation:
    """A rotation that is open."""
    rotation = keys.open("rotation", request, None)
    assert rotation is not None
    return rotation


def taken(keys: PostgresKeyStore, rotation: Rotation) -> Rotation:
    """The same under another run's epoch."""
    new = keys.take_over(rotation, replace(ANOTHER, flow_run_id=rotation.flow_run_id))
    assert new is not None
    return new


@contextmanager
def at_this_instant(database: Database, *prepared: str) -> Iterator[Connection]:
    """A transaction of the rotator's whose now() is the now() of what was prepared in it. Undone."""
    engine = create_engine(database.url("superuser"), poolclass=NullPool)
    with engine.connect() as connection:
        for statement in prepared:
            connection.execute(text(statement))
        connection.execute(text("SET LOCAL ROLE keyrotation_rotator"))
        yield connection


# ------------------------------------------------------------------------------------------------ looking


def test_a_look_shows_keys_rotation_hold_and_the_databases_clock(database: Database) -> None:
    """One value holds all that a decision needs; canaries are counted and never shown."""
    keys = database.key_store()
    database.current()
    following = database.publish(database.new_key(canaries=5))
    rotation = opened(keys)
    keys.spend_canaries(rotation, following, 2)
    keys.hold("an audit", "eve")
    facts = keys.look()
    assert facts.ring.next is not None
    assert (facts.ring.next.kid, facts.ring.next.canaries_left) == (following, 3)
    assert facts.open_rotation is not None
    assert (facts.open_rotation.id, facts.open_rotation.environment) == (rotation.id, "test")
    assert facts.hold is not None
    assert (facts.hold.reason, facts.hold.by) == ("an audit", "eve")
    assert abs((facts.now - database.value("superuser", "SELECT now()")).total_seconds()) < 60
    assert facts.now.tzinfo is not None
    assert "canary" not in repr(facts)


def test_an_empty_database_has_no_keys(database: Database) -> None:
    """Nothing yet is no error."""
    facts = database.key_store().look()
    assert (facts.ring.keys, facts.open_rotation, facts.hold) == ((), None, None)
    assert database.key_store().environment_name() == "test"


@pytest.mark.parametrize("role", ["cleaner", "auditor"])
def test_the_other_roles_see_the_same_without_canaries(database: Database, role: str) -> None:
    """They may not read the canaries, and do not have to."""
    kid = database.publish(database.new_key(canaries=5))
    looking = database.cleaner() if role == "cleaner" else database.records()
    assert looking.look().ring.find(kid).canaries_left == 0
    assert looking.environment_name() == "test"


def test_the_records_are_rotations_entries_and_head(database: Database) -> None:
    """The auditor reads the newest rotations first, the ledger in order from any number on, and its head."""
    keys, records = database.key_store(), database.records()
    first = keys.close(opened(keys), "done", "nothing to do")
    second = opened(keys)
    assert [rotation.id for rotation in records.rotations(10)] == [second.id, first.id]
    assert [rotation.id for rotation in records.rotations(1)] == [second.id]
    entries = list(records.entries())
    assert [(entry.seq, entry.event) for entry in entries] == [(1, "opened"), (2, "closed"), (3, "opened")]
    assert [entry.seq for entry in records.entries(after=2)] == [3]
    assert records.head() == (3, entries[-1].hash)
    assert broken_links(entries) == []


def test_an_entry_of_ones_own_is_read_again(database: Database) -> None:
    """Evidence that was recorded is found by rotation and event, the newest first; what was never recorded is None."""
    keys = database.key_store()
    rotation = opened(keys)
    keys.record("seen", ME, rotation_id=rotation.id, kid="a", reason="first", evidence={"gateways": ["a", "b"], "n": 1})
    keys.record("seen", ME, rotation_id=rotation.id, kid="a", reason="second", evidence={"n": 2})
    found = keys.evidence_of(rotation.id, "seen")
    assert found is not None
    assert found["n"] == 2
    assert keys.evidence_of(rotation.id, "never") is None


# ------------------------------------------------------------------------------------------------ opening, taking over, closing


def test_opening_makes_one_rotation(database: Database) -> None:
    """The first is given its number, epoch 1 and a lease; the second is told to look again."""
    keys = database.key_store()
    rotation = opened(keys)
    assert (rotation.epoch, rotation.kind, rotation.actor, rotation.flow_run_id, rotation.ended_at) == (1, "rotation", "me", "run-1", None)
    assert rotation.lease_until - rotation.opened_at == timedelta(seconds=60)
    assert keys.open("emergency", ANOTHER, None) is None
    assert keys.look().open_rotation == rotation


def test_on_hold_nothing_is_opened(database: Database) -> None:
    """The hold is asked for in the statement: one that came after the look counts."""
    keys = database.key_store()
    keys.hold("an audit", "eve")
    assert keys.open("rotation", ME, None) is None
    keys.release("eve")
    assert keys.open("rotation", ME, None) is not None


@pytest.mark.parametrize(("age", "is_due"), [("59 minutes 59.999999 seconds", False), ("1 hour", True), ("1 hour 0.000001 seconds", True)])
def test_i21_due_is_asked_inside_the_opening_statement(database: Database, age: str, is_due: bool) -> None:
    """A key that was promoted since the look is not rotated again; at half an interval to the microsecond it is due."""
    database.current()
    values = {"kind": "rotation", "actor": "me", "flow_run_id": None, "reason": "due", "lease": HOUR, "due_after": HOUR}
    with at_this_instant(database, f"UPDATE signing_keys SET promoted_at = now() - interval '{age}'") as connection:
        assert (connection.execute(query("open"), values).one_or_none() is not None) is is_due


def test_i21_who_was_late_finds_it_done(database: Database) -> None:
    """Ten scheduled runs that all decided to rotate, one after the other: the first opens, the others are not due any more."""
    keys = database.key_store()
    database.current()
    database.run("superuser", "UPDATE signing_keys SET promoted_at = now() - interval '2 hours'")
    rotations = [keys.open("rotation", ME, HOUR)]
    assert rotations[0] is not None
    database.current()
    keys.close(rotations[0], "done", "rotated")
    rotations += [keys.open("rotation", ME, HOUR) for _ in range(9)]
    assert rotations[1:] == [None] * 9
    assert keys.open("rotation", ME, None) is not None  # a person's run does not ask


def test_taking_over_needs_a_dead_run(database: Database) -> None:
    """While the lease runs, nobody else takes over; once it is over, one does, under a new epoch."""
    keys = database.key_store()
    rotation = opened(keys)
    assert keys.take_over(rotation, ANOTHER) is None
    database.run("superuser", LEASE_OVER)
    new = keys.take_over(rotation, ANOTHER)
    assert new is not None
    assert (new.id, new.epoch, new.actor, new.flow_run_id) == (rotation.id, 2, "another", "run-2")
    assert new.lease_until > rotation.lease_until
    assert keys.take_over(rotation, ME) is None  # by an epoch that is over


def test_at_the_very_end_of_the_lease_the_run_counts_as_dead(database: Database) -> None:
    """The lease ends at lease_until: taken over then, and not a microsecond before."""
    rotation = opened(database.key_store())
    values = {"id": rotation.id, "epoch": 1, "actor": "another", "flow_run_id": "run-2", "lease": HOUR}
    for until, dead in (("now() + interval '1 microsecond'", False), ("now()", True)):
        with at_this_instant(database, f"UPDATE key_rotation.rotations SET lease_until = {until}") as connection:
            assert (connection.execute(query("take_over"), values).one_or_none() is not None) is dead


def test_the_same_flow_run_takes_its_own_rotation_over_at_once(database: Database) -> None:
    """Prefect runs a flow run again under its old id: it need not wait for its own lease."""
    keys = database.key_store()
    rotation = opened(keys)
    assert taken(keys, rotation).epoch == 2
    assert database.value("auditor", "SELECT event FROM key_rotation.ledger ORDER BY seq DESC LIMIT 1") == "taken over"


def test_of_those_who_take_over_at_once_one_does(database: Database) -> None:
    """Four runs find the same dead one: one epoch, three look again."""
    keys = database.key_store()
    rotation = opened(keys)
    database.run("superuser", LEASE_OVER)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: keys.take_over(rotation, Request(f"run {number}", f"run-{number}")), range(10, 14)))
    assert [new.epoch for new in found if new is not None] == [2]


def test_renewing_says_that_somebody_is_alive(database: Database) -> None:
    """The lease begins anew, and is never shortened."""
    keys = database.key_store()
    rotation = opened(keys)
    database.run("superuser", LEASE_OVER)
    keys.renew(rotation)
    renewed = keys.rotation(rotation.id).lease_until
    assert renewed > rotation.lease_until
    database.key_store(lease=timedelta(seconds=1)).renew(rotation)
    assert keys.rotation(rotation.id).lease_until == renewed


def test_closing_twice_is_closing_once(database: Database) -> None:
    """The answer of the first may have been lost: the same outcome again is success, without a second entry."""
    keys = database.key_store()
    rotation = opened(keys)
    closed = keys.close(rotation, "done", "all is well", {"tokens": 5})
    assert (closed.outcome, closed.message) == ("done", "all is well")
    assert keys.close(rotation, "done", "all is well") == closed
    found = keys.evidence_of(rotation.id, "closed")
    assert found is not None
    assert (found["tokens"], found["outcome"]) == (5, "done")
    assert database.records().head()[0] == 2
    with pytest.raises(Superseded, match="nothing more was changed"):
        keys.close(rotation, "failed", "another outcome")


class Keys(NamedTuple):
    """A kid in each state, and a key that is not there yet."""

    disabled: str
    previous: str
    next: str
    unborn: NewKey


Write = Callable[[PostgresKeyStore, Rotation, Keys], Any]
WRITES: dict[str, Write] = {
    "renew": lambda keys, rotation, _: keys.renew(rotation),
    "insert": lambda keys, rotation, kids: keys.insert(rotation, kids.unborn, "late"),
    "adopt": lambda keys, rotation, kids: keys.adopt(rotation, kids.next),
    "confirm": lambda keys, rotation, _: keys.confirm(rotation, HOUR),
    "accept": lambda keys, rotation, kids: keys.accept(rotation, kids.next),
    "promote": lambda keys, rotation, kids: keys.promote(rotation, kids.next, NO_WAIT, "late"),
    "gate_is_open": lambda keys, rotation, kids: keys.gate_is_open(rotation, kids.next, NO_WAIT),
    "name_promoted": lambda keys, rotation, kids: keys.name_promoted(rotation, None, kids.next),
    "roll_back": lambda keys, rotation, kids: keys.roll_back(rotation, kids.previous, "late"),
    "mark_rolled_back": lambda keys, rotation, kids: keys.mark_rolled_back(rotation, kids.previous),
    "republish": lambda keys, rotation, kids: keys.republish(rotation, kids.disabled, "late"),
    "hold_cleanup": lambda keys, rotation, kids: keys.hold_cleanup(rotation, kids.previous, "late"),
    "spend_canaries": lambda keys, rotation, kids: keys.spend_canaries(rotation, kids.next, 1),
    "close": lambda keys, rotation, _: keys.close(rotation, "done", "late"),
}


@pytest.fixture
def kids(database: Database) -> Keys:
    """A key in each state; another one is current."""
    disabled, previous = database.previous(), database.previous()
    database.run("owner", "UPDATE signing_keys SET enabled = FALSE WHERE kid = %s", disabled)
    return Keys(disabled, previous, database.publish(database.new_key(canaries=3)), database.new_key())


@pytest.mark.parametrize("ended", [False, True], ids=["taken over", "closed by another run"])
def test_i22_after_a_take_over_no_write_of_the_old_run_does_anything(database: Database, kids: Keys, ended: bool) -> None:
    """A run that was frozen and thaws is told that it is superseded, by each of its writes, and has changed nothing (F60, F77)."""
    keys = database.key_store()
    rotation = opened(keys)
    new = taken(keys, rotation)
    if ended:
        keys.close(new, "failed", "the other run ended it")
    before, said = database.everything(), {}
    for name, write in WRITES.items():
        with pytest.raises(Superseded, match="another run has taken over this rotation") as caught:
            write(keys, rotation, kids)
        said[name] = caught.value.retryable
    assert database.everything() == before
    assert said == dict.fromkeys(WRITES, False)


# ------------------------------------------------------------------------------------------------ publishing and promoting


def test_publishing_makes_the_next_key(database: Database) -> None:
    """The row is there with its canaries and its rotation; what was made is named by the rotation."""
    keys = database.key_store()
    rotation, key = opened(keys), database.new_key(canaries=2)
    keys.insert(rotation, key, "generating")
    row = database.row(key.kid)
    assert (row["status"], row["sealed_by"], row["rotation_id"], row["canaries"]) == ("next", "the tests", rotation.id, list(key.canaries))
    assert bytes.fromhex(row["private_key_ciphertext"].removeprefix("\\x")) == key.ciphertext
    assert keys.rotation(rotation.id).new_kid == key.kid


def test_a_key_is_adopted(database: Database) -> None:
    """A rotation may promote a key that it did not make."""
    keys = database.key_store()
    rotation, kid = opened(keys), database.publish()
    keys.adopt(rotation, kid)
    assert keys.rotation(rotation.id).new_kid == kid


def test_confirming_notes_the_instant_after_the_commit_once(database: Database, kids: Keys) -> None:
    """…_seen_at lie after what they saw, retention counts from there, and a second time moves nothing."""
    keys = database.key_store()
    rotation = opened(keys)
    demoted = keys.look().ring.require_current().kid
    database.promote(kids.next)
    fresh = database.publish()
    keys.confirm(rotation, HOUR)
    ring = keys.look().ring
    following, last = ring.find(fresh), ring.find(demoted)
    assert following.published_seen_at is not None
    assert following.published_seen_at > following.published_at
    assert last.demoted_at is not None
    assert last.demoted_seen_at is not None
    assert last.demoted_seen_at > last.demoted_at
    assert last.retain_until == last.demoted_seen_at + HOUR
    assert database.row(kids.disabled)["disabled_seen_at"]
    before = database.row(last.kid)
    keys.confirm(rotation, timedelta(0))
    assert keys.look().ring == ring
    assert database.row(last.kid) == before


def test_confirming_keeps_what_is_known_of_a_disabled_key(database: Database, kids: Keys) -> None:
    """When it was demoted and how long it was retained stays on record."""
    keys = database.key_store()
    before = database.row(kids.disabled)
    keys.confirm(opened(keys), HOUR)
    after = database.row(kids.disabled)
    assert {name for name in after if after[name] != before[name]} == {"disabled_seen_at"}


GATES = [
    ("seen, time over", "now() - interval '1 hour'", "NULL", False, False, True),
    ("a microsecond early", "now() - interval '59 minutes 59.999999 seconds'", "now()", True, False, False),
    ("a microsecond late", "now() - interval '1 hour 0.000001 seconds'", "NULL", False, False, True),
    ("not seen", "NULL", "now()", True, False, False),
    ("not accepted", "now() - interval '2 hours'", "NULL", True, False, False),
    ("accepted", "now() - interval '1 hour'", "now()", True, False, True),
    ("never to be promoted", "now() - interval '2 hours'", "now()", True, True, False),
]


@pytest.mark.parametrize(("seen", "accepted", "proof", "never", "is_open"), [gate[1:] for gate in GATES], ids=[gate[0] for gate in GATES])
def test_i06_the_gate_stands_in_the_promoting_statement(database: Database, seen: str, accepted: str, proof: bool, never: bool, is_open: bool) -> None:
    """Promoted only if seen long enough and, where that can be shown, shown to be known; the question alone has the same answer."""
    database.current()
    kid = database.publish()
    rotation = opened(database.key_store())
    prepared = f"UPDATE signing_keys SET published_seen_at = {seen}, accepted_at = {accepted}, never_promote = {never} WHERE status = 'next'"
    with at_this_instant(database, prepared) as connection:
        values = {"kid": kid, "wait": HOUR, "proof": proof}
        said = {"actor": "me", "flow_run_id": None, "rotation_id": str(rotation.id), "epoch": "1", "reason": None, "evidence": None}
        connection.execute(query("say"), said)
        assert connection.execute(query("gate_is_open"), values).scalar_one() is is_open
        connection.execute(query("demote_current"), {"kid": kid})
        assert connection.execute(query("promote"), values).rowcount == is_open


def test_i06_the_first_key_of_all_waits_for_nobody(database: Database) -> None:
    """No gateway can hold a set without it."""
    keys = database.key_store()
    rotation, key = opened(keys), database.new_key()
    keys.insert(rotation, key, "the initial key")
    keys.promote(rotation, key.kid, Gate(HOUR, proof=True), "the initial key")
    assert database.status(key.kid) == "current"


def test_promoting_names_both_keys(database: Database) -> None:
    """The rotation knows which key it replaced, also after a second try: the way back depends on it."""
    keys = database.key_store()
    old, new = database.current(), database.publish()
    rotation = opened(keys)
    keys.confirm(rotation, HOUR)
    keys.promote(rotation, new, NO_WAIT, "promoting")
    work = keys.rotation(rotation.id)
    assert (work.old_kid, work.new_kid, work.rolled_back) == (old, new, False)
    keys.name_promoted(rotation, None, new)
    assert keys.rotation(rotation.id).old_kid == old


def test_rolling_back_restores_the_old_key_and_marks_the_new(database: Database) -> None:
    """One transaction: the old key signs again, the new one verifies and is never promoted again, the rotation says so."""
    keys = database.key_store()
    old, new = database.current(), database.publish()
    rotation = opened(keys)
    keys.confirm(rotation, HOUR)
    keys.promote(rotation, new, NO_WAIT, "promoting")
    keys.roll_back(rotation, old, "it does not verify")
    ring = keys.look().ring
    assert ring.current is not None
    assert ring.current.kid == old
    failed = ring.find(new)
    assert (failed.status, failed.never_promote) == (Status.PREVIOUS, True)
    assert keys.rotation(rotation.id).rolled_back
    assert (ring.current.demoted_at, ring.current.retain_until) == (None, None)


def test_where_the_service_rolled_back_the_marks_are_ours(database: Database) -> None:
    """Under authority = "api" the promotion back is the service's, and the marks are the same; a key that still signs is not marked."""
    keys = database.key_store()
    old, failed = database.current(), database.current()
    rotation = opened(keys)
    with pytest.raises(Refused, match="was not rolled back"):
        keys.mark_rolled_back(rotation, failed)
    database.promote(old)
    keys.mark_rolled_back(rotation, failed)
    assert database.row(failed)["never_promote"]
    assert keys.rotation(rotation.id).rolled_back


# ------------------------------------------------------------------------------------------------ cleaning up


def test_i07_a_cleanup_disables_and_erases(database: Database, kids: Keys) -> None:
    """The cleaner's one UPDATE; the entry holds its reason and evidence."""
    key = database.key_store().look().ring.find(kids.previous)
    assert database.cleaner().clean_up(key, ME, "its tokens are dead", {"retention": "48h"})
    row = database.row(key.kid)
    assert (row["status"], row["private_key_ciphertext"], row["disabled_reason"]) == ("disabled", None, "its tokens are dead")
    ((actor, run, evidence),) = database.run("auditor", "SELECT actor, flow_run_id, evidence FROM key_rotation.ledger ORDER BY seq DESC LIMIT 1")
    assert (actor, run, evidence["retention"]) == ("me", "run-1", "48h")


def test_i07_a_cleanup_finds_the_key_current_again(database: Database) -> None:
    """Rolled back since it was scheduled: the key signs, and is left alone (F52)."""
    keys = database.key_store()
    old, new = database.current(), database.publish()
    rotation = opened(keys)
    keys.confirm(rotation, timedelta(0))
    keys.promote(rotation, new, NO_WAIT, "promoting")
    keys.confirm(rotation, timedelta(0))
    scheduled_for = keys.look().ring.find(old)
    keys.roll_back(rotation, old, "it does not verify")
    before = database.everything()
    assert not database.cleaner().clean_up(scheduled_for, ME, "due", {})
    assert database.everything() == before
    assert database.status(old) == "current"


def test_i07_a_cleanup_is_for_one_demotion(database: Database) -> None:
    """Promoted and demoted again since: the old cleanup does nothing, the one for the new demotion does (F53)."""
    keys, cleaner = database.key_store(), database.cleaner()
    kid = database.previous()
    first = keys.look().ring.find(kid)
    database.promote(kid)
    database.current()
    rotation = opened(keys)
    keys.confirm(rotation, timedelta(0))
    second = keys.look().ring.find(kid)
    assert first.demoted_at != second.demoted_at
    assert not cleaner.clean_up(first, ME, "due", {})
    assert database.status(kid) == "previous"
    assert cleaner.clean_up(second, ME, "due", {})


def test_i07_before_its_time_a_cleanup_does_nothing(database: Database, kids: Keys) -> None:
    """The time is asked for in the statement, by the database's clock."""
    database.run("superuser", "UPDATE signing_keys SET retain_until = now() + interval '1 minute' WHERE status = 'previous'")
    assert not database.cleaner().clean_up(database.key_store().look().ring.find(kids.previous), ME, "due", {})


def test_i07_a_cleanup_on_hold_is_refused_in_words(database: Database, kids: Keys) -> None:
    """A hold that came after the decision stops it, and the refusal names it."""
    keys = database.key_store()
    keys.hold_cleanup(opened(keys), kids.previous, "a gateway was not reached")
    key = keys.look().ring.find(kids.previous)
    with pytest.raises(Refused, match=f"signing key {key.kid} is not cleaned up: its cleanup is on hold: a gateway was not reached"):
        database.cleaner().clean_up(key, ME, "due", {})
    keys.release("eve")
    assert database.cleaner().clean_up(key, ME, "due", {})


def test_a_key_without_a_cleanup_is_not_held(database: Database, kids: Keys) -> None:
    """A key that was disabled meanwhile has no cleanup: the run that would hold it goes on to its end, and writes no entry."""
    keys = database.key_store()
    rotation = opened(keys)
    before = database.records().head()
    keys.hold_cleanup(rotation, kids.disabled, "too late")
    assert (database.row(kids.disabled)["cleanup_hold"], database.records().head()) == (None, before)


# ------------------------------------------------------------------------------------------------ canaries


def test_no_canary_is_given_twice(database: Database) -> None:
    """In order, each once, and fewer where the sheaf is used up; a key without canaries, or of no such kid, has none."""
    keys = database.key_store()
    key = database.new_key(canaries=5)
    database.publish(key)
    rotation = opened(keys)
    assert keys.spent_canary(key.kid) is None
    assert [keys.spend_canaries(rotation, key.kid, 2) for _ in range(4)] == [key.canaries[:2], key.canaries[2:4], key.canaries[4:], ()]
    assert keys.spent_canary(key.kid) == key.canaries[0]
    database.promote(key.kid)
    assert keys.spend_canaries(rotation, database.publish(), 2) == ()
    assert keys.spend_canaries(rotation, "no such key", 2) == ()


def test_no_canary_is_given_twice_at_once(database: Database) -> None:
    """Eight probes ask at once: every canary goes to one of them."""
    keys = database.key_store()
    key = database.new_key(canaries=40)
    database.publish(key)
    rotation = opened(keys)
    with ThreadPoolExecutor(8) as pool:
        given = [canary for some in pool.map(lambda _: keys.spend_canaries(rotation, key.kid, 3), range(16)) for canary in some]
    assert sorted(given) == sorted(key.canaries)


# ------------------------------------------------------------------------------------------------ no row, no success

UNTOUCHED: dict[str, tuple[Write, str]] = {
    "accept a key that is not next": (lambda keys, rotation, kids: keys.accept(rotation, kids.previous), "is not next any more"),
    "accept no such key": (lambda keys, rotation, _: keys.accept(rotation, "nobody"), "is not next any more"),
    "promote too early": (lambda keys, rotation, kids: keys.promote(rotation, kids.next, Gate(HOUR, proof=True), ""), "may not be promoted yet"),
    "promote a previous key": (lambda keys, rotation, kids: keys.promote(rotation, kids.previous, NO_WAIT, ""), "may not be promoted yet"),
    "promote no such key": (lambda keys, rotation, _: keys.promote(rotation, "nobody", NO_WAIT, ""), "may not be promoted yet"),
    "roll back to a disabled key": (lambda keys, rotation, kids: keys.roll_back(rotation, kids.disabled, ""), "cannot be rolled back to"),
    "roll back to the next key": (lambda keys, rotation, kids: keys.roll_back(rotation, kids.next, ""), "cannot be rolled back to"),
    "mark a key that is not previous": (lambda keys, rotation, kids: keys.mark_rolled_back(rotation, kids.next), "was not rolled back"),
    "republish a published key": (lambda keys, rotation, kids: keys.republish(rotation, kids.previous, ""), "cannot be republished"),
    "publish a second next key": (lambda keys, rotation, kids: keys.insert(rotation, kids.unborn, ""), "another one is next already"),
    "release where nothing is on hold": (lambda keys, *_: keys.release("eve"), "nothing is on hold here"),
}


def test_i10_a_statement_that_touched_no_row_is_never_success(database: Database, kids: Keys) -> None:
    """Each is refused in a sentence, and has changed nothing: not even what it did before it found out."""
    keys = database.key_store()
    rotation = opened(keys)
    before = database.everything()
    for name, (write, says) in UNTOUCHED.items():
        with pytest.raises(Refused, match=says):
            write(keys, rotation, kids)
        assert database.everything() == before, name


def test_i08_a_compromised_key_is_not_republished(database: Database) -> None:
    """The statement passes it by, and the refusal says why that may be."""
    keys = database.key_store()
    kid = database.compromised()
    with pytest.raises(Refused, match="it is not disabled, or compromised"):
        keys.republish(opened(keys), kid, "by mistake")


def test_a_nameless_environment_is_not_held(database: Database) -> None:
    """There is no row to write the hold into, and the refusal says so."""
    database.run("superuser", "DELETE FROM key_rotation.environment")
    with pytest.raises(Refused, match="the database has no environment name yet"):
        database.key_store().hold("an audit", "eve")


# ------------------------------------------------------------------------------------------------ what goes wrong, in words


class Said(Protocol):
    """Gives the error of a call, once it was searched for secrets."""

    def __call__(self, kind: type[KeyRotationError], call: Callable[[], Any], *secrets: str) -> KeyRotationError: ...


@pytest.fixture
def said(database: Database, caplog: pytest.LogCaptureFixture) -> Said:
    """No password stands in an error's text, form or attributes, in what it is chained to, or in a log record (I5)."""
    caplog.set_level(logging.DEBUG)
    url = re.fullmatch(r"postgresql://[^:]+:([^@]+)@.+", database.url("rotator"))
    assert url is not None
    password = "p@ss/word: of %41 the tests"
    assert quote(password, safe="") == url[1]

    def catch(kind: type[KeyRotationError], call: Callable[[], Any], *secrets: str) -> KeyRotationError:
        with pytest.raises(KeyRotationError) as caught:
            call()
        assert type(caught.value) is kind
        everything = " ".join([*texts(caught.value), *(repr(vars(record)) for record in caplog.records)])
        assert [secret for secret in (password, url[1], "of %41", *secrets) if secret in everything] == []
        return caught.value

    return catch


def texts(error: BaseException | None) -> Iterator[str]:
    """All that an error and its chain could say."""
    while error is not None:
        yield f"{error!s} {error!r} {error.args} {vars(error)}"
        yield from texts(error.__cause__)
        error = error.__context__


def at(url: str, tmp_path: Any) -> PostgresKeyStore:
    """A key store of that address."""
    (tmp_path / "url").write_text(url)
    return PostgresKeyStore(adapter.Database(SecretRef("file", str(tmp_path / "url")), "rotator"), "test", HOUR)


def test_a_wrong_password_is_named(database: Database, said: Said, tmp_path: Any) -> None:
    """Denied: a person has to mend it, and where is said."""
    url = database.server.url("keyrotation_rotator", "a wrong word", database.name)
    error = said(Denied, at(url, tmp_path).look, "wrong word", "wrong%20word")
    assert str(error) == (
        f"the database (127.0.0.1:{database.server.port}/{database.name}, as rotator) refuses the password of that user: "
        "check database.url and what it refers to"
    )
    assert not error.retryable


def test_a_database_that_is_not_there_is_named(database: Database, said: Said, tmp_path: Any) -> None:
    """Denied, with its name."""
    error = said(Denied, at(database.url("rotator") + "_of_another", tmp_path).look)
    assert f"{database.name}_of_another, as rotator) has no such database" in str(error)


def test_a_database_that_is_down_may_come_back(database: Database, said: Said, tmp_path: Any) -> None:
    """Unreachable: a retry may help."""
    port = free_port()
    error = said(Unreachable, at(database.url("rotator").replace(f":{database.server.port}/", f":{port}/"), tmp_path).look)
    place = f"127.0.0.1:{port}/{database.name}, as rotator"
    assert str(error) == f"the database ({place}) does not answer: check that it runs and that this machine may reach it"
    assert error.retryable


@pytest.mark.parametrize(
    "url",
    ["postgresql://u:of %41:x@h:y/d", "of %41 the tests", "mysql:of %41", "postgresql://u:p@h:of %41/d"],
)
def test_an_address_that_is_none_is_not_quoted(said: Said, tmp_path: Any, url: str) -> None:
    """The settings' error shows the reference and the right form: what was found there may be a password in the wrong place."""
    error = said(SettingsError, at(url, tmp_path).look)
    assert "postgresql://user:password@host:5432/database" in str(error)


def test_a_missing_schema_is_named_with_its_file(database_factory: Callable[..., Database], said: Said) -> None:
    """An empty database says which file to run."""
    error = said(WorldError, database_factory(template="template1").key_store().look)
    assert str(error).endswith("lacks a table: run sql/schema.sql")


@pytest.mark.parametrize(
    ("drop", "says"),
    [
        ("DROP SCHEMA key_rotation CASCADE", "lacks a table: run sql/schema.sql"),
        ("ALTER TABLE signing_keys DROP COLUMN accepted_at", "lacks a column: run sql/migrations"),
        ("REVOKE SELECT ON key_rotation.rotations FROM keyrotation_rotator", "denies the role a grant: run sql/grants.sql"),
        ("REVOKE USAGE ON SCHEMA key_rotation FROM keyrotation_rotator", "denies the role a grant: run sql/grants.sql"),
    ],
)
def test_what_is_missing_in_the_schema_is_named_with_its_file(database: Database, said: Said, drop: str, says: str) -> None:
    """Half a schema, or half the grants (F65)."""
    database.publish()
    database.run("superuser", drop)
    kind = Denied if "grant" in says else WorldError
    assert str(said(kind, database.key_store().look)).endswith(says)


def test_a_read_only_database_is_named(database: Database, said: Said) -> None:
    """A standby, or a wrong primary (F7)."""
    database.run("superuser", f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
    error = said(WorldError, lambda: opened(database.key_store()))
    assert str(error).endswith("is read-only here: database.url must lead to the primary")
    assert not error.retryable


def test_a_lock_is_not_waited_for_for_ever(database: Database, said: Said) -> None:
    """Another session holds the rotation's row: after three seconds the run says so, and a retry may help (F8)."""
    keys = database.key_store()
    rotation = opened(keys)
    holder = database.connect("rotator")
    database.ask(holder, "UPDATE key_rotation.rotations SET message = 'frozen'")
    error = said(Unreachable, lambda: keys.renew(rotation))
    assert str(error).endswith("kept us waiting for a lock")
    assert error.retryable
    holder.rollback()
    keys.renew(rotation)


def test_a_connection_that_was_cut_is_made_anew(database: Database) -> None:
    """The pool tries a connection before it gives it out (F11)."""
    keys = database.key_store()
    rotation = opened(keys)
    database.run(
        "superuser", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'keyrotation rotator' AND datname = current_database()"
    )
    keys.renew(rotation)


def test_a_connection_that_is_cut_in_the_middle_may_be_tried_again(database: Database, said: Said) -> None:
    """What was not committed is not there, and the error says that a retry may help."""
    rotator = database.adapter("rotator")

    def work(connection: Connection) -> None:
        nothing = dict.fromkeys(("rotation_id", "kid", "flow_run_id", "reason", "evidence"))
        connection.execute(query("record"), {**nothing, "event": "seen", "actor": "me"})
        pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        database.run("superuser", "SELECT pg_terminate_backend(%s)", pid)
        connection.execute(query("clock"))

    assert said(Unreachable, lambda: rotator.write(work)).retryable
    assert database.records().head()[0] == 0


def test_a_deadlock_is_tried_again(database: Database) -> None:
    """Two transactions lock two rows in two orders: PostgreSQL ends one, it runs again, and both are done (F8)."""
    kids, both_hold_one, tries = (database.previous(), database.previous()), threading.Barrier(2), [0, 0]
    rotator = database.adapter("rotator")

    def work(connection: Connection, number: int) -> int:
        tries[number] += 1
        for place in (number, 1 - number):
            connection.execute(text("SELECT 1 FROM signing_keys WHERE kid = :kid FOR NO KEY UPDATE"), {"kid": kids[place]})
            if tries[number] == 1 and place == number:
                both_hold_one.wait(timeout=10)
        return number

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda number: rotator.write(lambda connection: work(connection, number)), range(2))) == [0, 1]
    assert sorted(tries) == [1, 2]


@pytest.mark.parametrize("code", ["40001", "40P01"])
def test_a_race_that_is_lost_again_and_again_is_given_up(database: Database, said: Said, code: str) -> None:
    """Three tries, each looking anew; then the run is told that others were faster."""
    rotator, tries = database.adapter("rotator"), []

    def work(connection: Connection) -> None:
        tries.append(connection.execute(query("clock")).scalar_one())
        connection.execute(text(f"DO $$ BEGIN RAISE 'lost' USING ERRCODE = '{code}'; END $$"))

    error = said(Busy, lambda: rotator.write(work))
    assert "had another transaction first, 3 times: run it again" in str(error)
    assert len(set(tries)) == 3


def test_a_race_that_is_lost_once_is_won(database: Database) -> None:
    """The second try finds what the first could not."""
    rotator, tries = database.adapter("rotator"), []

    def work(connection: Connection) -> int:
        tries.append(1)
        if len(tries) == 1:
            connection.execute(text("DO $$ BEGIN RAISE 'lost' USING ERRCODE = '40001'; END $$"))
        return len(tries)

    assert rotator.write(work) == 2


def test_a_guards_refusal_is_passed_on_with_its_hint(database: Database, said: Said) -> None:
    """What the database's own guards say is for operators: text and hint arrive."""
    kid = database.current()
    cleaner = database.adapter("cleaner")
    disable = text("UPDATE signing_keys SET enabled = FALSE WHERE kid = :kid")
    error = said(Refused, lambda: cleaner.write(lambda connection: connection.execute(disable, {"kid": kid})))
    assert str(error).startswith(f"signing key {kid} is current and cannot become disabled. tokens are signed with it now. Rotate first")


def test_i05_a_row_that_is_refused_is_not_quoted(database: Database, said: Said) -> None:
    """PostgreSQL's DETAIL shows the failing row, canaries and all: it goes nowhere."""
    keys = database.key_store()
    rotation = opened(keys)
    key = replace(database.new_key(canaries=1), kid="not-a-thumbprint")
    error = said(WorldError, lambda: keys.insert(rotation, key, "to try it"), *key.canaries, key.ciphertext.hex())
    assert str(error).endswith("refused a statement (SQLSTATE 23514)")
