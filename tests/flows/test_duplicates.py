"""Duplicates, exact and near."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from flows.duplicates import Duplicates, IntTable

LONG = (
    "the parcel with my new garden chairs was promised for monday and the driver has still not come by to deliver it "
    "at all"
)
OTHER = "where can i find my invoice for the last three months of the year"


def test_equal_texts_are_equal_to_the_letter_and_all_but_equal_ones_are_near() -> None:
    """Case and white space seldom matter, but whether they do is for the answers to say."""
    seen = list(Duplicates().add_page(["My  order\nis late", "my order is LATE ", "My  order\nis late"]))
    assert [s.equal_to for s in seen] == [-1, -1, 0]
    assert seen[1].near == (0,)


def test_near_duplicates_are_found_and_others_are_not() -> None:
    """One word more at the end is a near duplicate, another text is not; pages do not matter."""
    duplicates = Duplicates()
    (first,) = duplicates.add_page([LONG])
    nearly, other = duplicates.add_page([LONG + " today", OTHER])
    assert first.near == ()
    assert nearly.near == (0,)
    assert other.near == ()


def test_short_texts_are_compared_whole() -> None:
    """Two words that differ make two different texts, not near duplicates."""
    assert [s.near for s in Duplicates().add_page(["late parcel", "late order"])] == [(), ()]


@given(st.lists(st.integers(0, 2**64 - 1), max_size=3000))
def test_the_table_agrees_with_a_dictionary(keys: list[int]) -> None:
    """The flat table holds what a dict holds, through growth and collisions."""
    table, known = IntTable(4), {}
    for key in keys:
        assert table.get(key) == known.get(key, -1)
        if key not in known:
            known[key] = len(known)
            table.put(key, known[key])
    assert len(table) == len(known)
    assert Counter(table.get(key) for key in known) == Counter(known.values())
