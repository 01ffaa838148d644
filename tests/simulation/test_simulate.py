"""The simulator: scenarios, what becomes of them, and their pictures."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from apprentice.cli import cli
from apprentice.confidence.settings import TrustSettings
from apprentice.errors import ConfigError
from apprentice.simulation.simulate import (
    Happening,
    LocalModel,
    Scenario,
    Training,
    load_scenario,
    picture,
    run_command,
    simulate,
)

FOLDER = Path(__file__).parents[2] / "examples" / "scenarios"
SHIPPED = sorted(FOLDER.glob("*.yaml"))


def shipped(name: str, requests: int = 100_000) -> Scenario:
    return replace(load_scenario(FOLDER / f"{name}.yaml"), requests=requests)


def test_the_seven_worlds_ship():
    """Improving, gradual drift, sudden shift, anti-correlated, noisy teacher, one class at 95 %, recovery."""
    assert [path.stem for path in SHIPPED] == [
        "anti_correlated", "gradual_drift", "improving", "noisy_teacher", "one_class_at_95", "recovery", "sudden_shift",
    ]  # fmt: skip


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_holds_in_every_scenario(path: Path):
    """The rate never falls faster than the factor, shares are shares, and every request was answered by somebody."""
    scenario = replace(load_scenario(path), requests=3000)
    result = simulate(scenario)
    assert result.steepest_fall >= 1.0 - scenario.trust.max_fall - 1e-9
    assert result.remote_calls + result.local_served == scenario.requests
    assert all(0.0 <= p.coverage <= 1.0 and 0.0 <= p.remote_share <= 1.0 for p in result.points)
    assert result.points[-1].request == scenario.requests
    assert result.phases[0] == (0, 1)
    json.dumps(result.summary())


def test_the_same_seed_is_the_same_stream():
    """A simulation can be repeated; another seed is another stream."""
    scenario = shipped("improving", 3000)
    one, two, three = simulate(scenario), simulate(scenario), simulate(scenario, seed=99)
    assert one.points == two.points
    assert one.points != three.points


def test_improving_serves_nearly_everything():
    """The remote share falls from 1 below a tenth, and agreement stays above the target's."""
    result = simulate(shipped("improving", 15_000))
    assert result.points[-1].coverage > 0.85
    assert result.summary()["remote_share_tail"] < 0.2
    assert result.agreement_local is not None
    assert result.agreement_local > 1 - 0.15 * 6 / 7


@pytest.mark.parametrize("name", ["anti_correlated", "one_class_at_95"])
def test_a_model_that_knows_nothing_never_serves(name: str):
    """However often it agrees."""
    result = simulate(shipped(name, 8000))
    assert result.local_served == 0
    assert result.phases[-1][1] == 2


@pytest.mark.parametrize(("name", "spot_checks"), [("sudden_shift", 250), ("recovery", 250)])
def test_a_change_is_noticed(name: str, spot_checks: int):
    """Within a few hundred spot checks, brought forward to request 3,000."""
    scenario = shipped(name, 6_000)
    scenario = replace(scenario, happenings=[replace(scenario.happenings[0], at=3000)])
    result = simulate(scenario)
    assert result.delays[0]["spot_checks"] is not None
    assert result.delays[0]["spot_checks"] <= spot_checks
    if name == "recovery":
        assert result.points[-1].phase == 3
        assert result.points[-1].sampling_rate < 0.5


def test_a_drift_is_noticed():
    """A third of the agreement lost over 4,000 requests."""
    scenario = shipped("gradual_drift", 7_000)
    result = simulate(replace(scenario, happenings=[Happening(3000, "drift", 0.66, over=4000)]))
    assert result.delays[0]["requests"] is not None
    assert result.delays[0]["requests"] <= 5000


def test_the_noisy_teacher_is_served_within_the_target():
    """At most 20 % disagreement, though the teacher contradicts itself."""
    result = simulate(shipped("noisy_teacher", 8_000))
    assert result.agreement_local is not None
    assert result.agreement_local >= 0.8


def test_the_oracle_agrees_with_the_count():
    """The true agreement of the served slice is what was in fact served, over many requests."""
    scenario = Scenario(
        "flat",
        requests=8_000,
        local=LocalModel({100: (0.99, 0.98, 0.97, 0.95)}, certainty=0.9),
        training=Training(first=200, enabled=False),
        trust=TrustSettings(graduate=0.8),
    )
    result = simulate(scenario)
    assert result.agreement_local == pytest.approx(result.points[-1].true_agreement, abs=0.02)


