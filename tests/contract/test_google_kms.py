"""What Cloud KMS can do to a rotation (F12-F16): Google's real client against an emulator that fails on demand.

Bounds are told in attempts that the emulator saw, never in seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from keyrotation.adapters.google_kms import GoogleKmsSealer
from keyrotation.domain.errors import BadAnswer, Denied, SettingsError, Unreachable, WorldError
from keyrotation.secrets import SecretRef

if TYPE_CHECKING:
    from tests.contract.conftest import Kms

PLAINTEXT, CONTEXT = b"a private half of a signing key", b"production\0kid-one"
TOKEN, ADMIN, STRANGER = "kms-token-of-the-rotator", "kms-token-of-the-admin", "kms-token-of-a-stranger"
Make = Callable[..., GoogleKmsSealer]


@pytest.fixture
def make_sealer(kms: Kms, secret: Callable[[str], SecretRef]) -> Make:
    """A sealer of the emulator's first key, as the rotator, unless told otherwise."""

    def make(key: str = kms.key, token: str = TOKEN, budget: float = 10.0, endpoint: str = kms.endpoint) -> GoogleKmsSealer:
        return GoogleKmsSealer(key, endpoint, secret(token), budget)

    return make


@pytest.fixture
def admin(kms: Kms) -> Callable[..., Any]:
    """Calls a method of Google's client as the key's admin."""
    return lambda method, **request: getattr(kms.client(), method)(request=request, metadata=[("authorization", f"Bearer {ADMIN}")])


