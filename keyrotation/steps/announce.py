"""Tell people, in one thread a rotation. Announcing never decides: what could not be said is kept in the ledger, and the work goes on (I14)."""

from __future__ import annotations

from keyrotation.domain.decision import Request
from keyrotation.domain.errors import KeyRotationError
from keyrotation.ports import Environment

SAID, MISSED = "announced", "announcement missed"
LOOKED_THROUGH = 50  # rotations: more than any retention spans


def announce(env: Environment, text: str, request: Request, rotation_id: int | None = None) -> str:
    """Says it; returns what became of it. Raises nothing that the outside causes."""
    if env.announcer is None:
        return "nobody is told: the environment's file has no [slack]"
    try:
        thread = _thread(env, rotation_id)
        said_as = env.announcer.say(f"[{env.name}] {text}", thread)
        env.keys.record(SAID, request, rotation_id=rotation_id, reason=text, evidence={"thread": thread or said_as})
        return "said in Slack"
    except KeyRotationError as error:
        return _missed(env, text, request, rotation_id, str(error))


def rotation_of(env: Environment, kid: str) -> int | None:
    """The rotation that took the key out of service: what becomes of the key belongs into its thread."""
    newest_first = env.records.rotations(LOOKED_THROUGH)
    return next((work.id for work in newest_first if kid == (work.new_kid if work.rolled_back else work.old_kid)), None)


def publish_head(env: Environment) -> str:
    """Puts the ledger's head outside the database, a run's last act: whoever rewrites the past afterwards is seen. Raises nothing that the outside causes."""
    if env.head is None:
        return "the ledger's head is not published: the environment's file has no [audit]"
    try:
        seq, digest = env.records.head()
        env.head.publish(seq, digest)
    except KeyRotationError as error:
        return f"the ledger's head was not published: {error}"
    return f"the ledger's head is published: entry {seq}"


def _thread(env: Environment, rotation_id: int | None) -> str | None:
    """The thread that this rotation's first message opened, also if another process said it."""
    evidence = env.keys.evidence_of(rotation_id, SAID) if rotation_id is not None else None
    thread = (evidence or {}).get("thread")
    return thread if isinstance(thread, str) else None


def _missed(env: Environment, text: str, request: Request, rotation_id: int | None, why: str) -> str:
    try:
        env.keys.record(MISSED, request, rotation_id=rotation_id, reason=text, evidence={"why": why})
    except KeyRotationError as error:
        return f"not said ({why}), nor recorded ({error})"
    return f"not said: {why}. The message is in the ledger"
