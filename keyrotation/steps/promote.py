"""Make the published key the one that signs; and the way back."""

from __future__ import annotations

from dataclasses import replace

from keyrotation.domain.decision import Rotation
from keyrotation.domain.errors import Refused, WorldError
from keyrotation.domain.events import Happened, Proof
from keyrotation.domain.keys import Status
from keyrotation.domain.policy import Seen
from keyrotation.ports import Environment, Gate
from keyrotation.steps.rotations import confirm


def promote(env: Environment, rotation: Rotation, kid: str, by_time: bool) -> Happened:
    """One transaction (or one admin call); the waiting rule is asked again inside (I6). `by_time`: nothing could be shown, the whole sum decides."""
    facts = env.keys.look()
    key = facts.ring.find(kid)
    old = facts.ring.current
    if key.status is Status.CURRENT:
        confirm(env, rotation)
        return Happened(kid, f"key {kid} is current already", {"promoted_at": str(key.promoted_at)}, changed=False)
    _remember_an_old_token(env, rotation)
    known_since = key.published_seen_at or facts.now
    seen = Seen(jwks_max_age=env.identity.published().max_age)
    shortened = env.policy.canary_shortens_wait and not by_time
    deadline = env.policy.seen_everywhere(known_since, seen) if shortened else env.policy.may_promote(known_since, seen)
    env.authority.promote(rotation, kid, Gate(deadline.duration, not by_time), f"promoted by {rotation.kind} {rotation.id}")
    confirm(env, rotation)
    promoted = env.keys.look().ring.find(kid)
    return Happened(
        kid,
        f"key {kid} signs now" + (f"; key {old.kid} is kept for its tokens" if old else ""),
        {"old_kid": old.kid if old else None, "promoted_at": str(promoted.promoted_at), "not_before": deadline.explain()},
    )


def _remember_an_old_token(env: Environment, rotation: Rotation) -> None:
    """A token of the key that signs now stands for all of them in `verify`. None can be had: the old key's canaries have to do."""
    try:
        env.memory[rotation.id] = env.identity.fresh_token()
    except WorldError:
        env.memory.pop(rotation.id, None)


def roll_back(env: Environment, rotation: Rotation, failure: Happened) -> Happened:
    """The previous key signs again; the failed one stays published until its tokens are dead, and is never promoted again."""
    work = env.keys.rotation(rotation.id)
    old = env.keys.look().ring.find(work.old_kid) if work.old_kid else None
    if old is None or not (old.status is Status.CURRENT or old.status is Status.PREVIOUS):
        raise Refused(f"{failure.message}. It cannot be rolled back: no previous key is left. Run the emergency-rotation deployment, or rotate again")
    if old.status is Status.PREVIOUS or not work.rolled_back:  # the second: done by the service, not noted yet
        env.authority.roll_back(rotation, old.kid, f"rolled back by {rotation.kind} {rotation.id}: {failure.message}")
    confirm(env, rotation)
    return Happened(
        old.kid, f"rolled back to key {old.kid}: {failure.message}. Key {failure.kid} stays published until its tokens are dead", failure.evidence, Proof.WRONG
    )


def hold_cleanup(env: Environment, rotation: Rotation, unproven: Happened) -> Happened:
    """What could not be shown keeps the old key in place until a person has looked and says release (I13)."""
    old = env.keys.rotation(rotation.id).old_kid
    if old is not None:
        env.keys.hold_cleanup(rotation, old, unproven.message)
    return replace(unproven, message=f"{unproven.message}. Key {unproven.kid} signs; the cleanup of key {old} is on hold until keyrotation release {env.name}")


def bootstrap(env: Environment, rotation: Rotation, kid: str) -> Happened:
    """The initial key signs at once: no gateway holds a set without it, no token is older."""
    if env.keys.look().ring.current is None:
        env.authority.promote(rotation, kid, Gate(env.policy.may_promote(rotation.opened_at).duration, False), "the initial key")
    confirm(env, rotation)
    return Happened(kid, f"key {kid} is the initial key and signs now")
