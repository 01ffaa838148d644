"""Which bytes may come next: JSON of one shape, as a grammar that is followed byte by byte.

A grammar is a `Node`: a byte out of a set, a sequence, a choice, or a reference to a rule (JSON nests, so a rule
may lead back to itself). A position in it is a set of stacks of what must still come; `advance` moves it by one
byte and gives None where the byte does not fit. Positions are immutable, so that a decoder can try a token and
take it back.

Only the compact text of `Schema.dumps` is accepted: no spaces between tokens, one way to write a text. What a grammar
cannot say (``minimum``, ``pattern``, formats) is left to `Schema.parse`, which checks every finished answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Alt", "Bytes", "Grammar", "Node", "Position", "Ref", "Seq", "gbnf", "of_schema", "text"]


@dataclass(frozen=True, slots=True)
class Bytes:
    """One byte out of a set."""

    allowed: frozenset[int]


@dataclass(frozen=True, slots=True)
class Seq:
    """Each part in turn."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    """Any one of them."""

    branches: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Ref:
    """The rule of that name in `RULES`."""

    rule: str


type Node = Bytes | Seq | Alt | Ref


def text(value: str) -> Node:
    """Exactly this text."""
    return Seq(tuple(Bytes(frozenset((byte,))) for byte in value.encode()))


def _one_of(*spans: tuple[int, int] | int) -> Bytes:
    allowed: set[int] = set()
    for span in spans:
        low, high = (span, span) if isinstance(span, int) else span
        allowed.update(range(low, high + 1))
    return Bytes(frozenset(allowed))


def _repeat(rule: str, unit: Node, end: Node) -> Alt:
    """As many units as you like, then the end."""
    return Alt((end, Seq((unit, Ref(rule)))))


_EMPTY = Seq(())
_DIGIT = _one_of((0x30, 0x39))
_TAIL = _one_of((0x80, 0xBF))
_HEX = _one_of((0x30, 0x39), (0x61, 0x66))
# One character inside a JSON string as json.dumps writes it: well-formed UTF-8, escapes only where they are needed.
_CHARACTER = Alt(
    (
        _one_of((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7F)),
        Seq((_one_of((0xC2, 0xDF)), _TAIL)),
        Seq((_one_of(0xE0), _one_of((0xA0, 0xBF)), _TAIL)),
        Seq((_one_of((0xE1, 0xEC), (0xEE, 0xEF)), _TAIL, _TAIL)),
        Seq((_one_of(0xED), _one_of((0x80, 0x9F)), _TAIL)),
        Seq((_one_of(0xF0), _one_of((0x90, 0xBF)), _TAIL, _TAIL)),
        Seq((_one_of((0xF1, 0xF3)), _TAIL, _TAIL, _TAIL)),
        Seq((_one_of(0xF4), _one_of((0x80, 0x8F)), _TAIL, _TAIL)),
        Seq((text("\\"), Alt(tuple(text(c) for c in '"\\nrtbf')))),
        Seq((text("\\u00"), _one_of(0x30, 0x31), _HEX)),
    )
)
_STRING = Seq((text('"'), Ref("string_rest")))
_INTEGER = Seq((Alt((_EMPTY, text("-"))), Alt((text("0"), Seq((_one_of((0x31, 0x39)), Ref("digits_or_none")))))))
_FRACTION = Alt((_EMPTY, Seq((text("."), Ref("digits")))))
_EXPONENT = Alt((_EMPTY, Seq((text("e"), Alt((_EMPTY, text("+"), text("-"))), Ref("digits")))))
_NUMBER = Seq((_INTEGER, _FRACTION, _EXPONENT))

RULES: Mapping[str, Node] = {
    "string_rest": _repeat("string_rest", _CHARACTER, text('"')),
    "digits": Seq((_DIGIT, Ref("digits_or_none"))),
    "digits_or_none": _repeat("digits_or_none", _DIGIT, _EMPTY),
    "any": Alt((_STRING, _NUMBER, text("true"), text("false"), text("null"), Ref("any_list"), Ref("any_object"))),
    "any_list": Seq((text("["), Alt((text("]"), Seq((Ref("any"), Ref("any_more"))))))),
    "any_more": _repeat("any_more", Seq((text(","), Ref("any"))), text("]")),
    "any_object": Seq((text("{"), Alt((text("}"), Seq((Ref("any_member"), Ref("any_members"))))))),
    "any_member": Seq((_STRING, text(":"), Ref("any"))),
    "any_members": _repeat("any_members", Seq((text(","), Ref("any_member"))), text("}")),
}

STRING_REST: Node = Ref("string_rest")
"""What follows a string's opening quote: its characters and its closing quote."""


