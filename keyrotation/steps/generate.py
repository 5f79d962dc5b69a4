"""Publish the key that this rotation promotes: the one that lies ready, or a new one."""

from __future__ import annotations

from keyrotation.domain.decision import Request, Rotation
from keyrotation.domain.errors import Refused
from keyrotation.domain.events import Happened
from keyrotation.domain.keys import Key, KeyRing, Status
from keyrotation.ports import Environment
from keyrotation.steps.rotations import confirm


def generate(env: Environment, rotation: Rotation) -> Happened:
    """The next key, made at the most once however often this is repeated (I2, I9)."""
    ring, work = env.keys.look().ring, env.keys.rotation(rotation.id)
    ready = _ready(ring, work)
    if ready is None:
        kid = env.authority.generate(rotation, f"next key of {rotation.kind} {rotation.id}")
    else:
        kid = ready.kid
        if work.new_kid != kid:
            env.keys.adopt(rotation, kid)
    confirm(env, rotation)
    key = env.keys.look().ring.find(kid)
    told = f"published key {kid}" if ready is None else f"key {kid} was published already"
    return Happened(
        kid,
        f"{told}; it signs nothing yet" if key.status is Status.NEXT else f"{told} and is {key.status}",
        {"published_seen_at": str(key.published_seen_at), "canaries": key.canaries_left},
        changed=ready is None,
    )


def _ready(ring: KeyRing, work: Rotation) -> Key | None:
    """The key to promote if there is one: this rotation's own, or one published ahead."""
    own = next((key for key in ring.keys if key.kid == work.new_kid), None)
    if own is not None and own.status in (Status.NEXT, Status.CURRENT):
        return own
    if own is not None and own.rotation_id == work.id and ring.next is None:
        raise Refused(
            f"the key of this rotation, {own.kid}, is {own.status} now ({own.disabled_reason or 'it signs no more'}): this rotation ends here; run a new one"
        )
    return ring.next


def keep_standby(env: Environment, request: Request) -> Happened:
    """With keep_standby, a next key is always published ahead: made in a rotation of its own."""
    facts = env.keys.look()
    if not env.policy.keep_standby:
        return Happened(None, "no standby is wanted (policy.keep_standby)", changed=False)
    if facts.ring.next is not None:
        return Happened(facts.ring.next.kid, f"key {facts.ring.next.kid} is published ahead already", changed=False)
    rotation = env.keys.open("standby", request, None) if facts.open_rotation is None and facts.hold is None else None
    if rotation is None:
        return Happened(None, "no standby is made now: another run works on the keys, or they are on hold", changed=False)
    made = generate(env, rotation)
    env.keys.close(rotation, "done", f"standby: {made.message}")
    return made
