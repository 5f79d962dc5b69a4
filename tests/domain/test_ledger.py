"""The ledger's chain: whatever is done to an entry afterwards, its number is named. And what a chain alone cannot show."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keyrotation.domain.ledger import COLUMNS, GENESIS, Entry, broken_links

EVENTS = ("opened", "generated", "promoted", "demoted", "closed", "disabled")


def chained(entry: Entry, previous: str) -> Entry:
    """The entry as it would be if it had been written after that hash: what a forger with the code can make."""
    followed = replace(entry, previous_hash=previous)
    return replace(followed, hash=followed.computed_hash())


def a_ledger(length: int = 6) -> list[Entry]:
    """Entries as PostgreSQL would have written them."""
    entries, head = [], GENESIS
    for seq in range(1, length + 1):
        entry = Entry(
            seq,
            f"2026-01-06T03:00:{seq:02}.000000Z",
            "production",
            7,
            f"kid-{seq}" if seq % 2 else None,
            EVENTS[seq % len(EVENTS)],
            None,
            "next" if seq == 2 else None,
            "schedule",
            "run-1",
            f"reason {seq}",
            '{"db_user": "rotator"}',
            "",
            "",
        )
        entries.append(chained(entry, head))
        head = entries[-1].hash
    return entries


def edited(entries: list[Entry], at: int) -> None:
    entries[at] = replace(entries[at], reason="nothing happened")


def removed(entries: list[Entry], at: int) -> None:
    del entries[at]


def swapped(entries: list[Entry], at: int) -> None:
    entries[at], entries[at + 1] = entries[at + 1], entries[at]


def inserted(entries: list[Entry], at: int) -> None:
    entries.insert(at, chained(replace(entries[at], reason="it was somebody else"), entries[at - 1].hash))


def forged(entries: list[Entry], at: int) -> None:
    """An edit with a right hash: only whoever came after it can tell."""
    entries[at] = chained(replace(entries[at], actor="nobody"), entries[at].previous_hash)


def removed_and_renumbered(entries: list[Entry], at: int) -> None:
    del entries[at]
    entries[at:] = [replace(entry, seq=entry.seq - 1) for entry in entries[at:]]


class TestChain:
    """broken_links names what was done, by the entry's number."""

    def test_a_whole_chain_has_nothing_to_say(self) -> None:
        """As it was written, it is whole; and so is an empty one."""
        assert broken_links(a_ledger()) == []
        assert broken_links([]) == []

    @pytest.mark.parametrize(
        ("deed", "expected"),
        [
            (edited, ["entry 3 was edited: its content does not match its hash"]),
            (removed, ["entry 3 is missing: after 2 comes 4"]),
            (
                swapped,
                [
                    "entry 3 is missing: after 2 comes 4",
                    "entry 3 comes after entry 4: it was inserted, repeated or moved",
                    "entry 4 is missing: after 3 comes 5",
                ],
            ),
            (inserted, ["entry 3 comes after entry 3: it was inserted, repeated or moved"]),
            (forged, ["entry 4 does not follow entry 3: one of the two was exchanged"]),
            (
                removed_and_renumbered,
                [
                    "entry 3 does not follow entry 2: one of the two was exchanged",
                    *(f"entry {seq} was edited: its content does not match its hash" for seq in (3, 4, 5)),
                ],
            ),
        ],
    )
    def test_each_deed_is_named_by_its_number(self, deed: Callable[[list[Entry], int], None], expected: list[str]) -> None:
        """Edited, removed, reordered, inserted, forged, renumbered: the third entry's turn."""
        entries = a_ledger()
        deed(entries, 2)
        assert broken_links(entries) == expected

    @pytest.mark.parametrize("column", COLUMNS)
    def test_every_column_is_under_the_hash(self, column: str) -> None:
        """No column can be changed, emptied or filled unnoticed."""
        entry = a_ledger()[2]
        value = getattr(entry, column)
        changed = replace(entry, **{column: value + 1 if isinstance(value, int) else f"{value}x"})
        assert changed.computed_hash() != entry.hash
        emptied = replace(entry, **{column: None})
        assert value is None or emptied.computed_hash() != entry.hash

    def test_the_columns_are_all_there_are_but_the_hash(self) -> None:
        """A column that is added to an entry has to be put under the hash."""
        assert {*COLUMNS, "hash"} == {field.name for field in fields(Entry)}

    def test_a_chain_may_begin_after_a_known_head(self) -> None:
        """From a head that was kept outside, later entries are checked alone; from a wrong one, the first does not follow."""
        entries = a_ledger()
        assert broken_links(entries[3:], after=(3, entries[2].hash)) == []
        assert broken_links(entries[3:], after=(3, GENESIS)) == ["entry 4 does not follow entry 3: one of the two was exchanged"]

    def test_only_the_head_shows_that_the_end_was_cut_off(self) -> None:
        """A shorter chain is whole: the head kept outside differs, which is why it is published as a run's last act."""
        entries = a_ledger()
        head = (entries[-1].seq, entries[-1].hash)
        cut = entries[:-2]
        assert broken_links(cut) == []
        assert (cut[-1].seq, cut[-1].hash) != head

    def test_only_the_head_shows_a_ledger_that_was_written_anew(self) -> None:
        """Whoever computes every hash again makes another whole chain, with another head."""
        entries = a_ledger()
        anew, previous = [], GENESIS
        for entry in entries:
            anew.append(chained(replace(entry, actor="nobody"), previous))
            previous = anew[-1].hash
        assert broken_links(anew) == []
        assert anew[-1].hash != entries[-1].hash


