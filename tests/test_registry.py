"""Names in apprentice.yaml: ours, and those that other packages bring by entry point."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from apprentice.cli import cli
from apprentice.errors import ConfigError
from apprentice.evaluators import build_evaluator
from apprentice.events.sinks import Webhook, sinks_of
from apprentice.operate.check import findings
from apprentice.registry import DECAY, ENGINES, EVALUATORS, KINDS, PROVIDERS, SINKS, TRAINERS, Plugin, Registry
from apprentice.secrets import scrub
from apprentice.settings.config import load_settings
from apprentice.settings.settings_schema import settings_schema

ROOT = Path(__file__).parents[1]
CONFIG = """\
tasks:
  - name: mood
    description: x
    input_schema: {text: str}
    output_schema: {label: a | b}
    evaluator: exact_match
remote:
  provider: anthropic
  model: claude-sonnet-4-5
  api_key_env: ANTHROPIC_API_KEY
local:
  backend: embedded
sampling:
  decay_function: linear
"""
SCORES = """\
from pydantic import BaseModel
from apprentice.evaluators import Evaluation, Evaluator
from apprentice.remote.provider import ProviderPlugin

class Half(Evaluator):
    class Options(BaseModel, extra="forbid"):
        score: float
        rounds: int = 1
        match_fields: tuple[str, ...] = ()

    def __init__(self, options):
        self.options = options

    @classmethod
    def configured(cls, options):
        return cls(options)

    def __call__(self, local, remote):
        return Evaluation(self.options.score, {})

class Bare(ProviderPlugin):
    needs = ()

def half(local, remote):
    return 0.5

NUMBER = 3
"""
type Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Makes a package that looks installed: a module and a dist-info with entry points, on `sys.path`."""
    modules: list[str] = []

    def make(name: str, code: str, **points: dict[str, str]) -> str:
        place = tmp_path / f"site-{name}"
        module = name.replace("-", "_")
        modules.append(module)
        about = place / f"{module}-1.5.dist-info"
        about.mkdir(parents=True)
        (place / f"{module}.py").write_text(code)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        lines = []
        for group, names in points.items():
            lines += [f"[apprentice.{group}]", *(f"{key} = {module}:{value}" for key, value in names.items())]
        (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(str(place))
        return module

    yield make
    for module in modules:
        sys.modules.pop(module, None)


def loaded(tmp_path: Path, *changes: tuple[str, str]) -> Any:
    text = CONFIG
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "apprentice.yaml"
    path.write_text(text)
    return load_settings(path, {})


def problem(tmp_path: Path, *changes: tuple[str, str]) -> str:
    """The one problem that a file has, as it is shown."""
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, *changes)
    (only,) = caught.value.problems
    return str(only)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (PROVIDERS, ["anthropic", "google", "openai", "openai_compatible"]),
        (ENGINES, ["embedded", "hosted", "llama_cpp", "ollama", "vllm"]),
        (TRAINERS, ["axolotl", "huggingface", "openai", "unsloth"]),
        (EVALUATORS, ["custom", "exact_match", "semantic_similarity", "structured_match"]),
        (DECAY, ["exponential", "linear", "step"]),
        (SINKS, ["webhook"]),
    ],
    ids=lambda it: it.kind if isinstance(it, Registry) else "",
)
def test_what_is_built_in(kind: Registry, names: list[str]) -> None:
    """Each name that a file may hold since the first release, and each is what its kind is made from."""
    assert kind.built_in == names
    for name in names:
        found = kind.find(name)
        assert found.is_ours
        assert issubclass(found.made, Plugin) if found.is_class else callable(found.made), name


