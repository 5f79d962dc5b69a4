"""Owns the Cloud KMS of the sandbox: the real gRPC service `google.cloud.kms.v1.KeyManagementService`, on loopback.

The real client talks to it over a plaintext channel. What it does, it does as Cloud KMS: AES-256-GCM with the caller's
additional authenticated data, CRC32C in both directions, Google's status codes and wording, and permissions checked
before existence, so that a stranger cannot tell a missing key from a closed one. What it leaves out: everything that
neither a rotator, an identity service nor a doctor calls.

    python -m sandbox.kms --port P --home DIR --key projects/…/cryptoKeys/… [--key …]

    DIR/keys.json        the keys, readable by their owner only; written by rename, kept over restarts
    DIR/principals.json  {"TOKEN": ["encrypt", "decrypt", "view", "admin"], …}: who may do what, by bearer token; read
                         at each call. The words are the roles cryptoKeyEncrypter, cryptoKeyDecrypter, viewer, admin
    DIR/faults.json      {"Encrypt": {…}, …}: what the next calls of a method meet; read again whenever it changes

A fault holds `times` (how many calls meet it; without it, all) and any of
    error: "UNAVAILABLE"    the call ends with this status and has done nothing
    delay: 1.5              seconds before anything else
    flip_bit: 3             this bit of the answer's ciphertext (or plaintext) is turned over, the checksum is not
    wrong_crc: true         the answer's checksum is another one
    unverified: true        the answer says that the request's checksums were not looked at
    other_name: true        the answer names another key
    other_plaintext: true   what is encrypted is not what was sent, and every checksum agrees
"""

import argparse
import contextlib
import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from google.cloud.kms_v1.types import resources, service
from google.iam.v1 import iam_policy_pb2

KMS_SERVICE = "google.cloud.kms.v1.KeyManagementService"
IAM_SERVICE = "google.iam.v1.IAMPolicy"

# https://cloud.google.com/kms/quotas: plaintext and additional authenticated data of a software key.
_LIMIT = 64 * 1024
_NONCE = 12
_VERSION = 4  # bytes at the front of a ciphertext that hold the version of the key

_ENCRYPT = "cloudkms.cryptoKeyVersions.useToEncrypt"
_DECRYPT = "cloudkms.cryptoKeyVersions.useToDecrypt"
_GET_RING = "cloudkms.keyRings.get"
_GET_KEY = "cloudkms.cryptoKeys.get"
_GET_VERSION = "cloudkms.cryptoKeyVersions.get"
_UPDATE_KEY = "cloudkms.cryptoKeys.update"
_CREATE_VERSION = "cloudkms.cryptoKeyVersions.create"
_UPDATE_VERSION = "cloudkms.cryptoKeyVersions.update"
_DESTROY_VERSION = "cloudkms.cryptoKeyVersions.destroy"

_VIEW = {_GET_RING, _GET_KEY, _GET_VERSION}
_ROLES: Mapping[str, set[str]] = {
    "encrypt": {_ENCRYPT},
    "decrypt": {_DECRYPT},
    "view": _VIEW,
    "admin": _VIEW | {_UPDATE_KEY, _CREATE_VERSION, _UPDATE_VERSION, _DESTROY_VERSION},
}

_State = resources.CryptoKeyVersion.CryptoKeyVersionState
_GOOGLE_SYMMETRIC = resources.CryptoKeyVersion.CryptoKeyVersionAlgorithm.GOOGLE_SYMMETRIC_ENCRYPTION


Fault = Mapping[str, Any]
Response = Any  # one of the proto types, whose package shows mypy nothing


