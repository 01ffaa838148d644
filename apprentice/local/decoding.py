"""Answering one request: which tokens to feed next, and what the scores after them decide.

A `Decoding` walks the skeleton. Forced text rides along with the next pass; a choice is decided by the scores of the
tokens that tell its options apart, one token for most enums; free text goes token by token, greedy, each token the
likeliest that the grammar takes. It holds no model: it is fed scores, from whatever computes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from apprentice.errors import OutputError, Problem
from apprentice.local.grammar import Position
from apprentice.local.skeleton import Choice, Free, Literal, Skeleton, Step
from apprentice.schema import SchemaError

__all__ = ["Decoding", "Vocabulary"]

_TRIES = 64
"""Tokens tried in order of likelihood before the whole vocabulary is."""


class Vocabulary:
    """A tokenizer as decoding needs it: text to token ids, and each token's bytes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        special = set(tokenizer.all_special_ids) | {
            i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.bytes: list[bytes] = [b""] * len(tokenizer)
        byte_level = _byte_level() if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder) else None
        for token, index in tokenizer.get_vocab().items():
            if index not in special:
                self.bytes[index] = _token_bytes(token, byte_level)
        self.encode = cache(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)


def _byte_level() -> dict[str, int]:
    """GPT-2's spelling of bytes as visible characters: printable Latin-1 as itself, the rest from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelled = {chr(byte): byte for byte in visible}
    others = (byte for byte in range(256) if byte not in set(visible))
    return spelled | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _token_bytes(token: str, byte_level: dict[str, int] | None) -> bytes:
    if byte_level is not None:
        # An added token is spelled as it is, and may hold characters that the spelling does not know.
        known = [byte_level.get(character) for character in token]
        return token.encode() if None in known else bytes(b for b in known if b is not None)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes((int(token[3:5], 16),))
    return token.replace("\u2581", " ").encode()


class Decoding:
    """One answer in the making.

    ``pending`` are the tokens to feed; ``only`` the token ids whose scores are wanted after them (None: all); then
    `decide` takes the scores. Until ``done``; then ``output`` and the confidences stand.
    """

    def __init__(
        self, task: str, skeleton: Skeleton, vocabulary: Vocabulary, prompt: Sequence[int], max_new_tokens: int
    ) -> None:
        self._task = task
        self._skeleton = skeleton
        self._vocabulary = vocabulary
        self._left = max_new_tokens
        self._walk = skeleton.walk()
        self._text: list[str] = []
        self._probability: dict[str, float] = {}
        self._options: dict[tuple[int, ...], tuple[str, tuple[str, ...]]] = {}
        self._chosen: tuple[int, ...] = ()
        self._position: Position | None = None
        self._free = bytearray()
        self._step: Step | None = None
        self.pending: list[int] = list(prompt)
        self.only: tuple[int, ...] | None = None
        self.done = False
        self.answer_tokens = 0
        self._enter(next(self._walk))

    def decide(self, scores: torch.Tensor) -> None:
        """Take the scores after ``pending``: 1-D, of ``only`` or of the vocabulary. Raises `OutputError`."""
        self.pending = []
        self._left -= 1
        if self._left < 0:
            raise self._no_answer("did not end within local.max_new_tokens")
        if isinstance(self._step, Choice):
            self._choose(scores)
        else:
            self._write(scores)

    @property
    def output(self) -> dict[str, Any]:
        """The finished answer, checked. Raises `OutputError` where it breaks a rule that no grammar states."""
        try:
            return self._skeleton.schema.parse("".join(self._text))
        except SchemaError as error:
            raise OutputError(self._task, "the local model", error.problems) from None

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
        while True:
            self._step = step
            match step:
                case Literal(forced):
                    self._text.append(forced)
                    self.pending += self._vocabulary.encode(forced)
                    try:
                        step = self._walk.send("")
                    except StopIteration:
                        self.done = True
                        return
                case Choice(options):
                    encode = self._vocabulary.encode
                    self._options = {encode(option.text): (option.text, option.paths) for option in options}
                    self._chosen = ()
                    self._ride()
                    return
                case Free(grammar):
                    self._position = grammar.start()
                    self._free = bytearray()
                    self.only = None
                    return

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

    def _choose(self, scores: torch.Tensor) -> None:
        assert self.only is not None
        best = int(scores.argmax())
        probability = float(torch.softmax(scores, 0)[best])
        token = self.only[best]
        at = len(self._chosen)
        before = self._options
        self._options = {ids: option for ids, option in before.items() if ids[at] == token}
        self._chosen += (token,)
        self.pending.append(token)
        self.answer_tokens += 1
        for path in {path for _, paths in before.values() for path in paths}:
            self._probability[path] = self._probability.get(path, 1.0) * probability
        if len(self._options) > 1:
            self._ride()
            return
        ((ids, (text, _)),) = self._options.items()
        self.pending += ids[len(self._chosen) :]
        self.answer_tokens += len(ids) - len(self._chosen)
        self._decided(text)

    def _write(self, scores: torch.Tensor) -> None:
        assert isinstance(self._step, Free)
        assert self._position is not None
        token, after = self._likeliest(scores, self._position)
        probability = math.exp(float(scores[token] - torch.logsumexp(scores, 0)))
        path = self._step.path
        self._probability[path] = self._probability.get(path, 1.0) * probability
        self._position = after
        self._free += self._vocabulary.bytes[token]
        self.pending.append(token)
        self.answer_tokens += 1
        if after.complete:
            self._decided(self._free.decode())

    def _likeliest(self, scores: torch.Tensor, position: Position) -> tuple[int, Position]:
        """The likeliest token that the grammar takes, and where it leads."""
        table = self._vocabulary.bytes
        for count in (1, _TRIES, len(scores)):
            for token in torch.topk(scores, min(count, len(scores))).indices.tolist():
                if token < len(table) and table[token]:
                    after = position.advance(table[token])
                    if after is not None:
                        return token, after
        raise self._no_answer("cannot be continued with any token of the model")

    def _no_answer(self, why: str) -> OutputError:
        path = self._step.path if isinstance(self._step, Free) else "answer"
        return OutputError(self._task, "the local model", [Problem(path or "answer", why + ".")])
