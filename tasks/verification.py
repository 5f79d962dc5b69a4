"""Steps that show that a promotion works: JWKS, tokens, gateways."""

from __future__ import annotations

from keyrotation.domain.decision import Rotation
from keyrotation.domain.events import Happened
from keyrotation.steps import verify as verifying
from keyrotation.steps.gateways import wait_for_gateway_cache as waiting
from tasks.artifacts import Bar
from tasks.skin import environment, step


@step("wait for gateway cache")
def wait_for_gateway_cache(rotation: Rotation, published: Happened) -> Happened:
    """Until every gateway knows the key, with a proof at the end."""
    env = environment(rotation.environment)
    with Bar(f"gateway-cache-{env.name}", "Waiting for the gateways' JWKS caches") as bar:
        return waiting(env, rotation, published.kid or "", bar)


@step("verify JWKS")
def verify_jwks(rotation: Rotation, promoted: Happened) -> Happened:
    """Old and new in the JWKS, fresh tokens by the new key."""
    with Bar(f"verification-{rotation.environment}", "Verifying the promotion") as bar:
        return verifying.verify(environment(rotation.environment), rotation, promoted.kid or "", bar)


@step("prove at gateways")
def prove_at_gateways(rotation: Rotation, verified: Happened) -> Happened:
    """Every gateway takes fresh tokens and still knows the old key."""
    with Bar(f"verification-{rotation.environment}", "Verifying the promotion at the gateways") as bar:
        return verifying.prove_at_gateways(environment(rotation.environment), rotation, verified, bar)
