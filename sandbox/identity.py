"""Owns the reference identity service: it serves the JWKS, issues ES256 tokens, and offers the runbook's admin API.

    python -m sandbox.identity --config FILE

    GET  /.well-known/jwks.json              the published keys: enabled = TRUE (next, current, previous)
    POST /oauth2/token                       HTTP Basic, grant_type=client_credentials&scope=api (RFC 6749, RFC 9068)
    POST /api/v1/admin/keys/rotate           Bearer; makes the next key. Honours Idempotency-Key
    POST /api/v1/admin/keys/{kid}/promote    Bearer; current → previous, kid → current. Honours Idempotency-Key

Keys lie in `signing_keys`; who may change them is the database's to say. With authority "database" this service only
reads, and its admin API answers 403. It runs as several replicas in one process, taken in turn per request. A replica
signs and publishes by its own view of the keys, which it reads again once that is older than `key_cache`, and at no
other time: the admin API's own changes reach a replica no sooner than anybody else's.

A private half is opened by Cloud KMS when it first signs, and forgotten when its key is no longer enabled. While the
database cannot be read, or a key not be opened, the answer is 503 and one sentence.

FAULTS: `faults.json` beside the configuration, read again whenever it changes, maps an endpoint ("jwks", "token",
"rotate", "promote", or "*" for those not named) to a fault, or a list of them to be met in this order. A fault holds
`times` (how many requests meet it; without it, all) and any of
    delay: 1.5                  seconds before anything else
    cut: true                   closes the connection without an answer, having done nothing
    effect_then_cut: true       does what was asked, then closes the connection without an answer
    status: 503                 this status instead of the answer, nothing is done
    body: "<html>…"             this body instead of the answer (`content_type`, text/html unless told otherwise)
    redirect: "http://…"        307 to there (or `status`), nothing is done
    jwks: {"keys": […]}         this JWKS, literally
    clock_offset: -3600         seconds added to this service's clock: Date, iat, exp
    sign_wrong: true            signs with a throw-away key under the current kid
    old_kid: true               signs with the key that was current before
"""

import argparse
import base64
import binascii
import contextlib
import hmac
import itertools
import json
import re
import signal
import socketserver
import stat
import sys
import threading
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import Message
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, unquote_plus

import google_crc32c
import grpc
import jwt
import psycopg2
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from google.api_core.exceptions import GoogleAPICallError
from google.cloud.kms_v1 import KeyManagementServiceClient
from google.cloud.kms_v1.services.key_management_service.transports import KeyManagementServiceGrpcTransport
from psycopg2 import errors, extensions

_LOOPBACK = "127.0.0.1"
_CONNECTIONS = 6
_PATIENCE = 2.0  # seconds that the database or the KMS has before the answer is 503
_LARGEST_REQUEST = 64 * 1024
_REMEMBERED_ANSWERS = 1_000
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})

# Without these, the client would wait up to two minutes before it tries a KMS again that was away for a while.
_CHANNEL = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500)]

_PUBLISHED = """
    SELECT kid, status, public_jwk, private_key_ciphertext FROM public.signing_keys
    WHERE enabled ORDER BY promoted_at NULLS LAST, kid
"""
_INSERT_NEXT = """
    INSERT INTO public.signing_keys (kid, alg, public_jwk, private_key_ciphertext, sealed_by, status)
    VALUES (%s, 'ES256', %s, %s, %s, 'next') RETURNING created_at
"""
_NEXT = "SELECT kid FROM public.signing_keys WHERE status = 'next'"
_LOCKED = "SELECT status FROM public.signing_keys WHERE kid = %s FOR UPDATE"
_DEMOTE_CURRENT = "UPDATE public.signing_keys SET status = 'previous' WHERE status = 'current' RETURNING kid"
_PROMOTE = "UPDATE public.signing_keys SET status = 'current' WHERE kid = %s"
_SAY_WHO = "SELECT set_config('key_rotation.actor', 'identity service, admin API', true)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The configuration file, as JSON. Durations in seconds."""

    port: int
    database_url: str
    kms_endpoint: str
    kms_key: str
    kms_token: str
    environment: str
    issuer: str
    audience: str
    client_id: str
    client_secret: str
    admin_token: str
    scope: str = "api"
    token_lifetime: float = 3600
    key_cache: float = 0
    replicas: int = 1
    jwks_max_age: int = 0
    authority: Literal["database", "api"] = "database"
    admin_database_url: str | None = None  # with authority "api": where database_url's role may only read

    @classmethod
    def load(cls, path: Path) -> "Config":
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise SystemExit(f"{path} holds secrets and others may read it: chmod 600 {path}")
        try:
            config = cls(**json.loads(path.read_text()))
        except (TypeError, ValueError) as wrong:
            raise SystemExit(f"{path}: {wrong}") from None
        if config.authority not in ("database", "api") or config.replicas < 1:
            raise SystemExit(f"{path}: authority is 'database' or 'api', replicas at least 1")
        return config


