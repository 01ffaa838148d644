"""`evaluator: exact_match`."""

from __future__ import annotations

from apprentice.evaluators.protocol import Answer, Evaluation, Evaluator
from apprentice.evaluators.values import LONG, canonical, digest, same, without_nulls

__all__ = ["ExactMatch"]


class ExactMatch(Evaluator):
    """1 where both answers are equal as JSON values, else 0: key order is free, 1 equals 1.0, "a" is not "A".

    A field that is null and one that is left out are the same: which of the two is written depends on the vendor.
    """

    is_quick = True
    has_ceiling = True

    def __call__(self, local: Answer, remote: Answer) -> Evaluation:
        return Evaluation(1.0 if same(without_nulls(local), without_nulls(remote)) else 0.0, {})

    def project(self, answer: Answer) -> Answer:
        """The answer, or its hash where it is long."""
        text = canonical(without_nulls(answer))
        return answer if len(text) <= LONG else {"#": digest(text)}


REGISTERED = ExactMatch
