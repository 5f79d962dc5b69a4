"""The step that tells people."""

from __future__ import annotations

from keyrotation.domain.decision import Request, Rotation
from keyrotation.steps import announce as announcing
from tasks.skin import environment, log, prefect_task


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
def announce_about(name: str, text: str, who: Request) -> str:
    """Says something that belongs to no rotation."""
    became = announcing.announce(environment(name), text, who)
    log().info("%s: %s", became, text)
    return became
