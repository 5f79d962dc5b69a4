"""Who makes and promotes keys (ports.Authority): one contract for our own hands and for the identity service's admin API, on a real database.

The API is the sandbox's identity service, with the KMS emulator behind it. A peer stands in front, counts what is posted, and loses, repeats or
falsifies answers. What only the one or the other can get wrong follows after the contract.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jwt
import pytest
import requests
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_private_key

from keyrotation.adapters.api_authority import ApiAuthority
from keyrotation.adapters.database_authority import CANARY_TYPE, CanaryTerms, DatabaseAuthority, make_key, sealing_context
from keyrotation.adapters.google_kms import GoogleKmsSealer
from keyrotation.domain.decision import Request, Rotation
from keyrotation.domain.errors import BadAnswer, Denied, KeyRotationError, Refused, Superseded, Unreachable, WorldError
from keyrotation.domain.jwks import thumbprint
from keyrotation.domain.propagation import probes_needed
from keyrotation.ports import Authority, Gate, NewKey, Sealed
from keyrotation.secrets import SecretRef
from sandbox import identity, kms
from sandbox.processes import free_port
from tests.domain.made import NOW

if TYPE_CHECKING:
    from tests.adapters.conftest import Asked, Peer, Reply
    from tests.conftest import Database

KMS_KEY = "projects/test/locations/local/keyRings/identity/cryptoKeys/signing"
ROTATORS_TOKEN, SERVICES_TOKEN, ADMIN_TOKEN = "kms-token-of-the-rotator", "kms-token-of-the-identity-service", "planted-admin-token"
TERMS = CanaryTerms("https://identity.test", "key-rotation-canary", timedelta(days=25), workers=2)
OPEN, SHUT = Gate(timedelta(0), proof=False), Gate(timedelta(hours=1), proof=False)
REQUEST = Request("the tests", "run-1")
Secret = Callable[[str], SecretRef]


class World:
    """An environment with a current key, and an authority over it. `posts` are what reached the service's admin API (none where it has none)."""

    def __init__(self, database: Database, authority: Callable[[World], Authority], front: Peer | None = None) -> None:
        self.database, self.front = database, front
        self.store = database.key_store()
        self.authority = authority(self)
        self.old = database.current()

    def open(self, kind: str = "rotation") -> Rotation:
        opened = self.store.open(kind, REQUEST, None)
        assert opened is not None
        return opened

    def published(self, rotation: Rotation) -> str:
        """A key that this rotation generated, and that has been seen to be published."""
        kid = self.authority.generate(rotation, "why")
        self.store.confirm(rotation, timedelta(hours=48))
        return kid

    def superseded(self, rotation: Rotation) -> Rotation:
        """The same rotation under the epoch that is over: somebody has taken it over."""
        assert self.store.take_over(rotation, REQUEST) is not None
        return rotation

    def keys(self) -> dict[str, str]:
        return {key.kid: str(key.status) for key in self.store.look().ring.keys}

    def events(self, kid: str) -> list[str]:
        return [entry.event for entry in self.database.records().entries() if entry.kid == kid]

    @property
    def posts(self) -> list[str]:
        """The verbs of what was posted."""
        return [asked.path.rpartition("/")[2] for asked in self.front.asked] if self.front else []


# ------------------------------------------------------------------------------------------------ the real parts


@pytest.fixture(scope="module")
def kms_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home, port = tmp_path_factory.mktemp("kms") / "home", free_port()
    home.mkdir()
    (home / "principals.json").write_text(json.dumps({ROTATORS_TOKEN: ["encrypt"], SERVICES_TOKEN: ["encrypt", "decrypt"]}))
    server = kms.serve(home, port, [KMS_KEY])
    yield f"127.0.0.1:{port}"
    server.stop(grace=None).wait()


