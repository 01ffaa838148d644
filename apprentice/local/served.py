"""Following the skeleton with a server that completes tokens.

An engine behind a server asks it twice over: for the scores of a few next tokens (a choice), and for text within a
grammar. The request is sent as token ids, tokenised piece by piece as in training, so what the server computes is
what was learnt: no template, no token merged across a border. The server's prefix cache makes the second question of
one request cheap.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

from apprentice.errors import (
    ApprenticeError,
    EngineRefused,
    EngineUnavailable,
    OutputError,
    Problem,
    VersionError,
)
from apprentice.local.decoding import Decoding
from apprentice.local.engine import LocalAnswer, Version
from apprentice.local.frame import Frame
from apprentice.local.skeleton import Free, Skeleton

__all__ = ["Completer", "Courtesy", "Framed", "Pieces", "Written", "answer_by", "ask_all", "post", "refusal"]


@dataclass(frozen=True, slots=True)
class Written:
    """Text that a server wrote: its tokens, their bytes and their joint probability."""

    tokens: Sequence[int]
    content: bytes
    probability: float


class Pieces:
    """Remembers the tokens of texts that come again and again: the skeleton's pieces, never what a user wrote."""

    def __init__(self, encode: Callable[[str, float], Sequence[int]], most: int = 4096) -> None:
        self._encode = encode
        self._most = most
        self._known: dict[str, Sequence[int]] = {}

    def __call__(self, text: str, ends_at: float) -> Sequence[int]:
        """The text's tokens. Raises what the encoder raises."""
        known = self._known.get(text)
        if known is None:
            known = self._encode(text, ends_at)
            if len(self._known) < self._most:
                self._known[text] = known
        return known


class Completer(Protocol):
    """What a server can do with a row of tokens, in time. Raises `EngineUnavailable`, `OutputError`."""

    pieces: Pieces
    """The tokens of the skeleton's pieces, without special tokens."""

    def encode(self, text: str, ends_at: float) -> Sequence[int]:
        """Tokenise a request's text, without special tokens. It is the user's: it is not kept."""

    def scores(self, tokens: Sequence[int], only: Sequence[int], ends_at: float) -> list[float]:
        """The logits, up to a constant, of some next tokens."""

    def write(self, tokens: Sequence[int], free: Free, most: int, ends_at: float) -> Written:
        """Greedy text within the grammar."""


@dataclass(frozen=True, slots=True)
class Framed:
    """A version with its skeleton and the frame's tokens."""

    version: Version
    skeleton: Skeleton
    prefix: Sequence[int]
    suffix: Sequence[int]

    @classmethod
    def of(cls, version: Version, frame: Frame, encode_frame: Callable[[str], Sequence[int]]) -> Framed:
        """``encode_frame`` tokenises text in which special tokens are tokens."""
        return cls(version, Skeleton.of(version.output_schema), encode_frame(frame.prefix), encode_frame(frame.suffix))


def answer_by(server: Completer, framed: Framed, value: Mapping[str, Any], most: int, ends_at: float) -> LocalAnswer:
    """Answer one input. ``ends_at`` is on the monotonic clock. Raises `EngineUnavailable`, `OutputError`."""
    tokens = [*framed.prefix, *server.encode(framed.version.prompt(value), ends_at), *framed.suffix]
    prompt_tokens = len(tokens)
    decoding = Decoding(framed.version.task, framed.skeleton, lambda text: server.pieces(text, ends_at), (), most)
    tokens += decoding.pending
    while not decoding.done:
        if decoding.only is not None:
            decoding.choose(server.scores(tokens, decoding.only, ends_at))
        else:
            assert decoding.free is not None
            text = server.write(tokens, decoding.free, decoding.left, ends_at)
            decoding.write(text.tokens, text.content, text.probability, None)
        tokens += decoding.pending
    return LocalAnswer(
        output=decoding.output,
        confidence=decoding.confidence,
        field_confidence=decoding.field_confidence,
        version=framed.version.name,
        prompt_tokens=prompt_tokens,
        answer_tokens=decoding.answer_tokens,
        distributions=decoding.distributions,
    )