@dataclass(frozen=True, slots=True)
class Fault:
    """What one request meets; see FAULTS above."""

    times: int | None = None
    delay: float = 0
    cut: bool = False
    effect_then_cut: bool = False
    status: int | None = None
    body: str | None = None
    content_type: str = "text/html"
    redirect: str | None = None
    jwks: Mapping[str, Any] | None = None
    clock_offset: float = 0
    sign_wrong: bool = False
    old_kid: bool = False

    def replacement(self) -> "Answer | None":
        """The answer that stands in for the real one, and for its effect."""
        if self.redirect is not None:
            return json_answer(self.status or 307, {"error": "moved"}, {"Location": self.redirect})
        if self.body is not None:
            return Answer(self.status or 200, self.body.encode(), {"Content-Type": self.content_type})
        if self.status is not None:
            return json_answer(self.status, {"error": f"the sandbox was asked for {self.status}"})
        return None


@dataclass(frozen=True, slots=True)
class Request:
    endpoint: str
    path: str
    headers: Message
    body: bytes
    kid: str = ""

    @property
    def form(self) -> dict[str, str]:
        return {name: values[-1] for name, values in parse_qs(self.body.decode(errors="replace")).items()}


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    headers: Mapping[str, str]


def json_answer(status: int, content: Mapping[str, Any], headers: Mapping[str, str] = _NO_HEADERS) -> Answer:
    return Answer(status, json.dumps(content).encode() + b"\n", {"Content-Type": "application/json", **headers})


class RefusalError(Exception):
    """An answer other than the wanted one: its status, its sentence or RFC 6749 error code, and more fields."""

    def __init__(self, status: int, error: str, /, *, headers: Mapping[str, str] = _NO_HEADERS, **more: str | None) -> None:
        super().__init__(error)
        self._status, self._content, self._headers = status, {"error": error, **more}, headers

    def answer(self, request_id: str) -> "Answer":
        headers = {"Cache-Control": "no-store", **self._headers}
        return json_answer(self._status, {**self._content, "request_id": request_id}, headers)


# ------------------------------------------------------------------------------------------------ the database


@dataclass(frozen=True, slots=True)
class Key:
    kid: str
    status: str
    public_jwk: Mapping[str, Any]
    ciphertext: bytes | None


