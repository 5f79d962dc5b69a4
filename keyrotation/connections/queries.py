"""Reads sql/queries.sql: statements by name, so that SQL stands in SQL files where a DBA can read it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from sqlalchemy import TextClause, text

FILE = Path(__file__).resolve().parents[2] / "sql" / "queries.sql"


@cache
def _all() -> dict[str, TextClause]:
    parts = re.split(r"^-- name: (\w+)\n", FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {name: text(body.strip()) for name, body in zip(parts[::2], parts[1::2], strict=True)}


def query(name: str) -> TextClause:
    """The statement of that name."""
    return _all()[name]
