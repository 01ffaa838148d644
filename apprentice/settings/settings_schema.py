"""The JSON Schema of apprentice.yaml, by which an editor completes, explains and checks it while it is written.

Everything in it is said by `apprentice.settings.config`: keys, types, bounds, defaults, and each key's description. It
says less than loading the file does: what hangs on two keys, and whether a schema, a function or a variable is there,
is left to `apprentice check`. It is never stricter but for a number in quotes, which is taken for text.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from apprentice.settings.config import Settings

__all__ = ["settings_schema", "summary"]


def settings_schema() -> dict[str, Any]:
    """The schema, draft 7, which every editor's YAML support reads; without references, which some follow badly."""
    generated = Settings.model_json_schema(schema_generator=_ForEditors)
    definitions = generated.pop("$defs")
    del generated["description"], generated["properties"]["source"]  # where the file lies is no key of it
    described: dict[str, Any] = _written_out(generated, definitions)
    return {"$schema": _ForEditors.schema_dialect, "title": "apprentice.yaml", **described}


def summary(section: type[BaseModel]) -> str:
    """What a section is for: the first line of its docstring."""
    return (section.__doc__ or "").strip().split("\n")[0].replace("``", "`")


class _ForEditors(GenerateJsonSchema):
    schema_dialect = "http://json-schema.org/draft-07/schema#"

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False  # "Max Output Tokens" tells nobody more than max_output_tokens

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        described = super().model_schema(schema)
        described.pop("title", None)
        return {"description": summary(schema["cls"]), **{k: v for k, v in described.items() if k != "description"}}

    def bool_schema(self, schema: core_schema.BoolSchema) -> JsonSchemaValue:
        return {"anyOf": [{"type": "boolean"}, {"enum": ["yes", "no", "on", "off"]}]}  # text in YAML 1.2

    def encode_default(self, dft: Any) -> Any:
        encoded = super().encode_default(dft)
        return float(encoded) if isinstance(dft, Decimal) else encoded


def _written_out(node: Any, definitions: dict[str, Any]) -> Any:
    """The same with each section in the place where it is referred to; what stands beside a reference wins over it."""
    if isinstance(node, list):
        return [_written_out(one, definitions) for one in node]
    if not isinstance(node, dict):
        return node
    here = {key: _written_out(value, definitions) for key, value in node.items() if key != "$ref"}
    if "$ref" not in node:
        return here
    return {**_written_out(definitions[node["$ref"].rpartition("/")[2]], definitions), **here}
