"""Answering one request: which tokens to feed next, and what the scores after them decide.

A `Decoding` walks the skeleton. Forced text rides along with the next pass; a choice is decided by the scores of the
tokens that tell its options apart, one token for most enums; free text is whatever likeliest tokens the grammar takes.
It holds no model: the embedded engine feeds it from its own passes, the engines that talk to a server from replies.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from apprentice.errors import OutputError, Problem
from apprentice.local.grammar import Position
from apprentice.local.skeleton import Choice, Free, Literal, Option, Skeleton, Step
from apprentice.schemas.schema import SchemaError

__all__ = ["Decoding", "Encode"]

type Encode = Callable[[str], Sequence[int]]
"""Text to token ids, without special tokens."""


class Decoding:
    """One answer in the making.

    ``pending`` are the tokens to feed next. After them either ``only`` holds the token ids to choose from, and
    `choose` takes their scores; or ``free`` says what text is wanted, and `write` takes it token by token or whole.
    Until ``done``; then ``output`` and the confidences stand.
    """

    def __init__(self, task: str, skeleton: Skeleton, encode: Encode, prompt: Sequence[int], most: int) -> None:
        self._task = task
        self._skeleton = skeleton
        self._encode = encode
        self.left = most
        self._walk = skeleton.walk()
        self._text: list[str] = []
        self._probability: dict[str, float] = {}
        self._options: dict[tuple[int, ...], Option] = {}
        self._reached = 1.0
        self._distributions: dict[str, dict[str, float]] = {}
        self._chosen: tuple[int, ...] = ()
        self._written = bytearray()
        self.pending: list[int] = list(prompt)
        self.only: tuple[int, ...] | None = None
        self.free: Free | None = None
        self.position: Position | None = None
        self.done = False
        self.answer_tokens = 0
        self._enter(next(self._walk))

    def choose(self, scores: Sequence[float]) -> None:
        """Decide by the scores (logits) of the tokens in ``only``, in that order. Raises `OutputError`."""
        assert self.only is not None
        highest = max(scores)
        best = scores.index(highest)
        weights = [math.exp(score - highest) for score in scores]
        probability = 1.0 / sum(weights)
        token = self.only[best]
        at = len(self._chosen)
        before = self._options
        self._set_apart(at, {one: weight * probability for one, weight in zip(self.only, weights, strict=True)}, token)
        self.pending = [token]
        self._spend(1)
        self._options = {ids: option for ids, option in before.items() if ids[at] == token}
        self._chosen += (token,)
        for path in {path for option in before.values() for path in option.paths}:
            self._probability[path] = self._probability.get(path, 1.0) * probability
        if len(self._options) > 1:
            self._ride()
            return
        ((ids, option),) = self._options.items()
        self._give(option, self._reached)
        rest = ids[len(self._chosen) :]
        self.pending += rest
        self.answer_tokens += len(rest)
        self.only = None
        self._decided(option.text)

    def write(self, tokens: Sequence[int], content: bytes, probability: float, after: Position | None) -> None:
        """Append tokens to the free text: their bytes, their joint probability, where the grammar stands after them.

        ``after`` is None where whoever wrote them followed the grammar itself, to its end. Raises `OutputError`.
        """
        assert self.free is not None
        self.pending = list(tokens)
        self._spend(len(tokens))
        path = self.free.path
        self._probability[path] = self._probability.get(path, 1.0) * probability
        self._written += content
        if after is not None and not after.complete:
            self.position = after
            return
        if after is None and self.free.grammar.split(bytes(self._written)) != len(self._written):
            raise self.no_answer(f"is {bytes(self._written[:60])!r}, which is not finished or not in the schema")
        self.free = self.position = None
        self._decided(self._written.decode())

    def no_answer(self, why: str) -> OutputError:
        """The error of an answer that cannot be finished."""
        path = self.free.path if self.free is not None else ""
        return OutputError(self._task, "the local model", [Problem(path or "answer", why + ".")])

    def _set_apart(self, at: int, probabilities: Mapping[int, float], chosen: int) -> None:
        """Give the options that part from the answer at token ``at`` their probability.

        Those that part from it together share theirs evenly: to tell them apart would take a pass for each.
        """
        sizes = Counter(ids[at] for ids in self._options)
        for ids, option in self._options.items():
            if ids[at] != chosen:
                self._give(option, self._reached * probabilities[ids[at]] / sizes[ids[at]])
        self._reached *= probabilities[chosen]

    def _give(self, option: Option, probability: float) -> None:
        if option.value and "." not in option.paths[0]:
            # A number is an option with each character that may follow it.
            values = self._distributions.setdefault(option.paths[0], {})
            values[option.value] = values.get(option.value, 0.0) + probability

    def _spend(self, tokens: int) -> None:
        self.answer_tokens += tokens
        self.left -= tokens
        if self.left < 0:
            raise self.no_answer("did not end within local.max_new_tokens")

    @property
    def output(self) -> dict[str, Any]:
        """The finished answer, checked. Raises `OutputError` where it breaks a rule that no grammar states."""
        try:
            return self._skeleton.schema.parse("".join(self._text))
        except SchemaError as error:
            raise OutputError(self._task, "the local model", error.problems) from None

    @property
    def distributions(self) -> Mapping[str, Mapping[str, float]]:
        """By top-level field that is chosen from a list: the probability of each value, by its JSON text."""
        return self._distributions

    @property
    def field_confidence(self) -> Mapping[str, float]:
        """By top-level field: the probability of its decided tokens. An absent optional field was decided, too."""
        fields: dict[str, float] = {}
        for path, probability in self._probability.items():
            name = path.split(".")[0]
            fields[name] = fields.get(name, 1.0) * probability
        return fields

    @property
    def confidence(self) -> float:
        """The weakest field's."""
        return min(self.field_confidence.values(), default=1.0)

    def _enter(self, step: Step) -> None:
        """Go on to where something has to be decided; forced text goes into ``pending``."""
        while isinstance(step, Literal):
            self._text.append(step.text)
            self.pending += self._encode(step.text)
            try:
                step = self._walk.send("")
            except StopIteration:
                self.done = True
                return
        if isinstance(step, Choice):
            self._options = {tuple(self._encode(option.text)): option for option in step.options}
            self._reached = 1.0
            self._chosen = ()
            self._ride()
            return
        self.free = step
        self.position = step.grammar.start()
        self._written = bytearray()

    def _decided(self, text: str) -> None:
        self._text.append(text)
        try:
            step = self._walk.send(text)
        except StopIteration:
            self.done = True
            return
        self._enter(step)

    def _ride(self) -> None:
        """Take the tokens on which all remaining options agree, and ask for the scores of those that differ."""
        while True:
            at = len(self._chosen)
            nexts = sorted({ids[at] for ids in self._options})
            if len(nexts) > 1:
                self.only = tuple(nexts)
                return
            self._chosen += (nexts[0],)
            self.pending.append(nexts[0])
            self.answer_tokens += 1