class Database:
    """A few connections, made anew when the server has gone away and come back."""

    def __init__(self, url: str, admin_url: str) -> None:
        self._url, self._admin_url = url, admin_url
        self._idle: deque[extensions.connection] = deque()
        self._slots = threading.BoundedSemaphore(_CONNECTIONS)

    def published(self) -> list[Key]:
        if not self._slots.acquire(timeout=_PATIENCE):
            raise _unreadable()
        try:
            return [Key(kid, status, jwk, None if sealed is None else bytes(sealed)) for kid, status, jwk, sealed in self._rows()]
        except psycopg2.Error as error:
            print(f"database: {str(error).strip()}", file=sys.stderr, flush=True)
            raise _unreadable() from None
        finally:
            self._slots.release()

    @contextlib.contextmanager
    def change(self) -> Iterator[extensions.cursor]:
        """One transaction on a connection of its own: a broken one must never be found out by a write."""
        try:
            with contextlib.closing(_connect(self._admin_url)) as connection, connection, connection.cursor() as cursor:
                cursor.execute(_SAY_WHO)
                yield cursor
        except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
            print(f"database: {str(error).strip()}", file=sys.stderr, flush=True)
            raise RefusalError(503, "The signing keys cannot be changed: the database does not answer.") from None

    def _rows(self) -> list[tuple[Any, ...]]:
        with contextlib.suppress(IndexError):  # until no idle connection is left
            while True:
                connection = self._idle.pop()
                try:
                    return self._read(connection)
                except psycopg2.Error:
                    if not connection.closed:
                        connection.close()
                        raise
        return self._read(_connect(self._url))

    def _read(self, connection: extensions.connection) -> list[tuple[Any, ...]]:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(_PUBLISHED)
            rows = cursor.fetchall()
        self._idle.append(connection)
        return rows


def _connect(url: str) -> extensions.connection:
    options = f"-c statement_timeout={int(_PATIENCE * 1000)}"
    return psycopg2.connect(url, connect_timeout=int(_PATIENCE), options=options, application_name="identity")


def _unreadable() -> RefusalError:
    return RefusalError(503, "The signing keys cannot be read: the database does not answer.")


# ------------------------------------------------------------------------------------------------ the private halves


class Kms:
    """Opens and seals private halves, bound to this environment and their kid."""

    def __init__(self, endpoint: str, key: str, token: str, environment: str) -> None:
        transport = KeyManagementServiceGrpcTransport(channel=grpc.insecure_channel(endpoint, options=_CHANNEL))
        self._client = KeyManagementServiceClient(transport=transport)
        self._key, self._environment = key, environment
        # One try: the caller of this service is waiting, and may ask again.
        self._call: dict[str, Any] = {
            "retry": None,
            "timeout": _PATIENCE,
            "metadata": [("authorization", f"Bearer {token}")],
        }

    def open(self, kid: str, ciphertext: bytes) -> bytes:
        with self._refusing(f"Signing key {kid} cannot be opened"):
            opened = self._client.decrypt(
                request={
                    "name": self._key,
                    "ciphertext": ciphertext,
                    "ciphertext_crc32c": google_crc32c.value(ciphertext),
                    **self._bound_to(kid),
                },
                **self._call,
            )
            if opened.plaintext_crc32c != google_crc32c.value(opened.plaintext):
                raise ValueError("its plaintext was damaged on the way")
            return opened.plaintext

    def seal(self, kid: str, plaintext: bytes) -> tuple[bytes, str]:
        """The ciphertext, and the name of the key version that made it."""
        with self._refusing("A new signing key cannot be sealed"):
            sealed = self._client.encrypt(
                request={
                    "name": self._key,
                    "plaintext": plaintext,
                    "plaintext_crc32c": google_crc32c.value(plaintext),
                    **self._bound_to(kid),
                },
                **self._call,
            )
            if not (sealed.verified_plaintext_crc32c and sealed.verified_additional_authenticated_data_crc32c):
                raise ValueError("the request was damaged on the way")
            if sealed.ciphertext_crc32c != google_crc32c.value(sealed.ciphertext):
                raise ValueError("its ciphertext was damaged on the way")
            if not sealed.name.startswith(f"{self._key}/"):
                raise ValueError("another key was used")
            return sealed.ciphertext, sealed.name

    def _bound_to(self, kid: str) -> dict[str, Any]:
        aad = f"keyrotation:v1:{self._environment}:{kid}".encode()
        return {
            "additional_authenticated_data": aad,
            "additional_authenticated_data_crc32c": google_crc32c.value(aad),
        }

    @contextlib.contextmanager
    def _refusing(self, sentence: str) -> Iterator[None]:
        try:
            yield
        except GoogleAPICallError as error:
            raise RefusalError(503, f"{sentence}: the KMS says {type(error).__name__}.") from None
        except ValueError as error:
            raise RefusalError(503, f"{sentence}: {error}.") from None


