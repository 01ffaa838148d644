"""A vendor's training is paid for like every other call: reserved under the caps before, settled to the bill after.

The ledger itself knows what a run has reserved, by the run's id: a run that is killed and resumed, whose job goes on at
the vendor's, pays once, wherever the worker died. Of a run that fails nobody knows the bill: what was reserved counts
as spent.
"""

from __future__ import annotations

from apprentice.store import Usage
from apprentice.store.records import Reservation, RunRecord
from flows.trainers import TrainedAdapter, Trainer, TrainingJob
from flows.workshop import Workshop

__all__ = ["close_training", "reserve_training", "settle_training"]


def reserve_training(shop: Workshop, run: RunRecord, trainer: Trainer, job: TrainingJob) -> Reservation | None:
    """Hold what training may cost, once for each run; None where nobody sends a bill, or the run has paid already.

    Raises `BudgetExceeded`: nothing is sent then.
    """
    worst_case = trainer.worst_case(job)
    if not worst_case:
        return None
    known = shop.store.find_calls(run.id, _vendor(shop))
    for held, state in known:
        if state == "reserved":
            return held
    if any(state in ("settled", "lost") for _, state in known):
        return None
    return shop.budget.reserve(run.task, _vendor(shop), job.base_model, worst_case, run.id)


def settle_training(shop: Workshop, held: Reservation | None, adapter: TrainedAdapter) -> None:
    """Record the bill of a training that succeeded: the worst case where the vendor does not say what it trained."""
    if held is None:
        return
    if adapter.cost is None:
        shop.budget.lost(held)
    else:
        shop.budget.settle(held, adapter.cost, Usage())


def close_training(shop: Workshop, run: RunRecord, *, unbilled: bool = False) -> None:
    """End what a run still holds that will not go on: nothing was billed, or nobody knows."""
    for held, state in shop.store.find_calls(run.id, _vendor(shop)):
        if state == "reserved" and unbilled:
            shop.budget.release(held)
        elif state == "reserved":
            shop.budget.lost(held)


def _vendor(shop: Workshop) -> str:
    return f"{shop.settings.local.fine_tune_backend} training"
