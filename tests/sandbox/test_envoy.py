"""The sandbox's gateways: real Envoys, asked with real tokens, fed by a JWKS endpoint of the test's own."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast, get_args
from uuid import uuid4

import jwt
import pytest
import requests
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from sandbox.envoy import Gateway, Mode
from sandbox.processes import SandboxError, free_port

ISSUER, API, CANARY = "https://identity.sandbox", "api", "gateway-canary"
MODES = get_args(Mode)


class SigningKey:
    """A P-256 pair under a kid."""

    def __init__(self, kid: str) -> None:
        self.kid = kid
        self._private = ec.generate_private_key(ec.SECP256R1())

    def jwk(self) -> dict[str, Any]:
        public = json.loads(ECAlgorithm.to_jwk(self._private.public_key()))
        return {**public, "kid": self.kid, "alg": "ES256", "use": "sig"}

    def token(self, audience: str = API, *, issuer: str = ISSUER, expires_in: float = 300) -> str:
        now = int(time.time())
        claims = {"iss": issuer, "aud": audience, "iat": now, "exp": now + int(expires_in), "jti": str(uuid4())}
        return jwt.encode(claims, self._private, "ES256", headers={"kid": self.kid})


@dataclass
class Jwks:
    """A JWKS endpoint: what it serves, how slowly, and when it was asked."""

    port: int = field(default_factory=free_port)
    keys: list[SigningKey] = field(default_factory=list)
    delay: float = 0
    fetches: list[float] = field(default_factory=list)
    asked: threading.Condition = field(default_factory=threading.Condition)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/.well-known/jwks.json"

    def start(self) -> None:
        self._server = JwksServer(self)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait_for_fetches(self, count: int, within: float = 10) -> None:
        with self.asked:
            if not self.asked.wait_for(lambda: len(self.fetches) >= count, within):
                raise TimeoutError(f"{len(self.fetches)} fetches of {count}")


class JwksServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, jwks: Jwks) -> None:
        super().__init__(("127.0.0.1", jwks.port), JwksHandler)
        self.jwks = jwks


class JwksHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        jwks = cast("JwksServer", self.server).jwks
        body = json.dumps({"keys": [key.jwk() for key in jwks.keys]}).encode()
        with jwks.asked:
            jwks.fetches.append(time.monotonic())
            jwks.asked.notify_all()
        time.sleep(jwks.delay)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def old() -> SigningKey:
    return SigningKey("old")


@pytest.fixture
def new() -> SigningKey:
    return SigningKey("new")


@pytest.fixture
def jwks(old: SigningKey) -> Iterator[Jwks]:
    jwks = Jwks(keys=[old])
    jwks.start()
    yield jwks
    jwks.stop()


@pytest.fixture
def gateways(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    """Makes and starts gateways; all are stopped at the end."""
    made: list[Gateway] = []

    def make(jwks: Jwks, mode: Mode, cache_time: float = 600, workers: int = 1, jwt_cache: bool = False) -> Gateway:
        ports = free_port(), free_port()
        name = f"gateway-{len(made)}"
        made.append(Gateway(tmp_path, name, *ports, jwks.url, ISSUER, API, CANARY, cache_time, mode, workers, jwt_cache))
        made[-1].start()
        return made[-1]

    yield make
    for gateway in made:
        gateway.stop()


def ask(url: str, token: str | None = None) -> requests.Response:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return requests.get(url, headers=headers, timeout=5)


def status(url: str, token: str | None = None) -> int:
    return ask(url, token).status_code


def push(gateway: Gateway, flush: int) -> None:
    """What a rotator does: another JWKS uri, the file replaced by rename."""
    config = json.loads(gateway.ecds_file.read_text())
    [provider] = config["resources"][0]["typed_config"]["providers"].values()
    uri = provider["remote_jwks"]["http_uri"]
    uri["uri"] = f"{uri['uri'].partition('?')[0]}?flush={flush}"
    config["version_info"] = str(flush)
    replacement = gateway.ecds_file.with_suffix(".new")
    replacement.write_text(json.dumps(config))
    replacement.replace(gateway.ecds_file)


def eventually(happened: Callable[[], object], within: float = 5) -> float:
    begun = time.monotonic()
    while not happened():
        if time.monotonic() - begun > within:
            raise TimeoutError("it did not happen in time")
        time.sleep(0.005)
    return time.monotonic() - begun


@pytest.mark.parametrize("mode", MODES)
def test_each_route_takes_its_own_tokens_only(gateways: Callable[..., Gateway], jwks: Jwks, old: SigningKey, mode: Mode) -> None:
    """The API takes API tokens and refuses canaries with 403, the probe route the reverse; both need a known key."""
    gateway, unknown = gateways(jwks, mode), SigningKey("unknown")
    answers = {
        (route, what): status(url, token)
        for route, url in (("api", gateway.url), ("probe", gateway.probe_url))
        for what, token in (
            ("api token", old.token()),
            ("canary", old.token(CANARY)),
            ("both audiences' stranger", old.token("other")),
            ("none", None),
        )
    }
    assert answers == {
        ("api", "api token"): 200,
        ("api", "canary"): 403,
        ("api", "both audiences' stranger"): 403,
        ("api", "none"): 401,
        ("probe", "api token"): 403,
        ("probe", "canary"): 200,
        ("probe", "both audiences' stranger"): 403,
        ("probe", "none"): 401,
    }
    assert status(gateway.url, unknown.token()) == status(gateway.probe_url, unknown.token(CANARY)) == 401


def test_a_token_that_is_over_or_of_another_issuer_is_refused(gateways: Callable[..., Gateway], jwks: Jwks, old: SigningKey) -> None:
    """The clock skew is a second, not Envoy's minute, and only the issuer's tokens count."""
    gateway = gateways(jwks, "async")
    assert status(gateway.url, old.token(expires_in=-3)) == 401
    assert status(gateway.url, old.token(issuer="https://somebody.else")) == 401


def test_both_routes_share_one_cache(gateways: Callable[..., Gateway], jwks: Jwks, old: SigningKey) -> None:
    """A canary proves something about the API's keys: one fetch serves both routes."""
    gateway = gateways(jwks, "sync")
    assert status(gateway.url, old.token()) == status(gateway.probe_url, old.token(CANARY)) == 200
    assert len(jwks.fetches) == 1


