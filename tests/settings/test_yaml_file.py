"""apprentice.yaml is read as a person reads it, or not at all: every surprise is a problem with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from apprentice.errors import ConfigError
from apprentice.schemas.json_values import InvalidValue
from apprentice.settings.config import load_settings
from apprentice.settings.yaml_file import read_yaml

HEAD = """\
tasks:
  - name: mood
    description: Name the mood.
    input_schema: {text: str}
    output_schema: SCHEMA
remote: {provider: openai, model: gpt-4o-mini, api_key_env: K}
"""


def read(text: str) -> Any:
    return read_yaml(text.encode())[0]


def load(tmp_path: Path, content: bytes) -> Any:
    path = tmp_path / "apprentice.yaml"
    path.write_bytes(content)
    return load_settings(path, {})


def refused(tmp_path: Path, content: bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, content)
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "enum"),
    [
        ("{country: [no, se, dk]}", ["no", "se", "dk"]),
        ("{relevant: [yes, no, unsure]}", ["yes", "no", "unsure"]),
        ("{relevant: [on, off]}", ["on", "off"]),
        ("{code: [010, 011, 089]}", ["010", "011", "089"]),
        ("{slot: [09:30, 12:30, 18:00]}", ["09:30", "12:30", "18:00"]),
        ("{day: [2024-01-01, 2024-01-02]}", ["2024-01-01", "2024-01-02"]),
        ("{code: [0x1F, 1e3, 1_000]}", ["0x1F", "1e3", "1_000"]),
        ("{version: a | no}", ["a", "no"]),
        ("{level: [1, 2]}", [1, 2]),
        ("{flag: [true, false]}", [True, False]),
    ],
)
def test_an_enum_holds_what_was_written(tmp_path: Path, written: str, enum: list[Any]) -> None:
    """Norway is no false, and half past twelve is not 750."""
    schema = load(tmp_path, HEAD.replace("SCHEMA", written).encode()).task("mood").output_schema
    (field,) = schema.json_schema["properties"].values()
    assert field["enum"] == enum
    assert [type(value) for value in field["enum"]] == [type(value) for value in enum]


@pytest.mark.parametrize("written", ["{x: [true, false, unsure]}", "{x: [8, 9, 089]}", "{x: [1, true]}"])
def test_an_enum_of_two_kinds_is_a_problem_with_its_line(tmp_path: Path, written: str) -> None:
    """The vendor would be bound to it, and the caller get a number among words."""
    message = refused(tmp_path, HEAD.replace("SCHEMA", written).encode())
    assert "tasks[0].output_schema.x (line 5): " in message
    assert "write it in quotes" in message


def test_yes_and_no_still_switch_a_key(tmp_path: Path) -> None:
    """What people write for a yes-or-no key means what it says."""
    text = HEAD.replace("SCHEMA", "{label: a | b}\n    deferral: no\n    ordered_lists: on")
    text += "sampling: {mean_time_to_false_alarm: 10_000}\nbudget: {daily: 1_000.50}\n"
    settings = load(tmp_path, text.encode())
    task = settings.task("mood")
    assert (task.deferral, task.ordered_lists) == (False, True)
    assert settings.sampling.mean_time_to_false_alarm == 10_000
    assert str(settings.budget.daily) == "1000.50"


GOOD = HEAD.replace("SCHEMA", "{label: a | b}")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            GOOD.encode() + b"budget: {daily: 5, daily: 500}\n",
            "budget.daily (line 7): is written twice, in this line. Keep one",
        ),
        (
            GOOD.encode() + b"budget:\n  daily: 5\nlocal: {}\nbudget:\n  weekly: 9\n",
            "budget (line 10): is written twice, first in line 7, and again here. Keep one of the two.",
        ),
        (GOOD.replace("text: str", "text: str, text: int").encode(), "input_schema.text (line 4): is written twice"),
        (GOOD.encode("utf-16"), "file: is UTF-16. Save it as UTF-8."),
        (GOOD.encode() + "# café\n".encode("latin-1"), "file (line 7): is not UTF-8: byte 0xe9, 'é' in Latin-1."),
        (GOOD.encode() + b"store: 'a\x07b'\n", "file (line 7): holds the control character U+0007"),
        (GOOD.replace("a | b", "a | b?").encode(), "a type with a question mark stands in quotes: 'int?'"),
        (GOOD.encode() + b"local:\n\tbackend: vllm\n", "Indent with spaces"),
        (GOOD.encode() + b"a: b: c\n", "lack its quotes"),
        (GOOD.encode() + b"---\na: 1\n", "Write one document"),
        (GOOD.encode() + b"? [a, b]\n: 1\n", "has a list or a mapping for a key"),
        (b"a: &a [*a]\n", "has an alias that holds itself"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "is nested too deep"),
        (b"a: !!python/object:os.system {}\n", "(line 1): has the tag !!python/object"),
        (b"a: " + b"9" * 5000 + b"\n", "holds a value that cannot be read"),
        (b"\x80\n", "is not UTF-8"),
        (b"", "holds no mapping"),
        (b"- a\n", "holds no mapping"),
    ],
)
def test_what_would_surprise_is_a_problem_with_its_line(tmp_path: Path, content: bytes, says: str) -> None:
    """Nothing is lost in silence, and nothing is a traceback."""
    assert says in refused(tmp_path, content)


def test_an_alias_that_multiplies_is_refused_before_it_is_written_out(tmp_path: Path) -> None:
    """Nine lines that stand for a billion values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    assert "stand for more than 100,000 values" in refused(tmp_path, "\n".join(lines).encode())


