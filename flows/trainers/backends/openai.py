"""The trainer for those who let a vendor train: OpenAI's files and fine-tuning jobs.

The vendor keeps the weights, so what is left here is a folder that says which model to ask for. A job that was
started is found again by its metadata and never started twice: it costs money, which `flows.bill` reserves first.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx

from apprentice.errors import ConfigError, Problem, TrainingError
from apprentice.prompts import compact_prompt
from apprentice.schemas.schema import Schema
from apprentice.secrets import register, scrub
from apprentice.settings.config import read_key
from flows.dataset import write_whole
from flows.trainers import (
    Progress,
    TrainedAdapter,
    TrainerPlugin,
    TrainingJob,
    TrainingNotStarted,
    TrainingRow,
    read_rows,
)
from flows.trainers.recipe import choose

__all__ = ["OpenAITrainer", "chat_lines", "estimate"]

_KEY = "OPENAI_API_KEY"
_BASE_URL = "https://api.openai.com/v1"
_LEAST_ROWS = 10  # OpenAI refuses fewer
_ENDED = ("succeeded", "failed", "cancelled")
_PER_TURN = 16  # tokens, at most, that the vendor writes around each turn (its role, its beginning and end)
_MOST_TOKENS = 10**12  # that a job can have trained; a number beyond says nothing


def chat_lines(rows: Iterable[TrainingRow], input_schema: Schema | None = None) -> Iterator[str]:
    """The rows as chat turns. No system turn: like every local model, it is told nothing but the input."""
    for row in rows:
        turns = [
            {"role": "user", "content": compact_prompt(row.input, input_schema)},
            {"role": "assistant", "content": Schema.dumps(row.output)},
        ]
        for _ in range(row.repeat):
            yield json.dumps({"messages": turns}, ensure_ascii=False)


def estimate(
    rows: Iterable[TrainingRow], *, epochs: float, price_per_million: Decimal, input_schema: Schema | None = None
) -> Decimal:
    """What training may cost at most, in USD, at the vendor's price for a million training tokens.

    An upper bound in every language: a token stands for a byte of UTF-8 at least.
    """
    tokens = 0
    for line in chat_lines(rows, input_schema):
        for turn in json.loads(line)["messages"]:
            tokens += len(turn["content"].encode("utf-8", "replace")) + _PER_TURN
    return Decimal(math.ceil(tokens * epochs)) * price_per_million / 1_000_000


class OpenAITrainer(TrainerPlugin):
    """``local.fine_tune_backend: openai``; ``local.training_model`` names the model to start from."""

    environment = (_KEY,)
    is_paid = True

    def __init__(
        self,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        client: httpx.Client | None = None,
        poll_s: float = 20.0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._key = (api_key if api_key is not None else os.environ.get(_KEY, "")).strip()
        register(self._key)
        self._url = (base_url or os.environ.get("OPENAI_BASE_URL") or _BASE_URL).rstrip("/")
        self._client = client or httpx.Client(timeout=60.0)
        self._poll_s, self._sleep, self._clock, self._cancelled = poll_s, sleep, clock, cancelled

    def preflight(self, job: TrainingJob) -> None:
        """The key, the price and enough rows. Nothing is sent. Raises `ConfigError`, `TrainingError`."""
        _price(job)
        read_key(_KEY, {_KEY: self._key}, _KEY)
        rows = sum(row.repeat for row in read_rows(job.dataset))
        if rows < _LEAST_ROWS:
            raise TrainingError(f"OpenAI trains on at least {_LEAST_ROWS} rows and task {job.task!r} has {rows}")

    def worst_case(self, job: TrainingJob) -> Decimal:
        """What the vendor may bill, by ``local.training.price``. Raises `ConfigError` where that is not set."""
        rows = list(read_rows(job.dataset))
        epochs = _epochs(job, rows)
        return estimate(rows, epochs=epochs, price_per_million=_price(job), input_schema=job.input_schema)

    def train(self, job: TrainingJob, progress: Callable[[Progress], None]) -> TrainedAdapter:
        """Send the file, start the job and wait; a job of this very dataset that exists is waited for instead."""
        started = self._clock()
        rows = list(read_rows(job.dataset))
        try:
            found = self._find(job) or self._start(job, rows)
        except TrainingError as error:  # the vendor said no; what is only lost on the way is another error
            raise TrainingNotStarted(str(error)) from None
        while found["status"] not in _ENDED:
            if self._cancelled():
                self._call("POST", f"/fine_tuning/jobs/{found['id']}/cancel")
                raise TrainingError(f"the fine-tuning job {found['id']} was cancelled")
            progress(self._progress(found, started))
            self._sleep(self._poll_s)
            found = self._call("GET", f"/fine_tuning/jobs/{found['id']}")
        if found["status"] != "succeeded":
            why = (found.get("error") or {}).get("message") or found["status"]
            raise TrainingError(f"OpenAI's fine-tuning job {found['id']} {found['status']}: {why}")
        done = self._progress(found, started)
        progress(done)
        model = found["fine_tuned_model"]
        trained = _trained_tokens(found)
        name = hashlib.sha256(model.encode()).hexdigest()[:16]
        folder = job.adapters / name
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "remote_model.json", json.dumps({"remote_model": model, "job": found["id"]}) + "\n")
        return TrainedAdapter(
            name=name,
            folder=folder,
            base_model=found["model"],
            trained_on=len(rows),
            left_out=0,
            steps=done.steps,
            tokens=trained or 0,
            wall_s=self._clock() - started,
            loss=done.loss,
            recipe={"job": found["id"], **(found.get("hyperparameters") or {})},
            toolchain={"vendor": "openai"},
            remote_model=model,
            cost=None if trained is None else trained * _price(job) / 1_000_000,
        )

    def _find(self, job: TrainingJob) -> dict[str, Any] | None:
        """The job of this dataset that an earlier attempt started, unless it failed."""
        after = ""
        while True:
            page = self._call("GET", f"/fine_tuning/jobs?limit=100{after}")
            for known in page["data"]:
                mine = (known.get("metadata") or {}).get("apprentice_dataset") == _identity(job)
                if mine and known["status"] not in ("failed", "cancelled"):
                    return dict(known)
            if not page.get("has_more"):
                return None
            after = f"&after={page['data'][-1]['id']}"

    def _start(self, job: TrainingJob, rows: list[TrainingRow]) -> dict[str, Any]:
        content = "\n".join(chat_lines(rows, job.input_schema)).encode() + b"\n"
        files = {"file": (f"{_identity(job)}.jsonl", content, "application/jsonl")}
        uploaded = self._call("POST", "/files", data={"purpose": "fine-tune"}, files=files)
        return self._call(
            "POST",
            "/fine_tuning/jobs",
            json={
                "model": job.base_model,
                "training_file": uploaded["id"],
                "seed": job.settings.seed,
                "suffix": f"apprentice-{job.task}"[:64],
                "metadata": {"apprentice_dataset": _identity(job)},
                "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": _epochs(job, rows)}}},
            },
        )

    def _progress(self, found: dict[str, Any], started: float) -> Progress:
        """The newest metrics among the job's events; the vendor writes them as it goes."""
        events = self._call("GET", f"/fine_tuning/jobs/{found['id']}/events?limit=20")["data"]
        for event in events:
            data = event.get("data") or {}
            if event.get("type") == "metrics" and "step" in data:
                step, steps = int(data["step"]), int(data.get("total_steps") or data["step"])
                return Progress(step, steps, data.get("train_loss"), 0, self._clock() - started, data.get("valid_loss"))
        return Progress(0, 1, None, 0, self._clock() - started)

    def _call(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        """One request. What may have been lost on the way is told as an outage: the run is kept and resumed."""
        headers = {"authorization": f"Bearer {self._key}"}
        response = self._client.request(method, self._url + path, headers=headers, **content)
        status = response.status_code
        said = scrub(response.text)[:500]
        if status == 429 and "insufficient_quota" in said:  # no waiting heals it
            raise TrainingError(f"OpenAI refused {method} {path}: the account's quota is used up ({said})")
        if status in (408, 409, 429) or status >= 500:
            raise httpx.TransportError(f"OpenAI answered {status} to {method} {path}")
        if status >= 400:
            raise TrainingError(f"OpenAI refused {method} {path} with {status}: {said}")
        try:
            return dict(response.json())
        except (ValueError, TypeError, RecursionError):
            raise httpx.TransportError(f"OpenAI answered {method} {path} with no JSON object") from None


def _trained_tokens(found: dict[str, Any]) -> int | None:
    """What a job says that it has trained, and will be billed; None where that is no number that could be."""
    said = found.get("trained_tokens")
    if isinstance(said, bool) or not isinstance(said, int | float) or not 0 < said < _MOST_TOKENS:
        return None
    return int(said) if said == int(said) else None


def _epochs(job: TrainingJob, rows: Sequence[TrainingRow]) -> int:
    return max(1, round(choose(job.settings, rows=len(rows), layers=1, on_gpu=True).epochs))


def _price(job: TrainingJob) -> Decimal:
    if job.settings.price is None:
        remedy = "Give the vendor's USD per million training tokens, so that the budget's caps hold for training too."
        raise ConfigError("local.training.price", [Problem("local.training.price", "is not set.", remedy)])
    return job.settings.price


def _identity(job: TrainingJob) -> str:
    """The dataset's digest and the task: a job with the same is the same job."""
    return f"{job.task}-{Path(job.dataset).name.split('.')[0]}"[:64]


REGISTERED = OpenAITrainer
