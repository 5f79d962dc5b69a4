"""A whole environment on loopback, without Prefect and Envoy: PostgreSQL, KMS emulator, identity service, Slack inbox, small gateways.

The shell is called in this process (`run`), or as the console script where the process itself is the point (`script`).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
import requests

from keyrotation import wiring
from keyrotation.cli import main
from keyrotation.domain.decision import Request, Rotation
from keyrotation.domain.events import Happened
from keyrotation.domain.policy import ZERO
from keyrotation.ports import Environment, Gate
from keyrotation.steps import generate, promote
from keyrotation.steps.rotations import close_rotation, confirm
from sandbox import identity, kms, slack
from sandbox.processes import free_port

NAME = "test"
KEY = "projects/test/locations/local/keyRings/identity/cryptoKeys/signing"
ENCRYPTER, DECRYPTER, SLACK_TOKEN, CLIENT_SECRET = "kms-token-of-the-rotator", "kms-token-of-identity", "xoxb-of-the-tests", "client-secret-of-the-tests"
ISSUER, API, CANARY = "https://identity.test", "api", "key-rotation-canary"
LOG_OF_IDENTITY = re.compile(r" replica=\d+ request=")  # it runs in this process
CONSOLE_SCRIPT = Path(sys.executable).with_name("keyrotation")


class Handler(BaseHTTPRequestHandler):
    """Answers by the server's `answer(path, headers)`: status and a body."""

    def do_GET(self) -> None:
        status, body = self.server.answer(self.path, self.headers)  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


