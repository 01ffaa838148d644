"""What may enter: every odd value has one fate, the same at every door."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from apprentice.schemas.json_values import MAX_DEPTH, InvalidValue, compact_json, plain, read_json


class Colour(Enum):
    """An enum of words."""

    RED = "red"


class Level(IntEnum):
    """An enum of numbers."""

    LOW = 1


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def itself() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["me"] = {"again": value}
    return value


@pytest.mark.parametrize(
    ("value", "becomes"),
    [
        ("thanks \ud83d", "thanks \ufffd"),
        ("\ud83d\ude00", "\U0001f600"),
        ("nul \x00 and \u2028", "nul \x00 and \u2028"),
        (Colour.RED, "red"),
        (Level.LOW, 1),
        ({Colour.RED: 1}, {"red": 1}),
        (date(2024, 5, 1), "2024-05-01"),
        (datetime(2024, 5, 1, 12, tzinfo=UTC), "2024-05-01T12:00:00Z"),
        (timedelta(hours=1), "PT1H"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Decimal("3.5"), 3.5),
        (Decimal(7), 7),
        ((1, 2), [1, 2]),
        ({"b", "a"}, ["a", "b"]),
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (2**63 - 1, 2**63 - 1),
        (-(2**63), -(2**63)),
        (nested(MAX_DEPTH - 1), nested(MAX_DEPTH - 1)),
    ],
)
def test_what_stands_for_a_json_value_becomes_it(value: object, becomes: object) -> None:
    """Python's own values, halves of characters and numpy's numbers come out as plain JSON."""
    found = plain({"x": value})["x"]
    assert found == becomes
    assert type(found) is type(becomes)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (float("nan"), "x.y[1]: is NaN"),
        (float("-inf"), "is -Infinity"),
        (2**63, "more than 64 bits. Give it as text"),
        (b"caf\xe9", "of type builtins.bytes"),
        (object(), "of type builtins.object"),
        ({1: "a"}, "has the key 1, which is no text"),
        (dict([("\ud800", 1), ("\udbff", 2)]), "twice"),  # noqa: C406
        (Decimal("0.1000000000000000055511151231257827"), "Give it as text"),
        (Decimal("NaN"), "which no JSON number has"),
        (1 + 2j, "of type builtins.complex"),
        (nested(MAX_DEPTH), f"nested deeper than {MAX_DEPTH} levels"),
        (itself(), "holds itself"),
    ],
)
def test_what_has_no_place_in_json_is_refused_with_its_path(value: object, says: str) -> None:
    """The path of the very part, what it is, and where there is one, the remedy."""
    with pytest.raises(InvalidValue) as caught:
        plain({"x": {"y": [0, value]}})
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"score": NaN}', "score: is NaN"),
        ('{"score": 1e999}', "score: is Infinity"),
        ('{"n": 10000000000000000000000}', "n: is an integer of more than 64 bits"),
        ("[" * 100_000, "nested deeper"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "nested deeper"),
        ("", "answer: is empty"),
        (" \n", "is empty"),
        ("Sure! Here", "is not JSON"),
        ("1" * 5000, "is not JSON"),
        (b'{"text": "caf\xe9"}', "is not UTF-8 (byte 0xe9 at 13)"),
    ],
)
def test_a_text_that_cannot_enter_says_why(text: str | bytes, says: str) -> None:
    """Whatever a vendor, a caller or a file sends, the fault is one error of ours."""
    with pytest.raises(InvalidValue) as caught:
        read_json(text, name="answer")
    assert says in str(caught.value)


def test_a_mark_of_byte_order_is_no_part_of_a_text() -> None:
    """Windows' editors put one before a file."""
    assert read_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()) | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=3), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(anything)
def test_whatever_enters_can_be_stored_and_sent_and_enters_again_unchanged(value: object) -> None:
    """What is accepted is strict JSON in UTF-8, and the rule applied to it changes nothing."""
    try:
        data = plain(value)
    except InvalidValue:
        return
    sent = json.dumps(data, allow_nan=False).encode()
    assert compact_json(data).encode()
    assert read_json(sent) == data
    assert plain(data) == data


@given(st.text(st.characters()) | st.binary())
def test_no_text_breaks_the_reader(text: str | bytes) -> None:
    """Any text and any bytes are a value or a refusal, never another exception."""
    with contextlib.suppress(InvalidValue):
        assert plain(value := read_json(text)) == value


class Unserialisable:
    """An object whose own methods fail."""

    @property
    def dtype(self) -> None:
        raise RuntimeError("no dtype")


class Holder(BaseModel):
    anything: Any = None


@pytest.mark.parametrize("value", [Unserialisable(), Holder(anything=object()), Holder(anything={"a": [object()]})])
def test_a_foreign_object_whose_own_methods_fail_is_refused_with_its_path(value: object) -> None:
    """A model's serialiser, a library's array: whatever they raise."""
    with pytest.raises(InvalidValue, match="a: cannot be written as JSON"):
        plain({"a": value})
