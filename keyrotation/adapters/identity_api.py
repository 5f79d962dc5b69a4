"""The identity service as the public and a client see it: JWKS, tokens, clock. And our own strict verifier of its tokens (I25).

The verifier takes ES256 with a key of the configured JWKS and nothing else: headers that name or carry a key are refused, expiry is judged by
the caller against the database's clock (the worker's may be wrong by years, I18).
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt

from keyrotation.connections.http import Answer, exchange, place
from keyrotation.domain.errors import BadAnswer, Denied, Unreachable, WorldError
from keyrotation.domain.jwks import Jwks, parse_jwks
from keyrotation.ports import Dated, Published, Token
from keyrotation.secrets import SecretRef

KEY_BEARING_HEADERS = ("jku", "jwk", "x5u", "x5c", "crit")
COMPACT = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+")  # RFC 7515, 7.1; PyJWT lets padding pass
LONGEST_AGE = 2**31  # seconds, the largest number that a cache need understand (RFC 9111, 1.2.2)


class HttpIdentity:
    """JWKS, token endpoint and Date over HTTP."""

    def __init__(self, jwks_url: str, token_url: str, issuer: str, client_id: str, client_secret: SecretRef, scope: str) -> None:
        self._jwks_url, self._token_url, self._issuer = jwks_url, token_url, issuer
        self._client_id, self._client_secret, self._scope = client_id, client_secret, scope

    def published(self) -> Published:
        """The JWKS and how long a shared cache may keep it; raises BadAnswer where it is not one of ours."""
        answer = exchange("GET", self._jwks_url, headers={"Accept": "application/json"})
        if answer.status != 200:
            raise _not_ok("the JWKS URL", self._jwks_url, answer)
        return Published(parse_jwks(answer.body), _max_age(answer.headers.get("Cache-Control", "")))

    def fresh_token(self) -> Token:
        """A token that was issued just now, not verified yet."""
        answer = exchange(
            "POST",
            self._token_url,
            auth=(self._client_id, self._client_secret.reveal()),
            data={"grant_type": "client_credentials", "scope": self._scope},
            headers={"Accept": "application/json"},
        )
        if answer.status in (400, 401, 403):
            raise Denied(
                f"the token endpoint {place(self._token_url)} refuses the client {self._client_id!r} (HTTP {answer.status}): "
                "check identity.client_id, identity.client_secret and identity.scope"
            )
        if answer.status != 200:
            raise _not_ok("the token endpoint", self._token_url, answer)
        try:
            raw = json.loads(answer.body)["access_token"]
            header, claims = jwt.get_unverified_header(raw), _unverified_claims(raw)
            return Token(str(header["kid"]), _instant(claims["iat"]), _instant(claims["exp"]), raw)
        except (ValueError, KeyError, TypeError, OverflowError, OSError, RecursionError, jwt.PyJWTError):
            raise BadAnswer(f"the token endpoint {place(self._token_url)} does not answer with a JWT that has kid, iat and exp") from None

    def verify(self, token: Token, jwks: Jwks) -> None:
        """Returns if the token is the issuer's, signed ES256 by its kid's key in that JWKS; raises BadAnswer if not."""
        verify(token.raw, jwks, self._issuer)

    def date(self) -> Dated:
        """The identity service's clock."""
        answer = exchange("GET", self._jwks_url)
        if answer.date is None:
            raise BadAnswer(f"{place(self._jwks_url)} answers without a Date header: its clock cannot be compared")
        return Dated("identity service", answer.date, answer.round_trip)


def verify(raw: str, jwks: Jwks, issuer: str) -> None:
    """Our whole verifier, apart from expiry. Raises BadAnswer with the first thing that is wrong."""
    try:
        if not COMPACT.fullmatch(raw):
            raise BadAnswer("a token is not three parts in base64url")
        header = jwt.get_unverified_header(raw)
        kid = str(header.get("kid"))
        if header.get("alg") != "ES256" or any(name in header for name in KEY_BEARING_HEADERS):
            raise BadAnswer("a token names another algorithm than ES256, or brings a key of its own")
        if kid not in jwks.keys:
            raise BadAnswer(f"a token names key {kid[:64]}, which the JWKS does not hold")
        key = jwt.PyJWK({**jwks.keys[kid], "alg": "ES256"})
        jwt.decode(
            raw,
            key,
            algorithms=["ES256"],
            issuer=issuer,
            options={"verify_exp": False, "verify_iat": False, "verify_nbf": False, "verify_aud": False, "require": ["iss", "exp", "iat"]},
        )
    except jwt.InvalidSignatureError:
        raise BadAnswer("a token's signature does not match its key in the JWKS") from None
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
        raise BadAnswer(f"a token does not verify: {error.__class__.__name__}") from None


def _unverified_claims(raw: str) -> dict[str, Any]:
    claims: dict[str, Any] = jwt.decode(
        raw, options={"verify_signature": False, "verify_exp": False, "verify_aud": False, "verify_iat": False, "verify_nbf": False}
    )
    return claims


def _instant(value: Any) -> datetime:
    return datetime.fromtimestamp(float(value), UTC)


def _max_age(cache_control: str) -> timedelta | None:
    """The longest that any cache may serve the answer: the shared ones' own age counts as well, and the time that they may serve it stale (RFC 5861)."""
    if re.search(r"\bno-(store|cache)\b", cache_control, re.IGNORECASE):
        return timedelta(0)
    ages = {name.lower(): min(int(seconds[:11]), LONGEST_AGE) for name, seconds in re.findall(r"([\w-]+)=\"?([0-9]+)", cache_control)}
    fresh = [ages[name] for name in ("max-age", "s-maxage") if name in ages]
    stale = [ages[name] for name in ("stale-while-revalidate", "stale-if-error") if name in ages]
    return timedelta(seconds=max(fresh) + max(stale, default=0)) if fresh else None


def _not_ok(what: str, url: str, answer: Answer) -> WorldError:
    kind = Unreachable if answer.status >= 500 or answer.status == 429 else BadAnswer
    return kind(f"{what} {place(url)} answers HTTP {answer.status} instead of 200")
