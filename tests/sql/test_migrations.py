"""sql/migrations: a database with the runbook's table comes out equal to a fresh one, or is left as it was; and every script may run again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg2
import pytest

from keyrotation.domain.decision import Request
from keyrotation.domain.keys import Status
from keyrotation.ports import Gate, NewKey

if TYPE_CHECKING:
    from tests.conftest import Database

SQL = Path(__file__).resolve().parents[2] / "sql"
MIGRATION = "migrations/0001_from_runbook_table.sql"
RUNBOOKS_TABLE = """
    CREATE TABLE signing_keys (kid text PRIMARY KEY, alg text, public_jwk jsonb, private_key_ciphertext bytea, enabled boolean, is_current boolean,
                               created_at timestamptz)
"""
ROW = (
    "INSERT INTO signing_keys (kid, alg, public_jwk, private_key_ciphertext, enabled, is_current, created_at) "
    "VALUES (%s, %s, %s, %s, %s, %s, now() - %s::interval)"
)

# The catalog in words, without the order of columns and without OIDs: a list of lines for each kind of thing.
OURS = "relnamespace = 'key_rotation'::regnamespace OR pg_class.oid = to_regclass('public.signing_keys')"
CATALOG = {
    "tables": f"""SELECT oid::regclass, relkind, pg_get_userbyid(relowner), relrowsecurity, obj_description(oid) FROM pg_class
                  WHERE relkind IN ('r', 'S', 'v') AND ({OURS})""",
    "columns": f"""SELECT attrelid::regclass, attname, format_type(atttypid, atttypmod), attnotnull, attidentity, attcollation::regcollation,
                          pg_get_expr(adbin, adrelid)
                   FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
                   WHERE attnum > 0 AND NOT attisdropped AND relkind = 'r' AND ({OURS})""",
    "constraints": f"""SELECT conrelid::regclass, conname, contype, condeferrable, condeferred, convalidated, pg_get_constraintdef(pg_constraint.oid)
                       FROM pg_constraint JOIN pg_class ON pg_class.oid = conrelid WHERE {OURS}""",
    "indexes": f"SELECT pg_get_indexdef(indexrelid), indisvalid FROM pg_index JOIN pg_class ON pg_class.oid = indrelid WHERE relkind = 'r' AND ({OURS})",
    "triggers": f"""SELECT pg_get_triggerdef(pg_trigger.oid), tgenabled FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid
                    WHERE NOT tgisinternal AND ({OURS})""",
    "functions": """SELECT pg_get_functiondef(oid), pg_get_userbyid(proowner), obj_description(oid, 'pg_proc') FROM pg_proc
                    WHERE pronamespace = 'key_rotation'::regnamespace""",
    "rights on tables": f"""SELECT pg_class.oid::regclass, pg_get_userbyid(grantee), privilege_type, is_grantable
                            FROM pg_class, aclexplode(coalesce(relacl, acldefault('r', relowner))) WHERE relkind = 'r' AND ({OURS})""",
    "rights on columns": f"""SELECT attrelid::regclass, attname, pg_get_userbyid(grantee), privilege_type, is_grantable
                             FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid, aclexplode(attacl) WHERE {OURS}""",
    "rights on functions": """SELECT pg_proc.oid::regprocedure, grantee::regrole, privilege_type, is_grantable
                              FROM pg_proc, aclexplode(coalesce(proacl, acldefault('f', proowner))) WHERE pronamespace = 'key_rotation'::regnamespace""",
    "rights on schemas": """SELECT nspname, grantee::regrole, privilege_type, is_grantable FROM pg_namespace, aclexplode(nspacl)
                            WHERE nspname IN ('public', 'key_rotation')""",
    "roles": "SELECT rolname, rolcanlogin, rolsuper, rolcreaterole, rolbypassrls, rolconfig FROM pg_roles WHERE rolname LIKE 'keyrotation%'",
}


def catalog(database: Database) -> dict[str, list[str]]:
    """All that the scripts make, as text."""
    return {kind: sorted(str(row) for row in database.run("superuser", query)) for kind, query in CATALOG.items()}


def apply(database: Database, *scripts: str) -> list[str]:
    """Runs the scripts in one transaction, as `psql -1` does; gives the notices."""
    session = database.connect("superuser")
    try:
        for script in scripts:
            database.ask(session, (SQL / script).read_text(encoding="utf-8"))
        session.commit()
    finally:
        session.rollback()
    return session.notices


def install(database: Database) -> list[str]:
    """The whole way, in the order that the migration's head names."""
    return apply(database, "roles.sql", MIGRATION, "schema.sql", "grants.sql")


