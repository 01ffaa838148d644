"""What of an answer is forced and what the local model decides.

Most of a JSON answer is known before it is given: braces, names, quotes, the order of the fields. A `Skeleton`
walks an output schema and says, step by step, which text is forced (`Literal`), where one of a few texts must be
chosen (`Choice`: enums, booleans, whether an optional field is there), and where text is free within a grammar
(`Free`: strings, numbers, lists). One walk serves both sides. Training walks along a known answer and puts the
loss on the decided pieces; an engine walks along with the model's decisions. Both tokenise piece by piece, so the
token boundaries are the same.

A string's piece ends with its closing quote, and a number's with the character after it: the model must learn
where to stop, and nothing else in the text says so.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from apprentice.local.grammar import RULES, STRING_REST, Grammar, of_schema
from apprentice.schemas.schema import Schema

__all__ = ["Choice", "Free", "Literal", "Option", "Piece", "Skeleton", "Step"]


@dataclass(frozen=True, slots=True)
class Literal:
    """Text that is forced."""

    text: str


@dataclass(frozen=True, slots=True)
class Option:
    """One text that may be chosen, and the paths of the fields that choosing it decides.

    ``value`` is the JSON text of the field's value where that is what is chosen, "" where it is whether the field is
    there.
    """

    text: str
    paths: tuple[str, ...]
    value: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of these texts; none is the beginning of another."""

    options: tuple[Option, ...]


@dataclass(frozen=True, slots=True)
class Free:
    """Any text that the grammar takes, up to where it is first complete."""

    grammar: Grammar
    path: str
    schema: Mapping[str, Any]
    ends: str


type Step = Literal | Choice | Free
type Walk = Generator[Step, str, None]
"""Yields steps; is sent the decided text after a Choice or a Free, and anything after a Literal."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of an answer's text. Tokenised by itself. ``path`` is the field it decides, "" where it is forced."""

    text: str
    decided: bool
    path: str


@dataclass(frozen=True)
class Skeleton:
    """The walk of one output schema."""

    schema: Schema

    @classmethod
    def of(cls, schema: Schema) -> Skeleton:
        """The skeleton of a task's output schema."""
        return cls(schema)

    def walk(self) -> Walk:
        """Start a walk: steps of which no two Literals follow one another and none is empty."""
        return _joined(_root(self.schema.json_schema))

    def pieces(self, output: Mapping[str, Any]) -> list[Piece]:
        """Cut an answer that fits the schema into its pieces; their texts join to ``Schema.dumps(output)``.

        Raises ValueError where the answer does not follow the skeleton: check it first with `Schema.check`.
        """
        rest = Schema.dumps(output)
        pieces: list[Piece] = []
        walk = self.walk()
        decided = ""
        try:
            step = next(walk)
            while True:
                taken, path = _take(step, rest)
                pieces.append(Piece(taken, not isinstance(step, Literal), path))
                rest = rest[len(taken) :]
                decided = taken
                step = walk.send(decided)
        except StopIteration:
            if rest:
                raise ValueError(f"the answer goes on after its end: {rest!r}") from None
        return pieces

    @property
    def opening(self) -> str:
        """The forced text before the first decision, the same for every answer."""
        step = next(self.walk())
        return step.text if isinstance(step, Literal) else ""


def _take(step: Step, rest: str) -> tuple[str, str]:
    match step:
        case Literal(forced):
            if rest.startswith(forced):
                return forced, ""
        case Choice(options):
            for option in options:
                if rest.startswith(option.text):
                    return option.text, option.paths[-1]
        case Free(grammar, path):
            content = rest.encode()
            count = grammar.split(content)
            if count > 0:
                return content[:count].decode(), path
    raise ValueError(f"the answer does not follow its schema at {rest[:60]!r}")


def _joined(walk: Walk) -> Walk:
    """Literals that follow one another become one, since each piece is tokenised by itself."""
    forced = ""
    try:
        step = next(walk)
        while True:
            if isinstance(step, Literal):
                forced += step.text
                step = walk.send("")
                continue
            if forced:
                yield Literal(forced)
                forced = ""
            decided = yield step
            step = walk.send(decided)
    except StopIteration:
        if forced:
            yield Literal(forced)


def _dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _closed(schema: Mapping[str, Any]) -> bool:
    """Whether every field the object may have is known."""
    others = schema.get("additionalProperties") is not False or schema.get("patternProperties")
    return bool(schema.get("properties")) and not others


