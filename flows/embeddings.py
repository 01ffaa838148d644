"""Embeddings that were computed once, kept beside a task's datasets: a refit encodes only what is new."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apprentice import secrets
from apprentice.student.encoder import Encoder

__all__ = ["RememberingEncoder"]

_log = secrets.logger("apprentice.coach")


class RememberingEncoder(Encoder):
    """An `Encoder` that asks another one for texts it has not seen. One file for each encoder in ``folder``.

    The file is bounded by ``most`` texts, the newest; a damaged or foreign one is begun anew. Nothing of a text is
    kept but a hash.
    """

    def __init__(self, encoder: Encoder, folder: Path, *, most: int = 50_000) -> None:
        super().__init__(encoder.name, encoder._place)
        self._encoder = encoder
        self._most = most
        self._path = folder / f"embeddings-{encoder.fingerprint[:16]}.npz"
        self._known: dict[bytes, NDArray[np.float32]] = self._read()

    def _read(self) -> dict[bytes, NDArray[np.float32]]:
        try:
            with np.load(self._path, allow_pickle=False) as kept:
                digests, vectors = kept["digests"], kept["vectors"]
            if digests.dtype != np.uint8 or digests.ndim != 2 or len(digests) != len(vectors):
                raise ValueError("it holds something else")
            return {digest.tobytes(): vector for digest, vector in zip(digests, vectors, strict=True)}
        except FileNotFoundError:
            return {}
        except Exception as error:  # noqa: BLE001  # numpy and zipfile raise many; all that is lost is time
            _log.warning("%s is computed anew: %s", self._path, error)
            return {}

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """As `Encoder.encode`: shape [texts, dimensions]."""
        digests = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts]
        new = {digest: text for digest, text in zip(digests, texts, strict=True) if digest not in self._known}
        if new:
            for digest, vector in zip(new, self._encoder.encode(list(new.values())), strict=True):
                self._known[digest] = np.asarray(vector, np.float32)
        if not texts:
            return self._encoder.encode([])
        return np.stack([self._known[digest] for digest in digests])

    def save(self) -> None:
        """Keep what is known, whole or not at all."""
        while len(self._known) > self._most:
            del self._known[next(iter(self._known))]
        if not self._known:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        digests = np.frombuffer(b"".join(self._known), np.uint8).reshape(len(self._known), -1)
        descriptor, beside = tempfile.mkstemp(dir=self._path.parent, prefix=".embeddings-", suffix=".npz")
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.savez(file, digests=digests, vectors=np.stack(list(self._known.values())))
            os.replace(beside, self._path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
