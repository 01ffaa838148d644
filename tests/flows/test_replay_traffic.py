"""Reading recorded traffic: good lines go on, bad ones are named and counted."""

import json
from pathlib import Path

import pytest

from apprentice.config import Settings
from apprentice.errors import Problem
from flows.replay import Recorded, read_traffic

SETTINGS = Settings.model_validate(
    {
        "tasks": [
            {
                "name": "emotion",
                "description": "Name the emotion.",
                "input_schema": {"text": "str"},
                "output_schema": {"emotion": "joy | fear"},
            }
        ],
        "remote": {"provider": "openai", "model": "gpt-4o-mini", "api_key_env": "KEY"},
    }
)


def read(path: Path, lines: list[str], answer: str = "answers.gpt-3.5-turbo") -> list[Recorded | Problem]:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return list(read_traffic(path, SETTINGS, "emotion", input_key="input", answer_key=answer))


def line(text: str, emotion: str) -> str:
    return json.dumps({"input": {"text": text}, "answers": {"gpt-3.5-turbo": {"emotion": emotion}}})


def test_a_models_name_may_hold_dots(tmp_path: Path) -> None:
    """`answers.gpt-3.5-turbo` finds the key gpt-3.5-turbo, not gpt-3."""
    (row,) = read(tmp_path / "t.jsonl", [line("A dog!", "joy")])
    assert row == Recorded(1, {"text": "A dog!"}, {"emotion": "joy"})


def test_bad_lines_are_named_by_number_and_the_rest_goes_on(tmp_path: Path) -> None:
    """No JSON, no answer, an answer or an input outside the schema: each has its line and its reason."""
    lines = [
        line("fine", "joy"),
        "{not json",
        json.dumps({"input": {"text": "x"}, "answers": {}}),
        line("x", "rage"),
        json.dumps({"input": {"text": 5}, "answers": {"gpt-3.5-turbo": {"emotion": "joy"}}}),
        "",
        line("also fine", "fear"),
    ]
    rows = read(tmp_path / "t.jsonl", lines)
    problems = [row for row in rows if isinstance(row, Problem)]
    assert [row.line for row in rows if isinstance(row, Recorded)] == [1, 7]
    assert [p.line for p in problems] == [2, 3, 4, 5]
    for problem, reason in zip(problems, ["does not parse", "gpt-3.5-turbo", "'rage'", "text"], strict=True):
        assert reason in str(problem)


@pytest.mark.parametrize("answer", ["answers.gpt-4", "answer"])
def test_an_answer_key_that_is_nowhere_leaves_every_line_out(tmp_path: Path, answer: str) -> None:
    """A wrong --answer is told on every line, with the key that is missing."""
    (problem,) = read(tmp_path / "t.jsonl", [line("x", "joy")], answer)
    assert isinstance(problem, Problem)
    assert "has no" in str(problem)
