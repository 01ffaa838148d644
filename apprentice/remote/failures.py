"""What a failed attempt means: whether another try can help, when, and whether it may have been billed.

Pure: responses and exceptions in, a `Failure` out, whatever a response holds. Vendors answer errors unbilled; what is
uncertain is a request that was sent and whose answer never came (a gateway that gave up says just that), or came in a
shape that says nothing.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from apprentice.remote.transport import Response
from apprentice.secrets import scrub

__all__ = [
    "LONGEST_PAUSE_S",
    "Failure",
    "error_inside",
    "of_error",
    "of_exception",
    "of_response",
    "reports_usage",
    "retry_after_s",
]

LONGEST_PAUSE_S = 600.0
"""The longest that a vendor is taken at its word. It may say a day, or for ever: one wrong header must not end all
calls of a process, and a vendor that still has enough says so again."""

_RETRYABLE = frozenset({408, 409, 425, 429})
_THROTTLED = frozenset({429, 529})
# The vendor was asked and did not finish in time, says whoever stands before it: what it did may be billed.
_MAYBE_BILLED = frozenset({408, 502, 504, 520, 524})
_NEVER_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
    httpx.LocalProtocolError,
    httpx.InvalidURL,
    UnicodeError,
)
_WRONG_HERE = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)  # our own request: it would be wrong again
_MOST_READ, _MOST_SHOWN = 16_000, 300  # bytes, characters

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}

# Errors are named, not numbered, where they come inside a 200: by Anthropic, OpenAI (also `code`) and Google.
_STATUS_BY_NAME = {
    "invalid_request_error": 400,
    "invalid_argument": 400,
    "invalid_prompt": 400,
    "failed_precondition": 400,
    "authentication_error": 401,
    "unauthenticated": 401,
    "invalid_api_key": 401,
    "billing_error": 402,
    "permission_error": 403,
    "permission_denied": 403,
    "not_found_error": 404,
    "not_found": 404,
    "model_not_found": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "resource_exhausted": 429,
    "insufficient_quota": 429,
    "api_error": 500,
    "server_error": 500,
    "internal": 500,
    "unavailable": 503,
    "timeout_error": 504,
    "deadline_exceeded": 504,
    "overloaded_error": 529,
}

# A 4xx that is about how the answer was asked for, not about what was asked.
_ABOUT_FORMAT = re.compile(
    r"response_?format|response_?schema|response_?mime_?type|output_?(config|format)|text\.format"
    r"|json_?(schema|mode|object)|structured.?output|schema|\benums?\b|grammar|guided",
    re.IGNORECASE,
)
_FORMAT_STATUSES = frozenset({400, 404, 422, 501})
_GOOGLES_WORDS_FOR_ANYTHING = "Request contains an invalid argument."  # long enums among the rest


@dataclass(frozen=True, slots=True)
class Failure:
    """One attempt that brought no answer.

    ``again``: whether the same request may succeed later. ``after_s``: how long the vendor asks to wait, if it says.
    ``billed``: whether it may be on the bill. ``throttled``: the vendor works and asks for less. ``about_format``: the
    vendor may answer where the answer's format is asked for in a weaker way.
    """

    message: str
    status: int | None = None
    again: bool = True
    after_s: float | None = None
    billed: bool = False
    throttled: bool = False
    about_format: bool = False


def of_exception(error: Exception) -> Failure:
    """An attempt that ended without a whole response."""
    what = f"{type(error).__name__}{f': {error}' if str(error) else ''}"
    request = getattr(error, "_request", None)  # which raises where there is none, asked without the underscore
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) and request is not None:
        what = f"cannot reach {request.url.host} ({what})"
    # An answer that cannot be decoded, or is larger than any answer, would be so again.
    again = isinstance(error, httpx.HTTPError) and not isinstance(error, (httpx.DecodingError, *_WRONG_HERE))
    return Failure(scrub(what), again=again, billed=not isinstance(error, _NEVER_SENT))


def of_response(response: Response, now: float) -> Failure:
    """A response that is not 2xx. ``now`` in Unix seconds."""
    return of_error(_error_object(_json(response.content)), response, now, status=response.status)


def error_inside(body: Any) -> dict[str, Any] | None:
    """The error that a 2xx body holds in the place of an answer: gateways, and vendors that began to answer, do so."""
    if isinstance(body, dict) and (body.get("error") or body.get("type") == "error"):
        return _error_object(body)
    return None


def reports_usage(body: Any) -> bool:
    """Whether the body of a 2xx names tokens: then they are on the bill, error or not."""
    return isinstance(body, dict) and bool(body.get("usage") or body.get("usageMetadata"))


def of_error(
    error: Mapping[str, Any],
    response: Response,
    now: float,
    *,
    status: int | None = None,
    billed: bool = False,
) -> Failure:
    """A vendor's error object. ``status`` is the response's, or None where the error came inside a 2xx."""
    if status is None:
        status = _status(error)
    message = _message(error, response)
    if "insufficient_quota" in (error.get("code"), error.get("type")):
        return Failure(message, status, again=False, billed=billed)  # a 429 that no waiting heals
    again = status is None or status in _RETRYABLE or status >= 500
    return Failure(
        message,
        status,
        again=again and status != 501,
        after_s=retry_after_s(response.headers, error, now) if again else None,
        billed=billed or status in _MAYBE_BILLED,
        throttled=status in _THROTTLED,
        about_format=status in _FORMAT_STATUSES and _is_about_format(error, response),
    )


def retry_after_s(headers: Mapping[str, str], error: Mapping[str, Any], now: float) -> float | None:
    """How long a vendor asks to wait, from whichever of its ways of saying so is there; 0 to `LONGEST_PAUSE_S`."""
    asked = _asked_s(headers, error, now)
    return None if asked is None or math.isnan(asked) else min(max(asked, 0.0), LONGEST_PAUSE_S)


def _asked_s(headers: Mapping[str, str], error: Mapping[str, Any], now: float) -> float | None:
    if (ms := _number(headers.get("retry-after-ms"))) is not None:
        return ms / 1000
    if text := headers.get("retry-after"):
        if (seconds := _number(text)) is not None:
            return seconds
        try:
            return parsedate_to_datetime(text).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            pass
    details = error.get("details")
    for detail in details if isinstance(details, list) else ():  # Google's RetryInfo
        if isinstance(detail, Mapping) and (delay := _duration_s(detail.get("retryDelay"))) is not None:
            return delay
    waits = []
    for kind in ("requests", "tokens", "input-tokens", "output-tokens"):
        if headers.get(f"anthropic-ratelimit-{kind}-remaining") == "0":
            waits.append(_until_s(headers.get(f"anthropic-ratelimit-{kind}-reset", ""), now))
        if headers.get(f"x-ratelimit-remaining-{kind}") == "0":
            waits.append(_duration_s(headers.get(f"x-ratelimit-reset-{kind}")))
    return max((w for w in waits if w is not None), default=None)


def _json(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _error_object(body: Any) -> dict[str, Any]:
    if isinstance(body, list) and body:  # Google wraps some errors in a list
        body = body[0]
    error = body.get("error", body) if isinstance(body, dict) else {}
    if isinstance(error, dict):
        return error
    return {"message": error} if isinstance(error, str) else {}


def _status(error: Mapping[str, Any]) -> int | None:
    """The HTTP status that an error inside a 2xx stands for; None where it does not say."""
    for name in ("code", "status", "type"):
        value = error.get(name)
        if isinstance(value, str):
            known = _STATUS_BY_NAME.get(value.lower())
            if known is not None:
                return known
            value = int(value) if re.fullmatch(r"[45]\d\d", value) else None
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return None


def _message(error: Mapping[str, Any], response: Response) -> str:
    said = error.get("message")
    text = said.strip() if isinstance(said, str) else ""
    text = text or _redirection(response) or _beginning(response).strip()
    text = text or httpx.codes.get_reason_phrase(response.status) or "an error without a text"
    metadata = error.get("metadata")
    upstream = metadata.get("raw") if isinstance(metadata, dict) else None  # what OpenRouter's vendor said
    if isinstance(upstream, str):
        text = f"{text}: {upstream.strip()}"
    kind = error.get("type") or error.get("status") or error.get("code")
    text = f"{kind}: {text}" if isinstance(kind, str) and kind not in text else text
    text = scrub(text)  # before it is cut: half a key is a secret too
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


def _redirection(response: Response) -> str:
    """Where a response sends its reader, without what may be secret in it; "" where it sends nobody anywhere."""
    location = response.headers.get("location")
    if not location or not 300 <= response.status < 400:
        return ""
    try:
        target = httpx.URL(location)
    except httpx.InvalidURL:
        return ""
    where = f"{target.host or 'the same host'}{target.path}"
    return f"it redirects to {where}, which is not followed; correct base_url"


def _is_about_format(error: Mapping[str, Any], response: Response) -> bool:
    if error.get("message") == _GOOGLES_WORDS_FOR_ANYTHING:
        return True
    return _ABOUT_FORMAT.search(_beginning(response)) is not None


def _beginning(response: Response) -> str:
    return response.content[:_MOST_READ].decode("utf-8", "replace")


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _duration_s(text: object) -> float | None:
    """``6m0s``, ``20ms``, ``1.5s`` in seconds."""
    found = _DURATION.findall(text) if isinstance(text, str) else []
    return sum(float(n) * _SECONDS[unit] for n, unit in found) if found else None


def _until_s(text: str, now: float) -> float | None:
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now
    except (ValueError, OverflowError):
        return None
