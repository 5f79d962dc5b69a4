"""Owns the databases of the sandbox: the identity service's, with the roles and tables of `sql/`, and Prefect's.

Everything may be done again on a server that has it already: passwords are set anew, tables and rows stay.
"""

from contextlib import closing
from pathlib import Path

import psycopg2
from psycopg2 import sql

from sandbox.keepsakes import Secrets
from sandbox.postgres import Postgres

ENVIRONMENT = "sandbox"
DATABASE = "sandbox"
PREFECT = "prefect"

OWNER = "keyrotation_owner"
ROTATOR = "keyrotation_rotator"
CLEANER = "keyrotation_cleaner"
AUDITOR = "keyrotation_auditor"
READER = "keyrotation_reader"
IDENTITY_ADMIN = "keyrotation_identity_admin"

_ROLES = (OWNER, ROTATOR, CLEANER, AUDITOR, READER, IDENTITY_ADMIN)
_SCRIPTS = ("roles.sql", "schema.sql", "grants.sql")


class Databases:
    """Both databases, and the addresses under which each role reaches its own."""

    def __init__(self, server: Postgres, secrets: Secrets, scripts: Path) -> None:
        self._server, self._secrets, self._scripts = server, secrets, scripts

    def prepare(self) -> None:
        """Makes what is missing, on a server that runs."""
        self._make_database(DATABASE)
        for script in _SCRIPTS:
            self._run(DATABASE, (self._scripts / script).read_text())
        for role in _ROLES:
            self._set_password(role)
        self._name_environment()
        self._make_database_of_prefect()

    def url(self, role: str) -> str:
        """The identity service's database as this role reaches it, password included."""
        return self._server.url(role, self._password(role), DATABASE)

    def prefect_url(self) -> str:
        return self._server.url(PREFECT, self._password(PREFECT), PREFECT)

    def has_current_key(self) -> bool:
        with closing(psycopg2.connect(self.url(READER))) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM public.signing_keys WHERE status = 'current'")
            return cursor.fetchone() is not None

    def _password(self, role: str) -> str:
        return self._secrets.word(f"{role}_password")

    def _make_database(self, name: str, owner: str | None = None) -> None:
        with closing(psycopg2.connect(self._server.superuser_url())) as connection, connection.cursor() as cursor:
            connection.rollback()
            connection.autocommit = True  # CREATE DATABASE runs in no transaction
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
            if cursor.fetchone() is None:
                owned = sql.SQL(" OWNER {}").format(sql.Identifier(owner)) if owner else sql.SQL("")
                cursor.execute(sql.SQL("CREATE DATABASE {}{}").format(sql.Identifier(name), owned))

    def _make_database_of_prefect(self) -> None:
        # A role of its own: whoever reads the server's memory or log finds no way to the keys.
        self._run(
            "postgres",
            f"DO $$ BEGIN CREATE ROLE {PREFECT} LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$",
        )
        self._set_password(PREFECT)
        self._make_database(PREFECT, owner=PREFECT)
        self._run(PREFECT, "CREATE EXTENSION IF NOT EXISTS pg_trgm")  # the migrations index with it, and do not make it

    def _set_password(self, role: str) -> None:
        change = sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), sql.Literal(self._password(role)))
        self._run("postgres", change)

    def _name_environment(self) -> None:
        self._run(
            DATABASE,
            sql.SQL("INSERT INTO key_rotation.environment (name) VALUES ({}) ON CONFLICT DO NOTHING").format(sql.Literal(ENVIRONMENT)),
            user=OWNER,
        )

    def _run(self, database: str, command: str | sql.Composed, user: str | None = None) -> None:
        url = self._server.superuser_url(database) if user is None else self._server.url(user, self._password(user), database)
        with closing(psycopg2.connect(url)) as connection, connection, connection.cursor() as cursor:
            cursor.execute(command)
