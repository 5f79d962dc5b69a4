"""What every sealer owes (I16, I17), one suite over all: Google's client and a KMS emulator, hvac and a real OpenBao, the local one.

Who opens is never the sealer: the identity service's principal does, by its own client.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hvac.exceptions
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from google.api_core.exceptions import InvalidArgument, NotFound, PermissionDenied
from hypothesis import given, settings
from hypothesis import strategies as st

from keyrotation.adapters.google_kms import GoogleKmsSealer
from keyrotation.adapters.local_sealer import LocalSealer
from keyrotation.adapters.vault import VaultSealer
from keyrotation.domain.errors import BadAnswer, Denied, SettingsError, Unreachable, WorldError
from keyrotation.ports import Sealed, Sealer
from keyrotation.secrets import SecretRef

if TYPE_CHECKING:
    from tests.contract.conftest import Bao, Kms, Peer

CLOSED = (InvalidArgument, NotFound, hvac.exceptions.InvalidRequest, InvalidTag, ValueError)
HERE, ELSEWHERE = b"production\0kid-one", b"production\0kid-two"
REAL = ("google-kms", "vault")


@dataclass(frozen=True)
class Party:
    """A sealer, whoever may open what it seals, and the sealer's own principal trying to."""

    sealer: Sealer
    opened: Callable[[bytes, bytes], bytes]
    opened_by_rotator: Callable[[bytes, bytes], bytes]
    # The ciphertext's own octets and back: Vault writes them in base64, whose last bits mean nothing.
    octets: Callable[[bytes], bytes] = bytes
    written: Callable[[bytes], bytes] = bytes

    def opens(self, ciphertext: bytes, context: bytes) -> bool:
        try:
            self.opened(ciphertext, context)
        except CLOSED:
            return False
        return True


def google_kms(request: pytest.FixtureRequest, folder: Path) -> Party:
    """Google's client, and whoever may decrypt."""
    kms: Kms = request.getfixturevalue("kms_server")
    (folder / "token").write_text("kms-token-of-the-rotator")
    sealer = GoogleKmsSealer(kms.key, kms.endpoint, SecretRef("file", str(folder / "token")))
    return Party(sealer, kms.decrypt, lambda ciphertext, context: kms.decrypt(ciphertext, context, "kms-token-of-the-rotator"))


def vault(request: pytest.FixtureRequest, folder: Path) -> Party:
    """Vault, with a token that may encrypt, and root."""
    bao: Bao = request.getfixturevalue("bao")
    token = bao.encrypter()
    (folder / "token").write_text(token)
    sealer = VaultSealer(bao.address, SecretRef("file", str(folder / "token")), bao.key)
    return Party(
        sealer,
        bao.decrypt,
        lambda ciphertext, context: bao.decrypt(ciphertext, context, token),
        octets=lambda ciphertext: base64.b64decode(ciphertext.rpartition(b":")[2]),
        written=lambda octets: b"vault:v1:" + base64.b64encode(octets),
    )


def local(request: pytest.FixtureRequest, folder: Path) -> Party:
    """A key file, and whoever reads it."""
    file = folder / "key"

    def opened(ciphertext: bytes, context: bytes) -> bytes:
        return AESGCM(file.read_bytes()).decrypt(ciphertext[:12], ciphertext[12:], context)

    return Party(LocalSealer(file), opened, opened)


PARTIES = {"google-kms": google_kms, "vault": vault, "local": local}


@pytest.fixture(scope="module")
def make_party(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Party]:
    """Each party once, by its kind."""
    made: dict[str, Party] = {}

    def make(kind: str) -> Party:
        if kind not in made:
            made[kind] = PARTIES[kind](request, tmp_path_factory.mktemp(kind))
        return made[kind]

    return make


@pytest.fixture(scope="module", params=PARTIES)
def party(request: pytest.FixtureRequest, make_party: Callable[[str], Party]) -> Party:
    """Every party in turn."""
    return make_party(request.param)


@pytest.fixture(scope="module")
def sealed(party: Party) -> Sealed:
    """Something that the party has sealed for HERE."""
    return party.sealer.seal(b"a private half", HERE)


