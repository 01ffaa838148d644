"""The engine that serves students: it wraps the one that runs the local model, and answers from both halves.

A plain version passes through. Of a student, the head lies here; its adapter lies in the wrapped engine under the name
of its own content, once for all students that share it. The head is asked first. Where it is sure, nobody else is;
else the adapter answers too and the two are combined. The wrapped engine is made when the first adapter is loaded, so
a task that a head serves alone needs no base model.

An adapter that fails does not fail a request that the head can answer: the head then answers alone, with the
confidence of an answer by the head alone, and the adapter is left in peace until a thread has loaded it again and got
an answer from it. Bulk work (`answer_many`: validation, probes) is told of the failure instead, since it judges both.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from apprentice import secrets
from apprentice.errors import EngineUnavailable, LocalError, OutputError, VersionError
from apprentice.local.drained import Drained
from apprentice.local.engine import Engine, Health, LoadedVersion, LocalAnswer, Version
from apprentice.local.probe import check_parity, read_probes
from apprentice.schemas.schema import SchemaError
from apprentice.student.files import OWN, Student, adapter_of, check_student, head_files, read_student

if TYPE_CHECKING:
    from apprentice.student.combiner import Combined, Combiner, HeadAnswer

__all__ = ["Head", "StudentEngine", "load_head"]

_log = secrets.logger(__name__)
_RETRY_S = 5.0
_LAST_RETRY_S = 60.0
_RESERVE = 0.05
"""Share of a request's time that is kept for the head's answer, should the adapter not come to one."""


class Head(Protocol):
    """What the engine needs of a head. Safe to call from many threads."""

    @property
    def fields(self) -> Mapping[str, Sequence[Any]]:
        """The output fields that it knows, each with its values."""

    def predict(self, inputs: Sequence[Mapping[str, Any]]) -> Sequence[HeadAnswer]:
        """What it says of each input."""


def load_head(folder: Path, root: Path) -> Head:
    """The head in a student's folder; an encoder with a relative path is looked for at ``root``.

    Raises `VersionError` where a file is damaged or the encoder is another, `MissingExtra` where no encoder can run.
    """
    from apprentice.student.head import Head as SavedHead  # NumPy comes with it, so not before it is used

    return SavedHead.load(folder, root)


@dataclass(eq=False)
class _Version:
    """A version in the wrapped engine, or on its way there.

    ``holders`` are the names under which it is used: its own, students'; the oldest first. ``down`` says why it is not
    asked at present; ``answered`` is an input that it has answered.
    """

    name: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    users: int = 0
    version: Version | None = None
    holders: dict[str, None] = field(default_factory=dict)
    down: str | None = None
    answered: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class _Student:
    """A student that is held. ``head`` and ``combiner`` are None together: then the adapter answers as it is."""

    version: Version
    head: Head | None
    combiner: Combiner | None
    adapter: _Version | None
    bytes: int

    @property
    def stands_alone(self) -> bool:
        """Whether the head can answer without the adapter."""
        return self.combiner is not None and self.combiner.is_finite


class StudentEngine:
    """Serves students and plain versions; see the module. Safe to use from many threads.

    ``make`` builds the engine that runs adapters, once it is needed. ``load_head`` reads the head in a student's
    folder; it raises `VersionError`. ``retry_s`` is how long a failed adapter is left alone at first; that doubles.
    """

    def __init__(
        self, make: Callable[[], Engine], load_head: Callable[[Path], Head], *, retry_s: float = _RETRY_S
    ) -> None:
        self._make = make
        self._load_head = load_head
        self._retry_s = retry_s
        self._students: Drained[_Student] = Drained("student")
        self._versions: dict[str, _Version] = {}
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._made: Engine | None = None
        self._closing = threading.Event()

    # --- the protocol -------------------------------------------------------------------------------------------

    def load(self, version: Version) -> None:
        """Make a version ready, and what it needs of the wrapped engine. What fails leaves nothing behind."""
        with self._changing(version.name) as entry:
            held = self._students.get(version.name)
            if held is not None:
                if held.adapter is not None and held.adapter.version is not None:
                    self._hold(held.adapter.version, version.name)
                return
            folder = version.adapter
            student = None if folder is None or read_student(folder) is None else check_student(folder, version.name)
            if folder is None or student is None:
                self._bring_in(entry, version, version.name)
            else:
                self._load_student(version, folder, student)

    def answer(self, version: str, value: Mapping[str, Any], *, deadline_s: float) -> LocalAnswer:
        """Answer one input; by the head alone if the adapter fails and the head can."""
        if self._students.get(version) is None:
            return self._wrapped(version).answer(version, value, deadline_s=deadline_s)
        ends = time.monotonic() + deadline_s
        with self._students.using(version) as held:
            (said,), why = self._heads(held, [value])
            alone = _alone(held, said)
            if alone is not None and (held.adapter is None or _is_sure(held, alone) or held.adapter.down is not None):
                return _answer(held, alone, None)
            if held.adapter is None:
                raise why or _no_answer(held, said)
            left = ends - time.monotonic() - (0.0 if alone is None else _RESERVE * deadline_s)
            try:
                lora = self._wrapped(version).answer(held.adapter.name, value, deadline_s=max(0.0, left))
            except OutputError:  # of this input: the adapter is well
                if alone is None:
                    raise
                return _answer(held, alone, None)
            except LocalError as error:
                if alone is None:
                    raise
                self._leave_alone(held.adapter, error, value, deadline_s)
                return _answer(held, alone, None)
            held.adapter.answered = value
            return _join(held, said, lora)

    def answer_many(self, version: str, values: Sequence[Mapping[str, Any]]) -> list[LocalAnswer | Exception]:
        """Answer many inputs: the heads' answers at once, then the adapter's for those of which the head is not sure.

        An adapter that is down is an `EngineUnavailable` in each place that needs it.
        """
        if self._students.get(version) is None:
            return self._wrapped(version).answer_many(version, values)
        with self._students.using(version) as held:
            said, why = self._heads(held, values)
            alone = [_alone(held, one) for one in said]
            answers: list[LocalAnswer | Exception] = [
                (why or _no_answer(held, head)) if one is None else _answer(held, one, None)
                for head, one in zip(said, alone, strict=True)
            ]
            if held.adapter is None:
                return answers
            unsure = [i for i, one in enumerate(alone) if one is None or not _is_sure(held, one)]
            if not unsure:
                return answers
            loras = self._wrapped(version).answer_many(held.adapter.name, [values[i] for i in unsure])
            for i, lora in zip(unsure, loras, strict=True):
                if isinstance(lora, LocalAnswer):
                    answers[i] = _join(held, said[i], lora)
                elif alone[i] is None or not isinstance(lora, OutputError):
                    answers[i] = lora
            return answers

    def unload(self, version: str) -> None:
        """Let go of a version once its answers are out, and of its adapter if no other version uses it."""
        with self._changing(version) as entry:
            if self._students.get(version) is not None:
                self._students.drop(version, self._release)
            else:
                self._let_go(entry, version)

    def loaded(self) -> list[LoadedVersion]:
        """What is held. A student takes its head's memory, and its adapter's if it is the first that uses it."""
        made = self._made
        there = {one.name: one for one in made.loaded()} if made is not None else {}
        students = self._students.all()
        with self._lock:
            first = {name: next(iter(entry.holders), name) for name, entry in self._versions.items()}
            plain = [one for name, one in there.items() if name in self._holders(name)]
        found = []
        for name, held in students.items():
            size: int | None = held.bytes
            adapter = None if held.adapter is None else there.get(held.adapter.name)
            if adapter is not None and first.get(adapter.name) == name:
                size = None if adapter.bytes is None else held.bytes + adapter.bytes
            found.append(LoadedVersion(name, held.version.task, size))
        # Shared by a plain version and a student: it is counted with whoever came first.
        return found + [one if first[one.name] == one.name else replace(one, bytes=0) for one in plain]

    def health(self) -> Health:
        """The wrapped engine's, if any version needs it; with a word on the adapters that are left alone."""
        if self._closing.is_set():
            return Health(False, "closed")
        health = Health(True, "no base model loaded yet") if self._made is None else self._made.health()
        students = self._students.all()
        with self._lock:
            down = [f"adapter {one.name} is left alone ({one.down})" for one in self._versions.values() if one.down]
            needed = [
                holder
                for entry in self._versions.values()
                for holder in entry.holders
                if holder not in students or not students[holder].stands_alone
            ]
        if not health.ok and students and not needed:
            return Health(True, "; ".join([f"heads answer alone, since the engine does not: {health.detail}", *down]))
        return Health(health.ok, "; ".join([part for part in (health.detail, *down) if part]))

    def close(self) -> None:
        """Release everything; answers in flight fail with `EngineUnavailable`."""
        self._closing.set()
        self._students.close()
        with self._making:
            made = self._made
        if made is not None:
            made.close()

    # --- the wrapped engine -------------------------------------------------------------------------------------

    def _wrapped(self, version: str) -> Engine:
        """The engine that is there already."""
        if self._made is not None:
            return self._made
        if self._closing.is_set():
            raise EngineUnavailable("the local engine is closed")
        raise VersionError(f"version {version} is not loaded; load it first")

    def _engine(self) -> Engine:
        """The engine, made if it is not there."""
        with self._making:
            if self._closing.is_set():
                raise EngineUnavailable("the local engine is closed")
            if self._made is None:
                self._made = self._make()
            return self._made

    @contextlib.contextmanager
    def _changing(self, name: str) -> Iterator[_Version]:
        """While nobody else loads or unloads it. A student's own name is taken before its adapter's."""
        with self._lock:
            entry = self._versions.setdefault(name, _Version(name))
            entry.users += 1
        try:
            with entry.lock:
                yield entry
        finally:
            with self._lock:
                entry.users -= 1
                if not entry.users and not entry.holders:
                    del self._versions[name]

    def _holders(self, name: str) -> Mapping[str, None]:
        entry = self._versions.get(name)
        return {} if entry is None else entry.holders

    def _hold(self, version: Version, holder: str, proof: Path | None = None) -> _Version:
        with self._changing(version.name) as entry:
            self._bring_in(entry, version, holder, proof)
            return entry

    def _bring_in(self, entry: _Version, version: Version, holder: str, proof: Path | None = None) -> None:
        """Load a version for a holder; one that nobody used yet has to give the answers in the folder ``proof``."""
        engine = self._engine()
        engine.load(version)
        if proof is not None and not entry.holders:
            try:
                check_parity(engine, version.name, read_probes(proof))
            except BaseException:
                engine.unload(version.name)
                raise
        with self._lock:
            entry.version = entry.version or version
            entry.holders.setdefault(holder)

    def _let_go(self, entry: _Version, holder: str) -> None:
        with self._lock:
            entry.holders.pop(holder, None)
            used = bool(entry.holders)
        if not used and self._made is not None:
            self._made.unload(entry.name)

    # --- students -----------------------------------------------------------------------------------------------

    def _load_student(self, version: Version, folder: Path, student: Student) -> None:
        schema = version.output_schema
        head, combiner, size = None, None, 0
        if student.encoder is not None:
            from apprentice.student.combiner import Combiner

            head = self._load_head(folder)
            unknown = sorted(set(head.fields) - set(schema.fields))
            if unknown:
                raise VersionError(
                    f"the head in {folder} answers {', '.join(unknown)}, which task {version.task!r} does not have "
                    "(any more); assemble the version again"
                )
            try:
                combiner = Combiner.of_json(schema, head.fields, student.combiner, student.sure)
            except ValueError as error:
                raise VersionError(
                    f"the combiner in {folder / 'student.json'} is of another shape ({error}); assemble the version "
                    "again"
                ) from None
            if student.adapter is None and not combiner.is_finite:
                missing = [name for name in schema.fields if name not in head.fields]
                raise VersionError(
                    f"version {version.name} has no adapter, and its head cannot answer {', '.join(missing)} of task "
                    f"{version.task!r}; assemble it with an adapter"
                )
            head.predict([{}])  # the encoder is loaded now, and not while somebody waits
            size = sum(path.stat().st_size for path in head_files(folder))
        found = adapter_of(folder, student)
        adapter = None
        if found is not None:
            name, there = found
            # What lies in a student's folder was answered by the student; a plain version's by the adapter alone.
            proof = there if student.adapter != OWN and read_student(there) is None else None
            adapter = self._hold(replace(version, name=name, adapter=there), version.name, proof)
        held = _Student(version, head, combiner, adapter, size)
        try:
            self._students.put(version.name, held)
        except EngineUnavailable:
            self._release(held)
            raise

    def _release(self, held: _Student) -> None:
        if held.adapter is not None:
            with self._changing(held.adapter.name) as entry:
                self._let_go(entry, held.version.name)

    def _heads(
        self, held: _Student, values: Sequence[Mapping[str, Any]]
    ) -> tuple[Sequence[HeadAnswer | None], EngineUnavailable | None]:
        """What the head says of each, and why it says nothing."""
        if held.head is None:
            return [None] * len(values), None
        try:
            return held.head.predict(values), None
        except Exception as error:  # noqa: BLE001  # memory, most likely: the adapter can still answer
            _log.warning("the head of version %s failed", held.version.name, exc_info=True)
            why = EngineUnavailable(f"the head of version {held.version.name} failed ({type(error).__name__}: {error})")
            return [None] * len(values), why

    # --- an adapter that fails ----------------------------------------------------------------------------------

    def _leave_alone(self, adapter: _Version, error: LocalError, value: Mapping[str, Any], deadline_s: float) -> None:
        with self._lock:
            if adapter.down is not None or self._closing.is_set():
                return
            adapter.down = str(error)
        _log.warning("adapter %s failed, and heads answer alone until it is back: %s", adapter.name, error)
        threading.Thread(
            target=self._revive,
            args=(adapter, value, deadline_s),
            name=f"apprentice-adapter-{adapter.name}",
            daemon=True,
        ).start()

    def _revive(self, adapter: _Version, value: Mapping[str, Any], deadline_s: float) -> None:
        """Load an adapter again until it answers, or nobody uses it any more."""
        delay_s = self._retry_s
        while not self._closing.wait(delay_s):
            try:
                with self._changing(adapter.name) as entry:
                    if entry is not adapter or not entry.holders or entry.version is None:
                        return
                    self._engine().load(entry.version)
                # What it has answered before: the input at which it failed may be what brings it down.
                asked = value if adapter.answered is None else adapter.answered
                with contextlib.suppress(OutputError):
                    self._engine().answer(adapter.name, asked, deadline_s=deadline_s)
                break
            except Exception as error:  # noqa: BLE001  # whatever it is, it is not well yet
                _log.info("adapter %s is not back yet: %s", adapter.name, error)
                adapter.down = str(error)
            delay_s = min(_LAST_RETRY_S, delay_s * 2)
        else:
            return
        adapter.down = None
        _log.info("adapter %s answers again", adapter.name)


