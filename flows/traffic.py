"""Recorded traffic: a file of JSON Lines with an input and the answer that a remote gave to it.

A line that cannot be used is left out and named, with its number and the reason; the rest goes on. Logs of chat
completions are read as they are: the answer as the JSON text in a message, found by a path with list indices.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apprentice.errors import Problem
from apprentice.remote.answers import bare_json
from apprentice.schemas.json_values import InvalidValue, NotJson, read_json
from apprentice.schemas.schema import Schema, SchemaError
from apprentice.settings.config import Settings

__all__ = ["Recorded", "read_traffic"]

_LEFT_OUT = "The line is left out."


@dataclass(frozen=True, slots=True)
class Recorded:
    """One recorded request: its line in the file, the input and the answer that the remote gave."""

    line: int
    value: dict[str, Any]
    answer: dict[str, Any]


def read_traffic(
    path: Path, settings: Settings, task_name: str, *, input_key: str, answer_key: str
) -> Iterator[Recorded | Problem]:
    """The usable lines of a JSONL file in order, and a `Problem` with its line number for each that is not.

    ``input_key`` and ``answer_key`` are dotted paths into each line, such as ``answers.gpt-4o`` or
    ``choices.0.message.content``: the longest key that exists wins, so that a model's name may hold dots itself; in a
    list a step is an index, -1 the last. An answer may be JSON text; so may an input, and if the task takes one text
    and nothing else, any text is one.
    """
    task = settings.task(task_name)
    with path.open("rb") as raw:
        if raw.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            yield Problem(str(path), "is UTF-16.", "Save it as UTF-8.", 1)
            return
    # a byte that is no UTF-8 becomes half a surrogate pair, which no UTF-8 text has, and spoils its own line alone
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                document = read_json(text.encode(errors="surrogateescape"), name="the line")
                value = _input(task.input_schema, _pick(document, input_key))
                yield Recorded(number, value, _answer(task.output_schema, _pick(document, answer_key)))
            except KeyError as error:
                yield Problem(str(path), f"has no {error.args[0]!r}.", _LEFT_OUT, number)
            except SchemaError as error:
                yield Problem(str(path), f"does not fit the task: {error}", _LEFT_OUT, number)
            except NotJson as error:
                yield Problem(str(path), f"does not parse ({error}).", _LEFT_OUT, number)
            except InvalidValue as error:
                yield Problem(str(path), f"cannot be used: {error}", _LEFT_OUT, number)


def _input(schema: Schema, value: Any) -> dict[str, Any]:
    if not isinstance(value, str):
        return schema.check(value)
    try:
        return schema.parse(value)
    except SchemaError:
        if not schema.is_one_text:
            raise
    return schema.check({schema.fields[0]: value})


def _answer(schema: Schema, value: Any) -> dict[str, Any]:
    return schema.parse(bare_json(value)) if isinstance(value, str) else schema.check(value)


def _pick(document: Any, dotted: str) -> Any:
    """What a dotted path leads to. Raises `KeyError` with the step that leads nowhere."""
    if not dotted:
        return document
    step, _, rest = dotted.partition(".")
    if isinstance(document, list) and step.lstrip("-").isdecimal() and -len(document) <= int(step) < len(document):
        return _pick(document[int(step)], rest)
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        key = ".".join(parts[:n])
        if isinstance(document, Mapping) and key in document:
            return _pick(document[key], ".".join(parts[n:]))
    raise KeyError(dotted)
