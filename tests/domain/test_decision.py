"""What a run does with what it finds: every branch with its reason word, the instants around each deadline, and twenty years of every schedule."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from keyrotation import settings
from keyrotation.domain.decision import Action, Cleanup, Facts, Request, decide_bootstrap, decide_rotation, may_clean_up
from keyrotation.domain.errors import Refused
from keyrotation.domain.keys import Key
from keyrotation.domain.policy import Policy, Seen
from tests.domain.made import DAY, HOUR, MINUTE, NOW, SECOND, TICK, a_hold, a_key, a_policy, a_rotation, facts

PERSON, SCHEDULE = Request("ada", "my-run"), Request("schedule", "my-run", only_if_due=True)
WEEKLY = a_policy(rotate_every=7 * DAY)


def aged(age: timedelta) -> Key:
    return a_key(promoted_at=NOW - age)


class TestRotation:
    """decide_rotation."""

    @pytest.mark.parametrize(
        ("sentence", "found", "request_", "action", "reason"),
        [
            ("a key of eight days is due every week", facts(a_key()), SCHEDULE, Action.ROTATE, "due"),
            ("a key of an hour is not", facts(aged(HOUR)), SCHEDULE, Action.NOTHING, "not due"),
            ("a person's word is enough", facts(aged(HOUR)), PERSON, Action.ROTATE, "asked for"),
            ("a key without the instant of its promotion counts from when it was made", facts(a_key(promoted_at=None)), SCHEDULE, Action.ROTATE, "due"),
            ("on hold, a schedule's run does nothing", facts(a_key(), hold=a_hold()), SCHEDULE, Action.ON_HOLD, "on hold"),
            ("on hold, a person's run does nothing either", facts(a_key(), hold=a_hold()), PERSON, Action.ON_HOLD, "on hold"),
            (
                "a hold comes before work that nobody does any more",
                facts(a_key(), work=a_rotation(lease_until=NOW), hold=a_hold()),
                PERSON,
                Action.ON_HOLD,
                "on hold",
            ),
            ("F40: an emergency is left alone", facts(a_key(), work=a_rotation("emergency")), SCHEDULE, Action.NOTHING, "emergency"),
            ("F40: by a person's run, too", facts(a_key(), work=a_rotation("emergency")), PERSON, Action.NOTHING, "emergency"),
            (
                "an emergency is never taken over by a rotation, also if its run is dead",
                facts(a_key(), work=a_rotation("emergency", lease_until=NOW - HOUR)),
                PERSON,
                Action.NOTHING,
                "emergency",
            ),
            ("nor if it bears our own run", facts(a_key(), work=a_rotation("emergency", flow_run_id="my-run")), PERSON, Action.NOTHING, "emergency"),
            ("an emergency comes before a hold", facts(a_key(), work=a_rotation("emergency"), hold=a_hold()), SCHEDULE, Action.NOTHING, "emergency"),
            ("F38: a schedule's run leaves live work politely", facts(a_key(), work=a_rotation()), SCHEDULE, Action.NOTHING, "busy"),
            ("F39: a person's run waits for it", facts(a_key(), work=a_rotation()), PERSON, Action.WAIT, "busy"),
            ("F1: work of a dead run is finished", facts(a_key(), work=a_rotation(lease_until=NOW - SECOND)), SCHEDULE, Action.RESUME, "unfinished"),
            ("F1: also where nothing would be due", facts(aged(HOUR), work=a_rotation(lease_until=NOW - SECOND)), SCHEDULE, Action.RESUME, "unfinished"),
            (
                "Prefect's second try of our own run goes on at once",
                facts(a_key(), work=a_rotation(flow_run_id="my-run")),
                SCHEDULE,
                Action.RESUME,
                "unfinished",
            ),
            ("work without a run's name is nobody's own", facts(a_key(), work=a_rotation(flow_run_id=None)), Request("ada", None), Action.WAIT, "busy"),
        ],
    )
    def test_stories(self, sentence: str, found: Facts, request_: Request, action: Action, reason: str) -> None:
        """Each story ends with an action and its reason word."""
        decision = decide_rotation(found, request_, WEEKLY)
        assert (decision.action, decision.reason) == (action, reason), sentence

    @pytest.mark.parametrize(("after", "action"), [(-TICK, Action.NOTHING), (0 * TICK, Action.ROTATE), (TICK, Action.ROTATE)])
    def test_the_instant_at_which_a_key_is_due(self, after: timedelta, action: Action) -> None:
        """A microsecond before half an interval it is not due, at it and after it is."""
        assert decide_rotation(facts(aged(WEEKLY.due_after + after)), SCHEDULE, WEEKLY).action is action

    @pytest.mark.parametrize(("after", "action"), [(-TICK, Action.WAIT), (0 * TICK, Action.RESUME), (TICK, Action.RESUME)])
    def test_the_instant_at_which_a_run_is_dead(self, after: timedelta, action: Action) -> None:
        """A lease lasts up to its end and not at it, as in the statement that takes over."""
        assert decide_rotation(facts(a_key(), work=a_rotation(lease_until=NOW - after)), PERSON, WEEKLY).action is action

    def test_without_a_key_it_says_bootstrap(self) -> None:
        """The runbook's "no keys available" is refused with the way on."""
        with pytest.raises(Refused, match="bootstrap-signing-keys"):
            decide_rotation(facts(a_key("n", "next")), PERSON, WEEKLY)

    @pytest.mark.parametrize(
        ("found", "request_", "message"),
        [
            (facts(aged(DAY)), SCHEDULE, "not due: key old is 1d old; a scheduled run rotates it from 2026-01-08 15:00:00 UTC on (half of rotate_every 7d)"),
            (facts(a_key()), SCHEDULE, "due: key old is 8d old, rotated every 7d"),
            (facts(a_key()), PERSON, "rotating as asked: key old is 8d old"),
            (facts(a_key(), hold=a_hold()), SCHEDULE, "on hold since 2026-01-05 03:00:00 UTC by ada: audit week. To lift it: keyrotation release ENVIRONMENT"),
            (facts(a_key(), work=a_rotation()), PERSON, "rotation 7, opened 2026-01-06 02:59:00 UTC by schedule, is under way: waiting for its end"),
            (
                facts(a_key(), work=a_rotation(lease_until=NOW)),
                PERSON,
                "finishing rotation 7, opened 2026-01-06 02:59:00 UTC by schedule: the run that worked on it is gone",
            ),
        ],
    )
    def test_the_message_says_who_when_and_what_next(self, found: Facts, request_: Request, message: str) -> None:
        """The sentence that ledger, log, Slack and run state show."""
        assert decide_rotation(found, request_, WEEKLY).message == message

    @given(st.timedeltas(min_value=timedelta(0), max_value=60 * DAY), st.booleans())
    def test_every_decision_has_a_reason(self, age: timedelta, only_if_due: bool) -> None:
        """Nothing to do is a decision, too: action, word and sentence are there at any age."""
        decision = decide_rotation(facts(aged(age)), Request("x", only_if_due=only_if_due), WEEKLY)
        assert decision.reason
        assert "key old" in decision.message
        assert (decision.action is Action.ROTATE) == (not only_if_due or age >= WEEKLY.due_after)


