"""apprentice.yaml: what users write loads, and what is wrong is explained."""

import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from apprentice.errors import ConfigError
from apprentice.request.judge import trust_settings
from apprentice.settings.config import Settings, TaskSettings, Thresholds, load_settings, require_key

ROOT = Path(__file__).parents[2]

# The configuration that the first user wrote, every key of it.
USER_CONFIG = """\
tasks:
  - name: classify_ticket
    description: "Classify support tickets by category and priority"
    input_schema: {text: str, metadata: dict}
    output_schema: {category: str, priority: int, confidence: float}
    evaluator: structured_match
    match_fields: [category, priority]
    confidence_thresholds:
      phase1_to_phase2: 50
      phase2_to_phase3: 0.85
      coaching_trigger: 0.70
      emergency_threshold: 0.50
  - name: extract_entities
    description: "Extract named entities from property descriptions"
    input_schema: {text: str}
    output_schema: {entities: list}
    evaluator: structured_match
    match_fields: [entities]
    confidence_thresholds:
      phase1_to_phase2: 50
      phase2_to_phase3: 0.85
      coaching_trigger: 0.70
      emergency_threshold: 0.50
remote:
  provider: anthropic
  model: claude-sonnet-4-5-20250929
  api_key_env: ANTHROPIC_API_KEY
  additional_providers:
    - provider: openai
      model: gpt-4o
      api_key_env: OPENAI_API_KEY
local:
  backend: ollama
  base_model: llama3.1:8b
  fine_tune_backend: unsloth
  fine_tune_batch_size: 100
  model_dir: ./models/
sampling:
  decay_function: exponential
  min_floor: 0.02
  window_size: 100
  trend_sensitivity: 0.05
budget:
  daily: 10.00
  weekly: 50.00
  monthly: 150.00
  currency: USD
"""