class Service:
    """The sandbox's identity service in authority = "api" mode, and a peer in front of it that hands everything on."""

    def __init__(self, database: Database, kms_endpoint: str, front: Peer, folder: Path) -> None:
        self._faults = folder / "faults.json"
        self.environment = str(database.value("owner", "SELECT name FROM key_rotation.environment"))
        config = identity.Config(
            port=free_port(),
            database_url=database.url("identity_admin"),
            kms_endpoint=kms_endpoint,
            kms_key=KMS_KEY,
            kms_token=SERVICES_TOKEN,
            environment=self.environment,
            issuer="https://identity.test",
            audience="api",
            client_id="client",
            client_secret="client-secret",
            admin_token=ADMIN_TOKEN,
            authority="api",
        )
        self._server = identity.Server(config, identity.Faults(self._faults))
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self._url = f"http://127.0.0.1:{config.port}"
        self.front = front
        front.answers = self.hand_on

    def hand_on(self, asked: Asked) -> Reply:
        """What the service answers; it hangs up where the service does."""
        from tests.adapters.conftest import Reply

        try:
            headers = {name: value for name, value in asked.headers.items() if name in ("Authorization", "Idempotency-Key")}
            answer = requests.post(f"{self._url}{asked.path}", headers=headers, timeout=10, allow_redirects=False)
        except requests.ConnectionError:
            return Reply(cut=True)
        return Reply(answer.status_code, answer.content, {name: answer.headers[name] for name in ("Location", "Content-Type") if name in answer.headers})

    def meets(self, **faults: Any) -> None:
        """What the next requests meet (sandbox/identity.py, FAULTS)."""
        self._faults.write_text(json.dumps(faults))

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def service(database: Database, kms_endpoint: str, peer: Peer, tmp_path: Path) -> Iterator[Service]:
    running = Service(database, kms_endpoint, peer, tmp_path)
    yield running
    running.stop()


@pytest.fixture
def admin_token(secret: Secret) -> SecretRef:
    return secret(ADMIN_TOKEN)


@pytest.fixture
def api(database: Database, service: Service, admin_token: SecretRef) -> World:
    return World(database, lambda world: ApiAuthority(service.front.url, admin_token, world.store), service.front)


@pytest.fixture
def by_hand(database: Database, kms_endpoint: str, secret: Secret) -> World:
    sealer = GoogleKmsSealer(KMS_KEY, kms_endpoint, secret(ROTATORS_TOKEN))
    return World(database, lambda world: DatabaseAuthority("test", world.store, sealer, TERMS))


@pytest.fixture(params=["by_hand", "api"])
def world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(request.param)
    return found


# ------------------------------------------------------------------------------------------------ the contract


