"""A curated dataset on disk: two JSON Lines files and a card, named by the content they have.

    <digest>.train.jsonl      rows to train on
    <digest>.held_out.jsonl   rows that no run of this task ever trains on, the newest ones, for the gate
    <digest>.card.json        counts, balance, conflicts: what was done to get here

A file appears whole or not at all, and the same examples give the same name, so curating twice writes nothing twice.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from apprentice.errors import TrainingError

__all__ = ["Card", "CuratedDataset", "load_dataset", "write_whole"]


@dataclass(frozen=True, slots=True)
class Card:
    """What a dataset holds and what was left out of it on the way."""

    task: str
    examples: int
    trained_on: int
    held_out: int
    held_out_older: int
    exact_duplicates: int
    near_duplicates: int
    conflicts: int
    invalid: int
    repeated: int
    data_high_water: int
    models: dict[str, int] = field(default_factory=dict)
    balance: dict[str, dict[str, int]] = field(default_factory=dict)

    def markdown(self, digest: str) -> str:
        """The card as people read it."""
        lines = [
            f"# Dataset {digest[:12]} of {self.task}",
            "",
            "| | rows |",
            "| --- | ---: |",
            f"| examples in the store | {self.examples} |",
            f"| trained on | {self.trained_on} |",
            f"| held out, used by the gate | {self.held_out} |",
            f"| held out, older, unused | {self.held_out_older} |",
            f"| exact duplicates dropped | {self.exact_duplicates} |",
            f"| near duplicates dropped | {self.near_duplicates} |",
            f"| inputs with conflicting answers, settled by majority | {self.conflicts} |",
            f"| outside today's schema, dropped | {self.invalid} |",
            f"| shown more often (recent disagreements) | {self.repeated} |",
            "",
            "Taught by " + (", ".join(f"{m} ({n})" for m, n in self.models.items()) or "nobody") + ".",
        ]
        for name, counts in self.balance.items():
            total = sum(counts.values())
            shares = ", ".join(f"{value} {n / total:.0%}" for value, n in counts.items())
            lines += ["", f"**{name}**: {shares}"]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class CuratedDataset:
    """Where a curated dataset lies. ``digest`` is the SHA-256 of both files."""

    digest: str
    train: Path
    held_out: Path
    card: Card


def load_dataset(folder: Path, digest: str) -> CuratedDataset:
    """A dataset that was written before. Raises `TrainingError` where a file is gone."""
    train, held_out, card = (
        folder / f"{digest[:16]}.{part}" for part in ("train.jsonl", "held_out.jsonl", "card.json")
    )
    for path in (train, held_out, card):
        if not path.is_file():
            raise TrainingError(f"{path} is gone; start the training run again to curate it anew")
    return CuratedDataset(digest, train, held_out, Card(**json.loads(card.read_text(encoding="utf-8"))))


def adopt_dataset(folder: Path, train: Path, held_out: Path, card: Card) -> CuratedDataset:
    """Give two finished files their content's name, the card last: it says that the other two are whole."""
    digest = hashlib.sha256()
    for path in (train, held_out):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    name = digest.hexdigest()
    train.replace(folder / f"{name[:16]}.train.jsonl")
    held_out.replace(folder / f"{name[:16]}.held_out.jsonl")
    write_whole(folder / f"{name[:16]}.card.json", json.dumps(asdict(card), ensure_ascii=False, indent=1) + "\n")
    return load_dataset(folder, name)


def write_whole(path: Path, text: str) -> None:
    """Write a file that a reader sees whole or not at all."""
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def plain(value: Any) -> str:
    """One line of a dataset file."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