@pytest.fixture
def old(database_factory: Callable[..., Database]) -> Iterator[Database]:
    """An identity service's database, with the runbook's table and no keys."""
    made = database_factory(template="template1")
    made.run("superuser", RUNBOOKS_TABLE)
    yield made
    made.close()


def keep(database: Database, **otherwise: Any) -> NewKey:
    """A key in the runbook's table, enabled and a day old; its JWK has what a thumbprint needs, and no more."""
    key = database.new_key()
    row: dict[str, Any] = {
        "kid": key.kid,
        "alg": "ES256",
        "jwk": lambda key: {name: key.public_jwk[name] for name in ("kty", "crv", "x", "y")},
        "ciphertext": key.ciphertext,
        "enabled": True,
        "is_current": False,
        "age": "1 day",
        **otherwise,
    }
    jwk = row["jwk"](key)
    values = (row["kid"], row["alg"], json.dumps(dict(jwk) if jwk else jwk), row["ciphertext"], row["enabled"], row["is_current"], row["age"])
    database.run("superuser", ROW, *values)
    return replace(key, kid=row["kid"])


def keys_of(database: Database) -> dict[str, Mapping[str, Any]]:
    """The rows by kid."""
    return {kid: row for kid, row in database.run("superuser", "SELECT kid, to_jsonb(signing_keys) FROM signing_keys")}


@pytest.fixture
def migrated(old: Database) -> tuple[Database, dict[str, NewKey]]:
    """A database with a key of every sort, migrated, its environment named."""
    keys = {
        "retired": keep(old, enabled=False, age="40 days"),
        "oldest": keep(old, age="20 days"),
        "old": keep(old, age="10 days", is_current=None),
        "current": keep(old, age="3 days", is_current=True),
        "newer": keep(old, age="2 days"),
        "newest": keep(old, age="1 day"),
        "newest, without a private half": keep(old, age="1 hour", ciphertext=None),
    }
    install(old)
    old.run("owner", "INSERT INTO key_rotation.environment (name) VALUES ('test')")
    return old, keys


def test_a_migrated_database_is_equal_to_a_fresh_one(migrated: tuple[Database, dict[str, NewKey]], database: Database) -> None:
    """Tables, columns, defaults, constraints, indexes, triggers, functions, owners and rights: one catalog."""
    assert catalog(migrated[0]) == catalog(database)
    assert all(catalog(database).values())


SERVICES_OWN = {
    "owner": "ALTER TABLE signing_keys OWNER TO {service}",
    "rights": """GRANT ALL ON signing_keys TO {service}; GRANT SELECT ON signing_keys TO PUBLIC;
                 GRANT UPDATE (enabled) ON signing_keys TO {service} WITH GRANT OPTION""",
    "defaults": """ALTER TABLE signing_keys ALTER alg SET DEFAULT 'RS256', ALTER enabled SET DEFAULT false, ALTER public_jwk SET DEFAULT '{{}}',
                                            ALTER private_key_ciphertext SET NOT NULL""",
    "an index": "CREATE UNIQUE INDEX one_current ON signing_keys (is_current) WHERE is_current",
    "NOT NULL": """ALTER TABLE signing_keys ALTER alg SET NOT NULL, ALTER public_jwk SET NOT NULL, ALTER enabled SET NOT NULL,
                                            ALTER is_current SET NOT NULL, ALTER created_at SET NOT NULL""",
}


@pytest.mark.parametrize("own", SERVICES_OWN)
def test_what_the_service_had_set_beside_the_columns_does_not_matter(old: Database, database: Database, own: str) -> None:
    """Owner, rights, defaults, indexes and NOT NULL of the service's own: the result is the same."""
    service = f"identity_of_{old.name}"
    old.run("superuser", f"CREATE ROLE {service}; " + SERVICES_OWN[own].format(service=service))
    keep(old, is_current=True)
    notices = install(old)
    assert catalog(old) == catalog(database)
    if own == "rights":
        said = " ".join(notices)
        assert [name for name in (service, "PUBLIC") if f"taken away from {name}: its rights on signing_keys" not in said] == []