def test_a_file_of_our_own_names_asks_no_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither loading it nor importing the library looks at entry points."""

    real = importlib.metadata.entry_points

    def never(*, group: str) -> Any:
        assert not group.startswith("apprentice."), "entry points were read"
        return real(group=group)  # pydantic has its own

    monkeypatch.setattr(importlib.metadata, "entry_points", never)
    assert loaded(tmp_path).remote.provider == "anthropic"
    code = (
        "import importlib.metadata as m\nreal = m.entry_points\nasked = []\n"
        "m.entry_points = lambda *, group: asked.append(group) or real(group=group)\n"
        "import apprentice, apprentice.client, apprentice.cli\n"
        "import sys; print([g for g in asked if g.startswith('apprentice')] + "
        "[n for n in sys.modules if n.startswith('apprentice.remote.providers.')])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("provider: anthropic", "provider: antropic", "remote.provider (line 8): is 'antropic', which is no provider. "
         "Did you mean 'anthropic'? Known: anthropic, google, openai, openai_compatible."),
        ("backend: embedded", "backend: olama", "local.backend (line 12): is 'olama', which is no engine. "
         "Did you mean 'ollama'? Known: embedded, hosted, llama_cpp, ollama, vllm."),
        ("decay_function: linear", "decay_function: lineer", "sampling.decay_function (line 14): is 'lineer', which is "
         "no decay function. Did you mean 'linear'? Known: exponential, linear, step."),
        ("evaluator: exact_match", "evaluator: haff", "tasks[0].evaluator (line 6): is 'haff', which is no evaluator. "
         "Did you mean 'half'? "
         "Known: custom, exact_match, half (scores-a 1.5), semantic_similarity, structured_match."),
        ("sampling:", "alerts: {sinks: {webook: {}}}\nsampling:", "alerts.sinks.webook (line 13): is 'webook', which "
         "is no alert sink. Did you mean 'webhook'? Known: webhook."),
    ],
)  # fmt: skip
def test_an_unknown_name_is_told_with_those_that_are_known(
    tmp_path: Path, install: Install, old: str, new: str, says: str
) -> None:
    """With its line, the nearest one, and the packages that bring what is not ours."""
    install("scores-a", SCORES, evaluators={"half": "Half"})
    assert problem(tmp_path, (old, new)) == says


def test_two_packages_with_one_name_are_both_named(tmp_path: Path, install: Install) -> None:
    """Which one is meant nobody can know."""
    install("scores-a", SCORES, evaluators={"half": "Half"})
    install("scores-b", SCORES, evaluators={"half": "Half"})
    assert problem(tmp_path, ("exact_match", "half")) == (
        "tasks[0].evaluator (line 6): is 'half', which 2 packages bring as an evaluator: scores-a 1.5 and "
        "scores-b 1.5. Uninstall all but one of them."
    )


@pytest.mark.parametrize(
    ("code", "value", "says"),
    [
        ("import no_such_thing", "Half", "cannot be imported (ModuleNotFoundError: No module named 'no_such_thing')"),
        ("1 / 0", "Half", "that cannot be imported (ZeroDivisionError: division by zero)"),
        ("", "Half", "that cannot be imported (AttributeError: "),
        (SCORES, "NUMBER", "which is no evaluator: it must be a class made from the base class of"),
        ("class Plain: ...", "Plain", "which is no evaluator"),
    ],
)  # fmt: skip
def test_a_package_that_cannot_be_used_is_named_with_the_line(
    tmp_path: Path, install: Install, code: str, value: str, says: str
) -> None:
    """Whatever its module raises; the package, what it registers, and where the file names it."""
    module = install("scores-a", code, evaluators={"half": value})
    told = problem(tmp_path, ("exact_match", "half"))
    assert told.startswith(
        f"tasks[0].evaluator (line 6): is 'half', which scores-a 1.5 brings as {module}:{value}"
    )  # fmt: skip
    assert says in told


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("{score: 0.5, round: 2}", "tasks[0].evaluator_options.round (line 7): is not a known key. Did you mean"),
        ("{score: much}", "tasks[0].evaluator_options.score (line 7): input should be a valid number"),
        ("{rounds: 2}", "tasks[0].evaluator_options.score (line 7): is missing."),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_told_with_their_line(
    tmp_path: Path, install: Install, options: str, says: str
) -> None:
    """As for every other key."""
    install("scores-a", SCORES, evaluators={"half": "Half"})
    told = problem(tmp_path, ("evaluator: exact_match", f"evaluator: half\n    evaluator_options: {options}"))
    assert told.startswith(says)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("evaluator: exact_match", "evaluator: exact_match\n    evaluator_options: {a: 1}",
         "tasks[0].evaluator_options (line 7): has 'a', and the evaluator 'exact_match' takes no options."),
        ("backend: embedded", "backend: embedded\n  backend_options: {a: 1}",
         "local.backend_options (line 13): has 'a', and the engine 'embedded' takes no options."),
        ("backend: embedded", "backend: embedded\n  fine_tune_options: {a: 1}",
         "local.fine_tune_options (line 13): has 'a', and the trainer 'huggingface' takes no options."),
        ("model: claude", "options: {a: 1}\n  model: claude",
         "remote.options (line 9): has 'a', and the provider 'anthropic' takes no options."),
        ("decay_function: linear", "decay_function: linear\n  decay_options: {a: 1}",
         "sampling.decay_options (line 15): has 'a', and the decay function 'linear' takes no options."),
        ("decay_function: linear", "decay_function: math:floor\n  decay_options: {a: 1}",
         "sampling.decay_options (line 15): are given for module:function, which takes none."),
        ("sampling:", "alerts: {sinks: {webhook: {url: nonsense}}}\nsampling:",
         "alerts.sinks.webhook.url (line 13): is no URL"),
    ],
)  # fmt: skip
def test_options_of_each_kind_are_looked_at(tmp_path: Path, old: str, new: str, says: str) -> None:
    """None is read by nobody in silence."""
    assert problem(tmp_path, (old, new)).startswith(says)


def test_an_evaluator_of_a_package_has_its_options_and_the_tasks_keys(tmp_path: Path, install: Install) -> None:
    """Of the task's keys those that its model names; a function does as well, and is held to its promises."""
    from apprentice.request.judge import evaluator_of

    install("scores-a", SCORES, evaluators={"half": "Half", "plain": "half"})
    chosen = "evaluator: half\n    evaluator_options: {score: 0.25}\n    match_fields: [label]"
    settings = loaded(tmp_path, ("evaluator: exact_match", chosen))
    evaluate: Any = evaluator_of(settings.tasks[0])
    assert evaluate({}, {}).score == 0.25
    assert evaluate.options.match_fields == ("label",)
    assert build_evaluator("plain")({}, {}).score == 0.5
    assert (evaluate.is_quick, evaluate.has_ceiling, evaluate.expect({"label": 1.0})) == (False, False, None)


