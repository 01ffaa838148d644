"""What a vendor says it counted. Foreign numbers: what is no plausible count counts as not said, never as zero."""

from __future__ import annotations

from typing import Any

from apprentice.store import Usage

__all__ = ["total", "usage_of"]

_MOST_TOKENS = 100_000_000
"""Far beyond what any model reads or writes in one call, and far within what the store and prices can count."""


def usage_of(
    read: Any, written: Any, *, cached: Any = None, cache_write: Any = None, reasoning: Any = None
) -> Usage | None:
    """The usage of one call, or None where the vendor did not say it, or not in plausible numbers.

    ``read`` and ``written`` are all tokens of the input and of the output; the others are parts of these, and may be
    missing. Numbers must be whole (200.0 is), not negative, and parts no larger than their wholes; every call reads
    some.
    """
    counts = [_whole(read), _whole(written), *(0 if part is None else _whole(part) for part in (cached, cache_write))]
    thought = 0 if reasoning is None else _whole(reasoning)
    if None in counts or thought is None:
        return None
    whole_input, output, from_cache, to_cache = (count or 0 for count in counts)
    if whole_input == 0 or from_cache + to_cache > whole_input or thought > output:
        return None
    return Usage(whole_input, output, from_cache, to_cache, thought)


def total(first: Any, *others: Any) -> int | None:
    """Counts added up, for vendors that count apart; None where the first is missing or any of them is no count.

    Each is looked at by itself: in a sum, a negative one or a fraction would not be seen any more.
    """
    counts = [_whole(first), *(_whole(other) for other in others if other is not None)]
    return None if None in counts else sum(count or 0 for count in counts)


def _whole(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST_TOKENS:
        return None
    return int(value) if value == int(value) else None