def public_jwk(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """RFC 7517, with the RFC 7638 thumbprint as kid."""
    numbers = key.public_key().public_numbers()
    point = {"crv": "P-256", "kty": "EC", "x": _base64url(numbers.x), "y": _base64url(numbers.y)}
    canonical = json.dumps(point, sort_keys=True, separators=(",", ":")).encode()
    thumbprint = base64.urlsafe_b64encode(sha256(canonical).digest()).rstrip(b"=").decode()
    return {**point, "kid": thumbprint, "alg": "ES256", "use": "sig"}


def _base64url(coordinate: int) -> str:
    return base64.urlsafe_b64encode(coordinate.to_bytes(32, "big")).rstrip(b"=").decode()


def private_half(kid: str, der: bytes, jwk: Mapping[str, Any]) -> ec.EllipticCurvePrivateKey:
    """The opened key, if it is the other half of the row's."""
    try:
        key = serialization.load_der_private_key(der, password=None)
        if isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1):
            own = public_jwk(key)
            if (own["x"], own["y"]) == (jwk["x"], jwk["y"]):
                return key
    except ValueError:
        pass  # its text could quote what was opened
    raise RefusalError(503, f"Signing key {kid} cannot be used: what was sealed is not its private half.")


# ------------------------------------------------------------------------------------------------ a replica


@dataclass(frozen=True, slots=True)
class View:
    """The enabled keys, as they were read at an instant of the monotonic clock."""

    keys: tuple[Key, ...]
    read_at: float

    def latest(self, status: str) -> Key | None:
        return next((key for key in reversed(self.keys) if key.status == status), None)


class Replica:
    """One instance behind the load balancer: a view of the keys, and the private halves that it has opened.

    No locks: where several requests find the view too old, each reads for itself, as good as any other.
    """

    def __init__(self, database: Database, kms: Kms, key_cache: float) -> None:
        self._database, self._kms, self._key_cache = database, kms, key_cache
        self._view: View | None = None
        self._opened: dict[str, ec.EllipticCurvePrivateKey] = {}

    def view(self) -> View:
        """The keys as this replica knows them: never read longer than key_cache ago."""
        # The age counts from before the read: what is committed later is not in it for certain.
        now = time.monotonic()
        view = self._view
        if view is None or now - view.read_at >= self._key_cache:
            view = View(tuple(self._database.published()), now)
            enabled = {key.kid for key in view.keys}
            self._opened = {kid: private for kid, private in self._opened.items() if kid in enabled}
            self._view = view
        return view

    def private(self, key: Key) -> ec.EllipticCurvePrivateKey:
        opened = self._opened.get(key.kid)
        if opened is None:
            if key.ciphertext is None:
                raise RefusalError(503, f"Signing key {key.kid} cannot sign: its private half was erased.")
            opened = private_half(key.kid, self._kms.open(key.kid, key.ciphertext), key.public_jwk)
            self._opened[key.kid] = opened
        return opened


# ------------------------------------------------------------------------------------------------ the service


