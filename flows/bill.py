"""A vendor's training is paid for like every other call: reserved under the caps before, settled to the bill after.

What is reserved is written into the run's folder, so a run that is resumed, whose job goes on at the vendor's, pays
once. Of a run that fails nobody knows the bill: it stays reserved, which counts as spent.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from decimal import Decimal
from pathlib import Path

from apprentice.store.records import CapWindow, Reservation, RunRecord
from flows.dataset import write_whole
from flows.trainers import Trainer, TrainingJob
from flows.workshop import Workshop

__all__ = ["reserve_training"]


def reserve_training(shop: Workshop, run: RunRecord, trainer: Trainer, job: TrainingJob) -> Reservation | None:
    """Hold what training may cost; None where nobody sends a bill. Raises `BudgetExceeded`: nothing is sent then."""
    kept = shop.bench(run) / "reservation.json"
    if kept.is_file():
        return _read(kept)
    worst_case = trainer.worst_case(job)
    if not worst_case:
        return None
    vendor = f"{shop.settings.local.fine_tune_backend} training"
    held = shop.budget.reserve(run.task, vendor, job.base_model, worst_case, run.id)
    write_whole(kept, json.dumps(asdict(held), default=str) + "\n")
    return held


def _read(path: Path) -> Reservation:
    kept = json.loads(path.read_text(encoding="utf-8"))
    windows = tuple(CapWindow(**{**window, "cap": Decimal(window["cap"])}) for window in kept["windows"])
    return Reservation(**{**kept, "worst_case": Decimal(kept["worst_case"]), "windows": windows})
