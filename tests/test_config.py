"""apprentice.yaml: what users write loads, and what is wrong is explained."""

from decimal import Decimal
from pathlib import Path

import pytest

from apprentice.config import Settings, load_settings, require_key
from apprentice.errors import ConfigError

ROOT = Path(__file__).parents[1]

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
    assert "'colour'" in found["tasks[0]"]
    assert "category, priority" in found["tasks[0]"]


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
