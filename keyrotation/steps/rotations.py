"""Opening, joining, finishing and closing a rotation: who may work on the keys, and who must not any more.

One rotation is open at a time (a unique index). Its epoch is the fence: whoever takes over raises it, and every write of the run before is
refused from then on, however late it wakes. Its lease says whether somebody is believed to work on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from keyrotation.domain.decision import Action, Decision, Request, Rotation, decide_bootstrap, decide_rotation
from keyrotation.domain.errors import Busy
from keyrotation.domain.events import Happened, Proof
from keyrotation.domain.policy import ZERO, show_instant
from keyrotation.ports import Environment

# What a rotation run does not carry on as a rotation: it ends it, and decides anew. (A dead bootstrap is carried on: its key has nobody to wait for.)
SIDE_WORK = ("standby", "republish")
LOOK_AGAIN = 1.0  # seconds between two looks at somebody else's rotation


@dataclass(frozen=True, slots=True)
class Opened:
    """The decision, and the rotation to carry out; None where nothing is to be done. For a person who found live work: its end."""

    decision: Decision
    rotation: Rotation | None

    @property
    def message(self) -> str:
        """For people."""
        return self.decision.message + (f" (rotation {self.rotation.id}, epoch {self.rotation.epoch})" if self.rotation else "")


def open_rotation(env: Environment, request: Request) -> Opened:
    """Opens, joins or takes over, as the domain decides."""
    while True:
        facts = env.keys.look()
        decision = decide_rotation(facts, request, env.policy)
        match decision.action:
            case Action.ROTATE:
                due_after = env.policy.due_after if request.only_if_due else None
                rotation = env.keys.open("rotation", replace(request, reason=decision.message), due_after)
            case Action.RESUME if facts.open_rotation is not None:
                rotation = env.keys.take_over(facts.open_rotation, request)
                if rotation is not None and rotation.kind in SIDE_WORK:
                    env.keys.close(rotation, "failed", f"the run that worked on this {rotation.kind} died; its key, if it made one, is used")
                    continue
            case Action.WAIT if facts.open_rotation is not None:
                rotation = await_end(env, facts.open_rotation)
            case _:
                return Opened(decision, None)
        if rotation is not None:
            return Opened(decision, rotation)
        # Somebody was faster between our look and our statement: look again, the reason may be another one now.


def open_bootstrap(env: Environment, request: Request) -> Opened:
    """The same for the initial key."""
    facts = env.keys.look()
    decision = decide_bootstrap(facts, request)
    if decision.action is Action.BOOTSTRAP:
        return Opened(decision, env.keys.open("bootstrap", replace(request, reason=decision.message), None))
    if decision.action is Action.RESUME and facts.open_rotation is not None:
        return Opened(decision, env.keys.take_over(facts.open_rotation, request))
    if decision.action is Action.WAIT:
        raise Busy(decision.message)
    return Opened(decision, None)


def await_end(env: Environment, rotation: Rotation) -> Rotation | None:
    """That rotation once it has ended; None once the run that worked on it is dead."""
    while True:
        seen = env.keys.rotation(rotation.id)
        if seen.ended_at is not None:
            return seen
        if seen.lease_until <= env.keys.look().now:
            return None
        env.pause(LOOK_AGAIN)


def close_rotation(env: Environment, rotation: Rotation, result: Happened) -> Rotation:
    """The rotation, ended with what came of it, in words that everybody is shown."""
    outcome = {Proof.PROVEN: "done", Proof.WRONG: "rolled back", Proof.UNPROVEN: "unproven"}[result.proof]
    work = env.keys.rotation(rotation.id)
    message = result.message
    if outcome == "done" and work.old_kid is not None and work.new_kid is not None:
        old = env.keys.look().ring.find(work.old_kid)
        kept = f"; the old key verifies until {show_instant(old.retain_until)}" if old.published and old.retain_until else ""
        message = f"rotated from key {work.old_kid} to key {work.new_kid}{kept}. Shown: {result.message}"
    return env.keys.close(rotation, outcome, message)


def close_failed(env: Environment, rotation: Rotation, outcome: str, message: str) -> Rotation:
    """Ends a rotation that could not go on. Once it has promoted, the old key's cleanup is held: nobody has shown that it may go (I13)."""
    work = env.keys.rotation(rotation.id)
    if work.ended_at is not None:
        return work
    if work.old_kid is not None:
        env.keys.hold_cleanup(rotation, work.old_kid, f"{rotation.kind} {rotation.id} failed after the promotion: {message}")
    return env.keys.close(rotation, outcome, message)


def confirm(env: Environment, rotation: Rotation) -> None:
    """Notes that what was committed before has been seen; deadlines count from there."""
    needed = sum((term for _, term in env.policy.retention()), ZERO)
    env.keys.confirm(rotation, max(env.policy.cleanup_after, needed))
