"""The ladder: a push to a real Envoy, a webhook and a nudge to peers that look closely."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jwt
import pytest
import requests
from cryptography.hazmat.primitives.asymmetric import ec

from keyrotation.adapters.refresh import Nudge, Push, Webhook
from keyrotation.domain.errors import BadAnswer, Denied, Unreachable, WorldError
from keyrotation.secrets import SecretRef
from sandbox.envoy import Gateway
from sandbox.processes import free_port

if TYPE_CHECKING:
    from tests.contract.conftest import Peer

ISSUER, API, CANARY = "https://identity.test", "api", "canary"
PATIENCE = 10.0


class SigningKey:
    """A P-256 pair under a kid."""

    def __init__(self, kid: str) -> None:
        self._kid, self._private = kid, ec.generate_private_key(ec.SECP256R1())

    def jwk(self) -> dict[str, Any]:
        public = jwt.algorithms.ECAlgorithm.to_jwk(self._private.public_key(), as_dict=True)
        return {**public, "kid": self._kid, "alg": "ES256", "use": "sig"}

    def token(self) -> str:
        claims = {"iss": ISSUER, "aud": API, "exp": int(time.time()) + 300}
        return jwt.encode(claims, self._private, "ES256", headers={"kid": self._kid})


@pytest.fixture
def publish(peer: Peer) -> Callable[..., None]:
    """Makes the peer a JWKS endpoint with these keys."""
    return lambda *keys: peer.says({"body": json.dumps({"keys": [key.jwk() for key in keys]}).encode()})


@pytest.fixture
def old(publish: Callable[..., None]) -> SigningKey:
    """The key that is published when the gateway starts."""
    key = SigningKey("old")
    publish(key)
    return key


@pytest.fixture(params=["sync", "async"])
def gateway(request: pytest.FixtureRequest, peer: Peer, old: SigningKey, tmp_path: Path) -> Iterator[Gateway]:
    """A real Envoy that would keep a JWKS for ten minutes, and a token that it has seen until that expires."""
    ports = free_port(), free_port()
    envoy = Gateway(tmp_path, "envoy", *ports, f"{peer.url}/jwks?tenant=1", ISSUER, API, CANARY, 600, request.param, workers=1, jwt_cache=True)
    envoy.start()
    yield envoy
    envoy.stop()


def status(gateway: Gateway, token: str) -> int:
    """What the API route answers that token."""
    return requests.get(gateway.url, headers={"Authorization": f"Bearer {token}"}, timeout=5).status_code


def soon(holds: Callable[[], bool]) -> bool:
    """Whether it comes true: Envoy tells nobody when it has taken a file."""
    until, pause = time.monotonic() + PATIENCE, threading.Event()
    while not (held := holds()) and time.monotonic() < until:
        pause.wait(0.01)
    return held


class TestPush:
    """Envoy's file is changed, and its caches are empty."""

    def test_a_removed_key_is_refused_and_a_new_one_known(self, gateway: Gateway, old: SigningKey, publish: Callable[..., None]) -> None:
        """What ten minutes would have done, a push does at once: also for a token that the gateway has seen."""
        new, token = SigningKey("new"), old.token()
        assert status(gateway, token) == 200
        publish(new)
        assert status(gateway, token) == 200
        told = Push([gateway.url], [gateway.ecds_file]).refresh([gateway.url])
        assert soon(lambda: status(gateway, token) == 401)
        assert soon(lambda: status(gateway, new.token()) == 200)
        assert told == f"pushed a changed configuration to {gateway.url}"

    def test_each_push_flushes_again(self, gateway: Gateway, old: SigningKey, peer: Peer) -> None:
        """Each push changes the file in a way that it never had: the gateway fetches once more each time."""
        pushed = set()
        for _ in range(3):
            Push([gateway.url], [gateway.ecds_file]).refresh([gateway.url])
            (uri,) = jwks_uris(gateway.ecds_file)
            pushed.add(uri)
            fetched = [uri.removeprefix(peer.url)]
            assert soon(lambda wanted=fetched: status(gateway, old.token()) == 200 and wanted == [seen.path for seen in peer.seen][-1:])  # type: ignore[misc]
        assert len(pushed) == 3


