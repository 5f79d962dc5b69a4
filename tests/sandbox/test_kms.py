"""The sandbox's Cloud KMS, through the real client: what it does as Google does, and what a test can make it do."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import grpc
import pytest
from google.api_core import exceptions
from google.cloud.kms_v1 import KeyManagementServiceClient
from google.cloud.kms_v1.services.key_management_service.transports import KeyManagementServiceGrpcTransport

from sandbox.processes import Process, free_port, listening

RING = "projects/sandbox/locations/global/keyRings/identity"
KEY = f"{RING}/cryptoKeys/signing"
OTHER_KEY = f"{RING}/cryptoKeys/other"
ENCRYPTER, DECRYPTER, ADMIN, POWERLESS = "token-e", "token-d", "token-a", "token-p"
PRINCIPALS = {ENCRYPTER: ["encrypt"], DECRYPTER: ["decrypt"], ADMIN: ["encrypt", "decrypt", "admin"], POWERLESS: []}
PLACE = b"sandbox/kid-1"


class Kms:
    """The emulator as a process, and the real client as somebody who holds a token."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, free_port()
        (home / "principals.json").write_text(json.dumps(PRINCIPALS))
        argv = [sys.executable, "-m", "sandbox.kms", "--port", str(self.port), "--home", str(home)]
        self.process = Process("kms", [*argv, "--key", KEY, "--key", OTHER_KEY], home=home, ready=lambda: listening(self.port))
        self.process.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")
        self._client = KeyManagementServiceClient(transport=KeyManagementServiceGrpcTransport(channel=self.channel))

    def call(self, token: str | None, method: str, **request: Any) -> Any:
        metadata = [] if token is None else [("authorization", f"Bearer {token}")]
        return getattr(self._client, method)(request=request, metadata=metadata, retry=None, timeout=5)

    def encrypt(self, plaintext: bytes = b"secret", token: str = ENCRYPTER, name: str = KEY, **more: Any) -> Any:
        return self.call(
            token,
            "encrypt",
            name=name,
            plaintext=plaintext,
            additional_authenticated_data=PLACE,
            plaintext_crc32c={"value": crc(plaintext)},
            additional_authenticated_data_crc32c={"value": crc(PLACE)},
            **more,
        )

    def decrypt(self, ciphertext: bytes, place: bytes = PLACE, token: str = DECRYPTER, name: str = KEY) -> Any:
        return self.call(token, "decrypt", name=name, ciphertext=ciphertext, additional_authenticated_data=place)

    def set_version(self, number: int, state: str) -> None:
        version = {"name": f"{KEY}/cryptoKeyVersions/{number}", "state": state}
        self.call(ADMIN, "update_crypto_key_version", crypto_key_version=version, update_mask={"paths": ["state"]})

    def meet(self, **faults: Any) -> None:
        (self.home / "faults.json").write_text(json.dumps(faults))


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kms]:
    kms = Kms(tmp_path_factory.mktemp("kms"))
    yield kms
    kms.channel.close()
    kms.process.stop()


@pytest.fixture
def kms(emulator: Kms) -> Iterator[Kms]:
    yield emulator
    (emulator.home / "faults.json").unlink(missing_ok=True)


def crc(data: bytes) -> int:
    return int(google_crc32c.value(data))


def test_what_was_encrypted_is_decrypted(kms: Kms) -> None:
    """With the same key and the same additional data, the plaintext comes back."""
    opened = kms.decrypt(kms.encrypt(b"private key").ciphertext)
    assert opened.plaintext == b"private key"
    assert opened.plaintext_crc32c == crc(b"private key")
    assert opened.used_primary


def test_the_answer_can_be_checked(kms: Kms) -> None:
    """Encrypt names the key version, says that it looked at both checksums, and gives its own."""
    sealed = kms.encrypt()
    assert sealed.name == f"{KEY}/cryptoKeyVersions/1"
    assert sealed.verified_plaintext_crc32c
    assert sealed.verified_additional_authenticated_data_crc32c
    assert sealed.ciphertext_crc32c == crc(sealed.ciphertext)


def test_a_checksum_not_sent_is_not_verified(kms: Kms) -> None:
    """Without a checksum in the request there is nothing the answer could say about it."""
    sealed = kms.call(ENCRYPTER, "encrypt", name=KEY, plaintext=b"x")
    assert not sealed.verified_plaintext_crc32c
    assert not sealed.verified_additional_authenticated_data_crc32c


def test_the_same_plaintext_never_looks_the_same(kms: Kms) -> None:
    """Every encryption has a nonce of its own."""
    assert kms.encrypt().ciphertext != kms.encrypt().ciphertext


def test_other_additional_data_do_not_open(kms: Kms) -> None:
    """A ciphertext is bound to its place."""
    with pytest.raises(exceptions.InvalidArgument, match="Decryption failed"):
        kms.decrypt(kms.encrypt().ciphertext, place=b"sandbox/kid-2")


