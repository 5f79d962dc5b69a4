"""What the steps need from the outside, in domain types. One real adapter stands behind each port (keyrotation/adapters).

Every method raises only errors of keyrotation.domain.errors, with texts that hold no secret. Instants are aware UTC.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol

from keyrotation.domain.decision import Facts, Request, Rotation
from keyrotation.domain.jwks import Jwks
from keyrotation.domain.keys import Key
from keyrotation.domain.ledger import Entry
from keyrotation.domain.policy import Policy
from keyrotation.domain.propagation import Observation


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made: its private half only as ciphertext. Canaries are signed probe tokens, good for the probe route alone."""

    kid: str
    public_jwk: Mapping[str, str]
    ciphertext: bytes = field(repr=False)
    sealed_by: str
    canaries: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Sealed:
    """A ciphertext and the version of the key that sealed it."""

    ciphertext: bytes = field(repr=False)
    sealed_by: str


@dataclass(frozen=True, slots=True)
class Gate:
    """What a promotion demands of the key, checked inside the promoting statement (I6)."""

    wait: timedelta  # since published_seen_at
    proof: bool  # accepted_at must be set


class KeyStore(Protocol):
    """The database: keys, rotations, ledger. Every write of a rotation names its `Rotation`, whose epoch is checked inside the transaction."""

    def look(self) -> Facts: ...
    def rotation(self, rotation_id: int) -> Rotation: ...
    def environment_name(self) -> str | None: ...

    def open(self, kind: str, request: Request, due_after: timedelta | None) -> Rotation | None: ...
    def take_over(self, rotation: Rotation, request: Request) -> Rotation | None: ...
    def renew(self, rotation: Rotation) -> None: ...
    def close(self, rotation: Rotation, outcome: str, message: str, evidence: Mapping[str, Any] | None = None) -> Rotation: ...

    def insert(self, rotation: Rotation, key: NewKey, reason: str) -> None: ...
    def adopt(self, rotation: Rotation, kid: str) -> None: ...
    def confirm(self, rotation: Rotation, retention: timedelta) -> None: ...
    def accept(self, rotation: Rotation, kid: str) -> None: ...
    def promote(self, rotation: Rotation, kid: str, gate: Gate, reason: str) -> None: ...
    def gate_is_open(self, rotation: Rotation, kid: str, gate: Gate) -> bool: ...
    def name_promoted(self, rotation: Rotation, old_kid: str | None, kid: str) -> None: ...
    def roll_back(self, rotation: Rotation, kid: str, reason: str) -> None: ...
    def mark_rolled_back(self, rotation: Rotation, kid: str) -> None: ...
    def republish(self, rotation: Rotation, kid: str, reason: str) -> None: ...
    def hold_cleanup(self, rotation: Rotation, kid: str, reason: str) -> None: ...
    def spend_canaries(self, rotation: Rotation, kid: str, count: int) -> Sequence[str]: ...
    def spent_canary(self, kid: str) -> str | None: ...

    def hold(self, reason: str, by: str) -> None: ...
    def release(self, by: str) -> None: ...
    def record(
        self,
        event: str,
        request: Request,
        *,
        rotation_id: int | None = None,
        kid: str | None = None,
        reason: str = "",
        evidence: Mapping[str, Any] | None = None,
    ) -> None: ...
    def evidence_of(self, rotation_id: int, event: str) -> Mapping[str, Any] | None: ...


class Cleaner(Protocol):
    """The cleaner's role: the runbook's UPDATE."""

    def clean_up(self, key: Key, request: Request, reason: str, evidence: Mapping[str, Any]) -> bool: ...


class Records(Protocol):
    """The auditor's role: what happened."""

    def look(self) -> Facts: ...
    def environment_name(self) -> str | None: ...
    def rotations(self, limit: int) -> Sequence[Rotation]: ...
    def entries(self, after: int = 0) -> Iterator[Entry]: ...
    def head(self) -> tuple[int, str]: ...


class Authority(Protocol):
    """Who makes and promotes keys: our own hands in the database, or the identity service's admin API."""

    def generate(self, rotation: Rotation, reason: str) -> str: ...
    def promote(self, rotation: Rotation, kid: str, gate: Gate, reason: str) -> None: ...
    def roll_back(self, rotation: Rotation, kid: str, reason: str) -> None: ...


class Sealer(Protocol):
    """Encrypts a private half for one environment and kid. `check` raises what stands in the way, with the grant that is missing."""

    def seal(self, plaintext: bytes, context: bytes) -> Sealed: ...
    def check(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the token endpoint. `raw` is a secret: it never leaves the process."""

    kid: str
    issued_at: datetime
    expires_at: datetime
    raw: str = field(repr=False)

    @property
    def lifetime(self) -> timedelta:
        """exp - iat."""
        return self.expires_at - self.issued_at


@dataclass(frozen=True, slots=True)
class Published:
    """The JWKS as the public gets it."""

    jwks: Jwks
    max_age: timedelta | None


@dataclass(frozen=True, slots=True)
class Dated:
    """Another machine's clock: its Date, read within `round_trip` of ours."""

    name: str
    date: datetime
    round_trip: timedelta


class Identity(Protocol):
    """The identity service, as the public and as a client see it."""

    def published(self) -> Published: ...
    def fresh_token(self) -> Token: ...
    def verify(self, token: Token, jwks: Jwks) -> None: ...
    def date(self) -> Dated: ...


class Gateways(Protocol):
    """Everything that verifies tokens. Probes go over fresh connections, in equal parts to every gateway."""

    @property
    def names(self) -> Sequence[str]: ...
    @property
    def can_probe(self) -> bool: ...
    def probe(self, canaries: Sequence[str]) -> Sequence[Observation]: ...
    def call(self, token: str) -> Sequence[Observation]: ...
    def dates(self) -> Sequence[Dated]: ...


class Refresher(Protocol):
    """One rung of the ladder that makes gateways forget their cached JWKS."""

    @property
    def kind(self) -> str: ...
    def refresh(self, gateways: Sequence[str]) -> str: ...


class Announcer(Protocol):
    """Tells people. Returns the thread's id, to answer in; raises WorldError when it could not, within a bounded time."""

    def say(self, text: str, thread: str | None = None) -> str | None: ...
    def check(self) -> str: ...


class Head(Protocol):
    """Where the ledger's head is published, outside the database."""

    def publish(self, seq: int, digest: str) -> None: ...
    def read(self) -> tuple[int, str] | None: ...


class Progress(Protocol):
    """Is told how far a wait has come: a share between 0 and 1, and words."""

    def __call__(self, share: float, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Environment:
    """All parts of one environment, wired (keyrotation.wiring)."""

    name: str
    policy: Policy
    workers: int  # of a gateway instance: threads with a key cache of their own
    keys: KeyStore
    cleaner: Cleaner
    records: Records
    authority: Authority
    sealer: Sealer | None
    identity: Identity
    gateways: Gateways
    ladder: Sequence[Refresher]
    announcer: Announcer | None
    head: Head | None
    pause: Callable[[float], None] = time.sleep
    # What must live in this process only: the token taken before promotion, which stands for the old key's tokens in `verify`.
    memory: dict[int, Token] = field(default_factory=dict, repr=False)