class TestEncoding:
    """The canonical octets: sql/schema.sql makes the same."""

    def test_a_worked_example(self) -> None:
        """Each column as name=length:value or name-, a line each, lengths in UTF-8 octets, SHA-256 over all."""
        entry = Entry(1, "2026-01-06T03:00:00.000000Z", "dev", None, None, "opened", None, None, "Zoë", None, "", "{}", GENESIS, "")
        octets = (
            b"seq=1:1\nat=27:2026-01-06T03:00:00.000000Z\nenvironment=3:dev\nrotation_id-\nkid-\nevent=6:opened\nold_status-\nnew_status-\n"
            b"actor=4:Zo\xc3\xab\nflow_run_id-\nreason=0:\nevidence=2:{}\nprevious_hash=64:" + b"0" * 64 + b"\n"
        )
        assert entry.computed_hash() == hashlib.sha256(octets).hexdigest()

    def test_nothing_and_an_empty_text_differ(self) -> None:
        """NULL is not ''."""
        entry = a_ledger()[0]
        assert replace(entry, reason=None).computed_hash() != replace(entry, reason="").computed_hash()

    @given(
        st.text(alphabet="a=:-0123456789\n", max_size=12),
        st.text(alphabet="a=:-0123456789\n", max_size=12),
        st.text(alphabet="a=:-0123456789\n", max_size=12),
        st.text(alphabet="a=:-0123456789\n", max_size=12),
    )
    def test_no_text_passes_for_the_next_field(self, actor: str, reason: str, other_actor: str, other_reason: str) -> None:
        """Two entries with different fields never have the same octets, whatever stands in them."""
        entry = a_ledger(1)[0]
        hashes = replace(entry, actor=actor, reason=reason).computed_hash(), replace(entry, actor=other_actor, reason=other_reason).computed_hash()
        assert (hashes[0] == hashes[1]) == ((actor, reason) == (other_actor, other_reason))


@given(st.integers(0, 5), st.sampled_from(COLUMNS), st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8))
def test_i15_any_edit_of_any_entry_is_found(at: int, column: str, text: str) -> None:
    """Whatever is written into whichever column of whichever entry, the entry or the one after it is named."""
    entries = a_ledger()
    before = entries[at]
    entries[at] = replace(before, **{column: 100 + len(text) if column in ("seq", "rotation_id") else text})
    found = broken_links(entries)
    assert (found == []) == (entries[at] == before)
    if found:
        assert any(f"entry {seq} " in said for said in found for seq in (before.seq, before.seq + 1, entries[at].seq)), found


@given(st.lists(st.integers(0, 5), min_size=0, max_size=8))
def test_i15_only_a_beginning_of_the_chain_is_whole(picked: list[int]) -> None:
    """Of all lists of its entries, with gaps, repetitions and in any order, only the first ones in their order pass."""
    entries = a_ledger()
    assert (broken_links(entries[at] for at in picked) == []) == (picked == list(range(len(picked))))
