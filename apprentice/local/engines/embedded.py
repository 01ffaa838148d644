"""The default engine: the model in this process, on transformers.

One thread owns the model. It takes whatever requests wait, runs one packed pass over the new tokens of them all,
lets each decide what it can, and goes on with the rest and with what has arrived meanwhile. So sixteen callers cost
little more than the tokens they bring, a short answer never waits for a long one, and nothing but that thread
touches the model: a version is loaded, attached and let go between two passes, with requests in flight.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apprentice import secrets
from apprentice.errors import ApprenticeError, EngineUnavailable, OutputError, Problem, VersionError
from apprentice.local.adapter import check_adapter, read_adapter
from apprentice.local.base_model import load_model_and_tokenizer, resolve_base_model
from apprentice.local.decoding import Decoding
from apprentice.local.engine import EnginePlugin, EngineSetup, Health, LoadedVersion, LocalAnswer, Version
from apprentice.local.frame import Frame
from apprentice.local.skeleton import Skeleton
from apprentice.schemas.schema import compact_json

if TYPE_CHECKING:
    import torch

    from apprentice.local.packed import LoraWeights, PackedModel
    from apprentice.local.vocabulary import Vocabulary

__all__ = ["EmbeddedEngine"]

_log = secrets.logger(__name__)
_PASS_TOKENS = 384
"""New tokens in one pass, at most (a longer prompt goes alone): more make a pass longer, not more efficient."""
_PATIENT_TOKENS = 96
"""Of these, what those who are in no hurry (validation, probes) get while others wait: they slow these by a quarter."""
_SLOTS = 32
"""Requests under way at once."""
_UNTRAINED_TOKENS = 48
"""The base model without an adapter is only asked to prove that an adapter changes its answers; it rambles."""


@dataclass(eq=False)
class _Held:
    """A version the engine knows. ``weights`` is None while it is put away to save memory."""

    version: Version
    skeleton: Skeleton
    frame: Frame
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    weights: LoraWeights | None = None
    in_flight: int = 0
    used_at: float = 0.0
    leaving: bool = False


@dataclass(eq=False)
class _Request:
    held: _Held
    value: Mapping[str, Any]
    gives_up_at: float
    future: Future[LocalAnswer] = field(default_factory=Future)
    decoding: Decoding | None = None
    prompt_tokens: int = 0
    slot: int | None = None
    past: int = 0


class EmbeddedEngine(EnginePlugin):
    """transformers in this process; see the module. Nothing heavy is imported or loaded before the first `load`."""

    packages = ("torch", "transformers", "peft", "safetensors", "gguf")
    extra = "embedded"

    @classmethod
    def configured(cls, setup: EngineSetup, options: Any) -> EmbeddedEngine:
        settings = setup.settings
        return cls(
            settings.base_model,
            setup.root,
            max_new_tokens=settings.max_new_tokens,
            max_memory_mb=settings.max_memory_mb,
        )

    def __init__(
        self,
        base_model: str,
        root: Path,
        *,
        max_new_tokens: int = 512,
        max_memory_mb: int | None = None,
        device: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._base_model = base_model
        self._root = root
        self._max_new_tokens = max_new_tokens
        self._max_bytes = None if max_memory_mb is None else max_memory_mb * 1_000_000
        self._device = device
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._urgent: deque[_Request] = deque()
        self._patient: deque[_Request] = deque()
        self._between: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._loading = threading.Lock()
        self._closed = False
        self._broken: Exception | None = None
        self._model: PackedModel | None = None
        self._vocabulary: Vocabulary | None = None
        self._longest = 0
        self._thread: threading.Thread | None = None

    # --- the protocol -------------------------------------------------------------------------------------------

    def load(self, version: Version) -> None:
        """Make a version ready to answer; the base model with the first one."""
        with self._loading:
            if self._closed:
                raise EngineUnavailable("the embedded engine is closed")
            with self._wake:
                held = self._held.get(version.name)
                if held is not None and held.weights is not None and not held.leaving:
                    return
            self._start()
            held = _Held(version, Skeleton.of(version.output_schema), self._frame(version))
            self._bring_in(held)
            with self._wake:
                self._held[version.name] = held

    def answer(self, version: str, value: Mapping[str, Any], *, deadline_s: float) -> LocalAnswer:
        """Answer one input, before those of `answer_many`."""
        request = self._ask(version, value, self._clock() + deadline_s, self._urgent)
        try:
            return request.future.result(timeout=deadline_s)
        except TimeoutError:
            request.gives_up_at = 0.0
            raise EngineUnavailable(
                f"the local model did not answer within {deadline_s:g} s; raise local.deadline_s or use a faster engine"
            ) from None

    def answer_many(self, version: str, values: Sequence[Mapping[str, Any]]) -> list[LocalAnswer | Exception]:
        """Answer many inputs, of similar lengths together; single requests go first."""
        order = sorted(range(len(values)), key=lambda i: len(compact_json(values[i])))
        requests = {i: self._ask(version, values[i], float("inf"), self._patient) for i in order}
        answers: list[LocalAnswer | Exception] = []
        for i in range(len(values)):
            error = requests[i].future.exception()
            answers.append(requests[i].future.result() if error is None else _as_exception(error))
        return answers

    def unload(self, version: str) -> None:
        """Let go of a version when its answers are out. New requests for it are refused at once."""
        with self._wake:
            held = self._held.get(version)
            if held is None:
                return
            held.leaving = True
            self._wake.wait_for(lambda: held.in_flight == 0 or self._closed)
            if self._held.get(version) is held:
                del self._held[version]
            held.weights = None

    def loaded(self) -> list[LoadedVersion]:
        """The versions whose matrices are in memory."""
        with self._wake:
            return [
                LoadedVersion(h.version.name, h.version.task, h.weights.bytes)
                for h in self._held.values()
                if h.weights is not None
            ]

    def health(self) -> Health:
        """Whether the thread that owns the model is there."""
        if self._closed:
            return Health(False, "closed")
        if self._broken is not None:
            return Health(False, str(self._broken))
        return Health(True, "no version loaded yet" if self._model is None else "")

    def close(self) -> None:
        """Stop; requests in flight fail with `EngineUnavailable`."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._held.clear()
        self._model = None

    # --- loading ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._model is not None:
            return
        base = resolve_base_model(self._base_model, self._root)
        model, tokenizer = load_model_and_tokenizer(base, device=self._device)
        from apprentice.local.packed import PackedModel
        from apprentice.local.vocabulary import Vocabulary

        self._base = base
        self._model = PackedModel(model, slots=_SLOTS)
        self._longest = int(self._model.config.max_position_embeddings)
        self._vocabulary = Vocabulary(tokenizer)
        self._thread = threading.Thread(target=self._serve, name="apprentice-embedded", daemon=True)
        self._thread.start()

    def _frame(self, version: Version) -> Frame:
        assert self._vocabulary is not None
        if version.adapter is None:
            return Frame.of_tokenizer(self._vocabulary.tokenizer)
        check_adapter(version.adapter, self._base, version.name)
        return Frame.load(version.adapter)

    def _bring_in(self, held: _Held) -> None:
        """Read a version's matrices and let the model know them. Makes room first where memory is bounded."""
        from apprentice.local.packed import LoraWeights

        assert self._model is not None
        assert self._vocabulary is not None
        model, encode = self._model, self._vocabulary.tokenizer
        adapter = held.version.adapter
        weights = LoraWeights({}) if adapter is None else model.lora(read_adapter(adapter), str(adapter))
        held.prefix, held.suffix = (
            tuple(encode(part, add_special_tokens=False).input_ids) if part else ()
            for part in (held.frame.prefix, held.frame.suffix)
        )
        self._make_room(weights.bytes)
        self._do_between(lambda: model.attach(weights, held.prefix))
        held.weights = weights
        held.used_at = self._clock()

    def _make_room(self, size: int) -> None:
        if self._max_bytes is None:
            return
        with self._wake:
            there = [h for h in self._held.values() if h.weights is not None]
            total = size + sum(h.weights.bytes for h in there if h.weights is not None)
            for held in sorted((h for h in there if h.in_flight == 0), key=lambda h: h.used_at):
                if total <= self._max_bytes:
                    return
                assert held.weights is not None
                total -= held.weights.bytes
                held.weights = None
                _log.info("put version %s away: local.max_memory_mb is reached", held.version.name)

    def _do_between(self, act: Callable[[], None]) -> None:
        """Have the model's thread do something between two passes, and wait for it."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                act()
            except Exception as error:  # noqa: BLE001  # it is raised where it was asked for
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._wake:
            self._between.append(run)
            self._wake.notify_all()
        try:
            done.result()
        except (RuntimeError, MemoryError) as error:
            # torch has its own class for a GPU's memory and a plain RuntimeError for the machine's.
            if isinstance(error, MemoryError) or "memory" in str(error).lower():
                raise VersionError(
                    f"the version does not fit in memory ({error}); lower lora_rank or free memory"
                ) from error
            raise VersionError(f"the model cannot take the version ({error}); train it again on this base") from error

    # --- asking -------------------------------------------------------------------------------------------------

    def _ask(self, version: str, value: Mapping[str, Any], gives_up_at: float, queue: deque[_Request]) -> _Request:
        while True:
            with self._wake:
                self._check_open()
                held = self._held.get(version)
                if held is None or held.leaving:
                    raise VersionError(f"version {version} is not loaded; load it first")
                if held.weights is not None:
                    held.in_flight += 1
                    held.used_at = self._clock()
                    request = _Request(held, value, gives_up_at)
                    queue.append(request)
                    self._wake.notify_all()
                    return request
            # It was put away: its files are still there.
            with self._loading:
                if held.weights is None:
                    self._bring_in(held)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineUnavailable("the embedded engine is closed")
        if self._broken is not None:
            raise EngineUnavailable(f"the embedded engine has stopped ({self._broken}); restart the process")

    # --- the thread that owns the model -------------------------------------------------------------------------

    def _serve(self) -> None:
        running: list[_Request] = []
        free = list(range(_SLOTS))
        try:
            while True:
                with self._wake:
                    while not (running or self._closed or self._between or self._urgent or self._patient):
                        self._wake.wait()
                    if self._closed:
                        break
                    acts = list(self._between)
                    self._between.clear()
                for act in acts:
                    act()
                running += self._take_in(running, len(free))
                if running:
                    running = self._survive(running, free)
        except Exception as error:  # noqa: BLE001  # whoever waits must hear of it
            _log.exception("the embedded engine has stopped")
            self._broken = error
        self._let_down(running)

    def _survive(self, running: list[_Request], free: list[int]) -> list[_Request]:
        """A pass, whose failure (memory, mostly) is the end of its requests and not of the engine."""
        try:
            return self._pass(running, free)
        except Exception as error:  # noqa: BLE001  # whoever waits hears of it, and the breaker counts it
            _log.exception("a pass of %d requests failed", len(running))
            for request in running:
                if not request.future.done():
                    self._finish(request, EngineUnavailable(f"the local model failed ({error})"))
            free[:] = range(_SLOTS)
            return []

    def _let_down(self, running: list[_Request]) -> None:
        with self._wake:
            waiting = [*running, *self._urgent, *self._patient]
            self._urgent.clear()
            self._patient.clear()
            acts = list(self._between)
            self._between.clear()
        for act in acts:
            act()
        why = self._broken or "it was closed"
        for request in waiting:
            self._finish(request, EngineUnavailable(f"the embedded engine stopped while it answered ({why})"))

    def _take_in(self, running: Sequence[_Request], free: int) -> list[_Request]:
        """New requests for the next pass, as many as fit: a few patient ones, the urgent ones, then who is left."""
        room = _PASS_TOKENS - sum(len(r.decoding.pending) for r in running if r.decoding)
        alone = not running
        taken: list[_Request] = []
        for queue, share in ((self._patient, _PATIENT_TOKENS), (self._urgent, room), (self._patient, room)):
            here = min(share, room)
            while len(taken) < free - 1:
                request = self._first_of(queue)
                if request is None or request.decoding is None:
                    break
                size = len(request.decoding.pending)
                if size > here and not alone:
                    break
                with self._wake:
                    # A more urgent one may have come; this one is still the first of its own queue.
                    queue.popleft()
                here, room, alone = here - size, room - size, False
                taken.append(request)
        return taken

    def _first_of(self, queue: deque[_Request]) -> _Request | None:
        """The first that somebody still waits for, tokenised. Those before it are done with."""
        while True:
            with self._wake:
                if not queue:
                    return None
                request = queue[0]
                if request.gives_up_at < self._clock():
                    queue.popleft()
                    self._count_out(request)
                    continue
            if request.decoding is None:
                try:
                    request.decoding = self._begin(request)
                except Exception as error:  # noqa: BLE001  # it is this request's own
                    with self._wake:
                        queue.popleft()
                    self._finish(request, error)
                    continue
            return request

    def _begin(self, request: _Request) -> Decoding:
        """Tokenise. Raises `OutputError` where the model cannot take so much."""
        assert self._vocabulary is not None
        held = request.held
        most = self._max_new_tokens if held.version.adapter else min(self._max_new_tokens, _UNTRAINED_TOKENS)
        text = self._vocabulary.tokens(held.version.prompt(request.value))
        request.prompt_tokens = len(held.prefix) + len(text) + len(held.suffix)
        room = self._longest - request.prompt_tokens
        if room <= 0:
            problem = Problem("input", f"is {request.prompt_tokens} tokens; the model takes {self._longest}.")
            raise OutputError(held.version.task, "the local model", [problem])
        prompt = [*text, *held.suffix]
        return Decoding(held.version.task, held.skeleton, self._vocabulary.encode, prompt, min(most, room))

    def _pass(self, running: list[_Request], free: list[int]) -> list[_Request]:
        """One pass over everything under way. Returns the requests that go on."""
        from apprentice.local.packed import Stretch

        assert self._model is not None
        decodings = [r.decoding for r in running if r.decoding is not None]
        stretches = []
        for request, decoding in zip(running, decodings, strict=True):
            assert request.held.weights is not None
            stretches.append(Stretch(decoding.pending, request.held.weights, request.slot, request.past))
        hidden, done = self._model.run(stretches)
        scores = self._model.scores(hidden, [decoding.only for decoding in decodings])
        kept = []
        going: list[_Request] = []
        for index, (request, decoding) in enumerate(zip(running, decodings, strict=True)):
            fed = len(decoding.pending)
            result = self._step(request, decoding, scores[index])
            if result is not None:
                self._finish(request, result)
                if request.slot is not None:
                    free.append(request.slot)
                continue
            if request.slot is None:
                request.slot = free.pop()
                weights = stretches[index].weights
                request.past = weights.prefix_length
                kept.append((index, weights, request.slot))
            request.past += fed
            going.append(request)
        self._model.keep(done, kept)
        return going

    def _step(self, request: _Request, decoding: Decoding, scores: torch.Tensor) -> LocalAnswer | Exception | None:
        if request.gives_up_at < self._clock():
            return EngineUnavailable("nobody waits for this answer any more")
        try:
            self._decide(decoding, scores)
            if not decoding.done:
                return None
            return LocalAnswer(
                output=decoding.output,
                confidence=decoding.confidence,
                field_confidence=decoding.field_confidence,
                version=request.held.version.name,
                prompt_tokens=request.prompt_tokens,
                answer_tokens=decoding.answer_tokens,
                distributions=decoding.distributions,
            )
        except ApprenticeError as error:
            return error

    def _decide(self, decoding: Decoding, scores: torch.Tensor) -> None:
        assert self._vocabulary is not None
        if decoding.position is None:
            decoding.choose(scores.tolist())
            return
        found = self._vocabulary.likeliest(scores, decoding.position)
        if found is None:
            raise decoding.no_answer("cannot be continued with any token of the model")
        token, after = found
        probability = float((scores[token] - scores.logsumexp(0)).exp())
        decoding.write((token,), self._vocabulary.bytes[token], probability, after)

    def _finish(self, request: _Request, result: LocalAnswer | Exception) -> None:
        self._count_out(request)
        if isinstance(result, LocalAnswer):
            request.future.set_result(result)
        else:
            request.future.set_exception(result)

    def _count_out(self, request: _Request) -> None:
        with self._wake:
            request.held.in_flight -= 1
            self._wake.notify_all()


def _as_exception(error: BaseException) -> Exception:
    if isinstance(error, Exception):
        return error
    raise error


REGISTERED = EmbeddedEngine
