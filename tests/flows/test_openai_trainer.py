"""OpenAI's files and fine-tuning jobs, against a double that speaks their API."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis import settings as limits

from apprentice.errors import ConfigError, TrainingError
from apprentice.schemas.schema import parse_schema
from apprentice.settings.config import TrainingSettings
from flows.trainers import Progress, TrainingJob, TrainingNotStarted, TrainingRow
from flows.trainers.backends.openai import OpenAITrainer, chat_lines, estimate


class FineTuningApi:
    """Files, jobs and events as https://platform.openai.com/docs/api-reference/fine-tuning describes them."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.jobs: list[dict[str, Any]] = []
        self.ends = "succeeded"
        self.polls_to_end = 3
        self.down = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.headers.get("authorization") != "Bearer sk-test":
            return httpx.Response(401, json={"error": {"message": "Incorrect API key provided"}})
        if self.down:
            self.down -= 1
            return httpx.Response(503, json={"error": {"message": "overloaded"}})
        match request.method, request.url.path.removeprefix("/v1").strip("/").split("/"):
            case "POST", ["files"]:
                body = request.read()
                assert b'name="purpose"\r\n\r\nfine-tune' in body
                name = f"file-{len(self.files)}"
                self.files[name] = body.split(b"\r\n\r\n")[-1].rsplit(b"\r\n--", 1)[0]
                return httpx.Response(200, json={"id": name, "object": "file", "purpose": "fine-tune"})
            case "POST", ["fine_tuning", "jobs"]:
                asked = json.loads(request.read())
                assert asked["training_file"] in self.files
                assert asked["method"]["supervised"]["hyperparameters"]["n_epochs"] >= 1
                job = {
                    "id": f"ftjob-{len(self.jobs)}",
                    "model": asked["model"],
                    "metadata": asked["metadata"],
                    "status": "queued",
                    "fine_tuned_model": None,
                    "trained_tokens": None,
                    "polls": 0,
                }
                self.jobs.append(job)
                return httpx.Response(200, json=job)
            case "GET", ["fine_tuning", "jobs"]:
                return httpx.Response(200, json={"data": self.jobs[::-1], "has_more": False})
            case "GET", ["fine_tuning", "jobs", name]:
                return httpx.Response(200, json=self._poll(name))
            case "GET", ["fine_tuning", "jobs", _, "events"]:
                metrics = {"step": 20, "total_steps": 30, "train_loss": 0.4}
                events = [{"type": "message", "message": "Step 20/30"}, {"type": "metrics", "data": metrics}]
                return httpx.Response(200, json={"data": events, "has_more": False})
            case "POST", ["fine_tuning", "jobs", name, "cancel"]:
                self._job(name)["status"] = "cancelled"
                return httpx.Response(200, json=self._job(name))
        return httpx.Response(404, json={"error": {"message": "no such path"}})

    def _job(self, name: str) -> dict[str, Any]:
        return next(job for job in self.jobs if job["id"] == name)

    def _poll(self, name: str) -> dict[str, Any]:
        job = self._job(name)
        job["polls"] += 1
        job["status"] = "running"
        if job["polls"] >= self.polls_to_end:
            job["status"] = self.ends
            job["trained_tokens"] = 4321
            job["fine_tuned_model"] = f"ft:{job['model']}:org:apprentice-mood:{name}"
            job["error"] = {"message": "too many errors in the file"} if self.ends == "failed" else None
        return job


@pytest.fixture
def api() -> FineTuningApi:
    """The vendor."""
    return FineTuningApi()


@pytest.fixture
def job(tmp_path: Path) -> TrainingJob:
    """Twelve rows to train on, one of them twice."""
    rows = [{"id": str(i), "input": {"text": f"day {i}"}, "output": {"mood": "glad"}} for i in range(12)]
    rows[0]["repeat"] = 2
    path = tmp_path / "abc123.train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    schema = parse_schema({"mood": "glad | sad"})
    folders = (tmp_path, tmp_path / "work", tmp_path / "adapters")
    return TrainingJob("mood", path, schema, "gpt-4.1-nano-2025-04-14", *folders, TrainingSettings(price=Decimal(25)))


def _trainer(api: FineTuningApi, **options: Any) -> OpenAITrainer:
    client = httpx.Client(transport=httpx.MockTransport(api))
    return OpenAITrainer(api_key="sk-test", client=client, sleep=lambda _: None, **options)


def test_a_job_is_started_followed_and_finished(api: FineTuningApi, job: TrainingJob) -> None:
    """The file holds every row as chat turns, progress is the vendor's, and the version names the vendor's model."""
    heard: list[Progress] = []
    trainer = _trainer(api)
    trainer.preflight(job)
    trained = trainer.train(job, heard.append)
    lines = [json.loads(line) for line in api.files["file-0"].decode().splitlines()]
    assert len(lines) == 13
    assert lines[0]["messages"][1] == {"role": "assistant", "content": '{"mood":"glad"}'}
    assert (heard[-1].step, heard[-1].steps, heard[-1].loss) == (20, 30, 0.4)
    assert trained.remote_model == "ft:gpt-4.1-nano-2025-04-14:org:apprentice-mood:ftjob-0"
    assert (trained.tokens, trained.trained_on) == (4321, 12)
    assert trained.cost == Decimal("0.108025")  # 4,321 tokens at $25 a million
    assert Decimal(0) < trainer.worst_case(job) < Decimal(1)
    assert json.loads((trained.folder / "remote_model.json").read_text())["job"] == "ftjob-0"


