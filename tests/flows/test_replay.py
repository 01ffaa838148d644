"""A replay with an engine and a trainer that learn by heart: the whole loop, in seconds."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import sqlite3
from collections.abc import Callable
from decimal import Decimal
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.text import Text
from rich.console import Console

from apprentice.confidence.settings import TrustSettings
from apprentice.errors import ConfigError
from apprentice.evaluators import ExactMatch
from apprentice.store import Store
from flows.replay import _in_home, run_replay, summarise
from flows.replay_promise import Moment, Target, chance_of, course, targets
from flows.replay_view import LiveView, draw_picture, picture, print_summary
from flows.traffic import Recorded, read_traffic
from tests.flows.conftest import WITH_PREFECT_AND_MLFLOW

pytestmark = WITH_PREFECT_AND_MLFLOW

ROOT = Path(__file__).parents[2]
MOODS = ("glad", "sad", "angry")
PROMISE = TrustSettings(graduate=0.6)
THRESHOLDS = {"phase2_to_phase3": 0.6, "coaching_trigger": 0.4, "emergency_threshold": 0.2}


@pytest.fixture
def replay(make_home: Callable[..., Any], trainer: Any) -> Callable[..., Any]:
    """Replay letters through a home: ``replay(600)`` gives (moments, home); calling again goes on."""
    trainer.skills = [0.8, 0.97]
    home = make_home(local={"fine_tune_batch_size": 60, "fine_tune_growth": 1.0})
    for i in range(3000):
        home.truth[f"what was said in a letter of day {i}"] = MOODS[i * 7 % 3]

    def run(count: int, view: LiveView | None = None) -> tuple[list[Moment], Any]:
        traffic = [
            Recorded(i + 1, {"text": text}, {"mood": mood}) for i, (text, mood) in enumerate(home.truth.items())
        ][:count]
        quiet = view or LiveView(Console(file=StringIO()), count, "letters")
        return run_replay(traffic, home.settings, "mood", seed=1, view=quiet, engine=home.engine), home

    return run


def rows(home: Any, kind: str) -> list[set[str]]:
    """The inputs of each version's dataset: "train" or "held_out"."""
    folder = home.settings.model_dir / "mood" / "data"
    return [
        {json.loads(line)["input"]["text"] for line in path.read_text().splitlines()}
        for path in sorted(folder.glob(f"*.{kind}.jsonl"))
    ]


def test_a_replay_goes_through_the_phases_and_the_remote_is_asked_less(replay: Callable[..., Any]) -> None:
    """Collect, shadow, serve; what is spent stays below what it would have cost; the figures fit together."""
    moments, home = replay(700)
    with Store.open(home.settings.store_url) as store:
        summary = summarise(moments, store, "mood", 1.0, PROMISE)
    assert summary["phases"][0] == {"phase": 1, "from_request": 0}
    assert summary["phases"][-1]["phase"] == 3
    assert len(summary["versions"]) >= 2
    assert summary["versions"][0]["promoted"]
    assert summary["remote_share_tail"] < summary["remote_share"] < 1.0
    assert summary["remote_calls"] == sum(m.asked_remote for m in moments) == home.store.count_examples("mood")
    assert 0 < summary["spend"] < summary["spend_without"]
    assert summary["agreement"] > 0.9


