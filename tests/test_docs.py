"""The documents say what the code does."""

import importlib.util
from pathlib import Path

from pydantic import BaseModel

from apprentice.confidence import trust_events
from apprentice.events.kinds import EventKind
from apprentice.settings.config import Settings

ROOT = Path(__file__).parents[1]


def load_reference(name: str = "reference"):  # type: ignore[no-untyped-def]  # a script, not a package
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_configuration_page_is_up_to_date() -> None:
    """docs/configuration.md is what docs/reference.py writes today."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == load_reference().render(), "run: python docs/reference.py"


def test_every_key_is_explained() -> None:
    """A key without a meaning is a key nobody can use."""
    sections: list[tuple[str, type[BaseModel]]] = list(load_reference().sections(Settings))
    silent = [
        f"{path}.{name}"
        for path, model in sections
        for name, field in model.model_fields.items()
        if not field.description and not field.exclude and not load_reference()._models(field.annotation)
    ]
    assert silent == []


def test_the_page_on_alerts_is_up_to_date() -> None:
    """docs/alerts.md has every kind of event, as the code has it."""
    page = (ROOT / "docs" / "alerts.md").read_text()
    assert page == load_reference("alerts").render(), "run: python docs/alerts.py"


def test_whatever_is_grave_has_a_remedy() -> None:
    """Who is woken is told what to do."""
    assert [kind for kind in EventKind if kind.level != "info" and not kind.remedy] == []


def test_every_kind_of_event_is_emitted_somewhere() -> None:
    """The list holds no kind that cannot happen, and what trust tells is in it."""
    text = "".join(
        p.read_text() for room in ("apprentice", "flows") for p in (ROOT / room).rglob("*.py") if p.name != "kinds.py"
    )
    assert [k for k in EventKind if f"EventKind.{k.name}" not in text and f'"{k.value}"' not in text] == []
    assert {kind.value for kind in trust_events.EventKind} <= {kind.value for kind in EventKind}
