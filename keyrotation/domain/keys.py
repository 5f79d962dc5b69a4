"""The life of a signing key: states, transitions, and the key ring of one environment.

    (none) --generate--> next --promote--> current --promote another--> previous --clean up--> disabled
                           |                                               |
                           +--------- disable by hand, emergency ----------+--> disabled
                                           previous --roll back--> current

    next      in the JWKS, signs nothing yet
    current   in the JWKS, signs; exactly one once a key was ever promoted
    previous  in the JWKS, signs no more; kept until every token that it signed is dead
    disabled  not in the JWKS, private half erased; `compromised` is for ever

The database holds these rules by itself (sql/schema.sql); here they are what the code reasons with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from keyrotation.domain.errors import Ambiguous, Refused


class Status(StrEnum):
    """Where a key is in its life."""

    NEXT = "next"
    CURRENT = "current"
    PREVIOUS = "previous"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True)
class Key:
    """One row of signing_keys, without its secrets. All instants are the database's, aware UTC.

    `…_seen_at` was read in a transaction of its own after the change was acknowledged: waiting counts from there.
    """

    kid: str
    status: Status
    created_at: datetime
    published_at: datetime
    public_jwk: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    published_seen_at: datetime | None = None
    accepted_at: datetime | None = None
    promoted_at: datetime | None = None
    demoted_at: datetime | None = None
    demoted_seen_at: datetime | None = None
    retain_until: datetime | None = None
    disabled_at: datetime | None = None
    disabled_reason: str | None = None
    compromised: bool = False
    never_promote: bool = False
    cleanup_hold: str | None = None
    canaries_left: int = 0
    rotation_id: int | None = None

    @property
    def published(self) -> bool:
        """True while the key stands in the JWKS."""
        return self.status is not Status.DISABLED


@dataclass(frozen=True, slots=True)
class KeyRing:
    """All keys of an environment, at one instant."""

    keys: tuple[Key, ...]

    @classmethod
    def of(cls, keys: Iterable[Key]) -> KeyRing:
        """The ring; raises Ambiguous where two keys claim a place that has room for one."""
        ring = cls(tuple(keys))
        for status in (Status.CURRENT, Status.NEXT):
            kids = [key.kid for key in ring.keys if key.status is status]
            if len(kids) > 1:
                raise Ambiguous(f"{len(kids)} keys are {status} ({', '.join(kids)}): see docs/operations.md, 'two keys in one place'")
        return ring

    def _only(self, status: Status) -> Key | None:
        return next((key for key in self.keys if key.status is status), None)

    @property
    def current(self) -> Key | None:
        """The key that signs."""
        return self._only(Status.CURRENT)

    @property
    def next(self) -> Key | None:
        """The key that is published ahead."""
        return self._only(Status.NEXT)

    @property
    def previous(self) -> tuple[Key, ...]:
        """Keys that sign no more and still verify, oldest demotion first."""
        return tuple(sorted((key for key in self.keys if key.status is Status.PREVIOUS), key=lambda key: key.demoted_at or key.created_at))

    @property
    def published(self) -> frozenset[str]:
        """The kids that the JWKS must hold: these and no others (I4)."""
        return frozenset(key.kid for key in self.keys if key.published)

    @property
    def compromised(self) -> frozenset[str]:
        """The kids that must never be seen again (I8)."""
        return frozenset(key.kid for key in self.keys if key.compromised)

    def find(self, kid: str) -> Key:
        """The key of that kid; raises Refused with the kids there are."""
        for key in self.keys:
            if key.kid == kid:
                return key
        raise Refused(f"there is no signing key with the kid {kid[:60]!r}; published are: {', '.join(sorted(self.published)) or 'none'}")

    def require_current(self) -> Key:
        """The key that signs; raises Refused where there is none yet."""
        if self.current is None:
            raise Refused("no key is current: run the bootstrap-signing-keys deployment to make the initial key")
        return self.current
