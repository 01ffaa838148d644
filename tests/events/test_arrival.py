"""Alerts arrive: what a whole client, a coach and the commands tell gets to the webhook, once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from apprentice import ApprenticeError, secrets
from apprentice.secrets import Secrets
from apprentice.store.records import EventRecord
from apprentice.testing import FakeVendor
from flows.up import Member, _inherited
from flows.workshop import Workshop
from tests.conftest import Webhook, settings, truth


def test_one_exhausted_cap_is_one_alert(bench: Any, webhook: Webhook) -> None:
    """However many requests meet it, with a local model or without, the pager rings once."""
    at = bench(budget={"daily": "0.000001"}, alerts={"webhook": webhook.url})
    for _ in range(3):
        with pytest.raises(ApprenticeError):
            at.run()
    at.promote()
    for _ in range(3):
        assert at.run() == {"label": "fear"}
    at.client.close()
    assert [post["kind"] for post in webhook.posts] == ["budget_exhausted"]


def test_a_promotion_is_one_event_and_posted_if_asked_for(bench: Any, webhook: Webhook) -> None:
    """With its reason and its evidence; nobody has to remember to announce it."""
    at = bench(alerts={"webhook": webhook.url, "level": "info"})
    at.promote("v7", held_out=30)
    at.client.close()
    (post,) = [post for post in webhook.posts if post["kind"] == "promoted"]
    assert post["evidence"]["version"] == "v7"


def test_what_a_coach_commits_first_is_told_too(tmp_path: Path, webhook: Webhook) -> None:
    """An event may be the first thing that a process does."""
    vendor = FakeVendor("anthropic", truth)
    shop = Workshop.open(settings(tmp_path, vendor, alerts={"webhook": webhook.url}))
    shop.store.add_event(EventRecord("e", "mood", "unknown_champion", "warning", {}, 1.0))
    shop.close()
    assert [post["id"] for post in webhook.posts] == ["e"]


def test_the_servers_of_others_start_without_our_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """`apprentice up` keeps vendors' keys from Prefect and MLflow, and gives them to router and coach."""
    monkeypatch.setattr(secrets, "_process", Secrets())
    monkeypatch.setenv("ANTHROPIC_API_KEY", "opaque-0123456789")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "opaque-abcdefghij")
    inherited = {name: _inherited(Member(name, (), {}, None)) for name in ("prefect", "mlflow", "coach", "router")}
    assert [name for name, environ in inherited.items() if "ANTHROPIC_API_KEY" in environ] == ["coach", "router"]
    assert inherited["mlflow"]["MLFLOW_TRACKING_PASSWORD"] == "opaque-abcdefghij"
    assert all(environ["PATH"] == os.environ["PATH"] for environ in inherited.values())
