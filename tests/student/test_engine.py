"""The engine that serves students: the head first, the adapter where it is needed, and neither held for too long."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apprentice.errors import ConfigError, EngineUnavailable, OutputError, VersionError
from apprentice.local import build_engine
from apprentice.local.adapter import content_name
from apprentice.local.engine import LocalAnswer, Version
from apprentice.local.engines.embedded import EmbeddedEngine
from apprentice.local.switch import Switch
from apprentice.schemas.schema import Schema, parse_schema
from apprentice.settings.config import LocalSettings
from apprentice.student.engine import StudentEngine
from apprentice.student.files import OWN, Student, student_name, write_student
from apprentice.testing.engine import FakeEngine
from tests.local.conftest import EMOTION, EMOTIONS, Train

LABEL = parse_schema({"label": "yes | no"})
NOTED = parse_schema({"note": "str", "label": "yes | no"})
WAIT_S = 10.0


@dataclass(frozen=True)
class Said:
    """What a head says of one input."""

    probabilities: Mapping[str, Any]
    distance: float = 0.0


class TableHead:
    """A head whose file holds its fields and, by text, the probability of each field's first value."""

    def __init__(self, folder: Path) -> None:
        known = json.loads((folder / "head.json").read_text())
        self.fields: Mapping[str, Sequence[Any]] = known["fields"]
        self.first: Mapping[str, float] = known["first"]

    def predict(self, inputs: Sequence[Mapping[str, Any]]) -> list[Said]:
        """Raises ValueError where the text is "broken"."""
        if any(value.get("text") == "broken" for value in inputs):
            raise ValueError("no memory")
        return [Said({name: self._spread(name, value) for name in self.fields}) for value in inputs]

    def _spread(self, name: str, value: Mapping[str, Any]) -> np.ndarray[Any, Any]:
        first, others = self.first.get(value.get("text", ""), 0.6), len(self.fields[name]) - 1
        return np.array([first, *[(1 - first) / others] * others])


