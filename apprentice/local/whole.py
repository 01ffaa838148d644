"""The confidence of an answer that a server wrote as a whole, from the probabilities of its tokens.

Some servers enforce a schema themselves and give back text and log-probabilities. The answer's pieces say which
stretches of the text were decisions; a field's confidence is the joint probability of the tokens that touch its
stretches. Text that was forced costs nothing: under the schema it had no alternative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from apprentice.local.skeleton import Skeleton
from apprentice.schemas.schema import Schema

__all__ = ["UNKNOWN", "field_confidence"]

UNKNOWN = 0.5
"""The confidence of every answer of a server that gives no probabilities: it tells nothing apart."""

type Tokens = Sequence[tuple[str, float]]
"""Each token's text and its natural log-probability; the texts join to the server's answer."""


def field_confidence(skeleton: Skeleton, output: Mapping[str, Any], tokens: Tokens | None) -> dict[str, float]:
    """By top-level field. ``output`` is the parsed answer; ``tokens`` None where the server gives no probabilities."""
    if tokens is None:
        return dict.fromkeys(output, UNKNOWN)
    text = "".join(token for token, _ in tokens)
    places = _places(Schema.dumps(output), text)
    if places is None:
        # Written otherwise than we would (escapes): every token counts for every field.
        whole = math.exp(sum(logprob for _, logprob in tokens))
        return dict.fromkeys(output, whole)
    starts = [0]
    for token, _ in tokens:
        starts.append(starts[-1] + len(token))
    logs: dict[str, float] = {}
    at = 0
    for piece in skeleton.pieces(output):
        # A number's piece has the character behind it, which these servers decide together with what follows.
        size = len(piece.text)
        if piece.decided:
            first, last = places[at], places[at + size - 1]
            name = piece.path.split(".")[0]
            touching = (
                logprob
                for (_, logprob), start, end in zip(tokens, starts[:-1], starts[1:], strict=True)
                if start <= last and end > first
            )
            logs[name] = logs.get(name, 0.0) + sum(touching)
        at += size
    return {name: math.exp(total) for name, total in logs.items()}


def _places(compact: str, text: str) -> list[int] | None:
    """Where each character of the compact text stands in the server's, which may have spaces between; else None."""
    places: list[int] = []
    at = 0
    for character in compact:
        while at < len(text) and text[at] != character and text[at].isspace():
            at += 1
        if at == len(text) or text[at] != character:
            return None
        places.append(at)
        at += 1
    return places
