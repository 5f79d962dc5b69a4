"""The gateways from outside: what is asked over which connection, and what their real answers are taken for (F35, F37, F69, F79)."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from keyrotation.adapters.gateways import REASON_LENGTH, HttpGateways
from keyrotation.domain.errors import BadAnswer, Unreachable
from keyrotation.domain.propagation import Answer, judge

if TYPE_CHECKING:
    from tests.adapters.conftest import Asked, Peer

CANARIES = tuple(f"canary-{number}" for number in range(5))
TOKEN = "eyJhbGciOiJFUzI1NiIsImtpZCI6InBsYW50ZWQifQ.eyJpc3MiOiJwbGFudGVkIiwiZXhwIjoxfQ.c2lnbmF0dXJlLXRoYXQtaXMtcGxhbnRlZA"


@pytest.fixture
def two(make_peer: Callable[[], Peer]) -> tuple[Peer, Peer]:
    """Two gateways that accept everything."""
    first, second = make_peer(), make_peer()
    return first, second


def gateways(*peers: Peer, probe_path: str | None = "/canary") -> HttpGateways:
    return HttpGateways([f"{peer.url}/api/items?page=1" for peer in peers], probe_path)


class TestAsking:
    """Which route, which token, which connection."""

    def test_every_canary_goes_to_every_gateways_probe_route(self, two: tuple[Peer, Peer]) -> None:
        """In equal parts, each as a Bearer token, to the probe path of the same host."""
        seen = gateways(*two).probe(CANARIES)
        for peer in two:
            assert [(asked.method, asked.path, asked.headers["Authorization"]) for asked in peer.asked] == [
                ("GET", "/canary", f"Bearer {canary}") for canary in CANARIES
            ]
        assert [observation.answer for observation in seen] == [Answer.ACCEPTED] * 10
        assert judge(seen, needed=5).everywhere

    def test_each_probe_is_a_connection_of_its_own(self, two: tuple[Peer, Peer]) -> None:
        """Where each worker thread has a cache of its own, a kept connection would ask the same one again and again."""
        gateways(*two).probe(CANARIES)
        assert [peer.connections for peer in two] == [5, 5]
        assert {asked.headers["Connection"] for peer in two for asked in peer.asked} == {"close"}

    def test_a_token_goes_to_the_apis_route(self, two: tuple[Peer, Peer]) -> None:
        """Each gateway's URL as it is configured."""
        seen = gateways(*two).call(TOKEN)
        assert [asked.path for peer in two for asked in peer.asked] == ["/api/items?page=1"] * 2
        assert [observation.gateway for observation in seen] == [f"{peer.url}/api/items?page=1" for peer in two]

    def test_without_a_probe_route_nobody_is_probed(self, two: tuple[Peer, Peer]) -> None:
        """It cannot probe, says so, and asks nobody; its API's route it still calls."""
        without = gateways(*two, probe_path=None)
        assert not without.can_probe
        assert without.probe(CANARIES) == []
        assert two[0].connections == 0
        assert len(without.call(TOKEN)) == 2

    def test_no_gateway_is_no_observation(self) -> None:
        """Then nothing is shown, and nothing claimed."""
        none = HttpGateways([], "/canary")
        assert (none.can_probe, none.names, list(none.probe(CANARIES)), list(none.call(TOKEN))) == (False, (), [], [])

    def test_the_names_are_the_urls(self, two: tuple[Peer, Peer]) -> None:
        """What a person finds in the file."""
        assert gateways(*two).names == tuple(f"{peer.url}/api/items?page=1" for peer in two)

    def test_one_answer_that_does_not_accept_settles_the_gateways_round(self, two: tuple[Peer, Peer]) -> None:
        """The others are asked all the same; canaries are few, and a dead gateway costs its timeout."""
        two[0].says(401, "Jwks doesn't have key to match kid or alg from Jwt")
        seen = gateways(*two).probe(CANARIES)
        assert [peer.connections for peer in two] == [1, 5]
        assert judge(seen, needed=5).refused == (f"{two[0].url}/api/items?page=1",)

    def test_a_worker_that_lags_is_found_among_those_that_do_not(self, peer: Peer) -> None:
        """The third probe is refused: the gateway does not know the key."""
        from tests.adapters.conftest import Reply

        peer.answers = lambda asked: Reply(401 if asked.headers["Authorization"].endswith("-2") else 200)
        seen = gateways(peer).probe(CANARIES)
        assert [observation.answer for observation in seen] == [Answer.ACCEPTED, Answer.ACCEPTED, Answer.REFUSED]
        assert not judge(seen, needed=3).everywhere