class Models:
    """Makes the folders of versions of one task."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def adapter(self, seed: str = "a", schema: Schema = LABEL) -> Version:
        """Files as an adapter has them, of which only the bytes matter to the fake engine."""
        folder = self.root / f"new-{seed}"
        folder.mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors", "frame.json"):
            (folder / name).write_text(f"{name} {seed}")
        return self._named(folder, schema)

    def student(
        self,
        adapter: str | None = None,
        *,
        fields: Mapping[str, Sequence[Any]] | None = None,
        first: Mapping[str, float] | None = None,
        sure: float | None = 0.9,
        schema: Schema = LABEL,
        combiner: Mapping[str, Any] | None = None,
        own: Path | None = None,
    ) -> Version:
        """A student with a `TableHead`."""
        folder = self.root / "new"
        folder.mkdir(parents=True)
        if own is not None:
            shutil.copytree(own, folder, dirs_exist_ok=True)
        known = {"fields": fields or {"label": ["yes", "no"]}, "first": first or {"sure": 0.99, "no": 0.2}}
        (folder / "head.json").write_text(json.dumps(known))
        write_student(folder, Student("table", OWN if own else adapter, sure, combiner))
        return self._named(folder, schema)

    def without_head(self, adapter: str) -> Version:
        """A student that is an adapter only."""
        folder = self.root / "new"
        folder.mkdir(parents=True)
        write_student(folder, Student(None, adapter))
        return self._named(folder, LABEL)

    def _named(self, folder: Path, schema: Schema) -> Version:
        name = student_name(folder)
        there = folder.rename(self.root / name)
        return Version(name, "t", there, schema)


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """Folders of versions."""
    return Models(tmp_path / "models" / "t")


@pytest.fixture
def wrapped() -> FakeEngine:
    """The engine that runs adapters: all of them say no."""
    return FakeEngine(lambda version, value: ({"label": "no"}, 0.9))


@pytest.fixture
def engine(wrapped: FakeEngine) -> StudentEngine:
    """What is tested, around that engine."""
    return StudentEngine(lambda: wrapped, TableHead, retry_s=0.02)


def until(condition: Callable[[], bool]) -> None:
    """Wait for something that another thread does."""
    ends = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.002)


def ask(engine: StudentEngine, version: Version, text: str, deadline_s: float = WAIT_S) -> LocalAnswer:
    return engine.answer(version.name, {"text": text}, deadline_s=deadline_s)


def test_a_plain_version_passes_through(engine: StudentEngine, wrapped: FakeEngine, models: Models) -> None:
    version = models.adapter()
    with pytest.raises(VersionError, match=f"version {version.name} is not loaded"):
        ask(engine, version, "x")
    engine.load(version)
    assert ask(engine, version, "x") == wrapped.answer(version.name, {"text": "x"}, deadline_s=1)
    assert engine.answer_many(version.name, [{}]) == wrapped.answer_many(version.name, [{}])
    assert engine.loaded() == wrapped.loaded()
    engine.unload(version.name)
    assert wrapped.unloads == [version.name]
    with pytest.raises(VersionError):
        ask(engine, version, "x")


def test_a_head_alone_needs_no_other_engine(models: Models) -> None:
    def make() -> FakeEngine:
        raise AssertionError("nobody needs it")

    engine = StudentEngine(make, TableHead)
    version = models.student()
    assert version.adapter is not None
    engine.load(version)
    answer = ask(engine, version, "no")
    assert (answer.output, answer.version, answer.answered_by) == ({"label": "no"}, version.name, "head")
    assert answer.confidence == answer.field_confidence["label"] == pytest.approx(0.8)
    assert answer.distributions is not None
    assert answer.distributions["label"] == pytest.approx({'"yes"': 0.2, '"no"': 0.8})
    assert (answer.prompt_tokens, answer.answer_tokens, answer.cost) == (0, 0, None)
    assert engine.answer_many(version.name, [{"text": "no"}, {}])[0] == answer
    (held,) = engine.loaded()
    assert (held.name, held.task, held.bytes) == (version.name, "t", (version.adapter / "head.json").stat().st_size)
    assert engine.health().ok
    engine.unload(version.name)
    assert engine.loaded() == []
    with pytest.raises(VersionError, match="is not loaded"):
        ask(engine, version, "no")
    engine.close()
    assert not engine.health().ok
    with pytest.raises(EngineUnavailable):
        engine.load(version)
    with pytest.raises(EngineUnavailable):
        ask(engine, version, "no")


def test_the_adapter_is_asked_where_the_head_is_not_sure(
    engine: StudentEngine, wrapped: FakeEngine, models: Models
) -> None:
    asked: list[str] = []

    def answerer(version: Version, value: Mapping[str, Any]) -> tuple[Mapping[str, Any], float]:
        asked.append(value["text"])
        return {"label": "no"}, 0.9

    wrapped.answerer = answerer
    version = models.student(models.adapter().name)
    engine.load(version)
    assert (ask(engine, version, "sure").answered_by, asked) == ("head", [])
    both = ask(engine, version, "unsure")
    # 0.6 and 0.1 for yes, with equal weights: a geometric mean, normalised.
    yes, no = (0.6 * 0.1) ** 0.5, (0.4 * 0.9) ** 0.5
    assert (both.output, both.answered_by, both.version) == ({"label": "no"}, "both", version.name)
    assert both.confidence == pytest.approx(no / (yes + no))
    many = engine.answer_many(version.name, [{"text": text} for text in ("unsure", "sure", "no")])
    assert [one.answered_by for one in many if isinstance(one, LocalAnswer)] == ["both", "head", "both"]
    assert many[0] == both
    assert asked == ["unsure", "unsure", "no"]
    always = models.student(models.adapter("b").name, sure=None)
    engine.load(always)
    assert ask(engine, always, "sure").answered_by == "both"


def test_an_adapter_is_loaded_once_and_leaves_with_the_last_that_uses_it(
    engine: StudentEngine, wrapped: FakeEngine, models: Models
) -> None:
    adapter = models.adapter()
    first, second = models.student(adapter.name), models.student(adapter.name, sure=0.95)
    for version in (first, second, adapter):
        engine.load(version)
    assert [one.name for one in wrapped.loaded()] == [adapter.name]
    assert {one.name for one in engine.loaded()} == {first.name, second.name, adapter.name}
    engine.unload(adapter.name)
    engine.unload(first.name)
    engine.unload(first.name)
    assert wrapped.unloads == []
    assert ask(engine, second, "unsure").answered_by == "both"
    engine.unload(second.name)
    assert wrapped.unloads == [adapter.name]
    assert engine.loaded() == []
    engine.load(first)
    assert ask(engine, first, "unsure").answered_by == "both"


def test_memory_is_counted_once(models: Models) -> None:
    class Sized(FakeEngine):
        def loaded(self) -> list[Any]:
            return [replace(one, bytes=1000) for one in super().loaded()]

    engine = StudentEngine(lambda: Sized(lambda version, value: {"label": "no"}), TableHead)
    adapter = models.adapter()
    versions = [models.student(adapter.name), models.student(adapter.name, sure=0.95), adapter]
    for version in versions:
        engine.load(version)
    sizes = {one.name: one.bytes for one in engine.loaded()}
    heads = [(version.adapter / "head.json").stat().st_size for version in versions[:2] if version.adapter]
    assert [sizes[version.name] for version in versions] == [heads[0] + 1000, heads[1], 0]
    engine.unload(versions[0].name)
    sizes = {one.name: one.bytes for one in engine.loaded()}
    assert [sizes[version.name] for version in versions[1:]] == [heads[1] + 1000, 0]


def test_a_failed_load_leaves_nothing_behind(engine: StudentEngine, wrapped: FakeEngine, models: Models) -> None:
    adapter = models.adapter()
    version = models.student(adapter.name)
    wrapped.refuses[adapter.name] = VersionError("of another base")
    with pytest.raises(VersionError, match="of another base"):
        engine.load(version)
    assert (engine.loaded(), wrapped.loaded()) == ([], [])
    with pytest.raises(VersionError):
        ask(engine, version, "sure")
    del wrapped.refuses[adapter.name]
    engine.load(version)
    engine.unload(version.name)
    assert wrapped.loaded() == []


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"fields": {"mood": ["a", "b"]}}, "answers mood, which task 't' does not have"),
        ({"schema": NOTED}, "cannot answer note of task 't'; assemble it with an adapter"),
        ({"combiner": {"nobody": {}}}, "is of another shape"),
        ({"adapter": "0123456789abcdef"}, "does not exist"),
    ],
)
def test_a_student_that_cannot_answer_is_refused(
    engine: StudentEngine, models: Models, wanted: Mapping[str, Any], message: str
) -> None:
    version = models.student(**wanted)
    with pytest.raises(VersionError, match=message):
        engine.load(version)
    assert engine.loaded() == []


def test_other_files_than_the_name_says_are_refused(engine: StudentEngine, models: Models) -> None:
    version = models.student()
    assert version.adapter is not None
    (version.adapter / "head.json").write_text('{"fields": {"label": ["yes", "no"]}, "first": {}}')
    with pytest.raises(VersionError, match="holds other files"):
        engine.load(version)


@pytest.mark.parametrize("fault", ["down", "hanging", "lost"])
def test_the_head_answers_alone_until_its_adapter_is_back(
    engine: StudentEngine, wrapped: FakeEngine, models: Models, fault: str
) -> None:
    """No request fails, the adapter is not asked meanwhile, bulk work is told, and a thread brings it back."""
    version = models.student(models.adapter().name)
    engine.load(version)
    assert ask(engine, version, "no").answered_by == "both"
    held = threading.Event()
    load = wrapped.load

    def slow_load(version: Version) -> None:
        held.wait(WAIT_S)
        load(version)

    wrapped.load = slow_load  # type: ignore[method-assign]
    if fault == "lost":
        wrapped.forget()
    else:
        setattr(wrapped, fault, True)
    answer = ask(engine, version, "no", deadline_s=0.1)
    assert (answer.output, answer.answered_by) == ({"label": "no"}, "head")
    assert answer.confidence == pytest.approx(0.8)
    health = engine.health()
    assert health.ok
    assert "left alone" in health.detail
    if fault != "hanging":
        (told,) = engine.answer_many(version.name, [{"text": "no"}])
        assert isinstance(told, EngineUnavailable | VersionError)
    wrapped.down = wrapped.hanging = False
    assert ask(engine, version, "no").answered_by == "head"
    held.set()
    until(lambda: ask(engine, version, "no").answered_by == "both")
    assert engine.health().detail == ""
    engine.close()


def test_an_adapter_that_nobody_uses_any_more_is_not_brought_back(
    engine: StudentEngine, wrapped: FakeEngine, models: Models
) -> None:
    version = models.student(models.adapter().name)
    engine.load(version)
    wrapped.forget()
    assert ask(engine, version, "no").answered_by == "head"
    engine.unload(version.name)
    until(lambda: not any(thread.name.startswith("apprentice-adapter-") for thread in threading.enumerate()))
    assert wrapped.loaded() == []


def test_an_input_that_the_adapter_cannot_answer_is_no_fault_of_it(
    engine: StudentEngine, wrapped: FakeEngine, models: Models
) -> None:
    wrapped.answerer = lambda version, value: {"label": "neither"} if value["text"] == "long" else {"label": "no"}
    version = models.student(models.adapter().name)
    engine.load(version)
    assert ask(engine, version, "long").answered_by == "head"
    assert ask(engine, version, "no").answered_by == "both"
    many = engine.answer_many(version.name, [{"text": "long"}, {"text": "no"}])
    assert [one.answered_by for one in many if isinstance(one, LocalAnswer)] == ["head", "both"]


def test_free_text_comes_from_the_adapter(engine: StudentEngine, wrapped: FakeEngine, models: Models) -> None:
    """The fields are in the schema's order, and without the adapter there is no answer."""
    wrapped.answerer = lambda version, value: ({"note": value["text"], "label": "no"}, 0.9)
    adapter = models.adapter(schema=NOTED)
    version = models.student(adapter.name, schema=NOTED)
    engine.load(version)
    answer = ask(engine, version, "sure")
    assert list(answer.output.items()) == [("note", "sure"), ("label", "yes")]
    assert answer.answered_by == "both"
    assert set(answer.field_confidence) == {"note", "label"}
    wrapped.down = True
    with pytest.raises(EngineUnavailable):
        ask(engine, version, "sure")
    assert not engine.health().ok
    wrapped.down = False
    wrapped.answerer = lambda version, value: {"label": "no"}
    with pytest.raises(OutputError):
        ask(engine, version, "sure")


