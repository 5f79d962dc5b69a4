"""Keys, rotations and ledger in PostgreSQL (sql/schema.sql holds the rules): the rotator's, the cleaner's and the auditor's view.

A statement that touched no row is never success: the loser of a race gets Superseded or Refused (I10). What changes a key is told to the
transaction's local settings first, so that the table's own triggers write the ledger.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, RowMapping

from keyrotation.connections.database import Database
from keyrotation.connections.queries import query
from keyrotation.domain.decision import Facts, Hold, Request, Rotation
from keyrotation.domain.errors import Refused, Superseded
from keyrotation.domain.keys import Key, KeyRing, Status
from keyrotation.domain.ledger import Entry
from keyrotation.ports import Gate, NewKey


def _key(row: RowMapping, canaries: Mapping[str, int]) -> Key:
    return Key(**{**row, "status": Status(row["status"]), "canaries_left": canaries.get(row["kid"], 0)})


class _Looking:
    """What every role may see."""

    def __init__(self, database: Database, environment: str) -> None:
        self._database, self._environment = database, environment

    def look(self) -> Facts:
        """Keys, open rotation and hold in one snapshot, with the database's clock."""
        return self._database.read(self._facts)

    def environment_name(self) -> str | None:
        """Whose database this is; None where nobody named it."""
        return self._database.read(lambda connection: connection.execute(query("environment")).scalar())

    def _canaries(self, connection: Connection) -> Mapping[str, int]:
        return {}

    def _facts(self, connection: Connection) -> Facts:
        now = connection.execute(query("clock")).scalar_one()
        canaries = self._canaries(connection)
        ring = KeyRing.of(_key(row, canaries) for row in connection.execute(query("keys")).mappings())
        work = connection.execute(query("open_rotation")).mappings().one_or_none()
        environment = connection.execute(query("environment")).mappings().one_or_none()
        held = environment is not None and environment["hold_reason"] is not None
        hold = Hold(environment["hold_reason"], environment["hold_by"], environment["held_at"]) if held and environment is not None else None
        return Facts(now, ring, self._rotation(work) if work else None, hold, self._environment)

    def _rotation(self, row: RowMapping) -> Rotation:
        return Rotation(environment=self._environment, **row)