class TestContract:
    """What a step may rely on, whoever makes the keys."""

    def test_a_generated_key_is_next(self, world: World) -> None:
        """It is published, signs nothing, bears its thumbprint, and is named by its rotation."""
        rotation = world.open()
        kid = world.authority.generate(rotation, "why")
        assert world.keys() == {world.old: "current", kid: "next"}
        assert thumbprint(world.database.row(kid)["public_jwk"]) == kid
        assert world.store.rotation(rotation.id).new_kid == kid
        assert world.events(kid) == ["generated"]

    def test_i16_a_generated_key_opens_in_its_own_place(self, world: World, kms_endpoint: str) -> None:
        """The identity service opens it with environment and kid; inside is the private half of the row's public one."""
        kid = world.authority.generate(world.open(), "why")
        row = world.database.run("reader", "SELECT private_key_ciphertext, public_jwk FROM signing_keys WHERE kid = %s", kid)
        opened = identity.Kms(kms_endpoint, KMS_KEY, SERVICES_TOKEN, "test").open(kid, bytes(row[0][0]))
        identity.private_half(kid, opened, row[0][1])

    def test_i02_generating_twice_makes_one_key(self, world: World) -> None:
        """The second call names the same key, or is refused: there is one new key."""
        rotation = world.open()
        kid = world.authority.generate(rotation, "why")
        with suppress(Refused):
            assert world.authority.generate(rotation, "why") == kid
        assert world.keys() == {world.old: "current", kid: "next"}
        assert world.events(kid) == ["generated"]

    def test_a_promoted_key_is_current_and_the_old_one_previous(self, world: World) -> None:
        """In one step, named by the rotation, one entry for each key."""
        rotation = world.open()
        kid = world.published(rotation)
        world.authority.promote(rotation, kid, OPEN, "why")
        assert world.keys() == {world.old: "previous", kid: "current"}
        done = world.store.rotation(rotation.id)
        assert (done.old_kid, done.new_kid) == (world.old, kid)
        assert (world.events(kid)[-1], world.events(world.old)[-1]) == ("promoted", "demoted")

    def test_i06_a_shut_gate_changes_nothing(self, world: World) -> None:
        """Not published long enough, or not shown to be known: refused, before anybody is asked to promote."""
        rotation = world.open()
        kid = world.published(rotation)
        for gate in (SHUT, Gate(timedelta(0), proof=True)):
            with pytest.raises(Refused, match=f"key {kid} may not be promoted yet"):
                world.authority.promote(rotation, kid, gate, "why")
        assert world.keys() == {world.old: "current", kid: "next"}
        assert "promote" not in world.posts

    def test_i06_the_gate_opens_with_the_proof(self, world: World) -> None:
        """Once every gateway was shown to know the key, the same gate lets it through."""
        rotation = world.open()
        kid = world.published(rotation)
        world.store.accept(rotation, kid)
        world.authority.promote(rotation, kid, Gate(timedelta(0), proof=True), "why")
        assert world.keys()[kid] == "current"

    @pytest.mark.parametrize("verb", ["generate", "promote", "roll back"])
    def test_i22_an_epoch_that_is_over_changes_nothing(self, world: World, verb: str) -> None:
        """F60: a run that thaws after another has taken over is Superseded, and posts nothing."""
        rotation = world.open()
        kid = "" if verb == "generate" else world.published(rotation)
        if verb == "roll back":
            world.authority.promote(rotation, kid, OPEN, "why")
        late, before, posted = world.superseded(rotation), world.keys(), len(world.posts)
        with pytest.raises(Superseded):
            match verb:
                case "generate":
                    world.authority.generate(late, "why")
                case "promote":
                    world.authority.promote(late, kid, OPEN, "why")
                case _:
                    world.authority.roll_back(late, world.old, "why")
        assert world.keys() == before
        assert len(world.posts) == posted

    def test_a_roll_back_makes_the_previous_key_current_for_good(self, world: World) -> None:
        """The one that failed is previous, and is never promoted again; the rotation says that it was rolled back."""
        rotation = world.open()
        kid = world.published(rotation)
        world.authority.promote(rotation, kid, OPEN, "why")
        world.authority.roll_back(rotation, world.old, "it did not work")
        assert world.keys() == {world.old: "current", kid: "previous"}
        assert world.store.look().ring.find(kid).never_promote
        assert world.store.rotation(rotation.id).rolled_back
        assert world.events(world.old)[-1] == "rolled back to"

    def test_i09_one_rotation_asks_once(self, world: World) -> None:
        """Exactly one rotate and one promote is posted in a whole rotation, where anything is posted at all."""
        rotation = world.open()
        world.authority.promote(rotation, world.published(rotation), OPEN, "why")
        world.store.close(rotation, "done", "done")
        assert world.posts == (["rotate", "promote"] if world.front else [])

    def test_ten_rotations_make_ten_keys(self, world: World) -> None:
        """Each has a key of its own; all but the last are previous."""
        kids = []
        for _ in range(10):
            rotation = world.open()
            kids.append(world.published(rotation))
            world.authority.promote(rotation, kids[-1], OPEN, "why")
            world.store.close(rotation, "done", "done")
        assert len(set(kids)) == 10
        assert world.keys() == {world.old: "previous", **dict.fromkeys(kids[:-1], "previous"), kids[-1]: "current"}


# ------------------------------------------------------------------------------------------------ the admin API


