"""Recorded streams through the product's own students and decisions, beside the baseline in the same run.

What answers is the product's head and, with ``--adapters``, recorded adapters of its own recipe beside it
(`benchmarks.students`). What decides is the product's: `decision.decide`, `Trust`, and the rate that it gives. The
student is refitted whenever 15 % more answers were bought, and is asked again what was compared before, as
`flows.assemble` does. An adapter joins when it is there: the gate is not asked.

    python -m benchmarks.streams --data ../shared/data
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from apprentice.confidence.decision import Headroom, Policy, accepts, decide
from apprentice.confidence.settings import TrustSettings
from apprentice.confidence.trust import Trust
from apprentice.confidence.trust_events import EventKind
from apprentice.confidence.watch import LocalObservation
from apprentice.confidence.weighing import Comparison, weigh_seed
from apprentice.evaluators import ExactMatch
from apprentice.request.judge import trust_settings
from apprentice.settings.config import load_settings
from apprentice.student.encoder import DEFAULT, load_encoder
from apprentice.student.fitting import Encodings
from benchmarks import baseline
from benchmarks.baseline import HEADER, Outcome, arguments, line
from benchmarks.recorded import Stream
from benchmarks.students import CONFIG, Adapter, Answer, Fitted, Pupils, read_adapters


class Teach(Protocol):
    """Fits students on the remote's answers to requests of a stream. `benchmarks.students.Pupils` is one."""

    def fit(self, rows: Sequence[int], adapter: Adapter | None = None) -> Fitted: ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """When the student is fitted, in bought answers.

    ``first`` answers make the first student. It is refitted after ``least`` more, or ``growth`` times what there are,
    and then checked at a rate of at least ``caution`` times the share of held-back answers that changed. An adapter is
    there when the answers that it learnt from are 1 - ``held_out`` of those that were bought.
    """

    first: int = 60
    least: int = 20
    growth: float = 0.15
    caution: float = 5.0
    held_out: float = 0.35


def replay(
    stream: Stream,
    teach: Teach,
    settings: TrustSettings,
    *,
    seed: int,
    adapters: Sequence[Adapter] = (),
    schedule: Schedule | None = None,
) -> Outcome:
    """Run the product's decisions over ``stream``. ``teach`` may look at the answers of the rows it is given alone."""
    return _Replay(stream, teach, settings, seed, adapters, schedule or Schedule()).run()


