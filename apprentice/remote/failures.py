"""What a failed attempt means: whether another try can help, when, and whether it may have been billed.

Pure: responses and exceptions in, a `Failure` out. Vendors answer errors unbilled; what is uncertain is a request that
was sent and whose answer never came, or came in a shape that says nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from apprentice.transport import Response

__all__ = ["Failure", "of_exception", "of_response", "retry_after_s", "without_secrets"]

_RETRYABLE = frozenset({408, 409, 425, 429})
_KEYLIKE = re.compile(r"\b(sk|key|AIza)[-_A-Za-z0-9*]{8,}")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Failure:
    """One attempt that brought no answer.

    ``again``: whether the same request may succeed later. ``after_s``: how long the vendor asks to wait, if it says.
    ``billed``: whether it may be on the bill. ``throttled``: the vendor works and asks for less.
    """

    message: str
    status: int | None = None
    again: bool = True
    after_s: float | None = None
    billed: bool = False
    throttled: bool = False


def of_exception(error: httpx.HTTPError) -> Failure:
    """An attempt that ended without a whole response."""
    what = f"{type(error).__name__}{f': {error}' if str(error) else ''}"
    unsent = isinstance(
        error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | httpx.UnsupportedProtocol
    )
    # An answer that cannot be decoded, or is larger than any answer, would be so again.
    return Failure(what, again=not isinstance(error, httpx.DecodingError), billed=not unsent)


def of_response(response: Response, now: float, key: str = "") -> Failure | None:
    """What a response means that is not 2xx; None where it is. ``now`` in Unix seconds."""
    status = response.status
    if 200 <= status < 300:
        return None
    error = _error_object(response)
    message = without_secrets(_message(error, response), key)
    if error.get("code") == "insufficient_quota" or error.get("type") == "insufficient_quota":
        return Failure(message, status, again=False)  # a 429 that no waiting heals
    again = status in _RETRYABLE or status >= 500
    after = retry_after_s(response.headers, error, now) if again else None
    return Failure(message, status, again=again, after_s=after, throttled=status in (429, 529))


def retry_after_s(headers: Mapping[str, str], error: Mapping[str, Any], now: float) -> float | None:
    """How long a vendor asks to wait, from whichever of its ways of saying so is there; never negative."""
    if (ms := _number(headers.get("retry-after-ms"))) is not None:
        return max(ms / 1000, 0.0)
    if text := headers.get("retry-after"):
        if (seconds := _number(text)) is not None:
            return max(seconds, 0.0)
        try:
            return max(parsedate_to_datetime(text).timestamp() - now, 0.0)
        except ValueError:
            pass
    for detail in error.get("details") or ():  # Google's RetryInfo
        if isinstance(detail, Mapping) and (delay := _duration_s(str(detail.get("retryDelay", "")))) is not None:
            return delay
    waits = []
    for kind in ("requests", "tokens", "input-tokens", "output-tokens"):
        if headers.get(f"anthropic-ratelimit-{kind}-remaining") == "0":
            waits.append(_until_s(headers.get(f"anthropic-ratelimit-{kind}-reset", ""), now))
        if headers.get(f"x-ratelimit-remaining-{kind}") == "0":
            waits.append(_duration_s(headers.get(f"x-ratelimit-reset-{kind}", "")))
    return max((w for w in waits if w is not None), default=None)


def without_secrets(text: str, key: str) -> str:
    """Vendors quote keys in their errors, whole or in part."""
    if key:
        text = text.replace(key, "***")
    return _KEYLIKE.sub("***", text)


def _error_object(response: Response) -> dict[str, Any]:
    try:
        body = json.loads(response.content)
    except ValueError:
        return {}
    if isinstance(body, list) and body:  # Google wraps some errors in a list
        body = body[0]
    error = body.get("error", body) if isinstance(body, dict) else {}
    return error if isinstance(error, dict) else {"message": str(error)}


def _message(error: Mapping[str, Any], response: Response) -> str:
    text = response.content.decode("utf-8", "replace")
    text = str(error.get("message") or text or httpx.codes.get_reason_phrase(response.status)).strip()
    kind = error.get("type") or error.get("status")
    text = text if len(text) <= 300 else text[:297] + "..."
    return f"{kind}: {text}" if kind and str(kind) not in text else text


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _duration_s(text: str) -> float | None:
    """``6m0s``, ``20ms``, ``1.5s`` in seconds."""
    found = _DURATION.findall(text)
    return sum(float(n) * _SECONDS[unit] for n, unit in found) if found else None


def _until_s(text: str, now: float) -> float | None:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return max((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now, 0.0)
