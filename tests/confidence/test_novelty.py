"""Which words are new."""

from __future__ import annotations

from apprentice.confidence.novelty import Vocabulary


def test_novelty_is_the_share_of_distinct_unknown_words() -> None:
    """Case does not matter, repetition does not, and every number is the same word."""
    known = Vocabulary(["My parcel 4711 is late", "Where is it?"])
    assert known.novelty("my PARCEL is late") == 0.0
    assert known.novelty("parcel 99 broken broken") == 1 / 3
    assert known.novelty("Où est mon colis") == 1.0
    assert known.novelty("") == 0.0