def test_sync_has_a_cache_for_each_worker(gateways: Callable[..., Gateway], jwks: Jwks, old: SigningKey) -> None:
    """With two workers, fresh connections make two fetches, and then no more."""
    gateway = gateways(jwks, "sync", workers=2)
    eventually(lambda: status(gateway.url, old.token()) == 200 and len(jwks.fetches) == 2)
    assert {status(gateway.url, old.token()) for _ in range(20)} == {200}
    assert len(jwks.fetches) == 2


@pytest.mark.parametrize("mode", MODES)
def test_an_unknown_key_is_learnt_when_the_cache_time_is_over_not_before(
    gateways: Callable[..., Gateway], jwks: Jwks, old: SigningKey, new: SigningKey, mode: Mode
) -> None:
    """A token of a new key makes no gateway fetch; the next fetch comes `cache_time` after the last, and brings it."""
    gateway = gateways(jwks, mode, cache_time=2)
    eventually(lambda: status(gateway.url, old.token()) == 200)
    jwks.keys.append(new)
    eventually(lambda: status(gateway.url, new.token()) == 200)
    first, second = jwks.fetches[:2]
    assert second - first == pytest.approx(2, abs=0.25)


@pytest.mark.parametrize("mode", MODES)
def test_a_push_empties_the_cache_at_once_and_costs_no_request(
    gateways: Callable[..., Gateway], jwks: Jwks, old: SigningKey, new: SigningKey, mode: Mode
) -> None:
    """After a push a new key is known in the time of a fetch, while every token of a key that stays is accepted."""
    gateway = gateways(jwks, mode, workers=2)
    assert status(gateway.url, old.token()) == 200
    jwks.keys.append(new)
    jwks.delay = 0.1
    with Traffic(gateway.url, old) as traffic:
        eventually(lambda: len(traffic.answers) > 50)
        push(gateway, 1)
        assert eventually(lambda: status(gateway.url, new.token()) == 200) < 1
        passed = len(traffic.answers)
        eventually(lambda: len(traffic.answers) > passed + 50)
    assert set(traffic.answers) == {200}