class TestPushedFile:
    """What stands in the file."""

    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "ecds" / "jwt_authn.json"
        path.parent.mkdir()
        path.write_text(json.dumps(document("http://idp/jwks?flush=before&tenant=a%2Fb#x", "https://idp/other")))
        path.chmod(0o640)
        return path

    def test_only_the_flush_changes(self, file: Path) -> None:
        """Every JWKS URI has one new flush; the rest of the file is as it was."""
        Push(["http://gw"], [file]).refresh(["http://gw"])
        flush = jwks_uris(file)[1].partition("flush=")[2]
        assert json.loads(file.read_text()) == document(f"http://idp/jwks?tenant=a%2Fb&flush={flush}#x", f"https://idp/other?flush={flush}")
        assert len(flush) == 16

    def test_it_is_replaced_by_a_rename(self, file: Path) -> None:
        """A new file is in the place of the old one, under its mode and owner, and nothing else is left."""
        before = file.stat()
        Push(["http://gw"], [file]).refresh(["http://gw"])
        after = file.stat()
        assert after.st_ino != before.st_ino
        assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
        assert list(file.parent.iterdir()) == [file]

    def test_envoys_other_spelling_is_understood(self, file: Path) -> None:
        """A file that says remoteJwks.httpUri means the same."""
        file.write_text('{"providers": {"p": {"remoteJwks": {"httpUri": {"uri": "http://idp/jwks"}}}}}')
        Push(["http://gw"], [file]).refresh(["http://gw"])
        assert "http://idp/jwks?flush=" in file.read_text()

    def test_only_the_named_gateways_are_pushed(self, file: Path, tmp_path: Path) -> None:
        """The files go with the gateways by their order; one that is not named keeps its own."""
        other = tmp_path / "other.json"
        other.write_text("untouched")
        Push(["http://one", "http://two"], [other, file]).refresh(["http://two"])
        assert (other.read_text(), "flush=before" in file.read_text()) == ("untouched", False)

    def test_one_that_fails_keeps_no_other(self, file: Path, tmp_path: Path) -> None:
        """The file of one gateway is missing: the other's is pushed all the same, and the error names the one."""
        with pytest.raises(WorldError, match=r"gone\.json of http://one is not there"):
            Push(["http://one", "http://two"], [tmp_path / "gone.json", file]).refresh(["http://one", "http://two"])
        assert "flush=before" not in file.read_text()

    @pytest.mark.parametrize(("content", "word"), [("{", "no JSON"), ("{}", "no remote_jwks"), ('{"remote_jwks": {"http_uri": {}}}', "no remote_jwks")])
    def test_another_file_is_left_alone(self, content: str, word: str, file: Path) -> None:
        """A file that delivers no JWKS URI is not touched, and the error says what it lacks."""
        file.write_text(content)
        with pytest.raises(BadAnswer, match=word):
            Push(["http://gw"], [file]).refresh(["http://gw"])
        assert (file.read_text(), list(file.parent.iterdir())) == (content, [file])

    def test_a_symbolic_link_is_left_alone(self, file: Path, tmp_path: Path) -> None:
        """A rename would put a file in the place of the link: the error asks for the file itself."""
        (tmp_path / "link.json").symlink_to(file)
        with pytest.raises(WorldError, match="symbolic link"):
            Push(["http://gw"], [tmp_path / "link.json"]).refresh(["http://gw"])

    def test_an_unknown_gateway_is_told(self, file: Path) -> None:
        """An instance without a file cannot be pushed, and the error says where to add it."""
        with pytest.raises(WorldError, match="http://new: add it to"):
            Push(["http://gw"], [file]).refresh(["http://new"])


