"""Keeps secrets out of every text that leaves the process.

Whoever reads a secret (a key from the environment, a URL with a password or a token) calls `register`; whoever writes
text for somebody else to read calls `scrub`. Errors (`ApprenticeError`), events, log lines, the store's messages and
the reprs of settings do so by construction, so that a vendor's message may be quoted without looking at it first.

The register belongs to the process and only grows: a secret that was replaced is still a secret.
"""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

__all__ = [
    "HIDDEN",
    "HUB_TOKENS",
    "Secrets",
    "child_environment",
    "logger",
    "register",
    "register_environment",
    "register_url",
    "scrub",
    "scrub_error",
    "scrub_record",
    "scrub_values",
]

HIDDEN = "***"

_SHORTEST = 4  # a password of three letters would blank out words
_SHORTEST_VARIABLE = 8  # SOME_TOKEN=true
_LONG = 12  # so long a text is no word; a shorter one is replaced where it stands by itself
# What servers without authentication are given as a key, because the client insists on one.
_PLACEHOLDERS = frozenset({"none", "null", "empty", "dummy", "unused", "ollama", "vllm"})
# Keys as vendors quote them back, in part or with stars in between, and keys that nobody registered.
_KEYLIKE = re.compile(
    r"\b(?:(?:sk[-_]|(?:pk|rk|key)-)(?=[-\w*.]*[0-9*])|AIza|hf_|ghp_|xox[abp]-)[-\w*.]{7,}[\w*]", re.ASCII
)
_SECRET_PARAMETER = re.compile(r"pass|pwd|secret|token|key|sig|auth|credential", re.IGNORECASE)
# What OSError prints, and what `add_note` added.
_TEXTS_OF_ERRORS = ("strerror", "filename", "filename2", "__notes__")
_SECRET_VARIABLE = re.compile(
    r"(API_?KEY|ACCESS_?KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|WEBHOOK|DATABASE_URL)(_|$)", re.IGNORECASE
)


class Secrets:
    """A register of secret texts. Safe to use from many threads."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._pattern: re.Pattern[str] | None = None

    def register(self, value: str | None) -> None:
        """From now on ``value`` is hidden, also percent-encoded, escaped, or as base64. None and "" are ignored."""
        value = (value or "").strip()
        if len(value) < _SHORTEST or value.lower() in _PLACEHOLDERS or value in self._known:
            return
        self._known.update(_spellings(value))
        while True:  # another thread may register at the same time
            known = sorted(self._known, key=len, reverse=True)
            self._pattern = re.compile("|".join(_alone(text) for text in known))
            if len(known) == len(self._known):
                return

    def register_url(self, url: str | None, *, whole: bool = False) -> None:
        """Hide the password and the token parameters of a URL; with ``whole`` its path and every parameter too."""
        for secret in _secrets_of(url or "", whole=whole):
            self.register(secret)

    def register_environment(self, environ: Mapping[str, str]) -> None:
        """Hide the values of all variables that are named like a secret (``..._API_KEY``, ``..._TOKEN``, ...)."""
        for name, value in environ.items():
            if _SECRET_VARIABLE.search(name) and len(value.strip()) >= _SHORTEST_VARIABLE:
                self.register(value)

    def scrub(self, text: str) -> str:
        """``text`` with every secret replaced by `HIDDEN`."""
        if self._pattern is not None:
            text = self._pattern.sub(HIDDEN, text)
        return _KEYLIKE.sub(HIDDEN, text)


_process = Secrets()


def register(value: str | None) -> None:
    """Hide ``value`` in this process; see `Secrets.register`."""
    _process.register(value)


def register_url(url: str | None, *, whole: bool = False) -> None:
    """Hide what is secret in a URL; see `Secrets.register_url`."""
    _process.register_url(url, whole=whole)


def register_environment(environ: Mapping[str, str]) -> None:
    """Hide what is secret in an environment; see `Secrets.register_environment`."""
    _process.register_environment(environ)


def scrub(text: str) -> str:
    """``text`` without the secrets of this process."""
    return _process.scrub(text)


def scrub_values(value: Any) -> Any:
    """A JSON value with every text in it scrubbed, keys included; what is no JSON becomes scrubbed text."""
    match value:
        case str():
            return str(scrub(value))
        case None | bool() | int() | float():
            return value
        case Mapping():
            return {scrub(str(key)): scrub_values(item) for key, item in value.items()}
        case list() | tuple():
            return [scrub_values(item) for item in value]
        case _:
            return scrub(str(value))


def scrub_error[E: BaseException](error: E) -> E:
    """``error`` itself, its texts and those of its causes scrubbed in place: a traceback prints them all."""
    seen: BaseException | None = error
    met: set[int] = set()
    while seen is not None and id(seen) not in met:
        met.add(id(seen))
        seen.args = tuple(_scrub_argument(argument) for argument in seen.args)
        for name in _TEXTS_OF_ERRORS:
            if (text := getattr(seen, name, None)) is not None:
                setattr(seen, name, _scrub_argument(text))
        seen = seen.__cause__ or seen.__context__
    return error


HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""What a process that trains may need: base models may be gated."""