class TestBootstrap:
    """decide_bootstrap."""

    @pytest.mark.parametrize(
        ("sentence", "found", "action", "reason"),
        [
            ("an environment without keys gets its first", facts(), Action.BOOTSTRAP, "no key"),
            ("a next key alone signs nothing: bootstrap", facts(a_key("n", "next")), Action.BOOTSTRAP, "no key"),
            ("all keys disabled: bootstrap", facts(a_key("gone", "disabled")), Action.BOOTSTRAP, "no key"),
            ("where a key is current, nothing is done", facts(a_key()), Action.NOTHING, "has a key"),
            ("also while a rotation is open", facts(a_key(), work=a_rotation()), Action.NOTHING, "has a key"),
            ("two at once: the second finds the first at work", facts(work=a_rotation("bootstrap")), Action.WAIT, "busy"),
            ("F1: one that died before its promotion is finished", facts(work=a_rotation("bootstrap", lease_until=NOW)), Action.RESUME, "unfinished"),
            (
                "F1: one that died after its promotion is finished, too",
                facts(a_key(), work=a_rotation("bootstrap", lease_until=NOW)),
                Action.RESUME,
                "unfinished",
            ),
            ("on hold, no key is made", facts(hold=a_hold()), Action.ON_HOLD, "on hold"),
            ("an emergency is left alone", facts(work=a_rotation("emergency")), Action.NOTHING, "emergency"),
        ],
    )
    def test_stories(self, sentence: str, found: Facts, action: Action, reason: str) -> None:
        """Each story ends with an action and its reason word."""
        decision = decide_bootstrap(found, PERSON)
        assert (decision.action, decision.reason) == (action, reason), sentence

    def test_it_names_the_key_that_is_there(self) -> None:
        """Nothing to do, because of which key, since when."""
        assert decide_bootstrap(facts(a_key()), PERSON).message == "nothing to do: key old is current since 2025-12-29 03:00:00 UTC"