class TestApi:
    """What the identity service and the way to it can get wrong."""

    def test_f20_an_answer_that_is_lost_after_its_effect_is_read_back(self, api: World, service: Service) -> None:
        """The key was made, the connection cut: it is adopted, and nothing is posted again. The same for the promotion."""
        service.meets(rotate={"effect_then_cut": True}, promote={"effect_then_cut": True})
        rotation = api.open()
        kid = api.published(rotation)
        api.authority.promote(rotation, kid, OPEN, "why")
        assert api.keys() == {api.old: "previous", kid: "current"}
        assert api.posts == ["rotate", "promote"]
        assert api.store.rotation(rotation.id).old_kid == api.old

    @pytest.mark.parametrize(
        "answer",
        [
            {"status": 500},
            {"status": 504},
            {"status": 200, "body": b"<html>welcome"},
            {"status": 200, "body": b"x" * 300_000},
            {"status": 302, "headers": {"Location": "http://127.0.0.1:1/"}},
            {"status": 403},
            {"status": 429},
        ],
    )
    def test_f20_f25_a_wrong_answer_after_the_effect_is_read_back(self, api: World, service: Service, answer: dict[str, Any]) -> None:
        """A 500, a page, too much of it, a redirect: what the table shows counts, and nothing is posted again."""
        from tests.adapters.conftest import Reply

        def falsify(asked: Asked) -> Reply:
            service.hand_on(asked)
            return Reply(**answer)

        service.front.answers = falsify
        rotation = api.open()
        kid = api.published(rotation)
        api.authority.promote(rotation, kid, OPEN, "why")
        assert api.keys() == {api.old: "previous", kid: "current"}
        assert api.posts == ["rotate", "promote"]

    @pytest.mark.parametrize(
        ("sentence", "fault", "error", "words"),
        [
            ("F19: broken before its effect", {"status": 500}, Unreachable, "answers HTTP 500; no key was changed"),
            ("F19: away", {"status": 503}, Unreachable, "answers HTTP 503; no key was changed"),
            ("F70: too often", {"status": 429}, Unreachable, "answers HTTP 429; no key was changed"),
            ("F19: hung up before its effect", {"cut": True}, Unreachable, "does not answer"),
            ("F24: not allowed", {"status": 403}, Denied, r"refuses identity.admin_token \(HTTP 403\): renew it, then run the rotation again"),
            ("F25: a page", {"body": "<html>welcome"}, BadAnswer, "said that it made a key, but no key of the table is next"),
            ("F25: too much", {"body": "x" * 300_000}, BadAnswer, "more than 256 KiB"),
            ("F25: a redirect", {"redirect": "http://127.0.0.1:1/"}, BadAnswer, "answers with a redirect, which is not followed"),
            ("an address that is none", {"status": 404}, BadAnswer, r"answers HTTP 404 \(the sandbox was asked for 404\); no key was changed"),
        ],
    )
    def test_no_effect_is_an_error_and_the_next_try_makes_the_key(
        self, api: World, service: Service, sentence: str, fault: dict[str, Any], error: type[WorldError], words: str
    ) -> None:
        """One POST, an error that says what to do; and the same rotation goes on as soon as the service does."""
        service.meets(rotate=fault)
        rotation = api.open()
        with pytest.raises(WorldError, match=words) as raised:
            api.authority.generate(rotation, "why")
        assert type(raised.value) is error, sentence
        assert ADMIN_TOKEN not in str(raised.value)
        assert (api.keys(), api.posts) == ({api.old: "current"}, ["rotate"])
        service.meets()
        kid = api.authority.generate(rotation, "why")
        assert api.keys() == {api.old: "current", kid: "next"}

    @pytest.mark.parametrize("fault", [{"status": 500}, {"cut": True}, {"body": "<html>"}, {"redirect": "http://127.0.0.1:1/"}, {"status": 403}])
    def test_i13_a_promotion_without_effect_leaves_the_current_key(self, api: World, service: Service, fault: dict[str, Any]) -> None:
        """An error, one POST, the keys as they were; and the next try promotes."""
        rotation = api.open()
        kid = api.published(rotation)
        service.meets(promote=fault)
        with pytest.raises(WorldError):
            api.authority.promote(rotation, kid, OPEN, "why")
        assert (api.keys(), api.posts) == ({api.old: "current", kid: "next"}, ["rotate", "promote"])
        service.meets()
        api.authority.promote(rotation, kid, OPEN, "why")
        assert api.keys() == {api.old: "previous", kid: "current"}
        assert api.store.rotation(rotation.id).old_kid == api.old

    def test_f21_a_proxy_that_repeats_the_post_makes_no_second_key(self, api: World, service: Service) -> None:
        """The service knows the rotation's Idempotency-Key, and answers the repetition from memory."""
        service.front.answers = lambda asked: (service.hand_on(asked), service.hand_on(asked))[1]
        rotation = api.open()
        kid = api.authority.generate(rotation, "why")
        assert api.keys() == {api.old: "current", kid: "next"}
        assert service.front.asked[0].headers["Idempotency-Key"] == f"rotation-test-{rotation.id}"

    def test_f21_where_the_key_is_lost_on_the_way_the_repetition_is_a_409_that_is_read_back(self, api: World, service: Service) -> None:
        """A service that does not know such keys refuses the second: the first one's key is adopted."""

        def repeat(asked: Asked) -> Reply:
            bare = replace(asked, headers={name: value for name, value in asked.headers.items() if name != "Idempotency-Key"})
            service.hand_on(bare)
            again = service.hand_on(bare)
            assert again.status == 409
            return again

        service.front.answers = repeat
        kid = api.authority.generate(api.open(), "why")
        assert api.keys() == {api.old: "current", kid: "next"}

    def test_f21_each_rotation_has_an_idempotency_key_of_its_own(self, api: World, service: Service) -> None:
        """Else the second rotation would be answered with the first one's key."""
        for _ in range(2):
            rotation = api.open()
            api.authority.promote(rotation, api.published(rotation), OPEN, "why")
            api.store.close(rotation, "done", "done")
        sent = [asked.headers["Idempotency-Key"] for asked in service.front.asked if asked.path.endswith("/rotate")]
        assert len(set(sent)) == 2

    def test_f22_a_409_where_the_key_is_current_already_is_success(self, api: World, service: Service) -> None:
        """Somebody, or a proxy, was faster with the same promotion."""
        service.front.answers = lambda asked: (service.hand_on(asked), service.hand_on(asked))[1]
        rotation = api.open()
        kid = api.published(rotation)
        api.authority.promote(rotation, kid, OPEN, "why")
        assert api.keys() == {api.old: "previous", kid: "current"}

    def test_f22_a_409_where_another_key_is_current_is_superseded(self, api: World, service: Service, database: Database) -> None:
        """Between our look and our call somebody made another key current, and disabled ours: this run stops."""
        current = database.current()
        rotation = api.open()
        kid = api.published(rotation)

        def meddle(asked: Asked) -> Reply:
            database.run("owner", "UPDATE signing_keys SET enabled = FALSE WHERE kid = %s", kid)
            database.promote(api.old)
            return service.hand_on(asked)

        service.front.answers = meddle
        with pytest.raises(Superseded, match="the identity service made key .* current meanwhile: key .* was not promoted by this run"):
            api.authority.promote(rotation, kid, OPEN, "why")
        assert api.keys() == {api.old: "current", kid: "disabled", current: "previous"}

    def test_f22_a_409_for_another_reason_is_passed_on_in_its_words(self, api: World, service: Service, database: Database) -> None:
        """Our key was disabled by hand meanwhile: the service's own sentence, and the current key as it was."""
        rotation = api.open()
        kid = api.published(rotation)

        def meddle(asked: Asked) -> Reply:
            database.run("owner", "UPDATE signing_keys SET enabled = FALSE WHERE kid = %s", kid)
            return service.hand_on(asked)

        service.front.answers = meddle
        with pytest.raises(BadAnswer, match=rf"answers HTTP 409 \(Signing key {kid} is disabled and cannot be promoted\.\); no key was changed"):
            api.authority.promote(rotation, kid, OPEN, "why")
        assert api.keys() == {api.old: "current", kid: "disabled"}

    def test_f24_a_401_is_answered_with_the_renewed_secret_once(self, api: World, service: Service, admin_token: SecretRef) -> None:
        """The token was renewed between our look and the call: it is read again, and the second call succeeds."""
        Path(admin_token.place).write_text("the token of yesterday")

        def renew(asked: Asked) -> Reply:
            answer = service.hand_on(asked)
            Path(admin_token.place).write_text(ADMIN_TOKEN)
            return answer

        service.front.answers = renew
        kid = api.authority.generate(api.open(), "why")
        assert [asked.headers["Authorization"] for asked in service.front.asked] == ["Bearer the token of yesterday", f"Bearer {ADMIN_TOKEN}"]
        assert api.keys() == {api.old: "current", kid: "next"}

    def test_f24_a_second_401_stops_before_anything_changed(self, api: World, admin_token: SecretRef) -> None:
        """Denied, after two calls and no more, with what to mend and without the token."""
        Path(admin_token.place).write_text("planted-token-of-yesterday")
        with pytest.raises(Denied, match=r"refuses identity\.admin_token \(HTTP 401\): renew it") as denied:
            api.authority.generate(api.open(), "why")
        assert "planted" not in str(denied.value)
        assert (api.keys(), api.posts) == ({api.old: "current"}, ["rotate", "rotate"])

    def test_a_promotion_that_was_not_one_is_found_out(self, api: World, service: Service) -> None:
        """The service says 200, and the table has another current key."""
        rotation = api.open()
        kid = api.published(rotation)
        service.meets(promote={"status": 200})
        with pytest.raises(BadAnswer, match=f"said that it promoted key {kid}, but the table has another current key"):
            api.authority.promote(rotation, kid, OPEN, "why")

    def test_i09_a_run_that_died_right_after_the_promotion_knows_the_way_back(self, api: World, service: Service) -> None:
        """What the rotation must remember is written before the call: the old key's kid is there, however the call ended."""
        rotation = api.open()
        kid = api.published(rotation)
        noted: list[str | None] = []

        def look(asked: Asked) -> Reply:
            noted.append(api.store.rotation(rotation.id).old_kid)
            return service.hand_on(asked)

        service.front.answers = look
        api.authority.promote(rotation, kid, OPEN, "why")
        assert noted == [api.old]

    def test_i09_a_roll_back_that_died_before_it_was_noted_is_noted_by_the_next(self, api: World, service: Service) -> None:
        """The old key is current again: no second call, and the failed key is marked never to be promoted."""
        rotation = api.open()
        kid = api.published(rotation)
        api.authority.promote(rotation, kid, OPEN, "why")
        requests.post(f"{service.front.url}/api/v1/admin/keys/{api.old}/promote", headers={"Authorization": f"Bearer {ADMIN_TOKEN}"}, timeout=10)
        posted = len(api.posts)
        api.authority.roll_back(rotation, api.old, "why")
        assert api.store.look().ring.find(kid).never_promote
        assert api.store.rotation(rotation.id).rolled_back
        assert len(api.posts) == posted

    def test_a_lost_roll_back_is_read_back(self, api: World, service: Service) -> None:
        """F20, once more: the effect was there, the answer was not."""
        rotation = api.open()
        kid = api.published(rotation)
        api.authority.promote(rotation, kid, OPEN, "why")
        service.meets(promote={"effect_then_cut": True})
        api.authority.roll_back(rotation, api.old, "why")
        assert api.keys() == {api.old: "current", kid: "previous"}
        assert api.posts == ["rotate", "promote", "promote"]

    def test_a_service_that_is_not_there(self, database: Database, admin_token: SecretRef) -> None:
        """A closed port: unreachable, with what to check, and no key."""
        world = World(database, lambda world: ApiAuthority(f"http://127.0.0.1:{free_port()}", admin_token, world.store))
        with pytest.raises(Unreachable, match="check that it runs and may be reached from here"):
            world.authority.generate(world.open(), "why")
        assert world.keys() == {world.old: "current"}


