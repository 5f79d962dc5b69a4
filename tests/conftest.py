"""A real PostgreSQL for every folder of tests: one server per session (and xdist worker), one fresh database per test.

The server starts when a test first asks for it. A template holds the roles, tables and grants of sql/, so that a new database is a copy of files.
The superuser's hand counts as the owner's: what a service may not do is tried as that service's role.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from psycopg2 import extensions

from keyrotation.adapters.database_authority import make_key
from keyrotation.adapters.key_store import PostgresCleaner, PostgresKeyStore, PostgresRecords
from keyrotation.connections import database as adapter
from keyrotation.ports import NewKey, Sealed
from keyrotation.secrets import SecretRef
from sandbox.database import AUDITOR, CLEANER, IDENTITY_ADMIN, OWNER, READER, ROTATOR
from sandbox.postgres import SUPERUSER, Postgres
from sandbox.processes import free_port

SQL = Path(__file__).resolve().parents[1] / "sql"
SCRIPTS = ("roles.sql", "schema.sql", "grants.sql")
ENVIRONMENT = "test"
PASSWORD = "p@ss/word: of %41 the tests"
TEMPLATE = "keyrotation_template"
SERVICES = {"rotator": ROTATOR, "cleaner": CLEANER, "auditor": AUDITOR, "reader": READER, "identity_admin": IDENTITY_ADMIN}
ROLES = {"superuser": SUPERUSER, "owner": OWNER, **SERVICES}
LEASE = timedelta(seconds=60)
# PostgreSQL may crash under these tests, the machine may not: files need not be forced to the disk. A password need not resist a search.
UNSAFE_AND_FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "scram_iterations": "1"}


class Database:
    """One environment's database, and a session as whoever is wanted. Roles go by their short names (`ROLES`)."""

    def __init__(self, server: Postgres, name: str, secrets_folder: Path) -> None:
        self.server, self.name, self._folder = server, name, secrets_folder
        self._open: list[extensions.connection] = []
        self._adapters: list[adapter.Database] = []
        self._looking: extensions.connection | None = None

    # ---- sessions

    def url(self, role: str) -> str:
        return self.server.superuser_url(self.name) if role == "superuser" else self.server.url(ROLES[role], PASSWORD, self.name)

    def secret(self, role: str) -> SecretRef:
        """A reference to that role's URL, as an environment's file has it."""
        path = self._folder / f"{self.name}-{role}"
        path.write_text(self.url(role))
        return SecretRef("file", str(path))

    def connect(self, role: str) -> extensions.connection:
        """A session in a transaction of its own, closed with the test at the latest."""
        self._open.append(psycopg2.connect(self.url(role)))
        return self._open[-1]

    def run(self, role: str, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Runs the statements in one transaction of a new session; gives the rows of the last."""
        with closing(psycopg2.connect(self.url(role))) as connection, connection:
            return self.ask(connection, statement, *values)

    def value(self, role: str, statement: str, *values: Any) -> Any:
        """The one column of the one row."""
        ((found,),) = self.run(role, statement, *values)
        return found

    @contextmanager
    def acting_as(self, role: str) -> Iterator[extensions.connection]:
        """A superuser's transaction that may SET LOCAL ROLE: an instant set to now() is still now() for the role. Never committed."""
        connection = self.connect("superuser")
        try:
            yield connection
        finally:
            connection.rollback()

    @staticmethod
    def ask(connection: extensions.connection, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """The rows of the (last) statement, in the connection's transaction."""
        with connection.cursor() as cursor:
            cursor.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    # ---- the adapters

    def adapter(self, role: str) -> adapter.Database:
        self._adapters.append(adapter.Database(self.secret(role), role))
        return self._adapters[-1]

    def key_store(self, lease: timedelta = LEASE) -> PostgresKeyStore:
        return PostgresKeyStore(self.adapter("rotator"), ENVIRONMENT, lease)

    def cleaner(self) -> PostgresCleaner:
        return PostgresCleaner(self.adapter("cleaner"), ENVIRONMENT)

    def records(self) -> PostgresRecords:
        return PostgresRecords(self.adapter("auditor"), ENVIRONMENT)

    # ---- keys, by the owner's hand

    @staticmethod
    def new_key(canaries: int = 0) -> NewKey:
        """A real P-256 key whose ciphertext is not one: the database cannot tell, and sealing has tests of its own."""
        key = make_key(ENVIRONMENT, lambda plaintext, context: Sealed(secrets.token_bytes(64), "the tests"), None, datetime(2026, 1, 1, tzinfo=UTC))
        return replace(key, canaries=tuple(f"canary-{number}-of-{key.kid}" for number in range(canaries)))

    def publish(self, key: NewKey | None = None) -> str:
        """A key that is next."""
        key = key or self.new_key()
        self.run("owner", INSERT_KEY, key.kid, json.dumps(dict(key.public_jwk)), key.ciphertext, key.sealed_by, json.dumps(key.canaries))
        return key.kid

    def promote(self, kid: str) -> str:
        self.run("owner", PROMOTE, kid)
        return kid

    def current(self) -> str:
        """A new key that is current; the one before is previous."""
        return self.promote(self.publish())

    def previous(self) -> str:
        """A key that is previous, with a retention that is over; another one is current."""
        kid = self.current()
        self.current()
        self.run("superuser", "UPDATE signing_keys SET demoted_seen_at = demoted_at, retain_until = demoted_at WHERE kid = %s", kid)
        return kid

    def compromised(self) -> str:
        kid = self.publish()
        self.run("owner", "UPDATE signing_keys SET status = 'disabled', compromised = TRUE WHERE kid = %s", kid)
        return kid

    def status(self, kid: str) -> str:
        return str(self.row(kid)["status"])

    def row(self, kid: str) -> dict[str, Any]:
        ((found,),) = self._look("SELECT to_jsonb(signing_keys) FROM signing_keys WHERE kid = %s", kid)
        return dict(found)

    def everything(self) -> Any:
        """All that a change could leave a trace in."""
        return self._look(EVERYTHING)

    def _look(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """As the superuser, in a session that is kept: tests look often, and a login costs 20 ms."""
        if self._looking is None:
            self._looking = self.connect("superuser")
            self._looking.autocommit = True
        return self.ask(self._looking, statement, *values)

    def close(self) -> None:
        for connection in self._open:
            connection.close()
        for each in self._adapters:
            each.engine().dispose()


INSERT_KEY = "INSERT INTO signing_keys (kid, public_jwk, private_key_ciphertext, sealed_by, canaries) VALUES (%s, %s, %s, %s, %s)"
PROMOTE = "UPDATE signing_keys SET status = 'previous' WHERE status = 'current'; UPDATE signing_keys SET status = 'current' WHERE kid = %s"
EVERYTHING = """
    SELECT (SELECT jsonb_agg(to_jsonb(k) ORDER BY kid) FROM signing_keys AS k), (SELECT jsonb_agg(to_jsonb(r) ORDER BY id) FROM key_rotation.rotations AS r),
           (SELECT jsonb_agg(to_jsonb(e)) FROM key_rotation.environment AS e), (SELECT jsonb_agg(to_jsonb(l) ORDER BY seq) FROM key_rotation.ledger AS l),
           (SELECT jsonb_agg(to_jsonb(h)) FROM key_rotation.ledger_head AS h)
"""


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A PostgreSQL with the template database."""
    password = secrets.token_urlsafe(12)
    server = Postgres(tmp_path_factory.mktemp("postgres"), free_port(), password)
    server.start()
    try:
        administer(server, "postgres", *(f"ALTER SYSTEM SET {name} = {value}" for name, value in UNSAFE_AND_FAST.items()), "SELECT pg_reload_conf()")
        administer(server, "postgres", f"ALTER ROLE {SUPERUSER} PASSWORD '{password}'", f"CREATE DATABASE {TEMPLATE}")
        administer(server, TEMPLATE, *((SQL / script).read_text() for script in SCRIPTS))
        administer(server, TEMPLATE, *(f"ALTER ROLE {ROLES[role]} PASSWORD '{PASSWORD}'" for role in ROLES if role != "superuser"))
        administer(server, TEMPLATE, f"INSERT INTO key_rotation.environment (name) VALUES ('{ENVIRONMENT}')")
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def database_factory(postgres_server: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Database]]:
    """Makes databases: with the tables of sql/ and without keys, or (`template="template1"`) without anything."""
    folder, made, one_at_a_time = tmp_path_factory.mktemp("urls"), list[Database](), threading.Lock()

    def make(template: str = TEMPLATE) -> Database:
        with one_at_a_time:
            made.append(Database(postgres_server, f"test_{len(made)}", folder))
            administer(postgres_server, "postgres", f"CREATE DATABASE {made[-1].name} TEMPLATE {template} STRATEGY file_copy")
            return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def database(database_factory: Callable[..., Database]) -> Iterator[Database]:
    """A database of this test's own, without keys. It goes with the server."""
    fresh = database_factory()
    yield fresh
    fresh.close()


def administer(server: Postgres, name: str, *statements: str) -> None:
    """Runs each statement, or whole script, as the superuser, in no transaction around it."""
    with closing(psycopg2.connect(server.superuser_url(name))) as connection, connection.cursor() as cursor:
        connection.autocommit = True
        for statement in statements:
            cursor.execute(statement)
