"""What an answer says about a key, what a round of answers proves, and how many it takes where each worker thread has a cache of its own."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyrotation.domain.propagation import Answer, Observation, classify, judge, probes_needed

GATEWAYS = ("gw1", "gw2", "gw3")
observations = st.lists(
    st.builds(Observation, st.sampled_from(GATEWAYS), st.sampled_from(Answer), st.sampled_from(["HTTP 200", "HTTP 401", "does not answer"])), max_size=12
)


def seen(gateway: str, *answers: str) -> list[Observation]:
    return [Observation(gateway, Answer(answer), f"said {answer}") for answer in answers]


class TestClassify:
    """A status, and the reason beside it."""

    @pytest.mark.parametrize(
        ("sentence", "status", "reason", "expected"),
        [
            ("a 200 accepts the key", 200, "", "accepted"),
            ("a 200 accepts whatever its body says", 200, "the token expired yesterday, said the page", "accepted"),
            ("a 401 refuses the key", 401, "", "refused"),
            ("Envoy does not know the kid", 401, "Jwks doesn't have key to match kid or alg from Jwt", "refused"),
            ("Envoy finds the signature wrong", 401, "Jwt verification fails", "refused"),
            ("F37: a token of a clock that is ahead is no word about its key", 401, "Jwt not yet valid", "unproven"),
            ("F37: PyJWT's words for iat in the future", 401, "The token is not yet valid (iat)", "unproven"),
            ("F37: golang-jwt's words for iat in the future", 401, "Token used before issued", "unproven"),
            ("F37: golang-jwt's words for nbf in the future", 401, "token is not valid yet: token is not active yet", "unproven"),
            ("F37: another's words for iat in the future", 401, "iat is in the future", "unproven"),
            ("an expired token is no word about its key", 401, "Jwt is expired", "unproven"),
            ("F32: a gateway that could not fetch the set", 401, "Jwks remote fetch is failed", "unproven"),
            ("a gateway that takes its token from elsewhere saw none", 401, "Jwt is missing", "unproven"),
            ("F79: the audience is refused, the key is not", 403, "Audiences in Jwt are not allowed", "unproven"),
            ("F79: somebody limits the rate", 429, "", "unproven"),
            ("F79: nobody is behind the route", 503, "no healthy upstream", "unproven"),
            ("a redirect is no acceptance", 302, "", "unproven"),
            ("neither is another success", 204, "", "unproven"),
        ],
    )
    def test_stories(self, sentence: str, status: int, reason: str, expected: str) -> None:
        """Only 200 accepts; only a 401 for the key's sake refuses; all else is unproven."""
        assert classify(status, reason) == expected, sentence

    @given(st.integers(100, 599).filter(lambda status: status not in (200, 401)), st.text(max_size=20))
    def test_no_other_status_says_anything(self, status: int, reason: str) -> None:
        """Whatever stands beside it."""
        assert classify(status, reason) is Answer.UNPROVEN

    @given(st.text(max_size=60))
    def test_a_401_never_accepts(self, reason: str) -> None:
        """No body of a 401 makes a key known."""
        assert classify(401, reason) is not Answer.ACCEPTED

    def test_the_reason_is_read_in_any_case(self) -> None:
        """JWT IS EXPIRED is as expired."""
        assert classify(401, "JWT IS EXPIRED") is Answer.UNPROVEN


class TestProbesNeeded:
    """(1 - 1/workers)^n <= 1e-6, and one fewer is not."""

    @pytest.mark.parametrize(("workers", "probes"), [(0, 1), (1, 1), (2, 20), (3, 35), (4, 49), (8, 104)])
    def test_figures(self, workers: int, probes: int) -> None:
        """What a rotation's canaries are counted by."""
        assert probes_needed(workers) == probes

    @given(st.integers(2, 1024))
    def test_missing_a_worker_is_below_one_in_a_million(self, workers: int) -> None:
        """In exact fractions: so many probes are enough, one fewer is not."""
        missed = 1 - Fraction(1, workers)
        needed = probes_needed(workers)
        assert missed**needed <= Fraction(1, 10**6) < missed ** (needed - 1)


class TestJudge:
    """A round of probes."""

    @pytest.mark.parametrize(
        ("sentence", "round_", "needed", "everywhere", "lagging"),
        [
            ("nobody was asked: nothing is shown", [], 1, False, ()),
            ("all accept", [*seen("gw1", "accepted"), *seen("gw2", "accepted")], 1, True, ()),
            ("one refuses", [*seen("gw1", "accepted"), *seen("gw2", "refused")], 1, False, ("gw2",)),
            ("one of many probes is refused: a worker thread lags", seen("gw1", "accepted", "accepted", "refused"), 3, False, ("gw1",)),
            ("F35: one does not answer", [*seen("gw1", "accepted"), *seen("gw2", "unproven")], 1, False, ("gw2",)),
            ("refused weighs more than unproven", seen("gw1", "unproven", "refused"), 2, False, ("gw1",)),
            ("too few probes are a sample", seen("gw1", "accepted", "accepted"), 3, False, ("gw1",)),
            ("just as many as are needed", seen("gw1", "accepted", "accepted", "accepted"), 3, True, ()),
            ("F79: a route that answers 503 to everybody proves nothing", [*seen("gw1", "unproven"), *seen("gw2", "unproven")], 1, False, ("gw1", "gw2")),
        ],
    )
    def test_stories(self, sentence: str, round_: list[Observation], needed: int, everywhere: bool, lagging: tuple[str, ...]) -> None:
        """Who accepts everywhere, and who lags."""
        verdict = judge(round_, needed)
        assert (verdict.everywhere, verdict.lagging) == (everywhere, lagging), sentence

    def test_it_is_explained_in_a_sentence(self) -> None:
        """Accepted, refused, and what the others said."""
        verdict = judge([*seen("gw1", "accepted"), *seen("gw2", "refused"), *seen("gw3", "unproven")])
        assert verdict.explain() == "accepted by gw1; refused by gw2; gw3: said unproven"

    def test_no_gateway_is_a_sentence_too(self) -> None:
        """An empty round says so."""
        assert judge([]).explain() == "no gateway was probed"

    def test_a_sample_is_called_one(self) -> None:
        """The record says that too few probes were made."""
        assert judge(seen("gw1", "accepted"), 20).explain() == "gw1: only 1 of 20 probes were made: sampled, not proven"

    @given(observations, st.integers(1, 4))
    def test_every_gateway_has_one_place_in_the_verdict(self, round_: list[Observation], needed: int) -> None:
        """Accepted, refused or unproven: each one that was asked stands in one of them."""
        verdict = judge(round_, needed)
        placed = [*verdict.accepted, *verdict.refused, *(gateway for gateway, _ in verdict.unproven)]
        assert sorted(placed) == sorted({observation.gateway for observation in round_})

    @given(observations, st.integers(1, 4))
    def test_everywhere_means_every_probe_of_every_gateway(self, round_: list[Observation], needed: int) -> None:
        """Nothing but acceptance, and enough of it, makes it everywhere."""
        counts = {gateway: sum(observation.gateway == gateway for observation in round_) for gateway in {observation.gateway for observation in round_}}
        shown = bool(counts) and all(observation.answer is Answer.ACCEPTED for observation in round_) and all(count >= needed for count in counts.values())
        assert judge(round_, needed).everywhere == shown

    @given(observations)
    def test_one_more_refusal_never_makes_it_better(self, round_: list[Observation]) -> None:
        """A refused probe anywhere ends any claim of everywhere."""
        assert not judge([*round_, *seen("gw1", "refused")]).everywhere
