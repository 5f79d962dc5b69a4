"""A JWKS as a value: parsed strictly, compared with the keys that it must hold (I4, RFC 7517).

Strict on purpose: what we publish is only ES256 signature keys. Anything else in there is a mistake or an attack, and an operator is told.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from keyrotation.domain.errors import BadAnswer

MAX_OCTETS = 256 * 1024
PRIVATE_MEMBERS = ("d", "p", "q", "dp", "dq", "qi", "oth", "k")
# 256 bits in base64url without padding: the last letter carries four of them, then two that are zero. Another spelling would be another kid.
COORDINATE = re.compile(r"[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]")
# The curve P-256, y² = x³ - 3x + b over the field of that prime (NIST SP 800-186, 3.2.1.3).
FIELD = 2**256 - 2**224 + 2**192 + 2**96 - 1
CURVE_B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B


def thumbprint(jwk: Mapping[str, str]) -> str:
    """RFC 7638 thumbprint of a P-256 public key, base64url without padding."""
    members = json.dumps({"crv": jwk["crv"], "kty": jwk["kty"], "x": jwk["x"], "y": jwk["y"]}, separators=(",", ":"), sort_keys=True)
    return base64.urlsafe_b64encode(hashlib.sha256(members.encode()).digest()).rstrip(b"=").decode()


@dataclass(frozen=True, slots=True)
class Jwks:
    """The public keys by kid, each a JWK of P-256."""

    keys: Mapping[str, Mapping[str, str]]

    @property
    def kids(self) -> frozenset[str]:
        """What it holds."""
        return frozenset(self.keys)

    def differences(self, expected: frozenset[str], compromised: frozenset[str] = frozenset()) -> list[str]:
        """Sentences on what is there and should not be, and the other way round; empty if all is well."""
        said = [f"the compromised key {kid} is still published" for kid in sorted(self.kids & compromised)]
        said += [f"the JWKS holds key {kid}, which the database does not publish" for kid in sorted(self.kids - expected - compromised)]
        said += [f"the JWKS lacks key {kid}" for kid in sorted(expected - self.kids)]
        return said


def parse_jwks(body: bytes) -> Jwks:
    """The JWKS in those octets; raises BadAnswer with the first thing that is wrong with it."""
    if len(body) > MAX_OCTETS:
        raise BadAnswer(f"the JWKS is larger than {MAX_OCTETS // 1024} KiB: this is not the set that we publish")
    try:
        document = json.loads(body)
        entries = document["keys"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise BadAnswer("the JWKS URL does not answer with a JWKS (a JSON object with the member 'keys'): check identity.jwks_url") from None
    if not isinstance(entries, list) or not entries:
        raise BadAnswer("the JWKS is empty: no gateway can verify any token; check the identity service and its database")
    keys: dict[str, Mapping[str, str]] = {}
    for entry in entries:
        kid = _checked(entry)
        if kid in keys:
            raise BadAnswer(f"the JWKS holds the kid {kid} twice: verifiers choose one of them by chance")
        keys[kid] = entry
    return Jwks(keys)


def _checked(entry: object) -> str:
    """The kid of a JWK that is one of ours; raises BadAnswer."""
    if not isinstance(entry, dict) or not isinstance(entry.get("kid"), str) or not entry["kid"]:
        raise BadAnswer("the JWKS holds an entry without a kid")
    kid = entry["kid"][:64]
    leaked = [member for member in PRIVATE_MEMBERS if member in entry]
    if leaked:
        raise BadAnswer(f"the JWKS shows the PRIVATE half of key {kid} (member '{leaked[0]}'): treat the key as compromised and run an emergency rotation")
    if (entry.get("kty"), entry.get("crv")) != ("EC", "P-256") or entry.get("alg") not in ("ES256", None):
        raise BadAnswer(f"the JWKS holds key {kid} of another kind ({_named(entry)}): only ES256 keys are published here")
    if entry.get("use") not in ("sig", None):
        raise BadAnswer(f"the JWKS holds key {kid} for another use than signatures")
    if not _is_on_the_curve(entry.get("x"), entry.get("y")):
        raise BadAnswer(f"the JWKS holds key {kid} with coordinates that are not a P-256 point's")
    if thumbprint(entry) != entry["kid"]:
        raise BadAnswer(f"the JWKS shows another public key under the kid {kid}: a kid is the thumbprint of its key (RFC 7638); find out who changed it")
    return str(entry["kid"])


def _named(entry: Mapping[str, object]) -> str:
    """What kind of key it says it is, for messages: short, whatever stands there."""
    return " ".join(str(entry[member])[:20] for member in ("kty", "crv", "alg") if isinstance(entry.get(member), str))


def _is_on_the_curve(x: object, y: object) -> bool:
    if not (isinstance(x, str) and isinstance(y, str) and COORDINATE.fullmatch(x) and COORDINATE.fullmatch(y)):
        return False
    across, up = (int.from_bytes(base64.urlsafe_b64decode(value + "="), "big") for value in (x, y))
    return max(across, up) < FIELD and (up * up - across**3 + 3 * across - CURVE_B) % FIELD == 0
