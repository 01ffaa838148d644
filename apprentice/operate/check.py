"""`apprentice check`: what start-up and the first training would need, tried before it costs anything.

Every finding is "ok", a "problem", or "not tried", with the reason. Nothing is written, no model is loaded and no
vendor is asked: what only a paid call could tell is said to be not tried. Servers of one's own are asked whether they
are there, with a few seconds' patience.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from apprentice.errors import ApprenticeError, ConfigError, MissingExtra
from apprentice.registry import DECAY, ENGINES, EVALUATORS, KINDS, PROVIDERS, SINKS, TRAINERS, Plugin, Registry
from apprentice.settings.config import Settings, TaskSettings

__all__ = ["Finding", "findings", "sqlite_path"]

type State = Literal["ok", "problem", "not tried"]

_PATIENCE_S = 3.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: the part of the configuration, and what was found."""

    state: State
    part: str
    detail: str


def findings(settings: Settings, environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Look at everything, one part after the other; what a part raises is its own problem."""
    for part, look in _parts(settings, environ):
        try:
            yield from look()
        except ConfigError as error:
            for problem in error.problems:
                yield Finding("problem", problem.path or part, f"{problem.message} {problem.remedy}".strip())
        except ApprenticeError as error:
            yield Finding("problem", part, str(error))
        except Exception as error:  # noqa: BLE001  # a function of the user's own may raise anything when imported
            yield Finding("problem", part, f"{type(error).__name__}: {error}")


type _Look = Callable[[], Iterator[Finding]]


def _parts(settings: Settings, environ: Mapping[str, str]) -> Iterator[tuple[str, _Look]]:
    yield "remote", partial(_remote, settings, environ)
    for task in settings.tasks:
        yield f"{task.name}.evaluator", partial(_evaluator, task)
        if task.redact:
            yield f"{task.name}.redact", partial(_redact, task)
        yield f"{task.name}.output_schema", partial(_vendors_limits, settings, task)
    yield "sampling.decay_function", partial(_decay, settings)
    yield "store", partial(_store, settings)
    yield "local.backend", partial(_engine, settings)
    yield "local.base_model", partial(_base_model, settings)
    yield "local.encoder", partial(_encoder, settings)
    yield "local.fine_tune_backend", partial(_trainer, settings, environ)
    yield "tracking", partial(_tracking, settings)
    for name in settings.alerts.sinks:
        yield f"alerts.sinks.{name}", partial(_sink, name)
    yield "packages", _packages
    if settings.alerts.webhook:
        yield "alerts.webhook", lambda: iter([Finding("not tried", "alerts.webhook", "a post would be an alert")])


def _remote(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    from apprentice.assembly import check_remote

    check_remote(settings, environ)
    for i, provider in enumerate(settings.remote.providers):
        part = f"remote.additional_providers[{i - 1}]" if i else "remote"
        its = "its key is set and its price known" if provider.api_key_env else "its price is known"
        yield Finding("ok", part, f"{provider.provider} {provider.model}{_from(PROVIDERS, provider.provider)}: {its}")
    yield Finding("not tried", "remote", "whether the key is accepted: asking costs money")


def _evaluator(task: TaskSettings) -> Iterator[Finding]:
    from apprentice.request.judge import evaluator_of

    evaluator_of(task)
    detail = task.evaluator_function if task.evaluator == "custom" else task.evaluator
    yield Finding("ok", f"{task.name}.evaluator", f"{detail}{_from(EVALUATORS, task.evaluator)}")


def _redact(task: TaskSettings) -> Iterator[Finding]:
    part, target = f"{task.name}.redact", str(task.redact)
    function = _imported(target)
    problem = _cannot_take(function, {})
    yield Finding("problem", part, f"{target} {problem}") if problem else Finding("ok", part, target)


def _decay(settings: Settings) -> Iterator[Finding]:
    from apprentice.confidence.sampling import as_text, tabulate

    name, floor = settings.sampling.decay_function, settings.sampling.min_floor
    options = as_text(settings.sampling.decay_options)
    for trigger in {task.confidence_thresholds.coaching_trigger for task in settings.tasks}:
        tabulate(name, trigger=trigger, floor=floor, options=options)
    yield Finding("ok", "sampling.decay_function", name if ":" in name else f"{name}{_from(DECAY, name)}")


def _sink(name: str) -> Iterator[Finding]:
    yield Finding("not tried", f"alerts.sinks.{name}", f"{name}{_from(SINKS, name)}: what it sends would be an alert")


def _packages() -> Iterator[Finding]:
    """Names that other packages bring for nothing, because we have a thing of that name."""
    for kind in KINDS:
        for sentence in kind.shadowed():
            yield Finding("ok", kind.key, sentence)


def _from(kind: Registry, name: str) -> str:
    """Whose thing it is, where it is not ours."""
    found = kind.find(name)
    return "" if found.is_ours else f" (from {found.package})"


def _vendors_limits(settings: Settings, task: TaskSettings) -> Iterator[Finding]:
    document, part = task.output_schema.json_schema, f"{task.name}.output_schema"
    for name in dict.fromkeys(provider.provider for provider in settings.remote.providers):
        vendor = PROVIDERS.find(name).made
        listed, most = _enum_values(document), vendor.most_enum_values
        if vendor.dialect(document) is None:
            yield Finding(
                "ok", part, f"{name} cannot enforce it (free-form fields, or keywords it lacks): checked here"
            )
        elif most is not None and listed > most:
            yield Finding("ok", part, f"{name} may refuse to enforce {listed} enum values: then they are checked here")
        else:
            yield Finding("ok", part, f"{name} enforces it")


def _enum_values(node: Any) -> int:
    if isinstance(node, list):
        return sum(map(_enum_values, node))
    if not isinstance(node, Mapping):
        return 0
    own = len(node["enum"]) if isinstance(node.get("enum"), list) else 0
    return own + sum(_enum_values(inner) for key, inner in node.items() if key != "enum")


def _store(settings: Settings) -> Iterator[Finding]:
    url = settings.store_url
    scheme = url.partition(":")[0].partition("+")[0]
    if scheme == "sqlite":
        yield _sqlite_file(url, "store")
    elif scheme == "postgresql":
        yield _postgres(url)
    else:
        detail = f"{scheme or 'this'!r} is not supported. Write sqlite:///apprentice.db or postgresql://USER@HOST/NAME."
        yield Finding("problem", "store", detail)


def _sqlite_file(url: str, part: str) -> Finding:
    path = sqlite_path(url)
    if path is None:
        return Finding("ok", part, "in memory: it is gone when the process ends")
    folder = path.parent
    if not folder.is_dir():
        return Finding("problem", part, f"its folder {folder} does not exist. Make it, or correct the path.")
    if not os.access(path if path.exists() else folder, os.W_OK):
        return Finding("problem", part, f"{path} cannot be written. Give this user the right to.")
    return Finding("ok", part, f"{path}" if path.exists() else f"{path}, made at the first start")


def sqlite_path(url: str) -> Path | None:
    """The file behind a SQLite URL; None for one in memory, and for other databases."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        return None
    name = parsed.database if parsed.get_backend_name() == "sqlite" else None
    return Path(name) if name and name != ":memory:" else None


def _postgres(url: str) -> Finding:
    try:
        import psycopg
    except ImportError:
        return Finding("problem", "store", str(MissingExtra("a PostgreSQL store", "postgres")))
    from apprentice.secrets import scrub

    try:
        with psycopg.connect(f"postgresql:{url.partition(':')[2]}", connect_timeout=int(_PATIENCE_S)) as connection:
            connection.execute("SELECT 1")
    except psycopg.Error as error:
        return Finding("problem", "store", scrub(f"PostgreSQL cannot be reached: {str(error).strip()}"))
    return Finding("ok", "store", "PostgreSQL answers")


def _engine(settings: Settings) -> Iterator[Finding]:
    local = settings.local
    part = "local.backend"
    engine = ENGINES.find(local.backend).made
    name = f"{local.backend}{_from(ENGINES, local.backend)}"
    url = local.url or engine.default_url
    if engine.is_paid:
        yield Finding("not tried", part, f"{name}: the vendor is asked for the first time when a version is served")
        return
    if url is None:
        _need(engine, f"{part}: {name}")
        yield Finding("ok", part, f"{name}: what it needs is installed")
        return
    why = _no_answer(url)
    if why:
        remedy = "Start it, or correct local.url; until then the remote answers everything."
        yield Finding("problem", part, f"{name} at {url} does not answer ({why}). {remedy}")
    else:
        yield Finding("ok", part, f"{name} answers at {url}")


def _base_model(settings: Settings) -> Iterator[Finding]:
    local = settings.local
    name = local.training_model or local.base_model
    part = "local.training_model" if local.training_model else "local.base_model"
    if ENGINES.find(local.backend).made.keeps_models and not local.training_model:
        yield Finding("not tried", part, f"{name}: whether the server has it")
        return
    if not all(map(_is_there, ("transformers", "safetensors"))):
        yield Finding("not tried", part, f"{name}: what looks for it is not installed here")
        return
    from apprentice.local.base_model import resolve_base_model

    base = resolve_base_model(name, settings.root, dequantise=False)
    if base.kind == "hub":
        yield Finding("not tried", part, f"{name} on the Hugging Face hub: it is loaded when it is first needed")
    else:
        yield Finding("ok", part, f"{name} is there")


def _encoder(settings: Settings) -> Iterator[Finding]:
    from apprentice.student.halves import halves_wanted

    part, name = "local.encoder", settings.local.encoder
    wanting = [task.name for task in settings.tasks if halves_wanted(settings, task.name).head]
    if not wanting:
        return
    if not _is_there("sentence_transformers"):
        raise MissingExtra(f"the head of {', '.join(wanting)}", "head")
    from apprentice.student.encoder import encoder_place

    if encoder_place(name, settings.root) == name:
        yield Finding("not tried", part, f"{name} on the Hugging Face hub: it is loaded when it is first needed")
    else:
        yield Finding("ok", part, f"{name} is there, for the head of {', '.join(wanting)}")


def _trainer(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    backend, part = settings.local.fine_tune_backend, "local.fine_tune_backend"
    if not _is_there("flows"):
        yield Finding("not tried", part, f"{backend}: no flows/ here, so training runs elsewhere")
        return
    trainer = TRAINERS.find(backend).made
    _need(trainer, f"{part}: {backend}")
    missing = [name for name in ("prefect", "mlflow", "datasketch") if not _is_there(name)]
    if missing:
        raise MissingExtra(f"training ({', '.join(missing)})", "flows")
    unset = [name for name in trainer.environment if not environ.get(name, "").strip()]
    for name in unset:
        yield Finding("problem", part, f"{backend} needs the key in {name}. Run: export {name}=...")
    if not unset:
        yield Finding("ok", part, f"{backend}{_from(TRAINERS, backend)}: what it needs is installed")


def _need(made: type[Plugin], what: str) -> None:
    missing = [name for name in made.packages if not _is_there(name)]
    if missing and made.extra:
        raise MissingExtra(f"{what} ({', '.join(missing)})", made.extra)
    if missing:
        raise ApprenticeError(f"{what} needs {', '.join(missing)}, which cannot be imported here. Install that.")


def _tracking(settings: Settings) -> Iterator[Finding]:
    uri = settings.tracking_uri
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https"):
        why = _no_answer(uri.rstrip("/") + "/health")
        if why:
            from apprentice.secrets import scrub

            detail = scrub(f"MLflow at {uri} does not answer ({why}). Start it, or correct tracking.uri.")
            yield Finding("problem", "tracking.uri", detail)
        else:
            yield Finding("ok", "tracking.uri", "MLflow answers")
    elif scheme.partition("+")[0] == "sqlite":
        yield _sqlite_file(uri, "tracking.uri")
    else:
        yield Finding("not tried", "tracking.uri", f"a URI of the kind {scheme or 'file'}")


def _no_answer(url: str) -> str:
    """Why a server of one's own does not answer; "" if it does, whatever it says."""
    import httpx

    try:
        httpx.get(url, timeout=_PATIENCE_S)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return str(error) or type(error).__name__
    return ""


def _imported(target: str) -> Any:
    module, _, name = target.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ApprenticeError(f"{target} cannot be imported ({error}); run where it can, or set PYTHONPATH") from None


def _cannot_take(function: Any, *arguments: Any) -> str:
    """Why a function cannot be called with these arguments; "" if it can."""
    if not callable(function):
        return f"is a {type(function).__name__}, not a function"
    if inspect.iscoroutinefunction(function):
        return "is async; it must be a plain function"
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        return f"cannot be called with one input: {error}"
    except ValueError:  # a builtin without a signature
        return ""
    return ""


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False
