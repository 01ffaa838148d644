"""What every room's tests share: a small configuration, a vendor and an engine that answer as told."""

from __future__ import annotations

import http.server
import json
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest

from apprentice import Apprentice, Settings
from apprentice.local.base_model import share_processors
from apprentice.store.records import ComparisonRecord, VersionRecord
from apprentice.testing import FakeEngine, FakeVendor, Fault

# Before any test imports torch: its spinning threads make the suite many times slower on a machine that is shared.
share_processors()
# No test asserts on seconds, and so none has a deadline for its examples.
hypothesis.settings.register_profile("ours", deadline=None)
hypothesis.settings.load_profile("ours")

LABELS = ("joy", "fear", "anger")


def truth(value: Mapping[str, Any]) -> dict[str, Any]:
    """What the remote of these tests answers: the label that the text names, else joy."""
    return {"label": next((label for label in LABELS if label in value["text"]), "joy")}


@dataclass
class Workbench:
    """A client over a vendor and an engine that do as they are told. ``confidence`` is what the engine claims."""

    client: Apprentice
    vendor: FakeVendor
    engine: FakeEngine
    confidence: float = 0.9
    local: Callable[[Mapping[str, Any]], dict[str, Any]] = truth

    def run(self, text: str = "a fear") -> dict[str, Any]:
        return self.client.run("mood", {"text": text}).output

    @property
    def store(self) -> Any:
        """The client's store, with every event in it that was emitted."""
        self.client.parts.alerts.flush()
        return self.client.parts.store

    def counted(self) -> dict[str, int]:
        """Answers by outcome, those in memory included."""
        self.client.parts.tally.flush()
        totals: dict[str, int] = {}
        for row in self.store.counts("mood"):
            totals[row.outcome] = totals.get(row.outcome, 0) + row.n
        return totals

    def add_version(self, name: str, held_out: int = 0) -> None:
        """A version that waits to be promoted."""
        record = VersionRecord(
            name=name,
            task="mood",
            status="candidate",
            adapter="",
            base_model="fake",
            trained_on=100,
            held_out=held_out,
            data_digest=name,
            mlflow_version=None,
            reason="",
        )
        self.store.add_version(record)

    def told(self) -> set[str]:
        """The kinds of the events about this task or all of them, those on their way included."""
        assert self.client.parts.alerts.flush(30)
        return {event.kind for event in self.store.events()} - {"promoted", "certified", "phase"}

    def promote(
        self, name: str = "mood-v1", *, held_out: int = 0, right: float = 1.0, unsure: int = 0, wait: bool = True
    ) -> None:
        """Make a version the champion, after ``held_out`` comparisons of which the share ``right`` agreed.

        ``unsure`` of them, mixed among the others, come from answers of a low confidence, and half of those disagreed.
        """
        self.add_version(name, held_out)
        seed = self.seed(name, held_out, right, unsure)
        self.client.parts.judge.promote("mood", name, seed, reason="test")
        assert not wait or self.client.wait_until_serving("mood", timeout_s=10)

    @staticmethod
    def seed(name: str, held_out: int, right: float = 1.0, unsure: int = 0) -> list[ComparisonRecord]:
        """A version's comparisons on so many held-out examples; see `promote`."""
        seed = []
        for i in range(held_out):
            doubtful = unsure and i % (held_out // unsure) == 0
            agreed = i % 4 < 2 if doubtful else i < right * held_out
            remote = LABELS[i % 3]
            comparison = ComparisonRecord(
                id=f"{name}-{i}",
                task="mood",
                request_id=f"{name}-{i}",
                version=name,
                score=float(agreed),
                parts={},
                confidence=(0.2 if doubtful else 0.9) - 0.001 * (i % 7),
                local={"label": remote if agreed else LABELS[(i + 1) % 3]},
                remote={"label": remote},
                seeded=True,
                created_at=0.0,
            )
            seed.append(comparison)
        return seed


def settings(tmp_path: Path, vendor: FakeVendor, **more: Any) -> Settings:
    """A configuration with one task, ``mood``, its files under ``tmp_path``; ``more`` replaces or adds sections.

    The remote is asked nothing a second time unless ``sampling`` says so, so that its calls can be counted.
    """
    more["sampling"] = {"asked_twice": 0.0, "asked_again": 0, **more.get("sampling", {})}
    document: dict[str, Any] = {
        "tasks": [
            {
                "name": "mood",
                "description": "Name the mood.",
                "input_schema": {"text": "str"},
                "output_schema": {"label": " | ".join(LABELS)},
                "evaluator": "exact_match",
                "confidence_thresholds": {"phase1_to_phase2": 10},
            }
        ],
        "remote": vendor.settings(max_retries=1, deadline_s=5.0),
        "source": tmp_path / "apprentice.yaml",
    }
    return Settings.model_validate({**document, **more})


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Workbench]]:
    """Make workbenches: ``bench(faults=[...], budget={...})``. Each is closed at the end of the test."""
    opened: list[Workbench] = []

    def make(
        *, faults: list[Fault | None] | None = None, clock: Callable[[], float] | None = None, **more: Any
    ) -> Workbench:
        vendor = FakeVendor("anthropic", truth, faults=faults or [])
        engine = FakeEngine(lambda version, value: (workbench.local(value), workbench.confidence))
        client = Apprentice.from_config(
            settings(tmp_path, vendor, **more),
            http_client=httpx.Client(transport=vendor.transport()),
            engine=engine,
            environ=vendor.environ,
            draw=random.Random(7),
            **({"clock": clock} if clock else {}),
        )
        workbench = Workbench(client, vendor, engine)
        opened.append(workbench)
        return workbench

    yield make
    for workbench in opened:
        workbench.client.close()


@dataclass
class Webhook:
    """A server that keeps what is posted to it, and answers ``status``."""

    url: str
    posts: list[dict[str, Any]] = field(default_factory=list)
    status: int = 204


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    """A webhook on a real socket."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["content-type"] == "application/json"
            hook.posts.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(hook.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hook = Webhook(f"http://127.0.0.1:{server.server_port}/alerts")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hook
        server.shutdown()
        thread.join()
