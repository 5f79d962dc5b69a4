"""Rotate the signing key: the runbook, one line a step."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from keyrotation.domain.events import Proof
from tasks.announcements import announce, publish_head
from tasks.cleanups import schedule_cleanup
from tasks.endings import ending, in_words
from tasks.keys import generate, hold_cleanup, promote, roll_back
from tasks.planning import close_rotation, closed_if_it_fails, keep_standby, open_rotation, show_plan
from tasks.verification import prove_at_gateways, verify_jwks, wait_for_gateway_cache


@flow(
    name="rotate-signing-keys",
    flow_run_name="rotate {environment}",
    description="Publishes a new signing key, waits until every gateway knows it, promotes it, proves it, and schedules the cleanup of the old one.",
)
@in_words
def rotate_signing_keys(environment: str = "development", only_if_due: bool = False, dry_run: bool = False) -> State[Any]:
    """Rotates the signing key of one environment.

    Args:
        environment: Whose key (the name of its file in deployments/environments).
        only_if_due: Rotate only if the key is old enough for its schedule. Schedules set it; a person who runs this wants the rotation.
        dry_run: Show what would be done, and change nothing.

    """
    plan = show_plan(environment, only_if_due)
    if dry_run or not plan.acts:
        standby = None if dry_run else keep_standby(environment)
        return ending(plan.decision, only_if_due=only_if_due, dry_run=dry_run, also=standby)
    opened = open_rotation(plan, only_if_due)
    rotation = opened.rotation
    if rotation is None or rotation.ended_at is not None:
        return ending(rotation or opened.decision, only_if_due=only_if_due)

    with closed_if_it_fails(rotation):
        announce(rotation, f":arrows_counterclockwise: {opened.decision.message}")
        published = generate(rotation)
        known = wait_for_gateway_cache(rotation, published)
        if alarm := known.evidence.get("alarm"):
            announce(rotation, f":rotating_light: {alarm}")
        promoted = promote(rotation, known)
        verified = verify_jwks(rotation, promoted)
        result = prove_at_gateways(rotation, verified)
        if result.proof is Proof.WRONG:
            result = roll_back(rotation, result)
            verify_jwks(rotation, result)
        if result.proof is Proof.UNPROVEN:
            result = hold_cleanup(rotation, result)
        schedule_cleanup(rotation, result)
        ended = close_rotation(rotation, result)
        announce(ended, f"{':white_check_mark:' if ended.outcome == 'done' else ':rotating_light:'} {ended.outcome}: {ended.message}")
    keep_standby(environment)
    publish_head(environment)
    return ending(ended)
