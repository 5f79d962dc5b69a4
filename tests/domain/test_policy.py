"""The rules of waiting: which terms a deadline has, which of setting and sight counts, and the inverse questions."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from keyrotation.domain.errors import Refused
from keyrotation.domain.policy import Policy, Seen, Sum, show, show_instant
from tests.domain.made import DAY, HOUR, MINUTE, NOW, SECOND, TICK, a_policy

ZERO = timedelta(0)
UNITS = {"d": DAY, "h": HOUR, "m": MINUTE, "s": SECOND}

durations = st.timedeltas(min_value=ZERO, max_value=90 * DAY)
positive = st.timedeltas(min_value=TICK, max_value=90 * DAY)
instants = st.datetimes(min_value=datetime(2020, 1, 1), max_value=datetime(2060, 1, 1), timezones=st.just(UTC))
sights = st.builds(Seen, st.none() | durations, st.none() | durations)
policies = st.builds(
    Policy,
    rotate_every=positive,
    max_key_age=positive,
    token_lifetime=positive,
    clock_skew=durations,
    cleanup_after=positive,
    cache_time=positive,
    key_cache=durations,
    max_age_limit=st.just(90 * DAY),
    shared_cache=st.booleans(),
    lease=positive,
)


class TestSeenEverywhere:
    """published + identity service's key cache (+ the JWKS max-age, where a cache is shared)."""

    @pytest.mark.parametrize(
        ("sentence", "settings", "seen", "expected"),
        [
            ("a key cache of a minute is waited for", {}, Seen(), MINUTE),
            ("without any cache, a key is served at once", {"key_cache": ZERO}, Seen(), ZERO),
            ("a max-age that no shared cache heeds does not count", {}, Seen(jwks_max_age=20 * MINUTE), MINUTE),
            ("a shared cache's max-age counts as it is served", {"shared_cache": True}, Seen(jwks_max_age=20 * MINUTE), 21 * MINUTE),
            ("a max-age of nought adds nothing", {"shared_cache": True}, Seen(jwks_max_age=ZERO), MINUTE),
            ("a shared cache whose max-age nobody has seen counts as the limit", {"shared_cache": True}, Seen(), 61 * MINUTE),
            ("a max-age at the limit is allowed", {"shared_cache": True}, Seen(jwks_max_age=HOUR), 61 * MINUTE),
        ],
    )
    def test_stories(self, sentence: str, settings: dict[str, Any], seen: Seen, expected: timedelta) -> None:
        """Each story ends at the instant that its sentence says."""
        assert a_policy(**settings).seen_everywhere(NOW, seen).instant == NOW + expected, sentence

    def test_a_max_age_beyond_the_limit_is_refused_with_both_figures(self) -> None:
        """One microsecond over the limit, the run is refused and told what to do."""
        with pytest.raises(Refused, match=r"max-age 2h.*identity\.max_age_limit 1h: lower the max-age"):
            a_policy(shared_cache=True).seen_everywhere(NOW, Seen(jwks_max_age=2 * HOUR))
        with pytest.raises(Refused):
            a_policy(shared_cache=True).may_promote(NOW, Seen(jwks_max_age=HOUR + TICK))

    def test_a_long_max_age_does_not_matter_where_no_cache_is_shared(self) -> None:
        """Without a shared cache, nobody in between heeds it."""
        assert a_policy().may_promote(NOW, Seen(jwks_max_age=9 * DAY)) == a_policy().may_promote(NOW)


class TestMayPromote:
    """seen everywhere + gateway cache time + clock skew."""

    def test_it_is_the_sum_of_four(self) -> None:
        """Key cache, max-age, gateway cache and skew, each under its name."""
        total = a_policy(shared_cache=True).may_promote(NOW, Seen(jwks_max_age=5 * MINUTE))
        assert total.terms == (
            ("identity service's key cache", MINUTE),
            ("JWKS max-age", 5 * MINUTE),
            ("gateway cache", 15 * MINUTE),
            ("clock skew", 30 * SECOND),
        )
        assert total.instant == NOW + 21 * MINUTE + 30 * SECOND

    @given(policies, instants, sights)
    def test_no_gateway_is_given_less_than_its_cache_after_the_last_source(self, policy: Policy, published: datetime, seen: Seen) -> None:
        """Between seen everywhere and the promotion lie the gateways' cache time and the skew, whatever else is set."""
        ahead, deadline = policy.seen_everywhere(published, seen), policy.may_promote(published, seen)
        assert deadline.instant - ahead.instant == policy.cache_time + policy.clock_skew

    @given(policies, instants, sights, durations)
    def test_a_later_publication_is_waited_for_as_long(self, policy: Policy, published: datetime, seen: Seen, later: timedelta) -> None:
        """The wait is a duration: it counts from the publication, and from nothing else (a key that starts anew waits anew)."""
        assert policy.may_promote(published + later, seen).instant - policy.may_promote(published, seen).instant == later

    @given(policies, instants, st.sampled_from(["key_cache", "cache_time", "clock_skew"]), positive)
    def test_no_setting_shortens_the_wait_by_growing(self, policy: Policy, published: datetime, name: str, more: timedelta) -> None:
        """A longer cache or skew makes the deadline later, by just as much."""
        slower = replace(policy, **{name: getattr(policy, name) + more})
        assert slower.may_promote(published).instant - policy.may_promote(published).instant == more


