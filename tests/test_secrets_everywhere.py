"""Secrets are planted in every place of a configuration, everything fails, and all that was written is searched."""

from __future__ import annotations

import json
import logging
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from apprentice import Apprentice, ApprenticeError, AsyncApprentice, Settings, secrets
from apprentice.errors import EngineUnavailable
from apprentice.secrets import Secrets, child_environment
from apprentice.store import Store, VersionRecord
from apprentice.testing import FakeEngine, FakeVendor
from serving.app import create_app
from tests.conftest import Webhook, settings, truth

PLANTS = ("vendor_key", "second_key", "hook", "store_password", "tracking_password", "url_token", "openai_key")

# Letters that cannot be part of any word of a message.
secret_texts = st.text("0123456789abcdefXYZ", min_size=16, max_size=40)


class Planted:
    """A configuration with a secret in every place, the environment that goes with it, and all that came out."""

    def __init__(self, folder: Path, webhook: Webhook, values: Mapping[str, str]) -> None:
        self.values = values
        self.folder = folder
        self.webhook = webhook
        vendor = FakeVendor("openai", truth, key=values["vendor_key"])
        self.environ = {
            vendor.settings()["api_key_env"]: f"{values['vendor_key']}\n",
            "SECOND_KEY": values["second_key"],
            "OPENAI_API_KEY": values["openai_key"],
        }
        if vendor.settings()["api_key_env"] == "OPENAI_API_KEY":  # pragma: no cover  # the double's own choice
            del self.environ["OPENAI_API_KEY"]
        second = {
            "provider": "openai_compatible",
            "model": "m",
            "api_key_env": "SECOND_KEY",
            "base_url": f"http://gateway.example/v1?token={values['url_token']}",
            "price": {"input": 1, "output": 1},
        }
        self.settings: Settings = settings(
            folder,
            vendor,
            remote={**vendor.settings(max_retries=0, deadline_s=5.0), "additional_providers": [second]},
            store=f"sqlite:///store.db?password={values['store_password']}",
            tracking={"uri": f"http://me:{values['tracking_password']}@mlflow.example/"},
            alerts={"webhook": webhook.url.replace("/alerts", f"/services/T0/{values['hook']}")},
        )
        for value in self.environ.values():
            secrets.register(value)

    def everything(self, *texts: str) -> str:
        """All that this run has written anywhere, with ``texts``."""
        files = [path.read_bytes().decode("latin-1") for path in self.folder.iterdir() if path.is_file()]
        posts = json.dumps(self.webhook.posts)
        return "\n".join([*files, posts, repr(self.settings), str(self.settings), *texts])

    def found_in(self, text: str) -> list[str]:
        return [name for name, value in self.values.items() if value in text]


@pytest.fixture
def own_register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_process", Secrets())


def quoting(kind: str, planted: Planted) -> Callable[[httpx.Request], httpx.Response]:
    """A vendor, or what stands before it, that fails and quotes what it knows: all of it, in its own words."""
    said = " ".join(planted.values.values())
    sent: list[str] = []

    def respond(request: httpx.Request) -> httpx.Response:
        sent.append(f"{request.headers} {request.url}")
        words = f"{said} {sent}"
        match kind:
            case "401":
                return httpx.Response(
                    401, json={"error": {"message": f"Incorrect API key provided: {words}", "type": words}}
                )
            case "400":
                return httpx.Response(400, text=words)
            case "500":
                return httpx.Response(500, json={"error": words}, headers={"x-request": "1"})
            case "redirect":
                return httpx.Response(302, headers={"location": f"https://elsewhere.example/?key={said[:40].strip()}"})
            case "illegal header":
                raise httpx.LocalProtocolError(
                    f"Illegal header value {request.headers['authorization'].encode()!r} {words}"
                )
            case "reset":
                raise httpx.ReadError(words) from OSError(104, words)
            case "unforeseen":
                raise RuntimeError(words) from ValueError(words.encode())
            case "prose":
                answer = {"choices": [{"message": {"content": words}, "finish_reason": "stop"}]}
                return httpx.Response(200, json={**answer, "usage": {"prompt_tokens": 1, "completion_tokens": 1}})
            case _:
                return httpx.Response(200, text=f"<html>{words}</html>")

    return respond


KINDS = ("401", "400", "500", "redirect", "illegal header", "reset", "unforeseen", "prose", "html")


