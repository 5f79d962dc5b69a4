"""The reference identity service, over HTTP, on a real PostgreSQL and the KMS emulator."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import jwt
import psycopg2
import pytest
import requests

from sandbox import identity
from sandbox.postgres import Postgres
from sandbox.processes import free_port, listening

if TYPE_CHECKING:  # not to be imported by name: every folder of tests has a conftest
    from tests.sandbox.conftest import Database, Identity, KmsEmulator

MakeKey = Callable[..., str]
MakeIdentity = Callable[..., "Identity"]


def kid_of(answer: requests.Response) -> str:
    """Which key the issued token names."""
    return str(jwt.get_unverified_header(answer.json()["access_token"])["kid"])


def verified(service: Identity, answer: requests.Response) -> dict[str, Any]:
    """The claims of a token that verifies by the JWKS as served."""
    token = answer.json()["access_token"]
    key = jwt.PyJWKSet.from_dict(service.jwks().json())[jwt.get_unverified_header(token)["kid"]]
    claims: dict[str, Any] = jwt.decode(token, key, algorithms=["ES256"], audience="api")
    return claims


def eventually(holds: Callable[[], bool], within: float = 10) -> None:
    """Asks until it holds."""
    deadline = time.monotonic() + within
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestJwks:
    def test_it_holds_next_current_and_previous_and_no_disabled_key(self, database: Database, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """What is enabled is published, what is disabled is not."""
        disabled, previous, current = (make_key(promoted=True) for _ in range(3))
        database.disable(disabled)
        following = make_key()
        assert make_identity().kids() == {previous, current, following}

    def test_its_entries_are_the_public_halves(self, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """An entry has the public members of RFC 7517 and 7518, and nothing else."""
        make_key()
        (entry,) = make_identity().jwks().json()["keys"]
        assert entry.keys() == {"kty", "crv", "x", "y", "kid", "alg", "use"}

    def test_before_the_first_key_it_is_empty(self, make_identity: MakeIdentity) -> None:
        """No key is not an error of the endpoint."""
        assert make_identity().jwks().json() == {"keys": []}

    @pytest.mark.parametrize(("max_age", "caching"), [(0, "no-store, max-age=0"), (20, "public, max-age=20")])
    def test_it_says_how_long_it_may_be_cached(self, make_identity: MakeIdentity, max_age: int, caching: str) -> None:
        """Cache-Control carries the configured max-age."""
        assert make_identity(jwks_max_age=max_age).jwks().headers["Cache-Control"] == caching


class TestToken:
    def test_it_is_signed_by_the_current_key(self, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """A token names the current key and verifies with it; it has the claims of RFC 9068."""
        make_key(promoted=True)
        current = make_key(promoted=True)
        make_key()
        service = make_identity()
        answer = service.token()
        claims = verified(service, answer)
        header = jwt.get_unverified_header(answer.json()["access_token"])
        assert header == {"alg": "ES256", "kid": current, "typ": "at+jwt"}
        assert claims["exp"] - claims["iat"] == answer.json()["expires_in"] == 30
        assert (claims["iss"], claims["sub"], claims["client_id"]) == (
            service.config.issuer,
            "the-client",
            "the-client",
        )
        assert claims["scope"] == "api"

    def test_no_two_tokens_are_the_same(self, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """Each has a jti of its own."""
        make_key(promoted=True)
        service = make_identity()
        assert len({verified(service, service.token())["jti"] for _ in range(5)}) == 5

    @pytest.mark.parametrize("otherwise", [{"secret": "wrong"}, {"client": "wrong"}, {"secret": "wröng"}, {"secret": ""}, {}])
    def test_wrong_credentials_are_refused(self, make_identity: MakeIdentity, otherwise: dict[str, str]) -> None:
        """401 as RFC 6749 5.2 has it, also for none at all."""
        service = make_identity()
        client, secret = service.client
        given = (otherwise.get("client", client).encode(), otherwise.get("secret", secret).encode())
        answer = service.token(auth=given if otherwise else None)
        assert (answer.status_code, answer.json()["error"]) == (401, "invalid_client")
        assert answer.headers["WWW-Authenticate"].startswith("Basic ")

    def test_credentials_may_be_form_encoded(self, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """RFC 6749 2.3.1 asks for it, curl does not do it: both are taken."""
        make_key(promoted=True)
        service = make_identity()
        encoded = tuple(quote(part, safe="") for part in service.client)
        assert service.token(auth=encoded).status_code == 200

    @pytest.mark.parametrize(
        ("form", "error"),
        [
            ({"grant_type": "password"}, "unsupported_grant_type"),
            ({"grant_type": ""}, "invalid_request"),
            ({"scope": "admin"}, "invalid_scope"),
        ],
    )
    def test_other_grants_and_scopes_are_refused(self, make_identity: MakeIdentity, form: dict[str, str], error: str) -> None:
        """400 with the error code of RFC 6749 5.2."""
        answer = make_identity().token(**form)
        assert (answer.status_code, answer.json()["error"]) == (400, error)

    def test_without_a_current_key_it_says_so(self, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """503 with a sentence: a next key signs nothing."""
        make_key()
        answer = make_identity().token()
        assert (answer.status_code, answer.json()["error"]) == (
            503,
            "No token can be issued: there is no current signing key yet.",
        )


class TestPrivateHalves:
    def test_one_sealed_for_another_environment_does_not_open(self, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """The ciphertext is bound to its environment."""
        kid = make_key(promoted=True, environment="production")
        answer = make_identity().token()
        assert answer.status_code == 503
        assert answer.json()["error"] == f"Signing key {kid} cannot be opened: the KMS says InvalidArgument."

    def test_one_of_another_key_is_not_used(self, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """What opens must be the other half of the row's public key."""
        kid = make_key(promoted=True, holds_another=True)
        answer = make_identity().token()
        assert answer.status_code == 503
        assert f"Signing key {kid} cannot be used" in answer.json()["error"]

    @pytest.mark.parametrize("damage", [{"wrong_crc": True}, {"flip_bit": 3}])
    def test_one_damaged_on_the_way_is_not_used(self, make_key: MakeKey, make_identity: MakeIdentity, emulator: KmsEmulator, damage: dict[str, Any]) -> None:
        """The checksum of the plaintext is looked at."""
        make_key(promoted=True)
        faults = emulator.home / "faults.json"
        faults.write_text(json.dumps({"Decrypt": damage}))
        try:
            service = make_identity()
            assert "damaged on the way" in service.token().json()["error"]
        finally:
            faults.unlink()
        assert service.token().status_code == 200

    def test_once_open_it_signs_without_the_kms(self, make_key: MakeKey, make_identity: MakeIdentity, emulator: KmsEmulator) -> None:
        """While the KMS is away opened keys sign, others cannot be opened; when it is back, all sign."""
        opened = make_key(promoted=True)
        service, fresh = make_identity(), make_identity()
        service.token()
        emulator.stop()
        try:
            assert kid_of(service.token()) == opened
            assert "the KMS says ServiceUnavailable" in fresh.token().json()["error"]
        finally:
            emulator.start()
        eventually(lambda: fresh.token().status_code == 200)


