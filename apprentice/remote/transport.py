"""What carries a request to a vendor and its whole answer back: one way, over `httpx.Client`.

The client is the application's own, or one that is opened here. Either way a request must be over by its deadline, and
an answer has a largest size: a body that drips or never ends costs no more than that time and that memory. With a
client opened here that holds for every single read; one of the application's may wait longer for headers that drip, and
for the rest of a body that has begun.
"""

from __future__ import annotations

import copy
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import httpcore
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

    @cached_property
    def past_caches(self) -> Endpoint:
        """The same address, for an answer that must be a new one: a gateway on the way must not send an old one."""
        other = copy.copy(self)
        other.headers = [*self.headers, (b"cache-control", b"no-cache")]
        return other


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
        if isinstance(client, httpx.AsyncClient):
            what = "is an httpx.AsyncClient; requests are sent from threads, also by AsyncApprentice."
            raise ConfigError("arguments", [Problem("http_client", what, "Give an httpx.Client.")])
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
        client = self.client()
        _deadline.ends = ends
        try:
            response = client.send(asked, stream=True)
            try:
                body = b"".join(_decoded(_arriving(response, ends), response, self._most_bytes))
            finally:
                response.close()
        finally:
            _deadline.ends = None
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
        client = httpx.Client(limits=httpx.Limits(max_connections=None, max_keepalive_connections=100))
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        raise ConfigError("environment", [_environments_fault(error)]) from error
    for transport in (client._transport, *client._mounts.values()):
        # httpx passes no network backend on. Without one the deadline holds for each wait alone.
        pool = getattr(transport, "_pool", None)
        if isinstance(pool, httpcore.ConnectionPool):
            pool._network_backend = _Punctual(pool._network_backend)
    return client


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


class _Deadline(threading.local):
    """When the request that this thread sends must be over, by the monotonic clock."""

    ends: float | None = None


_deadline = _Deadline()


def _in_time(timeout: float | None, too_late: type[Exception]) -> float | None:
    """How long one read or write may wait: httpcore looks its time-out up once for all reads of the headers."""
    if _deadline.ends is None:
        return timeout
    left_s = _deadline.ends - time.monotonic()
    if left_s <= 0:
        raise too_late("the deadline has passed")
    return left_s if timeout is None else min(timeout, left_s)


class _PunctualStream(httpcore.NetworkStream):
    """A connection whose every read and write ends at the request's deadline."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _in_time(timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _in_time(timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(self, *args: Any, **options: Any) -> httpcore.NetworkStream:
        return _PunctualStream(self._stream.start_tls(*args, **options))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Punctual(httpcore.NetworkBackend):
    """Opens connections that keep the deadline of whoever uses them."""

    def __init__(self, backend: httpcore.NetworkBackend) -> None:
        self._backend = backend

    def connect_tcp(self, *args: Any, **options: Any) -> httpcore.NetworkStream:
        return _PunctualStream(self._backend.connect_tcp(*args, **options))

    def connect_unix_socket(self, *args: Any, **options: Any) -> httpcore.NetworkStream:
        return _PunctualStream(self._backend.connect_unix_socket(*args, **options))

    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)


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
