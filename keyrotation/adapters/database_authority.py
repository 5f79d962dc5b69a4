"""The authority where we make the keys ourselves: a P-256 pair, canaries signed with it, the private half sealed, the row inserted.

`make_key` is the one place where a private key's plaintext exists, for as long as it takes to sign the canaries and seal it.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from keyrotation.domain.decision import Rotation
from keyrotation.domain.jwks import thumbprint
from keyrotation.domain.propagation import probes_needed
from keyrotation.ports import Gate, KeyStore, NewKey, Sealed, Sealer

CANARY_TYPE = "canary+jwt"
# A sheaf is signed once and must last for the key's life: rounds of proof, of which one rotation takes one or two and an emergency three.
ROUNDS_IN_A_SHEAF = 12
SMALLEST_SHEAF = 32


def sealing_context(environment: str, kid: str) -> bytes:
    """The additional authenticated data that binds a ciphertext to its place (I16). The identity service gives the same to open it."""
    return f"keyrotation:v1:{environment}:{kid}".encode()


@dataclass(frozen=True, slots=True)
class CanaryTerms:
    """What the canaries of a key say: accepted by the probe route alone, dead when the key is."""

    issuer: str
    audience: str
    lifetime: timedelta
    workers: int

    @property
    def count(self) -> int:
        """How many a sheaf holds."""
        return max(SMALLEST_SHEAF, ROUNDS_IN_A_SHEAF * probes_needed(self.workers))


class DatabaseAuthority:
    """Our own hands."""

    def __init__(self, environment: str, keys: KeyStore, sealer: Sealer, canaries: CanaryTerms | None) -> None:
        self._environment, self._keys, self._sealer, self._canaries = environment, keys, sealer, canaries

    def generate(self, rotation: Rotation, reason: str) -> str:
        """Makes, seals and publishes the next key; returns its kid."""
        # The canaries' dates are the database's, as every date (I18). Read before the pair exists: no plaintext waits for a network.
        key = make_key(self._environment, self._sealer.seal, self._canaries, self._keys.look().now)
        self._keys.insert(rotation, key, reason)
        return key.kid

    def promote(self, rotation: Rotation, kid: str, gate: Gate, reason: str) -> None:
        """One transaction."""
        self._keys.promote(rotation, kid, gate, reason)

    def roll_back(self, rotation: Rotation, kid: str, reason: str) -> None:
        """One transaction."""
        self._keys.roll_back(rotation, kid, reason)


def make_key(environment: str, seal: Callable[[bytes, bytes], Sealed], canaries: CanaryTerms | None, now: datetime) -> NewKey:
    """A new pair as a NewKey: public half, sealed private half, canaries."""
    private = ec.generate_private_key(ec.SECP256R1())
    numbers = private.public_key().public_numbers()
    public = {"kty": "EC", "crv": "P-256", "x": _coordinate(numbers.x), "y": _coordinate(numbers.y)}
    kid = thumbprint(public)
    plaintext = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    sealed = seal(plaintext, sealing_context(environment, kid))
    return NewKey(
        kid=kid,
        public_jwk={**public, "kid": kid, "alg": "ES256", "use": "sig"},
        ciphertext=sealed.ciphertext,
        sealed_by=sealed.sealed_by,
        canaries=_sheaf(private, kid, canaries, now) if canaries else (),
    )


def _sheaf(private: ec.EllipticCurvePrivateKey, kid: str, terms: CanaryTerms, now: datetime) -> tuple[str, ...]:
    """Tokens of no power: no subject, scope or client; a type and an audience of their own."""
    claims = {"iss": terms.issuer, "aud": terms.audience, "iat": int(now.timestamp()), "exp": int((now + terms.lifetime).timestamp())}
    return tuple(
        jwt.encode({**claims, "jti": secrets.token_urlsafe(9)}, private, algorithm="ES256", headers={"kid": kid, "typ": CANARY_TYPE})
        for _ in range(terms.count)
    )


def _coordinate(number: int) -> str:
    return base64.urlsafe_b64encode(number.to_bytes(32, "big")).rstrip(b"=").decode()
