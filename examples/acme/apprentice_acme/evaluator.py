"""`evaluator: near_day`."""

from datetime import date
from typing import Any

from pydantic import BaseModel, Field

from apprentice.evaluators import Answer, Evaluation, Evaluator


class NearDay(Evaluator):
    """1 for the same day, less for each day that two dates are apart, 0 from ``days`` on."""

    is_quick = True  # a few additions: no time limit is needed

    class Options(BaseModel, extra="forbid"):
        """`evaluator_options`. A field called like a key of the task, such as match_fields, would be filled from it."""

        field: str
        days: int = Field(7, ge=1)

    def __init__(self, field: str, days: int) -> None:
        self._field, self._days = field, days

    @classmethod
    def configured(cls, options: Any) -> "NearDay":
        return cls(options.field, options.days)

    def __call__(self, local: Answer, remote: Answer) -> Evaluation:
        apart = abs((self._day(local) - self._day(remote)).days)
        score = max(0.0, 1.0 - apart / self._days)
        return Evaluation(score, {self._field: score})

    def project(self, answer: Answer) -> Answer:
        """All that the trust state has to remember of an answer."""
        return {self._field: answer[self._field]}

    def _day(self, answer: Answer) -> date:
        return date.fromisoformat(answer[self._field])
