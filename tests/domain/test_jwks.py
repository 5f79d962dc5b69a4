"""The JWKS, read strictly (I4, F25, F29): what is not exactly one of our public keys is named, and nothing but BadAnswer ever comes of it."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm

from keyrotation.domain.errors import BadAnswer
from keyrotation.domain.jwks import MAX_OCTETS, PRIVATE_MEMBERS, Jwks, parse_jwks, thumbprint

# RFC 7515, appendix A.3: a P-256 key that everybody can look up.
RFC7515_X, RFC7515_Y = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"


def public_jwk(private: ec.EllipticCurvePrivateKey | None = None) -> dict[str, str]:
    """A JWK as it is published, made by PyJWT and not by us."""
    made: dict[str, str] = json.loads(ECAlgorithm.to_jwk((private or ec.generate_private_key(ec.SECP256R1())).public_key()))
    point = {name: made[name] for name in ("kty", "crv", "x", "y")}
    return {**point, "kid": thumbprint(point), "alg": "ES256", "use": "sig"}


KEY, OTHER = public_jwk(), public_jwk()


def body(*entries: Any, **more: Any) -> bytes:
    return json.dumps({"keys": list(entries), **more}).encode()


def without(name: str) -> dict[str, str]:
    return {member: value for member, value in KEY.items() if member != name}


class TestThumbprint:
    """RFC 7638."""

    def test_f18_the_method_of_the_rfc(self) -> None:
        """The required members in lexicographic order, no blanks, SHA-256, base64url without padding, for a key made by cryptography."""
        text = f'{{"crv":"P-256","kty":"EC","x":"{KEY["x"]}","y":"{KEY["y"]}"}}'
        assert thumbprint(KEY) == base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")

    def test_a_key_that_everybody_can_look_up(self) -> None:
        """RFC 7515's example key, with the thumbprint that other implementations give it."""
        assert thumbprint({"kty": "EC", "crv": "P-256", "x": RFC7515_X, "y": RFC7515_Y}) == "oKIywvGUpTVTyxMQ3bwIIeQUudfr_CkLMjCE19ECD-U"

    def test_other_members_do_not_count(self) -> None:
        """alg, use and kid are no part of it, nor is the order."""
        assert thumbprint(dict(reversed(KEY.items()))) == thumbprint({name: KEY[name] for name in ("kty", "crv", "x", "y")})

    def test_another_point_has_another_thumbprint(self) -> None:
        """x and y are told apart."""
        assert thumbprint(KEY) != thumbprint(OTHER)
        assert thumbprint(KEY) != thumbprint({**KEY, "x": KEY["y"], "y": KEY["x"]})


class TestGood:
    """What is taken."""

    def test_our_own_keys(self) -> None:
        """Two keys, by their kids, with what a verifier needs."""
        jwks = parse_jwks(body(KEY, OTHER))
        assert jwks.kids == {KEY["kid"], OTHER["kid"]}
        assert jwks.keys[KEY["kid"]]["x"] == KEY["x"]

    @pytest.mark.parametrize("name", ["alg", "use"])
    def test_alg_and_use_may_be_left_out(self, name: str) -> None:
        """RFC 7517 has them optional; what is left out says nothing wrong."""
        assert parse_jwks(body(without(name))).kids == {KEY["kid"]}

    def test_unknown_members_are_let_be(self) -> None:
        """RFC 7517, 4 and 5: members that are not understood are ignored."""
        assert parse_jwks(body({**KEY, "x5t": "a", "key_ops": ["verify"]}, issued="today")).kids == {KEY["kid"]}

    def test_the_example_key(self) -> None:
        """RFC 7515's point lies on our curve."""
        point = {"kty": "EC", "crv": "P-256", "x": RFC7515_X, "y": RFC7515_Y}
        assert len(parse_jwks(body({**point, "kid": thumbprint(point)})).kids) == 1


def nested(depth: int) -> bytes:
    return b'{"keys":' + b"[" * depth + b"]" * depth + b"}"


