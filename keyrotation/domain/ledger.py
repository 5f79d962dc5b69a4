"""The ledger as a value: the canonical bytes of an entry, and what is wrong with a chain of them.

The same encoding is in sql/schema.sql (key_rotation.ledger_hash): each column in table order as `name=length:value`, or `name-` for NULL,
lengths in UTF-8 octets, SHA-256 over all of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

GENESIS = "0" * 64
COLUMNS = ("seq", "at", "environment", "rotation_id", "kid", "event", "old_status", "new_status", "actor", "flow_run_id", "reason", "evidence", "previous_hash")


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry, each column as the text that is hashed; `at` in ISO 8601 with microseconds and Z, `evidence` as PostgreSQL prints jsonb."""

    seq: int
    at: str
    environment: str
    rotation_id: int | None
    kid: str | None
    event: str
    old_status: str | None
    new_status: str | None
    actor: str
    flow_run_id: str | None
    reason: str | None
    evidence: str
    previous_hash: str
    hash: str

    def computed_hash(self) -> str:
        """What `hash` must be."""
        return hashlib.sha256("".join(_field(name, getattr(self, name)) for name in COLUMNS).encode()).hexdigest()


def _field(name: str, value: object) -> str:
    if value is None:
        return f"{name}-\n"
    text = str(value)
    return f"{name}={len(text.encode())}:{text}\n"


def broken_links(entries: Iterable[Entry], after: tuple[int, str] = (0, GENESIS)) -> list[str]:
    """Sentences on what is wrong with the chain, by entry number; empty if it is whole. `after` is the (seq, hash) before the first."""
    said, (seq, head) = [], after
    for entry in entries:
        if entry.seq <= seq:
            said.append(f"entry {entry.seq} comes after entry {seq}: it was inserted, repeated or moved")
        elif entry.seq != seq + 1:
            said.append(f"entry {seq + 1} is missing: after {seq} comes {entry.seq}")
        elif entry.previous_hash != head:
            said.append(f"entry {entry.seq} does not follow entry {seq}: one of the two was exchanged")
        if entry.computed_hash() != entry.hash:
            said.append(f"entry {entry.seq} was edited: its content does not match its hash")
        seq, head = entry.seq, entry.hash
    return said