def _root(schema: Mapping[str, Any]) -> Walk:
    if _closed(schema):
        yield from _object(schema, "")
    else:
        yield Free(of_schema(schema), "", schema, "")


def _object(schema: Mapping[str, Any], path: str) -> Generator[Step, str, str]:
    """Walk a closed object. Returns "": it closes itself and takes nothing of what follows along."""
    properties: Mapping[str, Any] = schema["properties"]
    required = set(schema.get("required", ()))
    names = list(properties)
    eaten = ""  # the character that a number before took with it
    done = -1
    yield Literal("{")
    while True:
        options, chosen = _next_fields(names, required, done, path)
        if eaten:
            kept = [(o, i) for o, i in zip(options, chosen, strict=True) if o.text.startswith(eaten)]
            options = [Option(o.text[1:], o.paths) for o, _ in kept]
            chosen = [i for _, i in kept]
        if len(options) == 1:
            at = chosen[0]
            if options[0].text:
                yield Literal(options[0].text)
        else:
            text = yield Choice(tuple(options))
            at = chosen[[option.text for option in options].index(text)]
        if at == len(names):
            return ""
        follow = "".join(sorted({o.text[0] for o in _next_fields(names, required, at, path)[0]}))
        name = names[at]
        eaten = yield from _value(properties[name], f"{path}.{name}" if path else name, follow)
        done = at


def _next_fields(names: list[str], required: set[str], done: int, path: str) -> tuple[list[Option], list[int]]:
    """What may follow field number ``done``: every field up to the next required one, or the end."""
    comma = "," if done >= 0 else ""
    options: list[Option] = []
    chosen: list[int] = []
    paths: list[str] = []
    for at in range(done + 1, len(names)):
        paths.append(f"{path}.{names[at]}" if path else names[at])
        options.append(Option(f"{comma}{_dumps(names[at])}:", tuple(paths)))
        chosen.append(at)
        if names[at] in required:
            return options, chosen
    options.append(Option("}", tuple(paths)))
    chosen.append(len(names))
    return options, chosen


def _value(schema: Mapping[str, Any], path: str, follow: str) -> Generator[Step, str, str]:
    """Walk one field's value. Returns the following character where the value's last piece took it along, else ""."""
    values = _listed(schema)
    if values is not None:
        return (yield from _enum(values, path, follow))
    kind = schema.get("type")
    if kind == "object" and _closed(schema):
        return (yield from _object(schema, path))
    if kind == "string":
        yield Literal('"')
        yield Free(Grammar(STRING_REST, RULES), path, schema, "")
        return ""
    ends = follow if _may_be_number(schema) else ""
    text = yield Free(of_schema(schema, ends), path, schema, ends)
    # A value that is not a number where it might have been one has the character behind it, too.
    return text[-1] if ends else ""


def _listed(schema: Mapping[str, Any]) -> list[Any] | None:
    if "enum" in schema:
        return list(schema["enum"])
    if "const" in schema:
        return [schema["const"]]
    if schema.get("type") == "boolean":
        return [True, False]
    if schema.get("type") == "null":
        return [None]
    return None


def _enum(values: list[Any], path: str, follow: str) -> Generator[Step, str, str]:
    texts = [_dumps(value) for value in values]
    if len(texts) == 1:
        yield Literal(texts[0])
        return ""
    if all(isinstance(value, str) for value in values):
        yield Literal('"')
        yield Choice(tuple(Option(text[1:], (path,), text) for text in texts))
        return ""
    if any(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        # 1 is the beginning of 10: each is read with what follows it.
        text = yield Choice(tuple(Option(text + end, (path,), text) for text in texts for end in follow))
        return text[-1]
    yield Choice(tuple(Option(text, (path,), text) for text in texts))
    return ""


def _may_be_number(schema: Mapping[str, Any]) -> bool:
    if "enum" in schema or "const" in schema:
        return any(isinstance(v, int | float) and not isinstance(v, bool) for v in _listed(schema) or ())
    branches = schema.get("anyOf") or schema.get("oneOf")
    if branches:
        return any(_may_be_number(branch) for branch in branches)
    kind = schema.get("type")
    if isinstance(kind, list):
        return any(_may_be_number({"type": one}) for one in kind)
    return kind in ("integer", "number", None)