class PostgresKeyStore(_Looking):
    """The rotator's role. `lease` is how long a run is believed to be alive after it last wrote."""

    def __init__(self, database: Database, environment: str, lease: timedelta) -> None:
        super().__init__(database, environment)
        self._lease = lease

    def _canaries(self, connection: Connection) -> Mapping[str, int]:
        return {row.kid: row.left for row in connection.execute(query("canaries_left"))}

    def rotation(self, rotation_id: int) -> Rotation:
        """That rotation, as it is now."""
        return self._database.read(lambda connection: self._rotation(connection.execute(query("rotation"), {"id": rotation_id}).mappings().one()))

    # ---- opening, taking over, closing

    def open(self, kind: str, request: Request, due_after: timedelta | None) -> Rotation | None:
        """A new rotation; None where one is open already, on hold, or no longer due: look again."""
        values = {"kind": kind, "actor": request.actor, "flow_run_id": request.flow_run_id, "reason": request.reason, "due_after": due_after}
        return self._one_rotation("open", request, values)

    def take_over(self, rotation: Rotation, request: Request) -> Rotation | None:
        """The rotation under a new epoch; None where somebody else was faster."""
        values = {"id": rotation.id, "epoch": rotation.epoch, "actor": request.actor, "flow_run_id": request.flow_run_id}
        return self._one_rotation("take_over", request, values)

    def _one_rotation(self, statement: str, request: Request, values: Mapping[str, Any]) -> Rotation | None:
        def work(connection: Connection) -> Rotation | None:
            self._say(connection, request.actor, request.flow_run_id, None, request.reason)
            row = connection.execute(query(statement), {**values, "lease": self._lease}).mappings().one_or_none()
            return self._rotation(row) if row else None

        return self._database.write(work)

    def renew(self, rotation: Rotation) -> None:
        """Says that somebody still works on it; raises Superseded where somebody else does."""
        self._database.write(lambda connection: self._fence(connection, rotation, ""))

    def close(self, rotation: Rotation, outcome: str, message: str, evidence: Mapping[str, Any] | None = None) -> Rotation:
        """The rotation, ended. Closing again with the same outcome is success: an answer may have been lost."""

        def work(connection: Connection) -> Rotation:
            self._say(connection, rotation.actor, rotation.flow_run_id, rotation, message, evidence)
            values = {"id": rotation.id, "epoch": rotation.epoch, "outcome": outcome, "message": message}
            row = connection.execute(query("close"), values).mappings().one_or_none()
            if row is None:
                row = connection.execute(query("rotation"), {"id": rotation.id}).mappings().one()
                if (row["epoch"], row["outcome"]) != (rotation.epoch, outcome):
                    raise Superseded("another run has taken over this rotation: nothing more was changed by this one")
            return self._rotation(row)

        return self._database.write(work)

    # ---- keys

    def insert(self, rotation: Rotation, key: NewKey, reason: str) -> None:
        """Publishes the new key as next; its rotation makes no second one (a unique index)."""

        def work(connection: Connection) -> None:
            self._fence(connection, rotation, reason, {"sealed_by": key.sealed_by, "canaries": len(key.canaries)})
            values = {
                "kid": key.kid,
                "public_jwk": json.dumps(dict(key.public_jwk)),
                "ciphertext": key.ciphertext,
                "sealed_by": key.sealed_by,
                "canaries": json.dumps(key.canaries),
                "rotation_id": rotation.id,
            }
            self._touch(connection, "insert_key", values, "no key was published: another one is next already, or this rotation has made its key")
            connection.execute(query("name_new_key"), {"id": rotation.id, "kid": key.kid})

        self._database.write(work)

    def adopt(self, rotation: Rotation, kid: str) -> None:
        """Names the key that this rotation promotes: one that was published before, or that the identity service made."""

        def work(connection: Connection) -> None:
            self._fence(connection, rotation, "")
            connection.execute(query("name_new_key"), {"id": rotation.id, "kid": kid})

        self._database.write(work)

    def confirm(self, rotation: Rotation, retention: timedelta) -> None:
        """Notes, in a transaction of its own, that what was committed before has been seen."""

        def work(connection: Connection) -> None:
            self._fence(connection, rotation, "")
            connection.execute(query("confirm"), {"retention": retention})

        self._database.write(work)

    def accept(self, rotation: Rotation, kid: str) -> None:
        """Notes that every gateway that can be probed was shown to know the key."""

        def work(connection: Connection) -> None:
            self._fence(connection, rotation, "")
            self._touch(connection, "accept", {"kid": kid}, f"key {kid} is not next any more")

        self._database.write(work)

    def promote(self, rotation: Rotation, kid: str, gate: Gate, reason: str) -> None:
        """Current becomes previous and the key becomes current, in one transaction; raises Refused where the gate is shut."""

        def work(connection: Connection) -> None:
            self._fence(connection, rotation, reason)
            old = connection.execute(query("demote_current"), {"kid": kid}).scalar()
            self._touch(
                connection,
                "promote",
                {"kid": kid, "wait": gate.wait, "proof": gate.proof},
                f"key {kid} may not be promoted yet: it is not next, not published long enough, or not shown to be known everywhere",
            )
            connection.execute(query("name_promoted"), {"id": rotation.id, "old_kid": old, "kid": kid})

        self._database.write(work)

    def gate_is_open(self, rotation: Rotation, kid: str, gate: Gate) -> bool:
        """Whether `promote` would be let through, for an authority that promotes by its own API. Renews the lease."""

        def work(connection: Connection) -> bool:
            self._fence(connection, rotation, "")
            return bool(connection.execute(query("gate_is_open"), {"kid": kid, "wait": gate.wait, "proof": gate.proof}).scalar_one())

        return self._database.write(work)

    def name_promoted(self, rotation: Rotation, old_kid: str | None, kid: str) -> None:
        """Notes which key was current before, where the identity service promoted."""

        def work(connection: Connection) -> None:
            self._fence(connection, rotation, "")
            connection.execute(query("name_promoted"), {"id": rotation.id, "old_kid": old_kid, "kid": kid})

        self._database.write(work)

    def roll_back(self, rotation: Rotation, kid: str, reason: str) -> None:
        """The previous key is current again; the one that failed is previous, never to be promoted again."""

        def work(connection: Connection) -> None:
            self._fence(connection, rotation, reason)
            failed = connection.execute(query("demote_current"), {"kid": kid}).scalar()
            self._touch(connection, "restore", {"kid": kid}, f"key {kid} cannot be rolled back to: it is not previous any more")
            self._touch(connection, "never_promote_again", {"kid": failed}, f"there was no other current key to roll back from to key {kid}")
            connection.execute(query("name_rolled_back"), {"id": rotation.id})

        self._database.write(work)

    def mark_rolled_back(self, rotation: Rotation, kid: str) -> None:
        """The same marks, where the identity service did the promotion back."""

        def work(connection: Connection) -> None:
            self._fence(connection, rotation, "")
            self._touch(connection, "never_promote_again", {"kid": kid}, f"key {kid} was not rolled back: it is not previous")
            connection.execute(query("name_rolled_back"), {"id": rotation.id})

        self._database.write(work)

    def republish(self, rotation: Rotation, kid: str, reason: str) -> None:
        """Brings a key that was cleaned up too early back into the JWKS, for verification only."""

        def work(connection: Connection) -> None:
            self._fence(connection, rotation, reason)
            self._touch(connection, "republish", {"kid": kid}, f"key {kid} cannot be republished: it is not disabled, or compromised")

        self._database.write(work)

    def hold_cleanup(self, rotation: Rotation, kid: str, reason: str) -> None:
        """Keeps the key's cleanup back until a person releases it. A key that is not previous has no cleanup to be held: nothing is done."""

        def work(connection: Connection) -> None:
            self._fence(connection, rotation, reason)
            connection.execute(query("hold_cleanup"), {"kid": kid, "reason": reason})

        self._database.write(work)

    def spend_canaries(self, rotation: Rotation, kid: str, count: int) -> Sequence[str]:
        """`count` canaries that no gateway has seen; fewer where the sheaf is used up."""

        def work(connection: Connection) -> Sequence[str]:
            self._fence(connection, rotation, "")
            before = self._canaries(connection).get(kid, 0)
            row = connection.execute(query("spend_canaries"), {"kid": kid, "count": count}).one_or_none()
            if row is None:
                return ()
            sheaf: list[str] = row.canaries
            return tuple(sheaf[len(sheaf) - before : row.canaries_spent])

        return self._database.write(work)

    def spent_canary(self, kid: str) -> str | None:
        """A canary that has been shown already: good where it must be refused."""
        return self._database.read(lambda connection: connection.execute(query("spent_canary"), {"kid": kid}).scalar())

    # ---- hold, release, record

    def hold(self, reason: str, by: str) -> None:
        """Keeps all scheduled changes back until `release`."""
        self._database.write(lambda connection: self._touch(connection, "hold", {"reason": reason, "by": by}, "the database has no environment name yet"))

    def release(self, by: str) -> None:
        """Lifts the hold of the environment and of every cleanup."""

        def work(connection: Connection) -> None:
            self._say(connection, by, None, None, "released")
            lifted = connection.execute(query("release")).rowcount
            if not lifted + connection.execute(query("release_cleanups")).rowcount:
                raise Refused("nothing is on hold here: neither the environment nor a cleanup")

        self._database.write(work)

    def record(
        self,
        event: str,
        request: Request,
        *,
        rotation_id: int | None = None,
        kid: str | None = None,
        reason: str = "",
        evidence: Mapping[str, Any] | None = None,
    ) -> None:
        """An entry of its own: something that was seen or done beside the keys."""
        self._database.write(lambda connection: self._record(connection, event, request.actor, request.flow_run_id, rotation_id, kid, reason, evidence or {}))

    def evidence_of(self, rotation_id: int, event: str) -> Mapping[str, Any] | None:
        """The evidence of the newest entry of that kind."""
        return self._database.read(lambda connection: connection.execute(query("evidence_of"), {"rotation_id": rotation_id, "event": event}).scalar())

    # ---- helpers

    def _say(
        self, connection: Connection, actor: str, flow_run_id: str | None, rotation: Rotation | None, reason: str, evidence: Mapping[str, Any] | None = None
    ) -> None:
        connection.execute(
            query("say"),
            {
                "actor": actor,
                "flow_run_id": flow_run_id,
                "rotation_id": str(rotation.id) if rotation else None,
                "epoch": str(rotation.epoch) if rotation else None,
                "reason": reason,
                "evidence": json.dumps(dict(evidence)) if evidence else None,
            },
        )

    def _fence(self, connection: Connection, rotation: Rotation, reason: str, evidence: Mapping[str, Any] | None = None) -> None:
        """First in every write: the rotation's row is ours, with our epoch, until the commit."""
        if connection.execute(query("fence"), {"id": rotation.id, "epoch": rotation.epoch, "lease": self._lease}).rowcount != 1:
            raise Superseded("another run has taken over this rotation, or it has ended: nothing more was changed by this one")
        self._say(connection, rotation.actor, rotation.flow_run_id, rotation, reason, evidence)

    def _touch(self, connection: Connection, statement: str, values: Mapping[str, Any], otherwise: str) -> None:
        if connection.execute(query(statement), values).rowcount != 1:
            raise Refused(otherwise)

    def _record(
        self,
        connection: Connection,
        event: str,
        actor: str,
        flow_run_id: str | None,
        rotation_id: int | None,
        kid: str | None,
        reason: str,
        evidence: Mapping[str, Any],
    ) -> None:
        connection.execute(
            query("record"),
            {
                "event": event,
                "actor": actor,
                "flow_run_id": flow_run_id,
                "rotation_id": rotation_id,
                "kid": kid,
                "reason": reason,
                "evidence": json.dumps(dict(evidence)),
            },
        )