def load(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "apprentice.yaml"
    path.write_text(text)
    return load_settings(path)


def problems_of(tmp_path: Path, text: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return {p.path: str(p) for p in caught.value.problems}


def test_the_users_own_configuration_loads_unchanged(tmp_path: Path) -> None:
    """Every key that the user wrote arrives with its value."""
    settings = load(tmp_path, USER_CONFIG)
    ticket = settings.task("classify_ticket")
    assert ticket.output_schema.fields == ("category", "priority", "confidence")
    assert ticket.confidence_thresholds.phase2_to_phase3 == 0.85
    assert [p.model for p in settings.remote.providers] == ["claude-sonnet-4-5-20250929", "gpt-4o"]
    assert settings.local.fine_tune_backend == "unsloth"
    assert settings.model_dir == tmp_path / "models"
    assert settings.sampling.trend_sensitivity == 0.05
    assert settings.budget.daily == Decimal(10)


@pytest.mark.parametrize("name", ["apprentice.yaml", "benchmarks/isear.yaml"])
def test_every_shipped_configuration_loads(name: str) -> None:
    """What we ship must load."""
    assert load_settings(ROOT / name).tasks


def test_every_mistake_is_reported_at_once_with_line_value_and_remedy(tmp_path: Path) -> None:
    """A file with seven mistakes gives seven problems, each at its line."""
    text = """\
tasks:
  - name: Classify
    description: x
    input_schema: {text: strr}
    output_schema: {category: str}
    match_fields: [cat]
    evaluatr: exact_match
    confidence_thresholds: {phase1_to_phase2: many}
remote: {provider: anthropc, model: m, api_key_env: X}
sampling: {min_flor: 0.1}
budget: {daily: -1, timezone: Mars}
"""
    found = problems_of(tmp_path, text)
    assert set(found) == {
        "tasks[0].name",
        "tasks[0].input_schema.text",
        "tasks[0].evaluatr",
        "tasks[0].confidence_thresholds.phase1_to_phase2",
        "remote.provider",
        "sampling.min_flor",
        "budget.daily",
        "budget.timezone",
    }
    assert "(line 4)" in found["tasks[0].input_schema.text"]
    assert "'strr'" in found["tasks[0].input_schema.text"]
    assert "Did you mean 'evaluator'?" in found["tasks[0].evaluatr"]
    assert "Did you mean 'min_floor'?" in found["sampling.min_flor"]
    assert "(line 11)" in found["budget.timezone"]


def test_fields_that_do_not_exist_are_named(tmp_path: Path) -> None:
    """match_fields must be fields of the output."""
    found = problems_of(tmp_path, USER_CONFIG.replace("match_fields: [category, priority]", "match_fields: [colour]"))
    assert "'colour'" in found["tasks[0].match_fields"]
    assert "category, priority" in found["tasks[0].match_fields"]
    assert "(line 7)" in found["tasks[0].match_fields"]


NESTED = """\
tasks:
  - name: invoice
    description: x
    input_schema: {text: str}
    output_schema:
      supplier: {name: str, city: str}
      place?: {zip: str}
      lines: [{label: str, price: float}]
      codes: list[str]
      meta: dict
    match_fields: MATCH
remote: {provider: anthropic, model: m, api_key_env: X}
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("supplier.nmae", "'supplier' has name, city, and no 'nmae'. Did you mean 'supplier.name'?"),
        ("suplier.name", "Did you mean 'supplier'?"),
        ("place.zap", "'place' has zip, and no 'zap'. Did you mean 'place.zip'?"),
        ("lines.label", "'lines' is a list. Compare it whole, or one item of it: lines.0"),
        ("lines.0.lable", "'lines.0' has label, price, and no 'lable'. Did you mean 'lines.0.label'?"),
        ("codes.first", "'codes' is a list"),
        ("supplier.name.first", "'supplier.name' has no fields, and no 'first'"),
    ],
)
def test_a_field_that_is_not_in_the_schema_is_named_at_every_level(tmp_path: Path, name: str, says: str) -> None:
    """A field that both answers lack is equal in both: a typo would score 1.0 on everything."""
    assert says in problems_of(tmp_path, NESTED.replace("MATCH", f"[{name}]"))["tasks[0].match_fields"]


@pytest.mark.parametrize(
    "name", ["supplier", "supplier.name", "place.zip", "lines.0.label", "codes.0", "meta.any.thing"]
)
def test_a_field_that_may_be_there_is_taken(tmp_path: Path, name: str) -> None:
    """At every level, in optional objects, in items of lists; what a free-form object holds is not known."""
    assert load(tmp_path, NESTED.replace("MATCH", f"[{name}]")).task("invoice").match_fields == (name,)


def test_a_weight_of_a_field_that_is_not_compared_is_an_error(tmp_path: Path) -> None:
    """It would weigh nothing."""
    text = NESTED.replace("MATCH", "[supplier]\n    field_weights: {meta: 2, suplier: 1}")
    found = problems_of(tmp_path, text)
    assert "is not among match_fields" in found["tasks[0].field_weights.meta"]
    assert "Did you mean 'supplier'?" in found["tasks[0].field_weights"]


def test_thresholds_out_of_order_are_an_error(tmp_path: Path) -> None:
    """Coaching above graduation would coach a task that just graduated."""
    found = problems_of(tmp_path, USER_CONFIG.replace("coaching_trigger: 0.70", "coaching_trigger: 0.95", 1))
    assert "emergency_threshold <= coaching_trigger" in found["tasks[0].confidence_thresholds"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("tasks: [", "is not YAML"), ("just words", "holds no mapping"), ("remote: {}", "tasks")],
)
def test_a_file_that_is_no_configuration_says_so(tmp_path: Path, text: str, message: str) -> None:
    """Broken YAML, no mapping, no tasks: each has its own words."""
    assert any(message in p for p in problems_of(tmp_path, text).values()) or message in problems_of(tmp_path, text)


def test_a_missing_file_names_the_remedy(tmp_path: Path) -> None:
    """The commonest first mistake is to run elsewhere."""
    with pytest.raises(ConfigError, match="--config"):
        load_settings(tmp_path / "nowhere.yaml")


def test_two_tasks_of_one_name_are_an_error(tmp_path: Path) -> None:
    """A task's name is its identity."""
    found = problems_of(tmp_path, USER_CONFIG.replace("extract_entities", "classify_ticket"))
    assert "'classify_ticket'" in found["tasks"]


def test_a_missing_key_names_its_variable(tmp_path: Path) -> None:
    """The variable and the command that sets it, and of course no key."""
    settings = load(tmp_path, USER_CONFIG)
    with pytest.raises(ConfigError, match="export ANTHROPIC_API_KEY"):
        require_key(settings.remote, {})
    assert require_key(settings.remote, {"ANTHROPIC_API_KEY": "k"}) == "k"


def test_relative_paths_start_at_the_file(tmp_path: Path) -> None:
    """The store, the models and the tracking server lie beside the configuration, wherever the process runs."""
    settings = load(tmp_path, USER_CONFIG)
    assert settings.store_url == f"sqlite:///{tmp_path}/apprentice.db"
    assert settings.tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_a_variable_of_the_environment_may_stand_in_an_address(tmp_path: Path) -> None:
    """A password has no place in a file; one that is not set is named, and so is the command that sets it."""
    text = USER_CONFIG + "store: postgresql://me:${PGPASSWORD}@db/apprentice\nalerts: {webhook: 'https://${HOOK}/x'}\n"
    path = tmp_path / "apprentice.yaml"
    path.write_text(text)
    settings = load_settings(path, {"PGPASSWORD": "s3cret", "HOOK": "hooks.example"})
    assert settings.store == "postgresql://me:s3cret@db/apprentice"
    assert settings.alerts.webhook == "https://hooks.example/x"
    with pytest.raises(ConfigError) as caught:
        load_settings(path, {"PGPASSWORD": "s3cret"})
    assert "alerts.webhook (line" in str(caught.value)
    assert "${HOOK}, which is not set in the environment; run: export HOOK=" in str(caught.value)


@pytest.mark.parametrize(
    "url", ["nonsense", "ftp://x", "http:///x", "http://host:port", "https://exa mple", "http://[::1"]
)
def test_what_is_no_url_is_refused_without_being_shown(tmp_path: Path, url: str) -> None:
    """An address may hold a password, so the error names the key and not the value."""
    found = problems_of(tmp_path, USER_CONFIG + f"alerts: {{webhook: '{url}'}}\n")
    assert "write http://HOST:PORT" in found["alerts.webhook"]
    assert url not in found["alerts.webhook"]


def test_a_risk_budget_reaches_the_mathematics(tmp_path: Path) -> None:
    """`sampling.max_bad_answers` is one of the plain numbers; left out it is none, and 0 is refused."""
    found = {}
    for name, line in (("none", ""), ("some", "  max_bad_answers: 40\n")):
        settings = load(tmp_path, USER_CONFIG.replace("  min_floor: 0.02\n", f"  min_floor: 0.02\n{line}"))
        found[name] = trust_settings(settings, settings.tasks[0]).max_bad_answers
    assert found == {"none": None, "some": 40.0}
    refused = problems_of(tmp_path, USER_CONFIG.replace("min_floor: 0.02", "max_bad_answers: 0"))
    assert "sampling.max_bad_answers" in refused


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ("daily: 10.00", "daily: 10_000_000_000", "budget.daily"),
        ("daily: 10.00", "daily: .inf", "budget.daily"),
        ("min_floor: 0.02", "min_floor: nan", "sampling.min_floor"),
        ("model_dir: ./models/", "deadline_s: inf", "local.deadline_s"),
        ("model: gpt-4o", "model: gpt-4o\n      price: {input: 1, output: 2, cached_input: 3}",
         "remote.additional_providers[0].price"),
    ],
)  # fmt: skip
def test_numbers_that_nothing_can_count_with_are_refused(tmp_path: Path, old: str, new: str, path: str) -> None:
    """The ledger counts in 64 bits, and a call is reserved at the price of fresh input."""
    assert path in problems_of(tmp_path, USER_CONFIG.replace(old, new))


