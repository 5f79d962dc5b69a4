"""The step that tells people."""

from __future__ import annotations

from keyrotation.domain.decision import Request, Rotation
from keyrotation.steps import announce as announcing
from tasks.skin import environment, log, prefect_task, request


@prefect_task("announce", retries=0)
def announce(rotation: Rotation, text: str) -> str:
    """Says it in the rotation's thread."""
    became = announcing.announce(environment(rotation.environment), text, Request(rotation.actor, rotation.flow_run_id), rotation.id)
    log().info("%s: %s", became, text)
    return became


@prefect_task("publish the ledger's head", retries=0)
def publish_head(name: str) -> str:
    """A run's last act."""
    became = announcing.publish_head(environment(name))
    log().info("%s", became)
    return became


@prefect_task("announce", retries=0)
def announce_about_key(name: str, kid: str, text: str) -> str:
    """Says what became of an old key, in the thread of the rotation that took it out of service."""
    env = environment(name)
    became = announcing.announce(env, text, request(), announcing.rotation_of(env, kid))
    log().info("%s: %s", became, text)
    return became