def ask_all(
    ask: Callable[[Mapping[str, Any]], LocalAnswer], values: Sequence[Mapping[str, Any]], at_once: int
) -> list[LocalAnswer | Exception]:
    """Ask many, so many at once; an input that fails has its exception in its place."""

    def one(value: Mapping[str, Any]) -> LocalAnswer | Exception:
        try:
            return ask(value)
        except ApprenticeError as error:
            return error

    with ThreadPoolExecutor(at_once, thread_name_prefix="apprentice-local") as threads:
        return list(threads.map(one, values))


class Courtesy:
    """Lets bulk work (validation, probes) on a server step back while callers wait for the same server.

    It sends ``at_once`` requests at once, and a sixteenth of that while there are others: sixteen callers then share
    the server with at most a few more, and what they wait for grows by no more than that.
    """

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._few = max(1, at_once // 16)
        self._changed = threading.Condition()
        self._waited_for = self._bulk = 0

    @contextmanager
    def caller(self) -> Iterator[None]:
        """While somebody waits for an answer."""
        with self._changed:
            self._waited_for += 1
        try:
            yield
        finally:
            with self._changed:
                self._waited_for -= 1
                self._changed.notify_all()

    def ask_all(
        self, ask: Callable[[Mapping[str, Any]], LocalAnswer], values: Sequence[Mapping[str, Any]]
    ) -> list[LocalAnswer | Exception]:
        """`ask_all`, with as many at once as courtesy allows."""

        def one(value: Mapping[str, Any]) -> LocalAnswer:
            with self._changed:
                self._changed.wait_for(lambda: self._bulk < (self._few if self._waited_for else self._at_once))
                self._bulk += 1
            try:
                return ask(value)
            finally:
                with self._changed:
                    self._bulk -= 1
                    self._changed.notify_all()

        return ask_all(one, values, self._at_once)


def post(client: httpx.Client, who: str, path: str, body: Mapping[str, Any], ends_at: float, *, task: str = "") -> Any:
    """POST JSON, read the reply as JSON, in time. ``ends_at`` is on the monotonic clock.

    Raises `EngineUnavailable` (down, slow, busy, failing), `OutputError` (the input is too long for the model),
    `VersionError` (the server has lost the model), `EngineRefused` (any other refusal: a key, an address, a setting).
    """
    left_s = ends_at - time.monotonic()
    if left_s <= 0:
        raise _too_slow(who)
    try:
        response = client.post(path, json=body, timeout=left_s)
    except httpx.TimeoutException:
        raise _too_slow(who) from None
    except httpx.HTTPError as error:
        raise EngineUnavailable(f"{who} does not answer ({error}); is it running?") from None
    if response.status_code != 200:
        raise refusal(who, response, task)
    try:
        return response.json()
    except (ValueError, RecursionError):
        raise EngineUnavailable(f"{who} answered {path} with something that is not JSON; is local.url right?") from None


def refusal(who: str, response: httpx.Response, task: str = "") -> ApprenticeError:
    """What a server's answer other than 200 means."""
    status, said = response.status_code, " ".join(response.text.split())[:300]
    if status == 413 or (status in (400, 422, 500) and _TOO_LONG.search(said)):
        problem = Problem("input", f"is too long for the local model ({who}: {said}).", "The remote answers it.")
        return OutputError(task, "the local model", [problem])
    if status == 404 and _NO_MODEL.search(said):
        return VersionError(f"{who} does not have the model any more ({said}); it has to be loaded again")
    if status in (401, 403):
        return EngineRefused(f"{who} refuses the request with {status} ({said}); it wants a key, or local.url is wrong")
    if status == 404:
        return EngineRefused(f"{who} has no {response.url.path} ({status} {said}); is local.url right?")
    if status < 500 and status not in (408, 429):
        return EngineRefused(f"{who} refuses the request with {status}: {said}")
    return EngineUnavailable(f"{who} failed with {status}: {said}")


_TOO_LONG = re.compile(
    r"context (length|size|window)|too long|exceed_context|max_model_len|maximum .{0,20}length", re.I
)
_NO_MODEL = re.compile(r"model .*(not found|does not exist)|no such model", re.I)


def _too_slow(who: str) -> EngineUnavailable:
    return EngineUnavailable(f"{who} did not answer in time; raise local.deadline_s or use a faster engine")
