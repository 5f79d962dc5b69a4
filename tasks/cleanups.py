"""The cleanup's own flow run, made ahead for its hour: Prefect keeps the appointment, the database decides when it comes."""

from __future__ import annotations

from typing import Any

from prefect.deployments import run_deployment

from keyrotation.domain.decision import Rotation
from keyrotation.domain.events import Happened
from keyrotation.domain.policy import show_instant
from tasks.skin import current_flow_run, environment, step

DEPLOYMENT = "cleanup-old-keys"


@step("schedule cleanup")
def schedule_cleanup(rotation: Rotation, result: Happened) -> Happened:
    """One scheduled run per key and demotion, however often this is repeated. The daily sweep does the same work if it is lost."""
    env = environment(rotation.environment)
    waiting = [key for key in env.keys.look().ring.previous if key.retain_until is not None and key.demoted_at is not None]
    if env.policy.cleanup == "manual":
        return Happened(result.kid, f"policy.cleanup is manual: {len(waiting)} old key(s) wait for a person", changed=False)
    key = waiting[-1] if waiting else None
    if key is None or key.retain_until is None or key.demoted_at is None:
        return Happened(result.kid, "no old key has to be cleaned up", changed=False)
    if current_flow_run() is None:
        return Happened(key.kid, f"key {key.kid} may be cleaned up from {show_instant(key.retain_until)} on: the daily sweep does it", changed=False)
    schedule: Any = run_deployment  # typed for async callers only
    run = schedule(
        f"{DEPLOYMENT}/{env.name}",
        parameters={"environment": env.name, "kid": key.kid, "demoted_at": key.demoted_at.isoformat()},
        scheduled_time=key.retain_until,
        flow_run_name=f"clean up {env.name}: key {key.kid[:8]}",
        idempotency_key=f"{env.name}-{key.kid}-{key.demoted_at.isoformat()}",
        timeout=0,
        as_subflow=False,
        _sync=True,
    )
    return Happened(
        key.kid,
        f"the cleanup of key {key.kid} is scheduled for {show_instant(key.retain_until)}",
        {"cleanup_flow_run_id": str(run.id), "retain_until": key.retain_until.isoformat()},
    )
