"""The parts that these tests stand on: a PostgreSQL with the tables of sql/, a KMS emulator, identity services.

One server and one emulator for all tests. Signing keys are never deleted, so the superuser empties the tables for each
test with the triggers out of force.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sandbox import identity, kms
from sandbox.postgres import Postgres
from sandbox.processes import free_port

SQL = Path(__file__).resolve().parents[2] / "sql"
DATABASE = "identity"
ENVIRONMENT = "sandbox"
PASSWORD = "a-password-of-the-tests"
KMS_KEY = "projects/sandbox/locations/global/keyRings/identity/cryptoKeys/signing"
KMS_TOKEN = "the-identity-services-token"
CLIENT = ("the-client", "a secret: with % and +")
ADMIN = {"Authorization": "Bearer the-admin-token"}
ROLES = ("keyrotation_owner", "keyrotation_reader", "keyrotation_identity_admin")
EMPTY = """
    SET session_replication_role = replica;
    TRUNCATE public.signing_keys, key_rotation.rotations, key_rotation.ledger;
    UPDATE key_rotation.ledger_head SET seq = 0, hash = repeat('0', 64);
"""


class Database:
    """One identity service's database, and the hands of its owner."""

    def __init__(self, server: Postgres) -> None:
        self._server = server

    def url(self, role: str) -> str:
        return self._server.url(role, PASSWORD, DATABASE)

    def run(self, statement: str, *values: Any, role: str = "keyrotation_owner") -> list[tuple[Any, ...]]:
        with closing(psycopg2.connect(self.url(role))) as connection, connection, connection.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def promote(self, kid: str) -> None:
        self.run(
            "UPDATE signing_keys SET status = 'previous' WHERE status = 'current';UPDATE signing_keys SET status = 'current' WHERE kid = %s",
            kid,
        )

    def disable(self, kid: str) -> None:
        """The runbook's own UPDATE."""
        self.run("UPDATE signing_keys SET enabled = FALSE WHERE kid = %s", kid)

    def status(self, kid: str) -> str:
        return str(self.run("SELECT status FROM signing_keys WHERE kid = %s", kid)[0][0])


class KmsEmulator:
    """The emulator, which may be away for a while."""

    def __init__(self, home: Path) -> None:
        self.home, self._port = home, free_port()
        home.mkdir(parents=True)
        (home / "principals.json").write_text(json.dumps({KMS_TOKEN: ["encrypt", "decrypt"]}))
        self.start()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        self._server = kms.serve(self.home, self._port, [KMS_KEY])

    def stop(self) -> None:
        self._server.stop(grace=None).wait()

    def client(self, environment: str = ENVIRONMENT) -> identity.Kms:
        return identity.Kms(self.endpoint, KMS_KEY, KMS_TOKEN, environment)


