"""Seals private halves with the transit engine of Vault or OpenBao (ports.Sealer). Needs `update` on one path, and never decrypts.

Owns: the deadlines of a call, what makes an answer fit to be stored, Vault's statuses in words. Leaves to others: what is sealed and under
which context, the transit key itself, and the renewal of the token (the reference is read at each call: an agent may rewrite its file).

The context is bound as `associated_data`, not as the `context` of a derived key: associated data is authenticated by the cipher itself and
is asked of nobody who makes the transit key, where a derived key would have to be made as one. The price: `transit/rewrap` does not take a
ciphertext with associated data (facts of OpenBao 2.7). Nothing here rewraps; after a rotation of the transit key the next signing key is
sealed with its new version, and `min_decryption_version` may be raised once no row names the old one.
"""

from __future__ import annotations

import base64
import logging
import re
import time
from typing import Any
from urllib.parse import urlsplit

import requests

from keyrotation.domain.errors import BadAnswer, Denied, KeyRotationError, SettingsError, Unreachable, WorldError
from keyrotation.ports import Sealed
from keyrotation.secrets import SecretRef

log = logging.getLogger(__name__)

SILENCE = 3  # seconds, to connect and again for the answer; an encryption takes milliseconds
PAUSE = 0.3  # a new leader is elected in about that time
CHECK_CONTEXT = b"keyrotation: a check, no key"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CIPHERTEXT = re.compile(r"vault:v([1-9]\d*):[A-Za-z0-9+/]+={0,2}")
# 412: a replica that lags behind; 429: a standby, or a limit; 472 and 473: standbys for disaster recovery and performance; 503: sealed.
AWAY = (412, 429, 472, 473, 500, 502, 503, 504)


class VaultSealer:
    """Encrypts with one transit key, an AEAD one that is not derived (the default type, aes256-gcm96, is good)."""

    def __init__(self, address: str, token: SecretRef, key: str) -> None:
        """`key` is "name", on the mount transit, or "mount/name"."""
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError("sealer.endpoint must be Vault's address, like https://vault.example.com:8200")
        if parts.scheme == "http" and parts.hostname not in LOOPBACK:
            log.warning("private keys travel to Vault at %s in the clear: use https, unless something else encrypts that way", parts.hostname)
        mount, _, self._name = key.rpartition("/")
        self._mount = mount or "transit"
        self._address, self._token, self._key = address, token, key
        self._where = f"Vault at {parts.netloc.rpartition('@')[2]}"

    @property
    def path(self) -> str:
        """The policy path on which the token needs the capability `update`."""
        return f"{self._mount}/encrypt/{self._name}"

    def seal(self, plaintext: bytes, context: bytes) -> Sealed:
        """The ciphertext ("vault:v1:…"), bound to `context`; raises WorldError. `sealed_by` is "vault:KEY:v1"."""
        try:
            answer = self._encrypt(plaintext, context)
        except Unreachable as error:
            log.warning("%s: trying once more", error)
            time.sleep(PAUSE)
            answer = self._encrypt(plaintext, context)
        return self._sealed(answer)

    def check(self) -> str:
        """Which key version seals now, by sealing a throw-away text; raises what stands in the way."""
        return f"{self._where} seals with {self.seal(b'check', CHECK_CONTEXT).sealed_by}"

    def _encrypt(self, plaintext: bytes, context: bytes) -> requests.Response:
        problem: KeyRotationError
        try:
            answer: requests.Response = self._client().secrets.transit.encrypt_data(
                name=self._name, mount_point=self._mount, plaintext=_base64(plaintext), associated_data=_base64(context)
            )
        except requests.Timeout:
            problem = Unreachable(f"{self._where} was silent for {SILENCE} s: check that it runs and is not overloaded")
        except requests.ConnectionError:
            problem = Unreachable(f"{self._where} cannot be reached: check that it runs and that this machine may reach it")
        except (requests.RequestException, ValueError) as error:
            problem = BadAnswer(f"{self._where} cannot be talked to ({type(error).__name__}): check sealer.endpoint and sealer.token")
        else:
            if answer.status_code == 200:
                return answer
            problem = self._of_status(answer.status_code)
        raise problem  # outside the handlers: an error of requests knows the request, which holds token and plaintext

    def _client(self) -> Any:
        import hvac  # noqa: PLC0415
        from hvac.adapters import RawAdapter  # noqa: PLC0415

        # The raw answer, because hvac's own errors do not tell a standby (473) from anything else. No redirects: they would take
        # token and plaintext to wherever the answer says.
        client = hvac.Client(url=self._address, token=self._token.reveal(), timeout=SILENCE, adapter=RawAdapter, allow_redirects=False)
        client.adapter.ignore_exceptions = True
        return client

    def _of_status(self, status: int) -> KeyRotationError:
        if status in AWAY:
            return Unreachable(f"{self._where} cannot serve now (HTTP {status}): check that it is unsealed and has a leader")
        if status in (401, 403):
            grant = f'capabilities = ["update"] on {self.path}'
            return Denied(f"{self._where} denies the token {self._token}: it needs {grant} and must not have expired, and the key must exist")
        if status == 404:
            return WorldError(f"{self._where} has nothing at {self.path}: check sealer.key, or mount the transit engine there")
        if status == 400:
            return WorldError(f"{self._where} refuses to encrypt on {self.path}: the key must be of an AEAD type (aes256-gcm96) and not be derived")
        if 300 <= status < 400:
            return BadAnswer(f"{self._where} redirects (HTTP {status}), which is not followed: let sealer.endpoint lead to the active node")
        return WorldError(f"{self._where} answered HTTP {status} on {self.path}: see its own log")

    def _sealed(self, answer: requests.Response) -> Sealed:
        try:
            ciphertext = str(answer.json()["data"]["ciphertext"])
        except (ValueError, KeyError, TypeError):
            ciphertext = ""
        match = CIPHERTEXT.fullmatch(ciphertext)
        if match is None:
            raise BadAnswer(f"{self._where} answered without a ciphertext: check that sealer.endpoint leads to Vault, not to a page in front of it")
        return Sealed(ciphertext.encode(), f"vault:{self._key}:v{match[1]}")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
