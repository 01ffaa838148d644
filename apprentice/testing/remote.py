"""A vendor on this machine: a real HTTP server, or a transport for httpx, that answers as you say and fails as you say.

    with FakeVendor("anthropic", lambda value: {"category": "billing"}) as vendor:
        settings = vendor.settings()        # for `remote:` in a Settings object
        environ = vendor.environ            # holds its key
        ...
        assert vendor.asked == 1

It speaks the vendor's real protocol and refuses what the vendor would refuse (`apprentice.testing.vendors`), so a
request that passes here has the right shape. ``faults`` are met in order, one a request; then all is well.
"""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import httpx

from apprentice.testing.vendors import PROTOCOLS, Question, Refused, Stop, VendorProtocol, tokens

__all__ = ["FakeVendor", "Fault", "Vendor"]

_FORMATS = ("json_schema", "json_object", "none")

type Vendor = Literal["anthropic", "openai", "openai_responses", "google", "openai_compatible"]
type Kind = Literal[
    "rate_limited",  # 429, with Retry-After where retry_after_s is given
    "overloaded",  # 529 of Anthropic, 503 of the others
    "server_error",  # 500
    "unauthorized",  # 401 (Google: 400), quoting the key
    "reset",  # the connection is reset after the request was read
    "half_body",  # 200, and the connection closes in the middle of the answer
    "slow_body",  # 200, and the answer drips: seconds_between bytes
    "not_json",  # 200 with an HTML page
    "schema_violation",  # a proper answer whose content does not fit the schema
    "truncated",  # a proper answer, cut off at the token limit
    "refusal",  # a proper answer in which the model declines
    "filtered",  # a proper answer that a filter withheld: content_filter, RECITATION
    "no_usage",  # a proper answer that does not say what it cost
    "error_inside",  # 200, with the vendor's rate limit error in the place of the answer
    "in_parts",  # a proper answer whose content comes in several parts, after one that thinks
    "thinking",  # a proper answer after a <think> block in its text
    "fenced",  # a proper answer in a code fence
    "empty",  # a proper answer without any text
    "tool_input_text",  # a tool's input as JSON text (Anthropic; the others have no tools)
    "verbatim",  # ``content`` as the body, with ``status`` and ``headers``
]


@dataclass(frozen=True, slots=True)
class Fault:
    """One way for one request to fail."""

    kind: Kind
    retry_after_s: float | None = None
    seconds_between: float = 0.05
    content: str | bytes = '{"wrong": true}'
    status: int = 200
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()
    wire: Literal["whole", "reset", "half", "slow"] = "whole"
    seconds_between: float = 0.0


