"""What carries a request to a vendor and its whole answer back.

`httpx.Client` looks after cookies, redirects, authentication, proxies and hooks in every request, and its pool weighs
all connections against all waiting requests. A vendor's API needs none of that, and it is most of what such a call
costs on this side (`benchmarks/overhead.py`). So where the application brought no client of its own, a synchronous
client speaks over httpcore's connections, which are what httpx stands on, and an asynchronous one over httpx's bare
transport. Where the environment names proxies a whole client is used, which knows them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import urllib.request
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import httpcore
import httpx

__all__ = ["AsyncSender", "Endpoint", "Request", "Response", "Sender", "async_sender", "sender"]

_JSON_HEADERS = (("content-type", "application/json"), ("accept", "application/json"), ("user-agent", "apprentice"))
_KEEP_ALIVE_S = 5.0  # httpx's own default
_STILL_ARRIVING = "the answer was still arriving at its deadline"

type _Origin = tuple[bytes, bytes, int | None]  # scheme, host, port

# httpx has them all, by the same names, and no public way from the one to the other
_AS_HTTPX: dict[type[BaseException], type[httpx.TransportError]] = {
    getattr(httpcore, name): getattr(httpx, name)
    for name in (
        *("ConnectError", "ReadError", "WriteError"),
        *("ConnectTimeout", "ReadTimeout", "WriteTimeout", "PoolTimeout"),
        *("LocalProtocolError", "RemoteProtocolError", "UnsupportedProtocol"),
    )
}


class Endpoint:
    """An address that takes JSON by POST, and the headers that all requests to it carry; encoded once.

    The headers may hold a key, so they are in no repr.
    """

    def __init__(self, url: str, *headers: tuple[str, str]) -> None:
        self.url = httpx.URL(url)
        pairs = (*_JSON_HEADERS, *headers)
        self.headers = [(name.encode("ascii"), value.encode("ascii")) for name, value in pairs]

    def __repr__(self) -> str:
        return f"Endpoint({str(self.url)!r})"


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


class Sender(Protocol):
    """Sends requests; safe to share between threads."""

    def send(self, request: Request, deadline_s: float) -> Response:
        """The answer, with its whole body, within ``deadline_s``. Raises `httpx.HTTPError`."""

    def close(self) -> None: ...


class AsyncSender(Protocol):
    """Sends requests on an event loop."""

    async def send(self, request: Request, deadline_s: float) -> Response:
        """As `Sender.send`."""

    async def aclose(self) -> None: ...


def sender(client: httpx.Client | None = None) -> Sender:
    """What a synchronous client sends by: the application's own client, which stays open, or what is quickest."""
    if client is not None:
        return _ByClient(client, owned=False)
    return _ByClient(httpx.Client(), owned=True) if urllib.request.getproxies() else _Connections()


def async_sender(client: httpx.AsyncClient | None = None) -> AsyncSender:
    """As `sender`, for an asynchronous client."""
    if client is not None:
        return _ByAsyncClient(client, owned=False)
    if urllib.request.getproxies():
        return _ByAsyncClient(httpx.AsyncClient(), owned=True)
    return _ByAsyncTransport()


class _Connections:
    """HTTP/1.1 connections that are open and idle: the one used last is taken first, a new one where there is none.

    How many there may be at once is for the providers' limits to say (`remote.limits`).
    """

    def __init__(self) -> None:
        self._ssl = httpx.create_ssl_context()
        self._addresses: dict[Endpoint, _Address] = {}
        self._pid = os.getpid()
        self._idle: dict[_Origin, deque[httpcore.HTTPConnection]] = {}

    def send(self, request: Request, deadline_s: float) -> Response:
        ends = time.monotonic() + deadline_s
        address = self._addresses.get(request.endpoint) or self._look_up(request.endpoint)
        asked = httpcore.Request(
            b"POST",
            address.url,
            headers=[*address.headers, (b"content-length", b"%d" % len(request.content))],
            content=request.content,
            extensions={"timeout": _TimeLeft(ends)},
        )
        idle = self._idle_to(address.origin)
        connection = self._take(idle) or httpcore.HTTPConnection(
            address.url.origin,
            ssl_context=self._ssl,
            keepalive_expiry=_KEEP_ALIVE_S,
        )
        try:
            answer = connection.handle_request(asked)
            stream = cast(_Stream, answer.stream)
            try:
                body = b"".join(_hurried(stream, ends))
            finally:
                stream.close()
        except BaseException as error:
            connection.close()
            if type(error) in _AS_HTTPX:
                raise _AS_HTTPX[type(error)](str(error)) from error
            raise
        self._give_back(idle, connection)
        return Response(answer.status, _decoded(body, answer.headers), answer.headers)

    def _look_up(self, endpoint: Endpoint) -> _Address:
        url = endpoint.url
        if url.scheme not in ("http", "https"):
            raise httpx.UnsupportedProtocol(f"{str(url)!r} does not begin with http:// or https://.")
        address = self._addresses[endpoint] = _Address(
            httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            [(b"host", url.netloc), *endpoint.headers],
            (url.raw_scheme, url.raw_host, url.port),
        )
        return address

    def _idle_to(self, origin: _Origin) -> deque[httpcore.HTTPConnection]:
        if self._pid != os.getpid():  # after a fork the sockets are the parent's: two must not talk on one
            self._pid, self._idle = os.getpid(), {}
        return self._idle.setdefault(origin, deque())

    @staticmethod
    def _take(idle: deque[httpcore.HTTPConnection]) -> httpcore.HTTPConnection | None:
        while True:
            try:
                connection = idle.pop()
            except IndexError:
                return None
            if not connection.has_expired():
                return connection
            connection.close()

    @staticmethod
    def _give_back(idle: deque[httpcore.HTTPConnection], connection: httpcore.HTTPConnection) -> None:
        if not connection.is_idle():
            connection.close()  # the server said that it would
            return
        idle.append(connection)
        if len(idle) > 1:  # one of them may have been idle for too long: it is the one at the other end
            with contextlib.suppress(IndexError):  # another thread took it
                oldest = idle.popleft()
                if oldest.has_expired():
                    oldest.close()
                else:
                    idle.appendleft(oldest)

    def close(self) -> None:
        for idle in self._idle.values():
            for connection in idle:
                connection.close()
        self._idle = {}


