"""Reading recorded traffic: good lines go on, bad ones are named and counted."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apprentice.errors import Problem
from apprentice.settings.config import Settings
from flows.traffic import Recorded, read_traffic

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


GOOD = '{"input":{"text":"a"},"answer":{"emotion":"joy"}}'


def of_bytes(path: Path, content: bytes, **keys: str) -> list[Recorded | Problem]:
    path.write_bytes(content)
    return list(read_traffic(path, SETTINGS, "emotion", **{"input_key": "input", "answer_key": "answer", **keys}))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"input":{"text":"caf\xe9"},"answer":{"emotion":"joy"}}'.encode("latin-1"), "is not UTF-8 (byte 0xe9"),
        (b'{"input":{"text":"a","more":' + b"[" * 5000 + b"]" * 5000 + b"}}", "nested deeper than 100 levels"),
        (b'{"input":{"text":NaN},"answer":{"emotion":"joy"}}', "input.text: is NaN"),
        (b'{"input":{"text":"a"},"answer":"rage"}', "answer: is not JSON"),
        (b'{"input":{"text":"a"},"answer":""}', "answer: is empty"),
        (b'{"input":{"text":"a"},"answer":null}', "does not fit the task"),
        (b'{"input":{"text":"a"}', "does not parse"),
        (b"[1, 2]", "has no 'input'"),
    ],
)
def test_one_bad_line_is_left_out_by_its_number_and_never_the_end(tmp_path: Path, bad: bytes, says: str) -> None:
    """Whatever a line holds, the lines before and after it are read."""
    before, problem, after = of_bytes(tmp_path / "t.jsonl", GOOD.encode() + b"\r\n" + bad + b"\n" + GOOD.encode())
    assert isinstance(problem, Problem)
    assert (problem.line, problem.remedy) == (2, "The line is left out.")
    assert says in str(problem)
    assert [row.line for row in (before, after) if isinstance(row, Recorded)] == [1, 3]


def test_a_mark_of_byte_order_belongs_to_no_line_and_utf16_is_named(tmp_path: Path) -> None:
    """Windows' tools write both."""
    rows = of_bytes(tmp_path / "t.jsonl", b"\xef\xbb\xbf" + GOOD.encode() + b"\n" + GOOD.encode() + b"\n")
    assert [row.line for row in rows if isinstance(row, Recorded)] == [1, 2]
    (problem,) = of_bytes(tmp_path / "t.jsonl", GOOD.encode("utf-16"))
    assert "is UTF-16. Save it as UTF-8." in str(problem)


def test_half_an_emoji_is_read_as_it_enters_everywhere(tmp_path: Path) -> None:
    """The same rule as for a request, so that the replay finds the answer to it."""
    (row,) = of_bytes(tmp_path / "t.jsonl", b'{"input":{"text":"nice \\ud83d"},"answer":{"emotion":"joy"}}')
    assert row == Recorded(1, {"text": "nice \ufffd"}, {"emotion": "joy"})


def test_a_log_of_chat_completions_is_read_as_it_is(tmp_path: Path) -> None:
    """The answer is JSON text in a list of choices, perhaps fenced; the input is the last message."""

    def logged(content: str) -> dict[str, Any]:
        messages = [{"role": "system", "content": "Name the emotion."}, {"role": "user", "content": "a dog!"}]
        return {
            "request": {"messages": messages},
            "response": {"body": {"choices": [{"message": {"content": content}}]}},
        }

    lines = [logged('{"emotion":"joy"}'), logged('```json\n{"emotion":"fear"}\n```'), logged("I cannot.")]
    rows = of_bytes(
        tmp_path / "t.jsonl",
        "\n".join(map(json.dumps, lines)).encode(),
        input_key="request.messages.-1.content",
        answer_key="response.body.choices.0.message.content",
    )
    assert rows[:2] == [Recorded(i, {"text": "a dog!"}, {"emotion": e}) for i, e in ((1, "joy"), (2, "fear"))]
    assert "answer: is not JSON" in str(rows[2])


@pytest.mark.parametrize("answer", ["choices.1.message", "choices.x", "choices.0.0", "choices.-2"])
def test_a_path_that_leads_nowhere_is_named(tmp_path: Path, answer: str) -> None:
    """An index beyond the list, a name in a list, an index in an object."""
    (problem,) = of_bytes(tmp_path / "t.jsonl", b'{"input":{"text":"a"},"choices":[{"message":1}]}', answer_key=answer)
    assert "has no" in str(problem)


@given(lines=st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b" ").replace(b"\r", b" ")), max_size=5))
def test_no_file_ends_a_replay(lines: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Any bytes on any lines: the good line after them is still read."""
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    *_, last = of_bytes(path, b"\n".join([b"{}", *lines, GOOD.encode()]))
    assert last == Recorded(len(lines) + 2, {"text": "a"}, {"emotion": "joy"})