def test_an_adapter_alone_answers_under_the_students_name(
    engine: StudentEngine, wrapped: FakeEngine, models: Models
) -> None:
    adapter = models.adapter()
    version = models.without_head(adapter.name)
    engine.load(version)
    answer = ask(engine, version, "x")
    assert answer == replace(wrapped.answer(adapter.name, {}, deadline_s=1), version=version.name)
    assert engine.answer_many(version.name, [{}]) == [answer]
    wrapped.down = True
    with pytest.raises(EngineUnavailable):
        ask(engine, version, "x")


def test_a_head_that_fails_leaves_the_answer_to_the_adapter(engine: StudentEngine, models: Models) -> None:
    alone, both = models.student(), models.student(models.adapter().name)
    engine.load(alone)
    engine.load(both)
    answer = ask(engine, both, "broken")
    assert (answer.output, answer.answered_by, answer.version) == ({"label": "no"}, "lora", both.name)
    with pytest.raises(EngineUnavailable, match=r"the head of version .* failed"):
        ask(engine, alone, "broken")
    assert [type(one) for one in engine.answer_many(alone.name, [{"text": "broken"}])] == [EngineUnavailable]


def test_an_adapter_has_to_give_its_own_validated_answers(
    engine: StudentEngine, wrapped: FakeEngine, models: Models
) -> None:
    """The probes of a student may all be answered by its head, which proves nothing of the adapter."""
    adapter = models.adapter()
    assert adapter.adapter is not None
    probes = adapter.adapter / "probe.json"
    probes.write_text(json.dumps([{"input": {"text": "x"}, "output": {"label": "yes"}}]))
    version = models.student(adapter.name)
    with pytest.raises(VersionError, match=f"version {adapter.name} gives 0 of 1 validated answers again"):
        engine.load(version)
    assert wrapped.loaded() == []
    probes.write_text(json.dumps([{"input": {"text": "x"}, "output": {"label": "no"}}]))
    engine.load(version)
    assert ask(engine, version, "unsure").answered_by == "both"


