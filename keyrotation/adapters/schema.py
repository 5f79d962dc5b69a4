"""The database's own shape: is everything there that sql/schema.sql makes (F65), and may a role do what it must and no more (I17).

What must be there is read out of sql/schema.sql itself, so that there is one list; a test holds it against a fresh database.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from sqlalchemy import TextClause, text

from keyrotation.connections.database import Database
from keyrotation.connections.queries import query

SQL = Path(__file__).resolve().parents[2] / "sql"
COLUMN = re.compile(r"^    (\w+) +(?:bigint|boolean|bytea|integer|jsonb|text|timestamptz)\b", re.MULTILINE)
TABLE = re.compile(r"^CREATE TABLE IF NOT EXISTS (\S+) \((.*?)^\);", re.MULTILINE | re.DOTALL)
NAMED = {
    "trigger": (re.compile(r"^CREATE (?:OR REPLACE|CONSTRAINT) TRIGGER (\w+) .*? ON (\S+)", re.MULTILINE), "{} on {}"),
    "unique index": (re.compile(r"^CREATE UNIQUE INDEX IF NOT EXISTS (\w+) ON (\S+)", re.MULTILINE), "{} on {}"),
}
RULE = re.compile(r"^ +\('(\w+)', \$rule\$ CHECK", re.MULTILINE)  # those that schema.sql adds to signing_keys one by one
CONSTRAINT = re.compile(r"^ +CONSTRAINT (\w+) CHECK", re.MULTILINE)
FUNCTION = re.compile(r"^CREATE OR REPLACE FUNCTION (key_rotation\.\w+)\(", re.MULTILINE)
BODY = re.compile(r"^CREATE OR REPLACE FUNCTION (key_rotation\.\w+)\((?:(?!^CREATE ).)*? AS \$\$(.*?)\$\$;", re.MULTILINE | re.DOTALL)

Part = tuple[str, str]  # kind and name: ("trigger", "append_only on key_rotation.ledger")


def expected() -> frozenset[Part]:
    """What sql/schema.sql makes."""
    script = (SQL / "schema.sql").read_text(encoding="utf-8")
    parts = {(kind, form.format(*found)) for kind, (pattern, form) in NAMED.items() for found in pattern.findall(script)}
    parts |= {("constraint", f"{name} on public.signing_keys") for name in RULE.findall(script)}
    parts |= {("function", name) for name in FUNCTION.findall(script)}
    for table, inside in TABLE.findall(script):
        parts |= {("column", f"{name} of {table}") for name in COLUMN.findall(inside)}
        parts |= {("constraint", f"{name} on {table}") for name in CONSTRAINT.findall(inside)}
    return frozenset(parts)


def bodies() -> dict[str, str]:
    """The functions of sql/schema.sql whose text PostgreSQL keeps letter by letter."""
    return dict(BODY.findall((SQL / "schema.sql").read_text(encoding="utf-8")))


def flaws_of_schema(database: Database) -> list[str]:
    """What is not as sql/schema.sql makes it; empty if all is."""
    rows = database.read(lambda connection: connection.execute(_query("found")).all())
    there = {(row.kind, row.name): row for row in rows}
    said = [f"{kind} {name} is missing" for kind, name in sorted(expected() - there.keys())]
    said += [f"{kind} {name} is switched off or not valid" for kind, name in sorted(expected() & there.keys()) if not there[kind, name].works]
    said += [
        f"function {name} is another one than the file's"
        for name, body in sorted(bodies().items())
        if ("function", name) in there and there["function", name].body != body
    ]
    return said


def flaws_of_rights(database: Database, role: str) -> list[str]:
    """What that login lacks, or may and must not; `role` is "rotator", "cleaner" or "auditor"."""
    rows = database.read(lambda connection: connection.execute(_query("rights"), {"role": role}).all())
    return [f"it lacks {row.what}" if row.wanted else f"it has {row.what}, which it must not" for row in rows if row.has != row.wanted]


def server(database: Database) -> tuple[str, str, bool]:
    """(login, PostgreSQL's version, whether it is a replica)."""
    row = database.read(lambda connection: connection.execute(_query("server")).one())
    return row.login, row.version, row.is_replica


def environment_name(database: Database) -> str | None:
    """Whose database this is; None where nobody named it."""
    name: str | None = database.read(lambda connection: connection.execute(query("environment")).scalar())
    return name


def sealed_by(database: Database) -> Sequence[tuple[str, int]]:
    """The sealing key's versions that rows still need, each with the number of rows (I24)."""
    return [(row.sealed_by, row.keys) for row in database.read(lambda connection: connection.execute(_query("sealed_by")).all())]


@cache
def _query(name: str) -> TextClause:
    parts = re.split(r"^-- name: (\w+)\n", (SQL / "doctor.sql").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return text(dict(zip(parts[::2], parts[1::2], strict=True))[name])
