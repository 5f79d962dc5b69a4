"""Owns the wiring of the sandbox: which parts there are, what each needs of the others, and when the world is ready.

    postgres ─ databases ┬─ prefect-server ┐
                         ├─ prefect-worker ┴────────────────┐
    kms ─────────────────┴─ identity ─ gateway-1, gateway-2 ┼─ bootstrap ─ tokens ─ sandbox.json
    slack ──────────────────────────────────────────────────┘

Everything is kept in the home, so that a world that was killed goes on where it was: keys, tokens, runs, addresses.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from sandbox.conductor import CHECKOUT, Conductor, loopback_session
from sandbox.crew import Crew, Step, Tell
from sandbox.database import AUDITOR, CLEANER, ENVIRONMENT, IDENTITY_ADMIN, OWNER, READER, ROTATOR, Databases
from sandbox.envoy import Gateway
from sandbox.keepsakes import Ports, Secrets, write_private
from sandbox.postgres import Postgres
from sandbox.processes import LOOPBACK, Process, SandboxError, listening
from sandbox.settings import Settings

AUDIENCE = "api"
BOOTSTRAP = "bootstrap-signing-keys"

_PROBE_EVERY = 0.1
_TOKENS_WITHIN = 60.0


class Sandbox:
    """The parts of one world, wired together."""

    def __init__(self, home: Path, settings: Settings, tell: Tell) -> None:
        self._home, self._settings = home.resolve(), settings
        self._secrets, self._ports = Secrets(self._home), Ports(self._home)
        self._crew, self._session = Crew(self._home, tell), loopback_session()
        self._postgres = Postgres(self._home, self._ports.port("postgres"), self._secrets.word("postgres_password"))
        self._databases = Databases(self._postgres, self._secrets, CHECKOUT / "sql")
        self._conductor = Conductor(self._home, self._ports.port("prefect"), self._databases.prefect_url(), self.config.parent)
        self._gateways = {f"gateway-{n}": self._gateway(n) for n in range(1, settings.number("sandbox.gateways") + 1)}
        self._client_secret = settings.secret("identity.client_secret", self._secrets.word("client_secret"))
        self._admin_token = settings.secret("identity.admin_token", self._secrets.word("admin_token"))

    @property
    def config(self) -> Path:
        return self._home / "environments" / f"{ENVIRONMENT}.toml"

    @property
    def facts_file(self) -> Path:
        return self._home / "sandbox.json"

    def start(self, bootstrap: bool) -> None:
        """Returns when all is ready, and `sandbox.json` says so."""
        self.facts_file.unlink(missing_ok=True)  # of one that was killed
        self._settings.write_environment(self.config, self._given())
        ready = self._begin_parts()
        if bootstrap:
            issued = self._crew.do("bootstrap", self._bootstrap, ready)
            self._crew.do("tokens", self._wait_for_tokens, [issued])
        self._crew.join()
        self._publish()

    def watch(self) -> None:
        """Raises when a part has died, unless `sandbox.on_death` leaves it so."""
        self._crew.watch(self._settings.word("sandbox.on_death") == "leave", self._publish)

    def revive(self) -> None:
        """Has the parts that have died started again; `sandbox.json` is written anew after that."""
        self._crew.revive()

    def stop(self) -> None:
        self.facts_file.unlink(missing_ok=True)
        self._crew.end()

    def facts(self) -> dict[str, Any]:
        """What `sandbox.json` holds: addresses, secrets and process ids of a world that runs."""
        return {
            "environment": ENVIRONMENT,
            "config": str(self.config),
            "prefect_api_url": self._conductor.api_url,
            "prefect_ui_url": self._conductor.ui_url,
            "identity_url": self._identity_url,
            "jwks_url": self._jwks_url,
            "token_url": self._token_url,
            "client_id": self._settings.word("identity.client_id"),
            "client_secret": self._client_secret,
            "admin_token": self._admin_token,
            "gateways": [{"url": each.url, "probe_url": each.probe_url, "admin_url": each.admin_url, "pid": each.pid} for each in self._gateways.values()],
            "database_url": self._databases.url(ROTATOR),
            "owner_database_url": self._databases.url(OWNER),
            "kms_endpoint": self._kms_endpoint,
            "slack_url": self._slack_url,
            "pids": {"sandbox": os.getpid()} | self._crew.pids(),
        }

    def _publish(self) -> None:
        write_private(self.facts_file, json.dumps(self.facts(), indent=2))

    def _begin_parts(self) -> Sequence[Step]:
        crew = self._crew
        postgres = crew.begin("postgres", self._postgres)
        kms, slack = crew.begin("kms", self._kms()), crew.begin("slack", self._slack())
        databases = crew.do("databases", self._databases.prepare, [postgres])
        server = crew.begin("prefect-server", self._conductor.server, [databases])
        identity = crew.begin("identity", self._identity(), [databases, kms])
        gateways = [crew.begin(name, gateway, [identity]) for name, gateway in self._gateways.items()]
        # Last, so that it is stopped first. It imports Prefect while the server starts, then waits for it by itself.
        worker = crew.begin("prefect-worker", self._conductor.worker, [databases])
        return [slack, server, worker, *gateways]

    # ------------------------------------------------------------------------------------------------ the parts

    def _kms(self) -> Process:
        permissions = {
            self._secrets.word("kms_token"): ["encrypt"],
            self._secrets.word("identity_kms_token"): ["decrypt"],
        }
        if self._settings.word("authority") == "api":  # then the identity service seals its keys itself
            permissions[self._secrets.word("identity_kms_token")] = ["encrypt", "decrypt"]
        principals = self._secrets.keep("kms/principals.json", json.dumps(permissions))
        arguments = ["--home", str(principals.parent), "--key", self._settings.word("sealer.key")]
        return self._process("kms", arguments)

    def _slack(self) -> Process:
        self._secrets.word("slack_token")
        return self._process("slack", ["--token-file", str(self._secrets.folder / "slack_token")])

    def _identity(self) -> Process:
        # Its faults.json goes beside this file.
        config = self._secrets.keep("identity/config.json", json.dumps(self._identity_config(), indent=2))
        return self._process("identity", ["--config", str(config)], takes_port=False)

    def _identity_config(self) -> dict[str, Any]:
        settings, authority = self._settings, self._settings.word("authority")
        return {
            "port": self._ports.port("identity"),
            "database_url": self._databases.url(IDENTITY_ADMIN if authority == "api" else READER),
            "kms_endpoint": self._kms_endpoint,
            "kms_key": settings.word("sealer.key"),
            "kms_token": self._secrets.word("identity_kms_token"),
            "environment": ENVIRONMENT,
            "issuer": settings.word("identity.issuer"),
            "audience": AUDIENCE,
            "client_id": settings.word("identity.client_id"),
            "client_secret": self._client_secret,
            "admin_token": self._admin_token,
            "scope": settings.word("identity.scope"),
            "token_lifetime": settings.seconds("policy.token_lifetime"),
            "key_cache": settings.seconds("identity.key_cache"),
            "replicas": settings.number("sandbox.identity_replicas"),
            "jwks_max_age": settings.number("sandbox.jwks_max_age"),
            "authority": authority,
        }

    def _gateway(self, number: int) -> Gateway:
        """The odd ones fetch in the background, one cache for all; the even ones on request, one for each worker."""
        in_background = number % 2 == 1
        return Gateway(
            self._home,
            f"gateway-{number}",
            self._ports.port(f"gateway-{number}"),
            self._ports.port(f"gateway-{number}-admin"),
            self._jwks_url,
            self._settings.word("identity.issuer"),
            AUDIENCE,
            self._settings.word("gateways.canary_audience"),
            self._settings.seconds("gateways.cache_time"),
            "async" if in_background else "sync",
            1 if in_background else self._settings.number("gateways.workers"),
            self._settings.flag("sandbox.jwt_cache"),
            max(1, math.ceil(self._settings.seconds("policy.clock_skew"))),  # Envoy reads 0 as "not set", a minute
        )

    def _process(self, name: str, arguments: Sequence[str], takes_port: bool = True) -> Process:
        port = self._ports.port(name)
        return Process(
            name,
            [sys.executable, "-m", f"sandbox.{name}", *(["--port", str(port)] if takes_port else []), *arguments],
            home=self._home,
            cwd=CHECKOUT,
            ready=lambda: listening(port),
        )

    # ------------------------------------------------------------------------------------------------ their addresses

    @property
    def _identity_url(self) -> str:
        return f"http://{LOOPBACK}:{self._ports.port('identity')}"

    @property
    def _jwks_url(self) -> str:
        return f"{self._identity_url}/.well-known/jwks.json"

    @property
    def _token_url(self) -> str:
        return f"{self._identity_url}/oauth2/token"

    @property
    def _kms_endpoint(self) -> str:
        return f"{LOOPBACK}:{self._ports.port('kms')}"

    @property
    def _slack_url(self) -> str:
        return f"http://{LOOPBACK}:{self._ports.port('slack')}"

    def _given(self) -> dict[str, Any]:
        """What the environment file needs to know of this world."""
        pushed = [str(gateway.ecds_file.resolve()) for gateway in self._gateways.values()]
        (self._home / "audit").mkdir(exist_ok=True)
        return {
            "identity.url": self._identity_url,
            "identity.jwks_url": self._jwks_url,
            "identity.token_url": self._token_url,
            "identity.admin_token": self._reference("admin_token"),
            "identity.client_secret": self._reference("client_secret"),
            "database.url": self._reference("database_url", self._databases.url(ROTATOR)),
            "database.cleaner_url": self._reference("cleaner_url", self._databases.url(CLEANER)),
            "database.auditor_url": self._reference("auditor_url", self._databases.url(AUDITOR)),
            "sealer.endpoint": self._kms_endpoint,
            "sealer.token": self._reference("kms_token"),
            "gateways.urls": [gateway.url for gateway in self._gateways.values()],
            "gateways.refresh": [{"kind": "nudge"}, {"kind": "push", "files": pushed}],
            "slack.token": self._reference("slack_token"),
            "slack.base_url": f"{self._slack_url}/api/",
            "prefect.api_url": self._conductor.api_url,
            "prefect.ui_url": self._conductor.ui_url,
            "audit.head_file": str(self._home / "audit" / "head.json"),
            "tombstones.path": str(self._home / "tombstones.json"),
        }

    def _reference(self, name: str, text: str | None = None) -> str:
        """How the environment file names a secret: by its file."""
        if text is not None:
            self._secrets.keep(name, text)
        else:
            self._secrets.word(name)
        return f"file:{self._secrets.folder / name}"

    # ------------------------------------------------------------------------------------------------ the first key

    def _bootstrap(self) -> None:
        if not self._databases.has_current_key():
            self._conductor.run(BOOTSTRAP)

    def _wait_for_tokens(self) -> None:
        """Until a token is issued, and every gateway accepts a fresh one."""
        _wait_until(lambda: self._fresh_token() is not None, self._token_url)
        for gateway in self._gateways.values():
            _wait_until(partial(self._accepts, gateway.url), gateway.url)

    def _accepts(self, url: str) -> bool:
        token = self._fresh_token()
        answer = self._session.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=5)
        return answer.status_code == HTTPStatus.OK

    def _fresh_token(self) -> str | None:
        credentials = (self._settings.word("identity.client_id"), self._client_secret)
        form = {"grant_type": "client_credentials", "scope": self._settings.word("identity.scope")}
        answer = self._session.post(self._token_url, auth=credentials, data=form, timeout=5)
        return str(answer.json()["access_token"]) if answer.ok else None


def _wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _TOKENS_WITHIN
    while not true():
        if time.monotonic() > deadline:
            raise SandboxError(f"{what} did not answer 200 within {_TOKENS_WITHIN:g} s")
        time.sleep(_PROBE_EVERY)