def test_the_money_of_a_replay_is_the_ledgers(replay: Callable[..., Any]) -> None:
    """Recomputed from the raw rows: what was spent, that it never falls, and what everything would have cost."""
    moments, home = replay(700)
    with Store.open(home.settings.store_url) as store:
        summary = summarise(moments, store, "mood", 1.0, PROMISE)
    with contextlib.closing(sqlite3.connect(home.settings.root / "apprentice.db")) as db:
        calls = db.execute("SELECT state, cost, request_id FROM calls ORDER BY seq").fetchall()
    bills = [cost for _, cost, _ in calls]
    assert {state for state, _, _ in calls} == {"settled"}
    assert len({request for _, _, request in calls}) == len(bills) == summary["remote_calls"]
    assert summary["spend"] == sum(bills) / 10**9
    assert all(a.spend <= b.spend and a.spend_without <= b.spend_without for a, b in itertools.pairwise(moments))
    # While everything is asked, the two sums are the same bill.
    first_local = next(m.i for m in moments if not m.asked_remote)
    assert moments[first_local - 1].spend == moments[first_local - 1].spend_without
    # The letters are alike, so each costs about the same: shares of money are shares of calls.
    mean = sum(bills) / len(bills) / 10**9
    assert summary["spend_without"] == pytest.approx(mean * len(moments), rel=0.01)
    assert summary["spend"] / summary["spend_without"] == pytest.approx(summary["remote_share"], abs=0.01)
    assert summary["remote_share"] == sum(m.asked_remote for m in moments) / len(moments)
    assert summary["remote_share_tail"] == pytest.approx(len([m for m in moments[466:] if m.asked_remote]) / 234)


def test_a_recording_with_half_an_emoji_is_replayed_and_goes_on(make_home: Callable[..., Any]) -> None:
    """What JavaScript cut in two is found again, by the vendor's double and by a replay that goes on."""
    home = make_home()
    lines = [{"input": {"text": f"nice {i} \ud83d"}, "answer": {"mood": "glad"}} for i in range(6)]
    path = home.settings.root / "traffic.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = list(read_traffic(path, home.settings, "mood", input_key="input", answer_key="answer"))
    traffic = [row for row in rows if isinstance(row, Recorded)]
    home.truth.update({row.value["text"]: "glad" for row in traffic})
    for count in (3, 6):
        quiet = LiveView(Console(file=StringIO()), count, "letters")
        moments = run_replay(traffic[:count], home.settings, "mood", seed=1, view=quiet, engine=home.engine)
        assert [moment.asked_remote for moment in moments] == [True] * count


def test_what_everything_would_have_cost_is_what_it_does_cost(make_home: Callable[..., Any], trainer: Any) -> None:
    """Letters of very different length: the estimate for local answers, beside the bill for asking everything."""
    trainer.skills = [0.8, 0.97]
    draw = random.Random(3)
    lengths = (draw.choice([3, 15, 120]) for _ in range(500))
    words = (" ".join(f"w{draw.randrange(5000)}" for _ in range(length)) for length in lengths)
    texts = [f"{said} on day {i}" for i, said in enumerate(words)]
    seen = {}
    for name, first_training in (("apprentice", 60), ("remote alone", 10_000)):
        home = make_home(
            name.replace(" ", "-"),
            task={"confidence_thresholds": {**THRESHOLDS, "phase1_to_phase2": first_training}},
            local={"fine_tune_batch_size": 60, "fine_tune_growth": 1.0},
        )
        home.truth.update({text: MOODS[i * 7 % 3] for i, text in enumerate(texts)})
        traffic = [Recorded(i + 1, {"text": t}, {"mood": home.truth[t]}) for i, t in enumerate(texts)]
        quiet = LiveView(Console(file=StringIO()), len(texts), "letters")
        seen[name] = run_replay(traffic, home.settings, "mood", seed=1, view=quiet, engine=home.engine)
    ours, alone = seen["apprentice"], seen["remote alone"]
    assert all(m.asked_remote for m in alone)
    assert not all(m.asked_remote for m in ours)
    assert float(ours[-1].spend_without) == pytest.approx(float(alone[-1].spend), rel=0.01)


def test_a_stopped_replay_counts_the_same_money(replay: Callable[..., Any]) -> None:
    """Stopped after 350 and taken up again: the sums go on from where they were, and stay true."""
    replay(350)
    moments, home = replay(700)
    bills = sum(row.cost for row in home.store.spend())
    assert moments[-1].spend == bills
    everything = bills / sum(m.asked_remote for m in moments) * len(moments)
    assert moments[-1].spend_without == pytest.approx(everything, rel=Decimal("0.01"))


