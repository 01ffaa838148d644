"""apprentice.yaml -> frozen settings.

The file is the only thing a user has to write. Loading it validates everything at once: each problem is reported with
its YAML path and line, the value at fault and a remedy, and an unknown key with the nearest known one. Every key that
is not in the file has a default, documented on its field here and in docs/configuration.md.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema

from apprentice.errors import ConfigError, Problem
from apprentice.registry import DECAY, ENGINES, EVALUATORS, PROVIDERS, SINKS, TRAINERS, Found, Registry, RegistryError
from apprentice.schemas.json_values import InvalidValue
from apprentice.schemas.schema import Schema, parse_schema
from apprentice.secrets import register, register_environment, register_url, scrub_values
from apprentice.settings.yaml_file import line_of, read_yaml

__all__ = [
    "BudgetSettings",
    "LocalSettings",
    "Named",
    "ProviderSettings",
    "RemoteSettings",
    "SamplingSettings",
    "Settings",
    "StudentSettings",
    "TaskSettings",
    "Thresholds",
    "TrainingSettings",
    "load_settings",
    "read_key",
    "require_key",
]


def _module_function(value: str) -> str:
    module, _, function = value.partition(":")
    if not (module and function and all(part.isidentifier() for part in (*module.split("."), function))):
        raise ValueError("write module:function")
    return value


def _a_zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (KeyError, ValueError, OSError):
        raise ValueError("no such time zone; use a name such as UTC or Europe/Berlin") from None
    return value


_REFERENCE = re.compile(r"\$\{([^}]*)\}")


def _from_environment(value: object, info: ValidationInfo) -> object:
    """``${NAME}`` stands for an environment variable: a password has no place in a file."""
    if not isinstance(value, str):
        return value
    environ: Mapping[str, str] = (info.context or {}).get("environ", os.environ)

    def held(found: re.Match[str]) -> str:
        if found[1] not in environ:
            raise ValueError(f"names ${{{found[1]}}}, which is not set in the environment; run: export {found[1]}=...")
        return environ[found[1]]

    return _REFERENCE.sub(held, value)


def _a_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        sound = False
    if not sound or any(c.isspace() or ord(c) < 32 for c in value):
        raise ValueError("is no URL; write http://HOST:PORT or https://HOST and a path")
    return value


def _a_schema(value: object) -> Schema:
    return value if isinstance(value, Schema) else parse_schema(value)


@dataclass(frozen=True, slots=True)
class Named:
    """A name that a registry knows, ours or another package's; ``or_function``: or module:function."""

    registry: Registry
    or_function: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(self._known, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        if not self.registry.is_here:
            return {"type": "string"}
        names: dict[str, Any] = {"enum": self.registry.known(), "type": "string"}
        return {"anyOf": [names, _FUNCTION]} if self.or_function else names

    def _known(self, name: str) -> str:
        if self.or_function and ":" in name:
            return _module_function(name)
        if self.registry.is_here and name not in self.registry.built_in:
            _found(self.registry, name)
        return name


def _found(registry: Registry, name: str) -> Found:
    try:
        return registry.find(name)
    except RegistryError as error:
        raise InvalidValue(error.problems) from None


def _fits(registry: Registry, name: str, given: Mapping[str, Any], key: str) -> None:
    """Check a thing's own options; one of ours that is given none need not be imported for it."""
    if not given and (name in registry.built_in or not registry.is_here):
        return
    try:
        registry.options(registry.find(name), given, key)
    except RegistryError as error:
        raise InvalidValue(error.problems) from None


_FUNCTION = {"type": "string", "pattern": r"^[^\s:.]+(\.[^\s:.]+)*:[^\s:.]+$"}
Fraction = Annotated[float, Field(ge=0, le=1)]
Correlation = Annotated[float, Field(ge=-1, le=1)]
# the ledger counts in billionths of a dollar, in 64 bits
Money = Annotated[
    Decimal,
    BeforeValidator(lambda v: str(v) if isinstance(v, float) else v),
    Field(ge=0, le=1_000_000_000),
    WithJsonSchema({"type": "number", "minimum": 0, "maximum": 1_000_000_000}),
]
FromEnvironment = Annotated[str, BeforeValidator(_from_environment)]
Url = Annotated[FromEnvironment, AfterValidator(_a_url)]
ModuleFunction = Annotated[
    str,
    AfterValidator(_module_function),
    WithJsonSchema(_FUNCTION),
]
Options = Mapping[str, Any]
TaskSchema = Annotated[
    Schema,
    BeforeValidator(_a_schema),
    WithJsonSchema({"anyOf": [{"type": "object", "minProperties": 1}, {"type": "string", "pattern": ":"}]}),
]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        arbitrary_types_allowed=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        ignored_types=(cached_property,),
    )

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, scrub_values(value) if isinstance(value, str | dict) else value