class RefusalError(Exception):
    """A call that ends with a status of its own, in Google's words."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


@dataclass(slots=True)
class Version:
    """One version of a key. `kek` is None once it has been destroyed."""

    name: str
    state: str
    created: str
    kek: bytes | None

    def cipher(self) -> AESGCM:
        if self.kek is None or self.state != "ENABLED":
            raise RefusalError(grpc.StatusCode.FAILED_PRECONDITION, f"{self.name} is not enabled, current state is: {self.state}.")
        return AESGCM(self.kek)


@dataclass(slots=True)
class Key:
    """A symmetric key: its versions by number, and which of them encrypts."""

    name: str
    primary: int
    versions: dict[int, Version]

    def version(self, number: int) -> Version:
        if (version := self.versions.get(number)) is None:
            raise _not_found("CryptoKeyVersion", f"{self.name}/cryptoKeyVersions/{number}")
        return version

    def add_version(self) -> Version:
        number = max(self.versions, default=0) + 1
        name = f"{self.name}/cryptoKeyVersions/{number}"
        self.versions[number] = Version(name, "ENABLED", datetime.now(UTC).isoformat(), secrets.token_bytes(32))
        return self.versions[number]


class KeyRing:
    """The keys on disk. Every change is on disk before the caller hears of it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._keys = _read_keys(path) if path.exists() else {}

    def create(self, name: str) -> None:
        """Makes a key with one version, unless it is there already."""
        if name not in self._keys:
            self._keys[name] = Key(name, 1, {})
            self._keys[name].add_version()
            self.save()

    def key(self, name: str) -> Key:
        if (key := self._keys.get(name)) is None:
            raise _not_found("CryptoKey", name)
        return key

    def version(self, name: str) -> Version:
        """A version by its own name."""
        return self.key(key_of(name)).version(_number_of(name))

    def holds_ring(self, name: str) -> bool:
        return any(key.startswith(f"{name}/cryptoKeys/") for key in self._keys)

    def save(self) -> None:
        unfinished = self._path.with_suffix(".unfinished")
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump({name: _key_to_json(key) for name, key in self._keys.items()}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self._path)


class Principals:
    """Who calls, by bearer token, and what they may do."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def permissions(self, metadata: Sequence[tuple[str, str | bytes]]) -> set[str]:
        """The caller's permissions; a caller without a known token is refused."""
        authorization = str(dict(metadata).get("authorization", ""))
        scheme, _, token = authorization.partition(" ")
        roles = self._known().get(token) if scheme.lower() == "bearer" else None
        if roles is None:
            raise RefusalError(
                grpc.StatusCode.UNAUTHENTICATED,
                "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other "
                "valid authentication credential. See "
                "https://developers.google.com/identity/sign-in/web/devconsole-project.",
            )
        return set().union(*(_ROLES[role] for role in roles))

    def _known(self) -> dict[str, list[str]]:
        known: dict[str, list[str]] = json.loads(self._path.read_text()) if self._path.exists() else {}
        return known


