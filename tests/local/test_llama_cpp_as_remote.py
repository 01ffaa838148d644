"""llama.cpp's real server as an `openai_compatible` remote: what it takes and sends is what the double takes and sends.

The model is random: under a schema it answers in it, and in prose, or any JSON, it never does.
"""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from apprentice import Apprentice, OutputError, RemoteRefused, Unavailable
from apprentice.local.engines import llama_cpp
from apprentice.settings.config import Settings

KEY = "key-of-the-server-0123456789"


@pytest.fixture(scope="module")
def address(tiny_folder: Path) -> Iterator[str]:
    """A server with the tiny model, which wants a key."""
    wanted: dict[str, Any] = {"model": str(tiny_folder / "tiny.gguf"), "slots": 1, "context": 512, "key": KEY}
    process, address = llama_cpp._start({**wanted, "threads": 1, "lora": None}, "tiny")
    yield address
    llama_cpp._end(process)


def client(address: str, folder: Path, key: str = KEY, **remote: Any) -> Apprentice:
    task = {
        "name": "mood",
        "description": "Name the mood.",
        "input_schema": {"text": "str"},
        "output_schema": {"label": "joy | fear"},
        "max_output_tokens": 120,  # the grammar allows for so much white space
    }
    section = {
        "provider": "openai_compatible",
        "model": "tiny",
        "base_url": f"{address}/v1",
        "api_key_env": "KEY",
        "price": {"input": "1", "output": "2"},
        "max_retries": 0,
        **remote,
    }
    document = {"tasks": [task], "remote": section, "source": folder / "apprentice.yaml"}
    return Apprentice.from_config(Settings.model_validate(document), environ={"KEY": key})


def ended(app: Apprentice) -> dict[str, int]:
    return {row.state: row.calls for row in app.parts.store.spend()}


def test_it_enforces_the_schema(address: str, tmp_path: Path) -> None:
    """The random model's answer fits at once, and its tokens are on the bill."""
    with client(address, tmp_path) as app:
        assert app.run("mood", {"text": "what a day"}).output["label"] in ("joy", "fear")
        assert ended(app) == {"settled": 1}
        assert sum(row.cost for row in app.parts.store.spend()) > Decimal(0)


@pytest.mark.parametrize("form", ["json_object", "none"])
def test_weaker_formats_are_taken(address: str, tmp_path: Path, form: str) -> None:
    """The server takes both. What a random model makes of them does not fit, or is not even text that it can parse."""
    says = r"does not fit|answered 500: server_error: The model produced"
    with (
        client(address, tmp_path, structured_output=form, repair=False) as app,
        pytest.raises((OutputError, Unavailable), match=says),
    ):
        app.run("mood", {"text": "what a day"})


def test_what_it_refuses_is_free(address: str, tmp_path: Path) -> None:
    """A wrong key, and an input beyond its context: its own words, no money, and not the key."""
    with client(address, tmp_path, key="another-key-0123456789") as app:
        with pytest.raises(RemoteRefused, match="401") as caught:
            app.run("mood", {"text": "what a day"})
        assert "another-key" not in str(caught.value)
        assert ended(app) == {"released": 1}
    with client(address, tmp_path / "b") as app:
        with pytest.raises(RemoteRefused, match=r"400.*context"):
            app.run("mood", {"text": "so long " * 5_000})
        assert ended(app) == {"released": 1}