@dataclass(frozen=True)
class Grammar:
    """A grammar: the node it begins with, and the rules that its references name."""

    root: Node
    rules: Mapping[str, Node]

    def start(self) -> Position:
        """The position before the first byte."""
        return Position(self, _expand(self.rules, ((self.root, None),)))

    def split(self, content: bytes) -> int:
        """How many bytes of ``content`` the grammar takes before it is complete. -1 where it never is."""
        position: Position | None = self.start()
        for count, byte in enumerate(content):
            assert position is not None
            if position.complete:
                return count
            position = position.advance(bytes((byte,)))
            if position is None:
                return -1
        return len(content) if position is not None and position.complete else -1


# A stack is a linked list of nodes still to come: (node, rest) or None at the end.
type _Stack = tuple[Node, _Stack] | None


@dataclass(frozen=True)
class Position:
    """A place in a grammar: every stack's top is a `Bytes`, or the stack is empty and the text may end here."""

    grammar: Grammar
    stacks: tuple[_Stack, ...]

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return any(stack is None for stack in self.stacks)

    def advance(self, content: bytes) -> Position | None:
        """The position after these bytes, or None where they do not fit."""
        stacks = self.stacks
        for byte in content:
            rests = []
            for stack in stacks:
                if stack is not None:
                    top, rest = stack
                    assert isinstance(top, Bytes)
                    if byte in top.allowed:
                        rests.append(rest)
            if not rests:
                return None
            stacks = _expand(self.grammar.rules, rests)
        return Position(self.grammar, stacks)

    def next_bytes(self) -> frozenset[int]:
        """Every byte that may come next."""
        return frozenset(
            byte
            for stack in self.stacks
            if stack is not None and isinstance(stack[0], Bytes)
            for byte in stack[0].allowed
        )


def _expand(rules: Mapping[str, Node], stacks: Iterable[_Stack]) -> tuple[_Stack, ...]:
    todo = list(stacks)
    done: list[_Stack] = []
    while todo:
        stack = todo.pop()
        if stack is None:
            if None not in done:
                done.append(None)
            continue
        node, rest = stack
        match node:
            case Bytes():
                done.append(stack)
            case Ref(rule):
                todo.append((rules[rule], rest))
            case Alt(branches):
                todo.extend((branch, rest) for branch in branches)
            case Seq(parts):
                for part in reversed(parts):
                    rest = (part, rest)
                todo.append(rest)
    return tuple(done)


def of_schema(schema: Mapping[str, Any], ends: str = "") -> Grammar:
    """The grammar of one JSON Schema node's compact text, closed by one of the characters in ``ends`` if there are
    any.

    A number does not say where it ends; what follows it in its object does, so it is read with that.
    """
    rules = dict(RULES)
    root = _node(schema, rules)
    if ends:
        root = Seq((root, Alt(tuple(text(end) for end in ends))))
    return Grammar(root, rules)


def _node(schema: Mapping[str, Any], rules: dict[str, Node]) -> Node:
    if "enum" in schema or "const" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        return Alt(tuple(text(json.dumps(v, ensure_ascii=False, separators=(",", ":"))) for v in values))
    branches = schema.get("anyOf") or schema.get("oneOf")
    if branches:
        return Alt(tuple(_node(branch, rules) for branch in branches))
    kind = schema.get("type")
    if isinstance(kind, list):
        return Alt(tuple(_node({**schema, "type": one}, rules) for one in kind))
    match kind:
        case "string":
            return _STRING
        case "integer":
            return _INTEGER
        case "number":
            return _NUMBER
        case "boolean":
            return Alt((text("true"), text("false")))
        case "null":
            return text("null")
        case "array":
            return _array(schema, rules)
        case "object":
            return _object(schema, rules)
        case _:
            return Ref("any")