class TestEverySealer:
    """The contract."""

    @settings(max_examples=10, deadline=None, database=None)
    @given(plaintext=st.binary(min_size=1, max_size=300), context=st.binary(min_size=1, max_size=120))
    def test_what_was_sealed_opens_in_its_place(self, party: Party, plaintext: bytes, context: bytes) -> None:
        """Any octets under any context come back as they were."""
        assert party.opened(party.sealer.seal(plaintext, context).ciphertext, context) == plaintext

    def test_i16_it_opens_nowhere_else(self, party: Party, sealed: Sealed) -> None:
        """A row that was copied to another kid or environment does not open."""
        assert not party.opens(sealed.ciphertext, ELSEWHERE)

    def test_i16_swapped_rows_do_not_open(self, party: Party) -> None:
        """Of two rows with their ciphertexts exchanged, neither opens."""
        one, two = (party.sealer.seal(b"a private half", context).ciphertext for context in (HERE, ELSEWHERE))
        assert (party.opens(one, HERE), party.opens(two, ELSEWHERE)) == (True, True)
        assert (party.opens(two, HERE), party.opens(one, ELSEWHERE)) == (False, False)

    @settings(max_examples=25, deadline=None, database=None)
    @given(data=st.data())
    def test_i16_an_altered_bit_keeps_it_closed(self, party: Party, sealed: Sealed, data: st.DataObject) -> None:
        """Whichever bit of the ciphertext is turned over, it does not open."""
        octets = bytearray(party.octets(sealed.ciphertext))
        bit = data.draw(st.integers(0, len(octets) * 8 - 1))
        octets[bit // 8] ^= 1 << bit % 8
        assert not party.opens(party.written(bytes(octets)), HERE)

    @settings(max_examples=15, deadline=None, database=None)
    @given(data=st.data())
    def test_i16_a_truncated_one_keeps_closed(self, party: Party, sealed: Sealed, data: st.DataObject) -> None:
        """However much is missing at its end, it does not open."""
        octets = party.octets(sealed.ciphertext)
        length = data.draw(st.integers(0, len(octets) - 1))
        assert not party.opens(party.written(octets[:length]), HERE)

    def test_the_same_text_is_never_sealed_the_same_way(self, party: Party) -> None:
        """Nobody learns from two ciphertexts that they hold the same key."""
        assert len({party.sealer.seal(b"a private half", HERE).ciphertext for _ in range(5)}) == 5

    def test_i05_nothing_shows_what_was_sealed(self, party: Party, sealed: Sealed) -> None:
        """Neither the ciphertext, nor what the value prints, nor what the sealer prints holds the private half."""
        assert b"a private half" not in party.octets(sealed.ciphertext)
        assert "private half" not in repr(sealed)
        assert "token-of" not in repr(party.sealer)

    def test_a_check_names_what_seals(self, party: Party, sealed: Sealed) -> None:
        """`check` seals for real and tells the version that `sealed_by` tells."""
        assert sealed.sealed_by in party.sealer.check()


@pytest.mark.parametrize("kind", REAL)
def test_i17_the_rotator_cannot_open_what_it_sealed(kind: str, make_party: Callable[[str], Party]) -> None:
    """The principal that seals is refused when it asks to decrypt."""
    party = make_party(kind)
    ciphertext = party.sealer.seal(b"a private half", HERE).ciphertext
    with pytest.raises((PermissionDenied, hvac.exceptions.Forbidden)):
        party.opened_by_rotator(ciphertext, HERE)


class TestVault:
    """What is Vault's own."""

    def test_the_ciphertext_is_vaults_text(self, bao: Bao, secret: Callable[[str], SecretRef]) -> None:
        """It is stored as Vault writes it, and sealed_by names the key's version."""
        sealed = VaultSealer(bao.address, secret(bao.encrypter()), f"transit/{bao.key}").seal(b"a private half", HERE)
        assert sealed.ciphertext.startswith(b"vault:v1:")
        assert sealed.sealed_by == f"vault:transit/{bao.key}:v1"

    def test_a_token_without_the_policy_is_told_the_path(self, bao: Bao, secret: Callable[[str], SecretRef], lets_out: Callable[..., list[str]]) -> None:
        """403: the error names the path that the policy lacks, and neither token nor plaintext."""
        token = bao.token('path "transit/encrypt/other" { capabilities = ["update"] }')
        with pytest.raises(Denied, match=r'\["update"\] on transit/encrypt/signing') as caught:
            VaultSealer(bao.address, secret(token), bao.key).seal(b"a private half", HERE)
        assert not caught.value.retryable
        assert lets_out(caught.value, token, b"a private half") == []

    def test_an_unknown_key_is_not_made_by_the_way(self, bao: Bao, secret: Callable[[str], SecretRef]) -> None:
        """Vault makes a missing key where the policy says `create`; with `update` alone it denies, and the error says that the key may be missing."""
        token = bao.token('path "transit/encrypt/*" { capabilities = ["update"] }')
        with pytest.raises(Denied, match=r"transit/encrypt/unknown.*the key must exist"):
            VaultSealer(bao.address, secret(token), "unknown").seal(b"a private half", HERE)

    def test_a_derived_key_is_refused_in_words(self, bao: Bao, secret: Callable[[str], SecretRef]) -> None:
        """A key that wants a context of its own kind is the wrong one, and no retry mends it."""
        bao.root.secrets.transit.create_key("derived", derived=True)
        with pytest.raises(WorldError, match="not be derived") as caught:
            VaultSealer(bao.address, secret("root-token-of-the-tests"), "derived").seal(b"a private half", HERE)
        assert not caught.value.retryable

    def test_f17_a_sealed_vault_is_unreachable(self, bao: Bao, secret: Callable[[str], SecretRef]) -> None:
        """While Vault is sealed nothing is sealed; once it is unsealed, the same sealer goes on."""
        sealer = VaultSealer(bao.address, secret(bao.encrypter()), bao.key)
        bao.root.sys.seal()
        try:
            with pytest.raises(Unreachable, match=r"HTTP 503.*unsealed"):
                sealer.seal(b"a private half", HERE)
        finally:
            bao.unseal()
        assert sealer.check()

    @pytest.mark.parametrize("status", [429, 473, 503])
    def test_f17_a_standby_is_tried_once_more(self, status: int, peer: Peer, secret: Callable[[str], SecretRef]) -> None:
        """A node that is no leader gets one more chance, and not two."""
        peer.says({"status": status, "body": b"{}"})
        with pytest.raises(Unreachable, match=f"HTTP {status}"):
            VaultSealer(peer.url, secret("t"), "signing").seal(b"a private half", HERE)
        assert len(peer.seen) == 2

    def test_a_failover_in_between_is_survived(self, peer: Peer, secret: Callable[[str], SecretRef]) -> None:
        """Unavailable, then well: the second answer counts."""
        peer.says({"status": 503, "body": b"{}"}, {"status": 200, "body": b'{"data": {"ciphertext": "vault:v7:QUJD"}}'})
        assert VaultSealer(peer.url, secret("t"), "signing").seal(b"a private half", HERE) == Sealed(b"vault:v7:QUJD", "vault:signing:v7")

    def test_a_redirect_does_not_carry_the_token_away(self, peer: Peer, secret: Callable[[str], SecretRef]) -> None:
        """A redirect is not followed: it would take token and plaintext along."""
        peer.says({"status": 307, "headers": {"Location": f"{peer.url}/elsewhere"}})
        with pytest.raises(BadAnswer, match="redirect"):
            VaultSealer(peer.url, secret("t"), "signing").seal(b"a private half", HERE)
        assert [seen.path for seen in peer.seen] == ["/v1/transit/encrypt/signing"]

    @pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"data": {"ciphertext": "plaintext"}}', b'{"data": {"ciphertext": "vault:v0:QUJD"}}'])
    def test_an_answer_without_a_ciphertext_is_refused(self, body: bytes, peer: Peer, secret: Callable[[str], SecretRef]) -> None:
        """Nothing is stored that Vault did not write."""
        peer.says({"status": 200, "body": body})
        with pytest.raises(BadAnswer, match="without a ciphertext"):
            VaultSealer(peer.url, secret("t"), "signing").seal(b"a private half", HERE)

    def test_nobody_there(self, peer: Peer, secret: Callable[[str], SecretRef], lets_out: Callable[..., list[str]]) -> None:
        """A closed port is unreachable, and the error shows nothing of the request."""
        peer.stop()
        with pytest.raises(Unreachable, match="cannot be reached") as caught:
            VaultSealer(peer.url, secret("token-of-vault"), "signing").seal(b"a private half", HERE)
        assert lets_out(caught.value, "token-of-vault", b"a private half") == []