# ------------------------------------------------------------------------------------------------ our own hands


class TestByHand:
    """What making keys ourselves can get wrong."""

    @pytest.mark.parametrize("error", [Unreachable("KMS is away"), Denied("KMS says no"), BadAnswer("KMS sent another ciphertext")])
    def test_f18_where_the_key_cannot_be_sealed_nothing_is_stored(self, database: Database, error: KeyRotationError) -> None:
        """F12 to F14: the error passes, no row, no entry; the same rotation may try again."""

        class Broken:
            def seal(self, plaintext: bytes, context: bytes) -> Sealed:
                raise error

            def check(self) -> str:
                raise error

        world = World(database, lambda world: DatabaseAuthority("test", world.store, Broken(), TERMS))
        rotation, before = world.open(), list(world.database.records().entries())
        with pytest.raises(type(error)):
            world.authority.generate(rotation, "why")
        assert world.keys() == {world.old: "current"}
        assert [entry.seq for entry in world.database.records().entries()] == [entry.seq for entry in before]

    def test_f18_a_key_that_was_made_before_is_refused(self, database: Database) -> None:
        """A generator that returns the same key twice: its thumbprint is known, and nothing changes. Not even its owner's first life matters."""
        same: NewKey = database.new_key()
        world = World(database, lambda world: DatabaseAuthority("test", world.store, None, None))  # type: ignore[arg-type]
        first = world.open()
        world.store.insert(first, same, "why")
        world.store.confirm(first, timedelta(0))
        world.authority.promote(first, same.kid, OPEN, "why")
        world.store.close(first, "done", "done")
        second, before = world.open(), world.keys()
        with pytest.raises(KeyRotationError) as refused:
            world.store.insert(second, same, "why")
        assert world.keys() == before
        assert same.ciphertext.hex() not in str(refused.value)

    def test_i16_a_ciphertext_opens_in_its_own_place_alone(self, by_hand: World, kms_endpoint: str) -> None:
        """Under another kid or another environment the KMS does not open it."""
        kid = by_hand.authority.generate(by_hand.open(), "why")
        ciphertext = bytes(by_hand.database.value("reader", "SELECT private_key_ciphertext FROM signing_keys WHERE kid = %s", kid))
        for environment, name in (("production", kid), ("test", by_hand.old)):
            with pytest.raises(identity.RefusalError):
                identity.Kms(kms_endpoint, KMS_KEY, SERVICES_TOKEN, environment).open(name, ciphertext)

    def test_the_canaries_of_the_row_are_dated_by_the_database(self, by_hand: World) -> None:
        """I18: iat lies between two looks at the database's clock."""
        before = by_hand.store.look().now
        rotation = by_hand.open()
        kid = by_hand.authority.generate(rotation, "why")
        claims = jwt.decode(by_hand.store.spend_canaries(rotation, kid, 1)[0], options={"verify_signature": False})
        assert int(before.timestamp()) <= claims["iat"] <= by_hand.store.look().now.timestamp()

    def test_canaries_are_never_given_twice(self, by_hand: World) -> None:
        """The whole sheaf, in pieces: all different, and then none."""
        rotation = by_hand.open()
        kid = by_hand.authority.generate(rotation, "why")
        given = [canary for _ in range(60) for canary in by_hand.store.spend_canaries(rotation, kid, 7)]
        assert len(given) == len(set(given)) == TERMS.count
        assert by_hand.store.look().ring.find(kid).canaries_left == 0


