"""Wait until every gateway knows the key, and show it: the runbook's "wait 10-15 minutes", with a proof at its end.

The sum of all caches always passes first, unless the environment lets the canary replace the gateways' part of it. Then every gateway with a
probe route is shown to accept a canary that it has not seen. One that does not is refreshed by the ladder, a rung at a time with a proof after
each, before the run gives up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from keyrotation.domain.decision import Rotation
from keyrotation.domain.errors import BadAnswer, Unproven, WorldError
from keyrotation.domain.events import Happened
from keyrotation.domain.keys import Key, Status
from keyrotation.domain.policy import Seen, Sum, show, show_instant
from keyrotation.domain.propagation import Answer, Verdict, judge, probes_needed
from keyrotation.ports import Environment, Progress

POLL = 1.0  # seconds between two looks
ATTEMPTS = 4  # rounds of proof before the next rung, and after the last: a refetch under way gets its moment
PUBLISH_PATIENCE = 30.0  # seconds beyond the identity service's caches until the JWKS must show a published key


def can_prove(env: Environment, key: Key) -> bool:
    """Whether a canary of that key can be shown to the gateways."""
    return env.gateways.can_probe and key.canaries_left >= probes_needed(env.workers) + 1


def wait_for_gateway_cache(env: Environment, rotation: Rotation, kid: str, progress: Progress) -> Happened:
    """Returns once the key may be promoted, with the sum and the proof; raises Unproven where a gateway never learns it."""
    key = env.keys.look().ring.find(kid)
    if key.status is Status.CURRENT:
        return Happened(kid, f"key {kid} is current already: there is nothing to wait for", changed=False)
    seen = await_publication(env, rotation, key, progress)
    wait = _Wait(env, rotation, key, env.policy.seen_everywhere(_seen_at(key), seen), env.policy.may_promote(_seen_at(key), seen), progress)
    if not can_prove(env, key):
        wait.until(wait.deadline.instant)
        return Happened(
            kid,
            f"waited until {wait.deadline.explain()}; no gateway could be probed with a canary of this key, the sum alone decides",
            {"deadline": wait.deadline.explain(), "known": "by time"},
        )
    verdict = wait.for_proof()
    alarm = canary_alarm(env, kid)
    if alarm:  # what opens the API is no probe: the proof is void, the whole sum has to pass
        wait.until(wait.deadline.instant)
        return Happened(kid, f"waited until {wait.deadline.explain()}; {alarm}", {"deadline": wait.deadline.explain(), "known": "by time", "alarm": alarm})
    env.keys.accept(rotation, kid)
    return Happened(
        kid,
        f"every gateway knows key {kid}: {verdict.explain()}",
        {"deadline": wait.deadline.explain(), "known": verdict.explain(), "probes_each": probes_needed(env.workers), "refreshed": wait.refreshed},
    )


def canary_alarm(env: Environment, kid: str) -> str | None:
    """None if the API's routes refuse a canary of that key, or there is none to try; else the alarm."""
    canary = env.keys.spent_canary(kid) if env.gateways.can_probe else None
    if canary is None:
        return None
    opened = [observation.gateway for observation in env.gateways.call(canary) if observation.answer is Answer.ACCEPTED]
    if not opened:
        return None
    return (
        f"ALARM: the API of {', '.join(opened)} accepts a canary, which only the probe route may take: canaries are off, the waiting time alone decides. "
        "Check the audiences of that gateway's API routes"
    )


def await_publication(env: Environment, rotation: Rotation, key: Key, progress: Progress) -> Seen:
    """Returns what was seen live once the public JWKS holds the key; raises Unproven if it does not in time (F27)."""
    patience = env.policy.seen_everywhere(_seen_at(key), Seen()).instant + timedelta(seconds=PUBLISH_PATIENCE)
    while True:
        published = env.identity.published()
        if key.kid in published.jwks.kids:
            return Seen(jwks_max_age=published.max_age)
        now = env.keys.look().now
        if now > patience:
            raise Unproven(
                f"the JWKS does not show key {key.kid}, published {show_instant(_seen_at(key))}: the identity service does not read this database, or a cache in front of "
                "it is longer than identity.key_cache. The current key is as it was"
            )
        env.keys.renew(rotation)
        progress(0.0, f"the JWKS does not show key {key.kid} yet")
        env.pause(POLL)