class TestMayCleanUp:
    """demoted + max(cleanup_after, key cache + token lifetime + clock skew)."""

    @pytest.mark.parametrize(
        ("sentence", "settings", "seen", "expected"),
        [
            ("48 hours are enough for tokens of an hour", {}, Seen(), 48 * HOUR),
            ("a live token that lives shorter changes nothing", {}, Seen(token_lifetime=MINUTE), 48 * HOUR),
            ("tokens that outlive cleanup_after are waited for", {"token_lifetime": 72 * HOUR}, Seen(), 72 * HOUR + 90 * SECOND),
            ("a live token that lives longer than configured is waited for", {}, Seen(token_lifetime=72 * HOUR), 72 * HOUR + 90 * SECOND),
            ("of setting and sight the longer counts", {"token_lifetime": 72 * HOUR}, Seen(token_lifetime=HOUR), 72 * HOUR + 90 * SECOND),
            ("a retention of just cleanup_after is cleanup_after", {"token_lifetime": 48 * HOUR - 90 * SECOND}, Seen(), 48 * HOUR),
            ("one microsecond more is the sum", {"token_lifetime": 48 * HOUR - 90 * SECOND + TICK}, Seen(), 48 * HOUR + TICK),
            ("the gateways' cache is no part of it: their tokens are dead by then", {"cache_time": 90 * HOUR}, Seen(), 48 * HOUR),
        ],
    )
    def test_stories(self, sentence: str, settings: dict[str, Any], seen: Seen, expected: timedelta) -> None:
        """Each story ends at the instant that its sentence says."""
        assert a_policy(**settings).may_clean_up(NOW, seen).instant == NOW + expected, sentence

    @given(policies, instants, sights)
    def test_the_last_token_is_dead_by_then(self, policy: Policy, demoted: datetime, seen: Seen) -> None:
        """A replica signs until its cache is over; that token's end, and a verifier's skew, lie before the cleanup."""
        last_signed = demoted + policy.key_cache
        longest = max(policy.token_lifetime, seen.token_lifetime or ZERO)
        assert policy.may_clean_up(demoted, seen).instant >= last_signed + longest + policy.clock_skew
        assert policy.may_clean_up(demoted, seen).instant >= demoted + policy.cleanup_after


class TestStricter:
    """What is seen live never shortens a wait."""

    @given(policies, instants, sights)
    def test_sight_never_makes_the_cleanup_earlier(self, policy: Policy, demoted: datetime, seen: Seen) -> None:
        """Whatever token was seen, the cleanup is not before the settings' own."""
        assert policy.may_clean_up(demoted, seen).instant >= policy.may_clean_up(demoted).instant

    @given(policies, instants, durations)
    def test_an_unseen_max_age_is_the_longest_allowed(self, policy: Policy, published: datetime, max_age: timedelta) -> None:
        """Who has not seen the header waits at least as long as who has."""
        assert policy.may_promote(published).instant >= policy.may_promote(published, Seen(jwks_max_age=max_age)).instant