class TestReplicas:
    def test_each_has_its_own_view_and_they_take_turns(self, database: Database, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """A replica that read before a promotion signs with the old key until its cache is over."""
        old, new = make_key(promoted=True), make_key()
        service = make_identity(replicas=2, key_cache=3600)
        assert kid_of(service.token()) == old  # the first replica has read
        database.promote(new)
        assert [kid_of(service.token()) for _ in range(4)] == [new, old, new, old]

    def test_the_admin_apis_own_change_refreshes_no_cache(self, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """Only key_cache does."""
        old, new = make_key(promoted=True), make_key()
        service = make_identity(authority="api", key_cache=3600)
        service.jwks()
        assert service.promote(new).status_code == 200
        assert kid_of(service.token()) == old

    def test_a_view_is_read_again_once_it_is_old(self, database: Database, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """key_cache seconds later every replica knows."""
        make_key(promoted=True)
        new = make_key()
        service = make_identity(replicas=2, key_cache=0.3)
        assert new not in {kid_of(service.token()) for _ in range(2)}
        database.promote(new)
        promoted = time.monotonic()
        eventually(lambda: {kid_of(service.token()) for _ in range(2)} == {new}, within=0.3 + 1)
        assert time.monotonic() - promoted < 0.3 + 1

    def test_no_cache_means_at_once(self, database: Database, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """With key_cache 0 the next request knows."""
        make_key(promoted=True)
        new = make_key()
        service = make_identity()
        service.token()
        database.promote(new)
        assert kid_of(service.token()) == new


class TestDatabase:
    def test_while_it_is_away_the_answer_is_one_sentence(self, server: Postgres, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """503 while the keys cannot be read, and no restart is needed afterwards."""
        kid = make_key(promoted=True)
        service = make_identity()
        service.token()
        server.kill()
        try:
            eventually(lambda: service.jwks().status_code != 200)  # a backend outlives the postmaster by a moment
            for answer in (service.jwks(), service.token()):
                assert answer.status_code == 503
                assert answer.json()["error"] == "The signing keys cannot be read: the database does not answer."
        finally:
            server.start()
        assert service.kids() == {kid}
        assert kid_of(service.token()) == kid

    def test_a_restart_between_two_requests_goes_unnoticed(self, server: Postgres, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """Connections kept from before it are found out and replaced within the request."""
        kid = make_key(promoted=True)
        service = make_identity()
        service.token()
        server.kill()
        server.start()
        assert kid_of(service.token()) == kid

    def test_what_was_read_is_served_until_it_is_old(self, server: Postgres, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """A key cache bridges an outage."""
        kid = make_key(promoted=True)
        service = make_identity(key_cache=3600)
        service.token()
        server.kill()
        try:
            assert kid_of(service.token()) == kid
        finally:
            server.start()

    @pytest.mark.parametrize("change", ["status = 'previous'", "enabled = FALSE", "private_key_ciphertext = NULL"])
    def test_its_role_cannot_write(self, database: Database, make_key: MakeKey, change: str) -> None:
        """The reader reads, even where its session would allow writing."""
        make_key(promoted=True)
        for mode in ("READ ONLY", "READ WRITE"):
            with pytest.raises((psycopg2.errors.ReadOnlySqlTransaction, psycopg2.errors.InsufficientPrivilege)):
                database.run(f"SET TRANSACTION {mode}; UPDATE public.signing_keys SET {change}", role="keyrotation_reader")


class TestRotate:
    def test_it_makes_the_next_key(self, database: Database, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """201 with its kid; it is published, sealed, and signs once promoted."""
        make_key(promoted=True)
        service = make_identity(authority="api")
        answer = service.rotate()
        kid = answer.json()["kid"]
        assert (answer.status_code, answer.json()["status"]) == (201, "next")
        assert abs(datetime.fromisoformat(answer.json()["created_at"]) - datetime.now(UTC)).total_seconds() < 5
        assert kid in service.kids()
        database.promote(kid)
        assert verified(service, service.token())
        assert kid_of(service.token()) == kid

    def test_the_ledger_names_the_admin_api(self, database: Database, make_identity: MakeIdentity) -> None:
        """Who made a key is on record."""
        kid = make_identity(authority="api").rotate().json()["kid"]
        assert database.run("SELECT event, actor FROM key_rotation.ledger WHERE kid = %s", kid) == [("generated", "identity service, admin API")]

    def test_there_is_one_next_key(self, make_identity: MakeIdentity) -> None:
        """409 with the kid of the one that exists, also when many ask at once."""
        service = make_identity(authority="api")
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: service.rotate(), range(6)))
        assert Counter(answer.status_code for answer in answers) == {201: 1, 409: 5}
        assert len({answer.json()["kid"] for answer in answers}) == 1

    def test_one_idempotency_key_makes_one_key(self, database: Database, make_identity: MakeIdentity) -> None:
        """The same answer again, even when the key has moved on meanwhile; another key asks anew."""
        service = make_identity(authority="api")
        first = service.rotate(**{"Idempotency-Key": "run-1"})
        database.promote(first.json()["kid"])
        again = service.rotate(**{"Idempotency-Key": "run-1"})
        assert (again.status_code, again.json()) == (201, first.json())
        assert service.rotate(**{"Idempotency-Key": "run-2"}).json()["kid"] != first.json()["kid"]

    def test_an_answer_that_got_lost_can_be_had_again(self, make_identity: MakeIdentity) -> None:
        """The effect took place, the connection was cut: the same idempotency key gives the 201."""
        service = make_identity(authority="api")
        service.meets(rotate={"effect_then_cut": True, "times": 1})
        with pytest.raises(requests.ConnectionError):
            service.rotate(**{"Idempotency-Key": "run-1"})
        (kid,) = service.kids()
        answer = service.rotate(**{"Idempotency-Key": "run-1"})
        assert (answer.status_code, answer.json()["kid"]) == (201, kid)


class TestPromote:
    def test_current_becomes_previous_and_the_next_one_current(self, database: Database, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """200, and both changes are there together."""
        old, new = make_key(promoted=True), make_key()
        service = make_identity(authority="api")
        answer = service.promote(new)
        assert (answer.status_code, answer.json()) == (200, {"kid": new, "status": "current", "previous": old})
        assert (database.status(old), database.status(new)) == ("previous", "current")

    def test_a_previous_key_can_be_current_again(self, database: Database, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """The way back."""
        old, new = make_key(promoted=True), make_key(promoted=True)
        assert make_identity(authority="api").promote(old).json()["previous"] == new
        assert database.status(old) == "current"

    def test_an_unknown_key_is_not_found(self, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """404, with the kid asked for."""
        make_key(promoted=True)
        answer = make_identity(authority="api").promote("no%20such%20key")
        assert (answer.status_code, answer.json()["kid"]) == (404, "no such key")

    def test_what_cannot_be_promoted_is_refused(self, database: Database, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """409 for the current key, a disabled one, and one that the database refuses; nothing changes."""
        disabled, rolled_back, current = (make_key(promoted=True) for _ in range(3))
        database.disable(disabled)
        database.run("UPDATE signing_keys SET never_promote = TRUE WHERE kid = %s", rolled_back)
        service = make_identity(authority="api")
        answers = {kid: service.promote(kid) for kid in (current, disabled, rolled_back)}
        assert {answer.status_code for answer in answers.values()} == {409}
        assert answers[current].json()["status"] == "current"
        assert "was rolled back once" in answers[rolled_back].json()["error"]
        assert database.status(current) == "current"

    def test_of_many_at_once_one_promotes(self, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """The others hear that it is current already."""
        make_key(promoted=True)
        new = make_key()
        service = make_identity(authority="api")
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: service.promote(new), range(8)))
        assert Counter(answer.status_code for answer in answers) == {200: 1, 409: 7}


class TestAdminApi:
    @pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "the-admin-token"}])
    @pytest.mark.parametrize("authority", ["database", "api"])
    def test_without_the_admin_token_it_does_nothing(self, make_key: MakeKey, make_identity: MakeIdentity, authority: str, headers: dict[str, str]) -> None:
        """401 for a missing, a wrong and an unannounced token."""
        kid = make_key()
        service = make_identity(authority=authority)
        assert [service.rotate(headers).status_code, service.promote(kid, headers).status_code] == [401, 401]
        assert service.kids() == {kid}

    def test_it_is_closed_where_the_database_is_the_authority(self, database: Database, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """403 and the reason, even if the service's role could write."""
        kid = make_key()
        service = make_identity(database_url=database.url("keyrotation_identity_admin"))
        answers = [service.rotate(), service.promote(kid)]
        assert [answer.status_code for answer in answers] == [403, 403]
        assert "rotated by the database's own rotator role" in answers[0].json()["error"]
        assert database.status(kid) == "next"


class TestFaults:
    def test_a_fault_is_met_as_often_as_asked(self, make_identity: MakeIdentity) -> None:
        """Then the service is itself again, and other endpoints never noticed."""
        service = make_identity()
        service.meets(jwks={"status": 503, "times": 2})
        assert service.token().status_code == 503  # its own: there is no key
        assert [service.jwks().status_code for _ in range(3)] == [503, 503, 200]

    def test_faults_follow_one_another(self, make_identity: MakeIdentity) -> None:
        """A list is met in its order; the file's removal ends them all."""
        service = make_identity()
        service.meets(jwks=[{"status": 500, "times": 1}, {"body": "<html>sorry</html>"}])
        answers = [service.jwks() for _ in range(3)]
        assert [answer.status_code for answer in answers] == [500, 200, 200]
        assert (answers[1].text, answers[1].headers["Content-Type"]) == ("<html>sorry</html>", "text/html")
        service.meets()
        assert service.jwks().json() == {"keys": []}

    def test_it_can_send_elsewhere(self, make_identity: MakeIdentity) -> None:
        """A redirect that keeps the method, and with a careless client the credentials."""
        service = make_identity()
        service.meets(**{"*": {"redirect": "http://127.0.0.1:9/elsewhere"}})
        answer = service.http.post(service.token_url, allow_redirects=False, timeout=10)
        assert (answer.status_code, answer.headers["Location"]) == (307, "http://127.0.0.1:9/elsewhere")

    def test_it_can_serve_another_jwks(self, make_identity: MakeIdentity) -> None:
        """Literally, whatever it is."""
        service = make_identity()
        service.meets(jwks={"jwks": {"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}})
        assert service.jwks().json() == {"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}

    def test_it_can_be_slow(self, make_identity: MakeIdentity) -> None:
        """A client with less patience gives up."""
        service = make_identity()
        service.meets(jwks={"delay": 0.5})
        with pytest.raises(requests.ReadTimeout):
            service.http.get(f"{service.url}/.well-known/jwks.json", timeout=0.1)

    @pytest.mark.parametrize(("fault", "made"), [("cut", 0), ("effect_then_cut", 1)])
    def test_it_can_cut_the_connection(self, make_identity: MakeIdentity, fault: str, made: int) -> None:
        """Before or after the effect: the client cannot tell, the database can."""
        service = make_identity(authority="api")
        service.meets(rotate={fault: True, "times": 1})
        with pytest.raises(requests.ConnectionError):
            service.rotate()
        assert len(service.kids()) == made

    def test_its_clock_can_be_wrong(self, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """Date and iat go together, an hour behind."""
        make_key(promoted=True)
        service = make_identity()
        service.meets(token={"clock_offset": -3600})
        answer = service.token()
        claims = jwt.decode(answer.json()["access_token"], options={"verify_signature": False})
        assert time.time() - claims["iat"] == pytest.approx(3600, abs=3)
        assert parsedate_to_datetime(answer.headers["Date"]).timestamp() == pytest.approx(claims["iat"], abs=2)
        assert parsedate_to_datetime(service.jwks().headers["Date"]).timestamp() == pytest.approx(time.time(), abs=3)

    def test_it_can_sign_wrongly(self, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """The token names the current key, which has not signed it."""
        kid = make_key(promoted=True)
        service = make_identity()
        service.meets(token={"sign_wrong": True})
        answer = service.token()
        assert kid_of(answer) == kid
        with pytest.raises(jwt.InvalidSignatureError):
            verified(service, answer)

    def test_it_can_go_on_with_the_old_key(self, make_key: MakeKey, make_identity: MakeIdentity) -> None:
        """The token names, and was signed by, the key that was current before."""
        make_key(promoted=True)
        old, _ = make_key(promoted=True), make_key(promoted=True)
        service = make_identity()
        service.meets(token={"old_kid": True})
        answer = service.token()
        assert kid_of(answer) == old
        assert verified(service, answer)

    def test_an_unknown_fault_is_loud(self, make_identity: MakeIdentity) -> None:
        """A misspelt one must not pass for a service that withstands it."""
        service = make_identity()
        service.meets(jwks={"statsu": 503})
        assert service.jwks().status_code == 500


class TestHttp:
    def test_every_answer_has_a_right_date(self, make_identity: MakeIdentity) -> None:
        """Clocks are compared by it."""
        service = make_identity()
        for answer in (service.jwks(), service.token(), service.rotate({}), service.http.get(service.url, timeout=10)):
            at = parsedate_to_datetime(answer.headers["Date"])
            assert abs(at.timestamp() - time.time()) < 3

    def test_every_answer_has_a_request_id(self, make_identity: MakeIdentity) -> None:
        """The caller's own, or a new one; errors repeat it."""
        service = make_identity()
        url = f"{service.url}/nothing/here"
        given = service.http.get(url, headers={"X-Request-Id": "run-1"}, timeout=10)
        assert (given.status_code, given.headers["X-Request-Id"], given.json()["request_id"]) == (404, "run-1", "run-1")
        assert service.http.get(url, headers={"X-Request-Id": "a b"}, timeout=10).headers["X-Request-Id"] != "a b"

    def test_the_wrong_method_is_refused(self, make_identity: MakeIdentity) -> None:
        """405, with the right one."""
        service = make_identity()
        answer = service.http.get(service.token_url, timeout=10)
        assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")

    @pytest.mark.parametrize("method", ["DELETE", "HEAD", "NONSENSE"])
    def test_what_it_cannot_do_it_says_in_json(self, make_identity: MakeIdentity, method: str) -> None:
        """Never a page of HTML."""
        service = make_identity()
        connection = http.client.HTTPConnection("127.0.0.1", service.config.port, timeout=10)
        connection.request(method, "/.well-known/jwks.json")
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("Content-Type")) == (501, "application/json")
        connection.close()

    def test_a_body_without_length_is_refused(self, make_identity: MakeIdentity) -> None:
        """And never taken for the next request on the connection."""
        service = make_identity()
        answer = service.http.post(service.token_url, data=iter([b"grant_type=client_credentials"]), timeout=10)
        assert (answer.status_code, answer.headers["Connection"]) == (411, "close")

    def test_its_log_holds_no_secret(self, make_key: MakeKey, make_identity: MakeIdentity, capfd: pytest.CaptureFixture[str]) -> None:
        """One line for each request, without credentials, tokens or queries."""
        make_key(promoted=True)
        service = make_identity(authority="api")
        token = service.token().json()["access_token"]
        service.rotate()
        service.http.get(f"{service.url}/.well-known/jwks.json?hidden=this", timeout=10)
        service.jwks()  # an answer to this one: the lines before it have been written
        said = capfd.readouterr().err
        assert "POST '/oauth2/token' 200" in said
        assert "POST '/api/v1/admin/keys/rotate' 201" in said
        config = service.config
        basic = base64.b64encode(":".join(service.client).encode()).decode()
        for secret in (config.client_secret, config.admin_token, config.kms_token, basic, token, "hidden"):
            assert secret not in said


class TestProcess:
    def test_it_runs_until_it_is_told_to_end(self, tmp_path: Path, make_key: MakeKey, make_config: Callable[..., dict[str, Any]]) -> None:
        """SIGTERM ends it with 0; faults.json lies beside the configuration."""
        make_key(promoted=True)
        port = free_port()
        config = tmp_path / "identity.json"
        config.touch(mode=0o600)
        config.write_text(json.dumps(make_config(port=port)))
        process = subprocess.Popen([sys.executable, "-m", "sandbox.identity", "--config", config])
        try:
            eventually(lambda: listening(port))
            (tmp_path / "faults.json").write_text('{"jwks": {"status": 418}}')
            url = f"http://127.0.0.1:{port}/.well-known/jwks.json"
            assert requests.get(url, timeout=10).status_code == 418
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.wait()

    def test_a_configuration_that_others_can_read_is_refused(self, tmp_path: Path, make_config: Callable[..., dict[str, Any]]) -> None:
        """It holds secrets."""
        config = tmp_path / "identity.json"
        config.write_text(json.dumps(make_config()))
        os.chmod(config, 0o644)
        with pytest.raises(SystemExit, match="chmod 600"):
            identity.Config.load(config)

    @pytest.mark.parametrize("wrong", [{"authority": "nobody"}, {"replicas": 0}, {"key_cash": 1}])
    def test_a_configuration_that_makes_no_sense_is_refused(self, tmp_path: Path, make_config: Callable[..., dict[str, Any]], wrong: dict[str, Any]) -> None:
        """At the start, not at the first request."""
        config = tmp_path / "identity.json"
        config.touch(mode=0o600)
        config.write_text(json.dumps(make_config(**wrong)))
        with pytest.raises(SystemExit, match=str(config)):
            identity.Config.load(config)