class PostgresCleaner(_Looking):
    """The cleaner's role: the runbook's UPDATE and nothing else."""

    def clean_up(self, key: Key, request: Request, reason: str, evidence: Mapping[str, Any]) -> bool:
        """True if this call disabled the key; False if it is not there to be disabled any more (F52, F53)."""

        def work(connection: Connection) -> bool:
            connection.execute(
                query("say"),
                {
                    "actor": request.actor,
                    "flow_run_id": request.flow_run_id,
                    "rotation_id": None,
                    "epoch": None,
                    "reason": reason,
                    "evidence": json.dumps(dict(evidence)),
                },
            )
            return bool(connection.execute(query("clean_up"), {"kid": key.kid, "demoted_at": key.demoted_at}).rowcount)

        return self._database.write(work)


class PostgresRecords(_Looking):
    """The auditor's role: reads, and nothing else."""

    def rotations(self, limit: int) -> Sequence[Rotation]:
        """The newest rotations, newest first."""
        return self._database.read(lambda connection: tuple(self._rotation(row) for row in connection.execute(query("rotations"), {"limit": limit}).mappings()))

    def entries(self, after: int = 0) -> Iterator[Entry]:
        """The ledger from an entry number on, in order."""
        rows = self._database.read(lambda connection: connection.execute(query("entries"), {"after": after}).mappings().all())
        return (Entry(**row) for row in rows)

    def head(self) -> tuple[int, str]:
        """Number and hash of the last entry."""
        return self._database.read(lambda connection: tuple(connection.execute(query("ledger_head")).one()))