def test_a_restarted_worker_waits_for_the_job_it_started(api: FineTuningApi, job: TrainingJob) -> None:
    """A job costs money: the same dataset never starts a second one."""
    first = _trainer(api).train(job, lambda _: None)
    second = _trainer(api).train(job, lambda _: None)
    assert len(api.jobs) == len(api.files) == 1
    assert second.name == first.name


def test_a_failed_job_tells_the_vendors_reason(api: FineTuningApi, job: TrainingJob) -> None:
    """What the vendor says about the failure is in the error; the next attempt starts anew."""
    api.ends = "failed"
    with pytest.raises(TrainingError, match="too many errors in the file"):
        _trainer(api).train(job, lambda _: None)
    api.ends = "succeeded"
    _trainer(api).train(job, lambda _: None)
    assert len(api.jobs) == 2


def test_cancelling_reaches_the_vendor(api: FineTuningApi, job: TrainingJob) -> None:
    """A cancelled run stops what it would be billed for."""
    with pytest.raises(TrainingError, match="was cancelled"):
        _trainer(api, cancelled=lambda: True).train(job, lambda _: None)
    assert api.jobs[0]["status"] == "cancelled"


def test_an_overloaded_vendor_is_an_outage_and_a_wrong_key_is_not(api: FineTuningApi, job: TrainingJob) -> None:
    """503 keeps the run for later; 401 ends it, with the vendor's words and without the key."""
    api.down = 1
    with pytest.raises(httpx.TransportError, match="503"):
        _trainer(api).train(job, lambda _: None)
    client = httpx.Client(transport=httpx.MockTransport(api))
    with pytest.raises(TrainingError, match="Incorrect API key") as refused:
        OpenAITrainer(api_key="sk-wrong", client=client).train(job, lambda _: None)
    assert "sk-wrong" not in str(refused.value)


def test_preflight_names_what_is_missing(api: FineTuningApi, job: TrainingJob) -> None:
    """No key and too few rows are found before anything is sent."""
    with pytest.raises(ConfigError, match=r"local\.training\.price"):
        _trainer(api).preflight(replace(job, settings=TrainingSettings()))
    with pytest.raises(ConfigError, match="export OPENAI_API_KEY"):
        OpenAITrainer(api_key="").preflight(job)
    job.dataset.write_text(job.dataset.read_text().splitlines()[1] + "\n")
    with pytest.raises(TrainingError, match="at least 10 rows"):
        _trainer(api).preflight(job)


ALPHABETS = {
    "English": "where is my parcel, and who pays for it",
    "Japanese": "私の荷物はどこですか",
    "Amharic": "የእኔ ጥቅል የት ነው",
    "emoji": "\U0001f9d1\u200d\U0001f692\U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd",
    "hex": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "base64": "TG9yZW0gaXBzdW0gZG9sb3Igc2l0IGFtZXQsIGNvbnNl/+==",
}


@pytest.mark.parametrize("alphabet", ALPHABETS)
@given(data=st.data())
@limits(max_examples=20, deadline=None)
def test_the_estimate_is_an_upper_bound_in_every_alphabet(alphabet: str, data: Any) -> None:
    """No tokenizer makes more tokens than bytes; bytes, and 4 tokens a turn of chat format, stay below."""
    text = data.draw(st.text(st.sampled_from(ALPHABETS[alphabet]), min_size=1, max_size=200))
    rows = [TrainingRow(str(i), {"text": text}, {"mood": text}, repeat=1 + i % 2) for i in range(5)]
    bound = estimate(rows, epochs=3, price_per_million=Decimal(1_000_000))
    turns = [turn["content"] for line in chat_lines(rows) for turn in json.loads(line)["messages"]]
    by_bytes = 3 * sum(len(turn.encode()) + 4 for turn in turns)
    assert bound >= by_bytes
    assert bound <= 4 * by_bytes  # a bound that holds everything is none


@pytest.mark.parametrize("said", [None, 0, -5, "4321", True, 10**30, 12.5])
def test_trained_tokens_that_cannot_be_are_not_said(
    api: FineTuningApi, job: TrainingJob, monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    """A job that succeeded trained something: what says otherwise is paid at the worst case, which None asks for."""
    real = api._poll
    monkeypatch.setattr(api, "_poll", lambda name: {**real(name), "trained_tokens": said})
    client = httpx.Client(transport=httpx.MockTransport(api))
    trainer = OpenAITrainer(api_key="sk-test", client=client, sleep=lambda _: None)
    assert trainer.train(job, lambda _: None).cost is None


def test_a_quota_that_is_used_up_is_no_outage(api: FineTuningApi, job: TrainingJob) -> None:
    """Trying again every half minute heals nothing: the run ends, and was not billed."""

    def quota(request: httpx.Request) -> httpx.Response:
        return httpx.Response(429, json={"error": {"code": "insufficient_quota", "message": "You exceeded it."}})

    client = httpx.Client(transport=httpx.MockTransport(quota))
    with pytest.raises(TrainingNotStarted, match="quota is used up"):
        OpenAITrainer(api_key="sk-test", client=client).train(job, lambda _: None)


def test_a_key_that_cannot_be_sent_is_found_before_anything_is(job: TrainingJob) -> None:
    """A line's end is taken off; a blank inside is no key, and no text shows it."""
    assert OpenAITrainer(api_key="sk-test\n")._key == "sk-test"
    with pytest.raises(ConfigError) as caught:
        OpenAITrainer(api_key="sk-secret part").preflight(job)
    assert "secret" not in str(caught.value)
