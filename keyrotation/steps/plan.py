"""Before anything is changed: what a rotation would do, why now, until when it would wait, and whether the world is fit for it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keyrotation.domain.decision import Action, Decision, Facts, Request, decide_rotation
from keyrotation.domain.errors import BadAnswer, Refused
from keyrotation.domain.keys import KeyRing
from keyrotation.domain.policy import Seen, Sum, show_instant
from keyrotation.domain.propagation import Answer
from keyrotation.ports import Dated, Environment
from keyrotation.steps.gateways import canary_alarm

CLOCK_READINGS = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """A decision, and what carrying it out would mean. `canaries` is false where a probe token would be no proof."""

    environment: str
    decision: Decision
    current_kid: str | None
    next_kid: str | None
    promotion: Sum | None = None
    cleanup: Sum | None = None
    alarm: str | None = None

    @property
    def message(self) -> str:
        """For people."""
        return self.decision.message

    @property
    def acts(self) -> bool:
        """Whether the run changes anything."""
        return self.decision.action in (Action.ROTATE, Action.RESUME, Action.WAIT)

    def lines(self) -> list[tuple[str, str]]:
        """What a person is shown, as (name, value)."""
        said = [("Decision", self.decision.message), ("Key that signs now", self.current_kid or "none")]
        if self.next_kid or self.acts:
            said.append(("Key to promote", self.next_kid or "a new one, made by this run"))
        if self.promotion:
            said.append(("Earliest promotion", self.promotion.explain()))
        if self.cleanup:
            said.append(("Earliest cleanup of the old key", self.cleanup.explain()))
        if self.alarm:
            said.append(("Alarm", self.alarm))
        return said


def plan(env: Environment, request: Request) -> Plan:
    """The plan; raises Refused or a WorldError where the rotation must not begin. Changes nothing."""
    facts = env.keys.look()
    decision = decide_rotation(facts, request, env.policy)
    ring = facts.ring
    kids = (ring.current.kid if ring.current else None, ring.next.kid if ring.next else None)
    if decision.action is not Action.ROTATE:
        return Plan(env.name, decision, *kids)
    seen, alarm = preflight(env, facts)
    promotion = env.policy.may_promote((ring.next.published_seen_at if ring.next else None) or facts.now, seen)
    demoted = max(promotion.instant, facts.now)
    return Plan(env.name, decision, *kids, promotion, env.policy.may_clean_up(demoted, seen), alarm)


def preflight(env: Environment, facts: Facts) -> tuple[Seen, str | None]:
    """What is seen live, and an alarm if canaries are no proof here; raises where the world is not fit for a rotation."""
    published = env.identity.published()
    wrong = published.jwks.differences(facts.ring.published, facts.ring.compromised)
    if wrong and not _is_cache_lag(env, facts.ring, published.jwks.kids):
        raise Refused(f"the JWKS is not what the database publishes: {'; '.join(wrong)}. Find out why before any rotation")
    check_clocks(env)
    token = env.identity.fresh_token()
    env.identity.verify(token, published.jwks)
    current = facts.ring.require_current()
    if token.kid != current.kid and current.promoted_at is not None and facts.now > current.promoted_at + env.policy.key_cache + env.policy.clock_skew:
        raise Refused(
            f"tokens are signed by key {token.kid}, the database's current key is {current.kid}: the identity service reads another database, or its key "
            "cache is longer than identity.key_cache"
        )
    _require_accepted(env, token.raw)
    return Seen(published.max_age, token.lifetime), canary_alarm(env, current.kid)


def _is_cache_lag(env: Environment, ring: KeyRing, served: frozenset[str]) -> bool:
    """A replica may serve what was published up to its cache time ago: keys that this database knows, none compromised."""
    return env.policy.key_cache.total_seconds() > 0 and served <= {key.kid for key in ring.keys} and not served & ring.compromised


def check_clocks(env: Environment) -> dict[str, str]:
    """The clocks' differences by name; raises Refused where one is too far from the database's (F80)."""
    said = {}
    for name, apart, tolerated in clock_differences(env):
        if abs(apart) > tolerated:
            raise Refused(
                f"the clocks of the database and of {name} are {abs(apart):.1f} s apart, {tolerated:.1f} s are tolerated (policy.clock_skew and the resolution of "
                "the Date header): set the wrong one right; no waiting rule holds until then"
            )
        said[name] = f"{apart:+.1f}s"
    return said


def clock_differences(env: Environment) -> list[tuple[str, float, float]]:
    """(whose, seconds ahead of the database, seconds tolerated): the median of three readings each."""
    readings: dict[str, list[tuple[float, float]]] = {}
    sources: Sequence[Callable[[], Sequence[Dated]]] = (lambda: [env.identity.date()], env.gateways.dates)
    for _ in range(CLOCK_READINGS):
        for source in sources:
            for dated in source():
                # The Date was made somewhere within the round trip before our look at the database's clock; whole seconds, cut.
                now = env.keys.look().now
                tolerated = env.policy.clock_tolerance(dated.round_trip).total_seconds()
                readings.setdefault(dated.name, []).append(((dated.date - now).total_seconds() + 0.5, tolerated))
    return [(name, statistics.median(apart for apart, _ in seen), max(tolerated for _, tolerated in seen)) for name, seen in readings.items()]


def _require_accepted(env: Environment, raw: str) -> None:
    for observation in env.gateways.call(raw):
        if observation.answer is not Answer.ACCEPTED:
            raise BadAnswer(
                f"gateway {observation.gateway} does not accept a fresh token before the rotation: {observation.said}. Mend that first; no key was changed"
            )


def summary(facts: Facts) -> list[tuple[str, str, str, str]]:
    """All keys that count now, as (kid, state, since, note)."""
    rows = []
    for key in facts.ring.keys:
        since = {"next": key.published_at, "current": key.promoted_at, "previous": key.demoted_at, "disabled": key.disabled_at}[key.status]
        note = key.cleanup_hold or ("rolled back" if key.never_promote else "") or ("compromised" if key.compromised else "")
        if key.retain_until and not note:
            note = f"kept until {show_instant(key.retain_until)}"
        rows.append((key.kid, str(key.status), show_instant(since) if since else "", note or key.disabled_reason or ""))
    return rows