CORPUS: list[tuple[str, bytes, str]] = [
    ("F29: an empty set", body(), "the JWKS is empty"),
    ("F29: keys that are no list", b'{"keys": {}}', "the JWKS is empty"),
    ("F29: a kid twice, for two keys", body(KEY, {**OTHER, "kid": KEY["kid"]}), "another public key under the kid"),
    ("F29: the same key twice", body(KEY, KEY), "twice"),
    ("F29: another key under a known kid", body({**OTHER, "kid": KEY["kid"]}), "another public key under the kid"),
    ("F29: a name of somebody's choice", body({**KEY, "kid": "2026-01"}), "a kid is the thumbprint of its key"),
    *(
        (
            f"F29: the private member {member}",
            body({**KEY, member: "c2VjcmV0"}),
            f"PRIVATE half of key {KEY['kid']} \\(member '{member}'\\): treat the key as compromised",
        )
        for member in PRIVATE_MEMBERS
    ),
    ("F29: a private member that is empty", body({**KEY, "d": None}), "PRIVATE half"),
    ("F29: RSA", body({"kty": "RSA", "kid": "r", "n": "AQAB", "e": "AQAB", "alg": "RS256"}), r"another kind \(RSA RS256\)"),
    ("F29: a shared secret", body({"kty": "oct", "kid": "o", "k": "c2VjcmV0"}), "PRIVATE half of key o"),
    ("F29: a shared secret without its value", body({"kty": "oct", "kid": "o", "alg": "HS256"}), r"another kind \(oct HS256\)"),
    ("F29: Ed25519", body({"kty": "OKP", "crv": "Ed25519", "kid": "e", "x": "A" * 43}), r"another kind \(OKP Ed25519\)"),
    ("another curve", body({**KEY, "crv": "P-384"}), r"another kind \(EC P-384 ES256\)"),
    ("another algorithm on our curve", body({**KEY, "alg": "ECDH-ES"}), r"another kind \(EC P-256 ECDH-ES\)"),
    ("no kind", body(without("kty")), "another kind"),
    ("for encryption", body({**KEY, "use": "enc"}), "for another use than signatures"),
    ("a use that is a list", body({**KEY, "use": ["sig"]}), "for another use than signatures"),
    ("no kid", body(without("kid")), "an entry without a kid"),
    ("an empty kid", body({**KEY, "kid": ""}), "an entry without a kid"),
    ("a kid that is a number", body({**KEY, "kid": 7}), "an entry without a kid"),
    ("an entry that is a text", body("key"), "an entry without a kid"),
    ("an entry that is null", body(None), "an entry without a kid"),
    ("no x", body(without("x")), "coordinates that are not a P-256 point's"),
    ("an x that is a number", body({**KEY, "x": 1}), "coordinates"),
    ("an x that is too short", body({**KEY, "x": KEY["x"][:-1]}), "coordinates"),
    ("an x with padding", body({**KEY, "x": KEY["x"] + "="}), "coordinates"),
    ("an x in the other alphabet", body({**KEY, "x": "+/" + KEY["x"][2:]}), "coordinates"),
    ("an x with octets that base64 decoders skip", body({**KEY, "x": KEY["x"] + "!!!!"}), "coordinates"),
    ("another spelling of the same x", body({**KEY, "x": KEY["x"][:-1] + chr(ord(KEY["x"][-1]) + 1)}), "coordinates"),
    ("a point that is not on the curve", body({**KEY, "y": OTHER["y"]}), "coordinates"),
    ("the point nought", body({**KEY, "x": "A" * 43, "y": "A" * 43}), "coordinates"),
    ("an x beyond the field", body({**KEY, "x": "_" * 42 + "8"}), "coordinates"),
    ("F25: larger than anything we publish", b" " * (MAX_OCTETS + 1), "larger than 256 KiB"),
    ("F25: a page", b"<!doctype html><h1>Welcome", "does not answer with a JWKS"),
    ("F25: nothing", b"", "does not answer with a JWKS"),
    ("F25: null", b"null", "does not answer with a JWKS"),
    ("F25: a list", b"[]", "does not answer with a JWKS"),
    ("F25: a text", b'"keys"', "does not answer with a JWKS"),
    ("F25: another object", b'{"error": "gone"}', "does not answer with a JWKS"),
    ("F25: half an answer", body(KEY)[:-5], "does not answer with a JWKS"),
    ("F25: two answers", body(KEY) * 2, "does not answer with a JWKS"),
    ("F25: octets that are no UTF-8", b'{"keys": ["\xff\xfe"]}', "does not answer with a JWKS"),
    ("F25: a number of a hundred thousand digits", b'{"keys": ' + b"9" * 100_000 + b"}", "does not answer with a JWKS"),
    ("a nesting bomb", nested(100_000), "does not answer with a JWKS"),
    ("a nesting bomb of objects", b'{"keys": [' + b'{"a":' * 30_000 + b"1" + b"}" * 30_000 + b"]}", "does not answer with a JWKS"),
]