class Thresholds(_Section):
    """When a task moves on, when it is coached, and when the remote takes over again."""

    phase1_to_phase2: int = Field(50, ge=1, description="examples before the first training run")
    phase2_to_phase3: Correlation = Field(
        0.85, description="correlation that a slice must be certified to reach to serve"
    )
    coaching_trigger: Correlation = Field(
        0.70,
        description="where the correlation is beyond doubt below it, every request is checked and retraining is due; "
        "docs/trust.md says what it stands for beside max_disagreement",
    )
    emergency_threshold: Correlation = Field(
        0.50,
        description="where the correlation is beyond doubt below it, the remote answers everything again; likewise",
    )
    max_disagreement: Fraction | None = Field(
        None, description="serve at most this share of disagreeing answers, instead of the correlation phase2_to_phase3"
    )
    max_disagreement_overall: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="let at most this share of all answers differ from the remote's, its own ones included; instead of "
        "phase2_to_phase3, or beside max_disagreement",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Thresholds:
        if not self.emergency_threshold <= self.coaching_trigger <= self.phase2_to_phase3:
            raise ValueError(
                f"must satisfy emergency_threshold <= coaching_trigger <= phase2_to_phase3, not "
                f"{self.emergency_threshold} <= {self.coaching_trigger} <= {self.phase2_to_phase3}"
            )
        served, overall = self.max_disagreement, self.max_disagreement_overall
        if served is not None and overall is not None and overall >= served:
            raise ValueError(
                f"max_disagreement_overall must be below max_disagreement, or it asks for nothing, not {overall} >= "
                f"{served}; leave one of them out, or lower max_disagreement_overall"
            )
        return self


class Caps(_Section):
    """Hard caps on what is spent; a cap left out does not exist."""

    daily: Money | None = Field(None, description="per calendar day")
    weekly: Money | None = Field(None, description="per calendar week")
    monthly: Money | None = Field(None, description="per calendar month")
    total: Money | None = Field(None, description="ever; it never resets")


class BudgetSettings(Caps):
    """Caps for all tasks together."""

    currency: Literal["USD"] = Field("USD", description="vendors bill in USD; other currencies are not converted")
    timezone: Annotated[str, AfterValidator(_a_zone)] = Field("UTC", description="whose midnight starts a day")
    week_start: Literal["monday", "sunday"] = Field("monday", description="first day of a week")


class StudentSettings(_Section):
    """The two halves of what learns: a head on a sentence encoder, refitted within seconds, and the LoRA adapter."""

    head: bool | None = Field(
        None, description="false switches it off; true asks for the extra `head`, which null uses where it is installed"
    )
    lora: bool = Field(True, description="whether adapters are trained")
    head_from: int = Field(60, ge=30, description="examples before the first head")
    refit_every: int = Field(20, ge=1, description="new examples before the head is fitted again")
    refit_growth: Annotated[float, Field(ge=0)] = Field(0.15, description="least growth of the corpus between refits")


class TaskStudent(_Section):
    """What a task has instead of ``local.student``; what is left out holds there."""

    head: bool | None = Field(None, description="whether this task has a head")
    lora: bool | None = Field(None, description="whether adapters are trained for this task")