class TestExplain:
    """The message shows the sum."""

    def test_a_promotion(self) -> None:
        """Instant, start, and each term that is not nought."""
        assert a_policy(key_cache=ZERO).may_promote(NOW).explain() == (
            "2026-01-06 03:15:30 UTC = published 2026-01-06 03:00:00 UTC + gateway cache 15m + clock skew 30s"
        )

    def test_a_cleanup_that_was_raised(self) -> None:
        """The terms of the sum are shown, where it is longer than cleanup_after."""
        assert a_policy(cleanup_after=HOUR).may_clean_up(NOW).explain() == (
            "2026-01-06 04:01:30 UTC = demoted 2026-01-06 03:00:00 UTC + identity service's key cache 1m + token lifetime 1h + clock skew 30s"
        )

    def test_a_cleanup_by_the_setting(self) -> None:
        """cleanup_after alone, where it is the longer one."""
        assert a_policy().may_clean_up(NOW).explain() == "2026-01-08 03:00:00 UTC = demoted 2026-01-06 03:00:00 UTC + cleanup_after 2d"

    @given(policies, instants, sights)
    def test_its_terms_add_up(self, policy: Policy, start: datetime, seen: Seen) -> None:
        """Whoever adds the shown terms to the shown start gets the shown instant, but for half a second of rounding each, and the seconds cut off."""
        for total in (policy.seen_everywhere(start, seen), policy.may_promote(start, seen), policy.may_clean_up(start, seen)):
            said = total.explain()
            instant, begun = (datetime.fromisoformat(f"{told}+00:00") for told in re.findall(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC", said))
            shown = re.findall(r" \+ [^+]*?((?: [\d.e-]+[dhms])+)(?= \+ |$)", said)
            added = sum((_duration(each) for each in shown), ZERO)
            assert len(shown) == sum(1 for _, term in total.terms if term), said
            assert abs((instant - begun) - added) <= SECOND + len(shown) * SECOND / 2, said

    @given(st.lists(st.tuples(st.sampled_from(["a cache", "a life"]), durations), max_size=6), instants)
    def test_a_sum_is_its_terms(self, terms: list[tuple[str, timedelta]], start: datetime) -> None:
        """The instant is the start plus each term, to the microsecond."""
        total = Sum("start", start, tuple(terms))
        assert total.instant == start + total.duration == start + sum((term for _, term in terms), ZERO)


def _duration(text: str) -> timedelta:
    return sum((float(part[:-1]) * UNITS[part[-1]] for part in text.split()), ZERO)


class TestShow:
    """Durations and instants as people write them."""

    @pytest.mark.parametrize(
        ("duration", "expected"),
        [
            (ZERO, "0s"),
            (0.5 * SECOND, "0.5s"),
            (9 * SECOND, "9s"),
            (12.4 * SECOND, "12s"),
            (MINUTE, "1m"),
            (90 * SECOND, "1m 30s"),
            (15 * MINUTE, "15m"),
            (HOUR, "1h"),
            (48 * HOUR, "2d"),
            (DAY + HOUR + MINUTE, "1d 1h"),
            (-90 * SECOND, "-1m 30s"),
            (60 * MINUTE - TICK, "1h"),
        ],
    )
    def test_durations(self, duration: timedelta, expected: str) -> None:
        """At most two units, the largest ones."""
        assert show(duration) == expected

    @given(st.timedeltas(min_value=-3650 * DAY, max_value=3650 * DAY))
    def test_all_units_together_are_the_duration(self, duration: timedelta) -> None:
        """With all its units shown, no more than half a second is lost."""
        text = show(duration, units=4)
        assert abs(_duration(text.removeprefix("-")) - abs(duration)) <= SECOND / 2
        assert text.startswith("-") == (duration < ZERO)

    def test_an_instant_is_shown_in_utc(self) -> None:
        """In UTC, to the second."""
        assert show_instant(NOW) == "2026-01-06 03:00:00 UTC"


class TestDue:
    """A slot rotates a key that is at least half an interval old."""

    @pytest.mark.parametrize(
        ("policy", "age"),
        [(a_policy(rotate_every=7 * DAY), 3.5 * DAY), (a_policy(rotate_every=14 * DAY), 7 * DAY), (a_policy(rotate_every=30 * DAY), 15 * DAY)],
    )
    def test_half_an_interval(self, policy: Policy, age: timedelta) -> None:
        """Weekly, every two weeks, monthly."""
        assert policy.due_after == age
        assert policy.due_at(NOW) == NOW + age


class TestInverse:
    """The inverse questions are asked and answered with the same arithmetic."""

    @given(policies, instants)
    def test_the_longest_token_is_just_short_enough(self, policy: Policy, demoted: datetime) -> None:
        """With tokens of that life, cleanup_after suffices; with tokens a microsecond longer, it is raised."""
        longest = policy.longest_token()
        assume(longest > ZERO)
        by_setting = (("cleanup_after", policy.cleanup_after),)
        assert replace(policy, token_lifetime=longest).may_clean_up(demoted).terms == by_setting
        assert replace(policy, token_lifetime=longest + TICK).may_clean_up(demoted).terms != by_setting

    @given(policies)
    def test_no_token_is_short_enough_where_the_caches_alone_take_longer(self, policy: Policy) -> None:
        """The answer is nought, and never negative, where key cache and skew alone exceed cleanup_after."""
        assert (policy.longest_token() == ZERO) == (policy.cleanup_after <= policy.key_cache + policy.clock_skew)

    @given(policies, instants)
    def test_the_shortest_interval_holds_both_waits_and_a_lease(self, policy: Policy, published: datetime) -> None:
        """Publish, wait for the gateways, promote, wait until the identity service has heard; and a run may die once in between."""
        promoted = policy.may_promote(published).instant
        assert published + policy.shortest_interval() == promoted + policy.key_cache + policy.lease


class TestClocks:
    """How far apart two clocks may be."""

    def test_the_tolerance_is_skew_and_resolution_and_round_trip(self) -> None:
        """HTTP's Date has whole seconds, and travels."""
        assert a_policy().clock_tolerance(200 * TICK) == 31 * SECOND + 200 * TICK
