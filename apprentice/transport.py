"""What carries a request to a vendor and its whole answer back: one way, over `httpx.Client`.

The client is the application's own, or one that is opened here. Either way a request must be over by its deadline,
whatever it waits for, and an answer has a largest size: a body that drips or never ends costs a vendor's client no more
than that time and that memory.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import httpx

from apprentice.errors import ConfigError, Problem
from apprentice.secrets import scrub

__all__ = ["MOST_BYTES", "Endpoint", "Request", "Response", "Send", "Sender"]

MOST_BYTES = 16 * 2**20
"""How large an answer may be once decoded. The longest that any vendor's model writes is under one megabyte."""

_HEADERS = (
    ("content-type", "application/json"),
    ("accept", "application/json"),
    ("accept-encoding", "gzip, deflate"),  # what is decoded below, within bounds
    ("user-agent", "apprentice"),
)


class Endpoint:
    """An address that takes JSON by POST, and the headers that all requests to it carry; encoded once.

    The headers may hold a key, so they are in no repr. Raises `ConfigError`, without the value, for a header that
    HTTP cannot send.
    """

    def __init__(self, url: str, *headers: tuple[str, str]) -> None:
        self.url = httpx.URL(url)
        self.headers = [(name.encode("ascii"), _sendable(name, value)) for name, value in (*_HEADERS, *headers)]

    def __repr__(self) -> str:
        return f"Endpoint({scrub(str(self.url))!r})"


def _sendable(name: str, value: str) -> bytes:
    if value.isascii() and value.isprintable() and value == value.strip():
        return value.encode("ascii")
    what = f"the header {name} would hold characters that HTTP does not send."
    raise ConfigError("remote", [Problem("remote.api_key_env", what, "Set its variable to the key alone.")])


@dataclass(frozen=True, slots=True)
class Request:
    """One request: where it goes, and its body."""

    endpoint: Endpoint
    content: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Response:
    """A whole answer, its body decoded."""

    status: int
    content: bytes = b""
    raw_headers: Sequence[tuple[bytes, bytes]] = ()

    @property
    def headers(self) -> httpx.Headers:
        """The headers by their names, in whatever case."""
        return httpx.Headers(list(self.raw_headers))


type Send = Callable[[Request, float], Response]
"""Send a request and bring its whole answer within so many seconds. Raises `httpx.HTTPError`."""


class Sender:
    """Sends by ``client``, which stays open, or by clients of its own: one for each process, made at the first use.

    How many connections there may be at once is for the providers' limits to say (`remote.limits`). Thread-safe.
    """

    def __init__(self, client: httpx.Client | None = None, *, most_bytes: int = MOST_BYTES) -> None:
        self._given = client
        self._most_bytes = most_bytes
        self._own: dict[int, httpx.Client] = {}

    def send(self, request: Request, deadline_s: float) -> Response:
        """The answer, with its whole body, within ``deadline_s``. Raises `httpx.HTTPError`."""
        ends = time.monotonic() + deadline_s
        endpoint = request.endpoint
        asked = httpx.Request(
            "POST",
            endpoint.url,
            headers=endpoint.headers,
            content=request.content,
            extensions={"timeout": _TimeLeft(ends)},
        )
        response = self.client().send(asked, stream=True)
        try:
            body = b"".join(_decoded(_arriving(response, ends), response, self._most_bytes))
        finally:
            response.close()
        return Response(response.status_code, body, response.headers.raw)

    def client(self) -> httpx.Client:
        """The client that this process sends by. After a fork the parent's sockets are left alone.

        Raises `ConfigError` where the environment names proxies or certificates that cannot be used.
        """
        if self._given is not None:
            return self._given
        pid = os.getpid()
        client = self._own.get(pid)
        if client is None:
            made = _open_client()
            client = self._own.setdefault(pid, made)
            if client is not made:  # another thread was quicker
                made.close()
        return client

    def close(self) -> None:
        """Close the connections, but not those of a client that was given."""
        client = self._own.get(os.getpid())
        if client is not None:
            client.close()


def _open_client() -> httpx.Client:
    try:
        return httpx.Client(limits=httpx.Limits(max_connections=None, max_keepalive_connections=100))
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        raise ConfigError("environment", [_environments_fault(error)]) from error


def _environments_fault(error: Exception) -> Problem:
    """Which of the variables that httpx reads is at fault. httpx does not say."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError):  # ssl.SSLError is one
        name = next((n for n in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(n)), "SSL_CERT_FILE")
        message = f"{os.environ.get(name)!r} holds no certificates that can be read ({said})."
        return Problem(name, message, "Name an existing PEM file, or unset it.")
    proxies = [name for name in os.environ if name.upper() in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY")]
    for name in sorted(proxies):
        url = os.environ[name]
        if isinstance(error, ImportError) and url.lower().startswith("socks"):
            return Problem(name, "names a SOCKS proxy.", "Install what speaks to it: pip install 'httpx[socks]'.")
        try:
            httpx.Proxy(url if "://" in url else f"http://{url}")
        except (ValueError, httpx.InvalidURL):
            return Problem(
                name, "is no proxy's address.", "Write http://HOST:PORT, or unset it."
            )  # it may hold a password
    name = next((n for n in ("NO_PROXY", "no_proxy") if os.environ.get(n)), "NO_PROXY")
    message = f"{os.environ.get(name)!r} cannot be read ({said})."
    return Problem(name, message, "Give host names and addresses; IPv6 without brackets and without a network's /SIZE.")


class _TimeLeft(Mapping[str, float]):
    """The time-outs of a request that must be over by ``ends``, in seconds: what is left when they are looked up.

    To httpx each is the limit of one wait, looked up as the wait begins. With fixed ones a request that is slow to
    connect and slow to answer takes twice its deadline.
    """

    _WAITS = ("connect", "read", "write", "pool")

    def __init__(self, ends: float) -> None:
        self._ends = ends

    def __getitem__(self, wait: str) -> float:
        if wait not in self._WAITS:
            raise KeyError(wait)
        return max(0.001, self._ends - time.monotonic())  # 0 means to a socket that it must not wait at all

    def __iter__(self) -> Iterator[str]:
        return iter(self._WAITS)

    def __len__(self) -> int:
        return len(self._WAITS)


def _arriving(response: httpx.Response, ends: float) -> Iterator[bytes]:
    """The body as it comes over the wire; it must have arrived by ``ends``, a reading of the monotonic clock.

    Time-outs are per read; a server that drips one byte a second would never meet them.
    """
    for chunk in cast(httpx.SyncByteStream, response.stream):
        yield chunk
        if time.monotonic() > ends:
            raise httpx.ReadTimeout("the answer was still arriving at its deadline", request=response.request)


def _decoded(chunks: Iterable[bytes], response: httpx.Response, most_bytes: int) -> Iterator[bytes]:
    """A body without its content coding. It stops at ``most_bytes``, however much a small body would unpack to."""
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("identity", "gzip", "x-gzip", "deflate"):
        raise httpx.DecodingError(f"the answer is encoded as {coding!r}, which was not asked for")
    inflate = None if coding == "identity" else zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)  # gzip or zlib
    size = 0
    for chunk in chunks:
        try:
            part = inflate.decompress(chunk, most_bytes + 1 - size) if inflate is not None else chunk
        except zlib.error as error:
            raise httpx.DecodingError(f"the answer is not the {coding} that it says it is ({error})") from None
        size += len(part)
        if size > most_bytes:
            raise httpx.DecodingError(f"the answer is larger than {most_bytes:,} bytes")
        yield part