DEMOTED = NOW - 3 * DAY


def clean(
    key: Key | None = None, found: Facts | None = None, policy: Policy | None = None, seen: Seen | None = None, made_for: datetime | None = None
) -> Cleanup:
    key = key or a_key("old", "previous")
    return may_clean_up(found or facts(key), key, policy or a_policy(), seen or Seen(), made_for)


class TestCleanup:
    """may_clean_up."""

    @pytest.mark.parametrize(
        ("sentence", "cleanup", "reason"),
        [
            ("three days after its demotion, a key goes", lambda: clean(), "due"),
            ("what is disabled already is success", lambda: clean(a_key("old", "disabled")), "already done"),
            ("F52: a key that was rolled back to is current, and stays", lambda: clean(a_key("old")), "in use"),
            ("a next key is not cleaned up", lambda: clean(a_key("old", "next")), "in use"),
            ("F53: a cleanup of an earlier demotion is not this one's", lambda: clean(made_for=DEMOTED - TICK), "another demotion"),
            ("a cleanup of this demotion is", lambda: clean(made_for=DEMOTED), "due"),
            ("on hold, nothing is cleaned up", lambda: clean(found=facts(a_key("old", "previous"), a_key("new"), hold=a_hold())), "on hold"),
            ("a key on hold is kept", lambda: clean(a_key("old", "previous", cleanup_hold="unproven")), "on hold"),
            (
                "F40: while an emergency is open, nothing is cleaned up",
                lambda: clean(found=facts(a_key("old", "previous"), a_key("new"), work=a_rotation("emergency"))),
                "emergency",
            ),
            ("an open rotation is no obstacle", lambda: clean(found=facts(a_key("old", "previous"), a_key("new"), work=a_rotation())), "due"),
            (
                "F76: a demotion that nobody has confirmed has no deadline yet",
                lambda: clean(a_key("old", "previous", demoted_seen_at=None, retain_until=None)),
                "too early",
            ),
            ("F54: a live token that lives longer than configured stops it", lambda: clean(seen=Seen(token_lifetime=HOUR + TICK)), "tokens live longer"),
            ("a live token of just the configured life does not", lambda: clean(seen=Seen(token_lifetime=HOUR)), "due"),
            ("the database's own retention counts where it is later", lambda: clean(a_key("old", "previous", retain_until=NOW + SECOND)), "too early"),
            ("tokens of a week are waited for, whatever cleanup_after says", lambda: clean(policy=a_policy(token_lifetime=7 * DAY)), "too early"),
        ],
    )
    def test_stories(self, sentence: str, cleanup: Callable[[], Cleanup], reason: str) -> None:
        """Each story ends with a reason word; only `due` allows it."""
        told = cleanup()
        assert (told.reason, told.allowed) == (reason, reason == "due"), sentence

    @pytest.mark.parametrize(("after", "reason"), [(-TICK, "too early"), (0 * TICK, "due"), (TICK, "due")])
    def test_the_instant_at_which_a_key_may_go(self, after: timedelta, reason: str) -> None:
        """A microsecond before the sum it is too early, at it and after it is not."""
        demoted = NOW - 48 * HOUR - after
        assert clean(a_key("old", "previous", demoted_at=demoted, demoted_seen_at=demoted, retain_until=None)).reason == reason

    @pytest.mark.parametrize(("after", "reason"), [(-TICK, "too early"), (0 * TICK, "due"), (TICK, "due")])
    def test_the_instant_of_the_databases_retention(self, after: timedelta, reason: str) -> None:
        """The same around retain_until."""
        assert clean(a_key("old", "previous", retain_until=NOW - after)).reason == reason

    def test_time_counts_from_when_the_demotion_was_seen(self) -> None:
        """F76: a transaction that was frozen for an hour before its commit has demoted an hour later than its own clock says."""
        demoted = NOW - 48 * HOUR - MINUTE
        assert clean(a_key("old", "previous", demoted_at=demoted, demoted_seen_at=demoted, retain_until=None)).allowed
        assert not clean(a_key("old", "previous", demoted_at=demoted, demoted_seen_at=demoted + HOUR, retain_until=None)).allowed

    def test_the_message_shows_the_sum(self) -> None:
        """Until when, and how that came about."""
        told = clean(a_key("old", "previous", demoted_seen_at=NOW - DAY, retain_until=None))
        assert told.message == (
            "key old is not cleaned up before 2026-01-07 03:00:00 UTC: 2026-01-07 03:00:00 UTC = demoted 2026-01-05 03:00:00 UTC + cleanup_after 2d"
        )
        assert told.until is not None
        assert told.until.instant == NOW + DAY

    @given(
        st.timedeltas(min_value=timedelta(0), max_value=20 * DAY),
        st.timedeltas(min_value=SECOND, max_value=10 * DAY),
        st.none() | st.timedeltas(min_value=SECOND, max_value=10 * DAY),
    )
    def test_i07_no_key_goes_before_its_last_token_is_dead(self, since: timedelta, lifetime: timedelta, seen: timedelta | None) -> None:
        """Whatever the figures: where it is allowed, key cache, token life and skew have passed since the demotion was seen."""
        policy = a_policy(token_lifetime=lifetime)
        told = clean(a_key("old", "previous", demoted_seen_at=NOW - since, retain_until=None), policy=policy, seen=Seen(token_lifetime=seen))
        if told.allowed:
            assert since >= policy.key_cache + max(lifetime, seen or lifetime) + policy.clock_skew
            assert since >= policy.cleanup_after