def test_loading_unloading_and_asking_at_once(engine: StudentEngine, wrapped: FakeEngine, models: Models) -> None:
    """Whoever asks gets the right answer or hears that the version is not loaded; in the end nothing is held."""
    wrapped.latency_s = 0.001
    adapter = models.adapter()
    versions = [adapter, *(models.student(adapter.name, sure=sure) for sure in (0.9, 0.95, None))]
    stop = threading.Event()

    def change(version: Version) -> None:
        for _ in range(40):
            engine.load(version)
            engine.unload(version.name)

    def call(version: Version) -> int:
        answered = 0
        while not stop.is_set():
            try:
                answer = ask(engine, version, "no")
            except VersionError:
                time.sleep(0.001)
                continue
            assert (answer.output, answer.version) == ({"label": "no"}, version.name)
            answered += 1
        return answered

    with ThreadPoolExecutor(16) as threads:
        callers = [threads.submit(call, version) for version in versions for _ in range(2)]
        changers = [threads.submit(change, version) for version in versions for _ in range(2)]
        for one in changers:
            one.result()
        stop.set()
        assert sum(caller.result() for caller in callers) > 0
    until(lambda: not any(thread.name.startswith("apprentice-adapter-") for thread in threading.enumerate()))
    assert (engine.loaded(), wrapped.loaded()) == ([], [])