class Peer:
    """A real HTTP server that says what it is told."""

    def __init__(self, answer: Callable[[str, Any], tuple[int, bytes]]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.answer = answer  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Gateway:
    """Verifies by the JWKS as it is now; /api takes API tokens, /canary takes canaries."""

    def __init__(self, jwks_url: str) -> None:
        self._jwks_url = jwks_url
        self.api_audiences, self.canary_audiences = [API], [CANARY]
        self.peer = Peer(self.answer)

    def answer(self, path: str, headers: Any) -> tuple[int, bytes]:
        audiences = self.canary_audiences if path == "/canary" else self.api_audiences
        try:
            self._verify(headers.get("Authorization", "").removeprefix("Bearer "), audiences)
        except jwt.InvalidAudienceError:
            return 403, b"Audiences in Jwt are not allowed"
        except (jwt.PyJWTError, KeyError):
            return 401, b"Jwt verification fails"
        return 200, b"ok"

    def _verify(self, raw: str, audiences: list[str]) -> None:
        keys = {each["kid"]: each for each in requests.get(self._jwks_url, timeout=5).json()["keys"]}
        jwt.decode(raw, jwt.PyJWK(keys[jwt.get_unverified_header(raw)["kid"]]), algorithms=["ES256"], audience=audiences, issuer=ISSUER)


class Prefect:
    """The few answers of Prefect's API that the doctor asks for."""

    def __init__(self) -> None:
        self.status, self.missing, self.deployment, self.pool = 200, "", {"paused": False, "work_pool_name": "tests", "schedules": []}, {"status": "READY"}
        self.peer = Peer(self.answer)

    def answer(self, path: str, headers: Any) -> tuple[int, bytes]:
        if self.missing and self.missing in path:
            return 404, b"{}"
        for part, value in (
            ("/api/deployments/name/", self.deployment),
            ("/api/work_pools/", self.pool),
            ("/api/health", True),
            ("/api/admin/version", "3.8.8"),
        ):
            if path.startswith(part):
                return self.status, json.dumps(value).encode()
        return 404, b"{}"


@dataclass
class Shell:
    """One environment, its database, and the shell on it."""

    folder: Path
    database: Any
    capture: Any
    settings: dict[str, Any] = field(default_factory=dict)

    # ---- the file

    def write(self) -> None:
        lines: dict[str, list[str]] = {}
        for name, value in self.settings.items():
            section, _, setting = name.rpartition(".")
            lines.setdefault(section, []).append(f"{setting} = {json.dumps(value)}")
        text = "".join((f"[{section}]\n" if section else "") + "\n".join(rows) + "\n" for section, rows in sorted(lines.items()))
        (self.folder / f"{NAME}.toml").write_text(text)

    def set(self, **changes: Any) -> None:
        """Settings by dotted name, with two underscores for the dot; None removes one."""
        for name, value in changes.items():
            self.settings.pop(name.replace("__", "."), None)
            if value is not None:
                self.settings[name.replace("__", ".")] = value
        self.write()

    def secret(self, name: str, text: str) -> str:
        (self.folder / name).write_text(text)
        return f"file:{self.folder / name}"

    # ---- the shell

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of the command, run here."""
        self.capture.readouterr()
        try:
            status = main(arguments)
        except SystemExit as ended:
            status = int(ended.code or 0)
        out, err = self.capture.readouterr()
        return status, out, "".join(line for line in err.splitlines(keepends=True) if not LOG_OF_IDENTITY.search(line))

    def json(self, *arguments: str, status: int = 0) -> Any:
        ended, out, err = self.run(*arguments, "--format", "json")
        assert ended == status, err or out
        return json.loads(out)

    def refused(self, *arguments: str, status: int) -> str:
        """The one sentence of a command that ends so, and that changed nothing."""
        before = self.database.everything()
        ended, out, err = self.run(*arguments)
        assert ended == status, out + err
        assert out == ""
        assert err.startswith("keyrotation")
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert self.database.everything() == before
        return err

    def script(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen([CONSOLE_SCRIPT, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)

    # ---- the keys

    def env(self) -> Environment:
        return wiring.connect(NAME)

    def rotate(self, kind: str = "rotation") -> str:
        """A new current key, at once: the waiting rules have tests of their own. Gives its kid."""
        env = self.env()
        rotation = self.opened(env, kind)
        kid = generate.generate(env, rotation).kid or ""
        if kind == "bootstrap":
            promote.bootstrap(env, rotation, kid)
        else:
            env.keys.promote(rotation, kid, Gate(ZERO, False), "promoted by the tests")
        confirm(env, rotation)
        close_rotation(env, rotation, Happened(kid, f"key {kid} signs"))
        return kid

    def opened(self, env: Environment | None = None, kind: str = "rotation") -> Rotation:
        rotation = (env or self.env()).keys.open(kind, Request("the tests", reason="a test wants it"), None)
        assert rotation is not None
        return rotation

    def clean_up(self, kid: str) -> None:
        """The runbook's UPDATE, by the owner's hand."""
        self.database.run("owner", "UPDATE signing_keys SET enabled = FALSE WHERE kid = %s", kid)

    def entries(self) -> list[tuple[str, str, str]]:
        """(event, actor, reason) of the ledger, in order."""
        return self.database.run("superuser", "SELECT event, actor, reason FROM key_rotation.ledger ORDER BY seq")


@pytest.fixture(scope="session")
def kms_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A KMS emulator with one key, for all tests."""
    home, port = tmp_path_factory.mktemp("kms") / "home", free_port()
    home.mkdir()
    (home / "principals.json").write_text(json.dumps({ENCRYPTER: ["encrypt"], DECRYPTER: ["decrypt"]}))
    server = kms.serve(home, port, [KEY])
    yield f"127.0.0.1:{port}"
    server.stop(grace=None).wait()


@pytest.fixture
def shell(database: Any, kms_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """An environment file whose database is there and without keys; nothing else answers yet."""
    nowhere = f"http://127.0.0.1:{free_port()}"
    shell = Shell(tmp_path, database, capsys)
    monkeypatch.setenv("KEYROTATION_ENVIRONMENTS", str(tmp_path))
    for variable in ("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY", "COLUMNS"):
        monkeypatch.delenv(variable, raising=False)
    shell.settings = {
        "identity.url": nowhere, "identity.jwks_url": f"{nowhere}/.well-known/jwks.json", "identity.token_url": f"{nowhere}/oauth2/token",
        "identity.issuer": ISSUER, "identity.client_id": "the-client", "identity.client_secret": shell.secret("client_secret", CLIENT_SECRET),
        "identity.key_cache": "0s", "database.url": str(database.secret("rotator")), "database.cleaner_url": str(database.secret("cleaner")),
        "database.auditor_url": str(database.secret("auditor")), "sealer.kind": "google-kms", "sealer.key": KEY, "sealer.endpoint": kms_endpoint,
        "sealer.token": shell.secret("kms_token", ENCRYPTER), "gateways.cache_time": "10s", "gateways.probe_path": "/canary", "policy.token_lifetime": "30s",
        "policy.clock_skew": "1s", "policy.rotate_every": "7d", "policy.max_key_age": "30d",
    }  # fmt: skip
    shell.write()
    return shell


@dataclass
class World:
    """The shell's environment with everything that it talks to."""

    shell: Shell
    kid: str
    gateways: list[Gateway]
    prefect: Prefect
    faults: Path

    def identity_meets(self, **faults: Any) -> None:
        self.faults.write_text(json.dumps(faults))


@pytest.fixture
def world(shell: Shell, kms_endpoint: str, tmp_path: Path) -> Iterator[World]:
    """A key signs, the identity service serves it, two gateways verify by it."""
    port, faults = free_port(), tmp_path / "faults.json"
    url = f"http://127.0.0.1:{port}"
    config = identity.Config(
        port=port, database_url=shell.database.url("reader"), kms_endpoint=kms_endpoint, kms_key=KEY, kms_token=DECRYPTER, environment=NAME, issuer=ISSUER,
        audience=API, client_id="the-client", client_secret=CLIENT_SECRET, admin_token="admin-token-of-the-tests", token_lifetime=30)  # fmt: skip
    service = identity.Server(config, identity.Faults(faults))
    threading.Thread(target=service.serve_forever, args=(0.01,), daemon=True).start()
    inbox = slack.Server(0, Path(shell.secret("slack_token", SLACK_TOKEN).removeprefix("file:")), [])
    threading.Thread(target=inbox.serve_forever, args=(0.01,), daemon=True).start()
    gateways, prefect = [Gateway(f"{url}/.well-known/jwks.json") for _ in range(2)], Prefect()
    shell.settings |= {
        "identity.url": url, "identity.jwks_url": f"{url}/.well-known/jwks.json", "identity.token_url": f"{url}/oauth2/token",
        "gateways.urls": [f"{gateway.peer.url}/api" for gateway in gateways], "slack.token": f"file:{shell.folder / 'slack_token'}",
        "slack.base_url": f"http://127.0.0.1:{inbox.server_address[1]}/api/", "prefect.api_url": f"{prefect.peer.url}/api",
        "audit.head_file": str(tmp_path / "head.json"), "tombstones.path": str(tmp_path / "tombstones.json"),
    }  # fmt: skip
    shell.write()
    yield World(shell, shell.rotate("bootstrap"), gateways, prefect, faults)
    for each in (*(gateway.peer for gateway in gateways), prefect.peer):
        each.stop()
    for server in (service, inbox):
        server.shutdown()
        server.server_close()