class Faults:
    """What a test wants the next calls to meet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._waiting: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def next(self, method: str) -> dict[str, Any]:
        """The fault that this call of the method meets; empty for none."""
        with self._lock:
            self._reread()
            fault = self._waiting.get(method, {})
            if "times" in fault:
                if fault["times"] <= 0:
                    return {}
                fault["times"] -= 1
            return dict(fault)

    def _reread(self) -> None:
        try:
            stat = self._path.stat()
            changed = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
            if changed != self._seen:
                self._waiting = json.loads(self._path.read_text())
                self._seen = changed
        except FileNotFoundError:
            self._waiting, self._seen = {}, None
        except json.JSONDecodeError:
            pass  # caught in the middle of being written: the next call reads it


class Emulator:
    """The methods. Each takes the request and the caller's permissions and fault, and returns the response."""

    def __init__(self, home: Path, keys: Sequence[str]) -> None:
        self._ring = KeyRing(home / "keys.json")
        self._principals = Principals(home / "principals.json")
        self._faults = Faults(home / "faults.json")
        self._lock = threading.RLock()
        for name in keys:
            self._ring.create(name)

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """What a gRPC server needs to offer both services."""
        kms = {name: self._handler(name, *method) for name, method in self._methods().items()}
        iam = grpc.unary_unary_rpc_method_handler(
            self._answering("TestIamPermissions", self.test_iam_permissions),
            iam_policy_pb2.TestIamPermissionsRequest.FromString,
            iam_policy_pb2.TestIamPermissionsResponse.SerializeToString,
        )
        return [
            grpc.method_handlers_generic_handler(KMS_SERVICE, kms),
            grpc.method_handlers_generic_handler(IAM_SERVICE, {"TestIamPermissions": iam}),
        ]

    def encrypt(self, request: service.EncryptRequest, may: set[str], fault: Fault) -> Response:
        _require(may, _ENCRYPT, request.name)
        _check_size("plaintext", request.plaintext)
        _check_size("additional_authenticated_data", request.additional_authenticated_data)
        _check_crc(request, "plaintext")
        _check_crc(request, "additional_authenticated_data")
        version = self._to_encrypt_with(request.name)
        cipher, nonce = version.cipher(), secrets.token_bytes(_NONCE)
        plaintext = secrets.token_bytes(len(request.plaintext)) if fault.get("other_plaintext") else request.plaintext
        sealed = cipher.encrypt(nonce, plaintext, request.additional_authenticated_data)
        ciphertext = _number_of(version.name).to_bytes(_VERSION, "big") + nonce + sealed
        looked_at = not fault.get("unverified")
        return service.EncryptResponse(
            name=_other(version.name) if fault.get("other_name") else version.name,
            ciphertext=_damaged(ciphertext, fault),
            ciphertext_crc32c=_answer_crc(ciphertext, fault),
            verified_plaintext_crc32c=looked_at and "plaintext_crc32c" in request,
            verified_additional_authenticated_data_crc32c=looked_at and "additional_authenticated_data_crc32c" in request,
            protection_level=resources.ProtectionLevel.SOFTWARE,
        )

    def decrypt(self, request: service.DecryptRequest, may: set[str], fault: Fault) -> Response:
        _require(may, _DECRYPT, request.name)
        _check_crc(request, "ciphertext")
        _check_crc(request, "additional_authenticated_data")
        key = self._ring.key(request.name)
        number = int.from_bytes(request.ciphertext[:_VERSION], "big")
        if number not in key.versions:
            raise _undecipherable()
        body = request.ciphertext[_VERSION:]
        try:
            cipher = key.version(number).cipher()
            plaintext = cipher.decrypt(body[:_NONCE], body[_NONCE:], request.additional_authenticated_data)
        except (InvalidTag, ValueError):
            raise _undecipherable() from None
        return service.DecryptResponse(
            plaintext=_damaged(plaintext, fault),
            plaintext_crc32c=_answer_crc(plaintext, fault),
            used_primary=number == key.primary,
            protection_level=resources.ProtectionLevel.SOFTWARE,
        )

    def get_key_ring(self, request: service.GetKeyRingRequest, may: set[str], _: Fault) -> Response:
        _require(may, _GET_RING, request.name)
        if not self._ring.holds_ring(request.name):
            raise _not_found("KeyRing", request.name)
        return resources.KeyRing(name=request.name)

    def get_crypto_key(self, request: service.GetCryptoKeyRequest, may: set[str], _: Fault) -> Response:
        _require(may, _GET_KEY, request.name)
        return _key_resource(self._ring.key(request.name))

    def get_crypto_key_version(self, request: service.GetCryptoKeyVersionRequest, may: set[str], _: Fault) -> Response:
        _require(may, _GET_VERSION, request.name)
        return _version_resource(self._ring.version(request.name))

    def create_version(self, request: service.CreateCryptoKeyVersionRequest, may: set[str], _: Fault) -> Response:
        _require(may, _CREATE_VERSION, request.parent)
        version = self._ring.key(request.parent).add_version()
        self._ring.save()
        return _version_resource(version)

    def make_primary(self, request: service.UpdateCryptoKeyPrimaryVersionRequest, may: set[str], _: Fault) -> Response:
        _require(may, _UPDATE_KEY, request.name)
        key = self._ring.key(request.name)
        number = _number_of(f"{key.name}/cryptoKeyVersions/{request.crypto_key_version_id}")
        key.version(number).cipher()  # only an enabled version can be the primary one
        key.primary = number
        self._ring.save()
        return _key_resource(key)

    def update_version(self, request: service.UpdateCryptoKeyVersionRequest, may: set[str], _: Fault) -> Response:
        wanted = request.crypto_key_version
        _require(may, _UPDATE_VERSION, wanted.name)
        version = self._ring.version(wanted.name)
        state = _State(wanted.state).name
        if list(request.update_mask.paths) != ["state"] or state not in ("ENABLED", "DISABLED"):
            raise _invalid("update_mask must be 'state', and the state ENABLED or DISABLED.")
        if version.state not in ("ENABLED", "DISABLED"):
            raise RefusalError(grpc.StatusCode.FAILED_PRECONDITION, f"{version.name} is in state {version.state}.")
        version.state = state
        self._ring.save()
        return _version_resource(version)

    def destroy_version(self, request: service.DestroyCryptoKeyVersionRequest, may: set[str], _: Fault) -> Response:
        _require(may, _DESTROY_VERSION, request.name)
        version = self._ring.version(request.name)
        # Cloud KMS waits 30 days first; a test that destroys wants to see what is lost.
        version.state, version.kek = "DESTROYED", None
        self._ring.save()
        return _version_resource(version)

    def test_iam_permissions(self, request: Any, may: set[str], _: Fault) -> Response:
        granted = [permission for permission in request.permissions if permission in may]
        return iam_policy_pb2.TestIamPermissionsResponse(permissions=granted)

    def _methods(self) -> dict[str, tuple[Any, Any, Any]]:
        key, version = resources.CryptoKey, resources.CryptoKeyVersion
        return {
            "Encrypt": (self.encrypt, service.EncryptRequest, service.EncryptResponse),
            "Decrypt": (self.decrypt, service.DecryptRequest, service.DecryptResponse),
            "GetKeyRing": (self.get_key_ring, service.GetKeyRingRequest, resources.KeyRing),
            "GetCryptoKey": (self.get_crypto_key, service.GetCryptoKeyRequest, key),
            "GetCryptoKeyVersion": (self.get_crypto_key_version, service.GetCryptoKeyVersionRequest, version),
            "CreateCryptoKeyVersion": (self.create_version, service.CreateCryptoKeyVersionRequest, version),
            "UpdateCryptoKeyPrimaryVersion": (self.make_primary, service.UpdateCryptoKeyPrimaryVersionRequest, key),
            "UpdateCryptoKeyVersion": (self.update_version, service.UpdateCryptoKeyVersionRequest, version),
            "DestroyCryptoKeyVersion": (self.destroy_version, service.DestroyCryptoKeyVersionRequest, version),
        }

    def _handler(self, name: str, method: Any, request: Any, response: Any) -> "grpc.RpcMethodHandler[Any, Any]":
        return grpc.unary_unary_rpc_method_handler(self._answering(name, method), request.deserialize, response.serialize)

    def _answering(self, name: str, method: Any) -> Callable[[Any, grpc.ServicerContext], Any]:
        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            fault = self._faults.next(name)
            time.sleep(fault.get("delay", 0))
            if "error" in fault:
                context.abort(grpc.StatusCode[fault["error"]], f"The sandbox was asked for {fault['error']}.")
            try:
                may = self._principals.permissions(context.invocation_metadata())
                with self._lock:
                    return method(request, may, fault)
            except RefusalError as refusal:
                context.abort(refusal.code, refusal.message)

        return answer

    def _to_encrypt_with(self, name: str) -> Version:
        if "/cryptoKeyVersions/" in name:
            return self._ring.version(name)
        key = self._ring.key(name)
        return key.version(key.primary)


