"""`sampling.decay_function: power`."""

from typing import Any

from pydantic import BaseModel, Field

from apprentice.confidence.sampling import Curve, Decay


class Power(Decay):
    """From 1 at the trigger to the floor at a correlation of 1; the larger ``exponent``, the longer it stays near 1."""

    class Options(BaseModel, extra="forbid"):
        """`sampling.decay_options`."""

        exponent: float = Field(2.0, gt=0)

    @classmethod
    def configured(cls, options: Any) -> Curve:
        def power(correlation: float, trigger: float, floor: float) -> float:
            way = (correlation - trigger) / (1.0 - trigger) if trigger < 1.0 else 0.0
            fallen: float = max(0.0, way) ** options.exponent
            return 1.0 - (1.0 - floor) * fallen

        return power
