"""Every snippet of the README is run."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from apprentice import AsyncApprentice, load_settings
from apprentice.remote.transport import Sender
from apprentice.testing import FakeVendor
from serving.app import create_app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ANSWER = {"category": "billing", "priority": 2}


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVendor:
    """A folder with the shipped apprentice.yaml and a vendor behind it that answers every ticket alike."""
    vendor = FakeVendor("anthropic", lambda value: ANSWER)
    shutil.copy(ROOT / "apprentice.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANTHROPIC_API_KEY", vendor.key)
    return vendor


def test_the_python_snippet_prints_what_it_says(
    checkout: FakeVendor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The snippet runs as it stands, and its comment is the output."""
    by_checkout = httpx.Client(transport=checkout.transport())
    monkeypatch.setattr(Sender, "client", lambda self: by_checkout)
    (snippet,) = snippets("python")
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == str(ANSWER)
    assert f"# {ANSWER}" in snippet


@contextlib.contextmanager
def serving(vendor: FakeVendor) -> Iterator[int]:
    """`apprentice serve` on a free port, with the vendor for a remote."""

    def open_client() -> AsyncApprentice:
        client = httpx.Client(transport=vendor.transport())
        return AsyncApprentice.from_config(load_settings("apprentice.yaml"), http_client=client)

    listener = socket.create_server(("127.0.0.1", 0))
    port: int = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(create_app(open_client), log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="the snippet uses curl")
def test_the_http_snippet_gets_an_answer(checkout: FakeVendor) -> None:
    """The curl command of the README, against a server as `apprentice serve` starts it."""
    (snippet,) = snippets("bash")
    with serving(checkout) as port:
        command = snippet.strip().replace(":8000", f":{port}")
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    assert '"output":{"category":"billing","priority":2}' in done.stdout


def test_the_commands_and_links_exist() -> None:
    """`make` targets, `apprentice` commands and linked files that the README names are there."""
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    help_text = subprocess.run(
        [ROOT / ".venv" / "bin" / "apprentice", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for command in re.findall(r"`apprentice ([a-z]+)", README):
        assert re.search(rf"^  {command} ", help_text, flags=re.MULTILINE), command
