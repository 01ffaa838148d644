"""The PEFT trainer on a tiny model: what it computes, and that it can be killed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from apprentice.errors import TrainingError  # noqa: E402
from apprentice.local.adapter import content_name  # noqa: E402
from apprentice.local.base_model import SMOLLM2, load_tokenizer, resolve_base_model  # noqa: E402
from apprentice.local.frame import Frame  # noqa: E402
from apprentice.local.skeleton import Skeleton  # noqa: E402
from apprentice.schemas.schema import parse_schema  # noqa: E402
from apprentice.settings.config import TrainingSettings  # noqa: E402  # after importorskip
from flows.trainers import Progress, TrainingJob, TrainingRow  # noqa: E402
from flows.trainers.backends.huggingface import PeftTrainer  # noqa: E402
from flows.trainers.batches import bucketed, padding  # noqa: E402
from flows.trainers.encoding import encode  # noqa: E402
from flows.trainers.halves import Halves  # noqa: E402
from flows.trainers.labelled import IGNORED, labelled  # noqa: E402
from flows.trainers.recipe import choose  # noqa: E402

SCHEMA = parse_schema({"mood": "glad | sad", "urgent": "bool"})
# What transformers and PEFT say about tiny models while they are built and saved is not ours.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:(transformers|peft|torch).*")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 16 small layers with SmolLM2's tokenizer and random weights."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = load_tokenizer(resolve_base_model(SMOLLM2, folder))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def job(tmp_path: Path, tiny: Path) -> Callable[..., TrainingJob]:
    """Jobs over forty rows whose mood depends on a word."""

    def make(name: str = "one", **settings: Any) -> TrainingJob:
        rows = [
            {
                "id": str(i),
                "input": {"text": f"{'lovely' if i % 2 else 'dreadful'} weather on day {i}" + " again" * (i % 5)},
                "output": {"mood": "glad" if i % 2 else "sad", "urgent": i % 3 == 0},
            }
            for i in range(40)
        ]
        path = tmp_path / "data.train.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
        options = {"epochs": 2, "learning_rate": 0.02, **settings}
        folders = (tmp_path, tmp_path / name, tmp_path / "adapters")
        return TrainingJob("mood", path, SCHEMA, str(tiny), *folders, TrainingSettings(**options))

    return make


def test_training_learns_and_is_named_by_its_content(job: Callable[..., TrainingJob]) -> None:
    """The loss falls, the folder's name is its content's, and it names no path of this machine."""
    heard: list[Progress] = []
    trained = PeftTrainer().train(job(epochs=6), heard.append)
    assert heard[-1].loss is not None
    assert heard[0].loss is not None
    assert heard[-1].loss < heard[0].loss
    assert heard[-1].step == heard[-1].steps == trained.steps
    assert trained.name == trained.folder.name == content_name(trained.folder)
    assert (trained.folder / "frame.json").is_file()
    assert trained.trained_on == 40
    assert set(trained.toolchain) >= {"torch", "peft", "python"}


def test_a_killed_run_ends_like_one_that_was_not(
    job: Callable[..., TrainingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle and started again, training gives the very same weights."""
    whole = PeftTrainer().train(job("whole"), lambda _: None)
    monkeypatch.setattr("flows.trainers.loop._CHECKPOINT_S", 0.0)

    def stop(progress: Progress) -> None:
        if progress.step >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PeftTrainer().train(job("broken"), stop)
    steps: list[int] = []
    resumed = PeftTrainer().train(job("broken"), lambda p: steps.append(p.step))
    assert len(steps) <= 2
    assert resumed.name == whole.name


def test_a_checkpoint_of_another_dataset_is_not_used(job: Callable[..., TrainingJob]) -> None:
    """A checkpoint belongs to one dataset and one recipe."""
    first = PeftTrainer().train(job("work"), lambda _: None)
    other = PeftTrainer().train(job("work", seed=5), lambda _: None)
    assert other.steps == first.steps
    assert other.name != first.name


def test_rows_that_are_too_long_are_left_out_and_counted(job: Callable[..., TrainingJob]) -> None:
    """max_length leaves rows out, never cuts them; when none is left the error says what to do."""
    one = job(max_length=64)
    lines = one.dataset.read_text().splitlines()
    row = json.loads(lines[0])
    row["input"]["text"] = "very " * 100
    one.dataset.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
    trained = PeftTrainer().train(one, lambda _: None)
    assert (trained.left_out, trained.trained_on) == (1, 39)
    one.dataset.write_text(json.dumps(row) + "\n")
    with pytest.raises(TrainingError, match=r"local\.training\.max_length"):
        PeftTrainer().train(one, lambda _: None)


def test_layers_that_do_not_exist_are_named(job: Callable[..., TrainingJob]) -> None:
    """A wrong target_modules is an error with the key to change, not an adapter that does nothing."""
    with pytest.raises((TrainingError, ValueError), match="attention_of_old"):
        PeftTrainer().train(job(target_modules=["attention_of_old"]), lambda _: None)


