"""Proof that a loaded version is the validated one, and really at work.

Engines can load an adapter silently without effect, convert it wrongly, or serve another one from a stale cache. The
validator left answers beside the adapter; before traffic moves, the engine has to give them again (parity), and some
of them must differ from what the untrained base model said (activity).
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apprentice.errors import EngineUnavailable, VersionError
from apprentice.local.engine import Engine, LocalAnswer

__all__ = ["PARITY", "Probe", "check_parity", "choose_probes", "read_probes"]

PARITY = 0.99
"""Share of the validator's answers that must come back the same."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One input, the validated answer to it, and the base model's (None where that one gave none)."""

    input: Mapping[str, Any]
    output: Mapping[str, Any]
    base_output: Mapping[str, Any] | None


def choose_probes(
    answered: Sequence[tuple[Mapping[str, Any], LocalAnswer]], count: int, draw: random.Random
) -> list[tuple[Mapping[str, Any], LocalAnswer]]:
    """``count`` inputs with their answers, drawn from the more confident half.

    Where two answers are as likely as each other, rounding decides, and an engine that batches rounds differently from
    one time to the next: such an input tells nothing about the weights.
    """
    sure = sorted(answered, key=lambda pair: -pair[1].confidence)[: max(count, (len(answered) + 1) // 2)]
    return draw.sample(sure, min(count, len(sure)))


def read_probes(folder: Path) -> list[Probe]:
    """The probes in an adapter folder; none where there is no probe.json. Raises `VersionError` where it is damaged."""
    path = folder / "probe.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [Probe(row["input"], row["output"], row.get("base_output")) for row in rows]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise VersionError(f"{path} cannot be read ({error}); validate the version again") from None


def check_parity(engine: Engine, version: str, probes: Sequence[Probe]) -> None:
    """Ask a loaded version its probes. Raises `VersionError` where it fails them, `EngineUnavailable`."""
    if not probes:
        return
    answers = engine.answer_many(version, [probe.input for probe in probes])
    for answer in answers:
        if isinstance(answer, EngineUnavailable):
            raise answer
    outputs = [answer.output if isinstance(answer, LocalAnswer) else None for answer in answers]
    same = sum(output == probe.output for output, probe in zip(outputs, probes, strict=True))
    if same < PARITY * len(probes):
        raise VersionError(
            f"version {version} gives {same} of {len(probes)} validated answers again, and must give {PARITY:.0%}: "
            "what is loaded is not what was validated; validate it in this engine"
        )
    changed = sum(output != probe.base_output for output, probe in zip(outputs, probes, strict=True))
    if not changed:
        raise VersionError(
            f"version {version} answers all {len(probes)} probes as the base model does: its adapter is not at work"
        )