def test_aliases_merges_and_a_mark_of_byte_order_are_fine(tmp_path: Path) -> None:
    """What YAML offers for not repeating oneself still works."""
    assert read("\ufeffa: &x {k: 1}\nb: {<<: *x, j: 2}\nc: *x\n") == {
        "a": {"k": 1},
        "b": {"k": 1, "j": 2},
        "c": {"k": 1},
    }
    assert load(tmp_path, b"\xef\xbb\xbf" + GOOD.encode()).task("mood")


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=6)
documents = st.dictionaries(
    st.text(max_size=4),
    st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner)),
    max_size=4,
)


@given(documents, st.booleans())
def test_whatever_is_dumped_is_read_back(document: dict[str, Any], flow: bool) -> None:
    """A YAML writer that quotes what YAML 1.1 would change is understood, whatever it writes."""
    text = yaml.safe_dump(document, default_flow_style=flow)
    assert read(text) == (document or {})


@given(st.from_regex(r"[-+.0-9:_xobeE]{1,8}", fullmatch=True) | st.sampled_from(["y", "N", "Yes", "NO", "On", "oFF"]))
def test_a_scalar_that_is_no_text_reads_back_as_it_was_written(written: str) -> None:
    """A number is a number only if it stands for the very text; else the text is kept."""
    value = read(f"a: [{written}]")["a"] if ":" not in written else read(f"a: '{written}'")["a"]
    value = value[0] if isinstance(value, list) else value
    if isinstance(value, int):
        assert str(value) == written.removeprefix("+") or (value == 0 and written in ("-0", "+0"))
    elif isinstance(value, float):
        assert float(written) == value
    elif isinstance(value, str):
        assert value == written


@given(st.binary(max_size=60) | st.text(st.sampled_from("{}[],:?*&!|>'\"%@`-#\n\t ab01"), max_size=30).map(str.encode))
def test_no_file_is_a_traceback(content: bytes) -> None:
    """Any bytes are a document or a problem."""
    try:
        read_yaml(content)
    except InvalidValue as error:
        assert error.problems[0].message  # noqa: PT017  # it may also be a document


@pytest.mark.parametrize(
    ("written", "tag"),
    [
        ("!!bool maybe", "!!bool"),
        ("!!int ''", "!!int"),
        ("!!float x", "!!float"),
        ("!!null x", "!!null"),
        ("!!timestamp x", "!!timestamp"),
        ("!!timestamp 2024-01-01", "!!timestamp"),
        ("!!set {a, b}", "!!set"),
        ("!!binary aGk=", "!!binary"),
        ("!!map [1]", "!!map"),
        ("!!str [1]", "!!str"),
        ("!!python/object/apply:os.system [x]", "!!python"),
        ("!mine x", "!mine"),
    ],
)
def test_a_tag_that_does_not_fit_its_value_is_a_problem_with_its_line(written: str, tag: str) -> None:
    """Neither an exception of the YAML library, nor a set, bytes or a date in the place of what JSON has."""
    with pytest.raises(InvalidValue, match=rf"line 2\): has the tag {tag}"):
        read(f"a: 1\nb: {written}\n")


def test_a_tag_that_says_what_the_value_is_changes_nothing() -> None:
    """Text that looks like a number may be marked as text, too."""
    assert read("a: !!str 5\nb: !!int 5\nc: !!map {d: !!seq [!!bool true]}\n<<: {e: !!null ~}") == {
        "a": "5", "b": 5, "c": {"d": [True]}, "e": None,
    }  # fmt: skip


def test_half_a_surrogate_pair_is_a_problem() -> None:
    """No file, no database and no vendor takes it."""
    with pytest.raises(InvalidValue, match="half a surrogate pair"):
        read('a: "\\ud800"')


_TAGS = st.sampled_from(["", *(f"!!{t} " for t in ("int", "float", "bool", "null", "str", "timestamp", "set", "omap"))])
_SCALARS = st.sampled_from(["", "x", "5", "true", "~", "''", "'\\ud800'", "2024-01-01", "<<", "&a 1", "*a"])


def _within(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    lists = st.lists(inner, max_size=3)
    sequences = lists.map(lambda parts: f"[{', '.join(parts)}]")
    mappings = lists.map(lambda parts: f"{{{', '.join(f'k{i}: {part}' for i, part in enumerate(parts))}}}")
    return st.tuples(_TAGS, sequences | mappings).map("".join)


_VALUES = st.recursive(st.tuples(_TAGS, _SCALARS).map("".join), _within, max_leaves=6)


@given(_VALUES)
def test_whatever_is_tagged_reads_as_json_or_is_a_problem(value: str) -> None:
    """Tags, aliases and merges in every place."""
    try:
        document = read(f"k: {value}")
    except InvalidValue:
        return
    assert json.loads(json.dumps(document)) == document
