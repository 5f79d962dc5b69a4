"""Verify a promotion: the runbook's step 3, and a proof for every word of it (I20).

The JWKS holds old and new; fresh tokens name the new kid and verify, several times in a row, so that every replica has had its turn; an old
token still verifies; every gateway takes fresh tokens and still knows the old key. Only what is wrong with the *key* rolls back. Whatever
else is in the way (an endpoint down, a clock, one gateway unreachable) holds the cleanup and pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime

from keyrotation.domain.decision import Rotation
from keyrotation.domain.errors import BadAnswer, WorldError
from keyrotation.domain.events import Happened, Proof
from keyrotation.domain.jwks import Jwks
from keyrotation.domain.keys import Key, KeyRing
from keyrotation.domain.policy import show_instant
from keyrotation.domain.propagation import Answer, Observation, judge
from keyrotation.ports import Environment, Progress, Token

IN_A_ROW = 5  # fresh tokens that must all be right
SURE = 3  # looks in a row that say the key does not work, before it is rolled back
POLL = 0.5  # seconds between two looks
PATIENCE = 10.0  # seconds for an endpoint to come back, a gateway to answer


class _NotYet(Exception):
    """Looks wrong, and may be right in a moment."""


class _Wrong(Exception):
    """The key itself does not work."""


def verify(env: Environment, rotation: Rotation, kid: str, progress: Progress) -> Happened:
    """JWKS and token endpoint, as the public sees them."""
    ring, work = env.keys.look().ring, env.keys.rotation(rotation.id)
    key = ring.find(kid)
    heard = (key.promoted_at or key.created_at) + env.policy.key_cache + env.policy.clock_skew

    def look() -> Happened:
        published = env.identity.published()
        missing = published.jwks.differences(ring.published, ring.compromised)
        if missing:
            raise _NotYet(f"the JWKS is not what the database publishes: {'; '.join(missing)}")
        tokens = [env.identity.fresh_token() for _ in range(IN_A_ROW)]
        for token in tokens:
            _require_new(env, token, kid, heard)
            _require_signature(env, token, published.jwks)
        old = _old_token_verifies(env, rotation, published.jwks)
        return Happened(
            kid,
            f"{len(tokens)} fresh tokens in a row name key {kid} and verify with the JWKS; {old}",
            {"jwks": sorted(published.jwks.kids), "fresh_tokens": len(tokens), "old_kid": work.old_kid},
        )

    return _until_settled(env, rotation, kid, look, heard, progress)


def prove_at_gateways(env: Environment, rotation: Rotation, verified: Happened, progress: Progress) -> Happened:
    """Every gateway takes fresh tokens of the new key, several times in a row, and still knows the old one."""
    kid = verified.kid or ""
    if verified.proof is not Proof.PROVEN:
        return verified
    ring, work = env.keys.look().ring, env.keys.rotation(rotation.id)

    def look() -> Happened:
        if not env.gateways.names:
            return Happened(kid, f"{verified.message}; no gateway is named in gateways.urls, so none was asked", verified.evidence)
        seen: list[Observation] = []
        for _ in range(IN_A_ROW):
            seen += env.gateways.call(env.identity.fresh_token().raw)
        verdict = judge(seen, IN_A_ROW)
        if verdict.refused:
            raise _Wrong(f"fresh tokens of key {kid} are refused by {', '.join(verdict.refused)}: {_said(seen)}")
        if not verdict.everywhere:
            raise _NotYet(verdict.explain())
        old = _old_key_is_known(env, rotation, ring, work.old_kid)
        return Happened(
            kid,
            f"every gateway takes fresh tokens of key {kid}{old} ({', '.join(verdict.accepted)})",
            {**verified.evidence, "gateways": list(verdict.accepted)},
        )

    return _until_settled(env, rotation, kid, look, env.keys.look().now, progress)


def _until_settled(env: Environment, rotation: Rotation, kid: str, look: Callable[[], Happened], heard: datetime, progress: Progress) -> Happened:
    """Looks until it is right, or wrong several times in a row, or patience is over."""
    wrong = 0
    while True:
        env.keys.renew(rotation)
        try:
            return look()
        except _Wrong as error:
            wrong, problem, proof = wrong + 1, str(error), Proof.WRONG
        except (_NotYet, WorldError) as error:
            wrong, problem, proof = 0, str(error), Proof.UNPROVEN
        now = env.keys.look().now
        if wrong >= SURE or (proof is Proof.UNPROVEN and (now - heard).total_seconds() > PATIENCE):
            return Happened(kid, problem, {"seen_until": show_instant(now)}, proof)
        progress(0.5, f"not yet: {problem}")
        env.pause(POLL)


def _require_new(env: Environment, token: Token, kid: str, heard: datetime) -> None:
    if token.kid == kid:
        return
    text = f"a fresh token names key {token.kid} instead of {kid}"
    # Until the identity service's cache has heard, an old kid is no fault.
    raise _NotYet(text) if env.keys.look().now <= heard else _Wrong(text)


def _require_signature(env: Environment, token: Token, jwks: Jwks) -> None:
    try:
        env.identity.verify(token, jwks)
    except BadAnswer as error:
        raise _Wrong(str(error)) from None


def _old_token_verifies(env: Environment, rotation: Rotation, jwks: Jwks) -> str:
    old = env.memory.get(rotation.id)
    if old is None:
        return "the JWKS holds exactly the published keys"
    try:
        env.identity.verify(old, jwks)
    except BadAnswer as error:
        raise _NotYet(f"a token from before the promotion does not verify any more: {error}") from None
    return "a token from before the promotion still verifies"


def _old_key_is_known(env: Environment, rotation: Rotation, ring: KeyRing, old_kid: str | None) -> str:
    """By a token from before the promotion where this process holds one that lives, else by a canary of the old key."""
    old = env.memory.get(rotation.id)
    if old is not None and old.expires_at > env.keys.look().now + env.policy.clock_skew:
        seen = env.gateways.call(old.raw)
    else:
        key: Key | None = next((key for key in ring.keys if key.kid == old_kid), None)
        canaries = env.keys.spend_canaries(rotation, key.kid, 1) if key is not None and env.gateways.can_probe and key.canaries_left else ()
        if not canaries:
            return ""
        seen = env.gateways.probe(canaries)
    verdict = judge(seen)
    if verdict.refused:  # no reason to roll back: the old key would sign what that gateway refuses
        raise _NotYet(f"tokens of the old key {old_kid} are refused by {', '.join(verdict.refused)}: {_said(seen)}")
    if not verdict.everywhere:
        raise _NotYet(verdict.explain())
    return " and still knows the old key"


def _said(seen: Iterable[Observation]) -> str:
    return "; ".join(sorted({observation.said for observation in seen if observation.answer is Answer.REFUSED}))
