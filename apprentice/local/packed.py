"""One forward pass over many requests at once, laid end to end without padding.

The tokens of all requests in flight, some with a whole prompt, some with the one token they just decided, form one
row of tokens; every linear layer sees a single tall matrix. Only attention has to keep requests apart, and
transformers lets an attention function be put in for any architecture: `_attend` is that function. It pads inside
attention alone, takes the keys and values of the constant prompt prefix from where they were computed once, and
keeps those of requests that go on.

LoRA is applied unmerged, to each request's stretch of the row: versions of several tasks share one base model and one
pass, and a version costs the memory of its own matrices. This module knows nothing of JSON, schemas or threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from apprentice.errors import ConfigError, Problem, VersionError
from apprentice.local.adapter import Adapter

__all__ = ["LoraWeights", "PackedModel", "Pass", "Stretch"]

_ATTENTION = "apprentice_packed"
_FIRST_CAPACITY = 256

type _Prefix = tuple[list[torch.Tensor], list[torch.Tensor]]
"""Keys and values of a version's constant prefix, by layer: [kv heads, tokens, head dim]."""


@dataclass(eq=False)
class LoraWeights:
    """A version's matrices as the pass wants them: by layer, A transposed [in, rank] and B transposed [rank, out]."""

    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    prefix: _Prefix | None = None
    prefix_length: int = 0

    @property
    def bytes(self) -> int:
        """Memory that this version alone takes."""
        pairs = sum(a.nbytes + b.nbytes for a, b in self.layers.values())
        return pairs + (sum(t.nbytes for side in self.prefix for t in side) if self.prefix else 0)


@dataclass(frozen=True, slots=True)
class Stretch:
    """One request's part in a pass: its new tokens and its version.

    A fresh request has no slot: its tokens follow the version's prefix. One that goes on has the slot that `keep`
    put it in, with ``past`` tokens there.
    """

    tokens: Sequence[int]
    weights: LoraWeights
    slot: int | None = None
    past: int = 0


@dataclass(eq=False)
class _Part:
    """Stretches that attend in one go, padded to [count, longest].

    ``rows`` says where their tokens lie in the pass's row, ``back`` which of the padded places are real, ``see``
    at which position each token stands ([1 or count, longest]), ``length`` how many keys there are, the padded
    ones included.
    """

    rows: torch.Tensor
    back: torch.Tensor
    see: torch.Tensor
    length: int
    prefix: _Prefix | None = None
    slots: torch.Tensor | None = None
    """For stretches that go on: their slots; and for each of their tokens its slot and its position there."""
    slot_of: torch.Tensor | None = None
    place_of: torch.Tensor | None = None

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """Which key each token may see; None where that is just the tokens before it."""
        if self.slots is None and self.prefix is None:
            return None
        keys = torch.arange(self.length, device=self.see.device)
        return (keys <= self.see[:, :, None])[:, None]

    def windowed(self, window: int | None) -> torch.Tensor | None:
        """The mask where a layer sees only the last ``window`` tokens."""
        if window is None or self.length <= window:
            return self.mask
        keys = torch.arange(self.length, device=self.see.device)
        see = self.see[:, :, None]
        return ((keys <= see) & (keys > see - window))[:, None]


@dataclass(eq=False)
class Pass:
    """What attention and the LoRA layers need to know about a pass; afterwards, the keys and values it computed."""

    parts: list[_Part]
    spans: list[tuple[int, int, LoraWeights]]
    cache: list[tuple[torch.Tensor, torch.Tensor]]
    bounds: list[tuple[int, int]]
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


class _LoraLinear(nn.Module):
    """A linear layer of the base with every loaded version's change to it."""

    def __init__(self, base: nn.Linear, name: str, spans: Callable[[], list[tuple[int, int, LoraWeights]]]) -> None:
        super().__init__()
        self.base = base
        self._name = name
        self._spans = spans

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        flat_x, flat_y = x[0], y[0]
        for start, end, weights in self._spans():
            pair = weights.layers.get(self._name)
            if pair is not None:
                flat_y[start:end].addmm_(flat_x[start:end] @ pair[0], pair[1])
        return y