class _TimeLeft(Mapping[str, float]):
    """The time-outs of a request that must be over by ``ends``, in seconds: what is left when they are looked up.

    To httpx and httpcore each is the limit of one wait, looked up as the wait begins. With fixed ones a request that
    is slow to connect and slow to answer takes twice its deadline.
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


class _Stream(Protocol):
    """The body of one of httpcore's responses."""

    def __iter__(self) -> Iterator[bytes]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Address:
    """An endpoint as httpcore wants it."""

    url: httpcore.URL
    headers: list[tuple[bytes, bytes]] = field(repr=False)
    origin: _Origin


def _decoded(body: bytes, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
    """The body without its content coding. None is asked for, but some servers compress regardless."""
    if all(name.lower() != b"content-encoding" for name, _ in headers):
        return body
    return httpx.Response(200, headers=list(headers), content=body).content


def _hurried(chunks: Iterable[bytes], ends: float) -> Iterator[bytes]:
    """A body that must have arrived by ``ends``, a reading of the monotonic clock.

    Time-outs are per read; a server that drips one byte a second would never meet them.
    """
    for chunk in chunks:
        yield chunk
        if time.monotonic() > ends:
            raise httpx.ReadTimeout(_STILL_ARRIVING)


class _Hurried(httpx.SyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream, ends: float) -> None:
        self._stream = stream
        self._ends = ends

    def __iter__(self) -> Iterator[bytes]:
        return _hurried(self._stream, self._ends)

    def close(self) -> None:
        self._stream.close()


class _ByClient:
    def __init__(self, client: httpx.Client, *, owned: bool) -> None:
        self._client = client
        self._owned = owned

    def send(self, request: Request, deadline_s: float) -> Response:
        ends = time.monotonic() + deadline_s
        response = self._client.send(_as_httpx(request, ends), stream=True)
        response.stream = _Hurried(cast(httpx.SyncByteStream, response.stream), ends)
        try:
            response.read()
        finally:
            response.close()
        return _of_httpx(response)

    def close(self) -> None:
        if self._owned:
            self._client.close()


class _ByAsyncClient:
    def __init__(self, client: httpx.AsyncClient, *, owned: bool) -> None:
        self._client = client
        self._owned = owned

    async def send(self, request: Request, deadline_s: float) -> Response:
        async with _within(deadline_s) as ends:
            return _of_httpx(await self._client.send(_as_httpx(request, ends)))

    async def aclose(self) -> None:
        if self._owned:
            await self._client.aclose()


class _ByAsyncTransport:
    def __init__(self) -> None:
        self._transport = httpx.AsyncHTTPTransport()

    async def send(self, request: Request, deadline_s: float) -> Response:
        async with _within(deadline_s) as ends:
            response = await self._transport.handle_async_request(_as_httpx(request, ends))
            try:
                await response.aread()
            finally:
                await response.aclose()
        return _of_httpx(response)

    async def aclose(self) -> None:
        await self._transport.aclose()


def _as_httpx(request: Request, ends: float) -> httpx.Request:
    endpoint = request.endpoint
    waits = {"timeout": _TimeLeft(ends)}
    return httpx.Request("POST", endpoint.url, headers=endpoint.headers, content=request.content, extensions=waits)


def _of_httpx(response: httpx.Response) -> Response:
    return Response(response.status_code, response.content, response.headers.raw)


@contextlib.asynccontextmanager
async def _within(deadline_s: float) -> AsyncIterator[float]:
    try:
        async with asyncio.timeout(deadline_s):
            yield time.monotonic() + deadline_s
    except TimeoutError:
        raise httpx.ReadTimeout(_STILL_ARRIVING) from None
