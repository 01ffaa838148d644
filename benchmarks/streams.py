"""Recorded streams through the product's own decisions, beside the baseline in the same run; no model is trained.

What answers is the baseline's own head, so that what differs is what decides. It is refitted whenever 15 % more answers
were bought. What decides is the product's: `decision.decide`, `Trust`, and the rate that it gives. Every bought answer
is compared first and learnt from then, so a refit carries the trust that was earned; its rate is at least 5 times the
share of accepted answers that it changes.

    python -m benchmarks.streams --data ../shared/data
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from apprentice.confidence.settings import TrustSettings
from apprentice.confidence.trust import Trust
from apprentice.confidence.trust_events import EventKind
from apprentice.confidence.watch import LocalObservation
from apprentice.confidence.weighing import Comparison
from apprentice.config import load_settings
from apprentice.decision import Headroom, Policy, accepts, decide
from apprentice.evaluators import ExactMatch
from apprentice.judge import trust_settings
from benchmarks import baseline
from benchmarks.baseline import HEADER, Floats, Outcome, arguments, line
from benchmarks.recorded import Stream

CONFIG = Path(__file__).parent / "isear_10.yaml"

type Answer = tuple[float, Mapping[str, str]]
"""(confidence, output)"""


class Student(Protocol):
    """What has learnt."""

    def answer(self, rows: Sequence[int]) -> list[Answer]:
        """Its answers to these requests of the stream."""


type Teach = Callable[[Sequence[int]], Student]
"""Fit a student on the remote's answers to these requests."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """When the student is fitted, in bought answers, and how its refits inherit.

    ``first`` answers make the first student, which is judged by what those fitted on the answers before each would
    have answered, from ``practice`` answers on. It is refitted after ``least`` more, or ``growth`` times what there
    are. A refit that changes the share q of the last ``recent`` accepted answers is checked at a rate of at least
    ``caution`` * q.
    """

    first: int = 60
    practice: int = 20
    least: int = 20
    growth: float = 0.15
    recent: int = 300
    caution: float = 5.0


def progressive(rows: Sequence[int], teach: Teach, schedule: Schedule) -> list[Answer | None]:
    """Each row's answer by a student of rows before it; None for the first ones, from which nothing was learnt yet."""
    answers: list[Answer | None] = [None] * min(schedule.practice, len(rows))
    while len(answers) < len(rows):
        known = len(answers)
        step = max(1, int(known * schedule.growth))
        answers += teach(rows[:known]).answer(rows[known : known + step])
    return answers


def replay(
    stream: Stream, teach: Teach, settings: TrustSettings, *, seed: int, schedule: Schedule | None = None
) -> Outcome:
    """Run the product's decisions over ``stream``. ``teach`` may look at the answers of the rows it is given alone."""
    return _Replay(stream, teach, settings, seed, schedule or Schedule()).run()