# ------------------------------------------------------------------------------------------------ twenty years of each schedule (I21, F61, F62)

BEGIN, END = datetime(2026, 1, 1, tzinfo=UTC), datetime(2046, 1, 1, tzinfo=UTC)
TAKES = 25 * MINUTE  # from a run's look to its promotion


def every(step: timedelta, first: datetime) -> Iterator[datetime]:
    while first < END:
        yield first
        first += step


def monthly() -> list[datetime]:
    return [datetime(year, month, 1, 3, tzinfo=UTC) for year in range(2026, 2046) for month in range(1, 13)]


def every_two_weeks() -> list[datetime]:
    return list(every(14 * DAY, datetime(2026, 1, 5, 3, tzinfo=UTC)))


def weekly() -> list[datetime]:
    return list(every(7 * DAY, datetime(2026, 1, 6, 3, tzinfo=UTC)))


def weekly_by_the_sun() -> list[datetime]:
    """As if somebody had set the schedule's timezone to one with summer time: F62."""
    return [slot.replace(tzinfo=None).replace(tzinfo=ZoneInfo("Europe/Berlin")).astimezone(UTC) for slot in weekly()]


SCHEDULES = {
    "development": (monthly, {"cron": "0 3 1 * *"}),
    "staging": (every_two_weeks, {"rrule": "DTSTART:20260105T030000\nRRULE:FREQ=WEEKLY;INTERVAL=2;BYDAY=MO"}),
    "production": (weekly, {"cron": "0 3 * * 2"}),
}
every_schedule = pytest.mark.parametrize(
    ("environment", "slots"),
    [*((name, slots()) for name, (slots, _) in SCHEDULES.items()), ("production", weekly_by_the_sun())],
    ids=[*SCHEDULES, "production with summer time"],
)


@pytest.fixture
def policy(environment: str, monkeypatch: pytest.MonkeyPatch) -> Policy:
    """The policy in that environment's own file."""
    monkeypatch.delenv(settings.ENVIRONMENTS, raising=False)
    return settings.load(environment).to_policy()


def rotations(policy: Policy, runs: Iterable[datetime], first: datetime, takes: timedelta = TAKES) -> list[datetime]:
    """When a key was promoted, if a scheduled run looks at each of those instants (one after the other, as the database has them)."""
    promoted, free_at = [first], first
    for look in sorted(runs):
        now = max(look, free_at)
        decision = decide_rotation(facts(a_key(promoted_at=promoted[-1]), now=now), SCHEDULE, policy)
        if decision.action is Action.ROTATE:
            promoted.append(now + takes)
            free_at = now + takes
    return promoted[1:]


def by_slot(slots: Sequence[datetime], promotions: Iterable[datetime]) -> list[int]:
    """How many promotions fell between each slot and the next."""
    ends = [*slots[1:], datetime.max.replace(tzinfo=UTC)]
    counts, at = [0] * len(slots), 0
    for promoted in promotions:
        while promoted >= ends[at]:
            at += 1
        counts[at] += promoted >= slots[at]
    return counts


def latest(slots: Sequence[datetime], policy: Policy) -> timedelta:
    """How late a run may be for the next slot to rotate all the same."""
    return min(later - slot for slot, later in pairwise(slots)) - policy.due_after - TAKES


