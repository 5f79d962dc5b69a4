"""Clean up old keys: the runbook's step 5, refused by arithmetic while a token of the key can still be alive."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from keyrotation.domain.decision import Cleanup, Facts, Request, may_clean_up
from keyrotation.domain.errors import Refused
from keyrotation.domain.events import Happened
from keyrotation.domain.keys import Key
from keyrotation.domain.policy import Seen
from keyrotation.ports import Environment

TOKENS_SEEN = 5  # fresh tokens looked at before an old key goes: one that still names it stops the cleanup


def plan_cleanup(env: Environment, kid: str | None, demoted_at: datetime | None) -> Sequence[Cleanup]:
    """What may be cleaned up now and what may not, each with its reason; one key if named, else every previous key."""
    facts = env.keys.look()
    keys: Sequence[Key] = (facts.ring.find(kid),) if kid else facts.ring.previous
    if not keys:
        return ()
    if not kid and env.policy.cleanup == "manual":
        return [
            Cleanup(key.kid, False, "manual", f'key {key.kid} waits for a person (policy.cleanup = "manual"): run cleanup-old-keys with kid = {key.kid}')
            for key in keys
        ]
    seen = _seen_live(env, facts, keys)
    return [may_clean_up(facts, key, env.policy, seen, demoted_at) for key in keys]


def _seen_live(env: Environment, facts: Facts, keys: Sequence[Key]) -> Seen:
    """The life of real tokens; raises Refused where one is still signed by a key that would go."""
    tokens = [env.identity.fresh_token() for _ in range(TOKENS_SEEN)]
    jwks = env.identity.published().jwks
    for token in tokens:
        env.identity.verify(token, jwks)
        if any(token.kid == key.kid for key in keys) and not any(key.kid == token.kid and key.status == "current" for key in facts.ring.keys):
            raise Refused(
                f"nothing is cleaned up: a fresh token is still signed by key {token.kid}, which is previous. Check identity.key_cache and the identity service's replicas"
            )
    return Seen(token_lifetime=max(token.lifetime for token in tokens))


def clean_up(env: Environment, cleanup: Cleanup, request: Request) -> Happened:
    """Disables the key in one statement that checks everything again (I7); a key that is not there to be disabled any more is left alone."""
    if not cleanup.allowed:
        return Happened(cleanup.kid, cleanup.message, {"reason": cleanup.reason}, changed=False)
    key = env.keys.look().ring.find(cleanup.kid)
    evidence = {"retention": cleanup.until.explain() if cleanup.until else ""}
    if not env.cleaner.clean_up(key, request, cleanup.message, evidence):
        return Happened(
            key.kid, f"nothing to do: key {key.kid} is not what it was a moment ago (it is {env.keys.look().ring.find(key.kid).status})", changed=False
        )
    return Happened(
        key.kid, f"key {key.kid} is disabled and its private half erased: {cleanup.until.explain() if cleanup.until else cleanup.message}", evidence
    )