def _sections() -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    yield (), Settings
    yield ("tasks",), TaskSettings
    yield ("tasks", "confidence_thresholds"), Thresholds
    for name in ("remote", "local", "sampling", "budget", "tracking", "alerts"):
        annotation = Settings.model_fields[name].annotation
        assert annotation is not None
        yield (name,), annotation


@pytest.mark.parametrize(
    ("place", "section"), list(_sections()), ids=lambda it: ".".join(it) or "file" if isinstance(it, tuple) else ""
)
def test_a_value_of_another_kind_is_explained_in_words_of_yaml(
    tmp_path: Path, place: tuple[str, ...], section: type[BaseModel]
) -> None:
    """Whatever stands in the place of whatever: with its line, and without a word of Python's types."""
    for key in section.model_fields:
        for wrong in (None, "x y", 5.5, -1, True, [[]], {"a": {}}):
            document: Any = {
                "tasks": [
                    {"name": "mood", "description": "d", "input_schema": {"t": "str"}, "output_schema": {"l": "a | b"}}
                ],
                "remote": {"provider": "openai", "model": "gpt-4o-mini", "api_key_env": "K"},
            }
            inner = document
            for step in place:
                inner = inner["tasks"][0] if step == "tasks" else inner.setdefault(step, {})
            inner[key] = wrong
            path = tmp_path / "apprentice.yaml"
            path.write_text(yaml.safe_dump(document))
            try:
                load_settings(path, {})
            except ConfigError as error:
                said = str(error)
                assert not re.search(r"dictionar|instance|tuple|class|pathlib|decimal|Settings\b", said), said
                assert "(line " in said, said


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ("max_disagreement_overall: 0", "greater than 0"),
        ("max_disagreement_overall: 1", "less than 1"),
        ("{max_disagreement: 0.1, max_disagreement_overall: 0.1}", "asks for nothing, not 0.1 >= 0.1"),
    ],
)
def test_an_overall_target_that_makes_no_sense_is_refused(tmp_path: Path, keys: str, problem: str):
    """Never reached, always reached, or implied by the other one."""
    lines = "".join(f"      {line.strip()}\n" for line in keys.strip("{}").split(","))
    told = problems_of(tmp_path, USER_CONFIG.replace("      phase1_to_phase2: 50\n", lines, 1))
    assert any(problem in text for text in told.values()), told