def key_of(name: str) -> str:
    """The key of a key's or a version's name."""
    return name.partition("/cryptoKeyVersions/")[0]


def serve(home: Path, port: int, keys: Sequence[str]) -> grpc.Server:
    """A started server on loopback; the caller stops it."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Without SO_REUSEPORT: two emulators on one port would share it in silence, and calls would go to either.
    server = grpc.server(ThreadPoolExecutor(max_workers=16), options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers(Emulator(home, keys).handlers())
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sandbox.kms", description="Cloud KMS on loopback.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--key", action="append", default=[], help="projects/…/cryptoKeys/…, made if it is not there")
    arguments = parser.parse_args()
    asked_to_end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked_to_end.set())
    server = serve(arguments.home, arguments.port, arguments.key)
    asked_to_end.wait()
    server.stop(grace=0.5).wait()


def _require(may: set[str], permission: str, resource: str) -> None:
    if permission not in may:
        raise RefusalError(
            grpc.StatusCode.PERMISSION_DENIED,
            f"Permission '{permission}' denied on resource '{resource}' (or it may not exist).",
        )


def _check_size(field: str, value: bytes) -> None:
    if len(value) > _LIMIT:
        raise _invalid(f"The {field} field must be at most {_LIMIT} bytes; it has {len(value)}.")


def _check_crc(request: Any, field: str) -> None:
    # `in` asks whether the wrapper is there at all: 0 is a checksum like any other.
    checksum = f"{field}_crc32c"
    if checksum in request and getattr(request, checksum) != google_crc32c.value(getattr(request, field)):
        raise _invalid(f"The checksum in field {checksum} did not match the data in field {field}.")


def _damaged(answer: bytes, fault: Fault) -> bytes:
    if "flip_bit" not in fault:
        return answer
    byte, bit = divmod(int(fault["flip_bit"]) % (len(answer) * 8), 8)
    return answer[:byte] + bytes([answer[byte] ^ (1 << bit)]) + answer[byte + 1 :]


def _answer_crc(answer: bytes, fault: Fault) -> int:
    return int(google_crc32c.value(answer)) ^ (1 if fault.get("wrong_crc") else 0)


def _other(version_name: str) -> str:
    return f"{key_of(version_name)}-other/cryptoKeyVersions/1"


def _number_of(version_name: str) -> int:
    with contextlib.suppress(ValueError):
        return int(version_name.rpartition("/cryptoKeyVersions/")[2])
    raise _not_found("CryptoKeyVersion", version_name)


def _not_found(kind: str, name: str) -> RefusalError:
    return RefusalError(grpc.StatusCode.NOT_FOUND, f"{kind} {name} not found.")


def _invalid(message: str) -> RefusalError:
    return RefusalError(grpc.StatusCode.INVALID_ARGUMENT, message)


def _undecipherable() -> RefusalError:
    # One answer for a wrong key, wrong additional data and an altered ciphertext, as the real one gives.
    return _invalid("Decryption failed: verify that 'name' refers to the correct CryptoKey.")


def _key_resource(key: Key) -> resources.CryptoKey:
    return resources.CryptoKey(
        name=key.name,
        primary=_version_resource(key.version(key.primary)),
        purpose=resources.CryptoKey.CryptoKeyPurpose.ENCRYPT_DECRYPT,
        create_time=datetime.fromisoformat(key.version(1).created),
    )


def _version_resource(version: Version) -> resources.CryptoKeyVersion:
    return resources.CryptoKeyVersion(
        name=version.name,
        state=_State.__members__[version.state],
        protection_level=resources.ProtectionLevel.SOFTWARE,
        algorithm=_GOOGLE_SYMMETRIC,
        create_time=datetime.fromisoformat(version.created),
    )


def _read_keys(path: Path) -> dict[str, Key]:
    return {name: _key_from_json(name, stored) for name, stored in json.loads(path.read_text()).items()}


def _key_from_json(name: str, stored: Mapping[str, Any]) -> Key:
    versions = {
        int(number): Version(
            name=f"{name}/cryptoKeyVersions/{number}",
            state=version["state"],
            created=version["created"],
            kek=None if version["kek"] is None else bytes.fromhex(version["kek"]),
        )
        for number, version in stored["versions"].items()
    }
    return Key(name, stored["primary"], versions)


def _key_to_json(key: Key) -> dict[str, Any]:
    versions = {
        str(number): {
            "state": version.state,
            "created": version.created,
            "kek": None if version.kek is None else version.kek.hex(),
        }
        for number, version in key.versions.items()
    }
    return {"primary": key.primary, "versions": versions}


if __name__ == "__main__":
    main()