class _Replay:
    def __init__(self, stream: Stream, teach: Teach, settings: TrustSettings, seed: int, schedule: Schedule) -> None:
        self.stream = stream
        self.teach = teach
        self.schedule = schedule
        self.draw = random.Random(seed)
        self.trust = Trust.fresh(settings)
        self.same = ExactMatch()
        self.student: Student | None = None
        self.bought: list[int] = []
        self.due = schedule.first
        self.answers: dict[int, Answer] = {}
        # Comparisons since the last alarm: what a student that cannot inherit is judged by.
        self.evidence: list[Comparison] = []

    def run(self) -> Outcome:
        asked, wrong = [], []
        for row in range(len(self.stream)):
            ask, local = self._request(row)
            asked.append(ask)
            wrong.append(not ask and local != self.stream.answers[row])
            if ask:
                self.bought.append(row)
                if len(self.bought) >= self.due:
                    self._refit(row)
        return Outcome(asked, wrong)

    def _request(self, row: int) -> tuple[bool, Mapping[str, str]]:
        """Whether the remote was asked, and what the student said."""
        if self.student is None:
            return True, {}
        numbers = self.trust.policy_numbers
        policy = Policy(numbers.phase, "student", numbers.threshold, numbers.sampling_rate)
        plan = decide(policy, Headroom(), self.draw.random())
        ((confidence, local),) = self.student.answer([row])
        self.answers[row] = (confidence, local)
        served = accepts(policy, confidence)
        happened = self.trust.watch([LocalObservation(confidence, served=served)])
        ask = plan.remote or not served
        if ask:
            probability = policy.sampling_rate if served else 1.0
            rate = policy.sampling_rate if policy.threshold is not None else 1.0
            comparison = self._compare(row, (confidence, local), probability, rate, served)
            self.evidence.append(comparison)
            happened = happened + self.trust.observe(comparison, self.same, self.draw)
        if any(event.kind in (EventKind.DRIFT, EventKind.SHIFT, EventKind.EMERGENCY) for event in happened):
            self.evidence = []
        return ask, local

    def _compare(
        self, row: int, answer: Answer, probability: float = 1.0, rate: float = 1.0, served: bool = False
    ) -> Comparison:
        confidence, local = answer
        remote = self.stream.answers[row]
        score = self.same(local, remote).score
        return Comparison(str(row), score, {}, confidence, local, remote, probability, rate, served)

    def _refit(self, row: int) -> None:
        self.due = len(self.bought) + max(self.schedule.least, int(len(self.bought) * self.schedule.growth))
        fitted = self.teach(self.bought)
        if self.student is None:
            seed = progressive(self.bought, self.teach, self.schedule)
            comparisons = [self._compare(r, a) for r, a in zip(self.bought, seed, strict=True) if a is not None]
            self.trust.promoted(comparisons, self.same, self.draw)
            self.evidence = comparisons
        elif self.trust.heritable:
            self.trust.succeed(carries=self.schedule.caution * self._changed(row, fitted))
        else:
            self.trust.promoted(self.evidence, self.same, self.draw)
        self.student = fitted

    def _changed(self, row: int, fitted: Student) -> float:
        """The share of the last accepted answers that ``fitted`` would have given otherwise."""
        threshold = self.trust.threshold
        if threshold is None:
            return 1.0
        last = [r for r in range(max(0, row + 1 - self.schedule.recent), row + 1) if r in self.answers]
        accepted = [r for r in last if self.answers[r][0] >= threshold]
        if not accepted:
            return 1.0
        pairs = zip(accepted, fitted.answer(accepted), strict=True)
        return sum(self.answers[r][1] != local for r, (_, local) in pairs) / len(accepted)


class Logistic:
    """The baseline's own head: what differs from the baseline is then what decides."""

    def __init__(self, stream: Stream, x: Floats, rows: Sequence[int]) -> None:
        self._x = x
        self._fields = list(stream.answers[0])
        at = np.asarray(rows)
        self._heads = [
            baseline.fit(x[at], np.array([stream.answers[r][field] for r in rows])) for field in self._fields
        ]

    def answer(self, rows: Sequence[int]) -> list[Answer]:
        confidence, guesses = baseline.predict(self._heads, self._x[np.asarray(rows)])
        return [
            (float(confidence[i]), {field: str(guess[i]) for field, guess in zip(self._fields, guesses, strict=True)})
            for i in range(len(rows))
        ]


def settings_for(promise: float, *, overall: bool, delta: float) -> TrustSettings:
    """Those of the repository's example for ISEAR with this promise instead: of what is served, or of all answers."""
    loaded = load_settings(CONFIG)
    base = trust_settings(loaded, loaded.tasks[0])
    served, whole = (None, promise) if overall else (promise, None)
    return replace(base, max_disagreement=served, max_disagreement_overall=whole, delta=delta)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the product's figures on every stream, under the baseline's."""
    options = arguments(__doc__).parse_args(argv)
    print(HEADER)
    for stream, x, promise, overall, order in baseline.cases(options):
        bar = baseline.replay(stream, x, promise=promise, overall=overall, delta=options.delta, seed=order)
        print(line(stream.name, promise, overall, order, "baseline", bar), flush=True)
        settings = settings_for(promise, overall=overall, delta=options.delta)
        outcome = replay(stream, partial(Logistic, stream, x), settings, seed=order)
        print(line(stream.name, promise, overall, order, "apprentice", outcome), flush=True)


if __name__ == "__main__":
    main()