class _Replay:
    def __init__(
        self,
        stream: Stream,
        teach: Teach,
        settings: TrustSettings,
        seed: int,
        adapters: Sequence[Adapter],
        schedule: Schedule,
    ) -> None:
        self.stream = stream
        self.teach = teach
        self.schedule = schedule
        self.settings = settings
        self.draw = random.Random(seed)
        self.trust = Trust.fresh(settings)
        self.same = ExactMatch()
        self.fitted: Fitted | None = None
        self.adapters = list(adapters)
        self.adapter: Adapter | None = None
        self.bought: list[int] = []
        self.due = schedule.first
        self.weights: dict[int, tuple[float, float]] = {}  # probability and sampling rate
        self.changed_at = 0  # what was bought before says nothing of today's traffic

    def run(self) -> Outcome:
        asked, wrong = [], []
        for row in range(len(self.stream)):
            ask, local = self._request(row)
            asked.append(ask)
            wrong.append(not ask and local != self.stream.answers[row])
            if ask:
                self.bought.append(row)
                if len(self.bought) >= self.due:
                    self._refit()
        return Outcome(asked, wrong)

    def _request(self, row: int) -> tuple[bool, Mapping[str, str]]:
        """Whether the remote was asked, and what the student said."""
        if self.fitted is None:
            return True, {}
        numbers = self.trust.policy_numbers
        policy = Policy(numbers.phase, "student", numbers.threshold, numbers.sampling_rate)
        plan = decide(policy, Headroom(), self.draw.random())
        confidence, local = self.fitted.student.answer(row)
        served = accepts(policy, confidence)
        happened = self.trust.watch([LocalObservation(confidence, served=served)])
        ask = plan.remote or not served
        if ask:
            probability = policy.sampling_rate if served else 1.0
            rate = policy.sampling_rate if policy.threshold is not None else 1.0
            self.weights[row] = (probability, rate)
            comparison = self._compare(row, (confidence, local), served=served)
            happened = happened + self.trust.observe(comparison, self.same, self.draw)
        for event in happened:
            if event.kind in (EventKind.DRIFT, EventKind.SHIFT, EventKind.EMERGENCY):
                self.changed_at = row
        return ask, local

    def _compare(self, row: int, answer: Answer, *, served: bool = False) -> Comparison:
        confidence, local = answer
        remote = self.stream.answers[row]
        probability, rate = self.weights.get(row, (1.0, 1.0))
        return Comparison(
            str(row), self.same(local, remote).score, {}, confidence, local, remote, probability, rate, served
        )

    def _refit(self) -> None:
        bought = len(self.bought)
        self.due = bought + max(self.schedule.least, int(bought * self.schedule.growth))
        before, carries = self.fitted, 1.0
        joins = bool(self.adapters) and self.adapters[0].learnt <= (1.0 - self.schedule.held_out) * bought
        if joins:
            self.adapter = self.adapters.pop(0)
        self.fitted = self.teach.fit(self.bought, self.adapter)
        judged = self.fitted.judged
        if before is not None and not joins:
            carries = self.schedule.caution * _changed(before.judged, judged, self.trust.threshold or 0.0)
        seed = [self._compare(row, answer) for row, answer in judged.items() if row >= self.changed_at]
        if before is not None and self.trust.heritable:
            self.trust.succeed(weigh_seed(seed, self.settings, self.same, self.draw), carries=carries)
        else:
            self.trust.promoted(seed, self.same, self.draw)


def _changed(before: Mapping[int, Answer], now: Mapping[int, Answer], threshold: float) -> float:
    """The share of what is served that they answer otherwise, of requests that both were asked; of few, the most."""
    both = [row for row, (confidence, _) in now.items() if row in before and confidence >= threshold]
    return (sum(before[row][1] != now[row][1] for row in both) + 1.0) / (len(both) + 2.0)


def settings_for(promise: float, *, overall: bool, delta: float) -> TrustSettings:
    """Those of the repository's example for ISEAR with this promise instead: of what is served, or of all answers."""
    loaded = load_settings(CONFIG)
    base = trust_settings(loaded, loaded.tasks[0])
    served, whole = (None, promise) if overall else (promise, None)
    return replace(base, max_disagreement=served, max_disagreement_overall=whole, delta=delta)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the product's figures on every stream, under the baseline's."""
    parser = arguments(__doc__)
    parser.add_argument("--adapters", type=Path, help="a folder of recorded adapters (benchmarks.students)")
    parser.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(argv)
    print(HEADER)
    encodings = Encodings(load_encoder(DEFAULT))
    for stream, x, promise, overall, order in baseline.cases(options):
        if options.baseline:
            bar = baseline.replay(stream, x, promise=promise, overall=overall, delta=options.delta, seed=order)
            print(line(stream.name, promise, overall, order, "baseline", bar), flush=True)
        settings = settings_for(promise, overall=overall, delta=options.delta)
        pupils = Pupils(stream, encodings, load_encoder(DEFAULT))
        outcome = replay(stream, pupils, settings, seed=order)
        print(line(stream.name, promise, overall, order, "head", outcome), flush=True)
        adapters = read_adapters(options.adapters, stream.name, order) if options.adapters else []
        if adapters:
            outcome = replay(stream, pupils, settings, seed=order, adapters=adapters)
            print(line(stream.name, promise, overall, order, "head+lora", outcome), flush=True)


if __name__ == "__main__":
    main()