class Identity:
    """An identity service on a thread of its own."""

    def __init__(self, config: identity.Config, faults: Path) -> None:
        self.config, self._faults = config, faults
        self._server = identity.Server(config, identity.Faults(faults))
        self.service = self._server.service
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.http = requests.Session()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.config.port}"

    @property
    def token_url(self) -> str:
        return f"{self.url}/oauth2/token"

    def jwks(self) -> requests.Response:
        return self.http.get(f"{self.url}/.well-known/jwks.json", timeout=10)

    def kids(self) -> set[str]:
        return {key["kid"] for key in self.jwks().json()["keys"]}

    @property
    def client(self) -> tuple[str, str]:
        return self.config.client_id, self.config.client_secret

    def token(self, auth: Any = CLIENT, **form: str) -> requests.Response:
        asked = {"grant_type": "client_credentials", "scope": "api", **form}
        return self.http.post(self.token_url, data=asked, auth=auth, timeout=10)

    def rotate(self, headers: Any = ADMIN, **more: str) -> requests.Response:
        return self.http.post(f"{self.url}/api/v1/admin/keys/rotate", headers={**headers, **more}, timeout=10)

    def promote(self, kid: str, headers: Any = ADMIN) -> requests.Response:
        return self.http.post(f"{self.url}/api/v1/admin/keys/{kid}/promote", headers=headers, timeout=10)

    def meets(self, **faults: Any) -> None:
        unfinished = self._faults.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(faults))
        unfinished.replace(self._faults)

    def stop(self) -> None:
        self.http.close()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A PostgreSQL whose database `identity` has the roles, tables and grants of sql/."""
    running = Postgres(tmp_path_factory.mktemp("server"), free_port(), PASSWORD)
    running.start()
    try:
        with closing(psycopg2.connect(running.superuser_url())) as connection, connection.cursor() as cursor:
            connection.autocommit = True  # CREATE DATABASE runs in no transaction
            cursor.execute(f"CREATE DATABASE {DATABASE}")
        for script in ("roles.sql", "schema.sql", "grants.sql"):
            _administer(running, (SQL / script).read_text())
        for role in ROLES:
            _administer(running, f"ALTER ROLE {role} PASSWORD '{PASSWORD}'")
        _administer(running, f"INSERT INTO key_rotation.environment (name) VALUES ('{ENVIRONMENT}')")
        yield running
    finally:
        running.stop()


@pytest.fixture
def database(server: Postgres) -> Database:
    """The identity service's database, without keys."""
    _administer(server, EMPTY)
    return Database(server)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KmsEmulator]:
    """One KMS for all tests; who stops it starts it again."""
    running = KmsEmulator(tmp_path_factory.mktemp("kms") / "home")
    yield running
    running.stop()


@pytest.fixture
def make_key(database: Database, emulator: KmsEmulator) -> Callable[..., str]:
    """Makes a sealed key as the rotator would, and gives its kid. It is next, unless it is to be promoted."""

    def make(*, promoted: bool = False, environment: str = ENVIRONMENT, holds_another: bool = False) -> str:
        published, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
        jwk = identity.public_jwk(published)
        sealed = pkcs8(other if holds_another else published)
        ciphertext, version = emulator.client(environment).seal(jwk["kid"], sealed)
        database.run(
            "INSERT INTO signing_keys (kid, public_jwk, private_key_ciphertext, sealed_by) VALUES (%s, %s, %s, %s)",
            *(jwk["kid"], json.dumps(jwk), ciphertext, version),
        )
        if promoted:
            database.promote(jwk["kid"])
        return jwk["kid"]

    return make


@pytest.fixture
def make_config(database: Database, emulator: KmsEmulator) -> Callable[..., dict[str, Any]]:
    """The content of a configuration file, with what the test wants otherwise."""

    def make(**otherwise: Any) -> dict[str, Any]:
        role = "keyrotation_identity_admin" if otherwise.get("authority") == "api" else "keyrotation_reader"
        config = {
            "port": free_port(),
            "database_url": database.url(role),
            "kms_endpoint": emulator.endpoint,
            "kms_key": KMS_KEY,
            "kms_token": KMS_TOKEN,
            "environment": ENVIRONMENT,
            "issuer": "https://identity.example",
            "audience": "api",
            "client_id": CLIENT[0],
            "client_secret": CLIENT[1],
            "admin_token": "the-admin-token",
            "token_lifetime": 30,
        }
        return {**config, **otherwise}

    return make


@pytest.fixture
def make_identity(make_config: Callable[..., dict[str, Any]], tmp_path: Path) -> Iterator[Callable[..., Identity]]:
    """Starts identity services; they end with the test."""
    running: list[Identity] = []

    def make(**otherwise: Any) -> Identity:
        config = identity.Config(**make_config(**otherwise))
        running.append(Identity(config, tmp_path / f"faults-{len(running)}.json"))
        return running[-1]

    yield make
    for each in running:
        each.stop()


def pkcs8(private: ec.EllipticCurvePrivateKey) -> bytes:
    """The private half as it is sealed: DER, not encrypted."""
    return private.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _administer(server: Postgres, statement: str) -> None:
    """Runs a statement, or a whole script, as the superuser."""
    with closing(psycopg2.connect(server.superuser_url(DATABASE))) as connection, connection:
        connection.cursor().execute(statement)
