"""Make the initial key: the runbook's "no keys available"."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from tasks.announcements import announce, publish_head
from tasks.endings import ending, in_words
from tasks.keys import generate, promote_initial
from tasks.planning import close_rotation, closed_if_it_fails, keep_standby, open_bootstrap
from tasks.verification import verify_jwks


@flow(
    name="bootstrap-signing-keys",
    flow_run_name="bootstrap {environment}",
    description="Makes the initial signing key of an environment that has none. Where there is one, nothing is done.",
)
@in_words
def bootstrap_signing_keys(environment: str = "development") -> State[Any]:
    """Makes the initial signing key of one environment.

    Args:
        environment: Whose key (the name of its file in deployments/environments).

    """
    opened = open_bootstrap(environment)
    bootstrap = opened.rotation
    if bootstrap is None:
        return ending(opened.decision)
    with closed_if_it_fails(bootstrap):
        published = generate(bootstrap)
        promoted = promote_initial(bootstrap, published)
        verified = verify_jwks(bootstrap, promoted)
        ended = close_rotation(bootstrap, verified)
        announce(ended, f":key: {ended.outcome}: {ended.message}")
    keep_standby(environment)
    publish_head(environment)
    return ending(ended)
