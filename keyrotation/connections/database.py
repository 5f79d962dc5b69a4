"""A connection to the identity service's database by one of our roles: transactions, retries of those that lost a race, and errors in words.

A message of PostgreSQL is passed on only where it is one of our own guards'. DETAIL is never passed on: it quotes the row.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from keyrotation.domain.errors import Busy, Denied, KeyRotationError, Refused, SettingsError, Superseded, Unreachable, WorldError
from keyrotation.secrets import SecretRef

T = TypeVar("T")

LOST_RACE = {"40001", "40P01"}  # serialization failure, deadlock: the same transaction may succeed at once
TRIES = 3
# A writer that hangs must end by itself: whoever takes over waits for its row lock at the longest this long.
LIMITS = "-c transaction_timeout=10s -c lock_timeout=3s -c statement_timeout=8s -c timezone=UTC"
WORDS = {
    "28P01": "refuses the password of that user",
    "28000": "refuses that user",
    "3D000": "has no such database",
    "42501": "denies the role a grant: run sql/grants.sql",
    "42P01": "lacks a table: run sql/schema.sql",
    "42703": "lacks a column: run sql/migrations",
    "42883": "lacks a function: run sql/schema.sql",
    "3F000": "lacks the schema key_rotation: run sql/schema.sql",
    "25006": "is read-only here: database.url must lead to the primary",
    "53100": "has no disk space left",
    "53200": "has no memory left",
    "55P03": "kept us waiting for a lock",
    "57014": "took too long",
    "25P04": "ended our transaction: it took too long",
}


class Database:
    """One role's connections. Nothing connects before the first use."""

    def __init__(self, url: SecretRef, role: str) -> None:
        self._secret, self._role = url, role
        self._engine: Engine | None = None

    def engine(self) -> Engine:
        """The engine; the secret is read at the first use."""
        if self._engine is None:
            with suppress(ArgumentError, ValueError):  # not raised from within: `__context__` would keep their text, a piece of the URL
                url = make_url(self._secret.reveal())
                self._engine = create_engine(
                    url.set(drivername="postgresql+psycopg2"),
                    pool_size=2,
                    max_overflow=2,
                    pool_pre_ping=True,
                    hide_parameters=True,
                    connect_args={
                        "connect_timeout": 5,
                        "application_name": f"keyrotation {self._role}",
                        "options": LIMITS,
                        "keepalives_idle": 5,
                        "keepalives_interval": 2,
                        "keepalives_count": 3,
                        "tcp_user_timeout": 15000,
                    },
                )
        if self._engine is None:
            raise SettingsError(f"the {self._role}'s database URL ({self._secret}) is not one: postgresql://user:password@host:5432/database")
        return self._engine

    def place(self) -> str:
        """Where it is, for messages: host, port and database."""
        url = self.engine().url
        return f"{url.host}:{url.port or 5432}/{url.database}"

    def read(self, work: Callable[[Connection], T]) -> T:
        """Runs `work` in a read-only look: one snapshot for several queries."""

        def look() -> T:
            with self.engine().connect().execution_options(isolation_level="REPEATABLE READ") as connection:
                return work(connection)

        return self._in_words(look)

    def write(self, work: Callable[[Connection], T]) -> T:
        """Runs `work` in one transaction, again if it lost a race; every look that `work` takes is taken anew."""

        def change() -> T:
            with self.engine().begin() as connection:
                return work(connection)

        for last in (False,) * (TRIES - 1) + (True,):
            try:
                return self._in_words(change)
            except _LostRace as lost:
                if last:
                    raise Busy(str(lost)) from None
        raise AssertionError("unreachable")

    def _in_words(self, attempt: Callable[[], T]) -> T:
        try:
            return attempt()
        except DBAPIError as error:
            words = self._words(error)
        raise words  # outside of `except`: `__context__` would keep the driver's error, whose DETAIL quotes the row

    def _words(self, error: DBAPIError) -> KeyRotationError:
        original: Any = error.orig
        code = getattr(original, "pgcode", None)
        diagnostics = getattr(original, "diag", None)
        primary = getattr(diagnostics, "message_primary", None) or ""
        hint = getattr(diagnostics, "message_hint", None)
        where = f"the database ({self.place()}, as {self._role})"
        if code is None:
            return self._unconnected(str(original), where)
        if code == "KR001":
            return Superseded("another run has taken over this rotation: nothing more was changed by this one")
        if code in LOST_RACE:
            return _LostRace(f"{where} had another transaction first, {TRIES} times: run it again")
        if code == "55P03":
            return Unreachable(f"{where} {WORDS[code]}")
        if code in ("P0001", "KR002", "23000"):
            return Refused(f"{primary}. {hint}" if hint else primary)
        if code in WORDS:
            return (Denied if code in ("28P01", "28000", "42501") else WorldError)(f"{where} {WORDS[code]}", retryable=code == "57014")
        if code.startswith(("08", "57P")):
            return Unreachable(f"{where} cut the connection (SQLSTATE {code})")
        return WorldError(f"{where} refused a statement (SQLSTATE {code})")

    def _unconnected(self, text: str, where: str) -> KeyRotationError:
        for code, sign in (
            ("28P01", "password authentication failed"),
            ("28000", "no pg_hba.conf entry"),
            ("28000", "is not permitted to log in"),
            ("3D000", "does not exist"),
        ):
            if sign in text:
                return Denied(f"{where} {WORDS[code]}: check database.url and what it refers to")
        if "transaction_timeout" in text:
            return WorldError(f"{where} is older than PostgreSQL 17, which this software needs (transaction_timeout)")
        return Unreachable(f"{where} does not answer: check that it runs and that this machine may reach it")


class _LostRace(Busy):
    """Serialization failure or deadlock."""
