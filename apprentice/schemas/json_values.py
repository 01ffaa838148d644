"""What may enter: one rule for inputs, answers, HTTP bodies, recorded traffic and the values inside schemas.

Whatever passes here can be stored by both databases, trained on, and sent as JSON to any consumer:

| value | what becomes of it |
| --- | --- |
| half a surrogate pair | U+FFFD, the replacement character; two halves that belong together become their character |
| NaN, Infinity, 1e999 | refused |
| an integer beyond 64 bits | refused |
| nesting deeper than `MAX_DEPTH`, or a value that holds itself | refused |
| a key that is no text | refused |
| enum members, dates, times, UUIDs, paths | their value, or their ISO text |
| Decimal | a number, if one has the same value; else refused (text, for pydantic models) |
| tuples, sets | lists; a set's items in the order of their JSON text |
| numpy's scalars and arrays | numbers and lists |
| bytes, and any other object | refused |
| a key twice in one JSON object | the last one counts, as for every JSON reader |
"""

from __future__ import annotations

import json
import math
import numbers
import reprlib
from collections.abc import Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from pathlib import PurePath
from typing import Any
from uuid import UUID

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from apprentice.errors import Problem

__all__ = ["MAX_DEPTH", "InvalidValue", "NotJson", "compact_json", "in_words", "plain", "read_json"]

MAX_DEPTH = 100
"""Levels of objects and lists within one another."""

_LARGEST, _SMALLEST = 2**63 - 1, -(2**63)
_AS_TEXT = (date, time, timedelta, UUID, PurePath, IPv4Address, IPv6Address)
_MOST_PROBLEMS = 20

