"""The waiting rules of keyrotation.domain.policy, tried in every order of cache refreshes of a small world: no rule missing, no term too many.

A tick is a second. The rules are the code's own: a deed is done at the first tick that is not before the instant of its sum, as in the promoting
statement (`published_seen_at + wait <= now`). With a skew of nought the sums are exact: one tick less, and a story is found in which a token dies.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from keyrotation.domain.policy import Policy, Sum
from tests.model.protocol import Caches, Explored, Rules, explore

START = datetime(2026, 1, 5, 3, tzinfo=UTC)
WORLDS = [
    Caches(replica=0, gateway=2, token=2),
    Caches(replica=1, gateway=2, token=1),
    Caches(replica=2, gateway=2, token=1),
    Caches(replica=2, gateway=3, token=2),
    Caches(replica=1, gateway=1, token=2, replicas=3),
    Caches(replica=2, gateway=1, token=1, gateways=2),
    Caches(replica=1, gateway=1, token=1, edge=1),
    Caches(replica=1, gateway=1, token=1, edge=2),
]
SLOW_IDENTITY = Caches(replica=3, gateway=2, token=1)


def policy(caches: Caches) -> Policy:
    """An environment whose settings tell the truth about that world."""

    def ticks(count: int) -> timedelta:
        return timedelta(seconds=count)

    return Policy(
        rotate_every=ticks(10_000),
        max_key_age=ticks(20_000),
        token_lifetime=ticks(caches.token),
        clock_skew=ticks(0),
        cleanup_after=ticks(1),
        cache_time=ticks(caches.gateway),
        key_cache=ticks(caches.replica),
        max_age_limit=ticks(caches.edge or 9),
        shared_cache=caches.edge is not None,
    )


def without(rules: Policy, **settings: int) -> Policy:
    """The same with settings that do not tell the truth."""
    return replace(rules, **{name: timedelta(seconds=count) for name, count in settings.items()})


def ticks(total: Sum) -> int:
    """The ticks from a sum's start to its instant."""
    return int((total.instant - total.start).total_seconds())


def waits(promoting: Policy, cleaning: Policy) -> Rules:
    return Rules(promote=ticks(promoting.may_promote(START)), clean_up=ticks(cleaning.may_clean_up(START)))


def named(caches: Caches) -> str:
    edge = f", shared {caches.edge}" if caches.edge is not None else ""
    return f"identity {caches.replica}, gateway {caches.gateway}{edge}, token {caches.token}, {caches.replicas}x{caches.gateways}"


def story(found: Explored, rule: str) -> str:
    assert found.broken is not None, f"{rule}: {found.states} states, and nothing was found wrong with it"
    return f"{rule}:\n  {found.story}"


every_world = pytest.mark.parametrize("caches", WORLDS, ids=named)


@every_world
def test_i11_the_waiting_rules_hold(caches: Caches) -> None:
    """Publish, wait, promote, wait, clean up, or roll back at any moment and clean up: no live token is rejected, in any order of refreshes."""
    rules = policy(caches)
    found = explore(caches, replace(waits(rules, rules), roll_back=True))
    assert found.broken is None, found.story


@every_world
def test_the_canary_may_shorten_the_wait_to_the_identity_services_cache(caches: Caches) -> None:
    """Once every source serves the key, a gateway that is seen to know it does not unlearn it."""
    rules = policy(caches)
    found = explore(caches, replace(waits(rules, rules), promote=None, canary=ticks(rules.seen_everywhere(START))))
    assert found.broken is None, found.story


@every_world
def test_i12_what_is_proven_after_the_identity_services_cache_stays_contained(caches: Caches) -> None:
    """A refresh and a proof, both after disabled + key cache (+ shared cache): the compromised key never comes back."""
    found = explore(caches, Rules(refresh=ticks(policy(caches).seen_everywhere(START))))
    assert found.broken is None, found.story


@every_world
def test_no_tick_of_the_wait_is_too_many(caches: Caches) -> None:
    """One tick less before the promotion, and a gateway refuses the new key's first token."""
    rules = waits(policy(caches), policy(caches))
    found = explore(caches, replace(rules, promote=(rules.promote or 0) - 1))
    assert found.broken == "a live token of the new key is rejected (I11)", found.states


@every_world
def test_no_tick_of_the_retention_is_too_many(caches: Caches) -> None:
    """One tick less before the cleanup, and a gateway refuses the old key's last token."""
    rules = waits(policy(caches), policy(caches))
    found = explore(caches, replace(rules, clean_up=(rules.clean_up or 0) - 1))
    assert found.broken == "a live token of the old key is rejected (I11)", found.states


class TestPlanted:
    """Wrong rules that look right: each is found out, by a shortest story."""

    def test_a_wait_without_the_identity_services_cache(self) -> None:
        """The runbook's ten minutes: a gateway refetches from a replica that does not know the new key yet."""
        caches = Caches(replica=2, gateway=2, token=1)
        found = explore(caches, waits(without(policy(caches), key_cache=0), policy(caches)))
        told = story(found, "wait = gateway cache")
        assert found.broken == "a live token of the new key is rejected (I11)", told
        assert [line.partition(":")[0].strip() for line in told.splitlines()] == [
            "wait = gateway cache",
            "publish",
            "a tick passes",
            "promote",
            "a live token of the new key is rejected (I11)",
        ], told

    def test_a_wait_without_the_shared_cache(self) -> None:
        """A shared cache in front of the JWKS that the settings do not mention serves the old set too long."""
        caches = Caches(replica=1, gateway=1, token=1, edge=2)
        found = explore(caches, waits(replace(policy(caches), shared_cache=False), policy(caches)))
        assert found.broken == "a live token of the new key is rejected (I11)", story(found, "wait without the JWKS max-age")

    def test_a_retention_without_the_identity_services_cache(self) -> None:
        """A replica that has not heard of the promotion signs with the old key until its cache is over."""
        caches = Caches(replica=2, gateway=2, token=1)
        found = explore(caches, waits(policy(caches), without(policy(caches), key_cache=0)))
        told = story(found, "retention = token lifetime")
        assert found.broken == "a live token of the old key is rejected (I11)", told
        assert told.splitlines()[-2].strip().startswith("clean up:"), told

    def test_a_canary_at_once(self) -> None:
        """A gateway that was just shown to know the key unlearns it from a replica that does not know it yet."""
        caches = Caches(replica=2, gateway=2, token=1)
        found = explore(caches, replace(waits(policy(caches), policy(caches)), promote=None, canary=0))
        told = story(found, "canary at once")
        assert found.broken == "a live token of the new key is rejected (I11)", told
        assert "gateways old+new" in told.splitlines()[-3], told

    def test_an_emergency_refresh_at_once(self) -> None:
        """A gateway that was refreshed and proven learns the compromised key again, from a replica that still serves it."""
        found = explore(SLOW_IDENTITY, Rules(refresh=0))
        told = story(found, "refresh at once")
        assert found.broken == "the compromised key came back after contained (I12)", told
        assert [line.partition(":")[0].strip() for line in told.splitlines()[1:]] == [
            "publish",
            "promote and disable",
            "refresh",
            "a tick passes",
            "the compromised key came back after contained (I12)",
        ], told

    def test_the_same_emergency_after_the_identity_services_cache_holds(self) -> None:
        """It is the moment of the refresh that counts: the same world holds when it comes after the key cache."""
        found = explore(SLOW_IDENTITY, Rules(refresh=ticks(policy(SLOW_IDENTITY).seen_everywhere(START))))
        assert found.broken is None, found.story