BROKEN = """
requests: many
classes: []
local:
  curve: {100: [0.9, 0.2, 0.9, 0.9]}
  sureness: 1
happenings:
  - {kind: shift}
trust: {graduate: high}
"""


def test_every_mistake_in_a_scenario_is_told_at_once(tmp_path: Path):
    """Each with its path and what would be right."""
    path = tmp_path / "broken.yaml"
    path.write_text(BROKEN)
    with pytest.raises(ConfigError) as caught:
        load_scenario(path)
    paths = {problem.path for problem in caught.value.problems}
    assert {"requests", "classes", "local.curve.100", "local.sureness", "happenings[0]", "trust.graduate"} <= paths


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("happenings: [{at: 1, kind: flood}]", "use shift, drift or teacher_change"),
        ("local: {always: 9}", "must be one of the 7 classes"),
        ("teacher_noise: 2.0", "must lie in"),
        ("requests: 0", "must be at least 1"),
        ("[1, 2]", "must be a mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_scenario_that_makes_no_sense(tmp_path: Path, text: str, message: str):
    """What YAML allows and no world can be."""
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_scenario(path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A table on the terminal, figures as JSON, a picture as PNG."""
    scenario = tmp_path / "small.yaml"
    scenario.write_text("requests: 3000\nlocal:\n  curve: {100: [0.99, 0.98, 0.97, 0.96]}\ntraining: {first: 200}\n")
    run_command(scenario, tmp_path / "small.png", tmp_path / "small.json", 3)
    shown = capsys.readouterr().out
    assert "remote share" in shown
    figures = json.loads((tmp_path / "small.json").read_text())
    assert figures["requests"] == 3000
    assert figures["points"][-1]["request"] == 3000
    assert (tmp_path / "small.png").read_bytes()[:4] == b"\x89PNG"


def test_a_risk_budget_shows_its_floor_and_its_price(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """50 bad answers a fall instead of the floor of .02: the rate ends at what that takes, and the table says so."""
    scenario = tmp_path / "budget.yaml"
    scenario.write_text(
        "requests: 4000\nprice_remote: 0.01\nlocal:\n  curve: {100: [0.99, 0.99, 0.99, 0.99]}\n"
        "training: {first: 200, enabled: false}\ntrust: {max_disagreement: 0.05, max_bad_answers: 50}\n"
    )
    run_command(scenario, None, tmp_path / "budget.json", 3)
    last = json.loads((tmp_path / "budget.json").read_text())["points"][-1]
    assert last["sampling_rate"] >= last["sampling_floor"] > 0.1
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    price = 10.0 * last["sampling_floor"] * last["coverage"]
    assert f"{100 * last['sampling_floor']:.1f} %, which costs ${price:.2f} for 1,000 requests" in words


def test_thresholds_can_be_a_tasks_own(tmp_path: Path):
    """`--task` takes what apprentice.yaml says; every seed can be chosen, 0 too; a task that is not there is named."""
    path = tmp_path / "small.yaml"
    path.write_text("requests: 600\nlocal:\n  curve: {100: [0.99, 0.98, 0.97, 0.96]}\ntraining: {first: 200}\n")
    config = FOLDER.parent.parent / "apprentice.yaml"
    command = ["simulate", str(path), "--config", str(config), "--json", str(tmp_path / "small.json")]
    seen = {}
    for more in ("--seed=0", "--seed=1", "--task=classify_ticket"):
        assert CliRunner().invoke(cli, [*command, more]).exit_code == 0
        seen[more] = json.loads((tmp_path / "small.json").read_text())["events"]
    assert seen["--seed=0"] != seen["--seed=1"]
    assert seen["--task=classify_ticket"] != seen["--seed=1"]
    assert "has no task 'x'" in CliRunner().invoke(cli, [*command, "--task=x"]).output


def test_what_happens_after_the_last_request_is_an_error(tmp_path: Path):
    """It would be reported as never noticed."""
    path = tmp_path / "late.yaml"
    path.write_text("requests: 600\nhappenings: [{at: 600, kind: shift, factor: 0.5}]\n")
    with pytest.raises(ConfigError, match=r"happenings\[0\].at.*never happen"):
        load_scenario(path)


def test_a_picture_of_every_kind_of_world(tmp_path: Path):
    """Happenings, alarms, nothing served: each draws."""
    for name in ("sudden_shift", "one_class_at_95"):
        picture(simulate(shipped(name, 2000)), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000