def _alone(held: _Student, said: HeadAnswer | None) -> Combined | None:
    return None if held.combiner is None else held.combiner.alone(said)


def _is_sure(held: _Student, alone: Combined) -> bool:
    return held.combiner is not None and held.combiner.is_sure(alone)


def _no_answer(held: _Student, said: HeadAnswer | None) -> Exception:
    """Why the head has no answer of its own; nobody sees it if the adapter has one."""
    if said is not None and held.combiner is not None and held.stands_alone:
        try:
            held.combiner.combine(said, None)
        except SchemaError as error:
            return OutputError(held.version.task, "the local model", error.problems)
    return EngineUnavailable(f"the head of version {held.version.name} has no answer of its own")


def _join(held: _Student, said: HeadAnswer | None, lora: LocalAnswer) -> LocalAnswer:
    if held.combiner is None:
        return replace(lora, version=held.version.name)
    return _answer(held, held.combiner.combine(said, lora), lora)


def _answer(held: _Student, combined: Combined, lora: LocalAnswer | None) -> LocalAnswer:
    known = {} if lora is None or lora.distributions is None else lora.distributions
    return LocalAnswer(
        output=combined.output,
        confidence=combined.confidence,
        field_confidence=combined.field_confidence,
        version=held.version.name,
        prompt_tokens=0 if lora is None else lora.prompt_tokens,
        answer_tokens=0 if lora is None else lora.answer_tokens,
        cost=None if lora is None else lora.cost,
        distributions={**known, **combined.distributions},
        answered_by=combined.answered_by,
    )
