"""What a call costs: genai-prices' list, under the overrides of the config.

Prices are looked up when Apprentice starts; an unknown one is an error then, never zero. They are looked up again every
ten minutes, because some depend on the date or the hour. The list prices most calls at flat rates per token, which are
taken out of it; where a model has tiers by length, calls above the first tier are priced by the library itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from apprentice.errors import Problem
from apprentice.settings.config import ModelPrice, ProviderSettings
from apprentice.store import Usage

__all__ = ["Price", "PriceList", "check_price"]

_MILLION = Decimal(1_000_000)
_REFRESH_S = 600.0
# Text models on offer cost between $0.01 and $600 per million tokens (2026); a price beyond these is a slip of units.
_LEAST, _MOST = Decimal("0.004"), Decimal(2000)
# Two lists may differ by a discount; not by this much.
_SLIP = 100


@dataclass(frozen=True, slots=True)
class Price:
    """USD per token. ``flat_below``: the number of input tokens from which tiers apply, None where there are none."""

    input: Decimal
    output: Decimal
    cached: Decimal
    cache_write: Decimal
    per_call: Decimal = Decimal(0)
    flat_below: int | None = None
    tiered: Callable[[Usage], Decimal] | None = None

    def cost(self, usage: Usage) -> Decimal:
        """The price of one call."""
        if self.tiered is not None and self.flat_below is not None and usage.input >= self.flat_below:
            return self.tiered(usage)
        plain = usage.input - usage.cached - usage.cache_write
        return (
            self.input * max(plain, 0)
            + self.cached * usage.cached
            + self.cache_write * usage.cache_write
            + self.output * usage.output
            + self.per_call
        )

    def worst(self, input_tokens: int, output_tokens: int) -> Decimal:
        """The most that a call of at most so many tokens can cost, whichever way its input is read."""
        return max(
            self.cost(Usage(input=input_tokens, output=output_tokens, cached=cached, cache_write=written))
            for cached, written in ((0, 0), (input_tokens, 0), (0, input_tokens))
        )


class PriceList:
    """One provider's price, as of now. ``clock`` gives Unix seconds."""

    def __init__(self, settings: ProviderSettings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._price: Price | None = None
        self._looked_up_at = 0.0

    def now(self) -> Price:
        """The price. Raises `LookupError` where nobody knows it."""
        at = self._clock()
        if self._price is None or not 0 <= at - self._looked_up_at < _REFRESH_S:
            own = self._settings.price
            self._price = _of_override(own) if own is not None else _of_list(self._settings, at)
            self._looked_up_at = at
        return self._price


def check_price(settings: ProviderSettings, path: str, now: float) -> list[Problem]:
    """What is wrong with a provider's price: unknown, or off by a slip of units."""
    listed = None
    try:
        listed = _of_list(settings, now)
    except LookupError:
        if settings.price is None:
            return [
                Problem(
                    f"{path}.model",
                    f"is {settings.model!r}, whose price is not known.",
                    f"Check the name, or give {path}.price: {{input: ..., output: ...}} in USD per million tokens.",
                )
            ]
    used = _of_override(settings.price) if settings.price is not None else listed
    problems = []
    for name in ("input", "output"):
        amount = getattr(used, name) * _MILLION
        if amount == 0 and settings.price is not None:
            continue  # a server of one's own
        expected = getattr(listed, name) * _MILLION if listed is not None and settings.price is not None else None
        slip = expected and not expected / _SLIP <= amount <= expected * _SLIP
        if slip or not _LEAST <= amount <= _MOST:
            known = f"; the price list says {expected.normalize():f}" if expected else ""
            problems.append(
                Problem(
                    f"{path}.price.{name}",
                    f"is {amount.normalize():f} USD per million tokens, which cannot be right{known}.",
                    "Prices are per million tokens, not per token or per thousand.",
                )
            )
    return problems


def _of_override(own: ModelPrice) -> Price:
    cached = own.cached_input if own.cached_input is not None else own.input
    return Price(own.input / _MILLION, own.output / _MILLION, cached / _MILLION, own.input / _MILLION)


def _of_list(settings: ProviderSettings, now: float) -> Price:
    from genai_prices.data_snapshot import get_snapshot  # half a second of import: not before it is needed

    compatible = settings.provider == "openai_compatible"
    moment = datetime.fromtimestamp(now, UTC)
    _, model = get_snapshot().find_provider_model(
        settings.model,
        None,
        None if compatible else settings.provider,
        settings.base_url if compatible else None,
    )
    rates: Any = model.get_prices(moment)
    tiers: list[int] = []

    def rate(*names: str) -> Decimal:
        for name in names:
            value = getattr(rates, name, None)
            if value is not None:
                if not isinstance(value, Decimal):
                    tiers.append(min(tier.start for tier in value.tiers))
                    value = value.base
                return Decimal(value) / _MILLION
        raise LookupError(f"no price for {names[0]} of {settings.model!r}")

    return Price(
        input=rate("input_mtok"),
        output=rate("output_mtok"),
        cached=rate("cache_read_mtok", "input_mtok"),
        cache_write=rate("cache_write_mtok", "input_mtok"),
        per_call=(getattr(rates, "requests_kcount", None) or Decimal(0)) / 1000,
        flat_below=min(tiers, default=None) if tiers else None,
        tiered=_tiered(model, moment) if tiers else None,
    )


def _tiered(model: Any, moment: datetime) -> Callable[[Usage], Decimal]:
    def cost(usage: Usage) -> Decimal:
        from genai_prices import Usage as ListUsage

        reported = ListUsage(
            input_tokens=usage.input,
            output_tokens=usage.output,
            cache_read_tokens=usage.cached or None,
            cache_write_tokens=usage.cache_write or None,
        )
        return Decimal(model.get_prices(moment).calc_price(reported)["total_price"])

    return cost