class TestLocal:
    """What is the local sealer's own."""

    def test_the_key_file_is_made_for_its_owner_only(self, tmp_path: Path) -> None:
        """A missing key file is made with mode 0600, and nothing else is left in its folder."""
        LocalSealer(tmp_path / "new" / "key").check()
        assert [(file.name, file.stat().st_mode & 0o777) for file in (tmp_path / "new").iterdir()] == [("key", 0o600)]

    def test_the_key_file_is_kept(self, tmp_path: Path) -> None:
        """Another process with the same file seals with the same key."""
        assert LocalSealer(tmp_path / "key").check() == LocalSealer(tmp_path / "key").check()

    def test_it_is_loud(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Whoever uses it reads in the log that it is insecure."""
        LocalSealer(tmp_path / "key")
        assert [record.levelname for record in caplog.records if "INSECURE" in record.message] == ["WARNING"]

    def test_a_file_open_to_others_is_refused(self, tmp_path: Path) -> None:
        """A key that others may have read is no key."""
        (tmp_path / "key").write_bytes(secrets.token_bytes(32))
        (tmp_path / "key").chmod(0o640)
        with pytest.raises(SettingsError, match="chmod 600"):
            LocalSealer(tmp_path / "key").check()

    def test_a_short_file_is_refused(self, tmp_path: Path) -> None:
        """A file that was cut is not taken for a weaker key."""
        (tmp_path / "key").write_bytes(b"short")
        (tmp_path / "key").chmod(0o600)
        with pytest.raises(SettingsError, match="32 bytes"):
            LocalSealer(tmp_path / "key").check()