def _seen_at(key: Key) -> datetime:
    return key.published_seen_at or key.published_at


@dataclass
class _Wait:
    """One wait under way."""

    env: Environment
    rotation: Rotation
    key: Key
    ahead: Sum
    deadline: Sum
    progress: Progress
    refreshed: list[str] = field(default_factory=list)

    def until(self, instant: datetime) -> None:
        """Passes the time, renewing the lease, so that a dead run is told from a waiting one."""
        while (now := self.env.keys.look().now) < instant:
            left = instant - now
            total = max((self.deadline.instant - self.deadline.start).total_seconds(), 0.001)
            self.env.keys.renew(self.rotation)
            self.progress(max(0.0, 1 - (self.deadline.instant - now).total_seconds() / total), f"{show(left)} left: until {self.deadline.explain()}")
            self.env.pause(min(POLL, max(left.total_seconds(), 0.01)))
        self.progress(1.0, f"waited until {self.deadline.explain()}")

    def for_proof(self) -> Verdict:
        """The verdict that every gateway knows the key; climbs the ladder before it gives up."""
        if self.env.policy.canary_shortens_wait:
            self.until(self.ahead.instant)
            for verdict in self._rounds_until(self.deadline.instant):
                if verdict.everywhere:
                    return verdict
        self.until(self.deadline.instant)
        verdict = self._prove()
        for rung in self.env.ladder:
            if verdict.everywhere:
                break
            self._climb(rung.kind, verdict)
            verdict = self._prove()
        if not verdict.everywhere:
            raise Unproven(
                f"not every gateway knows key {self.key.kid} after {self.deadline.explain()}: {verdict.explain()}. The current key is as it was; "
                f"refresh {', '.join(verdict.lagging) or 'the gateways'} by hand, then run the rotation again"
            )
        return verdict

    def _climb(self, kind: str, verdict: Verdict) -> None:
        rung = next(rung for rung in self.env.ladder if rung.kind == kind)
        try:
            told = rung.refresh(verdict.lagging)
        except WorldError as error:
            told = f"{kind} failed: {error}"
        self.refreshed.append(told)
        self.progress(1.0, f"{', '.join(verdict.lagging)} did not learn key {self.key.kid} in time: {told}")

    def _prove(self) -> Verdict:
        for attempt in range(ATTEMPTS):
            verdict = prove_known(self.env, self.rotation, self.key.kid)
            if verdict.everywhere or attempt == ATTEMPTS - 1:
                return verdict
            self.env.pause(POLL)
        raise AssertionError("unreachable")

    def _rounds_until(self, instant: datetime) -> Iterator[Verdict]:
        """Rounds of proof before the sum has passed, where the environment allows it. A scout goes first, so that few canaries are spent."""
        scout = self.env.keys.spend_canaries(self.rotation, self.key.kid, 1)
        while self.env.keys.look().now < instant:
            self.env.keys.renew(self.rotation)
            verdict = judge(self.env.gateways.probe(scout))
            yield prove_known(self.env, self.rotation, self.key.kid) if verdict.everywhere else verdict
            self.progress(0.5, f"waiting for the canary: {verdict.explain()}")
            self.env.pause(POLL)


def prove_known(env: Environment, rotation: Rotation, kid: str) -> Verdict:
    """One round: so many unseen canaries to every gateway that no worker thread is missed."""
    needed = probes_needed(env.workers)
    canaries = env.keys.spend_canaries(rotation, kid, needed)
    if len(canaries) < needed:
        raise BadAnswer(f"key {kid} has no unseen canaries left: nothing can be shown about it any more")
    return judge(env.gateways.probe(canaries), needed)