class PackedModel:
    """A causal language model run in packed passes. Not safe for two threads at once."""

    def __init__(self, model: Any, *, slots: int) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, _attend)
        model.set_attn_implementation(_ATTENTION)
        self.model = model
        self.config = model.config.get_text_config()
        self.device = model.device
        self.dtype = model.dtype
        self.slots = slots
        self.now = Pass([], [], [], [])
        self._cache: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._capacity = 0
        self._linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        self._check_head()

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Rows of the output layer are used by themselves: make sure that nothing comes after it."""
        hidden, _ = self.run([Stretch((0, 1, 2, 3), LoraWeights({}))])
        whole = self.model(input_ids=torch.arange(4, device=self.device)[None], use_cache=False, packed=self._plan(4))
        direct = self.model.get_output_embeddings()(hidden)[0]
        if not torch.allclose(direct, whole.logits[0, -1], atol=0.05, rtol=0.05):
            problem = Problem(
                "local.base_model",
                f"{self.config.model_type} changes its scores after the output layer; the embedded engine does not.",
                "Use local.backend: vllm or llama_cpp, or another base model.",
            )
            raise ConfigError("local.base_model", [problem])

    def _plan(self, count: int) -> Pass:
        self.now = Pass([self._part([(0, count)], None)], [], self._cache, [(0, count)])
        return self.now

    def lora(self, adapter: Adapter, where: str) -> LoraWeights:
        """Move an adapter's matrices to the device. Raises `VersionError` where they do not fit this model's layers."""
        layers = {}
        for name, layer in adapter.layers.items():
            linear = self._linears.get(name)
            shape = None if linear is None else (linear.out_features, linear.in_features)
            if shape != (layer.b.shape[0], layer.a.shape[1]):
                here = "no such layer" if shape is None else f"{shape[0]} x {shape[1]}"
                raise VersionError(
                    f"{where} changes {name}, {layer.b.shape[0]} x {layer.a.shape[1]}, and this base model has {here}: "
                    "it was trained on another base"
                )
            a = torch.tensor(layer.a.T.copy(), dtype=self.dtype, device=self.device)
            b = torch.tensor((layer.scale * layer.b).T.copy(), dtype=self.dtype, device=self.device)
            layers[name] = (a, b)
        return LoraWeights(layers)

    def attach(self, weights: LoraWeights, prefix: Sequence[int]) -> None:
        """Let the layers know a version, and compute the keys and values of its constant prefix."""
        for name in weights.layers:
            parent_name, _, child = name.rpartition(".")
            parent = self.model.get_submodule(parent_name)
            if isinstance(getattr(parent, child), nn.Linear):
                setattr(parent, child, _LoraLinear(getattr(parent, child), name, lambda: self.now.spans))
        if prefix:
            _, done = self.run([Stretch(prefix, weights)])
            weights.prefix = ([k.clone() for k in done.keys], [v.clone() for v in done.values])
            weights.prefix_length = len(prefix)

    @torch.inference_mode()
    def run(self, stretches: Sequence[Stretch]) -> tuple[torch.Tensor, Pass]:
        """One pass. Returns the last hidden state of each stretch, [count, hidden], and the pass, for `keep`."""
        ids: list[int] = []
        positions: list[int] = []
        bounds: list[tuple[int, int]] = []
        spans: list[tuple[int, int, LoraWeights]] = []
        fresh: dict[int, list[int]] = {}
        going: list[int] = []
        for index, stretch in enumerate(stretches):
            start, end = len(ids), len(ids) + len(stretch.tokens)
            ids += stretch.tokens
            bounds.append((start, end))
            past = stretch.past
            if stretch.slot is None:
                past = stretch.weights.prefix_length
                fresh.setdefault(id(stretch.weights), []).append(index)
            else:
                going.append(index)
            positions += range(past, past + end - start)
            if spans and spans[-1][2] is stretch.weights:
                spans[-1] = (spans[-1][0], end, stretch.weights)
            elif stretch.weights.layers:
                spans.append((start, end, stretch.weights))
        parts = [self._part([bounds[i] for i in some], stretches[some[0]].weights) for some in fresh.values()]
        if going:
            parts.append(self._going([bounds[i] for i in going], [stretches[i] for i in going]))
        self.now = Pass(parts, spans, self._cache, bounds)
        out = self.model.base_model(
            input_ids=torch.tensor([ids], device=self.device),
            position_ids=torch.tensor([positions], device=self.device),
            use_cache=False,
            packed=self.now,
        )
        last = torch.tensor([end - 1 for _, end in bounds], device=self.device)
        return out.last_hidden_state[0].index_select(0, last), self.now

    @torch.inference_mode()
    def scores(self, hidden: torch.Tensor, only: Sequence[tuple[int, ...] | None]) -> list[torch.Tensor]:
        """For each hidden state the scores (1-D, float32, on the CPU) of the token ids in ``only``, or of all where
        None.

        The vocabulary projection is a fifth of a small model's work: rows of it are computed where they are asked
        for.
        """
        head = self.model.get_output_embeddings()
        found: dict[int, torch.Tensor] = {}
        members: dict[tuple[int, ...] | None, list[int]] = {}
        for index, ids in enumerate(only):
            members.setdefault(ids, []).append(index)
        for ids, some in members.items():
            if ids is None:
                rows = head(hidden[some])
            else:
                picked = torch.tensor(ids, device=self.device)
                bias = None if head.bias is None else head.bias[picked]
                rows = nn.functional.linear(hidden[some], head.weight[picked], bias)
            found |= zip(some, rows.float().cpu(), strict=True)
        return [found[index] for index in range(len(only))]

    def _part(self, bounds: Sequence[tuple[int, int]], weights: LoraWeights | None) -> _Part:
        longest = max(end - start for start, end in bounds)
        prefix = weights.prefix_length if weights else 0
        rows, back = self._padded(bounds, longest)
        # Padding stands on the right, so a causal mask keeps every real token from seeing it.
        see = prefix + torch.arange(longest, device=self.device)[None]
        return _Part(rows, back, see, prefix + longest, weights.prefix if weights else None)

    def _going(self, bounds: Sequence[tuple[int, int]], stretches: Sequence[Stretch]) -> _Part:
        longest = max(end - start for start, end in bounds)
        length = max(s.past + len(s.tokens) for s in stretches)
        self._grow(length)
        rows, back = self._padded(bounds, longest)
        past = torch.tensor([s.past for s in stretches], device=self.device)
        slots = torch.tensor([s.slot for s in stretches], device=self.device)
        see = past[:, None] + torch.arange(longest, device=self.device)[None]
        slot_of = slots[:, None].expand(see.shape).flatten()[back]
        return _Part(rows, back, see, length, slots=slots, slot_of=slot_of, place_of=see.flatten()[back])

    def _padded(self, bounds: Sequence[tuple[int, int]], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.tensor([start for start, _ in bounds], device=self.device)
        sizes = torch.tensor([end - start for start, end in bounds], device=self.device)
        steps = torch.arange(longest, device=self.device)
        inside = steps[None] < sizes[:, None]
        rows = torch.where(inside, starts[:, None] + steps[None], starts[:, None])
        return rows, inside.flatten().nonzero()[:, 0]

    def _grow(self, length: int) -> None:
        if length <= self._capacity:
            return
        capacity = max(_FIRST_CAPACITY, self._capacity)
        while capacity < length:
            capacity *= 2
        heads = self.config.num_key_value_heads
        size = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        shape = (self.slots, heads, capacity, size)
        old = list(self._cache)
        self._cache.clear()
        for layer in range(self.config.num_hidden_layers):
            k, v = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
            if old:
                k[:, :, : self._capacity] = old[layer][0]
                v[:, :, : self._capacity] = old[layer][1]
            self._cache.append((k, v))
        self._capacity = capacity

    @torch.inference_mode()
    def keep(self, done: Pass, kept: Sequence[tuple[int, LoraWeights, int]]) -> None:
        """Put the keys and values of fresh stretches, given by (index in the pass, version, slot), into their slots."""
        if not kept:
            return
        sizes = [done.bounds[i][1] - done.bounds[i][0] + w.prefix_length for i, w, _ in kept]
        self._grow(max(sizes))
        for layer, (k, v) in enumerate(self._cache):
            for (index, weights, slot), size in zip(kept, sizes, strict=True):
                start, end = done.bounds[index]
                prefix = weights.prefix_length
                if weights.prefix:
                    k[slot, :, :prefix] = weights.prefix[0][layer]
                    v[slot, :, :prefix] = weights.prefix[1][layer]
                k[slot, :, prefix:size] = done.keys[layer][:, start:end]
                v[slot, :, prefix:size] = done.values[layer][:, start:end]


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    *,
    packed: Pass,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a packed pass: query [1, heads, row, dim], key and value [1, kv heads, row, dim]."""
    if softcap is not None or s_aux is not None:
        problem = Problem("local.base_model", "has an attention that the embedded engine does not follow.", "Use vllm.")
        raise ConfigError("local.base_model", [problem])
    q, k, v = query[0], key[0], value[0]
    layer = len(packed.keys)
    packed.keys.append(k)
    packed.values.append(v)
    out = torch.empty((q.shape[1], q.shape[0], v.shape[2]), dtype=q.dtype, device=q.device)
    for part in packed.parts:
        count = part.rows.shape[0]

        if part.slots is not None:
            kept_k, kept_v = packed.cache[layer]
            real = part.rows.flatten()[part.back]
            kept_k[part.slot_of, :, part.place_of] = k[:, real].transpose(0, 1)
            kept_v[part.slot_of, :, part.place_of] = v[:, real].transpose(0, 1)
            part_k, part_v = kept_k[part.slots, :, : part.length], kept_v[part.slots, :, : part.length]
        else:
            part_k, part_v = _padded(k, part), _padded(v, part)
            if part.prefix is not None:
                part_k = torch.cat((part.prefix[0][layer].expand(count, -1, -1, -1), part_k), 2)
                part_v = torch.cat((part.prefix[1][layer].expand(count, -1, -1, -1), part_v), 2)
        mask = part.windowed(sliding_window)
        seen = nn.functional.scaled_dot_product_attention(
            _padded(q, part), part_k, part_v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
        )
        out[part.rows.flatten()[part.back]] = seen.transpose(1, 2).flatten(0, 1)[part.back]
    return out[None], None


def _padded(heads: torch.Tensor, part: _Part) -> torch.Tensor:
    """Take a part out of a pass's row: [heads, row, dim] -> [count, heads, longest, dim]."""
    count, longest = part.rows.shape
    return heads[:, part.rows.flatten()].view(heads.shape[0], count, longest, -1).transpose(0, 1)
