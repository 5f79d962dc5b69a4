"""Bring back a key that was cleaned up too early: published again, to verify the tokens that it has signed. It never signs again.

Its private half was erased with the cleanup; only the public one is kept. A compromised key never comes back (I8), and a key that never signed
has no token to verify. The key starts anew as previous: gateways have to learn it again, and its cleanup has a time of its own.
"""

from __future__ import annotations

from keyrotation.domain.decision import Facts, Request, Rotation
from keyrotation.domain.errors import Busy, KeyRotationError, Refused, Superseded
from keyrotation.domain.events import Happened
from keyrotation.domain.keys import Key, Status
from keyrotation.domain.policy import show_instant
from keyrotation.ports import Environment
from keyrotation.steps.rotations import confirm

KIND = "republish"


def republish(env: Environment, kid: str, request: Request) -> Happened:
    """The key is previous again; raises Refused where it must not or need not be, Busy where another run works on the keys."""
    facts = env.keys.look()
    unfinished = _left_by_a_dead_run(facts)
    key = facts.ring.find(kid)
    if not (unfinished and unfinished.new_kid == kid and key.status is Status.PREVIOUS):
        _require_republishable(key)
    rotation = env.keys.take_over(unfinished, request) if unfinished else _opened(env, facts, request)
    if rotation is None:
        raise Busy("another run was faster and works on the keys now: nothing was changed; look at keyrotation status, then try again")
    happened = _carried_out(env, rotation, key, request)
    env.keys.close(rotation, "done", happened.message)
    return happened


def _left_by_a_dead_run(facts: Facts) -> Rotation | None:
    """A republishing that nobody works on any more: finished by this one."""
    work = facts.open_rotation
    return work if work is not None and work.kind == KIND and work.lease_until <= facts.now else None


def _require_republishable(key: Key) -> None:
    if key.compromised:
        raise Refused(f"key {key.kid} is compromised, for ever: it is never published again. Nothing was changed")
    if key.status is not Status.DISABLED:
        raise Refused(f"key {key.kid} is {key.status}: it is published, there is nothing to bring back. Nothing was changed")
    if key.promoted_at is None:
        raise Refused(f"key {key.kid} never signed: no token needs it. Nothing was changed")


def _opened(env: Environment, facts: Facts, request: Request) -> Rotation | None:
    if facts.hold is not None:
        raise Refused(f"{env.name} is on hold by {facts.hold.by}: {facts.hold.reason}. To lift it: keyrotation release {env.name}. Nothing was changed")
    if facts.open_rotation is not None:
        work = facts.open_rotation
        raise Busy(
            f"{work.kind} {work.id}, opened {show_instant(work.opened_at)} by {work.actor}, is not over yet: nothing was changed; try again after its end"
        )
    return env.keys.open(KIND, request, None)


def _carried_out(env: Environment, rotation: Rotation, key: Key, request: Request) -> Happened:
    """Publishes and confirms; a failure in words closes the rotation, so that it keeps nobody waiting."""
    try:
        env.keys.adopt(rotation, key.kid)
        if key.status is Status.DISABLED:
            env.keys.republish(rotation, key.kid, request.reason)
        confirm(env, rotation)
    except Superseded:
        raise
    except KeyRotationError as error:
        env.keys.close(rotation, "failed", str(error))
        raise
    return _told(env, env.keys.look().ring.find(key.kid))


def _told(env: Environment, key: Key) -> Happened:
    known = env.policy.may_promote(key.published_seen_at or key.published_at)
    until = key.retain_until or known.instant
    told = (
        f"key {key.kid} is published again and verifies the tokens that it has signed. It never signs again: its private half was erased when it "
        f"was cleaned up. Every gateway knows it from {show_instant(known.instant)} on; it is kept until {show_instant(until)}"
    )
    return Happened(key.kid, told, {"known_everywhere": known.explain(), "retain_until": until.isoformat()})