class TaskSettings(_Section):
    """A named, schema'd kind of request."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,62}$", description="lower case, digits, underscores")
    description: str = Field(min_length=1, description="tells the remote what to do; the local model learns it")
    input_schema: TaskSchema = Field(description="what a request holds")
    output_schema: TaskSchema = Field(description="what an answer holds")
    instructions: str = Field("", description="more for the remote: rules, definitions, examples")
    evaluator: Annotated[str, Named(EVALUATORS)] = Field(
        "structured_match", description="how two answers are compared; docs/trust.md"
    )
    evaluator_options: Options = Field(default_factory=dict, description="the evaluator's own; docs/extending.md")
    match_fields: tuple[str, ...] = Field((), description="fields that structured_match compares; all when empty")
    field_weights: Mapping[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="of match_fields in structured_match; 1 each when empty"
    )
    numeric_tolerance: Annotated[float, Field(ge=0)] = Field(
        0.0, description="absolute, for numbers in structured_match"
    )
    ordered_lists: bool = Field(False, description="whether the order of a list matters in structured_match")
    evaluator_function: ModuleFunction | None = Field(None, description="module:function, for evaluator: custom")
    evaluator_model: str = Field("sentence-transformers/all-MiniLM-L6-v2", description="for semantic_similarity")
    confidence_thresholds: Thresholds = Field(default_factory=Thresholds)
    deferral: bool = Field(True, description="hand requests of low local confidence to the remote")
    min_coverage: Fraction = Field(0.10, description="smallest share of requests worth starting to serve")
    error_rate: Annotated[float, Field(gt=0, lt=1)] = Field(0.05, description="delta: chance of a wrong certificate")
    promotion: Literal["auto", "review"] = Field("auto", description="review: a person moves the alias champion")
    budget: Caps = Field(default_factory=Caps, description="this task's own caps, below the common ones")
    max_output_tokens: int = Field(1024, ge=16, description="ceiling of a remote answer; its worst case is reserved")
    student: TaskStudent = Field(default_factory=TaskStudent, description="overrides local.student")
    redact: ModuleFunction | None = Field(None, description="module:function(input) -> input, before training")

    @model_validator(mode="after")
    def _fields_exist(self) -> TaskSettings:
        problems = [
            Problem(place, f"{name!r} is no field of output_schema: {why}", remedy)
            for place, names in (("match_fields", self.match_fields), ("field_weights", tuple(self.field_weights)))
            for name in names
            for why, remedy in [self.output_schema.why_no_field(name)]
            if why
        ]
        problems += [
            Problem(f"field_weights.{name}", "is not among match_fields: it would weigh nothing.", "Add it there.")
            for name in self.field_weights
            if self.match_fields and name not in self.match_fields
        ]
        if problems:
            raise InvalidValue(problems)
        kind = _found(EVALUATORS, self.evaluator)
        try:
            EVALUATORS.options(kind, self.options_of(kind), "evaluator_options")
        except RegistryError as error:
            raise InvalidValue([self._placed(problem) for problem in error.problems]) from None
        return self

    def options_of(self, evaluator: Found) -> dict[str, Any]:
        """What an evaluator is made from: ``evaluator_options``, and this task's keys that its ``Options`` name."""
        named = evaluator.model.model_fields if evaluator.model else {}
        own = {key: getattr(self, key) for key in named if key in _EVALUATOR_KEYS}
        return {**{key: value for key, value in own.items() if value is not None}, **self.evaluator_options}

    def _placed(self, problem: Problem) -> Problem:
        """A problem of one of this task's own keys at that key."""
        key = problem.path.removeprefix("evaluator_options.")
        return replace(problem, path=key) if key.partition(".")[0] in _EVALUATOR_KEYS else problem


# The keys of a task that an evaluator's `Options` may name as fields of its own.
_EVALUATOR_KEYS = frozenset(
    {
        "evaluator_function", "evaluator_model", "field_weights", "match_fields", "numeric_tolerance", "ordered_lists"
    }
)  # fmt: skip


class ModelPrice(_Section):
    """What a model costs, in USD per million tokens; wins over the price list."""

    input: Money = Field(description="for a million input tokens")
    output: Money = Field(description="for a million output tokens")
    cached_input: Money | None = Field(None, description="for a million cached input tokens; as input when left out")

    @model_validator(mode="after")
    def _cached_is_cheaper(self) -> ModelPrice:
        if self.cached_input is not None and self.cached_input > self.input:
            raise ValueError(
                f"cached_input ({self.cached_input}) is above input ({self.input}), at which calls are reserved"
            )
        return self