class TestBad:
    """What is not taken, and the words for it."""

    @pytest.mark.parametrize(("octets", "words"), [case[1:] for case in CORPUS], ids=[case[0] for case in CORPUS])
    def test_the_corpus(self, octets: bytes, words: str) -> None:
        """Each is refused for its own reason."""
        with pytest.raises(BadAnswer, match=words):
            parse_jwks(octets)

    @pytest.mark.parametrize("depth", range(880, 1000, 8))
    def test_a_bomb_of_every_depth(self, depth: int) -> None:
        """F25: also one that the parser just still takes, whose entry is then shown in words."""
        with pytest.raises(BadAnswer):
            parse_jwks(b'{"keys": [{"kid": "k", "kty": ' + b"[" * depth + b"]" * depth + b"}]}")

    def test_no_private_member_is_quoted(self) -> None:
        """I5: the message names the member, never its value."""
        with pytest.raises(BadAnswer) as refused:
            parse_jwks(body({**KEY, "d": "planted-private-scalar"}))
        assert "planted" not in str(refused.value)

    @pytest.mark.parametrize("name", ["kid", "kty", "crv", "alg", "use"])
    def test_a_message_stays_short(self, name: str) -> None:
        """Whatever stands in an entry, what goes into the ledger and to Slack is a sentence."""
        with pytest.raises(BadAnswer) as refused:
            parse_jwks(body({**KEY, name: "x" * 200_000}))
        assert len(str(refused.value)) < 400

    def test_one_bad_entry_spoils_the_set(self) -> None:
        """A good key beside it changes nothing: somebody else writes into our set."""
        with pytest.raises(BadAnswer):
            parse_jwks(body(KEY, {"kty": "RSA", "kid": "r"}))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.sampled_from(list(KEY.values())),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*KEY, "d", "k", "keys"]) | st.text(max_size=4), inner, max_size=5),
    max_leaves=16,
)
mutants = st.dictionaries(st.sampled_from(list(KEY)), json_values, max_size=3).map(lambda changed: {**KEY, **changed})


class TestAnything:
    """Whatever comes: a set of ours, or BadAnswer."""

    @given(
        st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()) | st.lists(mutants, max_size=3).map(lambda entries: body(*entries))
    )
    def test_nothing_else_is_ever_raised(self, octets: bytes) -> None:
        """I25: any octets, any JSON, any change of a good key."""
        try:
            jwks = parse_jwks(octets)
        except BadAnswer as refused:
            assert len(str(refused)) < 400
        else:
            assert {thumbprint(key) for key in jwks.keys.values()} == jwks.kids
            assert not any(member in key for key in jwks.keys.values() for member in PRIVATE_MEMBERS)


class TestDifferences:
    """What the database publishes against what is served (I4)."""

    def test_the_same_set_differs_in_nothing(self) -> None:
        """No sentence where all is well."""
        assert parse_jwks(body(KEY, OTHER)).differences(frozenset({KEY["kid"], OTHER["kid"]})) == []

    @pytest.mark.parametrize(
        ("sentence", "served", "expected", "compromised", "said"),
        [
            ("one is missing", "a", "ab", "", ["the JWKS lacks key b"]),
            ("one is too many", "ab", "a", "", ["the JWKS holds key b, which the database does not publish"]),
            ("I8: a compromised one is called by its name, once", "ab", "a", "b", ["the compromised key b is still published"]),
            (
                "all at once, the compromised first",
                "bc",
                "a",
                "b",
                ["the compromised key b is still published", "the JWKS holds key c, which the database does not publish", "the JWKS lacks key a"],
            ),
        ],
    )
    def test_stories(self, sentence: str, served: str, expected: str, compromised: str, said: list[str]) -> None:
        """One sentence for each key that is there and should not be, or the other way round."""
        assert Jwks({kid: KEY for kid in served}).differences(frozenset(expected), frozenset(compromised)) == said, sentence
