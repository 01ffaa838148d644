"""Reading an answer: from a response to a completion, and from a completion to an object of the task's schema.

A vendor's answer is foreign input. Whatever it holds, reading it ends in one of two ways: there is an answer, or it is
said why there is none. No exception of a parser comes through.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from apprentice.errors import Problem
from apprentice.remote.failures import Failure, error_inside, of_error, of_response, reports_usage
from apprentice.remote.provider import Completion, Provider, VendorError
from apprentice.remote.transport import Response
from apprentice.schemas.json_schema import canonical
from apprentice.schemas.schema import Schema, SchemaError
from apprentice.secrets import scrub

__all__ = ["bare_json", "fit", "read"]

# Models that think aloud begin so; where the chat template has already opened the block, only its end is in the text.
_THOUGHT = re.compile(r"\s*(?:<think>)?.*?</think>", re.DOTALL)
_FENCED = re.compile(r"```(?:json)?[ \t]*\r?\n(.*?)\r?\n?```", re.DOTALL | re.IGNORECASE)
_MOST_SHOWN = 200


def read(provider: Provider, response: Response, now: float) -> Completion | Failure:
    """What a response brings: a completion, or the failure that it is. ``now`` in Unix seconds."""
    if not 200 <= response.status < 300:
        return of_response(response, now)
    try:
        body = json.loads(response.content)
    except (ValueError, RecursionError):
        shown = scrub(response.content[: 8 * _MOST_SHOWN].decode("utf-8", "replace"))[:_MOST_SHOWN].strip()
        what = f"what is no JSON: {shown!r}" if shown else "nothing"
        return Failure(f"answered {response.status} with {what}; is base_url right?", billed=True)
    try:
        if (error := error_inside(body)) is not None:
            return of_error(error, response, now, billed=reports_usage(body))
        try:
            completion = provider.parse(body)
        except VendorError as said:
            return of_error(said.error, response, now, billed=reports_usage(body))
        if completion.usage is not None and completion.text and not completion.usage.output:
            return replace(completion, usage=None)  # who answers has written something
        return completion
    except Exception as error:  # noqa: BLE001  # whatever reading foreign bytes raises, there is no answer in them
        text = scrub(f"{type(error).__name__}: {error}")[:_MOST_SHOWN]
        return Failure(f"gave an answer that its API does not describe ({text})", billed=True)


def fit(completion: Completion, schema: Schema, max_output_tokens: int, task: str) -> dict[str, Any]:
    """The completion as an object of the schema. Raises `SchemaError`, whatever is wrong with it."""
    text = bare_json(completion.text)
    if not text:
        problems = [Problem("answer", f"is empty{_because(completion)}.")]
    else:
        try:
            return _parse(schema, text)
        except SchemaError as error:
            problems = error.problems
        except Exception as error:  # noqa: BLE001  # checkers recurse and convert; a foreign value may defeat any
            problems = [Problem("answer", f"cannot be checked ({type(error).__name__}: {error}"[:_MOST_SHOWN] + ").")]
    if completion.stop == "length":
        cut = Problem(
            "answer",
            f"was cut off at {max_output_tokens} tokens{_because(completion)}.",
            f"Raise max_output_tokens of task {task!r}.",
        )
        problems = [cut, *problems]
    raise SchemaError(problems)


def bare_json(text: str) -> str:
    """An answer without the thoughts before it and the one code fence around it; nothing else is guessed."""
    text = text.strip()
    if not text.startswith("{"):
        if thought := _THOUGHT.match(text):
            text = text[thought.end() :].strip()
        if fenced := _FENCED.fullmatch(text):
            text = fenced[1].strip()
    return text


def _parse(schema: Schema, text: str) -> dict[str, Any]:
    try:
        return schema.parse(text)
    except SchemaError:
        # OpenAI must write every field, and null for one that is left out; a pydantic model may take no null there
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        kept = canonical(schema.json_schema)(value)
        if kept == value:
            raise
        return schema.check(kept)


def _because(completion: Completion) -> str:
    return f" (it stopped with {completion.reason})" if completion.reason else ""
