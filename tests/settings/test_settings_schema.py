"""The schema for editors: current, whole, and of the same mind as the loader."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jsonschema
import pytest
from click.testing import CliRunner
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from apprentice.cli import cli
from apprentice.settings.config import Settings
from apprentice.settings.settings_schema import settings_schema
from apprentice.settings.yaml_file import read_yaml
from tests.settings.test_config import USER_CONFIG
from tests.test_docs import load_reference

ROOT = Path(__file__).parents[2]
SHIPPED = ["apprentice.yaml", *(f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.yaml"))]
SCHEMA = settings_schema()
CHECK = jsonschema.Draft7Validator(SCHEMA)


def mistakes(text: str) -> list[str]:
    """Where a file's text is against the schema, as dotted paths."""
    document, _ = read_yaml(text.encode())
    return [".".join(map(str, error.path)) for error in CHECK.iter_errors(document)]


def test_the_committed_file_is_what_the_command_prints() -> None:
    """The file that apprentice.yaml names is the settings' of today."""
    printed = CliRunner().invoke(cli, ["schema"])
    assert printed.exit_code == 0
    committed = (ROOT / "docs" / "apprentice.schema.json").read_text(encoding="utf-8")
    assert committed == printed.output, "run: apprentice schema > docs/apprentice.schema.json"
    jsonschema.Draft7Validator.check_schema(json.loads(committed))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration_fits_and_names_the_schema(name: str) -> None:
    """An editor finds the schema by the first line, and marks nothing."""
    text = (ROOT / name).read_text(encoding="utf-8")
    place = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert ((ROOT / name).parent / place).resolve() == ROOT / "docs" / "apprentice.schema.json"
    assert mistakes(text) == []


def test_what_the_first_user_wrote_fits() -> None:
    """Every key that one user thought of."""
    assert mistakes(USER_CONFIG) == []


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("min_floor:", "min_flor:", "sampling"),
        ("backend: ollama", "backend: olama", "local.backend"),
        ("daily: 10.00", "daily: -1", "budget.daily"),
        ("provider: anthropic", "provider: 3", "remote.provider"),
        ("window_size: 100", "window_size: 19", "sampling.window_size"),
        ("    input_schema: {text: str, metadata: dict}\n", "", "tasks.0"),
        ("  model: claude-sonnet-4-5-20250929\n", "", "remote"),
        ("phase2_to_phase3: 0.85", "phase2_to_phase3: 85", "tasks.0.confidence_thresholds.phase2_to_phase3"),
    ],
)
def test_a_mistake_is_marked_where_it_stands(old: str, new: str, place: str) -> None:
    """Names, words, bounds and what is missing."""
    assert place in mistakes(USER_CONFIG.replace(old, new))


def keys(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key that the schema knows, with what is said of it."""
    for option in (node, node.get("items", {}), *node.get("anyOf", ())):
        for name, described in option.get("properties", {}).items():
            yield f"{path}.{name}".lstrip("."), described
            yield from keys(described, f"{path}.{name}")


def test_every_key_is_described_in_the_words_of_the_reference() -> None:
    """Hovering over a key shows what docs/configuration.md says of it; sections have their line there, too."""
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    found = dict(keys(SCHEMA))
    assert len(found) > 100
    assert [path for path, described in found.items() if not described.get("description")] == []
    plain = [one["description"] for one in found.values() if "properties" not in str(one)]
    assert [text for text in plain if f"| {text} |" not in page] == []


VALUES: list[Any] = [None, True, False, "yes", "x", "a b", "a:b", "a.b:c", "", [], ["x"], [1], {}, {"x": 2}, {"x": -1}]
VALUES += [-2, -1, -0.5, 0, 0.0, 0.02, 0.5, 1, 1.5, 15, 16, 19, 20, 29, 30, 31, 32, 99, 100, 10**9, 10**9 + 1]
WORDS = sorted(
    {word for _, one in keys(SCHEMA) for part in (one, *one.get("anyOf", ())) for word in part.get("enum", ())}
)


def fields() -> Iterator[tuple[str, FieldInfo, dict[str, Any]]]:
    """Every key that is no section, as the loader and as the schema know it."""
    known = dict(keys(SCHEMA))
    for section, model in load_reference().sections(Settings):
        for name, field in model.model_fields.items():
            path = f"{section}.{name}".lstrip(".").replace("[]", "")
            if not field.exclude and not load_reference()._models(field.annotation):
                yield path, field, known[path]


@pytest.mark.parametrize(
    ("path", "field", "described"), list(fields()), ids=lambda it: it if isinstance(it, str) else ""
)
def test_the_schema_takes_what_the_loader_takes(path: str, field: FieldInfo, described: dict[str, Any]) -> None:
    """Key by key, round every bound; it may be milder only where text must be looked up."""
    loader = TypeAdapter(Annotated[field.annotation, field])
    looked_up = path.endswith(("url", "webhook", "timezone", "_schema"))
    is_switch = "yes or no" in load_reference()._type(field)
    for value in [*VALUES, *WORDS]:
        if isinstance(value, int | float) and isinstance(value, bool) != is_switch:
            continue  # the loader takes 1 for yes and yes for 1; nobody is offered that
        try:
            loader.validate_python(value, context={"environ": {}})
            taken = True
        except ValidationError:
            taken = False
        fits = jsonschema.Draft7Validator(described).is_valid(value)
        assert fits == taken or (looked_up and fits), f"{path}: {value!r} is {taken=}, {fits=}"