class IdentityService:
    """The endpoints. Each takes the request and the fault that it meets, and returns the answer or a refusal."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._kms = Kms(config.kms_endpoint, config.kms_key, config.kms_token, config.environment)
        self._database = Database(config.database_url, config.admin_database_url or config.database_url)
        replicas = [Replica(self._database, self._kms, config.key_cache) for _ in range(config.replicas)]
        self._turn = itertools.cycle(enumerate(replicas))
        self._admin = threading.Lock()
        self._answers: dict[tuple[str, str], Answer] = {}

    def take_turn(self) -> tuple[int, Replica]:
        return next(self._turn)  # one step of a C iterator: atomic

    def answer(self, request: Request, replica: Replica, fault: Fault) -> Answer:
        match request.endpoint:
            case "jwks":
                return self._jwks(replica, fault)
            case "token":
                return self._token(request, replica, fault)
            case "rotate":
                return self._administered(request, self._rotate)
            case _:
                return self._administered(request, lambda: self._promote(request.kid))

    def _jwks(self, replica: Replica, fault: Fault) -> Answer:
        max_age = self._config.jwks_max_age
        caching = f"public, max-age={max_age}" if max_age > 0 else "no-store, max-age=0"
        keys = {"keys": [key.public_jwk for key in replica.view().keys]} if fault.jwks is None else fault.jwks
        return json_answer(200, keys, {"Cache-Control": caching})

    def _token(self, request: Request, replica: Replica, fault: Fault) -> Answer:
        self._check_client(request)
        scope = self._granted_scope(request.form)
        key, private = _signing_key(replica, fault)
        now = time.time() + fault.clock_offset
        token = jwt.encode(self._claims(scope, int(now)), private, algorithm="ES256", headers={"kid": key.kid, "typ": "at+jwt"})
        lifetime = int(self._config.token_lifetime)
        content = {"access_token": token, "token_type": "Bearer", "expires_in": lifetime, "scope": scope}
        return json_answer(200, content, {"Cache-Control": "no-store"})

    def _claims(self, scope: str, now: int) -> dict[str, Any]:
        return {
            "iss": self._config.issuer,
            "aud": self._config.audience,
            "sub": self._config.client_id,
            "client_id": self._config.client_id,
            "scope": scope,
            "iat": now,
            "exp": now + int(self._config.token_lifetime),
            "jti": str(uuid.uuid4()),
        }

    def _check_client(self, request: Request) -> None:
        name, _, secret = _basic_credentials(request.headers.get("Authorization", "")).partition(":")
        # RFC 6749 2.3.1 has both form-encoded, curl sends them as they are: either will do.
        known = any(_same(decode(name), self._config.client_id) and _same(decode(secret), self._config.client_secret) for decode in (str, unquote_plus))
        if not known:
            wrong = "Unknown client or wrong secret."
            raise RefusalError(401, "invalid_client", error_description=wrong, headers=_challenge("Basic"))

    def _granted_scope(self, form: Mapping[str, str]) -> str:
        if form.get("grant_type") is None:
            raise RefusalError(400, "invalid_request", error_description="grant_type is missing.")
        if form["grant_type"] != "client_credentials":
            raise RefusalError(400, "unsupported_grant_type", error_description="Only client_credentials is offered.")
        scope = form.get("scope", self._config.scope)
        if not set(scope.split()) <= set(self._config.scope.split()):
            raise RefusalError(400, "invalid_scope", error_description=f"Only {self._config.scope} is offered.")
        return scope

    def _administered(self, request: Request, act: Callable[[], Answer]) -> Answer:
        if not _same(request.headers.get("Authorization", ""), f"Bearer {self._config.admin_token}"):
            raise RefusalError(401, "The admin token is missing or wrong.", headers=_challenge("Bearer"))
        if self._config.authority == "database":
            raise RefusalError(403, "The admin API is closed: the keys are rotated by the database's own rotator role.")
        with self._admin:
            return self._once(request.path, request.headers.get("Idempotency-Key"), act)

    def _once(self, path: str, key: str | None, act: Callable[[], Answer]) -> Answer:
        # A refusal has changed nothing and is not remembered: asking again may find another state.
        if key is None:
            return act()
        if (path, key) not in self._answers:
            self._answers[path, key] = act()
            if len(self._answers) > _REMEMBERED_ANSWERS:
                del self._answers[next(iter(self._answers))]
        return self._answers[path, key]

    def _rotate(self) -> Answer:
        with self._database.change() as cursor:
            _refuse_second_next(cursor)
        private = ec.generate_private_key(ec.SECP256R1())
        jwk = public_jwk(private)
        ciphertext, sealed_by = self._kms.seal(jwk["kid"], _pkcs8(private))
        try:
            with self._database.change() as cursor:
                cursor.execute(_INSERT_NEXT, (jwk["kid"], json.dumps(jwk), ciphertext, sealed_by))
                created_at = _one(cursor)
        except errors.UniqueViolation as taken:  # somebody was faster, or this rotation has made its key already
            with self._database.change() as cursor:
                _refuse_second_next(cursor)
            raise RefusalError(409, _sentence(taken)) from None
        except errors.RaiseException as refused:
            raise RefusalError(409, _sentence(refused)) from None
        created = created_at.astimezone(UTC).isoformat()
        return json_answer(201, {"kid": jwk["kid"], "status": "next", "created_at": created})

    def _promote(self, kid: str) -> Answer:
        try:
            with self._database.change() as cursor:
                cursor.execute(_LOCKED, (kid,))
                _refuse_unpromotable(kid, _one(cursor))
                cursor.execute(_DEMOTE_CURRENT)
                previous = _one(cursor)
                cursor.execute(_PROMOTE, (kid,))
        except (errors.RaiseException, psycopg2.IntegrityError) as refused:
            raise RefusalError(409, _sentence(refused), kid=kid) from None
        return json_answer(200, {"kid": kid, "status": "current", "previous": previous})


def _signing_key(replica: Replica, fault: Fault) -> tuple[Key, ec.EllipticCurvePrivateKey]:
    view = replica.view()
    key = view.latest("current")
    if fault.old_kid:
        key = view.latest("previous") or key
    if key is None:
        raise RefusalError(503, "No token can be issued: there is no current signing key yet.")
    if fault.sign_wrong:
        return key, ec.generate_private_key(ec.SECP256R1())
    return key, replica.private(key)


def _refuse_second_next(cursor: extensions.cursor) -> None:
    cursor.execute(_NEXT)
    if existing := _one(cursor):
        raise RefusalError(409, f"There is a next key already: {existing}.", kid=existing)


def _refuse_unpromotable(kid: str, status: str | None) -> None:
    if status is None:
        raise RefusalError(404, f"There is no signing key {kid}.", kid=kid)
    if status in ("current", "disabled"):
        raise RefusalError(409, f"Signing key {kid} is {status} and cannot be promoted.", kid=kid, status=status)


def _one(cursor: extensions.cursor) -> Any:
    """The only column of the only row; None where there is no row."""
    row = cursor.fetchone()
    return None if row is None else row[0]


def _sentence(error: psycopg2.Error) -> str:
    """What the database said, without its context: a failing row would show the ciphertext."""
    return error.diag.message_primary or "The database refused the change."


def _pkcs8(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _basic_credentials(authorization: str) -> str:
    scheme, _, encoded = authorization.partition(" ")
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(encoded, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _challenge(scheme: str) -> dict[str, str]:
    return {"WWW-Authenticate": f'{scheme} realm="identity"'}


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())


# ------------------------------------------------------------------------------------------------ faults


@dataclass(slots=True)
class Waiting:
    """A fault, and how many requests still meet it (None: all)."""

    fault: Fault
    left: int | None


class Faults:
    """What a test wants the next requests to meet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._waiting: dict[str, list[Waiting]] = {}
        self._lock = threading.Lock()

    def next(self, endpoint: str) -> Fault:
        """The fault that this request meets, mostly none."""
        with self._lock:
            self._reread()
            for waiting in self._waiting.get(endpoint, self._waiting.get("*", [])):
                if waiting.left is None:
                    return waiting.fault
                if waiting.left > 0:
                    waiting.left -= 1
                    return waiting.fault
        return Fault()

    def _reread(self) -> None:
        try:
            found = self._path.stat()
            changed = (found.st_mtime_ns, found.st_ino, found.st_size)
            if changed != self._seen:
                self._waiting = _read_faults(self._path.read_text())
                self._seen = changed
        except FileNotFoundError:
            self._waiting, self._seen = {}, None
        except json.JSONDecodeError:
            pass  # caught in the middle of being written: the next request reads it