class TestWebhook:
    """The operator's own hook is asked, and believed only by its status."""

    def webhook(self, peer: Peer, secret: SecretRef | None, timeout: float = 5) -> Webhook:
        return Webhook(f"{peer.url}/hook?tenant=1", secret, timedelta(seconds=timeout))

    def test_it_says_what_is_wanted_and_proves_who_asks(self, peer: Peer, secret: Callable[[str], SecretRef]) -> None:
        """The receiver can verify the body and the timestamp with the shared secret."""
        told = self.webhook(peer, secret("the shared secret")).refresh(["http://one", "http://two"])
        (seen,) = peer.seen
        signed = f"{seen.headers['X-Timestamp']}.".encode() + seen.body
        assert seen.headers["X-Signature-256"] == "sha256=" + hmac.new(b"the shared secret", signed, hashlib.sha256).hexdigest()
        assert (seen.method, json.loads(seen.body)) == ("POST", {"action": "refresh-jwks", "gateways": ["http://one", "http://two"]})
        assert abs(int(seen.headers["X-Timestamp"]) - time.time()) < 60
        assert told == f"{peer.url}/hook was asked to refresh http://one, http://two and answered HTTP 200"

    def test_without_a_secret_nothing_is_signed(self, peer: Peer) -> None:
        """No secret, no signature: a receiver that asks for one refuses."""
        self.webhook(peer, None).refresh(["http://one"])
        assert "X-Signature-256" not in peer.seen[0].headers

    @pytest.mark.parametrize("good", [200, 202, 204])
    def test_any_2xx_is_success(self, good: int, peer: Peer) -> None:
        """A hook may answer before it has done its work: the proof decides."""
        peer.says({"status": good, "body": b""})
        assert f"HTTP {good}" in self.webhook(peer, None).refresh(["http://one"])

    @pytest.mark.parametrize(("bad", "error"), [(500, Unreachable), (503, Unreachable), (429, Unreachable), (401, Denied), (403, Denied), (404, BadAnswer)])
    def test_anything_else_is_not(
        self, bad: int, error: type[WorldError], peer: Peer, secret: Callable[[str], SecretRef], lets_out: Callable[..., list[str]]
    ) -> None:
        """One call, and an error with the status; neither secret nor query stands in it."""
        peer.says({"status": bad, "body": b"a stack trace"})
        with pytest.raises(error, match=f"HTTP {bad}") as caught:
            self.webhook(peer, secret("the shared secret")).refresh(["http://one"])
        assert len(peer.seen) == 1
        assert "tenant" not in str(caught.value)
        assert lets_out(caught.value, "the shared secret", "a stack trace") == []

    def test_a_redirect_is_refused(self, peer: Peer) -> None:
        """The signed call goes to the configured address only."""
        peer.says({"status": 307, "headers": {"Location": f"{peer.url}/elsewhere"}})
        with pytest.raises(BadAnswer, match="redirect"):
            self.webhook(peer, None).refresh(["http://one"])
        assert [seen.path for seen in peer.seen] == ["/hook?tenant=1"]

    def test_a_hook_that_hangs_is_left(self, peer: Peer) -> None:
        """After the timeout the ladder goes on, also where the hook drips."""
        peer.says({"drip": True})
        with pytest.raises(Unreachable):
            self.webhook(peer, None, timeout=0.2).refresh(["http://one"])

    def test_a_secret_that_is_gone_is_told(self, peer: Peer) -> None:
        """Without its secret nothing is sent, and the next rung may be climbed."""
        with pytest.raises(Denied, match="cannot be signed: the secret env:NOWHERE"):
            self.webhook(peer, SecretRef("env", "NOWHERE")).refresh(["http://one"])
        assert peer.seen == []