def test_the_halves_compute_what_the_whole_does(tiny: Path) -> None:
    """Cut at any depth, and padded, the decided logits are those of the uncut model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).eval()
    tokenizer = load_tokenizer(resolve_base_model(str(tiny), tiny))
    rows = [TrainingRow(str(i), {"text": "rain " * i}, {"mood": "sad", "urgent": True}) for i in (1, 4, 9)]
    encoded, _ = encode(rows, tokenizer, Frame.of_tokenizer(tokenizer), Skeleton.of(SCHEMA), 100)
    for trained in (1, 6, 16):
        assert Halves(model, trained).exact(encoded)
    assert len(model.model.layers) == model.config.num_hidden_layers == 16


def test_only_decided_tokens_are_learnt(tiny: Path) -> None:
    """Every forced token and the whole prompt are ignored; the decided ones spell the values."""
    tokenizer = load_tokenizer(resolve_base_model(str(tiny), tiny))
    row = TrainingRow("1", {"text": "rain"}, {"mood": "sad", "urgent": True}, repeat=2)
    encoded, _ = encode([row], tokenizer, Frame.of_tokenizer(tokenizer), Skeleton.of(SCHEMA), 100)
    assert len(encoded) == 2
    labels = labelled(encoded[0])
    learnt = [token for token in labels["labels"] if token != IGNORED]
    assert "".join(tokenizer.decode([t]) for t in learnt).replace(" ", "") == 'sad"true'
    shown = tokenizer.decode(labels["input_ids"])
    assert shown.endswith('{"mood":"sad","urgent":true')
    assert len({len(v) for v in labels.values()}) == 1


def test_batches_hold_every_row_once_and_next_to_no_padding() -> None:
    """Whatever the lengths, an epoch is a permutation, and rows of like length share a batch."""
    lengths = [10 + (i * 37) % 60 for i in range(503)]
    batches = bucketed(lengths, 8, seed=3, epoch=1)
    assert sorted(i for batch in batches for i in batch) == list(range(503))
    assert padding(lengths, batches) < 0.05
    assert bucketed(lengths, 8, seed=3, epoch=1) == batches
    assert bucketed(lengths, 8, seed=3, epoch=2) != batches


@pytest.mark.parametrize("rows", [50, 300, 3000, 100_000])
def test_the_recipe_fits_the_data(rows: int) -> None:
    """More examples are shown less often; what the configuration sets is kept; the rate ends at zero."""
    recipe = choose(TrainingSettings(), rows=rows, layers=30, on_gpu=False)
    assert recipe.trained_layers == 12
    assert choose(TrainingSettings(), rows=rows, layers=30, on_gpu=True).trained_layers == 30
    kept = choose(TrainingSettings(lora_rank=4, epochs=1.5, batch_size=2), rows=rows, layers=30, on_gpu=False)
    assert (kept.lora_rank, kept.lora_alpha, kept.epochs, kept.batch_size) == (4, 8.0, 1.5, 2)
    steps = recipe.steps(rows)
    rates = [recipe.rate(step, steps) for step in range(steps)]
    assert max(rates) == pytest.approx(recipe.learning_rate)
    assert 0 < rates[-1] < 0.2 * recipe.learning_rate
    assert dataclasses.replace(recipe, epochs=recipe.epochs + 1).steps(rows) > steps


@pytest.mark.timeout(300)
def test_processes_together_learn_what_one_learns(job: Callable[..., TrainingJob]) -> None:
    """Two processes, each with half of every batch, end with one process's weights up to rounding."""
    alone = PeftTrainer().train(job("alone", seed=3), lambda _: None)
    heard: list[Progress] = []
    together = PeftTrainer().train(job("together", seed=3, processes=2, batch_size=8), heard.append)
    assert (together.steps, together.recipe["processes"]) == (alone.steps, 2)
    assert (heard[-1].step, heard[-1].fraction) == (alone.steps, 1.0)
    assert heard[-1].loss == pytest.approx(alone.loss, rel=1e-3)
    one, two = (load_file(v.folder / "adapter_model.safetensors") for v in (alone, together))
    assert one.keys() == two.keys()
    # What was learnt: B begins at zero. Where a gradient is nearly nothing, Adam makes rounding visible.
    learnt = [name for name in one if "lora_B" in name]
    apart = sum(float((one[name] - two[name]).square().sum()) for name in learnt)
    assert apart < 0.02**2 * sum(float(one[name].square().sum()) for name in learnt)


@pytest.mark.timeout(300)
def test_an_error_in_one_process_is_told_as_it_is(job: Callable[..., TrainingJob]) -> None:
    """Nothing to train on says so with its remedy, and not that a process ended with 1."""
    with pytest.raises(TrainingError, match=r"max_length \(32 tokens\); raise it"):
        PeftTrainer().train(_too_long(job(processes=2, max_length=32)), lambda _: None)


def _too_long(work: TrainingJob) -> TrainingJob:
    row = {"id": "1", "input": {"text": "again " * 200}, "output": {"mood": "glad", "urgent": True}}
    work.dataset.write_text(json.dumps(row) + "\n")
    return work


def test_preflight_finds_what_training_would_fail_of(
    job: Callable[..., TrainingJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little memory, a full disk and nothing to learn from, each within seconds and with its remedy."""
    import psutil

    trainer = PeftTrainer()
    trainer.preflight(job())
    little = psutil.virtual_memory()._replace(available=500 << 20)
    with monkeypatch.context() as patched:
        patched.setattr(psutil, "virtual_memory", lambda: little)
        with pytest.raises(TrainingError, match=r"needs about 1\d+ MB of memory and 500 MB are free; stop"):
            trainer.preflight(job())
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 7 << 20}))
        with pytest.raises(TrainingError, match=r"has 7 MB free.*make room"):
            trainer.preflight(job())
    empty = job()
    empty.dataset.write_text("")
    with pytest.raises(TrainingError, match="has 0 rows to train on"):
        trainer.preflight(empty)
