"""The arithmetic of waiting: how long until a key is known everywhere, may be promoted, may be cleaned up; and the inverse questions.

    seen everywhere   published + identity service's key cache + the JWKS max-age where a cache is shared
    may promote       seen everywhere + gateway cache time + clock skew      (and, apart from the sum, every gateway shown to know the key)
    may clean up      demoted + max(cleanup_after, key cache + token lifetime + clock skew)

*published* and *demoted* are the database's clock read after the commit was acknowledged. The identity service's own cache is in every
line because a gateway that refetches from a stale replica unlearns what it had just shown to know (tests/model/protocol.py tries every order).
A deadline is a `Sum`: its terms are kept, so that every message can show how it came about.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from keyrotation.domain.errors import Refused

ZERO = timedelta(0)
# HTTP's Date has whole seconds: two right clocks may differ by that much before anybody's skew counts.
DATE_RESOLUTION = timedelta(seconds=1)
# A slot of the schedule is a rotation if the current key is at least half an interval old: a late run does not shift the next slot,
# two runs for one slot rotate once. "A whole interval old" would skip every second slot, by the minutes that a rotation takes.
DUE_SHARE = 0.5


def show(duration: timedelta, units: int = 2) -> str:
    """A duration as people write it: 2d, 15m, 1m 30s, 0.5s; no more than so many of its units."""
    seconds = duration.total_seconds()
    if seconds < 0:
        return "-" + show(-duration, units)
    if seconds < 10:
        return f"{seconds:.3g}s"
    parts, whole = [], round(seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, whole = divmod(whole, size)
        if count:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:units])


def show_instant(instant: datetime) -> str:
    """An instant as people read it, in UTC."""
    return f"{instant:%Y-%m-%d %H:%M:%S} UTC"


@dataclass(frozen=True, slots=True)
class Sum:
    """An instant and how it came about: a named start and named terms."""

    start_name: str
    start: datetime
    terms: tuple[tuple[str, timedelta], ...]

    @property
    def duration(self) -> timedelta:
        """The terms' sum."""
        return sum((term for _, term in self.terms), ZERO)

    @property
    def instant(self) -> datetime:
        """Start plus terms."""
        return self.start + self.duration

    def explain(self) -> str:
        """`2026-01-05 03:00:11 UTC = published 2026-01-05 03:00:00 UTC + gateway cache 10s + clock skew 1s`."""
        terms = "".join(f" + {name} {show(term, units=4)}" for name, term in self.terms if term)  # all units: who adds them up gets the instant
        return f"{show_instant(self.instant)} = {self.start_name} {show_instant(self.start)}{terms}"


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen live, to hold against the settings: the stricter counts."""

    jwks_max_age: timedelta | None = None  # Cache-Control of the JWKS as the public gets it
    token_lifetime: timedelta | None = None  # exp - iat of a real token


@dataclass(frozen=True, slots=True)
class Policy:
    """An environment's durations. `settings` refuses those whose sums cannot work."""

    rotate_every: timedelta
    max_key_age: timedelta
    token_lifetime: timedelta
    clock_skew: timedelta
    cleanup_after: timedelta
    cache_time: timedelta
    key_cache: timedelta
    max_age_limit: timedelta
    shared_cache: bool = False
    canary_shortens_wait: bool = False
    keep_standby: bool = False
    cleanup: Literal["automatic", "manual"] = "automatic"
    lease: timedelta = timedelta(seconds=60)

    # ---- waits

    def seen_everywhere(self, published_seen_at: datetime, seen: Seen = Seen()) -> Sum:
        """When every replica of the identity service, and every shared cache, serves the key."""
        terms = [("identity service's key cache", self.key_cache)]
        if self.shared_cache:
            terms.append(("JWKS max-age", self.shared_max_age(seen)))
        return Sum("published", published_seen_at, tuple(terms))

    def may_promote(self, published_seen_at: datetime, seen: Seen = Seen()) -> Sum:
        """When every gateway, also one that nobody listed, has had the time to know the key."""
        ahead = self.seen_everywhere(published_seen_at, seen)
        return Sum(ahead.start_name, ahead.start, (*ahead.terms, ("gateway cache", self.cache_time), ("clock skew", self.clock_skew)))

    def may_clean_up(self, demoted_seen_at: datetime, seen: Seen = Seen()) -> Sum:
        """When the last token of a demoted key is dead everywhere, and the way back is given up."""
        needed = self.retention(seen)
        if self.cleanup_after >= sum((term for _, term in needed), ZERO):
            return Sum("demoted", demoted_seen_at, (("cleanup_after", self.cleanup_after),))
        return Sum("demoted", demoted_seen_at, needed)

    def retention(self, seen: Seen = Seen()) -> tuple[tuple[str, timedelta], ...]:
        """How long tokens of a demoted key can live: it may still sign until the identity service's cache has heard."""
        lifetime = max(self.token_lifetime, seen.token_lifetime or ZERO)
        return (("identity service's key cache", self.key_cache), ("token lifetime", lifetime), ("clock skew", self.clock_skew))

    def shared_max_age(self, seen: Seen) -> timedelta:
        """The max-age to count for a shared cache; raises Refused where it is longer than the environment allows."""
        if seen.jwks_max_age is None:
            return self.max_age_limit
        if seen.jwks_max_age > self.max_age_limit:
            raise Refused(
                f"the JWKS is served with max-age {show(seen.jwks_max_age)}, more than identity.max_age_limit {show(self.max_age_limit)}: "
                "lower the max-age at the identity service or its cache, or raise the limit"
            )
        return seen.jwks_max_age

    # ---- due

    @property
    def due_after(self) -> timedelta:
        """The age from which a slot of the schedule rotates the current key."""
        return self.rotate_every * DUE_SHARE

    def due_at(self, promoted_at: datetime) -> datetime:
        """The first instant at which a scheduled run rotates."""
        return promoted_at + self.due_after

    # ---- the inverse questions

    def shortest_interval(self) -> timedelta:
        """How often may be rotated at the most: both waits of one rotation, and one lease for a run that died."""
        shared = self.max_age_limit if self.shared_cache else ZERO
        ahead = self.key_cache + shared + self.cache_time + self.clock_skew
        return ahead + self.key_cache + self.lease

    def longest_token(self) -> timedelta:
        """How long may a token live so that cleanup_after suffices without being raised?"""
        return max(ZERO, self.cleanup_after - self.key_cache - self.clock_skew)

    # ---- clocks

    def clock_tolerance(self, round_trip: timedelta) -> timedelta:
        """By how much another machine's Date may differ from the database's clock."""
        return self.clock_skew + DATE_RESOLUTION + round_trip