class TestAnswers:
    """What a real answer is taken for."""

    @pytest.mark.parametrize(
        ("sentence", "status", "body", "expected", "said"),
        [
            ("it passes", 200, "a page about expired tokens", Answer.ACCEPTED, "HTTP 200"),
            (
                "Envoy does not know the key",
                401,
                "Jwks doesn't have key to match kid or alg from Jwt",
                Answer.REFUSED,
                "HTTP 401 (Jwks doesn't have key to match kid or alg from Jwt)",
            ),
            ("Envoy finds the signature wrong", 401, "Jwt verification fails", Answer.REFUSED, "HTTP 401 (Jwt verification fails)"),
            ("a gateway without words", 401, "", Answer.REFUSED, "HTTP 401"),
            ("F37: a clock that is behind", 401, "Jwt not yet valid", Answer.UNPROVEN, "HTTP 401 (Jwt not yet valid)"),
            ("F37: iat in the future", 401, "token used before issued", Answer.UNPROVEN, "HTTP 401 (token used before issued)"),
            ("an expired canary", 401, "Jwt is expired", Answer.UNPROVEN, "HTTP 401 (Jwt is expired)"),
            ("F32: a set that could not be fetched", 401, "Jwks remote fetch is failed", Answer.UNPROVEN, "HTTP 401 (Jwks remote fetch is failed)"),
            ("F79: the audience", 403, "Audiences in Jwt are not allowed", Answer.UNPROVEN, "HTTP 403 (Audiences in Jwt are not allowed)"),
            ("F79: a limit on the rate", 429, "local_rate_limited\nmore", Answer.UNPROVEN, "HTTP 429 (local_rate_limited)"),
            ("F79: nobody behind it", 503, "no healthy upstream", Answer.UNPROVEN, "HTTP 503 (no healthy upstream)"),
            ("no content is no acceptance", 204, "", Answer.UNPROVEN, "HTTP 204"),
        ],
    )
    def test_stories(self, peer: Peer, sentence: str, status: int, body: str, expected: Answer, said: str) -> None:
        """Status and first line of the reason, for people and for the record."""
        peer.says(status, body)
        (seen,) = gateways(peer).call(TOKEN)
        assert (seen.answer, seen.said) == (expected, said), sentence

    def test_f35_a_dead_gateway_is_unproven(self, two: tuple[Peer, Peer]) -> None:
        """Nothing answers there; the other's answer counts."""
        two[0].stop()
        seen = gateways(*two).probe(CANARIES)
        assert [(observation.answer, observation.said) for observation in seen][:2] == [(Answer.UNPROVEN, "does not answer"), (Answer.ACCEPTED, "HTTP 200")]
        assert judge(seen, needed=5).lagging == (f"{two[0].url}/api/items?page=1",)

    def test_a_gateway_that_hangs_up_is_unproven(self, peer: Peer) -> None:
        """No answer is no refusal."""
        peer.says(cut=True)
        (seen,) = gateways(peer).call(TOKEN)
        assert (seen.answer, seen.said) == (Answer.UNPROVEN, "does not answer")

    def test_f69_a_redirect_is_unproven_and_takes_no_token_along(self, two: tuple[Peer, Peer]) -> None:
        """A login page elsewhere would answer 200."""
        two[0].says(302, "", headers={"Location": f"{two[1].url}/login"})
        (seen,) = gateways(two[0]).call(TOKEN)
        assert seen.answer is Answer.UNPROVEN
        assert "answers with a redirect" in seen.said
        assert two[1].connections == 0

    def test_an_endless_page_is_unproven(self, peer: Peer) -> None:
        """More than is asked for: not accepted, whatever its status."""
        peer.says(200, b"x" * 300_000)
        (seen,) = gateways(peer).call(TOKEN)
        assert seen.answer is Answer.UNPROVEN
        assert "more than 256 KiB" in seen.said

    @pytest.mark.parametrize("body", [f"refused: {TOKEN}", TOKEN, f"Bearer {TOKEN}", f'{{"token": "{TOKEN}"}}', "x" * 30 + TOKEN])
    def test_i05_a_gateway_that_quotes_the_token_is_not_quoted(self, peer: Peer, body: str) -> None:
        """No part of the token stands in what goes into the ledger."""
        peer.says(401, body)
        (seen,) = gateways(peer).call(TOKEN)
        assert not any(TOKEN[at : at + 12] in seen.said for at in range(len(TOKEN) - 12))

    def test_a_reason_is_one_short_printable_line(self, peer: Peer) -> None:
        """No escape sequence reaches a terminal, no page the ledger."""
        peer.says(401, b"\x1b[2J\x07not \xff you\r\nsecond line" + b" word" * 500)
        (seen,) = gateways(peer).call(TOKEN)
        assert seen.said.isprintable()
        assert "second" not in seen.said
        peer.says(401, "word " * 500)
        (seen,) = gateways(peer).call(TOKEN)
        assert len(seen.said) <= len("HTTP 401 ()") + REASON_LENGTH

    def test_a_token_that_no_header_can_carry_reaches_nobody(self, peer: Peer) -> None:
        """A newline in a token injects nothing: unproven."""
        (seen,) = gateways(peer).call("a\r\nInjected: yes")
        assert seen.answer is Answer.UNPROVEN
        assert peer.asked == []


