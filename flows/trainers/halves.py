"""A decoder cut in two: frozen layers below, layers with adapters above.

The lower half sees no adapter, so its output for a row is the same in every epoch: it is computed once and kept. The
upper half starts from what was kept, and back-propagation ends where it starts. With 12 of 30 layers trained for three
epochs this saves half of the arithmetic of training all of them.

Whether a model can be cut like this is not assumed but checked: both ways must give the same numbers (`Halves.exact`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from flows.trainers.encoding import TokenRow

__all__ = ["Halves", "pad"]


class Halves:
    """The two halves of a causal language model of the Llama shape: ``model.layers``, ``model.norm``, ``lm_head``.

    ``trained`` layers are above the cut. A model of another shape, or one that cannot be cut exactly, has all of its
    layers above it.
    """

    def __init__(self, causal_lm: Any, trained: int) -> None:
        self._decoder = causal_lm.model
        self._head = causal_lm.lm_head
        layers = self._decoder.layers
        self._cut = max(0, len(layers) - trained)
        self._whole, self._norm = layers, self._decoder.norm
        self._lower, self._upper = layers[: self._cut], layers[self._cut :]

    @property
    def is_cut(self) -> bool:
        """Whether there is a lower half at all."""
        return self._cut > 0

    def join(self) -> None:
        """Give the cut up: everything is above it from now on."""
        self._cut = 0
        self._upper = self._whole

    @torch.no_grad()
    def lower(self, rows: Sequence[TokenRow]) -> list[torch.Tensor]:
        """What the lower half makes of each row: [length, hidden]."""
        tokens, mask = pad(rows, self._device)
        with self._only(self._lower, torch.nn.Identity()):
            hidden = self._decoder(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        return [hidden[i, : len(row.tokens)].clone() for i, row in enumerate(rows)]

    def logits(self, rows: Sequence[TokenRow], lower: Sequence[torch.Tensor] | None) -> torch.Tensor:
        """The vocabulary's logits where something is decided, row after row: [decided, vocabulary].

        Nothing else is projected: on a small model the vocabulary costs as much as a quarter of the layers.
        """
        tokens, mask = pad(rows, self._device)
        if lower is None:
            hidden = self._decoder(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        else:
            below = torch.nn.utils.rnn.pad_sequence(list(lower), batch_first=True)
            with self._only(self._upper, self._norm):
                hidden = self._decoder(inputs_embeds=below, attention_mask=mask, use_cache=False).last_hidden_state
        which = [i for i, row in enumerate(rows) for _ in row.positions]
        where = [position for row in rows for position in row.positions]
        return self._head(hidden[which, where])  # type: ignore[no-any-return]

    @torch.no_grad()
    def exact(self, rows: Sequence[TokenRow]) -> bool:
        """Whether the halves together compute what the whole does (some models scale or mix embeddings on the way)."""
        whole = self.logits(rows, None)
        halves = self.logits(rows, self.lower(rows))
        return bool(torch.allclose(whole, halves, rtol=1e-3, atol=1e-3))

    @property
    def _device(self) -> torch.device:
        return self._head.weight.device  # type: ignore[no-any-return]

    @contextmanager
    def _only(self, layers: Any, norm: Any) -> Iterator[None]:
        decoder = self._decoder
        depth = decoder.config.num_hidden_layers
        decoder.layers, decoder.norm, decoder.config.num_hidden_layers = layers, norm, len(layers)
        try:
            yield
        finally:
            decoder.layers, decoder.norm, decoder.config.num_hidden_layers = self._whole, self._norm, depth


def pad(rows: Sequence[TokenRow], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask of a batch, both [rows, longest], padded on the right."""
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row.tokens)] = torch.tensor(row.tokens)
        mask[i, : len(row.tokens)] = 1
    return tokens.to(device), mask.to(device)
