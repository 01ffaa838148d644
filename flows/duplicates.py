"""Finding inputs that were seen before, exactly or nearly, among a million, in bounded memory.

Exact duplicates share the hash of their text, to the letter: whether "Apple" names a company may hang on its case. Near
duplicates are alike once case and white space are folded: they are found by MinHash signatures of word shingles (Broder
1997; datasketch computes them) and banding (Leskovec et al., Mining of Massive Datasets, 3.4): two texts whose shingle
sets overlap by 0.85 (Jaccard) share at least one of 8 bands of 8 values with probability 0.92, and every candidate is
checked against the whole signature. The tables are flat arrays of machine integers: about 500 bytes an input.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["NEAR", "Duplicates", "IntTable", "Seen", "normalised"]

NEAR = 0.85  # Jaccard similarity of shingle sets from which two inputs are near duplicates
_PERMUTATIONS, _BANDS = 64, 8
_SHINGLE = 3
_SPACES = re.compile(r"\s+")


def normalised(text: str) -> str:
    """Text with what seldom matters removed: case and white space."""
    return _SPACES.sub(" ", text).strip().casefold()


class IntTable:
    """A hash table from 64-bit keys to small integers: open addressing in two flat arrays, 12 bytes a slot."""

    def __init__(self, slots: int = 1 << 10) -> None:
        self._keys = array("Q", bytes(8 * slots))
        self._values = array("i", [-1]) * slots
        self._mask = slots - 1
        self._used = 0

    def __len__(self) -> int:
        return self._used

    def get(self, key: int) -> int:
        """The value stored under a key, or -1."""
        keys, values, mask = self._keys, self._values, self._mask
        slot = key & mask
        while values[slot] >= 0:
            if keys[slot] == key:
                return values[slot]
            slot = (slot + 1) & mask
        return -1

    def put(self, key: int, value: int) -> None:
        """Store a value >= 0 under a key that is not there yet."""
        if 2 * self._used >= len(self._keys):
            self._grow()
        slot = key & self._mask
        while self._values[slot] >= 0:
            slot = (slot + 1) & self._mask
        self._keys[slot], self._values[slot] = key, value
        self._used += 1

    def _grow(self) -> None:
        keys, values = self._keys, self._values
        slots = 2 * len(keys)
        self._keys, self._values = array("Q", bytes(8 * slots)), array("i", [-1]) * slots
        self._mask, self._used = slots - 1, 0
        for key, value in zip(keys, values, strict=True):
            if value >= 0:
                self.put(key, value)


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of an input: its number, the equal input seen first (-1: none), and the near ones."""

    number: int
    equal_to: int
    near: tuple[int, ...]


class Duplicates:
    """Numbers inputs 0, 1, 2, ... and says of each which earlier ones it repeats. Later inputs change nothing."""

    def __init__(self) -> None:
        import numpy as np

        self._np = np
        self._exact = IntTable()
        self._bands = IntTable()
        self._signatures = np.zeros((1024, _PERMUTATIONS), np.uint32)
        self._count = 0

    def add_page(self, texts: Sequence[str]) -> Iterator[Seen]:
        """Add inputs, given as the text that a model is asked."""
        from datasketch import MinHash  # type: ignore[import-untyped]  # it ships no types

        sketches = MinHash.bulk([_shingles(normalised(text)) for text in texts], num_perm=_PERMUTATIONS, seed=1)
        for text, sketch in zip(texts, sketches, strict=True):
            yield self._add(text, (sketch.hashvalues & 0xFFFFFFFF).astype(self._np.uint32))

    def _add(self, text: str, signature: Any) -> Seen:
        number = self._count
        self._count += 1
        if number == len(self._signatures):
            self._signatures = self._np.concatenate([self._signatures, self._np.zeros_like(self._signatures)])
        self._signatures[number] = signature
        key = _hash(text.encode())
        equal_to = self._exact.get(key)
        if equal_to >= 0:
            return Seen(number, equal_to, ())
        self._exact.put(key, number)
        near: list[int] = []
        width = _PERMUTATIONS // _BANDS
        for band in range(_BANDS):
            part = signature[band * width : (band + 1) * width]
            key = _hash(bytes([band]) + part.tobytes())
            other = self._bands.get(key)
            if other < 0:
                self._bands.put(key, number)
            elif other not in near and (self._signatures[other] == signature).mean() >= NEAR:
                near.append(other)
        return Seen(number, -1, tuple(sorted(near)))


def _shingles(text: str) -> list[bytes]:
    words = text.split(" ")
    if len(words) <= _SHINGLE:
        return [text.encode()]
    return [" ".join(words[i : i + _SHINGLE]).encode() for i in range(len(words) - _SHINGLE + 1)]


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