@pytest.mark.parametrize("mode", MODES)
def test_a_push_forgets_a_removed_key_and_the_tokens_seen_before(
    gateways: Callable[..., Gateway], jwks: Jwks, old: SigningKey, new: SigningKey, mode: Mode
) -> None:
    """A token cache keeps a removed key's tokens alive; a push refuses them at once, on kept connections, too."""
    gateway = gateways(jwks, mode, jwt_cache=True)
    seen = old.token()
    with requests.Session() as connection:
        connection.headers["Authorization"] = f"Bearer {seen}"
        assert connection.get(gateway.url, timeout=5).status_code == 200
        jwks.keys[:] = [new]
        assert connection.get(gateway.url, timeout=5).status_code == 200
        push(gateway, 1)
        assert eventually(lambda: connection.get(gateway.url, timeout=5).status_code == 401) < 1
    assert status(gateway.url, new.token()) == 200


@pytest.mark.parametrize("mode", MODES)
def test_a_gateway_starts_without_its_jwks_and_recovers(gateways: Callable[..., Gateway], old: SigningKey, mode: Mode) -> None:
    """With the JWKS endpoint down a gateway comes up, refuses, and serves as soon as the endpoint is there."""
    jwks = Jwks(keys=[old])
    gateway = gateways(jwks, mode)
    answer = ask(gateway.url, old.token())
    assert (answer.status_code, answer.text) == (401, "Jwks remote fetch is failed")
    jwks.start()
    eventually(lambda: status(gateway.url, old.token()) == 200)
    jwks.stop()


def test_async_keeps_what_it_has_while_the_jwks_is_down(gateways: Callable[..., Gateway], jwks: Jwks, old: SigningKey) -> None:
    """A gateway that fetches in the background goes on with its keys when fetches fail, and counts the failures."""
    gateway = gateways(jwks, "async", cache_time=1)
    assert status(gateway.url, old.token()) == 200
    jwks.stop()
    eventually(lambda: stat(gateway, "jwks_fetch_failed") >= 1)
    assert status(gateway.url, old.token()) == 200
    jwks.start()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_restart_empties_the_cache(gateways: Callable[..., Gateway], jwks: Jwks, old: SigningKey, new: SigningKey, end: str) -> None:
    """Stopped or killed, a gateway starts again on its ports and knows what the JWKS holds now."""
    gateway = gateways(jwks, "async")
    first = gateway.pid
    jwks.keys[:] = [new]
    getattr(gateway, end)()
    gateway.start()
    assert gateway.pid != first
    assert (status(gateway.url, old.token()), status(gateway.url, new.token())) == (401, 200)


def test_a_home_closed_to_others_is_no_hindrance(gateways: Callable[..., Gateway], jwks: Jwks, old: SigningKey, tmp_path: Path) -> None:
    """A gateway reads and watches its files in a folder of mode 0700."""
    tmp_path.chmod(0o700)
    assert status(gateways(jwks, "async").url, old.token()) == 200


@pytest.mark.parametrize("cache_time", [0, 0.5, 1.5, -1])
def test_a_cache_time_that_envoy_cannot_keep_is_refused(tmp_path: Path, cache_time: float) -> None:
    """Envoy drops fractions of a second, which would be another cache time than the one asked for."""
    with pytest.raises(SandboxError, match="whole seconds"):
        Gateway(tmp_path, "g", 1, 2, "http://127.0.0.1:3/jwks", ISSUER, API, CANARY, cache_time, "async", 1)


class Traffic:
    """A client that asks without pause, over one connection, with a new token each time."""

    def __init__(self, url: str, key: SigningKey) -> None:
        self.answers: list[int] = []
        self._url, self._key = url, key
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        with requests.Session() as connection:
            while not self._over.is_set():
                headers = {"Authorization": f"Bearer {self._key.token()}"}
                self.answers.append(connection.get(self._url, headers=headers, timeout=5).status_code)


def stat(gateway: Gateway, name: str) -> int:
    shown = requests.get(f"{gateway.admin_url}/stats?filter=jwt_authn.{name}", timeout=5).text
    return int(shown.rpartition(":")[2])