def _read_faults(text: str) -> dict[str, list[Waiting]]:
    listed = {endpoint: each if isinstance(each, list) else [each] for endpoint, each in json.loads(text).items()}
    return {endpoint: [Waiting(fault, fault.times) for fault in (Fault(**each) for each in wanted)] for endpoint, wanted in listed.items()}


# ------------------------------------------------------------------------------------------------ HTTP

_ROUTES = (
    ("GET", re.compile(r"/\.well-known/jwks\.json"), "jwks"),
    ("POST", re.compile(r"/oauth2/token"), "token"),
    ("POST", re.compile(r"/api/v1/admin/keys/rotate"), "rotate"),
    ("POST", re.compile(r"/api/v1/admin/keys/(?P<kid>[^/]+)/promote"), "promote"),
)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, config: Config, faults: Faults) -> None:
        self.service = IdentityService(config)
        self.faults = faults
        super().__init__((_LOOPBACK, config.port), Handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks the name service for our name.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = _LOOPBACK, int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that went away is no news
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "sandbox-identity"
    sys_version = ""
    wbufsize = -1  # head and body leave in one packet: no waiting for an acknowledgement in between
    disable_nagle_algorithm = True
    server: Server
    _clock_offset = 0.0
    _request_id = "-"

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        began = time.monotonic()
        self._clock_offset = 0.0
        given = self.headers.get("X-Request-Id", "")
        self._request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        number, replica = self.server.service.take_turn()
        answer = self._answer(replica)
        if answer is None:
            self.close_connection = True
        else:
            self._send(answer, number)
        self._log(0 if answer is None else answer.status, number, time.monotonic() - began)

    def _answer(self, replica: Replica) -> Answer | None:
        """None: the connection is to be closed without an answer."""
        try:
            request = self._routed(self._read_body())
            fault = self.server.faults.next(request.endpoint)
            self._clock_offset = fault.clock_offset
            time.sleep(fault.delay)
            if fault.cut:
                return None
            answer = fault.replacement() or self.server.service.answer(request, replica, fault)
            return None if fault.effect_then_cut else answer
        except RefusalError as refusal:
            return refusal.answer(self._request_id)
        except Exception:  # an answer for every request; what happened is in the log
            traceback.print_exc()
            return json_answer(500, {"error": "This service made a mistake.", "request_id": self._request_id})

    def _read_body(self) -> bytes:
        # Read before anything is decided: what is left in the connection would be taken for the next request.
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not length.isdecimal():
            self.close_connection = True
            raise RefusalError(411, "Send the length of the body.")
        if int(length) > _LARGEST_REQUEST:
            self.close_connection = True
            raise RefusalError(413, f"A request may have {_LARGEST_REQUEST} bytes.")
        return self.rfile.read(int(length))

    def _routed(self, body: bytes) -> Request:
        path = self.path.partition("?")[0]
        for method, pattern, endpoint in _ROUTES:
            if found := pattern.fullmatch(path):
                if method != self.command:
                    raise RefusalError(405, f"Use {method}.", headers={"Allow": method})
                kid = unquote(found.groupdict().get("kid", ""))
                return Request(endpoint, path, self.headers, body, kid)
        raise RefusalError(404, "There is nothing here.")

    def _send(self, answer: Answer, replica: int | None = None) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("X-Request-Id", self._request_id)
        if replica is not None:
            self.send_header("X-Replica", str(replica))
        self.send_header("Content-Length", str(len(answer.body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself finds wrong with a request."""
        self.close_connection = True
        self._send(json_answer(code, {"error": message or "This request cannot be read."}))

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string((time.time() if timestamp is None else timestamp) + self._clock_offset)

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Said by `_log`, once for each request."""

    def _log(self, status: int, replica: int, took: float) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        path = self.path.partition("?")[0]  # a query could hold a secret, and no endpoint here takes one
        said = f"{at} {self.command} {path!r} {status or 'cut'} {took * 1000:.1f}ms replica={replica}"
        sys.stderr.write(f"{said} request={self._request_id}\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sandbox.identity", description="The reference identity service.")
    parser.add_argument("--config", type=Path, required=True, help="JSON, readable by its owner only (0600)")
    path = parser.parse_args().config
    server = Server(Config.load(path), Faults(path.with_name("faults.json")))
    for number in (signal.SIGTERM, signal.SIGINT):
        # shutdown() waits for serve_forever(), which this very thread is in.
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()