class TestSchedules:
    """I21: each slot rotates once; an outage that swallowed several, once; a check on a fresh key does nothing."""

    def test_the_slots_are_those_of_prefect_yaml(self) -> None:
        """What is simulated is what is deployed, in UTC, and asks whether a key is due."""
        deployed = yaml.safe_load((Path(__file__).resolve().parents[2] / "prefect.yaml").read_text())["deployments"]
        found = {each["name"]: each["schedules"] for each in deployed if each["entrypoint"].startswith("flows/rotate.py")}
        assert {name: len(schedules) for name, schedules in found.items()} == dict.fromkeys(SCHEDULES, 1)
        for name, (_, expected) in SCHEDULES.items():
            assert {**found[name][0], **expected} == found[name][0]
            assert (found[name][0]["timezone"], found[name][0]["parameters"]) == ("Etc/UTC", {"only_if_due": True})

    def test_the_slots_are_what_they_say(self) -> None:
        """240 months, 522 fortnights of Mondays, 1,043 Tuesdays, and in summer an hour earlier by UTC."""
        assert (len(monthly()), len(every_two_weeks()), len(weekly())) == (240, 522, 1043)
        assert {slot.isoweekday() for slot in every_two_weeks()} == {1}
        assert {slot.isoweekday() for slot in weekly()} == {2}
        assert {slot.hour for slot in weekly_by_the_sun()} == {1, 2}

    @every_schedule
    def test_i21_each_slot_rotates_once(self, slots: list[datetime], policy: Policy) -> None:
        """On time, every slot of twenty years: one rotation each, leap days and all."""
        assert by_slot(slots, rotations(policy, slots, slots[0] - policy.rotate_every)) == [1] * len(slots)

    @every_schedule
    @pytest.mark.parametrize("seed", range(3))
    def test_f62_late_runs_do_not_shift_the_schedule(self, slots: list[datetime], policy: Policy, seed: int) -> None:
        """Each run late by chance, up to half an interval, sometimes twice for one slot: still one rotation each."""
        chance = random.Random(seed)
        allowed = latest(slots, policy)
        runs = [slot + chance.random() * allowed for slot in slots for _ in range(chance.choice([1, 1, 2]))]
        assert by_slot(slots, rotations(policy, runs, slots[0] - policy.rotate_every)) == [1] * len(slots)

    @every_schedule
    def test_f61_a_storm_of_ten_rotates_once(self, slots: list[datetime], policy: Policy) -> None:
        """Ten runs for every slot, one after the other: one rotates, nine find the key fresh."""
        runs = [slot + number * SECOND for slot in slots for number in range(10)]
        promotions = rotations(policy, runs, slots[0] - policy.rotate_every)
        assert by_slot(slots, promotions) == [1] * len(slots)

    @every_schedule
    @pytest.mark.parametrize("seed", range(3))
    def test_f61_an_outage_that_swallowed_slots_rotates_once(self, slots: list[datetime], policy: Policy, seed: int) -> None:
        """Workers away for up to nine slots, then all runs at once as Prefect catches up: one rotation for the outage, and then each slot again."""
        chance = random.Random(seed)
        runs, expected, at = [], [0] * len(slots), 0
        while at < len(slots):
            swallowed = min(chance.choice([1, 1, 1, 2, 5, 9]), len(slots) - at)
            last = slots[at + swallowed - 1]
            runs += [last + chance.random() * latest(slots, policy)] * (swallowed if swallowed == 1 else 10)
            expected[at + swallowed - 1] = 1
            at += swallowed
        assert by_slot(slots, rotations(policy, runs, slots[0] - policy.rotate_every)) == expected

    @every_schedule
    def test_f61_a_rotation_by_hand_does_not_cost_the_next_slot_much(self, slots: list[datetime], policy: Policy) -> None:
        """A key that a person rotated at a third of the interval is old enough at the next slot; one of an hour before the slot is left alone."""
        early, late = slots[0] + policy.rotate_every / 3, slots[1] - HOUR
        assert len(rotations(policy, [slots[1]], early)) == 1
        assert rotations(policy, [slots[1]], late) == []

    def test_old_enough_alone_would_skip_every_second_week(self) -> None:
        """Why it is half an interval: a whole one is missed by the minutes that a rotation takes."""
        twice = a_policy(rotate_every=14 * DAY)  # its half is the week between two slots
        slots = weekly()[:52]
        assert sum(by_slot(slots, rotations(twice, slots, slots[0] - 7 * DAY))) == 26

    @given(st.lists(st.timedeltas(min_value=timedelta(0), max_value=100 * DAY), max_size=60))
    def test_runs_at_any_time_never_rotate_twice_in_half_an_interval(self, offsets: list[timedelta]) -> None:
        """Whenever scheduled runs look, two promotions are never closer than half an interval."""
        promoted = rotations(WEEKLY, [NOW + offset for offset in offsets], NOW - 7 * DAY)
        assert all(later - earlier >= WEEKLY.due_after for earlier, later in pairwise(promoted))
