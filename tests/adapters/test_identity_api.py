"""The identity service from outside: our fetcher against peers that misbehave (F25, F26, F29, F69), our verifier against an attack corpus (I25)."""

from __future__ import annotations

import base64
import gzip
import hashlib
import hmac
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jwt
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keyrotation.adapters.identity_api import KEY_BEARING_HEADERS, HttpIdentity, verify
from keyrotation.connections.http import MAX_OCTETS, exchange
from keyrotation.domain.errors import BadAnswer, Denied, KeyRotationError, SettingsError, Unreachable, WorldError
from keyrotation.domain.jwks import Jwks, parse_jwks, thumbprint
from keyrotation.ports import Token
from keyrotation.secrets import SecretRef

if TYPE_CHECKING:
    from tests.adapters.conftest import Peer

ISSUER, PLANTED = "https://identity.example", "planted-client-s3cret"
SHORT = 0.2  # seconds for a whole exchange, where the peer is never going to finish
Secret = Callable[[str], SecretRef]


def encoded(octets: bytes) -> str:
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()


def a_key(curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve or ec.SECP256R1())


def public_jwk(private: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    numbers = private.public_key().public_numbers()
    point = {"kty": "EC", "crv": "P-256", "x": encoded(numbers.x.to_bytes(32, "big")), "y": encoded(numbers.y.to_bytes(32, "big"))}
    return {**point, "kid": thumbprint(point), "alg": "ES256", "use": "sig"}


KEY, OTHER = a_key(), a_key()
JWK, OTHER_JWK = public_jwk(KEY), public_jwk(OTHER)
KID = JWK["kid"]
JWKS_BODY = json.dumps({"keys": [JWK]}).encode()
JWKS = parse_jwks(JWKS_BODY)
CLAIMS: dict[str, Any] = {"iss": ISSUER, "aud": "api", "iat": 1767668400, "exp": 1767672000}
HEADER = {"alg": "ES256", "kid": KID, "typ": "at+jwt"}


def es256(signing_input: bytes, key: ec.EllipticCurvePrivateKey = KEY, size: int = 32) -> bytes:
    r, s = decode_dss_signature(key.sign(signing_input, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(size, "big") + s.to_bytes(size, "big")


def token(header: Any = None, claims: Any = None, sign: Callable[[bytes], bytes] = es256) -> str:
    """A token with exactly this header and these claims, signed by that function: a library would refuse to make most of these."""
    parts = [encoded(json.dumps(HEADER if header is None else header).encode()), encoded(json.dumps(CLAIMS if claims is None else claims).encode())]
    signing_input = ".".join(parts).encode()
    return f"{signing_input.decode()}.{encoded(sign(signing_input))}"


def shared_secret(name: str, secret: bytes) -> Callable[[bytes], bytes]:
    return lambda signing_input: hmac.new(secret, signing_input, name).digest()


PEM = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
DER = KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
GOOD = token()
HEAD, PAYLOAD, SIGNATURE = GOOD.split(".")
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
ENDPOINT = "http://127.0.0.1:1/evil"

ATTACKS: list[tuple[str, Any]] = [
    ("alg none, without a signature", token({**HEADER, "alg": "none"}, sign=lambda _: b"")),
    ("alg none, with our signature", token({**HEADER, "alg": "none"})),
    ("alg None in other letters", token({**HEADER, "alg": "nOnE"}, sign=lambda _: b"")),
    ("an empty alg", token({**HEADER, "alg": ""}, sign=lambda _: b"")),
    ("no alg", token({"kid": KID})),
    ("alg in small letters", token({**HEADER, "alg": "es256"})),
    ("a list of algs", token({**HEADER, "alg": ["ES256"]})),
    ("HS256 with the public key's PEM as the secret", token({**HEADER, "alg": "HS256"}, sign=shared_secret("sha256", PEM))),
    ("HS256 with the public key's DER as the secret", token({**HEADER, "alg": "HS256"}, sign=shared_secret("sha256", DER))),
    ("HS256 with the JWK as the secret", token({**HEADER, "alg": "HS256"}, sign=shared_secret("sha256", json.dumps(JWK).encode()))),
    ("HS256 with an empty secret", token({**HEADER, "alg": "HS256"}, sign=shared_secret("sha256", b""))),
    ("HS512", token({**HEADER, "alg": "HS512"}, sign=shared_secret("sha512", PEM))),
    ("ES256 that is a HMAC", token(sign=lambda signing_input: shared_secret("sha512", PEM)(signing_input))),
    ("RS256", token({**HEADER, "alg": "RS256"})),
    ("ES384 with our key", token({**HEADER, "alg": "ES384"})),
    ("jku", token({**HEADER, "jku": ENDPOINT})),
    ("jku and a signature of the key that lies there", token({**HEADER, "jku": ENDPOINT}, sign=lambda signing_input: es256(signing_input, OTHER))),
    ("jwk, signed by the key that it brings", token({**HEADER, "jwk": OTHER_JWK}, sign=lambda signing_input: es256(signing_input, OTHER))),
    ("jwk, the right one", token({**HEADER, "jwk": JWK})),
    ("x5u", token({**HEADER, "x5u": ENDPOINT})),
    ("x5c", token({**HEADER, "x5c": [base64.b64encode(DER).decode()]})),
    ("crit with something that must be understood", token({**HEADER, "crit": ["exp"], "exp": 1})),
    ("an empty crit", token({**HEADER, "crit": []})),
    ("crit and an unencoded payload", token({**HEADER, "crit": ["b64"], "b64": False})),
    ("an unencoded payload", token({**HEADER, "b64": False})),
    ("a kid that the JWKS does not hold", token({**HEADER, "kid": OTHER_JWK["kid"]}, sign=lambda signing_input: es256(signing_input, OTHER))),
    ("no kid", token({"alg": "ES256"})),
    ("a kid that is null", token({**HEADER, "kid": None})),
    ("a kid that is a list", token({**HEADER, "kid": [KID]})),
    ("a kid that is a path", token({**HEADER, "kid": "../../../../dev/null"})),
    ("a kid that is SQL", token({**HEADER, "kid": "' UNION SELECT 'a"})),
    ("our kid in other letters", token({**HEADER, "kid": KID.swapcase()})),
    ("our kid with a blank", token({**HEADER, "kid": f"{KID} "})),
    ("another key's signature under our kid", token(sign=lambda signing_input: es256(signing_input, OTHER))),
    ("another issuer", token(claims={**CLAIMS, "iss": "https://evil.example"})),
    ("an issuer that begins like ours", token(claims={**CLAIMS, "iss": f"{ISSUER}.evil.example"})),
    ("our issuer with a slash", token(claims={**CLAIMS, "iss": f"{ISSUER}/"})),
    ("a list of issuers, ours among them", token(claims={**CLAIMS, "iss": [ISSUER]})),
    ("no issuer", token(claims={name: value for name, value in CLAIMS.items() if name != "iss"})),
    ("no expiry", token(claims={name: value for name, value in CLAIMS.items() if name != "exp"})),
    ("no instant of issue", token(claims={name: value for name, value in CLAIMS.items() if name != "iat"})),
    ("claims that are a list", token(claims=[CLAIMS])),
    ("claims that are a text", token(claims=ISSUER)),
    ("a header that is a list", token([HEADER])),
    ("no signature", f"{HEAD}.{PAYLOAD}."),
    ("two parts", f"{HEAD}.{PAYLOAD}"),
    ("four parts", f"{GOOD}.{SIGNATURE}"),
    ("five parts, as of an encrypted token", f"{HEAD}.{PAYLOAD}.{SIGNATURE}.{SIGNATURE}.{SIGNATURE}"),
    ("a signature cut by an octet", token(sign=lambda signing_input: es256(signing_input)[:-1])),
    ("a signature cut to r", token(sign=lambda signing_input: es256(signing_input)[:32])),
    ("a signature with an octet more", token(sign=lambda signing_input: es256(signing_input) + b"\0")),
    ("a signature with an octet before", token(sign=lambda signing_input: b"\0" + es256(signing_input))),
    ("a signature twice", token(sign=lambda signing_input: es256(signing_input) * 2)),
    ("a signature in DER", token(sign=lambda signing_input: KEY.sign(signing_input, ec.ECDSA(hashes.SHA256())))),
    ("r and s exchanged", token(sign=lambda signing_input: es256(signing_input)[32:] + es256(signing_input)[:32])),
    ("r and s nought (CVE-2022-21449)", token(sign=lambda _: bytes(64))),
    ("r and s the group's order", token(sign=lambda _: ORDER.to_bytes(32, "big") * 2)),
    ("r and s one", token(sign=lambda _: (1).to_bytes(32, "big") * 2)),
    ("a signature on P-384", token(sign=lambda signing_input: es256(signing_input, a_key(ec.SECP384R1()), 48))),
    ("a signature on P-521", token(sign=lambda signing_input: es256(signing_input, a_key(ec.SECP521R1()), 66))),
    ("a signature on secp256k1", token(sign=lambda signing_input: es256(signing_input, a_key(ec.SECP256K1())))),
    (
        "SHA-384 under ES256",
        token(
            sign=lambda signing_input: b"".join(part.to_bytes(32, "big") for part in decode_dss_signature(KEY.sign(signing_input, ec.ECDSA(hashes.SHA384()))))
        ),
    ),
    ("a longer payload under the signature", f"{HEAD}.{encoded(json.dumps({**CLAIMS, 'admin': True}).encode())}.{SIGNATURE}"),
    ("a newline at the end", f"{GOOD}\n"),
    ("padding", f"{GOOD}=="),
    ("octets that base64 decoders skip", f"{HEAD}.{PAYLOAD}.{SIGNATURE[:20]}!!!!{SIGNATURE[20:]}"),
    ("a blank before", f" {GOOD}"),
    ("a Bearer before", f"Bearer {GOOD}"),
    ("a nesting bomb in the header", ".".join([encoded(b'{"a":' * 100_000), PAYLOAD, SIGNATURE])),
    ("a header that just nests", ".".join([encoded(b"[" * 5000 + b"]" * 5000), PAYLOAD, SIGNATURE])),
    ("nothing", ""),
    ("dots", ".."),
    ("octets that are no text", "\ud800"),
    ("null", None),
    ("a number", 5),
]


class TestVerify:
    """I25: ES256 with a key of the configured JWKS, and nothing else."""

    def test_our_own_token(self) -> None:
        """The corpus is made by changing this one, which is accepted."""
        verify(GOOD, JWKS, ISSUER)

    def test_a_token_that_a_library_made(self) -> None:
        """PyJWT's signature, as the identity service makes it."""
        verify(jwt.encode(CLAIMS, KEY, algorithm="ES256", headers={"kid": KID}), JWKS, ISSUER)

    @pytest.mark.parametrize("raw", [case[1] for case in ATTACKS], ids=[case[0] for case in ATTACKS])
    def test_i25_the_attack_corpus(self, raw: Any) -> None:
        """Each is refused in words that quote nothing of the token but a kid's beginning."""
        with pytest.raises(BadAnswer) as refused:
            verify(raw, JWKS, ISSUER)
        assert SIGNATURE not in str(refused.value)
        assert len(str(refused.value)) < 200

    def test_i25_nothing_is_fetched_for_a_token(self, peer: Peer) -> None:
        """A URL in a header is never asked, whatever it is called."""
        for name in ("jku", "x5u", "url", "iss"):
            with pytest.raises(BadAnswer):
                verify(token({**HEADER, name: peer.url, "kid": "unknown"}), JWKS, ISSUER)
        assert peer.connections == 0

    @pytest.mark.parametrize("name", KEY_BEARING_HEADERS)
    def test_i25_a_header_that_brings_a_key_is_refused_whatever_is_in_it(self, name: str) -> None:
        """Also null, and also where the signature is right."""
        for value in (None, "", [], {}):
            with pytest.raises(BadAnswer):
                verify(token({**HEADER, name: value}), JWKS, ISSUER)

    @pytest.mark.parametrize(
        ("sentence", "claims"),
        [
            ("F37: a token of a clock that is ahead", {"iat": 4102444800, "nbf": 4102444800, "exp": 4102448400}),
            ("a token that expired long ago", {"iat": 1, "exp": 2}),
        ],
    )
    def test_f37_time_is_no_matter_of_the_signature(self, sentence: str, claims: dict[str, int]) -> None:
        """iat, nbf and exp are judged by the caller against the database's clock, never by the worker's (I18)."""
        verify(token(claims={**CLAIMS, **claims}), JWKS, ISSUER)

    def test_a_wrong_signature_says_so_and_not_something_else(self) -> None:
        """F37: what rolls back is told apart from all the rest by its words."""
        with pytest.raises(BadAnswer, match="a token's signature does not match its key in the JWKS"):
            verify(token(sign=lambda signing_input: es256(signing_input, OTHER)), JWKS, ISSUER)

    def test_a_key_of_the_jwks_is_used_for_its_own_kid_alone(self) -> None:
        """Two keys published: one's signature under the other's kid is refused, each one's own is not."""
        both = parse_jwks(json.dumps({"keys": [JWK, OTHER_JWK]}).encode())
        verify(token({**HEADER, "kid": OTHER_JWK["kid"]}, sign=lambda signing_input: es256(signing_input, OTHER)), both, ISSUER)
        with pytest.raises(BadAnswer):
            verify(token({**HEADER, "kid": OTHER_JWK["kid"]}), both, ISSUER)

    def test_an_empty_set_verifies_nothing(self) -> None:
        """No key, no token."""
        with pytest.raises(BadAnswer, match="which the JWKS does not hold"):
            verify(GOOD, Jwks({}), ISSUER)

    @settings(deadline=None, max_examples=150)
    @given(st.integers(0, len(GOOD) - 1), st.characters(exclude_categories=["Cs"]))
    def test_i25_no_letter_of_a_token_can_be_changed(self, at: int, letter: str) -> None:
        """Any other letter at any place: BadAnswer, and nothing else."""
        changed = GOOD[:at] + letter + GOOD[at + 1 :]
        if changed != GOOD:
            with pytest.raises(BadAnswer):
                verify(changed, JWKS, ISSUER)

    @settings(deadline=None, max_examples=100)
    @given(st.text(max_size=60) | st.lists(st.binary(max_size=20).map(encoded), max_size=4).map(".".join))
    def test_i25_any_text_is_refused(self, raw: str) -> None:
        """Noise never passes, and never raises anything but BadAnswer."""
        with pytest.raises(BadAnswer):
            verify(raw, JWKS, ISSUER)


@pytest.fixture
def identity(peer: Peer, secret: Secret) -> HttpIdentity:
    return HttpIdentity(f"{peer.url}/jwks", f"{peer.url}/token", ISSUER, "the-client", secret(PLANTED), "api")


class TestPublished:
    """The JWKS, fetched."""

    def test_a_set_of_ours(self, peer: Peer, identity: HttpIdentity) -> None:
        """Parsed, with the time that a shared cache may keep it."""
        peer.says(200, JWKS_BODY, headers={"Cache-Control": "public, max-age=300"})
        published = identity.published()
        assert (published.jwks.kids, published.max_age) == ({KID}, timedelta(minutes=5))
        assert [(asked.method, asked.path) for asked in peer.asked] == [("GET", "/jwks")]

    @pytest.mark.parametrize(
        ("cache_control", "seconds"),
        [
            ("max-age=300", 300),
            ("public, max-age=300, must-revalidate", 300),
            ('max-age="300"', 300),
            ("Max-Age=300", 300),
            ("max-age=0", 0),
            ("no-store", 0),
            ("no-store, max-age=300", 0),
            ("No-Cache", 0),
            ("", None),
            ("public", None),
            ("max-age", None),
            ("max-age=", None),
            ("max-age=-1", None),
            ("max-age=x", None),
            ("x-max-age=5", None),
            ("max-age=60, s-maxage=3600", 3600),
            ("s-maxage=60, max-age=3600", 3600),
            ("max-age=60, stale-while-revalidate=30, stale-if-error=90", 150),
            ("max-age=99999999999999999999999999", 2**31),
            ("stale-while-revalidate=30", None),
        ],
    )
    def test_f28_the_max_age(self, peer: Peer, identity: HttpIdentity, cache_control: str, seconds: int | None) -> None:
        """The longest that any cache may serve it (RFC 9111, 5861): in any letters, the shared caches' own as well, and none that nobody said."""
        peer.says(200, JWKS_BODY, headers={"Cache-Control": cache_control})
        assert identity.published().max_age == (None if seconds is None else timedelta(seconds=seconds))

    def test_f28_no_header_is_no_max_age(self, peer: Peer, identity: HttpIdentity) -> None:
        """Then the limit counts, and not nought."""
        peer.says(200, JWKS_BODY)
        assert identity.published().max_age is None

    @pytest.mark.parametrize(
        ("sentence", "status", "body", "error", "words"),
        [
            ("F25: a page", 200, b"<!doctype html><h1>Welcome", BadAnswer, "does not answer with a JWKS"),
            ("F25: nothing", 200, b"", BadAnswer, "does not answer with a JWKS"),
            ("F25: larger than anything that we publish", 200, b" " * (MAX_OCTETS + 1), BadAnswer, "more than 256 KiB"),
            ("F29: empty", 200, b'{"keys": []}', BadAnswer, "the JWKS is empty"),
            ("F29: a kid twice", 200, json.dumps({"keys": [JWK, JWK]}).encode(), BadAnswer, "twice"),
            (
                "F29: another key under a known kid",
                200,
                json.dumps({"keys": [{**OTHER_JWK, "kid": KID}]}).encode(),
                BadAnswer,
                "another public key under the kid",
            ),
            ("F29: a private half", 200, json.dumps({"keys": [{**JWK, "d": "AAAA"}]}).encode(), BadAnswer, "run an emergency rotation"),
            ("not there", 404, JWKS_BODY, BadAnswer, "HTTP 404 instead of 200"),
            ("not allowed", 403, JWKS_BODY, BadAnswer, "HTTP 403 instead of 200"),
            ("another success", 206, JWKS_BODY, BadAnswer, "HTTP 206 instead of 200"),
            ("F70: too often", 429, JWKS_BODY, Unreachable, "HTTP 429 instead of 200"),
            ("broken", 500, JWKS_BODY, Unreachable, "HTTP 500 instead of 200"),
            ("away", 503, JWKS_BODY, Unreachable, "HTTP 503 instead of 200"),
        ],
    )
    def test_stories(self, peer: Peer, identity: HttpIdentity, sentence: str, status: int, body: bytes, error: type[WorldError], words: str) -> None:
        """What may pass is retryable, what a person has to mend is not."""
        peer.says(status, body)
        with pytest.raises(WorldError, match=words) as raised:
            identity.published()
        assert (type(raised.value), raised.value.retryable) == (error, error is Unreachable), sentence

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_f69_a_redirect_is_not_followed(self, identity: HttpIdentity, peer: Peer, make_peer: Callable[[], Peer], status: int) -> None:
        """What answers elsewhere proves nothing: it is not even asked."""
        elsewhere = make_peer()
        elsewhere.says(200, JWKS_BODY)
        peer.says(status, JWKS_BODY, headers={"Location": f"{elsewhere.url}/jwks"})
        with pytest.raises(BadAnswer, match="answers with a redirect, which is not followed: configure the final URL"):
            identity.published()
        assert elsewhere.connections == 0

    @pytest.mark.parametrize("location", ["file:///etc/passwd", "http://169.254.169.254/latest/meta-data/", "gopher://x", ""])
    def test_f69_nor_to_other_places(self, identity: HttpIdentity, peer: Peer, location: str) -> None:
        """A file, a cloud's metadata, nowhere: the same words."""
        peer.says(302, b"", headers={"Location": location})
        with pytest.raises(BadAnswer, match="redirect"):
            identity.published()


def answer(raw: Any) -> bytes:
    return json.dumps({"access_token": raw, "token_type": "Bearer"}).encode()


class TestFreshToken:
    """The token endpoint."""

    def test_a_token(self, peer: Peer, identity: HttpIdentity) -> None:
        """Asked for by POST with HTTP Basic and the client credentials grant; kid, iat and exp are read, the token is not shown."""
        peer.says(200, answer(GOOD))
        fresh = identity.fresh_token()
        assert (fresh.kid, fresh.issued_at, fresh.lifetime) == (KID, datetime.fromtimestamp(CLAIMS["iat"], UTC), timedelta(hours=1))
        assert GOOD not in repr(fresh)
        (asked,) = peer.asked
        assert (asked.method, asked.path, asked.body) == ("POST", "/token", b"grant_type=client_credentials&scope=api")
        assert base64.b64decode(asked.headers["Authorization"].removeprefix("Basic ")).decode() == f"the-client:{PLANTED}"
        identity.verify(fresh, JWKS)

    @pytest.mark.parametrize("status", [400, 401, 403])
    def test_a_refused_client_is_told_what_to_mend(self, peer: Peer, identity: HttpIdentity, status: int) -> None:
        """Denied, with the client's name and the settings to check, and without its secret."""
        peer.says(status, json.dumps({"error": "invalid_client", "error_description": PLANTED}))
        with pytest.raises(
            Denied, match=rf"refuses the client 'the-client' \(HTTP {status}\): check identity\.client_id, identity\.client_secret and identity\.scope"
        ) as refused:
            identity.fresh_token()
        assert PLANTED not in str(refused.value)
        assert not refused.value.retryable

    @pytest.mark.parametrize(
        ("sentence", "status", "body", "error", "words"),
        [
            ("F70: a limit on the rate", 429, b"", Unreachable, "HTTP 429 instead of 200"),
            ("broken", 500, b"", Unreachable, "HTTP 500 instead of 200"),
            ("away", 503, b"", Unreachable, "HTTP 503 instead of 200"),
            ("moved for good", 404, b"", BadAnswer, "HTTP 404 instead of 200"),
            ("F25: a page", 200, b"<html>", BadAnswer, "does not answer with a JWT"),
            ("F25: a list", 200, b"[]", BadAnswer, "does not answer with a JWT"),
            ("F25: null", 200, b"null", BadAnswer, "does not answer with a JWT"),
            ("F25: no token", 200, b"{}", BadAnswer, "does not answer with a JWT"),
            ("F25: a token that is none", 200, answer("opaque"), BadAnswer, "does not answer with a JWT"),
            ("F25: a token that is a number", 200, answer(5), BadAnswer, "does not answer with a JWT"),
            ("F25: a token that is null", 200, answer(None), BadAnswer, "does not answer with a JWT"),
            ("F25: a nesting bomb", 200, b"[" * 100_000, BadAnswer, "does not answer with a JWT"),
            ("F25: too large", 200, b"x" * (MAX_OCTETS + 1), BadAnswer, "more than 256 KiB"),
            ("no kid", 200, answer(token({"alg": "ES256"})), BadAnswer, "that has kid, iat and exp"),
            *(
                (f"{name} {value}", 200, answer(token(claims={**CLAIMS, name: value})), BadAnswer, "that has kid, iat and exp")
                for name in ("iat", "exp")
                for value in (None, "soon", [], 1e17, 1e18, 1e300, -1e18, float("nan"), float("inf"), 10**400)
            ),
        ],
    )
    def test_stories(self, peer: Peer, identity: HttpIdentity, sentence: str, status: int, body: bytes, error: type[WorldError], words: str) -> None:
        """Whatever comes, it is said in words that quote none of it."""
        peer.says(status, body)
        with pytest.raises(WorldError, match=words) as raised:
            identity.fresh_token()
        assert type(raised.value) is error, sentence
        assert PLANTED not in str(raised.value)

    def test_f69_the_clients_secret_does_not_follow_a_redirect(self, identity: HttpIdentity, peer: Peer, make_peer: Callable[[], Peer]) -> None:
        """307 would send it along, by POST: nobody else is asked."""
        elsewhere = make_peer()
        peer.says(307, b"", headers={"Location": f"{elsewhere.url}/token"})
        with pytest.raises(BadAnswer, match="redirect"):
            identity.fresh_token()
        assert elsewhere.connections == 0

    def test_a_secret_that_leads_nowhere_asks_nobody(self, peer: Peer, tmp_path: Path) -> None:
        """The reference is named, and no request is made."""
        identity = HttpIdentity(peer.url, peer.url, ISSUER, "the-client", SecretRef("file", str(tmp_path / "gone")), "api")
        with pytest.raises(SettingsError, match="gone cannot be read"):
            identity.fresh_token()
        assert peer.connections == 0

    def test_f24_a_renewed_secret_is_taken_at_the_next_token(self, peer: Peer, secret: Secret) -> None:
        """The reference is followed at each use."""
        reference = secret("first")
        identity = HttpIdentity(peer.url, peer.url, ISSUER, "the-client", reference, "api")
        peer.says(200, answer(GOOD))
        identity.fresh_token()
        Path(reference.place).write_text("second")
        identity.fresh_token()
        assert [base64.b64decode(asked.headers["Authorization"][6:]).decode() for asked in peer.asked] == ["the-client:first", "the-client:second"]

    def test_a_secret_with_any_letters_is_sent_as_utf8(self, peer: Peer, secret: Secret) -> None:
        """RFC 7617: a client's secret may hold a €, a colon and a percent sign."""
        peer.says(200, answer(GOOD))
        HttpIdentity(peer.url, peer.url, ISSUER, "the-client", secret("p€ss:w%rd"), "api").fresh_token()
        assert base64.b64decode(peer.asked[0].headers["Authorization"][6:]) == "the-client:p€ss:w%rd".encode()


class TestDate:
    """The identity service's clock."""

    @pytest.mark.parametrize(
        "told", ["Tue, 06 Jan 2026 03:00:00 GMT", "Tue, 06 Jan 2026 03:00:00 -0000", "Tue, 06 Jan 2026 04:00:00 +0100", "Tuesday, 06-Jan-26 03:00:00 GMT"]
    )
    def test_it_is_read_from_the_date_header(self, peer: Peer, identity: HttpIdentity, told: str) -> None:
        """In UTC, and aware of it, in every form that HTTP has known."""
        peer.says(200, JWKS_BODY, date=told)
        dated = identity.date()
        assert (dated.name, dated.date) == ("identity service", datetime(2026, 1, 6, 3, tzinfo=UTC))
        assert dated.round_trip > timedelta(0)

    @pytest.mark.parametrize(
        "told", [None, "", "yesterday", "0", "Tue, 32 Jan 2026 03:00:00 GMT", "Tue, 06 Jan 2026 03:00:00 +9999999999999999", "Tue, 06 Jan 999999 03:00:00 GMT"]
    )
    def test_a_clock_that_cannot_be_read_is_not_guessed(self, peer: Peer, identity: HttpIdentity, told: str | None) -> None:
        """No Date, or one that is none: BadAnswer."""
        peer.says(200, JWKS_BODY, date=told)
        with pytest.raises(BadAnswer, match="without a Date header: its clock cannot be compared"):
            identity.date()

    def test_an_error_page_tells_the_time_as_well(self, peer: Peer, identity: HttpIdentity) -> None:
        """The status is not what was asked for."""
        peer.says(503, b"away")
        assert identity.date().date == datetime(2026, 1, 6, 3, tzinfo=UTC)


class TestExchange:
    """One exchange: bounded in time and size, a connection of its own."""

    @pytest.mark.parametrize("what", ["headers", "body"])
    def test_f26_a_peer_that_drips_meets_the_deadline(self, peer: Peer, what: Any) -> None:
        """An octet at a time, each well within the timeout of a read: the whole exchange has one deadline."""
        peer.says(drip=what)
        with pytest.raises(Unreachable, match="did not finish its answer within 0.2 s") as raised:
            exchange("GET", peer.url, timeout=SHORT)
        assert raised.value.retryable

    def test_f26_a_peer_that_says_nothing(self, peer: Peer) -> None:
        """It takes the request, and keeps still."""
        peer.answers = lambda asked: (peer.over.wait(), asked)[1]  # type: ignore[return-value]
        with pytest.raises(Unreachable, match="did not answer within 0.2 s"):
            exchange("GET", peer.url, timeout=SHORT)

    def test_a_peer_that_hangs_up(self, peer: Peer) -> None:
        """Without an answer, or in the middle of one: unreachable, and not an empty answer."""
        peer.says(cut=True)
        with pytest.raises(Unreachable, match="does not answer"):
            exchange("GET", peer.url)
        peer.says(200, b"half", headers={"Content-Length": "8", "Connection": "close"})
        with pytest.raises(Unreachable):
            exchange("GET", peer.url, timeout=SHORT)

    def test_a_peer_that_is_not_there(self, peer: Peer) -> None:
        """A closed port: unreachable, and what to check."""
        peer.stop()
        with pytest.raises(Unreachable, match="check that it runs and may be reached from here"):
            exchange("GET", peer.url)

    def test_f25_an_answer_that_grows_when_it_is_unpacked(self, peer: Peer) -> None:
        """A few KiB of gzip that hold megabytes are too large."""
        peer.says(200, gzip.compress(bytes(8 * 1024 * 1024)), headers={"Content-Encoding": "gzip"})
        with pytest.raises(BadAnswer, match="more than 256 KiB"):
            exchange("GET", peer.url)

    def test_an_answer_of_just_the_limit_is_taken(self, peer: Peer) -> None:
        """The limit is the last size that passes."""
        peer.says(200, b"x" * MAX_OCTETS)
        assert len(exchange("GET", peer.url).body) == MAX_OCTETS

    def test_f69_a_file_is_no_peer(self, tmp_path: Path) -> None:
        """Another scheme is refused, whatever lies there."""
        (tmp_path / "jwks").write_bytes(JWKS_BODY)
        with pytest.raises(WorldError):
            exchange("GET", f"file://{tmp_path}/jwks")

    def test_each_exchange_has_a_connection_of_its_own(self, peer: Peer) -> None:
        """Behind a load balancer each may reach another replica."""
        for _ in range(4):
            exchange("GET", peer.url)
        assert peer.connections == 4

    def test_no_netrc_replaces_our_credentials(self, peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A line for that host in somebody's ~/.netrc is neither sent nor put in the place of our token."""
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password planted\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        exchange("GET", peer.url, headers={"Authorization": "Bearer ours"})
        exchange("GET", peer.url)
        assert [asked.headers.get("Authorization") for asked in peer.asked] == ["Bearer ours", None]

    @pytest.mark.parametrize("planted", ["planted\nInjected: yes", "planted\r\n", "plant€d"])
    def test_i05_a_secret_that_no_header_can_carry_is_not_quoted(self, peer: Peer, planted: str) -> None:
        """A newline or a € in an admin token: an error of ours, without it, and nothing is injected."""
        with pytest.raises(KeyRotationError) as raised:
            exchange("GET", peer.url, headers={"Authorization": f"Bearer {planted}"})
        assert "plant" not in f"{raised.value} {raised.value!r} {raised.value.__cause__!r} {raised.value.__context__!r}"
        assert all("Injected" not in asked.headers for asked in peer.asked)

    def test_a_message_shows_no_query_and_no_user(self, peer: Peer) -> None:
        """Scheme, host, port and path are enough to find a peer."""
        peer.says(302, b"")
        with pytest.raises(BadAnswer) as raised:
            exchange("GET", f"{peer.url}/path?token=planted")
        assert f"{peer.url}/path answers" in str(raised.value)
        assert "planted" not in str(raised.value)

    @settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.binary(max_size=300))
    def test_whatever_a_peer_says_the_fetcher_answers_in_our_words(self, peer: Peer, identity: HttpIdentity, octets: bytes) -> None:
        """Any octets as a JWKS and as a token: BadAnswer."""
        peer.says(200, octets)
        for ask in (identity.published, identity.fresh_token):
            with pytest.raises(BadAnswer):
                ask()


def test_a_token_keeps_its_secret() -> None:
    """I5: neither repr nor str shows the raw token."""
    instant = datetime(2026, 1, 6, tzinfo=UTC)
    assert "planted" not in f"{Token('kid', instant, instant, 'planted')} {Token('kid', instant, instant, 'planted')!r}"


def test_the_digest_of_the_corpus_is_the_thumbprints() -> None:
    """The kid under which the corpus is signed is the RFC 7638 thumbprint of its key."""
    members = f'{{"crv":"P-256","kty":"EC","x":"{JWK["x"]}","y":"{JWK["y"]}"}}'
    assert encoded(hashlib.sha256(members.encode()).digest()) == KID