def test_a_name_of_ours_stays_ours_and_check_says_so(tmp_path: Path, install: Install) -> None:
    """No package takes over what a file meant before it was installed."""
    install("scores-a", SCORES, evaluators={"exact_match": "Half"}, providers={"bare": "Bare"})
    found = list(findings(loaded(tmp_path), {"ANTHROPIC_API_KEY": "sk-test"}))
    assert [one.detail for one in found if one.part == "tasks[].evaluator"] == [
        "scores-a 1.5 brings an evaluator 'exact_match'; the built-in one is used"
    ]
    assert [one.detail for one in found if one.part == "mood.evaluator"] == ["exact_match"]
    assert PROVIDERS.known() == ["anthropic", "bare", "google", "openai", "openai_compatible"]


def test_the_schema_for_editors_knows_what_is_installed(install: Install) -> None:
    """Where it is written, its names are offered; the committed one holds ours alone."""
    install("scores-a", SCORES, evaluators={"half": "Half"})
    described = settings_schema()["properties"]["tasks"]["items"]["properties"]["evaluator"]
    assert described["enum"] == ["custom", "exact_match", "half", "semantic_similarity", "structured_match"]
    printed = json.loads(CliRunner().invoke(cli, ["schema"]).output)
    assert printed["properties"]["tasks"]["items"]["properties"]["evaluator"] == described


def test_a_sinks_address_is_a_secret_wherever_it_stands(tmp_path: Path) -> None:
    """As that of `alerts.webhook`, to which it is the same."""
    url = "https://hooks.example/services/T0/B0/x7Yq0pLm3"
    settings = loaded(tmp_path, ("sampling:", f"alerts: {{sinks: {{webhook: {{url: '{url}'}}}}}}\nsampling:"))
    (sink,) = sinks_of(settings.alerts)
    assert isinstance(sink, Webhook)
    assert "x7Yq0pLm3" not in scrub(repr(settings)) + repr(settings.alerts)