# json.dumps builds an encoder for every call that is not all defaults
compact_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class InvalidValue(ValueError):
    """A value cannot enter; ``problems`` says where and why."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("; ".join(str(p) for p in problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,), self.__dict__  # else pickle takes the message for the problems


class NotJson(InvalidValue):
    """A text is no JSON at all."""


def plain(value: object, *, name: str = "value", decimals_as_text: bool = False) -> Any:
    """``value`` as new plain JSON data (dict, list, str, int, float, bool, None) that follows the rule above.

    Raises `InvalidValue` with the path of every part that has no place in JSON; ``name`` is the path of the whole.
    """
    walk = _Walk(name, decimals_as_text)
    data = walk.part(value, "", 0)
    if walk.problems:
        raise InvalidValue(walk.problems)
    return data


def read_json(text: str | bytes, *, name: str = "value") -> Any:
    """The value of a JSON text, by the same rule. Raises `InvalidValue`; `NotJson` if the text is no JSON at all."""
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            byte = text[error.start]
            message = f"is not UTF-8 (byte 0x{byte:02x} at {error.start})."
            raise NotJson([Problem(name, message, "Save it as UTF-8.")]) from None
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise NotJson([Problem(name, "is empty.")])
    try:
        value = json.loads(text)
    except ValueError as error:
        raise NotJson([Problem(name, f"is not JSON ({error}).")]) from None
    except RecursionError:
        raise InvalidValue([Problem(name, f"is nested deeper than {MAX_DEPTH} levels.")]) from None
    return plain(value, name=name)


def in_words(value: object, most: int = 60) -> str:
    """A value as an error quotes it: its repr, cut to ``most`` characters."""
    # repr of a long or deep value would build all of it
    shown = repr(value[: most + 1]) if isinstance(value, str | bytes) else _SHORT.repr(value)
    return shown if len(shown) <= most else shown[: most - 3] + "..."


_SHORT = reprlib.Repr(maxlevel=4, maxdict=8, maxlist=8, maxtuple=8, maxset=8, maxstring=60, maxother=80)


class _Walk:
    def __init__(self, name: str, decimals_as_text: bool) -> None:
        self.problems: list[Problem] = []
        self._name = name
        self._decimals_as_text = decimals_as_text
        self._within: set[int] = set()  # ids of the objects and lists that the current part lies in

    def part(self, value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if kind is str:
            return _well_formed(value)
        if value is None or kind is bool:
            return value
        if kind is int:
            return (
                value
                if _SMALLEST <= value <= _LARGEST
                else self._refuse(path, "is an integer of more than 64 bits.", "Give it as text.")
            )
        if kind is float:
            return (
                value
                if math.isfinite(value)
                else self._refuse(
                    path, f"is {_not_finite(value)}, which JSON does not have.", "Give null, or leave the field out."
                )
            )
        if kind is dict or kind is list:
            return self._container(value, path, depth)
        try:
            return self._python_value(value, path, depth)
        except Exception as error:  # noqa: BLE001  # a foreign object's own methods may raise anything
            what = f"{type(error).__name__}: {in_words(str(error))}"
            return self._refuse(path, f"cannot be written as JSON ({what}).", "Give plain data.")

    def _container(self, value: Any, path: str, depth: int) -> Any:
        if depth >= MAX_DEPTH:
            return self._refuse(path, f"is nested deeper than {MAX_DEPTH} levels.")
        if id(value) in self._within:
            return self._refuse(path, "holds itself.")
        self._within.add(id(value))
        try:
            if isinstance(value, Mapping):
                return self._object(value, path, depth + 1)
            return [self.part(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
        finally:
            self._within.discard(id(value))

    def _object(self, value: Mapping[Any, Any], path: str, depth: int) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key, inner in value.items():
            text = key.value if isinstance(key, Enum) else key
            if not isinstance(text, str):
                self._refuse(path, f"has the key {in_words(key)}, which is no text.")
                continue
            text = _well_formed(str(text))
            if text in data:
                self._refuse(path, f"has the key {in_words(text)} twice.")
            data[text] = self.part(inner, f"{path}.{text}", depth)
        return data

    def _python_value(self, value: Any, path: str, depth: int) -> Any:
        """What Python has and JSON has not; and subclasses of what JSON has."""
        if isinstance(value, Enum):
            return self.part(value.value, path, depth)
        if isinstance(value, BaseModel):
            return self.part(value.model_dump(mode="json", by_alias=True, exclude_unset=True), path, depth)
        if isinstance(value, Mapping | list | tuple):
            return self._container(value, path, depth)
        if isinstance(value, set | frozenset):
            return sorted(self._container(list(value), path, depth), key=_text)
        if isinstance(value, str):
            return _well_formed(str.__str__(value))
        if isinstance(value, _AS_TEXT):
            return to_jsonable_python(value)
        if isinstance(value, Decimal):
            return self._decimal(value, path)
        if isinstance(value, numbers.Integral):
            return self.part(int(value), path, depth)
        if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational):
            return self.part(float(value), path, depth)
        if hasattr(value, "dtype") and callable(getattr(value, "tolist", None)):
            listed = value.tolist()
            if type(listed) is not type(value):
                return self.part(listed, path, depth)
        kind = type(value)
        remedy = "Decode it to text." if isinstance(value, bytes | bytearray) else ""
        return self._refuse(
            path, f"is of type {kind.__module__}.{kind.__qualname__}, which JSON does not have.", remedy
        )

    def _decimal(self, value: Decimal, path: str) -> Any:
        if self._decimals_as_text:
            return str(value)
        if value.is_finite():
            whole = value == value.to_integral_value()
            if whole and _SMALLEST <= value <= _LARGEST:
                return int(value)
            if Decimal(repr(float(value))) == value:
                return float(value)
        return self._refuse(path, f"is {in_words(value)}, which no JSON number has.", "Give it as text.")

    def _refuse(self, path: str, message: str, remedy: str = "") -> None:
        if len(self.problems) < _MOST_PROBLEMS:
            path = path.removeprefix(".") or self._name
            self.problems.append(Problem(path if len(path) <= 120 else path[:100] + "...", message, remedy))


def _well_formed(text: str) -> str:
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _not_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