def test_swapping_students_that_share_an_adapter_keeps_answering(
    engine: StudentEngine, wrapped: FakeEngine, models: Models
) -> None:
    """No request fails, no answer is by a version that did not serve, and the adapter stays where it is."""
    adapter = models.adapter()
    versions = {v.name: v for v in (models.student(adapter.name, sure=sure) for sure in (0.9, 0.95, 0.97))}
    alerts: list[Any] = []
    switch = Switch(engine, lambda task, name: versions[name], alert=lambda *told: alerts.append(told), recheck_s=0.01)
    names = list(versions)
    switch.follow("t", names[0])
    assert switch.wait_until_serving("t", names[0], WAIT_S)
    stop = threading.Event()

    def call() -> list[str]:
        seen = []
        while not stop.is_set():
            answer = switch.answer("t", {"text": "no"}, WAIT_S)
            assert answer.answered_by == "both"
            seen.append(answer.version)
            time.sleep(0.001)
        return seen

    with ThreadPoolExecutor(8) as threads:
        callers = [threads.submit(call) for _ in range(8)]
        for i in range(1, 13):
            switch.follow("t", names[i % 3])
            assert switch.wait_until_serving("t", names[i % 3], WAIT_S)
        stop.set()
        seen = {name for caller in callers for name in caller.result()}
    switch.close()
    assert seen <= set(names)
    assert alerts == []
    assert wrapped.unloads == []
    engine.close()


def test_a_real_adapter_and_a_head(models: Models, tiny_folder: Path, train: Train) -> None:
    """The embedded engine under its own name for the adapter, whichever student's folder that lies in."""
    trained = train("emotion", EMOTION, EMOTIONS)
    assert trained.adapter is not None
    fields = {"emotion": ["joy", "fear", "anger"]}
    wrong = {str(value["text"]): 0.97 if output["emotion"] != "joy" else 0.01 for value, output in EMOTIONS}
    version = models.student(own=trained.adapter, fields=fields, first=wrong, sure=0.999, schema=EMOTION)
    engine = StudentEngine(lambda: EmbeddedEngine(str(tiny_folder), Path(), max_new_tokens=60), TableHead)
    engine.load(version)
    assert version.adapter is not None
    assert content_name(version.adapter) == trained.name
    engine.load(trained)
    for value, _ in EMOTIONS:
        plain = engine.answer(trained.name, value, deadline_s=60)
        both = engine.answer(version.name, value, deadline_s=60)
        assert (both.answered_by, both.version, both.prompt_tokens) == ("both", version.name, plain.prompt_tokens)
        assert plain.distributions is not None
        first = wrong[str(value["text"])]
        head = {'"joy"': first, '"fear"': (1 - first) / 2, '"anger"': (1 - first) / 2}
        product = {text: (p * max(plain.distributions["emotion"][text], 1e-6)) ** 0.5 for text, p in head.items()}
        expected = {text: p / sum(product.values()) for text, p in product.items()}
        assert both.distributions is not None
        assert both.distributions["emotion"] == pytest.approx(expected, abs=1e-3)
    sizes = {one.name: one.bytes for one in engine.loaded()}
    assert set(sizes) == {version.name, trained.name}
    assert (sizes[version.name] or 0) > (version.adapter / "head.json").stat().st_size
    engine.unload(trained.name)
    assert engine.answer(version.name, {"text": "I was happy"}, deadline_s=60).answered_by == "both"
    engine.unload(version.name)
    assert engine.loaded() == []
    engine.close()


def test_every_backend_is_wrapped(tmp_path: Path) -> None:
    """Nothing of the engine inside is made before a version is loaded; a missing budget is told at once."""
    for backend in ("embedded", "llama_cpp", "vllm", "ollama"):
        engine = build_engine(LocalSettings(backend=backend), tmp_path)
        assert isinstance(engine, StudentEngine)
        assert engine.health().ok
        engine.close()
    with pytest.raises(ConfigError, match="no budget is given"):
        build_engine(LocalSettings(backend="hosted"), tmp_path)
