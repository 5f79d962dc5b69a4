"""The life of a key, and the ring of an environment's keys: what is published, what signs, and what is too ambiguous to go on with."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyrotation.domain.errors import Ambiguous, Refused
from keyrotation.domain.keys import Key, KeyRing, Status
from tests.domain.made import DAY, HOUR, NOW, a_key


class TestLife:
    """What each state means."""

    @pytest.mark.parametrize(("status", "published"), [("next", True), ("current", True), ("previous", True), ("disabled", False)])
    def test_i04_all_but_disabled_keys_stand_in_the_jwks(self, status: str, published: bool) -> None:
        """next, current and previous are published, disabled is not."""
        assert a_key(status=status).published is published

    def test_a_life_in_order(self) -> None:
        """next, then current, then previous, then disabled: at each stage the ring shows the key in its place and nowhere else."""
        told = []
        for status in ("next", "current", "previous", "disabled"):
            ring = KeyRing.of([a_key("k", status)])
            told.append((ring.next is not None, ring.current is not None, len(ring.previous), ring.published == {"k"}))
        assert told == [(True, False, 0, True), (False, True, 0, True), (False, False, 1, True), (False, False, 0, False)]

    def test_there_is_no_other_state(self) -> None:
        """A word that a newer version may have written is refused, not guessed (F73)."""
        with pytest.raises(ValueError, match="retired"):
            Status("retired")

    def test_a_key_is_shown_without_its_public_half(self) -> None:
        """The repr of a key names its kid, and quotes no JWK."""
        shown = repr(Key("k", Status.NEXT, NOW, NOW, {"x": "planted"}))
        assert "kid='k'" in shown
        assert "planted" not in shown


class TestRing:
    """All keys at one instant."""

    def test_a_full_ring(self) -> None:
        """One next, one current, any number of previous ones, oldest demotion first."""
        ring = KeyRing.of(
            [
                a_key("p2", "previous", demoted_at=NOW - DAY),
                a_key("c"),
                a_key("gone", "disabled"),
                a_key("n", "next"),
                a_key("p1", "previous", demoted_at=NOW - 2 * DAY),
            ]
        )
        assert (ring.require_current().kid, ring.next and ring.next.kid, [key.kid for key in ring.previous]) == ("c", "n", ["p1", "p2"])
        assert ring.published == {"n", "c", "p1", "p2"}

    def test_the_compromised_are_known_for_ever(self) -> None:
        """A disabled key keeps its mark; one that was only cleaned up has none."""
        ring = KeyRing.of([a_key("burnt", "disabled", compromised=True), a_key("old", "disabled"), a_key("c")])
        assert ring.compromised == {"burnt"}

    @pytest.mark.parametrize("status", ["current", "next"])
    def test_two_keys_in_one_place_are_ambiguous(self, status: str) -> None:
        """Two current or two next keys: both kids are named, nothing is chosen, and the text says where to read on."""
        with pytest.raises(Ambiguous, match=rf"2 keys are {status} \(a, b\): see docs/operations\.md"):
            KeyRing.of([a_key("a", status), a_key("b", status)])

    def test_several_previous_keys_are_not_ambiguous(self) -> None:
        """Rotations may be closer together than cleanups."""
        assert len(KeyRing.of([a_key(str(number), "previous") for number in range(5)]).previous) == 5

    def test_an_unknown_kid_is_refused_with_those_there_are(self) -> None:
        """F46: whoever mistypes a kid is shown the published ones."""
        with pytest.raises(Refused, match=r"no signing key with the kid 'typo'; published are: c, n$"):
            KeyRing.of([a_key("c"), a_key("n", "next"), a_key("gone", "disabled")]).find("typo")

    @given(st.text(max_size=500))
    def test_a_malformed_kid_is_refused_shown_and_cut(self, kid: str) -> None:
        """F46: whatever was typed, the answer is Refused and quotes no more than its beginning."""
        with pytest.raises(Refused) as refused:
            KeyRing.of([]).find(kid)
        assert str(refused.value).startswith("there is no signing key with the kid ")
        assert len(str(refused.value)) < 800
        assert "\n" not in str(refused.value)

    def test_a_disabled_key_can_be_found(self) -> None:
        """find looks among all keys, not only the published."""
        assert KeyRing.of([a_key("gone", "disabled")]).find("gone").status is Status.DISABLED

    def test_no_current_key_says_bootstrap(self) -> None:
        """The runbook's "no keys available" names the deployment that helps."""
        with pytest.raises(Refused, match="run the bootstrap-signing-keys deployment"):
            KeyRing.of([a_key("n", "next")]).require_current()

    @given(st.permutations(["next", "current", "previous", "previous", "disabled"]))
    def test_the_order_of_the_rows_makes_no_difference(self, statuses: list[str]) -> None:
        """However the database returns them, the ring says the same."""
        times = {"0": NOW - 9 * HOUR, "1": NOW - 8 * HOUR}
        seen = iter(times)
        keys = []
        for status in sorted(statuses):
            kid = next(seen) if status == "previous" else status
            keys.append(a_key(kid, status, **({"demoted_at": times[kid]} if status == "previous" else {})))
        shuffled = sorted(keys, key=lambda key: statuses.index(str(key.status)))
        ring = KeyRing.of(shuffled)
        assert ([key.kid for key in ring.previous], ring.require_current().kid, ring.next and ring.next.kid) == (["0", "1"], "current", "next")