def test_the_keys_become_what_they_were(migrated: tuple[Database, dict[str, NewKey]]) -> None:
    """Current stays current, the newest that could sign is next, the other enabled ones are previous, the rest is disabled and erased."""
    database, keys = migrated
    rows = keys_of(database)
    assert {name: rows[key.kid]["status"] for name, key in keys.items()} == {
        "retired": "disabled",
        "oldest": "previous",
        "old": "previous",
        "current": "current",
        "newer": "previous",
        "newest": "next",
        "newest, without a private half": "previous",
    }
    for name, key in keys.items():
        row = rows[key.kid]
        assert row["public_jwk"] == dict(key.public_jwk), name
        assert row["published_at"] == row["created_at"]
        assert row["promoted_at"] == (None if row["status"] == "next" else row["created_at"])
        assert (row["demoted_at"] is not None) == (row["status"] == "previous")
        assert (row["disabled_at"] is not None) == (row["status"] == "disabled")
        kept = row["private_key_ciphertext"] is not None
        assert kept == (row["status"] != "disabled" and "without" not in name)
        assert not kept or bytes.fromhex(row["private_key_ciphertext"].removeprefix("\\x")) == key.ciphertext
        notes = ("sealed_by", "published_seen_at", "accepted_at", "retain_until", "rotation_id", "cleanup_hold", "canaries")
        assert [row[note] for note in notes] == [None] * len(notes)


def test_a_migrated_database_rotates(migrated: tuple[Database, dict[str, NewKey]]) -> None:
    """The next key is confirmed, waits its time, and is promoted; the old one is rolled back to; what was previous gets its retention and is cleaned up."""
    database, keys = migrated
    store = database.key_store()
    rotation = store.open("rotation", Request("the tests"), timedelta(hours=1))
    assert rotation is not None
    ring = store.look().ring
    assert (ring.require_current().kid, ring.next and ring.next.kid, len(ring.previous)) == (keys["current"].kid, keys["newest"].kid, 4)
    store.adopt(rotation, keys["newest"].kid)
    store.confirm(rotation, timedelta(0))
    store.promote(rotation, keys["newest"].kid, Gate(timedelta(0), proof=False), "promoting")
    store.roll_back(rotation, keys["current"].kid, "to try it")
    store.confirm(rotation, timedelta(0))
    store.close(rotation, "rolled back", "to try it")
    oldest = store.look().ring.find(keys["oldest"].kid)
    assert database.cleaner().clean_up(oldest, Request("the tests"), "due", {})
    assert store.look().ring.find(oldest.kid).status is Status.DISABLED


def test_a_key_that_was_compromised_before_is_named_afterwards(migrated: tuple[Database, dict[str, NewKey]]) -> None:
    """The statement of the migration's head works, and is recorded."""
    database, keys = migrated
    database.run("owner", "UPDATE signing_keys SET compromised = TRUE WHERE kid = %s", keys["retired"].kid)
    assert database.value("auditor", "SELECT event FROM key_rotation.ledger") == "disabled as compromised"


def test_no_key_older_than_the_current_one_is_next(old: Database) -> None:
    """What was there before the current key was made has had its time: it verifies, and is not promoted again."""
    keep(old, is_current=True, age="1 day")
    keep(old, age="2 days")
    install(old)
    assert old.run("superuser", "SELECT status FROM signing_keys ORDER BY created_at") == [("previous",), ("current",)]


def test_an_empty_table_is_migrated(old: Database, database: Database) -> None:
    """A service without keys begins with bootstrap."""
    install(old)
    assert catalog(old) == catalog(database)


def test_keys_that_are_all_disabled_leave_room_for_an_initial_key(old: Database) -> None:
    """None of them counts as promoted: the initial key is made and signs."""
    keep(old, enabled=False)
    install(old)
    old.run("owner", "INSERT INTO key_rotation.environment (name) VALUES ('test')")
    assert old.status(old.current()) == "current"


def test_instants_that_cannot_be_are_now(old: Database) -> None:
    """A created_at that is missing, or lies ahead, would later look like a clock that went back."""
    keep(old, is_current=True, age="-1 day")
    kid = keep(old, age="1 day").kid
    old.run("superuser", "UPDATE signing_keys SET created_at = NULL WHERE kid = %s", kid)
    install(old)
    assert old.run("superuser", "SELECT count(*) FROM signing_keys WHERE created_at <= now()") == [(2,)]
    old.run("owner", "INSERT INTO key_rotation.environment (name) VALUES ('test')")
    old.current()


# ------------------------------------------------------------------------------------------------ again


@pytest.mark.parametrize(
    "scripts", [("schema.sql",), ("grants.sql",), ("roles.sql",), (MIGRATION,), ("roles.sql", MIGRATION, "schema.sql", "grants.sql")], ids=" ".join
)
def test_a_second_time_changes_nothing(migrated: tuple[Database, dict[str, NewKey]], scripts: tuple[str, ...]) -> None:
    """Each script finds its work done: catalog, keys and ledger stay."""
    database, _ = migrated
    before = catalog(database), database.everything()
    apply(database, *scripts)
    assert (catalog(database), database.everything()) == before


