"""Seals private halves with Google Cloud KMS (ports.Sealer). Needs to encrypt, and never decrypts.

Owns: the deadlines and retries of a call, what makes an answer fit to be stored, Google's errors in words. Leaves to others: what is sealed
and under which context, and whether the ciphertext opens to the right key (the steps prove that by a token, before promotion).

An answer is stored only if Cloud KMS says that it saw the bytes that were sent (`verified_*`), the ciphertext has the checksum that it was
sent with, and the key's own version sealed it. Anything else is discarded and asked for anew, a limited number of times.
"""

from __future__ import annotations

import logging
import re
import time
from typing import Any

import google_crc32c

from keyrotation.domain.errors import BadAnswer, Denied, KeyRotationError, SettingsError, Unreachable, WorldError
from keyrotation.ports import Sealed
from keyrotation.secrets import SecretRef

log = logging.getLogger(__name__)

BUDGET = 10.0  # seconds for a seal, retries and discarded answers included
ATTEMPTS_IN_BUDGET = 3  # so many attempts fit in even where each is waited for to its end
ANSWERS = 3  # a line that flips bits twice may be an accident, thrice is not
TRANSIENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")  # tried again within the budget
PASSING = ("INTERNAL", "ABORTED")  # not within it, but another run may succeed
WORDS: dict[str, tuple[type[WorldError], str]] = {
    "PERMISSION_DENIED": (Denied, "denies encryption with {key}: grant roles/cloudkms.cryptoKeyEncrypter on it to this account (or there is no such key)"),
    "UNAUTHENTICATED": (Denied, "does not know the caller: renew {caller}"),
    "NOT_FOUND": (WorldError, "has no key {key}: check sealer.key, or create the key"),
    "FAILED_PRECONDITION": (WorldError, "finds the primary version of {key} disabled or destroyed: enable it, or make another version the primary one"),
    "INVALID_ARGUMENT": (WorldError, "refuses the request: check that {key} is a symmetric key (purpose ENCRYPT_DECRYPT)"),
    "RESOURCE_EXHAUSTED": (Unreachable, "refused for {budget} because the quota is used up: raise it, or run this again"),
    "UNAVAILABLE": (Unreachable, "did not answer within {budget} ({status}): check that this machine may reach {where}"),
    "DEADLINE_EXCEEDED": (Unreachable, "did not answer within {budget} ({status}): check that this machine may reach {where}"),
}
CHECK_CONTEXT = b"keyrotation: a check, no key"
LOOPBACK = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\]):\d+")

# At level DEBUG Google's client logs each request whole: the private half, and the bearer token.
CHATTER = logging.getLogger("google.cloud.kms_v1.services.key_management_service.transports.grpc")

# Without the first two, an emulator that was away for a while would be tried again only after up to two minutes.
EMULATOR_CHANNEL = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 500), ("grpc.enable_http_proxy", 0)]