@pytest.mark.parametrize("status", ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"])
def test_f12_a_short_outage_is_survived(status: str, kms: Kms, make_sealer: Make) -> None:
    """Twice away, then well: the third attempt seals."""
    kms.meets(error=status, times=2)
    sealed = make_sealer().seal(PLAINTEXT, CONTEXT)
    assert (kms.attempts, kms.decrypt(sealed.ciphertext, CONTEXT)) == (3, PLAINTEXT)


def test_f12_a_silent_call_is_given_up_and_tried_again(kms: Kms, make_sealer: Make) -> None:
    """An attempt has a deadline of its own: one that hangs does not eat the budget of the next."""
    kms.meets(delay=5, times=1)
    make_sealer(budget=3.0).seal(PLAINTEXT, CONTEXT)
    assert kms.attempts == 2


@pytest.mark.parametrize(("status", "word"), [("UNAVAILABLE", "did not answer within 1 s"), ("RESOURCE_EXHAUSTED", "quota")])
def test_f12_a_long_outage_ends_within_the_budget(status: str, word: str, kms: Kms, make_sealer: Make, lets_out: Callable[..., list[str]]) -> None:
    """Away for ever: after several attempts the error says that a retry may help, and shows nothing of the request."""
    kms.meets(error=status)
    with pytest.raises(Unreachable, match=word) as caught:
        make_sealer(budget=1.0).seal(PLAINTEXT, CONTEXT)
    assert 2 <= kms.attempts <= 20
    assert caught.value.retryable
    assert lets_out(caught.value, PLAINTEXT, TOKEN) == []


def test_f12_nobody_there(make_sealer: Make, lets_out: Callable[..., list[str]]) -> None:
    """A port that nobody listens on is unreachable, and the error names it."""
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:1") as caught:
        make_sealer(endpoint="127.0.0.1:1", budget=0.5).seal(PLAINTEXT, CONTEXT)
    assert lets_out(caught.value, PLAINTEXT, TOKEN) == []


def test_f13_a_missing_grant_is_named_and_not_retried(kms: Kms, make_sealer: Make, lets_out: Callable[..., list[str]]) -> None:
    """PERMISSION_DENIED: one attempt, and an error with the role and the key."""
    with pytest.raises(Denied, match=rf"{kms.key}: grant roles/cloudkms\.cryptoKeyEncrypter on it") as caught:
        make_sealer(token=STRANGER).seal(PLAINTEXT, CONTEXT)
    assert (kms.attempts, caught.value.retryable) == (1, False)
    assert lets_out(caught.value, PLAINTEXT, STRANGER) == []


def test_f13_an_unknown_caller_is_denied(kms: Kms, make_sealer: Make, lets_out: Callable[..., list[str]]) -> None:
    """UNAUTHENTICATED: the error names the reference to the token, never the token."""
    with pytest.raises(Denied, match=r"renew file:/") as caught:
        make_sealer(token="a-revoked-token").seal(PLAINTEXT, CONTEXT)
    assert kms.attempts == 1
    assert lets_out(caught.value, PLAINTEXT, "a-revoked-token") == []


def test_f13_a_missing_key_is_named(kms: Kms, make_sealer: Make) -> None:
    """NOT_FOUND: one attempt, and an error with the key that is not there."""
    with pytest.raises(WorldError, match=r"has no key .*/nowhere") as caught:
        make_sealer(key=f"{kms.key}/nowhere").seal(PLAINTEXT, CONTEXT)
    assert (kms.attempts, caught.value.retryable) == (1, False)


def test_f13_a_disabled_version_is_named(kms: Kms, make_sealer: Make, admin: Callable[..., Any]) -> None:
    """FAILED_PRECONDITION: one attempt, and an error that says what to enable."""
    version = {"name": f"{kms.disabled_key}/cryptoKeyVersions/1", "state": "DISABLED"}
    admin("update_crypto_key_version", crypto_key_version=version, update_mask={"paths": ["state"]})
    with pytest.raises(WorldError, match="disabled or destroyed: enable it") as caught:
        make_sealer(key=kms.disabled_key).seal(PLAINTEXT, CONTEXT)
    assert (kms.attempts, caught.value.retryable) == (1, False)


@pytest.mark.parametrize(("status", "retryable"), [("INTERNAL", True), ("DATA_LOSS", False), ("INVALID_ARGUMENT", False)])
def test_f13_any_other_status_is_told(status: str, retryable: bool, kms: Kms, make_sealer: Make) -> None:
    """What Google answers besides is an error in words, after one attempt."""
    kms.meets(error=status)
    with pytest.raises(WorldError, match="Cloud KMS") as caught:
        make_sealer().seal(PLAINTEXT, CONTEXT)
    assert (kms.attempts, caught.value.retryable) == (1, retryable)


FLAWS = {"a flipped bit": {"flip_bit": 100}, "a wrong checksum": {"wrong_crc": True}, "unverified": {"unverified": True}, "another key": {"other_name": True}}


@pytest.mark.parametrize("flaw", FLAWS.values(), ids=FLAWS)
def test_f14_a_flawed_answer_is_discarded(flaw: dict[str, Any], kms: Kms, make_sealer: Make) -> None:
    """An answer that cannot be trusted is asked for anew, and only the good one is given back."""
    kms.meets(**flaw, times=2)
    sealed = make_sealer().seal(PLAINTEXT, CONTEXT)
    assert (kms.attempts, kms.decrypt(sealed.ciphertext, CONTEXT)) == (3, PLAINTEXT)


@pytest.mark.parametrize("flaw", FLAWS.values(), ids=FLAWS)
def test_f14_a_flaw_that_stays_is_an_error(flaw: dict[str, Any], kms: Kms, make_sealer: Make, lets_out: Callable[..., list[str]]) -> None:
    """After three flawed answers nothing is sealed."""
    kms.meets(**flaw)
    with pytest.raises(BadAnswer, match=r"gave 3 answers.*nothing was stored") as caught:
        make_sealer().seal(PLAINTEXT, CONTEXT)
    assert kms.attempts == 3
    assert lets_out(caught.value, PLAINTEXT, TOKEN) == []


@pytest.mark.parametrize("octet", range(0, 75, 5))
def test_f14_no_flipped_bit_passes(octet: int, kms: Kms, make_sealer: Make) -> None:
    """Wherever in the ciphertext a bit flips on its way, the checksum tells."""
    kms.meets(flip_bit=octet * 8 + octet % 8, times=1)
    sealed = make_sealer().seal(PLAINTEXT, CONTEXT)
    assert (kms.attempts, kms.decrypt(sealed.ciphertext, CONTEXT)) == (2, PLAINTEXT)


def test_f15_another_plaintext_with_valid_sums_passes_here(kms: Kms, make_sealer: Make) -> None:
    """A KMS that lies in all its checksums is not caught by the sealer: the token's signature catches it, before promotion."""
    kms.meets(other_plaintext=True)
    sealed = make_sealer().seal(PLAINTEXT, CONTEXT)
    assert kms.decrypt(sealed.ciphertext, CONTEXT) != PLAINTEXT


def test_f16_a_rotated_key_seals_with_its_new_version(kms: Kms, make_sealer: Make, admin: Callable[..., Any]) -> None:
    """`sealed_by` is the version that sealed: the new one as soon as it is the primary one."""
    sealer = make_sealer(key=kms.rotated_key)
    before = sealer.seal(PLAINTEXT, CONTEXT).sealed_by
    after = admin("create_crypto_key_version", parent=kms.rotated_key).name
    admin("update_crypto_key_primary_version", name=kms.rotated_key, crypto_key_version_id=after.rpartition("/")[2])
    assert (before, sealer.seal(PLAINTEXT, CONTEXT).sealed_by) == (f"{kms.rotated_key}/cryptoKeyVersions/1", after)
    assert after in sealer.check()


def test_i17_only_encrypt_is_ever_called(kms: Kms, make_sealer: Make) -> None:
    """Sealing and checking need the permission to encrypt, and nothing else is asked for."""
    sealer = make_sealer()
    sealer.seal(PLAINTEXT, CONTEXT)
    sealer.check()
    assert kms.methods == {"Encrypt"}


class Kept(logging.Handler):
    """Keeps every record whole."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def google_at_debug() -> Iterator[list[logging.LogRecord]]:
    """What Google's client logs where somebody has set it to DEBUG."""
    kept, logger = Kept(), logging.getLogger("google")
    level = logger.level
    logger.addHandler(kept)
    logger.setLevel(logging.DEBUG)
    yield kept.records
    logger.removeHandler(kept)
    logger.setLevel(level)


def test_i05_googles_own_log_does_not_tell_the_plaintext(
    google_at_debug: list[logging.LogRecord], make_sealer: Make, lets_out: Callable[..., list[str]]
) -> None:
    """At DEBUG Google's client would log each request whole; ours lets it not, also when logging is configured anew in between."""
    sealer = make_sealer()
    sealer.seal(PLAINTEXT, CONTEXT)
    logging.getLogger("google.cloud.kms_v1.services.key_management_service.transports.grpc").disabled = False
    sealer.seal(PLAINTEXT, CONTEXT)
    told = Exception(*(repr(vars(record)) for record in google_at_debug))
    assert lets_out(told, PLAINTEXT, TOKEN) == []


def test_no_plaintext_channel_leaves_this_machine() -> None:
    """An emulator's endpoint is on loopback: anywhere else the private half would cross the network in the clear."""
    for endpoint in ("kms.example.com:443", "10.0.0.1:9000", "127.0.0.1.example.com:1"):
        with pytest.raises(SettingsError, match="in the clear"):
            GoogleKmsSealer("projects/p/locations/l/keyRings/r/cryptoKeys/k", endpoint, None)


def test_no_credentials_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Without an endpoint the application's own credentials are taken; where there are none, the error says what to set."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nowhere.json"))
    with pytest.raises(Denied, match="GOOGLE_APPLICATION_CREDENTIALS"):
        GoogleKmsSealer("projects/p/locations/l/keyRings/r/cryptoKeys/k", None, None).check()