@pytest.mark.usefixtures("own_register")
@pytest.mark.parametrize("kind", KINDS)
@effort(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.fixed_dictionaries(dict.fromkeys(PLANTS, secret_texts)).filter(lambda v: len(set(v.values())) == len(v))
)
def test_no_secret_leaves_a_client(
    tmp_path_factory: pytest.TempPathFactory,
    webhook: Webhook,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    values: Mapping[str, str],
) -> None:
    """Whatever a vendor says: not in an exception or its causes, the log, the store's file, the webhook, a repr."""
    planted = Planted(tmp_path_factory.mktemp("planted"), webhook, values)
    texts: list[str] = []
    caplog.clear()
    with (
        caplog.at_level(logging.DEBUG),
        Apprentice.from_config(
            planted.settings,
            http_client=httpx.Client(transport=httpx.MockTransport(quoting(kind, planted))),
            engine=FakeEngine(lambda version, value: truth(value)),
            environ=planted.environ,
        ) as client,
    ):
        for _ in range(2):
            with pytest.raises(ApprenticeError) as raised:
                client.run("mood", {"text": "a fear"})
            texts += traceback.format_exception(raised.value)
            texts.append(repr(raised.value))
        texts.append(repr(client.status()))
    texts += [logging.Formatter().format(record) for record in caplog.records]
    assert webhook.posts
    everything = planted.everything(*texts)
    assert planted.found_in(everything) == []


@pytest.mark.usefixtures("own_register")
@pytest.mark.parametrize("kind", KINDS)
def test_no_secret_is_in_an_answer_over_http(tmp_path: Path, webhook: Webhook, kind: str) -> None:
    """The caller of `apprentice serve` may be anybody."""
    planted = Planted(tmp_path, webhook, {name: f"{name}-0123456789abcdef" for name in PLANTS})

    def open_client() -> AsyncApprentice:
        return AsyncApprentice.from_config(
            planted.settings,
            http_client=httpx.Client(transport=httpx.MockTransport(quoting(kind, planted))),
            engine=FakeEngine(lambda version, value: truth(value)),
            environ=planted.environ,
        )

    with TestClient(create_app(open_client)) as client:
        answer = client.post("/v1/tasks/mood", json={"text": "a fear"})
        health = client.get("/healthz")
    assert answer.status_code >= 400
    assert planted.found_in(planted.everything(answer.text, str(answer.headers), health.text)) == []


@pytest.mark.usefixtures("own_register")
def test_no_secret_leaves_by_an_engine_or_a_training_run(
    tmp_path: Path, webhook: Webhook, caplog: pytest.LogCaptureFixture
) -> None:
    """Their servers quote headers and URLs too; a run's error is kept, shown and posted."""
    planted = Planted(tmp_path, webhook, {name: f"{name}-0123456789abcdef" for name in PLANTS})
    words = " ".join(planted.values.values())

    def fail(*_: Any) -> dict[str, Any]:
        raise EngineUnavailable(f"the engine does not answer ({words})") from ValueError(words)

    engine = FakeEngine(fail)
    vendor = FakeVendor("openai", truth, key=planted.values["vendor_key"])
    with (
        caplog.at_level(logging.DEBUG),
        Apprentice.from_config(
            planted.settings,
            http_client=httpx.Client(transport=vendor.transport()),
            engine=engine,
            environ=planted.environ,
        ) as client,
    ):
        store: Store = client.parts.store
        store.add_version(VersionRecord("v1", "mood", "candidate", "", "fake", 1, 1, "d", None, ""))
        client.parts.judge.promote("mood", "v1", [], reason=words)
        assert client.wait_until_serving("mood", timeout_s=10)
        client.run("mood", {"text": "a fear"})
        run = store.start_run("mood", 1, "due")
        store.update_run(run.id, state="failed", error=f"OpenAI answered 401: {words}")
        store.set_version_status("mood", "v1", "rejected", words)
    log = [logging.Formatter().format(record) for record in caplog.records]
    assert planted.found_in(planted.everything(*log)) == []


@pytest.mark.usefixtures("own_register")
def test_no_secret_is_in_a_child_processes_environment(
    tmp_path: Path, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading the configuration is enough to know them all."""
    planted = {name: f"{name}-0123456789abcdef" for name in PLANTS}
    for number, value in enumerate(planted.values()):
        monkeypatch.setenv(f"PLAIN_{number}", value)
    monkeypatch.setenv("OPENAI_API_KEY", planted["openai_key"])
    monkeypatch.setenv("SOME_VENDORS_TOKEN", "some-vendors-token-0123456789")
    Planted(tmp_path, webhook, planted)
    assert "some-vendors-token-0123456789" not in secrets.scrub("said: some-vendors-token-0123456789")
    inherited = json.dumps(child_environment(os.environ))
    assert [name for name, value in planted.items() if value in inherited] == []
    assert os.environ["PATH"] in child_environment(os.environ).values()