def _array(schema: Mapping[str, Any], rules: dict[str, Node]) -> Node:
    item = _node(schema["items"], rules) if isinstance(schema.get("items"), Mapping) else Ref("any")
    more = f"more_{len(rules)}"
    rules[more] = Alt(())  # reserves the name: the item may add rules of its own
    rules[more] = _repeat(more, Seq((text(","), item)), text("]"))
    return Seq((text("["), Alt((text("]"), Seq((item, Ref(more)))))))


def _object(schema: Mapping[str, Any], rules: dict[str, Node]) -> Node:
    properties = schema.get("properties", {})
    extra = schema.get("additionalProperties", True)
    if schema.get("patternProperties"):
        return Ref("any_object")
    if not properties:
        if extra is False:
            return text("{}")
        value = _node(extra, rules) if isinstance(extra, Mapping) else Ref("any")
        member = Seq((_STRING, text(":"), value))
        more = f"members_{len(rules)}"
        rules[more] = Alt(())
        rules[more] = _repeat(more, Seq((text(","), member)), text("}"))
        return Seq((text("{"), Alt((text("}"), Seq((member, Ref(more)))))))
    if extra is not False:
        return Ref("any_object")
    required = set(schema.get("required", ()))
    members = [
        (key in required, text(f"{json.dumps(key, ensure_ascii=False)}:"), spec) for key, spec in properties.items()
    ]
    # Built from the back: what may follow member i, where a member was written before it and where none was.
    after: Node = text("}")
    first: Node = text("}")
    for must, key, spec in reversed(members):
        value = _node(spec, rules)
        rule = f"rest_{len(rules)}"
        rules[rule] = after
        here_after = Seq((text(","), key, value, Ref(rule)))
        here_first = Seq((key, value, Ref(rule)))
        after = here_after if must else Alt((here_after, after))
        first = here_first if must else Alt((here_first, first))
    return Seq((text("{"), first))


def gbnf(grammar: Grammar) -> str:
    """The grammar in the notation that llama.cpp, Ollama and xgrammar read. UTF-8 is their business there."""
    rules = {"root": grammar.root, **{k.replace("_", "-"): v for k, v in _reachable(grammar).items()}}
    return "\n".join(f"{name} ::= {_gbnf(node)}" for name, node in rules.items()) + "\n"


def _reachable(grammar: Grammar) -> dict[str, Node]:
    found: dict[str, Node] = {}
    todo: list[Node] = [grammar.root]
    while todo:
        node = todo.pop()
        match node:
            case Ref(rule):
                if rule not in found:
                    found[rule] = grammar.rules[rule]
                    todo.append(grammar.rules[rule])
            case Seq(nodes) | Alt(nodes):
                todo.extend(nodes)
            case Bytes():
                pass
    return found


def _gbnf(node: Node) -> str:
    if node is _CHARACTER:
        # By code points, not bytes; the escapes are the same.
        return r'([^"\\\x00-\x1F] | "\\" (["\\nrtbf] | "u00" [01] [0-9a-f]))'
    match node:
        case Bytes(allowed):
            return "[" + "".join(f"\\x{byte:02X}" for byte in sorted(allowed)) + "]"
        case Ref(rule):
            return rule.replace("_", "-")
        case Alt(branches):
            return "(" + " | ".join(_gbnf(branch) for branch in branches) + ")"
        case Seq(parts):
            literal = _literal(parts)
            return literal if literal is not None else " ".join(_gbnf(part) for part in parts)


def _literal(parts: tuple[Node, ...]) -> str | None:
    """The GBNF string of a sequence of single bytes; None where it is more than that."""
    content = bytearray()
    for part in parts:
        if not (isinstance(part, Bytes) and len(part.allowed) == 1):
            return None
        content += bytes(part.allowed)
    return json.dumps(content.decode(), ensure_ascii=False)