def test_held_out_examples_are_never_trained_on_by_any_version(replay: Callable[..., Any]) -> None:
    """An example is held out forever or never: no version's training set meets any version's held-out set."""
    _, home = replay(700)
    trained, held_out = rows(home, "train"), rows(home, "held_out")
    assert len(trained) >= 2
    assert all(trained)
    assert all(held_out)
    assert not set().union(*trained) & set().union(*held_out)


def test_a_replay_that_was_stopped_goes_on_where_it_was(replay: Callable[..., Any], trainer: Any) -> None:
    """Interrupted while it trains: nothing is asked twice, and the same data is not trained on twice."""
    stopped = KeyboardInterrupt()
    trainer.failures = [stopped]  # type: ignore[list-item]  # no Exception, so no retry: as when a user stops it
    with pytest.raises(KeyboardInterrupt):
        replay(300)
    moments, home = replay(300)
    assert [m.i for m in moments] == list(range(300))
    assert home.store.count_examples("mood") == sum(m.asked_remote for m in moments)
    digests = [version.data_digest for version in home.store.versions("mood")]
    assert len(digests) == len(set(digests))


def test_a_log_line_that_a_kill_cut_in_half_is_asked_again(replay: Callable[..., Any]) -> None:
    """The half line is dropped; its request runs again; the log is whole afterwards."""
    _, home = replay(30)
    log = home.settings.root / "replay.jsonl"
    log.write_text(log.read_text()[:-40])
    moments, _ = replay(40)
    assert [m.i for m in moments] == list(range(40))
    assert len(log.read_text().splitlines()) == 40


def test_what_is_shown_names_the_figures(replay: Callable[..., Any], tmp_path: Path) -> None:
    """The lines while it runs, the table at the end, and a picture that is one."""
    out = StringIO()
    console = Console(file=out, width=110)
    view = LiveView(console, 400, "letters")
    moments, home = replay(400, view=view)
    with Store.open(home.settings.store_url) as store:
        summary = summarise(moments, store, "mood", 1.0, PROMISE)
    print_summary(console, summary, moments)
    draw_picture(tmp_path / "picture.png", moments, summary, "letters")
    text = out.getvalue()
    assert "100/400  phase" in text
    assert "trained on" in text
    assert f"{summary['remote_share']:.1%}" in text
    (promise,) = summary["promises"]
    assert promise["low"] < promise["realised"] < promise["high"]
    assert f"{promise['realised']:.2f} ({promise['low']:.2f} to {promise['high']:.2f}), promised at least 0.60" in text
    assert summary["checks"] > 0
    answered = summary["requests"] - summary["remote_calls"]
    assert answered + summary["checks"] + summary["deferred"] < summary["requests"]
    drawn = picture(moments, summary, "letters").findobj(Text)
    assert f"${summary['spend']:.2f} instead of ${summary['spend_without']:.2f}" in " ".join(
        one.get_text() for one in drawn
    )
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def lived(count: int, phases: list[tuple[int, int]], versions: list[dict[str, Any]]) -> tuple[Any, dict[str, Any]]:
    """Moments and a summary of a replay whose phases begin at given requests."""
    begun = dict(phases)
    moments, phase = [], 1
    for i in range(count):
        phase = next((p for p, at in begun.items() if at == i + 1), phase)
        local = phase == 3 and i % 2 == 0
        money = Decimal(i) / 1000
        moments.append(Moment(i, phase, not local, 1.0, 0.4 if local else None, money, money, 0.5, 0.5, 0.5, float(i)))
    summary = {
        "remote_share_tail": 0.5,
        "promises": [
            {"figure": "correlation", "bound": "at least", "limit": 0.6, "realised": None, "low": None, "high": None}
        ],
        "phases": [{"phase": p, "from_request": at} for p, at in phases],
        "versions": versions,
        "spend": 1.0,
        "spend_without": 2.0,
    }
    return moments, summary


