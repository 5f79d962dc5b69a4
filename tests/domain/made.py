"""Keys, rotations, facts and policies for the story tables, each field as in an ordinary week unless the story says otherwise."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from keyrotation.domain.decision import Facts, Hold, Rotation
from keyrotation.domain.keys import Key, KeyRing, Status
from keyrotation.domain.policy import Policy

NOW = datetime(2026, 1, 6, 3, 0, tzinfo=UTC)
TICK = timedelta(microseconds=1)
DAY, HOUR, MINUTE, SECOND = timedelta(days=1), timedelta(hours=1), timedelta(minutes=1), timedelta(seconds=1)


def a_policy(**settings: Any) -> Policy:
    """Production's: weekly, gateways cache 15 minutes, tokens live an hour."""
    usual: dict[str, Any] = {
        "rotate_every": 7 * DAY,
        "max_key_age": 16 * DAY,
        "token_lifetime": HOUR,
        "clock_skew": 30 * SECOND,
        "cleanup_after": 48 * HOUR,
        "cache_time": 15 * MINUTE,
        "key_cache": MINUTE,
        "max_age_limit": HOUR,
    }
    return Policy(**{**usual, **settings})


def a_key(kid: str = "old", status: str = "current", **fields: Any) -> Key:
    """A key that was made, published and promoted eight days ago, and demoted three days ago if it is previous."""
    made = NOW - 8 * DAY
    usual: dict[str, Any] = {"created_at": made, "published_at": made, "published_seen_at": made}
    if status in ("current", "previous"):
        usual["promoted_at"] = made
    if status == "previous":
        usual |= {"demoted_at": NOW - 3 * DAY, "demoted_seen_at": NOW - 3 * DAY, "retain_until": NOW - DAY}
    if status == "disabled":
        usual |= {"disabled_at": NOW - DAY, "disabled_reason": "cleaned up"}
    return Key(kid, Status(status), **{**usual, **fields})


def a_rotation(kind: str = "rotation", **fields: Any) -> Rotation:
    """An open one, that somebody works on."""
    usual: dict[str, Any] = {
        "id": 7,
        "epoch": 1,
        "actor": "schedule",
        "reason": "due",
        "opened_at": NOW - MINUTE,
        "lease_until": NOW + MINUTE,
        "flow_run_id": "their-run",
    }
    return Rotation(environment="production", kind=kind, **{**usual, **fields})


def a_hold() -> Hold:
    return Hold("audit week", "ada", NOW - DAY)


def facts(*keys: Key, work: Rotation | None = None, hold: Hold | None = None, now: datetime = NOW) -> Facts:
    return Facts(now, KeyRing.of(keys), work, hold)