class ProviderSettings(_Section):
    """One vendor's API and the model asked there."""

    provider: Annotated[str, Named(PROVIDERS)] = Field(description="whose API it is; docs/remote.md")
    options: Options = Field(default_factory=dict, description="the provider's own; docs/extending.md")
    model: str = Field(min_length=1, description="the model's name there")
    api_key_env: str = Field("", description="name of the environment variable that holds the key")
    base_url: Url | None = Field(None, description="another endpoint of the same protocol")
    api: Literal["chat_completions", "responses"] = Field("chat_completions", description="for provider: openai")
    structured_output: Literal["json_schema", "json_object", "none"] = Field(
        "json_schema", description="how the schema is asked for; a server that takes less is asked for less by itself"
    )
    price: ModelPrice | None = Field(None, description="wins over the price list")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="share of traffic when use: share")
    requests_per_minute: int | None = Field(None, ge=1, description="the vendor's limit; requests wait for it")
    tokens_per_minute: int | None = Field(None, ge=1, description="the vendor's limit, input and output together")
    max_concurrency: int = Field(64, ge=1, description="calls under way at once, per process")

    @model_validator(mode="after")
    def _reachable(self) -> ProviderSettings:
        for key in _found(PROVIDERS, self.provider).made.needs:
            if not getattr(self, key):
                meaning = ProviderSettings.model_fields[key].description
                raise ValueError(f"provider: {self.provider} needs {key}, the {str(meaning).removeprefix('another ')}")
        _fits(PROVIDERS, self.provider, self.options, "options")
        return self


class RemoteSettings(ProviderSettings):
    """The frontier API that teaches, and whom to ask when it fails."""

    additional_providers: tuple[ProviderSettings, ...] = Field((), description="see use")
    use: Literal["fallback", "share"] = Field(
        "fallback", description="share: spread requests over all providers by weight, for training diversity"
    )
    deadline_s: Annotated[float, Field(gt=0)] = Field(60.0, description="for one request, its retries included")
    max_retries: int = Field(4, ge=0, description="per provider, with growing pauses")
    repair: bool = Field(True, description="show the model its schema error once before giving up")

    @property
    def providers(self) -> tuple[ProviderSettings, ...]:
        """Every provider, the first one first."""
        return (self, *self.additional_providers)


class TrainingSettings(_Section):
    """How the local model is fine-tuned; None leaves the choice to the trainer, from the data and the hardware."""

    lora_rank: int | None = Field(None, ge=1, description="r of LoRA")
    lora_alpha: float | None = Field(None, gt=0, description="alpha of LoRA")
    target_modules: tuple[str, ...] | None = Field(None, description="layers that LoRA adapts")
    learning_rate: float | None = Field(None, gt=0, description="its peak")
    epochs: float | None = Field(None, gt=0, description="passes over the examples")
    batch_size: int | None = Field(None, ge=1, description="examples per step of the optimiser")
    max_length: int = Field(2048, ge=32, description="tokens of one example; longer ones are left out, and reported")
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="share of examples that no run ever trains on"
    )
    max_held_out: int = Field(2000, ge=20, description="held-out examples the gate answers, the newest first")
    seed: int = Field(0, description="of everything random in training")
    processes: int | None = Field(None, ge=1, description="that share each batch; by default one for each GPU")
    price: Money | None = Field(None, description="USD per million training tokens, where a vendor trains (openai)")


class LocalSettings(_Section):
    """The open-weight model that learns, the engine that runs it and the trainer that teaches it."""

    backend: Annotated[str, Named(ENGINES)] = Field("embedded", description="the engine; docs/engines.md")
    backend_options: Options = Field(default_factory=dict, description="the engine's own; docs/extending.md")
    base_model: str = Field(
        "HuggingFaceTB/SmolLM2-135M-Instruct", description="hub id, folder, GGUF file or engine tag"
    )
    training_model: str | None = Field(None, description="the same weights for the trainer, where base_model is a tag")
    url: Url | None = Field(None, description="of a running vllm, llama_cpp or ollama server, or of a hosted model")
    api_key_env: str = Field("OPENAI_API_KEY", description="variable that holds the key, for backend: hosted")
    fine_tune_backend: Annotated[str, Named(TRAINERS)] = Field(
        "huggingface", description="the trainer; docs/training.md"
    )
    fine_tune_options: Options = Field(default_factory=dict, description="the trainer's own; docs/extending.md")
    fine_tune_batch_size: int = Field(100, ge=1, description="new examples before another training run")
    fine_tune_growth: Annotated[float, Field(ge=0)] = Field(0.5, description="least growth of the corpus between runs")
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    encoder: str = Field(
        "sentence-transformers/all-MiniLM-L6-v2", min_length=1, description="of the head: hub id or folder"
    )
    student: StudentSettings = Field(default_factory=StudentSettings)
    model_dir: Path = Field(Path("./models/"), description="adapters, relative to apprentice.yaml")
    deadline_s: Annotated[float, Field(gt=0)] = Field(10.0, description="after which a local answer is not waited for")
    max_new_tokens: int = Field(512, ge=1, description="ceiling of a local answer")
    max_memory_mb: int | None = Field(None, ge=1, description="idle adapters are unloaded above it")
    cost_per_hour: Money = Field(Decimal(0), description="what the local machine costs; subtracted from savings")
    promotion_margin: Fraction = Field(0.01, description="how much worse than the champion a candidate may be, at most")

    @model_validator(mode="after")
    def _own_options(self) -> LocalSettings:
        _fits(ENGINES, self.backend, self.backend_options, "backend_options")
        if TRAINERS.is_here:  # a machine that only answers needs no trainer
            _fits(TRAINERS, self.fine_tune_backend, self.fine_tune_options, "fine_tune_options")
        return self


