"""The documents say what the code does."""

import importlib.util
from pathlib import Path

from pydantic import BaseModel

from apprentice.config import Settings

ROOT = Path(__file__).parents[1]


def load_reference():  # type: ignore[no-untyped-def]  # a script, not a package
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
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