class TestNudge:
    """One token of an unknown key."""

    def nudge(self, *urls: str) -> Nudge:
        return Nudge(urls, "/canary", ISSUER, CANARY)

    def test_each_gateway_is_shown_one_unknown_kid(self, peer: Peer) -> None:
        """One request to the probe route, with a token that only lacks a known key."""
        peer.says({"status": 401})
        one, two = f"{peer.url}/api", f"{peer.url}/other"
        told = self.nudge(one, two).refresh([one, two])
        assert [(seen.method, seen.path) for seen in peer.seen] == [("GET", "/canary")] * 2
        tokens = [seen.headers["Authorization"].removeprefix("Bearer ") for seen in peer.seen]
        headers, claims = zip(*((jwt.get_unverified_header(token), jwt.decode(token, options={"verify_signature": False})) for token in tokens), strict=True)
        assert {header["alg"] for header in headers} == {"ES256"}
        assert len({header["kid"] for header in headers}) == 2
        assert {(claim["iss"], claim["aud"]) for claim in claims} == {(ISSUER, CANARY)}
        assert told == f"nudged {one}, {two} by a token with an unknown kid"

    def test_a_nudge_has_no_power_and_no_clock(self, peer: Peer) -> None:
        """It names no subject, scope or client; and it is not expired whatever the worker's clock says (I18)."""
        peer.says({"status": 401})
        self.nudge(peer.url).refresh([peer.url])
        claims = jwt.decode(peer.seen[0].headers["Authorization"].removeprefix("Bearer "), options={"verify_signature": False})
        assert (set(claims), claims["exp"]) == ({"iss", "aud", "exp", "jti"}, 4102444800)

    def test_a_real_gateway_looks_for_the_key(self, gateway: Gateway, peer: Peer) -> None:
        """Envoy comes as far as the JWKS, and refuses for the key alone."""
        assert "nudged" in self.nudge(gateway.url).refresh([gateway.url])
        assert peer.seen != []

    def test_a_gateway_that_accepts_it_is_an_alarm(self, peer: Peer) -> None:
        """200 for a key that nobody published: it verifies no signature at all."""
        with pytest.raises(BadAnswer, match="does not verify signatures"):
            self.nudge(peer.url).refresh([peer.url])

    @pytest.mark.parametrize("other", [403, 404, 503])
    def test_a_gateway_that_does_not_look_is_told(self, other: int, peer: Peer) -> None:
        """Refused for another reason than the key: nothing was nudged, and the error names the settings to look at."""
        peer.says({"status": other})
        with pytest.raises(BadAnswer, match=rf"HTTP {other}.*probe_path"):
            self.nudge(peer.url).refresh([peer.url])

    def test_a_dead_gateway_keeps_no_other(self, peer: Peer) -> None:
        """One does not answer: the others are nudged, and the error names the one."""
        peer.says({"status": 401})
        with pytest.raises(Unreachable, match=r"http://127\.0\.0\.1:1/canary"):
            self.nudge("http://127.0.0.1:1", peer.url).refresh(["http://127.0.0.1:1", peer.url])
        assert len(peer.seen) == 1

    def test_all_that_failed_are_named(self, peer: Peer) -> None:
        """Two do not answer: the error names both, and a retry may help."""
        dead = ["http://127.0.0.1:1", "http://127.0.0.1:2"]
        with pytest.raises(WorldError, match=r"2 of 2 gateways: .*:1/canary.*:2/canary") as caught:
            self.nudge(*dead).refresh(dead)
        assert caught.value.retryable


def document(*uris: str) -> dict[str, Any]:
    """A file as Envoy reads it, with one provider for each JWKS URI."""
    providers = {f"p{n}": {"issuer": ISSUER, "remote_jwks": {"http_uri": {"uri": uri, "cluster": "jwks"}}} for n, uri in enumerate(uris)}
    return {"version_info": "0", "resources": [{"name": "jwt_authn", "typed_config": {"providers": providers, "uri": "not a JWKS's"}}]}


def jwks_uris(file: Path) -> list[str]:
    """Where that file lets Envoy fetch JWKS from."""
    providers = json.loads(file.read_text())["resources"][0]["typed_config"]["providers"]
    return [provider["remote_jwks"]["http_uri"]["uri"] for provider in providers.values()]