def test_a_machine_without_flows_takes_every_trainers_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router answers and never trains: it needs neither flows/ nor the package that trains elsewhere."""
    changed = ("backend: embedded", "backend: embedded\n  fine_tune_backend: elsewhere\n  fine_tune_options: {a: 1}")
    assert "which is no trainer" in problem(tmp_path, changed)
    monkeypatch.setitem(vars(TRAINERS), "_ours", None)
    assert loaded(tmp_path, changed).local.fine_tune_backend == "elsewhere"


def test_every_group_is_one_of_the_documented_ones() -> None:
    """docs/extending.md names each kind's group and key."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert [kind.group for kind in KINDS if f"`{kind.group}`" not in page] == []


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of what ships, to be changed."""
    for name in ("apprentice", "flows"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "copy"


ONE_FILE = {
    "provider": "apprentice/remote/providers/acme.py",
    "evaluator": "apprentice/evaluators/near_day.py",
    "engine": "apprentice/local/engines/rote.py",
    "trainer": "flows/trainers/backends/rote.py",
}


def test_a_new_one_of_ours_is_one_file(copied: Path, tmp_path: Path) -> None:
    """The table in CONTRIBUTING.md: a file for four kinds, a class and its line in one file for the other two."""
    acme = ROOT / "examples" / "acme"
    classes = {"provider": "Acme", "evaluator": "NearDay", "engine": "Rote", "trainer": "RoteTrainer"}
    for kind, place in ONE_FILE.items():
        code = (acme / "apprentice_acme" / f"{kind}.py").read_text(encoding="utf-8")
        (copied / place).write_text(f"{code}\n\nREGISTERED = {classes[kind]}\n", encoding="utf-8")
    sampling = copied / "apprentice" / "confidence" / "sampling.py"
    cubic = "def cubic(correlation, trigger, floor):\n    return linear(correlation, trigger, floor) ** 3\n\n\n"
    text = sampling.read_text(encoding="utf-8")
    text = text.replace("CURVES: dict", cubic + "CURVES: dict").replace(
        '"step": step}', '"step": step, "cubic": cubic}'
    )
    sampling.write_text(text, encoding="utf-8")
    sinks = copied / "apprentice" / "events" / "sinks.py"
    code = (acme / "apprentice_acme" / "sink.py").read_text(encoding="utf-8")
    pager = "import os\n\n" + code[code.index("class Pager") :] + "\n\n"
    text = sinks.read_text(encoding="utf-8").replace("SINKS: Mapping", pager + "SINKS: Mapping")
    text = text.replace("import register_url,", "import register, register_url,")
    sinks.write_text(text.replace('{"webhook": Webhook}', '{"webhook": Webhook, "pager": Pager}'), encoding="utf-8")

    config = (acme / "apprentice.yaml").read_text(encoding="utf-8")
    config = config.replace("decay_function: power\n  decay_options: {exponent: 3}", "decay_function: cubic")
    (tmp_path / "apprentice.yaml").write_text(config, encoding="utf-8")
    code = (
        "from apprentice import load_settings\nfrom apprentice.registry import KINDS\n"
        "from apprentice.settings.settings_schema import settings_schema\n"
        "from apprentice.operate.check import findings\n"
        "settings = load_settings('apprentice.yaml', {})\n"
        "print([one for one in findings(settings, {'ACME_API_KEY': 'acme-0123456789'}) if one.state == 'problem'])\n"
        "names = {'acme', 'near_day', 'rote', 'cubic', 'pager'}\n"
        "print([sorted(names & set(kind.built_in)) for kind in KINDS])\n"
        "print(settings_schema()['properties']['remote']['properties']['provider']['enum'])\n"
    )
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(copied)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environ, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "[]",
        "[['acme'], ['rote'], ['rote'], ['near_day'], ['cubic'], ['pager']]",
        "['acme', 'anthropic', 'google', 'openai', 'openai_compatible']",
    ]