class TestDates:
    """The gateways' clocks."""

    def test_each_gateways_own(self, two: tuple[Peer, Peer]) -> None:
        """By name, aware, with the round trip that blurs it; no token is needed for it."""
        two[1].says(401, date="Tue, 06 Jan 2026 03:00:05 GMT")
        dates = gateways(*two).dates()
        assert [dated.date for dated in dates] == [datetime(2026, 1, 6, 3, tzinfo=UTC), datetime(2026, 1, 6, 3, 0, 5, tzinfo=UTC)]
        assert [dated.name for dated in dates] == [f"{peer.url}/api/items" for peer in two]
        assert all("Authorization" not in asked.headers for peer in two for asked in peer.asked)

    def test_one_that_does_not_tell_is_left_out(self, two: tuple[Peer, Peer]) -> None:
        """No Date header is no clock to compare."""
        two[0].says(200, date=None)
        assert [dated.name for dated in gateways(*two).dates()] == [f"{two[1].url}/api/items"]

    def test_one_that_is_away_is_said_to_be(self, two: tuple[Peer, Peer]) -> None:
        """Before a rotation each gateway must answer: a dead one, or a redirect, is an error and no clock."""
        two[0].says(302)
        with pytest.raises(BadAnswer, match="redirect"):
            gateways(*two).dates()
        two[0].stop()
        with pytest.raises(Unreachable):
            gateways(*two).dates()


def test_what_is_asked_is_a_get(peer: Peer) -> None:
    """Probes and calls change nothing at a gateway."""
    gateways(peer).probe(CANARIES[:1])
    gateways(peer).call(TOKEN)
    gateways(peer).dates()
    asked: list[Asked] = peer.asked
    assert {each.method for each in asked} == {"GET"}