def test_on_a_fresh_database_the_migration_does_nothing(database: Database) -> None:
    """Also before schema.sql has run."""
    database.current()
    before = catalog(database), database.everything()
    (notice,) = apply(database, MIGRATION)
    assert "nothing to migrate" in notice
    assert (catalog(database), database.everything()) == before


def test_without_the_table_the_migration_does_nothing(database_factory: Callable[..., Database]) -> None:
    """A new identity service begins with schema.sql alone."""
    empty = database_factory(template="template1")
    (notice,) = apply(empty, "roles.sql", MIGRATION)
    assert "nothing to migrate" in notice
    assert empty.value("superuser", "SELECT to_regclass('public.signing_keys')") is None


# ------------------------------------------------------------------------------------------------ refused


REFUSED: dict[str, tuple[list[dict[str, Any]] | str, str]] = {
    "a kid that is no thumbprint": (
        [{"is_current": True}, {"kid": "key-2024-01"}, {"kid": "key-2024-02", "enabled": False}],
        "the kid is not the RFC 7638 thumbprint of the public key: {1}, {2}",
    ),
    "another key's public half": (
        [{"is_current": True, "jwk": lambda key: {**key.public_jwk, "x": key.public_jwk["y"]}}],
        "the kid is not the RFC 7638 thumbprint of the public key: {0}",
    ),
    "a JWK that names another kid": (
        [{"is_current": True, "jwk": lambda key: {**key.public_jwk, "kid": "another"}}],
        "the kid is not the RFC 7638 thumbprint of the public key: {0}",
    ),
    "an RSA key": (
        [{"is_current": True}, {"kid": "rsa-1", "alg": "RS256", "jwk": lambda _: {"kty": "RSA", "n": "AQAB", "e": "AQAB"}, "enabled": False}],
        "no ES256 signature key(s) on P-256: {1}",
    ),
    "a JWK for encryption": ([{"is_current": True, "jwk": lambda key: {**key.public_jwk, "use": "enc"}}], "no ES256 signature key(s) on P-256: {0}"),
    "no public half": ([{"is_current": True, "jwk": lambda _: None}], "no ES256 signature key(s) on P-256: {0}"),
    "the private half in the JWK": (
        [{"is_current": True, "jwk": lambda key: {**key.public_jwk, "d": "A" * 43}}],
        "the PRIVATE half stands in public_jwk of key(s) {0}",
    ),
    "no current key": ([{}], "exactly one of the enabled keys must be current, and none or several are: {0}"),
    "two current keys": ([{"is_current": True}, {"is_current": True}], "exactly one of the enabled keys must be current, and none or several are: "),
    "a current key that is not enabled": ([{"is_current": True, "enabled": False}], "the current key cannot sign: {0}"),
    "a current key without ciphertext": ([{"is_current": True, "ciphertext": None}], "the current key cannot sign: {0}"),
    "enabled is not known": ([{"is_current": True}, {"enabled": None}], "enabled is neither true nor false for key(s) {1}"),
    "a column of another type": ("ALTER TABLE signing_keys ALTER public_jwk TYPE text", "it lacks the column(s) public_jwk jsonb"),
    "a column of the service's with a name of ours": ("ALTER TABLE signing_keys ADD status text", "stand in the way: status"),
    "a column that must be given": ("ALTER TABLE signing_keys ADD tenant text NOT NULL", "stand in the way: tenant"),
    "another primary key": ("ALTER TABLE signing_keys DROP CONSTRAINT signing_keys_pkey", "the primary key of signing_keys is not (kid)"),
}
ALL_OF_IT = (
    "SELECT (SELECT jsonb_agg(to_jsonb(k) ORDER BY kid) FROM signing_keys AS k)",
    "SELECT attname, atttypid, attnotnull FROM pg_attribute WHERE attrelid = 'signing_keys'::regclass",
    "SELECT to_regnamespace('key_rotation')",
)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_one_of_ours_is_refused_and_left_as_it_was(old: Database, case: str) -> None:
    """The kids (or columns) are named, what to do is said, and neither table nor keys have changed."""
    there, says = REFUSED[case]
    kids = [keep(old, **row).kid for row in there] if isinstance(there, list) else []
    if isinstance(there, str):
        old.run("superuser", there)
    before = [old.run("superuser", query) for query in ALL_OF_IT]
    with pytest.raises(psycopg2.Error, match=re.escape(says.format(*kids))) as caught:
        install(old)
    assert caught.value.diag.message_hint
    assert [old.run("superuser", query) for query in ALL_OF_IT] == before
