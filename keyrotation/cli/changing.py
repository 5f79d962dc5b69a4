"""The commands by which a person changes something: hold, release, republish. The ledger names who."""

from __future__ import annotations

import argparse
import getpass
import os

from keyrotation import wiring
from keyrotation.cli.report import Report
from keyrotation.domain.decision import Request
from keyrotation.domain.policy import show_instant
from keyrotation.ports import Environment
from keyrotation.steps import republish as republishing
from keyrotation.steps.announce import publish_head


def _me() -> str:
    try:
        return f"shell: {getpass.getuser()}"
    except (KeyError, OSError):  # a container's user often has no name
        return f"shell: uid {os.getuid()}"


def hold(arguments: argparse.Namespace) -> Report:
    """Keeps scheduled rotations and cleanups back. Holding again replaces the reason."""
    env = wiring.connect(arguments.environment)
    before = env.keys.look().hold
    env.keys.hold(arguments.reason, _me())
    facts = env.keys.look()
    said = [
        f"{env.name} is on hold by {_me()}: {arguments.reason}",
        f"Rotations and cleanups leave the keys as they are until keyrotation release {env.name}; an emergency ignores the hold",
    ]
    if before is not None:
        said.append(f"Before, it was on hold since {show_instant(before.since)} by {before.by}: {before.reason}")
    if facts.open_rotation is not None:
        said.append(f"{facts.open_rotation.kind} {facts.open_rotation.id} had begun already and goes on to its end")
    data = {"environment": env.name, "on_hold": True, "reason": arguments.reason, "by": _me(), "replaced": before.reason if before else None}
    return Report(data, [f"{sentence}." for sentence in said])


def release(arguments: argparse.Namespace) -> Report:
    """Lifts the hold of the environment and of every cleanup."""
    env = wiring.connect(arguments.environment)
    facts = env.keys.look()
    kids = [key.kid for key in facts.ring.previous if key.cleanup_hold]
    env.keys.release(_me())
    if arguments.reason:
        env.keys.record("reason of the release", Request(_me()), reason=arguments.reason)
    lifted = [f"the hold of {env.name} ({facts.hold.by}: {facts.hold.reason})"] if facts.hold else []
    lifted += [f"the hold of the cleanup of key {kid}" for kid in kids]
    data = {"environment": env.name, "on_hold": False, "released_hold": facts.hold.reason if facts.hold else None, "released_cleanups": kids, "by": _me()}
    return Report(data, [f"Lifted: {'; '.join(lifted)}. {_still_on_hold(env)}"])


def _still_on_hold(env: Environment) -> str:
    """What is true now, not what was asked for: somebody may have put it on hold again."""
    now = env.keys.look().hold
    return f"On hold again by {now.by}: {now.reason}." if now else "Nothing is on hold any more: scheduled runs rotate and clean up as before."


def republish(arguments: argparse.Namespace) -> Report:
    """Brings a key back into the JWKS that was cleaned up too early."""
    env = wiring.connect(arguments.environment)
    happened = republishing.republish(env, arguments.kid, Request(_me(), reason=f"republish {arguments.kid}, asked for by a person"))
    publish_head(env)
    key = env.keys.look().ring.find(arguments.kid)
    data = {"environment": env.name, "kid": key.kid, "status": key.status, "message": happened.message, **happened.evidence}
    return Report(data, [f"{happened.message[0].upper()}{happened.message[1:]}."])