# ------------------------------------------------------------------------------------------------ make_key


class Catching:
    """A sealer that keeps what it was given."""

    def __init__(self) -> None:
        self.plaintext = self.context = b""

    def seal(self, plaintext: bytes, context: bytes) -> Sealed:
        self.plaintext, self.context = plaintext, context
        return Sealed(hashlib.sha256(plaintext).digest(), "the-sealer/1")

    @property
    def private(self) -> ec.EllipticCurvePrivateKey:
        key = load_der_private_key(self.plaintext, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return key


@pytest.fixture
def made() -> tuple[NewKey, Catching]:
    caught = Catching()
    return make_key("production", caught.seal, TERMS, NOW), caught


class TestMakeKey:
    """The one place where a private key's plaintext exists."""

    def test_the_pair(self, made: tuple[NewKey, Catching]) -> None:
        """P-256; the sealed half is PKCS8 DER of the public one's; the kid is its thumbprint; for ES256 signatures and nothing else."""
        key, caught = made
        numbers = caught.private.public_key().public_numbers()
        assert isinstance(caught.private.curve, ec.SECP256R1)
        assert {**key.public_jwk} == {
            "kty": "EC",
            "crv": "P-256",
            "x": _encoded(numbers.x),
            "y": _encoded(numbers.y),
            "kid": thumbprint(key.public_jwk),
            "alg": "ES256",
            "use": "sig",
        }
        assert key.kid == key.public_jwk["kid"]
        assert caught.plaintext == caught.private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())

    def test_i16_it_is_sealed_for_its_place(self, made: tuple[NewKey, Catching]) -> None:
        """Environment and kid are the additional authenticated data; what sealed it is noted."""
        key, caught = made
        assert caught.context == sealing_context("production", key.kid) == f"keyrotation:v1:production:{key.kid}".encode()
        assert (key.ciphertext, key.sealed_by) == (hashlib.sha256(caught.plaintext).digest(), "the-sealer/1")

    def test_i05_no_private_half_leaves_it_but_sealed(self, made: tuple[NewKey, Catching]) -> None:
        """Neither what is returned nor its repr holds the scalar, raw, in hex, in base64 or as a number; and repr shows no ciphertext and no canary."""
        key, caught = made
        scalar = caught.private.private_numbers().private_value
        octets = scalar.to_bytes(32, "big")
        everything = f"{key!r} {key} {key.public_jwk} {key.canaries} {key.ciphertext!r} {key.ciphertext.hex()} {key.sealed_by}"
        for form in (
            repr(octets)[2:-1],
            octets.hex(),
            base64.b64encode(octets).decode().rstrip("="),
            base64.urlsafe_b64encode(octets).decode().rstrip("="),
            str(scalar),
        ):
            assert form not in everything
        assert key.canaries[0] not in repr(key)
        assert repr(key.ciphertext) not in repr(key)

    def test_every_canary_verifies_with_the_public_half(self, made: tuple[NewKey, Catching]) -> None:
        """ES256, under the key's kid, for the probe route's audience."""
        key, _ = made
        public = jwt.PyJWK(dict(key.public_jwk))
        for canary in key.canaries:
            jwt.decode(canary, public, algorithms=["ES256"], audience=TERMS.audience, issuer=TERMS.issuer, options={"verify_exp": False, "verify_iat": False})
            assert jwt.get_unverified_header(canary) == {"alg": "ES256", "kid": key.kid, "typ": CANARY_TYPE}

    def test_a_canary_has_no_power(self, made: tuple[NewKey, Catching]) -> None:
        """No subject, scope or client: issuer, audience, dates and a name of its own are all that it says."""
        key, _ = made
        issued = int(NOW.timestamp())
        for canary in key.canaries:
            claims = jwt.decode(canary, options={"verify_signature": False})
            claims.pop("jti")
            assert claims == {"iss": TERMS.issuer, "aud": TERMS.audience, "iat": issued, "exp": issued + int(TERMS.lifetime.total_seconds())}

    def test_a_sheaf_lasts_for_twelve_rounds_of_proof(self, made: tuple[NewKey, Catching]) -> None:
        """All distinct, enough for every worker thread, twelve times; and never fewer than 32."""
        key, _ = made
        assert len(key.canaries) == len({jwt.decode(canary, options={"verify_signature": False})["jti"] for canary in key.canaries}) == TERMS.count
        assert TERMS.count >= 12 * probes_needed(TERMS.workers)
        assert replace(TERMS, workers=1).count == 32

    def test_without_a_probe_route_there_are_no_canaries(self) -> None:
        """No route takes them, so none is signed."""
        assert make_key("production", Catching().seal, None, NOW).canaries == ()

    def test_no_two_keys_are_the_same(self) -> None:
        """A hundred pairs, a hundred kids."""
        assert len({make_key("production", Catching().seal, None, NOW).kid for _ in range(100)}) == 100

    def test_a_sealer_that_fails_lets_nothing_out(self) -> None:
        """I5: its error passes as it is; neither its text nor what it is chained to holds the plaintext."""
        caught = Catching()

        def fail(plaintext: bytes, context: bytes) -> Sealed:
            caught.plaintext = plaintext
            raise Unreachable("the KMS does not answer")

        with pytest.raises(Unreachable) as raised:
            make_key("production", fail, TERMS, NOW)
        assert (raised.value.__cause__, raised.value.__context__, str(raised.value)) == (None, None, "the KMS does not answer")


def _encoded(coordinate: int) -> str:
    return base64.urlsafe_b64encode(coordinate.to_bytes(32, "big")).rstrip(b"=").decode()
