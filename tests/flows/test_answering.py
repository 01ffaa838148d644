"""What an adapter answered once is not asked again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from apprentice.local.engine import LocalAnswer
from flows.answering import RememberedAnswers
from flows.trainers import TrainingRow


class Adapter:
    """Says which of its inputs it was asked; what asks for "odd" has no answer that fits."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, inputs: Sequence[Mapping[str, Any]]) -> list[LocalAnswer | None]:
        self.asked += [one["text"] for one in inputs]
        return [None if one["text"] == "odd" else _answer(one["text"]) for one in inputs]


def _answer(text: str) -> LocalAnswer:
    return LocalAnswer({"label": text}, 0.75, {"label": 0.75}, "recorded", 3, 1, None, {"label": {f'"{text}"': 0.75}})


def _rows(*names: str) -> list[TrainingRow]:
    return [TrainingRow(id=name, input={"text": name}, output={"label": name}) for name in names]


def test_only_new_examples_are_asked(tmp_path: Path):
    """Over processes: the next refit asks for what came since, and hears the same of the rest, misfits included."""
    adapter = Adapter()
    first = RememberedAnswers(tmp_path / "datasets", "v1")
    told = first.answers(_rows("a", "odd"), adapter)
    assert told == [_answer("a"), None]
    first.save()
    later = RememberedAnswers(tmp_path / "datasets", "v1")
    assert [later.knows(row) for row in _rows("a", "odd", "b")] == [True, True, False]
    assert later.answers(_rows("b", "odd", "a"), adapter) == [_answer("b"), None, _answer("a")]
    assert adapter.asked == ["a", "odd", "b"]


def test_another_adapters_answers_are_its_own(tmp_path: Path):
    """They are kept by the content that gave them."""
    adapter = Adapter()
    first = RememberedAnswers(tmp_path, "v1")
    first.answers(_rows("a"), adapter)
    first.save()
    assert not RememberedAnswers(tmp_path, "v2").knows(_rows("a")[0])


def test_the_oldest_are_forgotten_first(tmp_path: Path):
    """The file is bounded, whatever a task has seen."""
    adapter = Adapter()
    first = RememberedAnswers(tmp_path, "v1", most=2)
    first.answers(_rows("a", "b", "c"), adapter)
    first.save()
    later = RememberedAnswers(tmp_path, "v1", most=2)
    assert [later.knows(row) for row in _rows("a", "b", "c")] == [False, True, True]


@pytest.mark.parametrize("damage", ["", "{", "[1, 2]", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")])
def test_a_damaged_file_is_begun_anew(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture):
    """It costs the answers again, not the run."""
    (tmp_path / "answers-v1.json").write_text(damage, encoding="latin-1")
    adapter = Adapter()
    remembered = RememberedAnswers(tmp_path, "v1")
    assert "is begun anew" in caplog.text
    assert remembered.answers(_rows("a"), adapter) == [_answer("a")]
    remembered.save()
    assert RememberedAnswers(tmp_path, "v1").knows(_rows("a")[0])
