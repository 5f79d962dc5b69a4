"""Steps before and around the work: the plan, opening, closing, standby."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from keyrotation.domain.decision import Rotation
from keyrotation.domain.errors import KeyRotationError, Superseded, Unproven
from keyrotation.domain.events import Happened
from keyrotation.steps import generate as generating
from keyrotation.steps import plan as planning
from keyrotation.steps import rotations
from keyrotation.steps.plan import Plan
from keyrotation.steps.rotations import Opened
from tasks import artifacts
from tasks.announcements import announce
from tasks.skin import environment, log, prefect_task, request


@prefect_task("plan")
def show_plan(name: str, only_if_due: bool) -> Plan:
    """Decides, looks whether the world is fit for it, and shows the plan."""
    plan = planning.plan(environment(name), request(only_if_due))
    log().info("%s", plan.message)
    artifacts.listing(f"plan-{name}", plan.lines(), "What this run is going to do, and why now")
    return plan


@prefect_task("open rotation")
def open_rotation(plan: Plan, only_if_due: bool) -> Opened:
    """Opens a rotation, finishes a dead one, or waits for a live one."""
    opened = rotations.open_rotation(environment(plan.environment), request(only_if_due))
    log().info("%s", opened.message)
    return opened


@prefect_task("open bootstrap")
def open_bootstrap(name: str) -> Opened:
    """Opens the making of the initial key, if there is none."""
    return rotations.open_bootstrap(environment(name), request())


@prefect_task("close rotation")
def close_rotation(rotation: Rotation, result: Happened) -> Rotation:
    """Ends the rotation with what came of it."""
    env = environment(rotation.environment)
    ended = rotations.close_rotation(env, rotation, result)
    artifacts.evidence(f"evidence-{rotation.environment}", ended, env.keys.look())
    return ended


@prefect_task("keep a standby")
def keep_standby(name: str) -> Happened:
    """With keep_standby, publishes the next key ahead."""
    made = generating.keep_standby(environment(name), request(reason="keep_standby: a key is always published ahead"))
    log().info("%s", made.message)
    return made


@contextmanager
def closed_if_it_fails(rotation: Rotation) -> Iterator[None]:
    """A failure in words closes the rotation and is announced; a killed run leaves it open, for the next run to finish."""
    env = environment(rotation.environment)
    try:
        yield
    except Superseded:
        raise Superseded(_successor(rotation)) from None
    except KeyRotationError as error:
        outcome = "unproven" if isinstance(error, Unproven) else "failed"
        try:
            ended = rotations.close_failed(env, rotation, outcome, str(error))
        except Superseded:
            raise Superseded(_successor(rotation)) from None
        except KeyRotationError as closing:
            log().error("the rotation stays open for the next run: %s", closing)
        else:
            announce(replace(rotation, outcome=ended.outcome), f":x: {ended.kind} {ended.id} failed: {error}")
        raise


def _successor(rotation: Rotation) -> str:
    try:
        now = environment(rotation.environment).keys.rotation(rotation.id)
    except KeyRotationError:
        return "another run has taken over this rotation; this one changed nothing more"
    by = f"{now.actor}" + (f" (flow run {now.flow_run_id})" if now.flow_run_id else "")
    ended = f"; it ended as {now.outcome}" if now.ended_at else ""
    return f"taken over by {by}{ended}: this run changed nothing more"
