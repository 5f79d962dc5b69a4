"""Seals private halves with AES-256-GCM and a key in a file (ports.Sealer). For development and the sandbox only, and loud about it.

Owns: the key file and the ciphertext's form (12 bytes of nonce, then AES-GCM's output with its tag). Leaves to others: refusing it
everywhere else (settings). What it lacks is the point of a real sealer: whoever reads the disk of the rotator can open every key.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import stat
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keyrotation.domain.errors import SettingsError
from keyrotation.ports import Sealed

log = logging.getLogger(__name__)

KEY_BYTES = 32
NONCE_BYTES = 12  # random: NIST SP 800-38D allows 2^32 of them under one key
CHECK_CONTEXT = b"keyrotation: a check, no key"


class LocalSealer:
    """Encrypts with the 32 bytes of a file, which is made at the first use if it is missing."""

    def __init__(self, key_file: Path) -> None:
        self._file = key_file.expanduser()
        log.warning("INSECURE: private keys are sealed with a key file on this machine (%s): for development only, use google-kms or vault", self._file)

    def seal(self, plaintext: bytes, context: bytes) -> Sealed:
        """The ciphertext, bound to `context`; raises SettingsError where the key file is of no use. `sealed_by` is "local:FINGERPRINT"."""
        key = self._key()
        nonce = secrets.token_bytes(NONCE_BYTES)
        return Sealed(nonce + AESGCM(key).encrypt(nonce, plaintext, context), f"local:{hashlib.sha256(key).hexdigest()[:16]}")

    def check(self) -> str:
        """Which key seals now; raises what stands in the way."""
        return f"{self.seal(b'check', CHECK_CONTEXT).sealed_by} seals, from {self._file}: insecure, for development only"

    def _key(self) -> bytes:
        try:
            if not self._file.exists():
                self._make()
            mode, key = stat.S_IMODE(self._file.stat().st_mode), self._file.read_bytes()
        except OSError as error:
            raise SettingsError(f"the local sealer's key file {self._file} cannot be used ({error.strerror}): check its folder and its owner") from None
        if mode & 0o077:
            raise SettingsError(f"the local sealer's key file {self._file} is open to others: chmod 600 it, or delete it for a new one")
        if len(key) != KEY_BYTES:
            raise SettingsError(f"the local sealer's key file {self._file} does not hold {KEY_BYTES} bytes: restore it, or delete it for a new one")
        return key

    def _make(self) -> None:
        """Puts a new key there, whole or not at all; of two processes at once, the first one's stays."""
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        unfinished = self._file.with_name(f".{self._file.name}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
        try:
            os.link(unfinished, self._file)
        except FileExistsError:
            pass
        finally:
            unfinished.unlink()
