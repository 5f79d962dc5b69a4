"""Clean up old keys: the runbook's step 5, in a run of its own."""

from datetime import datetime
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from tasks.announcements import announce_about_key, publish_head
from tasks.endings import cleaned, in_words
from tasks.keys import clean_up, plan_cleanup


@flow(
    name="cleanup-old-keys",
    flow_run_name="clean up {environment}",
    description="Disables old signing keys once every token that they signed is dead, and erases their private halves.",
)
@in_words
def cleanup_old_keys(environment: str = "development", kid: str | None = None, demoted_at: datetime | None = None) -> State[Any]:
    """Cleans up the old keys of one environment whose time has come.

    Args:
        environment: Whose keys (the name of its file in deployments/environments).
        kid: One key only. Empty: every old key whose time has come.
        demoted_at: Set by the rotation that scheduled this run: if the key was promoted again since, nothing is done.

    """
    plans = plan_cleanup(environment, kid or None, demoted_at)
    done = [clean_up(environment, plan) for plan in plans]
    for happened in done:
        if happened.changed:
            announce_about_key(environment, happened.kid or "", f":broom: {happened.message}")
    publish_head(environment)
    return cleaned(done)
