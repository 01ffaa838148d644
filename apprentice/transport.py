"""What requests are sent by where the application brought no client of its own.

`httpx.Client` looks after cookies, redirects, authentication, proxies and hooks in every request; a vendor's API needs
none of them, and they cost a fifth of such a call (`benchmarks/overhead.py`). So its transport is used by itself: the
same connections, pool and TLS. Only where the environment names proxies is the whole client used, which knows them.
"""

from __future__ import annotations

import urllib.request
from typing import Literal, Protocol

import httpx

__all__ = ["AsyncSender", "Sender", "async_sender", "sender"]


class Sender(Protocol):
    """The part of `httpx.Client` that carrying out a path needs."""

    def send(self, request: httpx.Request, *, stream: Literal[True]) -> httpx.Response:
        """The answer with its body still to be read."""

    def close(self) -> None: ...


class AsyncSender(Protocol):
    """The part of `httpx.AsyncClient` that carrying out a path needs."""

    async def send(self, request: httpx.Request) -> httpx.Response:
        """The whole answer."""

    async def aclose(self) -> None: ...


class _Direct:
    def __init__(self) -> None:
        self._transport = httpx.HTTPTransport()

    def send(self, request: httpx.Request, *, stream: Literal[True]) -> httpx.Response:
        response = self._transport.handle_request(request)
        response.request = request
        return response

    def close(self) -> None:
        self._transport.close()


class _AsyncDirect:
    def __init__(self) -> None:
        self._transport = httpx.AsyncHTTPTransport()

    async def send(self, request: httpx.Request) -> httpx.Response:
        response = await self._transport.handle_async_request(request)
        response.request = request
        try:
            await response.aread()
        finally:
            await response.aclose()
        return response

    async def aclose(self) -> None:
        await self._transport.aclose()


def sender() -> Sender:
    """What a synchronous client sends by."""
    return httpx.Client() if urllib.request.getproxies() else _Direct()


def async_sender() -> AsyncSender:
    """What an asynchronous client sends by."""
    return httpx.AsyncClient() if urllib.request.getproxies() else _AsyncDirect()