def child_environment(environ: Mapping[str, str], *, keep: Collection[str] = ()) -> dict[str, str]:
    """The environment for a child process that needs none of this one's secrets.

    Left out are variables that hold a registered secret and those that are named like one (``..._API_KEY``,
    ``..._TOKEN``, ``..._PASSWORD``, ...), save the names in ``keep``.
    """
    return {
        name: value
        for name, value in environ.items()
        if name in keep or not (_SECRET_VARIABLE.search(name) or scrub(value) != value)
    }


def logger(name: str) -> logging.Logger:
    """The logger of that name, whose lines and tracebacks are scrubbed before any handler sees them."""
    found = logging.getLogger(name)
    found.addFilter(scrub_record)
    return found


def scrub_record(record: logging.LogRecord) -> bool:
    """A filter for loggers and handlers: it lets every record pass, scrubbed."""
    message = record.getMessage()
    if (cleaned := scrub(message)) != message:
        record.msg, record.args = cleaned, ()
    if record.exc_info and not record.exc_text:
        record.exc_text = scrub(logging.Formatter().formatException(record.exc_info))
    return True


def _alone(text: str) -> str:
    return re.escape(text) if len(text) >= _LONG else rf"(?<![A-Za-z0-9]){re.escape(text)}(?![A-Za-z0-9])"


def _spellings(value: str) -> set[str]:
    encoded = {base64.b64encode(value.encode()).decode().rstrip("="), value.encode().hex()}
    escaped = {quote(value, safe=""), quote(value), quote_plus(value), json.dumps(value)[1:-1], repr(value)[1:-1]}
    return {value, *(text for text in encoded | escaped if len(text) >= _SHORTEST)}


def _secrets_of(url: str, *, whole: bool) -> Iterator[str]:
    try:
        parts = urlsplit(url)
        password = parts.password
    except ValueError:  # no URL: then all of it, or nothing, is secret
        if whole:
            yield url
        return
    if password:
        yield password
        yield unquote(password)
        user = unquote(parts.username or "")
        yield base64.b64encode(f"{user}:{unquote(password)}".encode()).decode()
    for name, value in parse_qsl(parts.query):
        if whole or _SECRET_PARAMETER.search(name):
            yield value
    if whole:
        yield url
        yield from (text for text in (parts.path, parts.path.rpartition("/")[2]) if len(text) >= _LONG)


def _scrub_argument(argument: Any) -> Any:
    if isinstance(argument, str):
        return scrub(argument)
    if isinstance(argument, list):  # notes
        return [_scrub_argument(item) for item in argument]
    if isinstance(argument, bytes):
        text = argument.decode("latin-1")
        return argument if (cleaned := scrub(text)) == text else cleaned.encode("latin-1")
    return argument


# httpx logs the URL of every request at INFO, a webhook's too.
logger("httpx")