@pytest.mark.parametrize("byte", [0, 3, 4, 15, 16, -1])
def test_an_altered_ciphertext_does_not_open(kms: Kms, byte: int) -> None:
    """Version, nonce, text and tag: each is under the seal."""
    altered = bytearray(kms.encrypt().ciphertext)
    altered[byte] ^= 1
    with pytest.raises(exceptions.InvalidArgument, match="Decryption failed"):
        kms.decrypt(bytes(altered))


@pytest.mark.parametrize("length", [0, 3, 10, 20])
def test_a_truncated_ciphertext_does_not_open(kms: Kms, length: int) -> None:
    """A ciphertext cut anywhere is refused like an altered one."""
    with pytest.raises(exceptions.InvalidArgument, match="Decryption failed"):
        kms.decrypt(kms.encrypt().ciphertext[:length])


def test_another_key_does_not_open(kms: Kms) -> None:
    """Each key has bytes of its own."""
    with pytest.raises(exceptions.InvalidArgument, match="Decryption failed"):
        kms.decrypt(kms.encrypt().ciphertext, name=OTHER_KEY)


@pytest.mark.parametrize("field", ["plaintext", "additional_authenticated_data"])
def test_a_wrong_checksum_in_the_request_is_refused(kms: Kms, field: str) -> None:
    """What was damaged on its way is not encrypted."""
    request = {"name": KEY, "plaintext": b"p", "additional_authenticated_data": b"a", f"{field}_crc32c": {"value": 0}}
    with pytest.raises(exceptions.InvalidArgument, match=f"checksum in field {field}_crc32c did not match"):
        kms.call(ENCRYPTER, "encrypt", **request)


def test_more_than_64_kib_is_refused(kms: Kms) -> None:
    """The limit of direct encryption is the real one."""
    kms.encrypt(b"x" * 65536)
    with pytest.raises(exceptions.InvalidArgument, match="at most 65536 bytes"):
        kms.encrypt(b"x" * 65537)


def test_who_may_encrypt_may_not_decrypt(kms: Kms) -> None:
    """The rotator's permission does not open what it has sealed."""
    with pytest.raises(exceptions.PermissionDenied, match=r"'cloudkms\.cryptoKeyVersions\.useToDecrypt' denied"):
        kms.decrypt(kms.encrypt().ciphertext, token=ENCRYPTER)


def test_who_may_decrypt_may_not_encrypt(kms: Kms) -> None:
    """The identity service's permission makes no new keys."""
    with pytest.raises(exceptions.PermissionDenied, match=r"'cloudkms\.cryptoKeyVersions\.useToEncrypt' denied"):
        kms.encrypt(token=DECRYPTER)


@pytest.mark.parametrize("token", [None, "", "unheard-of"])
def test_a_stranger_is_unauthenticated(kms: Kms, token: str | None) -> None:
    """A missing or unknown token is not the same as one without permission."""
    with pytest.raises(exceptions.Unauthenticated, match="invalid authentication credentials"):
        kms.call(token, "encrypt", name=KEY, plaintext=b"x")


def test_a_token_can_be_taken_away(kms: Kms) -> None:
    """Permissions are those of the file as it is now."""
    principals = kms.home / "principals.json"
    principals.write_text(json.dumps({**PRINCIPALS, ENCRYPTER: []}))
    with pytest.raises(exceptions.PermissionDenied):
        kms.encrypt()
    principals.write_text(json.dumps(PRINCIPALS))
    kms.encrypt()


def test_a_missing_key_is_not_found(kms: Kms) -> None:
    """Who may encrypt is told that the key is not there."""
    with pytest.raises(exceptions.NotFound, match=f"CryptoKey {KEY}-missing not found"):
        kms.encrypt(name=f"{KEY}-missing")


def test_without_permission_a_missing_key_looks_like_any_other(kms: Kms) -> None:
    """Permission is asked for before existence."""
    with pytest.raises(exceptions.PermissionDenied, match="or it may not exist"):
        kms.encrypt(name=f"{KEY}-missing", token=POWERLESS)


def test_a_caller_can_ask_what_it_may_do(kms: Kms) -> None:
    """testIamPermissions answers with the permissions that the caller has, of those asked about."""
    both = ["cloudkms.cryptoKeyVersions.useToEncrypt", "cloudkms.cryptoKeyVersions.useToDecrypt"]
    assert kms.call(ENCRYPTER, "test_iam_permissions", resource=KEY, permissions=both).permissions == both[:1]


def test_key_ring_key_and_version_can_be_looked_at(kms: Kms) -> None:
    """Who may view sees the names and which version is primary; who may only encrypt does not."""
    assert kms.call(ADMIN, "get_key_ring", name=RING).name == RING
    assert kms.call(ADMIN, "get_crypto_key", name=KEY).primary.name.startswith(KEY)
    assert kms.call(ADMIN, "get_crypto_key_version", name=f"{KEY}/cryptoKeyVersions/1").state.name == "ENABLED"
    with pytest.raises(exceptions.PermissionDenied):
        kms.call(ENCRYPTER, "get_crypto_key", name=KEY)