class SamplingSettings(_Section):
    """How often a served request is checked against the remote."""

    decay_function: Annotated[str, Named(DECAY, or_function=True)] = Field(
        "exponential",
        description="how the rate falls from coaching_trigger to a correlation of 1; or module:function",
    )
    decay_options: Options = Field(default_factory=dict, description="the decay function's own; docs/extending.md")
    min_floor: Annotated[float, Field(gt=0, le=1)] = Field(0.02, description="never check a smaller share of requests")
    max_bad_answers: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="let a fall of agreement cost at most this many bad answers, in expectation, until it is noticed; "
        "raises the floor to what that takes, see docs/trust.md",
    )
    campaigns: bool = Field(
        True,
        description="check more for a while where a wider slice, certified sooner, is expected to save more remote "
        "answers than that costs; see docs/trust.md",
    )
    window_size: int = Field(100, ge=20, description="comparisons in the rolling window")
    trend_sensitivity: Fraction = Field(0.05, description="fall within the window that raises the rate")
    max_fall: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="the rate falls by at most this per comparison, but at once when a campaign ends"
    )
    mean_time_to_false_alarm: int = Field(
        10_000, ge=100, description="comparisons between false alarms of drift, and likewise of coaching and emergency"
    )
    asked_twice: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.01,
        description="of the requests that the remote answers, the share that it is asked for once more, behind the "
        "caller's back, to learn how often it agrees with itself; never more than that, and 0 is never",
    )
    asked_again: Annotated[int, Field(ge=0, le=500)] = Field(
        40,
        description="stored inputs that the remote is asked again after an alarm, to tell a change of its own from one "
        "of the traffic or the local model; at least 20, and 0 is never",
    )

    @field_validator("asked_again")
    @classmethod
    def _enough_to_tell(cls, value: int) -> int:
        if 0 < value < 20:
            raise ValueError("fewer than 20 answers tell nothing: write 0, or at least 20")
        return value

    @model_validator(mode="after")
    def _own_options(self) -> SamplingSettings:
        if ":" not in self.decay_function:
            _fits(DECAY, self.decay_function, self.decay_options, "decay_options")
        elif self.decay_options:
            problem = Problem("decay_options", "are given for module:function, which takes none.", "Leave them out.")
            raise InvalidValue([problem])
        return self


class TrackingSettings(_Section):
    """Where training runs and model versions are recorded."""

    uri: FromEnvironment | None = Field(None, description="MLflow; default: a SQLite file beside apprentice.yaml")
    artifacts: FromEnvironment | None = Field(None, description="where MLflow keeps files, with the default uri")


class AlertSettings(_Section):
    """Who hears of alerts, besides the log and the store."""

    webhook: Url | None = Field(None, description="URL that gets each alert as a JSON POST; docs/alerts.md")
    level: Literal["info", "warning", "critical"] = Field(
        "warning", description="the least grave that is posted; an all-clear always is"
    )
    sinks: Mapping[str, Mapping[str, Any]] = Field(
        default_factory=dict, description="further sinks by name, each with its options; docs/extending.md"
    )

    @model_validator(mode="after")
    def _sinks_known(self) -> AlertSettings:
        for name, given in self.sinks.items():
            try:
                SINKS.options(SINKS.find(name), given, "")
            except RegistryError as error:
                places = [f"sinks.{name}" + (f".{one.path}" if one.path else "") for one in error.problems]
                problems = [replace(one, path=place) for one, place in zip(error.problems, places, strict=True)]
                raise InvalidValue(problems) from None
        return self


