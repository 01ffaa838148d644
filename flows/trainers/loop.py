"""The optimisation itself: AdamW over the adapters' matrices, with checkpoints that a killed run goes on from."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flows.trainers import Progress
from flows.trainers.batches import bucketed, padding
from flows.trainers.crew import Crew
from flows.trainers.encoding import TokenRow
from flows.trainers.halves import Halves
from flows.trainers.recipe import Recipe

__all__ = ["Checkpoint", "Loop", "Outcome"]

_CHECKPOINT_S = 30.0
_REPORT_STEPS = 5
_LOWER_BATCH = 16
_MOST_KEPT_BYTES = 2 << 30  # of lower-half outputs kept in memory; a larger corpus computes them in every epoch


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended. ``padding`` is the share of computed positions that were padding, ``loss`` the last one seen."""

    steps: int
    tokens: int
    loss: float | None
    padding: float
    stopped_early: bool


@dataclass(slots=True)
class _State:
    """Where the loop stands, apart from weights and optimiser."""

    step: int = 0
    tokens: int = 0
    best: float | None = None
    best_weights: list[torch.Tensor] = field(default_factory=list)
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A file that holds a half-finished run. One of another dataset or recipe is not used."""

    path: Path
    dataset: str
    recipe: Recipe

    def save(self, state: _State, weights: Sequence[torch.Tensor], optimiser: torch.optim.Optimizer) -> None:
        """Replace the file at once: a kill leaves the one before."""
        content = {
            "of": [self.dataset, self.recipe.as_dict()],
            "state": [state.step, state.tokens, state.best, state.best_weights, state.stopped],
            "weights": [w.detach() for w in weights],
            "optimiser": optimiser.state_dict(),
        }
        beside = self.path.with_suffix(".writing")
        with beside.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)

    def load(self, weights: Sequence[torch.Tensor], optimiser: torch.optim.Optimizer) -> _State:
        """Put everything back; a fresh state where there is no checkpoint of this very run."""
        if not self.path.is_file():
            return _State()
        content = torch.load(self.path, map_location=weights[0].device, weights_only=True)
        if content["of"] != [self.dataset, self.recipe.as_dict()]:
            return _State()
        with torch.no_grad():
            for weight, saved in zip(weights, content["weights"], strict=True):
                weight.copy_(saved)
        optimiser.load_state_dict(content["optimiser"])
        return _State(*content["state"])


class Loop:
    """Trains the adapters of ``lora`` (a PEFT model around ``model``) on ``rows``, one process of ``crew``."""

    def __init__(
        self,
        recipe: Recipe,
        rows: Sequence[TokenRow],
        validation: Sequence[TokenRow],
        lora: Any,
        model: Any,
        progress: Callable[[Progress], None],
        clock: Callable[[], float],
        crew: Crew,
    ) -> None:
        self._crew = crew
        self._recipe, self._rows, self._validation = recipe, rows, validation
        self._lengths = [len(row.tokens) for row in rows]
        self._progress, self._clock = progress, clock
        self._halves = Halves(model, recipe.trained_layers)
        self._weights = [p for p in lora.parameters() if p.requires_grad]
        self._optimiser = torch.optim.AdamW(self._weights, lr=recipe.learning_rate, weight_decay=0.0)
        if self._halves.is_cut and not self._halves.exact(rows[:2]):
            self._halves.join()
        self._kept: dict[TokenRow, torch.Tensor] = {}
        hidden_bytes = 4 * model.config.hidden_size
        self._keeps = sum(map(len, {row.tokens for row in (*rows, *validation)})) * hidden_bytes < _MOST_KEPT_BYTES

    def run(self, checkpoint: Checkpoint) -> Outcome:
        """Train to the end, or until the validation loss rises; the weights with the lowest one win."""
        recipe = self._recipe
        steps, per_epoch = recipe.steps(len(self._rows)), recipe.steps_per_epoch(len(self._rows))
        state = checkpoint.load(self._weights, self._optimiser)
        started = saved_at = self._clock()
        losses: list[float] = []
        loss: float | None = None
        validation_loss: float | None = None
        batches: list[list[int]] = []
        while state.step < steps and not state.stopped:
            epoch, at = divmod(state.step, per_epoch)
            if at == 0 or not batches:
                batches = bucketed(self._lengths, recipe.batch_size, recipe.seed, epoch)
            losses.append(self._step([self._rows[i] for i in batches[at]], recipe.rate(state.step, steps)))
            state.tokens += sum(self._lengths[i] for i in batches[at])
            state.step += 1
            if state.step % per_epoch == 0 and self._validation:
                validation_loss = self._validate()
                if state.best is None or validation_loss < state.best:
                    state.best, state.best_weights = validation_loss, [w.detach().clone() for w in self._weights]
                else:
                    state.stopped = True
            over = state.step == steps or state.stopped
            if state.step % _REPORT_STEPS == 0 or over:
                loss = sum(losses) / len(losses)
                losses.clear()
                elapsed_s = self._clock() - started
                self._progress(Progress(state.step, steps, loss, state.tokens, elapsed_s, validation_loss))
            if self._crew.rank == 0 and (over or self._clock() - saved_at > _CHECKPOINT_S):
                checkpoint.save(state, self._weights, self._optimiser)
                saved_at = self._clock()
        if state.best_weights:
            with torch.no_grad():
                for weight, best in zip(self._weights, state.best_weights, strict=True):
                    weight.copy_(best)
        first = bucketed(self._lengths, recipe.batch_size, recipe.seed, 0)
        return Outcome(state.step, state.tokens, loss, padding(self._lengths, first), state.stopped)

    def _step(self, rows: Sequence[TokenRow], rate: float) -> float:
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        mine = rows[self._crew.rank :: self._crew.size]
        loss = 0.0
        if mine:
            part = self._loss(mine) / sum(len(row.targets) for row in rows)
            part.backward()  # type: ignore[no-untyped-call]
            loss = float(part.detach())
        self._crew.sum_gradients(self._weights)
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        return self._crew.sum(loss)

    def _loss(self, rows: Sequence[TokenRow]) -> torch.Tensor:
        """Cross-entropy, summed over the tokens that the answers decide."""
        logits = self._halves.logits(rows, self._below(rows) if self._halves.is_cut else None)
        targets = torch.tensor([token for row in rows for token in row.targets], device=logits.device)
        return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")

    def _below(self, rows: Sequence[TokenRow]) -> list[torch.Tensor]:
        """The lower half's output for each row."""
        if not self._keeps:
            return self._halves.lower(rows)
        if not self._kept:
            self._keep_all()
        return [self._kept[row] for row in rows]

    def _keep_all(self) -> None:
        """Run the lower half over everything, once, in an order of its own: a resumed run gets the same numbers."""
        order = sorted(dict.fromkeys((*self._rows, *self._validation)), key=lambda row: (len(row.tokens), row.tokens))
        for start in range(0, len(order), _LOWER_BATCH):
            rows = order[start : start + _LOWER_BATCH]
            self._kept.update(zip(rows, self._halves.lower(rows), strict=True))

    @torch.no_grad()
    def _validate(self) -> float:
        """Mean loss over the validation rows, by token."""
        order = sorted(self._validation, key=lambda row: len(row.tokens))
        total, count = 0.0, 0
        for start in range(0, len(order), _LOWER_BATCH):
            rows = order[start : start + _LOWER_BATCH]
            total += float(self._loss(rows))
            count += sum(len(row.targets) for row in rows)
        # The mean of what all found: rounding must not have one process stop and another go on.
        return self._crew.sum(total / count) / self._crew.size