class FakeVendor:
    """One vendor. Use it as a context manager for a server on localhost, or `transport` without any network.

    ``answer`` gets the input and returns the answer (a mapping, or text to be sent as it is); ``faults`` is an iterable
    of `Fault` or None, one for each request. ``structured_output`` is the strictest format of answers that it takes
    ("json_object", "none": as many compatible servers do). Thread-safe; ``questions`` keeps what was asked.
    """

    def __init__(
        self,
        vendor: Vendor = "anthropic",
        answer: Callable[[Any], Mapping[str, Any] | str] = lambda value: {},
        *,
        key: str = "sk-test-0123456789abcdef",
        faults: Iterable[Fault | None] = (),
        structured_output: Literal["json_schema", "json_object", "none"] = "json_schema",
        keep_questions: bool = True,
    ) -> None:
        self.vendor = vendor
        self.key = key
        self.questions: list[Question] = []
        self.asked = 0
        self._keep = keep_questions
        self._strictest = _FORMATS.index(structured_output)
        self._protocol: VendorProtocol = PROTOCOLS[vendor]
        self._answer = answer
        self._faults: Iterator[Fault | None] = iter(faults)
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._connections: set[socket.socket] = set()

    # as configuration

    @property
    def environ(self) -> dict[str, str]:
        """An environment that holds the key under the name in `settings`."""
        return {self._key_env: self.key}

    @property
    def _key_env(self) -> str:
        return f"FAKE_{self.vendor.upper()}_KEY"

    def settings(self, **more: Any) -> dict[str, Any]:
        """The keys of a provider's section in apprentice.yaml, pointing here."""
        models = {"anthropic": "claude-sonnet-4-5", "google": "gemini-2.5-flash"}
        provider = "openai" if self.vendor == "openai_responses" else self.vendor
        section: dict[str, Any] = {
            "provider": provider,
            "model": models.get(self.vendor, "gpt-4o-mini"),
            "api_key_env": self._key_env,
            "base_url": self.base_url,
        }
        if self.vendor == "openai_responses":
            section["api"] = "responses"
        if self.vendor == "openai_compatible":
            section["price"] = {"input": "0.15", "output": "0.60"}
        return {**section, **more}

    @property
    def base_url(self) -> str:
        """The base URL as the vendor's settings take it; of the server where it runs, else of `transport`."""
        root = "http://vendor.invalid"
        if self._server is not None:
            root = "http://{}:{}".format(*self._server.server_address)
        return root + {"anthropic": "", "google": "/v1beta"}.get(self.vendor, "/v1")

    # as a server

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.vendor = self
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    # as a transport

    def transport(self) -> httpx.MockTransport:
        """For ``httpx.Client(transport=...)``: the same vendor with no network; wire faults raise httpx's errors."""

        def respond(request: httpx.Request) -> httpx.Response:
            reply = self.reply(request.url.path, {k.lower(): v for k, v in request.headers.items()}, request.content)
            match reply.wire:
                case "reset":
                    raise httpx.ReadError("connection reset by peer", request=request)
                case "half":
                    raise httpx.RemoteProtocolError("peer closed connection without sending complete message body")
                case "slow":
                    raise httpx.ReadTimeout("the answer was still arriving", request=request)
            return httpx.Response(reply.status, headers=list(reply.headers), content=reply.body)

        return httpx.MockTransport(respond)

    # as a vendor

    def reply(self, path: str, headers: Mapping[str, str], content: bytes) -> _Reply:
        """What the vendor does about one request."""
        with self._lock:
            self.asked += 1
            fault = next(self._faults, None)
        protocol = self._protocol
        try:
            question = protocol.read(path, headers, json.loads(content), self.key)
            if _FORMATS.index(question.format) < self._strictest:
                raise Refused(400, "invalid_request_error", "This response_format type is unavailable now")
        except Refused as refused:
            return self._error(refused.status, refused.kind, str(refused))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            return self._error(400, "invalid_request_error", f"malformed request: {type(error).__name__}: {error}")
        if self._keep:
            self.questions.append(question)
        if fault is not None and (error_reply := self._failed(fault)) is not None:
            return error_reply
        kind = fault.kind if fault else None
        if fault is not None and kind == "schema_violation":
            text = fault.content if isinstance(fault.content, str) else fault.content.decode()
        else:
            answer = self._answer(question.value)
            text = answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)
        match kind:
            case "truncated":
                text = text[: max(len(text) // 2, 1)]
            case "refusal" | "filtered" | "empty":
                text = ""
            case "thinking":
                text = f"<think>\nLet me see: {{}}\n</think>\n\n{text}"
            case "fenced":
                text = f"```json\n{text}\n```"
        stops: dict[str, Stop] = {"truncated": "length", "refusal": "refusal", "filtered": "filtered"}
        tokens_in = tokens(content.decode("utf-8", "replace"))
        body = protocol.answer(question, text, stops.get(kind or "", "end"), tokens_in, in_parts=kind == "in_parts")
        if kind == "tool_input_text":
            for block in body.get("content", ()):
                if block.get("type") == "tool_use":
                    block["input"] = json.dumps(block["input"])
        if kind == "no_usage":
            body = {name: value for name, value in body.items() if name not in ("usage", "usageMetadata")}
        encoded = json.dumps(body).encode()
        json_type = (("content-type", "application/json"),)
        if kind == "half_body":
            return _Reply(200, encoded, json_type, wire="half")
        if kind == "slow_body":
            return _Reply(200, encoded, json_type, wire="slow", seconds_between=fault.seconds_between if fault else 0)
        return _Reply(200, encoded, json_type)

    def _failed(self, fault: Fault) -> _Reply | None:
        after: tuple[tuple[str, str], ...] = ()
        if fault.retry_after_s is not None:
            after = (("retry-after", f"{fault.retry_after_s:g}"),)
        google = self.vendor == "google"
        match fault.kind:
            case "rate_limited":
                kind = "RESOURCE_EXHAUSTED" if google else "rate_limit_error"
                return self._error(429, kind, "Rate limit reached, please slow down.", after)
            case "overloaded" if self.vendor == "anthropic":
                return self._error(529, "overloaded_error", "Overloaded", after)
            case "overloaded":
                kind = "UNAVAILABLE" if google else "server_error"
                return self._error(503, kind, "The model is overloaded. Please try again later.", after)
            case "server_error":
                kind = "INTERNAL" if google else "api_error" if self.vendor == "anthropic" else "server_error"
                return self._error(500, kind, "Internal server error", after)
            case "unauthorized":
                message = f"Incorrect API key provided: {self.key}."
                if google:
                    return self._error(400, "INVALID_ARGUMENT", message)
                return self._error(401, "authentication_error", message)
            case "reset":
                return _Reply(200, b"", wire="reset")
            case "error_inside":
                kind = "RESOURCE_EXHAUSTED" if google else "rate_limit_error"
                error = self._error(429, kind, "Rate limit exceeded.", after)
                return _Reply(200, error.body, error.headers)
            case "verbatim":
                body = fault.content.encode() if isinstance(fault.content, str) else fault.content
                return _Reply(fault.status, body, fault.headers)
            case "not_json":
                return _Reply(200, b"<html><body>It works!</body></html>", (("content-type", "text/html"),))
        return None

    def _error(self, status: int, kind: str, message: str, headers: tuple[tuple[str, str], ...] = ()) -> _Reply:
        body = json.dumps(self._protocol.error(status, kind, message)).encode()
        return _Reply(status, body, (("content-type", "application/json"), *headers))


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128
    vendor: FakeVendor

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up in the middle are what faults are about."""


class _Handler(socketserver.StreamRequestHandler):
    """Just enough HTTP/1.1 to be quick, and to break it on purpose."""

    disable_nagle_algorithm = True
    server: _Server

    def handle(self) -> None:
        vendor = self.server.vendor
        vendor._connections.add(self.connection)
        try:
            while self._one(vendor):
                pass
        finally:
            vendor._connections.discard(self.connection)

    def _one(self, vendor: FakeVendor) -> bool:
        line = self.rfile.readline()
        if not line:
            return False
        _, path, _ = line.decode("ascii").split(" ", 2)
        headers: dict[str, str] = {}
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        content = self.rfile.read(int(headers.get("content-length", "0")))
        reply = vendor.reply(path, headers, content)
        if reply.wire == "reset":
            # lingering for 0 seconds makes close() send RST instead of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            for end in (self.rfile, self.wfile, self.connection):
                end.close()
            return False
        head = [f"HTTP/1.1 {reply.status} .", f"content-length: {len(reply.body)}"]
        head += [f"{name}: {value}" for name, value in reply.headers]
        start = ("\r\n".join(head) + "\r\n\r\n").encode("latin-1")
        match reply.wire:
            case "half":
                self.connection.sendall(start + reply.body[: len(reply.body) // 2])
                return False
            case "slow":
                self.connection.sendall(start)
                for i in range(len(reply.body)):
                    self.connection.sendall(reply.body[i : i + 1])
                    time.sleep(reply.seconds_between)
            case _:
                self.connection.sendall(start + reply.body)
        return True