class Settings(_Section):
    """The whole of apprentice.yaml, checked. ``source`` is the file it came from; relative paths start beside it."""

    tasks: tuple[TaskSettings, ...] = Field(min_length=1, description="one for each kind of request")
    remote: RemoteSettings
    local: LocalSettings = Field(default_factory=LocalSettings)
    sampling: SamplingSettings = Field(default_factory=SamplingSettings)
    budget: BudgetSettings = Field(default_factory=BudgetSettings)
    store: FromEnvironment = Field("sqlite:///apprentice.db", description="SQLite file or PostgreSQL URL")
    tracking: TrackingSettings = Field(default_factory=TrackingSettings)
    alerts: AlertSettings = Field(default_factory=AlertSettings)
    source: Path = Field(Path("apprentice.yaml"), exclude=True)

    @field_validator("tasks")
    @classmethod
    def _unique(cls, tasks: tuple[TaskSettings, ...]) -> tuple[TaskSettings, ...]:
        names = [task.name for task in tasks]
        doubles = sorted({name for name in names if names.count(name) > 1})
        if doubles:
            raise ValueError(f"two tasks are named {doubles[0]!r}; give each its own name")
        return tasks

    @model_validator(mode="after")
    def _hide_secrets(self) -> Settings:
        register_url(self.alerts.webhook, whole=True)
        for text in (text for given in self.alerts.sinks.values() for text in given.values()):
            if isinstance(text, str) and "://" in text:
                register_url(text, whole=True)
        for url in (self.store, self.tracking.uri, self.tracking.artifacts, self.local.url):
            register_url(url)
        for provider in self.remote.providers:
            register_url(provider.base_url)
            register(os.environ.get(provider.api_key_env))
        register_environment(os.environ)
        return self

    def task(self, name: str) -> TaskSettings:
        """The task of that name. Raises `KeyError`."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, TaskSettings]:
        return {task.name: task for task in self.tasks}

    @property
    def root(self) -> Path:
        """The folder of apprentice.yaml, from which relative paths start."""
        return self.source.resolve().parent

    @property
    def model_dir(self) -> Path:
        """Where adapters lie, absolute."""
        return (self.root / self.local.model_dir).resolve()

    @property
    def store_url(self) -> str:
        """The store's URL, a relative SQLite path made absolute against the config's folder."""
        from sqlalchemy import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            url = make_url(self.store)
        except ArgumentError:
            return self.store  # whoever opens it says what is wrong with it
        if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
            return self.store
        return url.set(database=str(self.root / url.database)).render_as_string(hide_password=False)

    @property
    def tracking_uri(self) -> str:
        """MLflow's tracking URI."""
        if self.tracking.uri:
            return self.tracking.uri
        from sqlalchemy import URL

        # A folder may be called a%20b or a?b; as part of a URL that has to be written otherwise.
        return URL.create("sqlite", database=str(self.root / "mlflow.db")).render_as_string()

    @property
    def tracking_artifacts(self) -> str:
        """Where MLflow keeps files when it has no server of its own."""
        return self.tracking.artifacts or (self.root / "mlartifacts").as_uri()


def load_settings(path: str | Path = "apprentice.yaml", environ: Mapping[str, str] = os.environ) -> Settings:
    """Read and check a config file. Raises `ConfigError` with every problem in it.

    ``${NAME}`` in a URL, in ``store`` and in ``tracking`` stands for a variable of ``environ``.
    """
    source = Path(path)
    try:
        content = source.read_bytes()
    except OSError as error:
        problem = Problem(
            "file", f"cannot be read ({error.strerror}).", "Pass --config, or run where apprentice.yaml lies."
        )
        raise ConfigError(str(path), [problem]) from None
    try:
        document, node = read_yaml(content)
    except InvalidValue as error:
        raise ConfigError(str(path), error.problems) from None
    if not isinstance(document, dict):
        problem = Problem("file", "holds no mapping.", "See docs/configuration.md for one to begin with.")
        raise ConfigError(str(path), [problem])
    try:
        return Settings.model_validate({**document, "source": source}, context={"environ": environ})
    except ValidationError as error:
        # pydantic drops tasks that failed and then also complains that none are left
        errors = [e for e in error.errors() if not (e["type"] == "too_short" and document.get("tasks"))]
        problems = [p for e in errors for p in _explain(e, node)]
        raise ConfigError(str(path), sorted(problems, key=lambda p: p.line or 0)) from None


