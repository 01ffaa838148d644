"""Swapping versions under load: does anyone notice?

    python -m benchmarks.swap [--engine embedded llama_cpp vllm] [--adapters A B] [--seconds 60] [--swaps 10]

Sixteen callers ask without a pause while the champion goes back and forth between two versions of the ISEAR task, each
way a whole swap: load beside, probe, switch, drain, unload. Half a minute without swaps comes first, to compare with.
Every fourth input is one that both versions have answered before, alone: an answer that is nearer to the version that
it does not name mixes versions. These are inputs of which both are sure, and which they answer differently or with
clearly different confidence. The others are asked once each, as in life: no server has them in its prompt cache.

Without ``--adapters`` two are trained first. vllm needs a running server (``--url``) that can load adapters.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apprentice.local.adapter import content_name
from apprentice.local.base_model import SMOLLM2
from apprentice.local.engine import Engine, LocalAnswer, Version
from apprentice.local.probe import choose_probes
from apprentice.local.switch import Switch
from apprentice.settings.config import TrainingSettings
from benchmarks.engines import SCHEMA, Row, answers_of, isear_rows, train_on

TASK = "emotion"
CALLERS = 16
_PROBES = 24
_KNOWN = 0.25
_CLEAR, _SURE = 0.10, 0.55
"""Difference of confidence by which an answer tells which version gave it, and confidence above which rounding does not
decide what it is."""


@dataclass
class Heard:
    """What the callers met: when each request began and how long it took, in seconds, and everything wrong."""

    took: list[tuple[float, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    compared: int = 0
    mixed: list[str] = field(default_factory=list)
    answered_by: dict[str, int] = field(default_factory=dict)


def main() -> None:
    options = _options()
    import torch

    torch.set_num_threads(options.threads)
    rows = isear_rows(options.data)
    folders = options.adapters or [train_on(rows[:n], options.work, TrainingSettings(seed=n)) for n in (300, 200)]
    print(
        f"{CALLERS} callers for {options.seconds:g} s, {options.swaps} swaps; p99 aim: at most 3 x that outside a swap"
    )
    for name in options.engine:
        engine = _engine(name, options)
        try:
            _measure(name, engine, folders, rows[-2000:], options)
        finally:
            engine.close()


def _measure(
    name: str, engine: Engine, folders: Sequence[Path], rows: Sequence[Row], options: argparse.Namespace
) -> None:
    versions = [_copied(folder, options.work / name) for folder in folders]
    asked, expected = _prepare(engine, versions, [value for value, _ in rows[: options.asked]])
    known = {version.name: version for version in versions}
    alerts: list[str] = []
    switch = Switch(
        engine, lambda _, wanted: known[wanted], alert=lambda kind, _, evidence: alerts.append(f"{kind}: {evidence}")
    )
    switch.follow(TASK, versions[0].name)
    if not switch.wait_until_serving(TASK, versions[0].name, 600):
        raise SystemExit(f"{name}: the first version did not come to serve: {alerts}")
    engine.unload(versions[1].name)
    heard, stop = Heard(), threading.Event()
    fresh = itertools.cycle([value for value, _ in rows[options.asked :]])
    callers = [
        threading.Thread(target=_call, args=(switch, asked, fresh, expected, heard, stop, n), daemon=True)
        for n in range(CALLERS)
    ]
    for caller in callers:
        caller.start()
    time.sleep(options.calm)
    swaps = _swap_to_and_fro(switch, engine, versions, options.seconds, options.swaps)
    stop.set()
    for caller in callers:
        caller.join()
    switch.close()
    _print(name, heard, swaps, alerts)


def _prepare(
    engine: Engine, versions: Sequence[Version], values: Sequence[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], dict[str, list[LocalAnswer]]]:
    """Leave probes beside both adapters, as validation does, and pick the inputs on which the versions differ."""
    some = list(values)
    base = Version("base", TASK, None, SCHEMA)
    engine.load(base)
    said = {}
    for version in versions:
        engine.load(version)
        said[version.name] = answers_of(engine, version, some)
        chosen = choose_probes(list(zip(some, said[version.name], strict=True)), _PROBES, random.Random(0))
        untrained = answers_of(engine, base, [value for value, _ in chosen])
        probes = [
            {"input": value, "output": mine.output, "base_output": raw.output}
            for (value, mine), raw in zip(chosen, untrained, strict=True)
        ]
        assert version.adapter is not None
        (version.adapter / "probe.json").write_text(json.dumps(probes), encoding="utf-8")
    engine.unload(base.name)
    one, other = (said[version.name] for version in versions)
    telling = [
        i
        for i in range(len(some))
        if min(one[i].confidence, other[i].confidence) > _SURE
        and (one[i].output != other[i].output or abs(one[i].confidence - other[i].confidence) > _CLEAR)
    ]
    return [some[i] for i in telling], {name: [answers[i] for i in telling] for name, answers in said.items()}


def _call(
    switch: Switch,
    asked: Sequence[Mapping[str, Any]],
    fresh: Iterator[Mapping[str, Any]],
    expected: Mapping[str, Sequence[LocalAnswer]],
    heard: Heard,
    stop: threading.Event,
    seed: int,
) -> None:
    draw = random.Random(seed)
    while not stop.is_set():
        i = draw.randrange(len(asked)) if draw.random() < _KNOWN else None
        began = time.monotonic()
        try:
            answer = switch.answer(TASK, asked[i] if i is not None else next(fresh), 60.0)
        except Exception as error:  # noqa: BLE001  # any failure is what this looks for
            heard.failures.append(repr(error))
            continue
        heard.took.append((began, time.monotonic() - began))
        if i is not None:
            heard.compared += 1
            own = expected[answer.version][i]
            other = next(answers[i] for name, answers in expected.items() if name != answer.version)
            if _distance(answer, other) < _distance(answer, own):
                heard.mixed.append(f"{answer.version}: {answer.output} {answer.confidence:.3f}, alone {own}")
        heard.answered_by[answer.version] = heard.answered_by.get(answer.version, 0) + 1


def _distance(one: LocalAnswer, other: LocalAnswer) -> float:
    """How far apart two answers are: batches of other sizes round otherwise, so equal ones need not be the same."""
    return (one.output != other.output) + abs(one.confidence - other.confidence)


def _swap_to_and_fro(
    switch: Switch, engine: Engine, versions: Sequence[Version], seconds: float, count: int
) -> list[tuple[float, float]]:
    """When each swap began and ended, the old version unloaded included."""
    started = time.monotonic()
    swaps = []
    for n in range(count):
        time.sleep(max(0.0, started + (n + 0.5) * seconds / count - time.monotonic()))
        old, new = versions[n % 2], versions[(n + 1) % 2]
        began = time.monotonic()
        switch.follow(TASK, new.name)
        if not switch.wait_until_serving(TASK, new.name, 300):
            print(f"  swap {n + 1} failed", file=sys.stderr)
        while any(held.name == old.name for held in engine.loaded()):
            time.sleep(0.01)
        swaps.append((began, time.monotonic()))
        print(f"    swap {n + 1}: {swaps[-1][1] - began:.2f} s", file=sys.stderr, flush=True)
    time.sleep(max(0.0, started + seconds - time.monotonic()))
    return swaps


def _print(name: str, heard: Heard, swaps: Sequence[tuple[float, float]], alerts: Sequence[str]) -> None:
    during: list[float] = []
    outside: list[float] = []
    for began, took in heard.took:
        over = any(began < end and began + took > start for start, end in swaps)
        (during if over else outside).append(took)
    inside, calm = _p99(during), _p99(outside)
    lengths = sorted(end - start for start, end in swaps)
    print(
        f"{name:10} {len(heard.took)} answered, {len(heard.failures)} failed, "
        f"{len(heard.mixed)} of {heard.compared} mixed, {len(alerts)} alerts; "
        f"swaps of {lengths[0]:.2f} to {lengths[-1]:.2f} s\n"
        f"{'':10} p99 {calm:.2f} s outside ({len(outside)}), {inside:.2f} s during ({len(during)}): "
        f"{inside / calm:.2f} x; answers by version {sorted(heard.answered_by.values())}",
        flush=True,
    )
    for line in (*heard.failures[:3], *heard.mixed[:3], *alerts[:3]):
        print(f"{'':10} {line}")


def _p99(took: Sequence[float]) -> float:
    ordered = sorted(took)
    return ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] if ordered else float("nan")


def _copied(folder: Path, work: Path) -> Version:
    """The adapter in a folder of its own: each engine leaves its own probes and conversions beside it."""
    name = content_name(folder)
    target = (work / name).resolve()
    if not target.exists():
        shutil.copytree(folder, target)
    return Version(name, TASK, target, SCHEMA)


def _engine(name: str, options: argparse.Namespace) -> Engine:
    root = Path()
    if name == "embedded":
        from apprentice.local.engines.embedded import EmbeddedEngine

        return EmbeddedEngine(SMOLLM2, root)
    if name == "llama_cpp":
        from apprentice.local.engines.llama_cpp import LlamaCppEngine

        return LlamaCppEngine(SMOLLM2, root, threads=options.threads)
    from apprentice.local.engines.vllm import VllmEngine

    return VllmEngine(SMOLLM2, root, url=options.url)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/isear.jsonl"))
    parser.add_argument("--engine", nargs="+", default=["embedded", "llama_cpp"])
    parser.add_argument("--adapters", type=Path, nargs=2, help="two trained adapter folders")
    parser.add_argument("--url", default="http://127.0.0.1:8055", help="of the vLLM server")
    parser.add_argument("--work", type=Path, default=Path(".bench/swap"))
    parser.add_argument("--asked", type=int, default=120, help="inputs to choose from; fewer for a slow engine")
    parser.add_argument("--calm", type=float, default=30.0, help="seconds without a swap before the first")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--swaps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
