"""What to do next, and why: pure functions from facts to a decision with a reason word and a message.

The message is made once, here, and travels unchanged into the ledger, the log, Slack and the run's state.
The order of the checks is the order of their weight: a hold before due, an emergency before everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from keyrotation.domain.keys import Key, KeyRing, Status
from keyrotation.domain.policy import Policy, Seen, Sum, show, show_instant


class Action(StrEnum):
    """What a run does."""

    ROTATE = "rotate"  # open a rotation and carry it out
    RESUME = "resume"  # finish what a dead run left
    WAIT = "wait"  # somebody works on it: wait for the end, and report that
    NOTHING = "nothing"  # all is as it should be
    ON_HOLD = "on hold"  # a person said: not now
    BOOTSTRAP = "bootstrap"  # there has never been a key


@dataclass(frozen=True, slots=True)
class Decision:
    """An action, the reason in a word, and the sentence that everybody is shown."""

    action: Action
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Hold:
    """A person's word that this environment's keys stay as they are."""

    reason: str
    by: str
    since: datetime


@dataclass(frozen=True, slots=True)
class Rotation:
    """A row of key_rotation.rotations: one piece of work on an environment's keys. `epoch` is the fence: every write needs it.

    It is what crosses a step's boundary: no secret in it.
    """

    environment: str
    id: int
    epoch: int
    kind: str
    actor: str
    reason: str
    opened_at: datetime
    lease_until: datetime
    flow_run_id: str | None = None
    old_kid: str | None = None
    new_kid: str | None = None
    rolled_back: bool = False
    ended_at: datetime | None = None
    outcome: str | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """The database at one instant, as one look."""

    now: datetime
    ring: KeyRing
    open_rotation: Rotation | None
    hold: Hold | None
    environment: str = "ENVIRONMENT"


@dataclass(frozen=True, slots=True)
class Request:
    """Who asks for what."""

    actor: str
    flow_run_id: str | None = None
    only_if_due: bool = False
    reason: str = "asked for by a person"


def decide_rotation(facts: Facts, request: Request, policy: Policy) -> Decision:
    """What a rotation run does with what it finds."""
    return _about_an_emergency(facts) or _about_the_hold(facts) or _about_open_work(facts, request) or _about_age(facts, request, policy)


def decide_bootstrap(facts: Facts, request: Request) -> Decision:
    """What a bootstrap run does: only an environment without any current key is given one. A bootstrap that died after its promotion is finished."""
    unfinished = facts.open_rotation is not None and facts.open_rotation.kind == "bootstrap"
    if facts.ring.current is not None and not unfinished:
        return Decision(
            Action.NOTHING,
            "has a key",
            f"nothing to do: key {facts.ring.current.kid} is current since {show_instant(facts.ring.current.promoted_at or facts.ring.current.created_at)}",
        )
    return (
        _about_an_emergency(facts)
        or _about_the_hold(facts)
        or _about_open_work(facts, request)
        or Decision(Action.BOOTSTRAP, "no key", "no key has ever been current here: the initial key is made")
    )


def _about_an_emergency(facts: Facts) -> Decision | None:
    work = facts.open_rotation
    if work is None or work.kind != "emergency":
        return None
    return Decision(Action.NOTHING, "emergency", f"an emergency is open ({_named(work)}): nothing was changed; rotate again once it is over")


def _about_the_hold(facts: Facts) -> Decision | None:
    if facts.hold is None:
        return None
    return Decision(
        Action.ON_HOLD,
        "on hold",
        f"on hold since {show_instant(facts.hold.since)} by {facts.hold.by}: {facts.hold.reason}. To lift it: keyrotation release {facts.environment}",
    )


def _about_open_work(facts: Facts, request: Request) -> Decision | None:
    work = facts.open_rotation
    if work is None:
        return None
    named = _named(work)
    mine = work.flow_run_id is not None and work.flow_run_id == request.flow_run_id
    if mine or work.lease_until <= facts.now:
        return Decision(Action.RESUME, "unfinished", f"finishing {named}: the run that worked on it is gone")
    if request.only_if_due:
        return Decision(Action.NOTHING, "busy", f"nothing to do: {named}, is under way")
    return Decision(Action.WAIT, "busy", f"{named}, is under way: waiting for its end")


def _named(work: Rotation) -> str:
    return f"{work.kind} {work.id}, opened {show_instant(work.opened_at)} by {work.actor}"


def _about_age(facts: Facts, request: Request, policy: Policy) -> Decision:
    current = facts.ring.require_current()
    promoted_at = current.promoted_at or current.created_at
    age = facts.now - promoted_at
    if not request.only_if_due:
        return Decision(Action.ROTATE, "asked for", f"rotating as asked: key {current.kid} is {show(age)} old")
    due_at = policy.due_at(promoted_at)
    if facts.now < due_at:
        return Decision(
            Action.NOTHING,
            "not due",
            f"not due: key {current.kid} is {show(age)} old; a scheduled run rotates it from {show_instant(due_at)} on "
            f"(half of rotate_every {show(policy.rotate_every)})",
        )
    return Decision(Action.ROTATE, "due", f"due: key {current.kid} is {show(age)} old, rotated every {show(policy.rotate_every)}")


@dataclass(frozen=True, slots=True)
class Cleanup:
    """Whether one key may be cleaned up, and why or why not."""

    kid: str
    allowed: bool
    reason: str
    message: str
    until: Sum | None = None


def may_clean_up(facts: Facts, key: Key, policy: Policy, seen: Seen, demoted_at: datetime | None = None) -> Cleanup:
    """May this key be cleaned up now? `demoted_at` names the demotion that the cleanup was made for: another one is another cleanup (F53)."""

    def no(reason: str, message: str, until: Sum | None = None) -> Cleanup:
        return Cleanup(key.kid, False, reason, message, until)

    if key.status is Status.DISABLED:
        return no("already done", f"nothing to do: key {key.kid} is disabled since {show_instant(key.disabled_at or facts.now)}")
    if key.status is not Status.PREVIOUS:
        return no("in use", f"nothing to do: key {key.kid} is {key.status}; only a previous key is cleaned up")
    if demoted_at is not None and key.demoted_at != demoted_at:
        return no(
            "another demotion", f"nothing to do: key {key.kid} was promoted and demoted again since this cleanup was scheduled; it has a cleanup of its own"
        )
    if facts.hold is not None:
        return no("on hold", f"the environment is on hold by {facts.hold.by}: {facts.hold.reason}")
    if key.cleanup_hold is not None:
        return no("on hold", f"the cleanup of key {key.kid} is on hold: {key.cleanup_hold}. To lift it: keyrotation release {facts.environment}")
    if facts.open_rotation is not None and facts.open_rotation.kind == "emergency":
        return no("emergency", "an emergency is open: nothing is cleaned up until it is over")
    if key.demoted_seen_at is None:
        return no("too early", f"key {key.kid} is not cleaned up: its demotion has not been confirmed yet; the next rotation run does that")
    until = policy.may_clean_up(key.demoted_seen_at, seen)
    if seen.token_lifetime is not None and seen.token_lifetime > policy.token_lifetime:
        return no(
            "tokens live longer",
            f"key {key.kid} is not cleaned up: a live token lives {show(seen.token_lifetime)}, longer than policy.token_lifetime "
            f"{show(policy.token_lifetime)}. Set policy.token_lifetime to the longest life of any token",
            until,
        )
    latest = max(until.instant, key.retain_until or until.instant)
    if facts.now < latest:
        return no("too early", f"key {key.kid} is not cleaned up before {show_instant(latest)}: {until.explain()}", until)
    return Cleanup(key.kid, True, "due", f"key {key.kid} is cleaned up: {until.explain()}", until)
