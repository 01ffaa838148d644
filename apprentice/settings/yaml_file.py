"""Reading YAML without surprises: what a person wrote is what arrives, or a problem with its line.

YAML 1.1 turns ``no`` into false, ``010`` into 8, ``12:30`` into 750 and ``2024-01-01`` into a date, and keeps the last
of two equal keys. Here a plain scalar is a number only if it reads back as it was written, true or false only if it
says so, and else text; a key is always text; and everything that would be lost or multiplied is a problem.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from typing import Any, ClassVar

import yaml

from apprentice.errors import Problem
from apprentice.schemas.json_values import InvalidValue

__all__ = ["line_of", "read_yaml"]

_MOST_NODES = 100_000  # once its aliases are written out
_HINTS = {
    "got '?'": "Within { } and [ ] a type with a question mark stands in quotes: 'int?'.",
    "'\\t'": "Indent with spaces.",
    "'@'": "Write the text in quotes.",
    "'`'": "Write the text in quotes.",
    "expected <block end>": "Is a line indented otherwise than its neighbours, or a quote in a text not doubled?",
    "mapping values are not allowed": "Is a line indented wrongly, or does a text with a colon lack its quotes?",
    "another document": "Write one document, without a second '---'.",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema, less the numbers that are not written as people write numbers."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]  # a class's own, as in PyYAML

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:(?:0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


_CORE = "tag:yaml.org,2002:"
_TEXT = f"{_CORE}str"
_FITTING: dict[type[yaml.Node], tuple[str, ...]] = {
    yaml.MappingNode: (f"{_CORE}map",),
    yaml.SequenceNode: (f"{_CORE}seq",),
}


def read_yaml(content: bytes) -> tuple[Any, yaml.Node | None]:
    """The document of a YAML file, and the tree of nodes that knows its lines. Raises `InvalidValue`."""
    text = _decoded(content)
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"holds the control character U+{error.character:04X}."
        raise InvalidValue(
            [Problem("file", message, 'Remove it, or write it as "\\x07" and the like.', line)]
        ) from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        problems = [*_repeated_keys(node, ""), *_unreadable(loader, node), *_exploding(node)]
        if problems:
            raise InvalidValue(problems)
        return loader.construct_document(node), node
    except yaml.MarkedYAMLError as error:
        raise InvalidValue([_syntax(error)]) from None
    except RecursionError:
        raise InvalidValue([Problem("file", "is nested too deep.")]) from None
    except ValueError as error:
        if isinstance(error, InvalidValue):
            raise
        raise InvalidValue([Problem("file", f"holds a value that cannot be read ({error}).")]) from None
    finally:
        loader.dispose()


def line_of(node: yaml.Node | None, place: list[str | int]) -> int | None:
    """The line of the deepest node that a path of keys and list indices reaches, counted from 1."""
    line = node.start_mark.line + 1 if node is not None else None
    for part in place:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    line, node = key.start_mark.line + 1, value
                    break
            else:
                return line
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _decoded(content: bytes) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InvalidValue([Problem("file", "is UTF-16.", "Save it as UTF-8.")])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        message = f"is not UTF-8: byte 0x{byte:02x}, {bytes((byte,)).decode('latin-1')!r} in Latin-1."
        raise InvalidValue([Problem("file", message, "Save it as UTF-8.", line)]) from None


def _syntax(error: yaml.MarkedYAMLError) -> Problem:
    line = error.problem_mark.line + 1 if error.problem_mark else None
    words = str(error.problem)
    hint = next((hint for sign, hint in _HINTS.items() if sign in words), "")
    return Problem("file", f"is not YAML: {words}.", hint, line)


def _repeated_keys(node: yaml.Node, path: str, seen: set[int] | None = None) -> Iterator[Problem]:
    """Keys that stand twice in one mapping, of which YAML would keep the last, and keys that are no text."""
    seen = set() if seen is None else seen
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _repeated_keys(item, f"{path}[{i}]", seen)
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            yield Problem(path or "file", "has a list or a mapping for a key.", "Write text.", line)
            continue
        here = f"{path}.{key.value}".removeprefix(".")
        if key.value in first:
            where = "in this line" if first[key.value] == line else f"first in line {first[key.value]}, and again here"
            yield Problem(here, f"is written twice, {where}.", "Keep one of the two.", line)
        first.setdefault(key.value, line)
        yield from _repeated_keys(value, here, seen)


def _unreadable(loader: _Loader, root: yaml.Node) -> Iterator[Problem]:
    """Values that are not what their tag says they are, tags beyond YAML 1.2's core schema, and half characters."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        line, fitting = node.start_mark.line + 1, _FITTING.get(type(node), ())
        if isinstance(node, yaml.ScalarNode):
            plain = loader.resolve(yaml.ScalarNode, node.value, (True, False))  # type: ignore[no-untyped-call]
            fitting = (_TEXT, plain)
            if any("\ud800" <= character <= "\udfff" for character in node.value):
                yield Problem("file", "holds half a surrogate pair.", "Write the character itself.", line)
        else:
            parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
            waiting += reversed(parts)
        if node.tag not in fitting:
            tag = node.tag.replace(_CORE, "!!")
            yield Problem("file", f"has the tag {tag}, which does not fit here.", "Write the value without it.", line)


def _exploding(root: yaml.Node) -> Iterator[Problem]:
    """Aliases that hold themselves, or that multiply to more than anyone would write."""
    sizes: dict[int, int] = {}
    within: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in within:
            line = node.start_mark.line + 1
            raise InvalidValue([Problem("file", "has an alias that holds itself.", "Write it out.", line)])
        if id(node) not in sizes:
            within.add(id(node))
            inner = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = 1 + sum(map(size, parts))
            within.discard(id(node))
            if sizes[id(node)] > _MOST_NODES:
                message = f"has aliases that stand for more than {_MOST_NODES:,} values."
                raise InvalidValue([Problem("file", message, "Write it out.", node.start_mark.line + 1)])
        return sizes[id(node)]

    try:
        size(root)
    except InvalidValue as error:
        yield from error.problems
