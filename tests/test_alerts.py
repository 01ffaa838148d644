"""Alerts: in the store, in the log and at the webhook, once; and never at a request's expense."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from apprentice.alerts import QUIET_S, Alerts
from apprentice.store import Store
from tests.conftest import Webhook


@pytest.fixture
def store() -> Iterator[Store]:
    with Store.open("sqlite://") as store:
        yield store


def test_an_alert_is_told_everywhere_and_once(store: Store, webhook: Webhook, caplog: pytest.LogCaptureFixture) -> None:
    """Event, log line and post; the same again only after a while; another task's at once."""
    now = [1000.0]
    alerts = Alerts(store, lambda: now[0], webhook.url)
    for task in ("a", "a", "b"):
        alerts("drift", task, {"correlation": 0.4}, "critical")
    now[0] += QUIET_S
    alerts("drift", "a", {"correlation": 0.3}, "critical")
    alerts.close()
    told = [("a", 0.4), ("b", 0.4), ("a", 0.3)]
    assert sorted((p["task"], p["evidence"]["correlation"]) for p in webhook.posts) == sorted(told)
    assert {(p["kind"], p["level"]) for p in webhook.posts} == {("drift", "critical")}
    assert [(e.task, e.evidence["correlation"]) for e in store.events()] == told
    assert sum("drift" in record.message for record in caplog.records) == 3


def test_information_is_not_posted(store: Store, webhook: Webhook) -> None:
    """Nobody is woken for it; the store has it."""
    alerts = Alerts(store, lambda: 1000.0, webhook.url)
    alerts("phase", "a", {"to": 2}, "info")
    alerts.close()
    assert webhook.posts == []
    assert [e.kind for e in store.events("a")] == ["phase"]


@pytest.mark.parametrize("reachable", [True, False])
def test_a_webhook_that_fails_costs_nobody_anything(
    store: Store, webhook: Webhook, caplog: pytest.LogCaptureFixture, reachable: bool
) -> None:
    """An error, or no server at all: a warning in the log, and the event is there."""
    webhook.status = 500
    alerts = Alerts(store, lambda: 1000.0, webhook.url if reachable else "http://127.0.0.1:9/")
    with caplog.at_level(logging.WARNING):
        alerts("drift", "a", {})
        alerts.close()
    assert "webhook" in caplog.text
    assert [e.kind for e in store.events("a")] == ["drift"]
