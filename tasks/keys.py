"""Steps that change keys: generate, promote, roll back, hold, clean up."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from keyrotation.domain.decision import Cleanup, Rotation
from keyrotation.domain.events import Happened
from keyrotation.steps import clean_up as cleaning
from keyrotation.steps import generate as generating
from keyrotation.steps import promote as promoting
from tasks import artifacts
from tasks.skin import environment, log, prefect_task, request, step


@step("generate")
def generate(rotation: Rotation) -> Happened:
    """Publishes the next key."""
    return generating.generate(environment(rotation.environment), rotation)


@step("promote")
def promote(rotation: Rotation, known: Happened) -> Happened:
    """Makes it the key that signs."""
    return promoting.promote(environment(rotation.environment), rotation, known.kid or "", known.evidence.get("known") == "by time")


@step("promote the initial key")
def promote_initial(rotation: Rotation, published: Happened) -> Happened:
    """The first key signs at once."""
    return promoting.bootstrap(environment(rotation.environment), rotation, published.kid or "")


@step("roll back")
def roll_back(rotation: Rotation, failure: Happened) -> Happened:
    """The previous key signs again."""
    return promoting.roll_back(environment(rotation.environment), rotation, failure)


@step("hold the cleanup")
def hold_cleanup(rotation: Rotation, unproven: Happened) -> Happened:
    """Keeps the old key until a person has looked."""
    return promoting.hold_cleanup(environment(rotation.environment), rotation, unproven)


@prefect_task("plan the cleanup")
def plan_cleanup(name: str, kid: str | None, demoted_at: datetime | None) -> Sequence[Cleanup]:
    """Which old keys may go now, and why the others may not."""
    plans = cleaning.plan_cleanup(environment(name), kid, demoted_at)
    artifacts.listing(
        f"cleanup-{name}", [(plan.kid, plan.message) for plan in plans] or [("none", "no previous key is waiting")], "Old keys, and what becomes of them now"
    )
    return plans


@prefect_task("clean up")
def clean_up(name: str, cleanup: Cleanup) -> Happened:
    """Disables one old key."""
    happened = cleaning.clean_up(environment(name), cleanup, request(reason=cleanup.message))
    log().info("%s", happened.message)
    return happened
