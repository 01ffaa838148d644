"""`local.fine_tune_backend: rote`. Trainers run where flows/ is, so this file alone needs it."""

import json
import time
from collections.abc import Callable
from decimal import Decimal

from apprentice.errors import TrainingError
from apprentice.local.adapter import CONFIG, FRAME, WEIGHTS, content_name
from apprentice.prompts import compact_prompt
from flows.trainers import Progress, TrainedAdapter, TrainerPlugin, TrainingJob, read_rows


class RoteTrainer(TrainerPlugin):
    """Writes the examples down for the engine `rote`."""

    def preflight(self, job: TrainingJob) -> None:
        if next(read_rows(job.dataset), None) is None:
            raise TrainingError(f"{job.dataset} has no example to learn")

    def worst_case(self, job: TrainingJob) -> Decimal:
        return Decimal(0)

    def train(self, job: TrainingJob, progress: Callable[[Progress], None]) -> TrainedAdapter:
        began = time.monotonic()
        answers = {compact_prompt(row.input, job.input_schema): row.output for row in read_rows(job.dataset)}
        draft = job.work / "draft"
        draft.mkdir(parents=True, exist_ok=True)
        # A version is named by these three files; what is in them is between a trainer and its engine.
        (draft / CONFIG).write_text(json.dumps(answers, ensure_ascii=False, sort_keys=True), encoding="utf-8")
        for unused in (WEIGHTS, FRAME):
            (draft / unused).touch()
        name = content_name(draft)
        folder = job.adapters / name
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            draft.rename(folder)
        took = time.monotonic() - began
        progress(Progress(step=1, steps=1, loss=None, tokens=0, elapsed_s=took))
        return TrainedAdapter(name, folder, job.base_model, len(answers), 0, steps=1, tokens=0, wall_s=took, loss=None)