@pytest.mark.parametrize(
    "phases",
    [
        [(1, 0), (2, 60), (3, 120)],
        [(1, 0), (2, 3), (3, 5)],
        [(1, 0), (2, 60), (3, 62), (2, 64), (3, 66), (2, 655), (3, 659)],
    ],
)
def test_no_two_words_of_the_picture_overlap(phases: list[tuple[int, int]]) -> None:
    """However soon one phase follows another, up to the very end."""
    versions = [{"kind": kind, "promoted": kind == "refit", "at_request": 60} for kind in ("refit", "train")]
    figure = picture(*lived(660, phases, versions), "A title of a file with $5 and more $")
    figure.draw_without_rendering()
    width, height = figure.bbox.width, figure.bbox.height
    numbers = {one for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for one in axis.findobj(Text)}
    labels = {axis.label for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)}
    words = set(figure.findobj(Text)) - (numbers - labels)
    shown = [one for one in words if one.get_visible() and one.get_text()]
    boxes = [(one.get_text(), one.get_window_extent()) for one in shown]
    for (a, one), (b, other) in itertools.combinations(boxes, 2):
        assert not one.overlaps(other), (a, b)
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.x1 <= width, text
        assert box.y0 >= 0, text
        assert box.y1 <= height, text
    assert {"1 collect", "2 shadow", "3 serve"} <= {text for text, _ in boxes}


def test_what_is_promised_is_what_the_thresholds_say() -> None:
    """A disagreement stands in place of the correlation."""
    assert targets(TrustSettings(graduate=0.7)) == [Target("correlation", 0.7)]
    both = TrustSettings(max_disagreement=0.1, max_disagreement_overall=0.05)
    assert targets(both) == [Target("local answers that differ", 0.1), Target("answers that differ", 0.05)]


@pytest.mark.parametrize(("right", "expected"), [(1.0, 1.0), (0.5, 0.5), (0.0, 0.0)])
def test_what_came_of_a_promise_is_the_truth(right: float, expected: float) -> None:
    """Who copies a share of the recorded answers and guesses the others blindly correlates by that share."""
    draw = random.Random(7)
    recorded = [{"mood": draw.choice(MOODS)} for _ in range(3000)]
    moments = []
    for i, answer in enumerate(recorded):
        local = i >= 1000 and i % 2 == 0
        output = answer if not local or draw.random() < right else {"mood": draw.choice(MOODS)}
        by_chance = chance_of(output, recorded, i, ExactMatch()) if local else None
        nothing = Decimal(0)
        score = ExactMatch()(output, answer).score
        moments.append(Moment(i, 3, not local, score, by_chance, nothing, nothing, 0.5, 0.5, None, float(i)))
    correlation, served, everything = (
        list(course(moments, figure)) for figure in ("correlation", "local answers that differ", "answers that differ")
    )
    assert correlation[999] is served[999] is everything[999] is None
    assert correlation[-1].value == pytest.approx(expected, abs=0.06)
    assert served[-1].value == pytest.approx((1.0 - right) * 2 / 3, abs=0.05)
    assert served[-1].low <= served[-1].value <= served[-1].high
    assert everything[-1].value == pytest.approx(served[-1].value / 2, rel=0.01)


@pytest.mark.parametrize("local", [{"fine_tune_backend": "openai"}, {"backend": "hosted"}])
def test_a_replay_does_not_pay_outside_the_caps(tmp_path: Path, local: dict[str, str]) -> None:
    """Its store, and so its caps, are its own: what a vendor bills for training or answers is refused there."""
    document = yaml.safe_load((ROOT / "apprentice.yaml").read_text())
    document["local"] = {**document.get("local", {}), **local}
    config = tmp_path / "paid.yaml"
    config.write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError, match="for money, outside the caps"):
        _in_home(config, tmp_path / "home")
