"""Every kind of event, how grave it is, what it means and what to do about it.

The one list: docs/alerts.md is written from it, webhooks get its words, and nothing else can be emitted.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, Self

__all__ = ["LEVELS", "EventKind", "Level"]

type Level = Literal["info", "warning", "critical"]

LEVELS: tuple[Level, ...] = ("info", "warning", "critical")
"""From the least to the most grave."""


class EventKind(StrEnum):
    """A kind of event: its name, with ``level``, ``meaning`` and ``remedy`` ("" if there is nothing to do).

    ``all_clear`` marks the end of trouble: sinks get it as they got the trouble, whatever its level.
    """

    level: Level
    meaning: str
    remedy: str
    all_clear: bool

    def __new__(cls, name: str, level: Level, meaning: str, remedy: str = "", all_clear: bool = False) -> Self:
        kind = str.__new__(cls, name)
        kind._value_ = name
        kind.level, kind.meaning, kind.remedy, kind.all_clear = level, meaning, remedy, all_clear
        return kind

    @classmethod
    def named(cls, name: str) -> EventKind | None:
        """The kind of that name, or None: a store may hold events of another release."""
        return next((kind for kind in cls if kind.value == name), None)

    # --- trust ---

    PROMOTED = (
        "promoted",
        "info",
        "A version of the local model became the champion.",
    )
    CERTIFIED = (
        "certified",
        "info",
        "A share of the requests is certified for the local model for the first time, or a larger one is.",
    )
    PHASE = (
        "phase",
        "info",
        "The task moved to another phase.",
    )
    RECOVERED = (
        "recovered",
        "info",
        "The task is out of coaching or emergency: its agreement is certified again.",
        "",
        True,
    )
    COACHING = (
        "coaching",
        "warning",
        "What is served is beyond doubt worse than coaching_trigger allows: every request is checked, training is due.",
        "Make sure that `apprentice coach` runs. Look at the newest disagreements for what has changed in the traffic.",
    )
    EMERGENCY = (
        "emergency",
        "critical",
        "What is served is beyond doubt worse than emergency_threshold allows: the remote answers everything again.",
        "Callers get the remote's answers and cost rises until a retrained version passes. Look at the newest "
        "disagreements; `apprentice rollback` brings an earlier version back.",
    )
    DRIFT = (
        "drift",
        "warning",
        "The agreement on served requests has been falling slowly.",
        "Spot checks rise and training is due by itself. Make sure that `apprentice coach` runs.",
    )
    SHIFT = (
        "shift",
        "warning",
        "The agreement on served requests fell suddenly.",
        "Spot checks rise and training is due by itself. Look for a change in the traffic or at the remote's vendor.",
    )
    REMOTE_CHANGED = (
        "remote_changed",
        "warning",
        "The remote answers stored inputs differently than it did: what changed is the remote, not the local model.",
        "Training goes on with the answers since the change, by itself. Ask the vendor what became of the model, or "
        "pin a dated one in `remote.model`; if you changed the task's instructions, this is what came of it.",
    )
    REMOTE_STEADY = (
        "remote_steady",
        "info",
        "After an alarm stored inputs were asked again, and nothing speaks for a change of the remote: look at the "
        "traffic and the local model.",
    )
    OUT_OF_REACH = (
        "out_of_reach",
        "warning",
        "The remote agrees with itself too seldom for a target of apprentice.yaml: no local model meets it everywhere.",
        "The sentence in the evidence says how far it is and what to change. What can be served goes on being served.",
    )
    UNUSUAL = (
        "unusual",
        "warning",
        "Requests or local answers look unlike those that the local model was certified on; spot checks rise.",
        "Nothing, if the traffic was meant to change: the checks decide. Else look for the cause of the named signs.",
    )
    UNSCORED = (
        "unscored",
        "warning",
        "The evaluator failed on a comparison, which therefore teaches nothing.",
        "Correct the evaluator that the error names; without scores the task cannot gain trust.",
    )
    COMPARISON_FAILED = (
        "comparison_failed",
        "warning",
        "A request answered by both models could not be compared or recorded. The caller got an answer.",
        "See the cause: an evaluator's error is for its author, a store's for whoever runs the database.",
    )

    WATCH_FAILED = (
        "watch_failed",
        "warning",
        "The watch over unusual requests could not see what the local model answered. The caller got an answer.",
        "See the cause. If it lasts, a change in the traffic is found by spot checks alone.",
    )

    # --- answering ---

    REMOTE_UNAVAILABLE = (
        "remote_unavailable",
        "critical",
        "The remote brought no answer to a request, with every retry and every provider.",
        "See the cause. Check the vendor's status page, the key and the network; additional_providers are asked next.",
    )
    REMOTE_REFUSED = (
        "remote_refused",
        "critical",
        "The vendor refused a request: the key, the model's name or the request itself is not accepted.",
        "See the cause. The same request would be refused again: correct the key or the `remote` section.",
    )
    REMOTE_ANSWER_UNUSABLE = (
        "remote_answer_unusable",
        "warning",
        "The remote answered, and its answer does not fit the output schema, even after a repair. It was paid for.",
        "See which field; make instructions or output_schema clearer, or take a stronger model.",
    )
    REMOTE_FAILED = (
        "remote_failed",
        "critical",
        "Asking the remote failed in a way that Apprentice did not foresee; the local model answered, if it could.",
        "The log has the traceback; please report it.",
    )
    LOCAL_UNAVAILABLE = (
        "local_unavailable",
        "warning",
        "The local model did not answer a request, and the remote was asked instead.",
        "See the cause. If it lasts, check the engine that serves the local model.",
    )
    ANSWERED_LOCALLY_DEGRADED = (
        "answered_locally_degraded",
        "warning",
        "The remote was not available, so the local model answered a request that it is not trusted with.",
        "Restore the remote. These answers are marked as degraded in the counts.",
    )
    ENGINE_UNAVAILABLE = (
        "engine_unavailable",
        "warning",
        "The local model's engine failed several times in a row; the remote answers until its health check passes.",
        "Look at the engine's own log and whether it still runs. It is tried again by itself.",
    )
    ENGINE_RECOVERED = (
        "engine_recovered",
        "info",
        "The engine of the local model answers again.",
        "",
        True,
    )
    VERSION_REFUSED = (
        "version_refused",
        "warning",
        "A promoted version cannot be served: its files are missing, damaged or of another base model.",
        "Make the version's folder visible to this machine, or go back with `apprentice rollback`.",
    )
    VERSION_NOT_LOADED = (
        "version_not_loaded",
        "warning",
        "A promoted version could not be loaded yet; what served before goes on, and it is tried again.",
        "See the cause; often memory, or an engine that is not up.",
    )

    # --- money ---

    BUDGET_WARNING = (
        "budget_warning",
        "warning",
        "Spending crossed a mark of a cap.",
        "Look at `apprentice report` for what spends it; raise the cap in apprentice.yaml if that is meant.",
    )
    BUDGET_EXHAUSTED = (
        "budget_exhausted",
        "critical",
        "A cap leaves no room for another remote call: the local model answers alone, or callers get BudgetExceeded.",
        "Raise the cap in apprentice.yaml, or wait until it resets.",
    )

    BUDGET_HELD = (
        "budget_held",
        "warning",
        "Calls in flight held all that was left of a cap for longer than a request could wait.",
        "Raise the cap in apprentice.yaml, lower max_output_tokens (what a call holds), or run fewer calls at once.",
    )
    BILLED_ABOVE_RESERVATION = (
        "billed_above_reservation",
        "critical",
        "A vendor billed more for a call than it could have cost by the price list and the limits it was given.",
        "It is counted in full, and more is held for this model's next calls. Compare the vendor's own bill and price.",
    )
    CAPS_CHANGED = (
        "caps_changed",
        "warning",
        "A process started with other caps than those in force; now its caps bind every process on the store.",
        "Nothing, if that is meant. Else give every process the same apprentice.yaml: the last to start decides.",
    )
    RESERVATION_RELEASED = (
        "reservation_released",
        "warning",
        "A person gave back what a call held whose end nobody recorded.",
        "Compare the vendor's bill: if the call was billed, the cap has more room than it should.",
    )

    # --- training ---

    TRAINING_FAILED = (
        "training_failed",
        "critical",
        "A training run ended with an error. It is tried again after a quarter of an hour, then after twice as long.",
        "Mend the cause in the evidence; `apprentice coach TASK --now` does not wait.",
    )
    TRAINING_WAITS = (
        "training_waits",
        "warning",
        "A training run waits for a server that does not answer, and goes on when it does.",
        "Look at the server that the cause names: Prefect, MLflow, or the vendor that trains. "
        "`apprentice abandon TASK` gives the run up.",
    )
    TRAINING_CANCELLED = (
        "training_cancelled",
        "info",
        "A person cancelled a training run, in Prefect or with `apprentice abandon`.",
    )
    WAITS_FOR_REVIEW = (
        "waits_for_review",
        "warning",
        "A version passed the gate and waits for a person, because the task asks for it or a person has chosen since.",
        "Read the version's page in MLflow; move the alias `champion` to it, or run `apprentice promote TASK VERSION`.",
    )
    REGISTRY_RESTORED = (
        "registry_restored",
        "warning",
        "An experiment or run that training needs was deleted in MLflow, and was restored or replaced.",
        "Nothing, if that is well. Delete a task's records only after it is taken out of apprentice.yaml.",
    )
    NO_COACH = (
        "no_coach",
        "warning",
        "A task has what its training needs, and no coach watches it: nothing is trained, and the remote answers on.",
        "Run `apprentice coach`, or the deployment that does its work, against the same store.",
    )
    UNREGISTERED_CHAMPION = (
        "unregistered_champion",
        "warning",
        "The champion serves on, but MLflow has its version no longer.",
        "Make another version champion: in MLflow, or with `apprentice promote`.",
    )
    UNKNOWN_CHAMPION = (
        "unknown_champion",
        "warning",
        "The alias `champion` in MLflow is on a version that this store does not know; the old champion serves on.",
        "Move the alias to a version of this store, or point `tracking` and `store` at the same installation.",
    )

    # --- the store ---

    STORE_UNAVAILABLE = (
        "store_unavailable",
        "critical",
        "The store could not be read or written.",
        "See the cause: the database server, the disk, or the network between. Nothing can be learnt until it is back.",
    )
    STORE_RECOVERED = (
        "store_recovered",
        "info",
        "The store is there again.",
        "",
        True,
    )
    RECORD_DELAYED = (
        "record_delayed",
        "critical",
        "A paid answer could not be recorded in time. Its caller has it; it is kept in memory and recorded later.",
        "See the cause and mend the store. Do not stop this process before: what it keeps would be lost.",
    )
    RECORD_LOST = (
        "record_lost",
        "critical",
        "Paid answers could not be recorded before their process ended. Their callers have them; they are no examples.",
        "Mend the store. The calls stay counted at their worst case; the evidence names requests and costs.",
    )
    STORE_REPLACED = (
        "store_replaced",
        "critical",
        "The store's file was deleted or replaced while this process was using it.",
        "Put the right file in its place and restart every process. Until then this one neither reads nor writes the "
        "store, and spends nothing.",
    )