class GoogleKmsSealer:
    """Encrypts with one Cloud KMS key. Connects at the first use, so that a process may fork before."""

    def __init__(self, key: str, endpoint: str | None, token: SecretRef | None, budget: float = BUDGET) -> None:
        """`key` is projects/…/cryptoKeys/…; `endpoint` (host:port) is an emulator's, and `token` names the caller to it."""
        if endpoint is not None and not LOOPBACK.fullmatch(endpoint):
            raise SettingsError(
                f"sealer.endpoint {endpoint} is not on this machine: private keys would cross the network in the clear; leave it out for Cloud KMS itself"
            )
        if endpoint is None and token is not None:
            raise SettingsError("sealer.token is for an emulator or Vault: Cloud KMS takes the application default credentials; leave it out")
        self._key, self._endpoint, self._token = key, endpoint, token
        self._budget, self._attempt = budget, budget / ATTEMPTS_IN_BUDGET
        self._client: Any = None

    def seal(self, plaintext: bytes, context: bytes) -> Sealed:
        """The ciphertext, bound to `context`; raises WorldError. `sealed_by` is the name of the key version."""
        deadline = time.monotonic() + self._budget
        flaws: list[str] = []
        while len(flaws) < ANSWERS and (left := deadline - time.monotonic()) > 0:
            answer = self._encrypt(plaintext, context, left)
            flaw = self._flaw_of(answer)
            if flaw is None:
                return Sealed(bytes(answer.ciphertext), str(answer.name))
            log.warning("an answer of Cloud KMS was discarded: %s", flaw)
            flaws.append(flaw)
        raise BadAnswer(
            f"Cloud KMS gave {len(flaws)} answers for {self._key} that cannot be used ({flaws[-1]}): nothing was stored; "
            "look for what alters traffic between this machine and Cloud KMS"
        )

    def check(self) -> str:
        """Which key version seals now, by sealing a throw-away text; raises what stands in the way."""
        return f"Cloud KMS seals with {self.seal(b'check', CHECK_CONTEXT).sealed_by}"

    def _encrypt(self, plaintext: bytes, context: bytes, left: float) -> Any:
        client = self._connected()
        # Loaded with the client, which takes two seconds.
        from google.api_core.exceptions import GoogleAPIError  # noqa: PLC0415
        from google.auth.exceptions import GoogleAuthError  # noqa: PLC0415

        request = {
            "name": self._key,
            "plaintext": plaintext,
            "plaintext_crc32c": google_crc32c.value(plaintext),
            "additional_authenticated_data": context,
            "additional_authenticated_data_crc32c": google_crc32c.value(context),
        }
        CHATTER.disabled = True  # at each call: a logging configuration that is loaded meanwhile would enable it again
        try:
            attempt = min(self._attempt, left)
            # The budget of the retries ends one attempt early: an attempt that begins in it has its time, and still ends within `left`.
            return client.encrypt(request=request, retry=_retry(left - attempt), timeout=_constant(attempt), metadata=self._metadata())
        except (GoogleAPIError, GoogleAuthError) as error:
            problem = self._in_words(error)
        raise problem  # outside the handler, so that the client's own error, which knows the call, is not chained to it

    def _connected(self) -> Any:
        if self._client is None:
            from google.auth.exceptions import GoogleAuthError  # noqa: PLC0415
            from google.cloud.kms_v1 import KeyManagementServiceClient  # noqa: PLC0415

            try:
                self._client = KeyManagementServiceClient(transport=self._transport())
            except GoogleAuthError as error:
                raise self._in_words(error) from None
        return self._client

    def _transport(self) -> Any:
        if self._endpoint is None:
            return None
        import grpc  # noqa: PLC0415
        from google.cloud.kms_v1.services.key_management_service.transports import KeyManagementServiceGrpcTransport  # noqa: PLC0415

        return KeyManagementServiceGrpcTransport(channel=grpc.insecure_channel(self._endpoint, options=EMULATOR_CHANNEL))

    def _metadata(self) -> list[tuple[str, str]]:
        return [] if self._token is None else [("authorization", f"Bearer {self._token.reveal()}")]

    def _flaw_of(self, answer: Any) -> str | None:
        if not answer.verified_plaintext_crc32c or not answer.verified_additional_authenticated_data_crc32c:
            return "it does not say that what was sent arrived unaltered"
        if not answer.ciphertext or answer.ciphertext_crc32c != google_crc32c.value(answer.ciphertext):
            return "its ciphertext does not match its checksum"
        if not answer.name.startswith(f"{self._key}/cryptoKeyVersions/"):
            return "another key sealed it"
        return None

    def _in_words(self, error: Exception) -> KeyRotationError:
        from google.api_core.exceptions import RetryError  # noqa: PLC0415
        from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError  # noqa: PLC0415

        match error:
            case DefaultCredentialsError():
                return Denied("there are no Google credentials here: give this process a service account, or set GOOGLE_APPLICATION_CREDENTIALS")
            case TransportError():
                return Unreachable("Google's token endpoint does not answer: check that this machine may reach it")
            case GoogleAuthError():
                return Denied("Google refuses the credentials of this process: renew them, or give it another service account")
            case RetryError():
                return self._of_status(_status(error.cause))
        return self._of_status(_status(error))

    def _of_status(self, status: str) -> KeyRotationError:
        kind, words = WORDS.get(status, (WorldError, "failed ({status}) with {key}: see Google's status page, then run this again"))
        caller = self._token or "the application default credentials"
        told = words.format(status=status, key=self._key, caller=caller, budget=f"{self._budget:g} s", where=self._endpoint or "cloudkms.googleapis.com")
        return kind(f"Cloud KMS {told}", retryable=kind is Unreachable or status in PASSING)


def _retry(budget: float) -> Any:
    """Retries with full jitter what may succeed a moment later. The client's own policy would go on for a minute, and not retry a quota."""
    from google.api_core.retry import Retry  # noqa: PLC0415

    return Retry(predicate=lambda error: _status(error) in TRANSIENT, initial=0.1, maximum=2.0, multiplier=2.0, timeout=budget)


def _constant(seconds: float) -> Any:
    """The same time for each attempt. A bare number would be shared out among them."""
    from google.api_core.timeout import ConstantTimeout  # noqa: PLC0415

    return ConstantTimeout(seconds)  # type: ignore[no-untyped-call]


def _status(error: object) -> str:
    """The name of a gRPC status: all that is taken from Google's error, whose text is not ours to vouch for."""
    return str(getattr(getattr(error, "grpc_status_code", None), "name", "UNKNOWN"))
