"""Finding base models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from apprentice.errors import ConfigError, VersionError
from apprentice.local.base_model import (
    SMOLLM2,
    load_model_and_tokenizer,
    resolve_base_model,
    share_processors,
)


def test_a_folder_a_file_a_package_and_a_hub_id(tiny_folder: Path) -> None:
    """Each way of naming a model leads to what transformers and llama.cpp load."""
    folder = resolve_base_model(tiny_folder.name, tiny_folder.parent)
    assert (folder.kind, Path(folder.path), folder.gguf) == ("folder", tiny_folder, tiny_folder / "tiny.gguf")
    packaged = resolve_base_model(SMOLLM2, Path(), dequantise=False)
    assert packaged.kind == "gguf"
    assert packaged.gguf is not None
    assert packaged.gguf.is_file()
    hub = resolve_base_model("some-owner/some-model", tiny_folder)
    assert (hub.kind, hub.path, hub.gguf) == ("hub", "some-owner/some-model", None)


@pytest.mark.parametrize("name", ["missing.gguf", "no-such-thing", "./owner/model"])
def test_a_name_of_nothing_is_a_config_error(name: str, tmp_path: Path) -> None:
    """The message says what was looked for and gives an example."""
    with pytest.raises(ConfigError, match="names no model"):
        resolve_base_model(name, tmp_path)


def test_a_gguf_is_dequantised_once(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder in the cache holds the same weights and the special tokens that the file names; it is made once."""
    import torch

    monkeypatch.setenv("APPRENTICE_CACHE", str(tmp_path / "cache"))
    gguf = tmp_path / "alone" / "tiny.gguf"
    gguf.parent.mkdir()
    shutil.copy(tiny_folder / "tiny.gguf", gguf)
    base = resolve_base_model(str(gguf), tmp_path)
    made = Path(base.path)
    stamp = (made / "config.json").stat().st_mtime_ns
    assert resolve_base_model(str(gguf), tmp_path) == base
    assert (made / "config.json").stat().st_mtime_ns == stamp
    assert [path.name for path in made.parent.iterdir()] == [made.name]
    model, tokenizer = load_model_and_tokenizer(base)
    original, _ = load_model_and_tokenizer(resolve_base_model(str(tiny_folder), Path()))
    assert tokenizer.eos_token == "<|im_end|>"
    ids = torch.tensor([[1, 50, 60, 70]])
    with torch.inference_mode():
        assert torch.allclose(model(ids).logits, original(ids).logits, atol=1e-4)


def test_a_file_that_is_no_gguf_is_a_version_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found before anything is loaded, and leaves nothing behind."""
    monkeypatch.setenv("APPRENTICE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"hello, I am no model")
    with pytest.raises(VersionError, match="no GGUF"):
        resolve_base_model("x.gguf", tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_damaged_folder_is_a_version_error(tiny_folder: Path, tmp_path: Path) -> None:
    """Truncated weights are named, with the remedy."""
    folder = shutil.copytree(tiny_folder, tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(VersionError, match="cannot be loaded"):
        load_model_and_tokenizer(resolve_base_model(str(folder), Path()))


def test_idle_threads_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set before torch is there; never over a choice of the user's; too late, and pointless, afterwards."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    share_processors()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    share_processors()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setitem(sys.modules, "torch", sys)
    share_processors()
    assert "OMP_WAIT_POLICY" not in os.environ


_LITTLE_MEMORY = """
import resource
from pathlib import Path
import transformers.models.llama.modeling_llama
from apprentice.errors import VersionError
from apprentice.local.base_model import SMOLLM2, load_tokenizer, resolve_base_model
from apprentice.local.engines.embedded import EmbeddedEngine
from apprentice.local.engine import Version
from apprentice.schemas.schema import parse_schema

load_tokenizer(resolve_base_model(SMOLLM2, Path()))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20), -1))
try:
    EmbeddedEngine(SMOLLM2, Path()).load(Version("base", "t", None, parse_schema({"a": "x | y"})))
except VersionError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_model_that_does_not_fit_in_memory_is_a_version_error() -> None:
    """538 MB of weights where 200 MB are to be had: no crash, and the remedy is about memory."""
    done = subprocess.run([sys.executable, "-c", _LITTLE_MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cannot be loaded" in done.stdout
    assert "free some memory" in done.stdout