def test_a_disabled_version_is_a_failed_precondition(kms: Kms) -> None:
    """A disabled version neither seals nor opens, until it is enabled again."""
    sealed = kms.encrypt().ciphertext
    kms.set_version(1, "DISABLED")
    with pytest.raises(exceptions.FailedPrecondition, match="not enabled, current state is: DISABLED"):
        kms.encrypt()
    with pytest.raises(exceptions.FailedPrecondition):
        kms.decrypt(sealed)
    kms.set_version(1, "ENABLED")
    assert kms.decrypt(sealed).plaintext == b"secret"


def test_a_rotated_key_still_opens_what_an_older_version_sealed(kms: Kms) -> None:
    """After a new primary version, new ciphertexts name it, and old ones open with used_primary false."""
    sealed = kms.encrypt(name=OTHER_KEY).ciphertext
    second = kms.call(ADMIN, "create_crypto_key_version", parent=OTHER_KEY).name
    kms.call(ADMIN, "update_crypto_key_primary_version", name=OTHER_KEY, crypto_key_version_id="2")
    assert kms.encrypt(name=OTHER_KEY).name == second == f"{OTHER_KEY}/cryptoKeyVersions/2"
    opened = kms.decrypt(sealed, name=OTHER_KEY)
    assert (opened.plaintext, opened.used_primary) == (b"secret", False)


def test_what_a_destroyed_version_sealed_is_lost(kms: Kms) -> None:
    """A destroyed version cannot be enabled again, and nothing opens with it."""
    version = kms.call(ADMIN, "create_crypto_key_version", parent=KEY).name
    sealed = kms.encrypt(name=version).ciphertext
    assert kms.call(ADMIN, "destroy_crypto_key_version", name=version).state.name == "DESTROYED"
    with pytest.raises(exceptions.FailedPrecondition, match="DESTROYED"):
        kms.decrypt(sealed)


def test_keys_survive_a_restart_and_are_closed_to_others(kms: Kms) -> None:
    """After `kill -9` and a start on the same folder, old ciphertexts open; the file is its owner's only."""
    sealed = kms.encrypt().ciphertext
    kms.process.kill()
    kms.process.start()
    assert kms.decrypt(sealed).plaintext == b"secret"
    assert (kms.home / "keys.json").stat().st_mode & 0o777 == 0o600


def test_a_fault_of_two_times_is_met_twice(kms: Kms) -> None:
    """An outage of two calls is over with the third, and other methods never saw it."""
    kms.meet(Encrypt={"error": "UNAVAILABLE", "times": 2})
    for _ in range(2):
        with pytest.raises(exceptions.ServiceUnavailable):
            kms.encrypt()
    kms.decrypt(kms.encrypt().ciphertext)


def test_a_flipped_bit_does_not_match_the_checksum(kms: Kms) -> None:
    """A ciphertext damaged on its way back is one bit from the one that the checksum is of."""
    kms.meet(Encrypt={"flip_bit": 3})
    sealed = kms.encrypt()
    assert sealed.ciphertext_crc32c != crc(sealed.ciphertext)
    repaired = bytes([sealed.ciphertext[0] ^ 1 << 3]) + sealed.ciphertext[1:]
    assert sealed.ciphertext_crc32c == crc(repaired)


def test_a_wrong_checksum_comes_with_a_sound_ciphertext(kms: Kms) -> None:
    """`wrong_crc` alters the checksum alone."""
    kms.meet(Encrypt={"wrong_crc": True})
    sealed = kms.encrypt()
    assert sealed.ciphertext_crc32c != crc(sealed.ciphertext)
    assert kms.decrypt(sealed.ciphertext).plaintext == b"secret"


def test_an_answer_can_be_unverified_or_name_another_key(kms: Kms) -> None:
    """Both are answers that a careful client throws away."""
    kms.meet(Encrypt={"unverified": True, "other_name": True})
    sealed = kms.encrypt()
    assert not sealed.verified_plaintext_crc32c
    assert not sealed.name.startswith(f"{KEY}/")


def test_the_ciphertext_of_another_plaintext_passes_every_check(kms: Kms) -> None:
    """No checksum finds it: only opening, or using the key, does."""
    kms.meet(Encrypt={"other_plaintext": True})
    sealed = kms.encrypt()
    assert sealed.verified_plaintext_crc32c
    assert sealed.ciphertext_crc32c == crc(sealed.ciphertext)
    assert kms.decrypt(sealed.ciphertext).plaintext != b"secret"


def test_a_delay_is_waited_out(kms: Kms) -> None:
    """A slow call is slow, and right."""
    kms.meet(Encrypt={"delay": 0.3, "times": 1})
    begun = time.monotonic()
    kms.encrypt()
    assert time.monotonic() - begun >= 0.3