def _explain(error: Any, node: yaml.Node | None) -> list[Problem]:
    loc = [part for part in error["loc"] if not _is_union_tag(part)]
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".") or "file"
    line = line_of(node, loc)
    kind, value = error["type"], error.get("input")
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, InvalidValue):
        return [_within(path, loc, problem, node) for problem in cause.problems]
    if kind == "extra_forbidden":
        known = _known_keys(loc[:-1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.6)
        remedy = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(sorted(known))}."
        return [Problem(path, "is not a known key.", remedy, line)]
    if kind == "missing":
        return [Problem(path, "is missing.", "", line)]
    # an address may hold a password
    shown = "" if isinstance(value, dict | list | tuple) or loc[-1:][0] in _ADDRESSES else f"is {value!r}: "
    message = str(cause) if cause else _IN_YAML.get(kind, error["msg"])
    return [Problem(path, f"{shown}{message[:1].lower()}{message[1:]}.", "", line)]


# Types that a person who writes YAML does not know.
_IN_YAML = {
    "model_type": "must be a mapping, with a line for each key",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "mapping_type": "must be a mapping",
    "decimal_type": "must be a number",
    "decimal_parsing": "must be a number, without a currency or a unit",
    "float_parsing": "must be a number, without a unit",
    "int_parsing": "must be a whole number",
    "path_type": "must be a path",
}

_ADDRESSES = ("store", "uri", "artifacts", "webhook", "url", "base_url")


def _within(path: str, loc: list[Any], problem: Problem, node: yaml.Node | None) -> Problem:
    """A problem of a part, in a schema or a section, as one of the file."""
    inner = problem.path.removeprefix("schema").removeprefix(".")
    steps = [int(part) if part.isdecimal() else part for part in re.split(r"[.\[\]]+", inner) if part]
    place = f"{path}.{inner}" if inner and not inner.startswith("[") else path + inner
    return Problem(place, problem.message, problem.remedy, line_of(node, [*loc, *steps]))


def _is_union_tag(part: object) -> bool:
    """Pydantic puts the branch of a union into the location; a YAML path has no such step."""
    return isinstance(part, str) and (
        part.startswith(("literal[", "constrained-", "function-")) or part in ("str", "int")
    )


def _known_keys(loc: list[Any]) -> list[str]:
    """The keys of the section that a location points to."""
    model: type[BaseModel] = Settings
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return [key for key in model.model_fields if key != "source"]


def require_key(provider: ProviderSettings, environ: Mapping[str, str] = os.environ) -> str:
    """The API key that the provider's settings name, "" if they name none; see `read_key`."""
    return read_key(provider.api_key_env, environ, "remote.api_key_env") if provider.api_key_env else ""


def read_key(variable: str, environ: Mapping[str, str], place: str) -> str:
    """The key in an environment variable, without the white space around it; from now on no text shows it.

    ``place`` names the key of apprentice.yaml that asks for it. Raises `ConfigError`, which never holds the value, if
    the variable is not set or its value cannot be sent as a header.
    """
    value = environ.get(variable, "")
    register(value)
    key = value.strip()
    if not key:
        named = variable if _VARIABLE.fullmatch(variable) else "a variable"
        # What does not look like a variable's name may be the key itself.
        remedy = f"Run: export {named}=..." if named == variable else "Write the variable's name there, not the key."
        problem = Problem(place, f"names {named}, which is not set in the environment.", remedy)
    elif fault := _fault_of_key(key):
        problem = Problem(place, f"names {variable}, whose value {fault}.", f"Set {variable} to the key alone.")
    else:
        return key
    raise ConfigError("environment", [problem])


_VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|[A-Z]{1,24}")


def _fault_of_key(key: str) -> str:
    """Why a key cannot be sent in a header; "" if it can. Says nothing of the key itself."""
    if key[0] in "\"'`" or key[-1] in "\"'`":
        return "has quotes round it"
    if not key.isascii():
        return "holds a character that is not ASCII, such as a typographic quote"
    if any(c.isspace() for c in key):
        return "has white space in it"
    return "" if key.isprintable() else "holds a control character"
