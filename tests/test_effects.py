"""One path, two drivers: what a path sees must not depend on who walks it."""

import asyncio
import contextlib
import gzip
import http.server
import json
import pathlib
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from typing import Any, ClassVar

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from apprentice.effects import Both, Call, Outcome, Path, Send, Sleep, run_async, run_sync
from apprentice.transport import Endpoint, Request, Response, async_sender, sender


def answer(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"path": request.url.path})


def post(url: str) -> Send:
    return Send(Request(Endpoint(url), b"{}"), deadline_s=5)


def walk(driver: str, path: Path[Any], handler: Any = answer) -> Any:
    with ThreadPoolExecutor(4) as threads:
        if driver == "sync":
            with httpx.Client(transport=httpx.MockTransport(handler)) as client:
                return run_sync(path, sender(client), threads)

        async def main() -> Any:
            async with httpx.AsyncClient(transport=httpx.MockTransport(handler)) as client:
                return await run_async(path, async_sender(client), threads)

        return asyncio.run(main())


both_drivers = pytest.mark.parametrize("driver", ["sync", "async"])


def ask(path: str) -> Path[str]:
    response = yield post(f"http://remote{path}")
    return str(json.loads(response.content)["path"])


@both_drivers
def test_a_path_is_sent_the_results_of_its_effects(driver: str) -> None:
    """Requests, calls and sleeps give their values where they were yielded."""

    def path() -> Path[tuple[str, int]]:
        first = yield from ask("/a")
        yield Sleep(0)
        number = yield Call(lambda: 7)
        return first, number

    assert walk(driver, path()) == ("/a", 7)


@both_drivers
def test_an_effect_that_fails_raises_inside_the_path(driver: str) -> None:
    """So that retrying is an ordinary try statement."""

    def path() -> Path[str]:
        try:
            yield Call(lambda: 1 // 0)
        except ZeroDivisionError as error:
            return str(error)
        return "unreachable"

    assert "zero" in walk(driver, path())


@both_drivers
def test_both_paths_run_at_once_and_neither_failure_stops_the_other(driver: str) -> None:
    """Two paths that wait for each other can only end if they run together."""
    met = threading.Barrier(2, timeout=5)

    def meet(then: Exception | None) -> Path[str]:
        yield Call(met.wait)
        if then:
            raise then
        return "fine"

    def path() -> Path[tuple[Outcome, Outcome]]:
        outcomes = yield Both(meet(None), meet(KeyError("lost")))
        return outcomes  # type: ignore[no-any-return]

    first, second = walk(driver, path())
    assert first.get() == "fine"
    assert isinstance(second.error, KeyError)


@pytest.fixture
def dripping_server() -> Iterator[str]:
    """A server whose answer never ends: one byte every 20 ms, so that no single read ever times out."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
            while not stop.wait(0.02):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    stop.set()
    thread.join()
    listener.close()


def walk_by(driver: str, path: Path[Any], *, own: bool) -> Any:
    """Walk a path over real connections: those of a client that the application brought, or Apprentice's own."""
    with ThreadPoolExecutor(1) as threads:
        if driver == "sync":
            with httpx.Client() as client, contextlib.closing(sender(client if own else None)) as chosen:
                return run_sync(path, chosen, threads)

        async def main() -> Any:
            async with (
                httpx.AsyncClient() as client,
                contextlib.aclosing(async_sender(client if own else None)) as chosen,
            ):
                return await run_async(path, chosen, threads)

        return asyncio.run(main())


@both_drivers
def test_without_a_client_of_ones_own_answers_are_the_same(driver: str) -> None:
    """Over the bare transport: the answer of a real server, decoded, and an error that says what failed."""

    def path(url: str) -> Path[Response]:
        return (yield post(url))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the name that the library looks for
            body = gzip.compress(b'{"path": "zipped"}')
            self.send_response(200)
            self.send_header("content-encoding", "gzip")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        answers = walk_by(driver, path(url), own=False)
    assert (answers.status, json.loads(answers.content)) == (200, {"path": "zipped"})
    assert answers.headers["Content-Encoding"] == "gzip"
    with pytest.raises(httpx.ConnectError):
        walk_by(driver, path(url), own=False)


@both_drivers
def test_proxies_that_the_environment_names_are_used(driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request arrives at the proxy, with the vendor's address in it."""
    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

    def path() -> Path[Response]:
        return (yield post("http://vendor.invalid/v1"))

    for name in ("http_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), Proxy) as server:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.handle_request).start()
        assert walk_by(driver, path(), own=False).status == 200
    assert asked == ["http://vendor.invalid/v1"]


class KeptAlive(http.server.BaseHTTPRequestHandler):
    """Counts connections, and answers any number of requests on each; closes after a request to /last."""

    protocol_version = "HTTP/1.1"
    connections: ClassVar[list[int]] = []

    def setup(self) -> None:
        super().setup()
        self.connections.append(self.client_address[1])

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
        self.close_connection = self.path == "/last"

    def log_message(self, *_: object) -> None: ...


class ClosesInSight(http.server.ThreadingHTTPServer):
    """Tells when a connection has been closed."""

    closed = threading.Event()

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.closed.set()


@pytest.fixture
def kept_alive() -> Iterator[str]:
    """The address of a `KeptAlive` server."""
    KeptAlive.connections.clear()
    ClosesInSight.closed.clear()
    with ClosesInSight(("127.0.0.1", 0), KeptAlive) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_connections_are_kept_and_those_that_the_server_closed_are_not_used(kept_alive: str) -> None:
    """Requests one after the other share a connection; after the server has closed it, a new one is opened."""
    with contextlib.closing(sender()) as direct:
        for last in ("/a", "/b", "/last", "/c", "/d"):
            assert direct.send(Request(Endpoint(kept_alive + last), b"{}"), 5.0).status == 200
            if last == "/last":
                assert ClosesInSight.closed.wait(10)
    assert len(KeptAlive.connections) == 2


@pytest.fixture
def certificate(tmp_path: pathlib.Path) -> pathlib.Path:
    """A certificate for 127.0.0.1 that nobody but its maker trusts, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "vendor")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path / "vendor.pem"
    path.write_bytes(private + signed.public_bytes(serialization.Encoding.PEM))
    return path


@both_drivers
def test_a_vendors_certificate_is_checked(
    driver: str, certificate: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TLS, to whom the environment trusts; to anybody else nothing is sent, so nothing is billed."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), KeptAlive) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever).start()

        def path() -> Path[Response]:
            return (yield post(f"https://127.0.0.1:{server.server_port}/v1"))

        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            walk_by(driver, path(), own=False)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert walk_by(driver, path(), own=False).status == 200
        server.shutdown()


def test_threads_have_connections_of_their_own(kept_alive: str) -> None:
    """Fifty requests by five threads: every one answered, by no more connections than threads."""
    with contextlib.closing(sender()) as direct, ThreadPoolExecutor(5) as threads:
        endpoint = Endpoint(kept_alive)
        statuses = list(threads.map(lambda n: direct.send(Request(endpoint, b"%d" % n), 5.0).status, range(50)))
    assert statuses == [200] * 50
    assert 1 <= len(KeptAlive.connections) <= 5


def test_what_is_no_web_address_is_an_error(kept_alive: str) -> None:
    """As httpx says it; a base_url without its scheme is the usual cause."""
    with contextlib.closing(sender()) as direct, pytest.raises(httpx.UnsupportedProtocol, match="begin with http"):
        direct.send(Request(Endpoint("localhost:8000/v1"), b"{}"), 1.0)


def test_keys_are_in_no_repr() -> None:
    """Requests are printed by debuggers and in tracebacks."""
    request = Request(Endpoint("http://vendor/v1", ("x-api-key", "sk-secret")), b"{}")
    assert "secret" not in repr(request) + repr(Send(request, 1.0))


@pytest.mark.parametrize("own", [True, False])
@both_drivers
def test_a_deadline_holds_against_a_body_that_drips(driver: str, own: bool, dripping_server: str) -> None:
    """The deadline is for the whole answer, not for each read of it."""

    def path() -> Path[None]:
        yield Send(Request(Endpoint(dripping_server), b"{}"), deadline_s=0.3)

    with pytest.raises(httpx.ReadTimeout):
        walk_by(driver, path(), own=own)


@both_drivers
def test_a_compressed_answer_is_decoded_once(driver: str) -> None:
    """The driver reads the body itself; whoever reads the response must not decode it again."""

    def handler(request: httpx.Request) -> httpx.Response:
        body = gzip.compress(b'{"path": "zipped"}')
        return httpx.Response(200, content=body, headers={"content-encoding": "gzip"})

    assert walk(driver, ask("/a"), handler) == "zipped"


def test_every_wait_of_a_request_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting, writing and reading share the deadline: each may wait for what the others have left."""
    now = [100.0]
    monkeypatch.setattr("apprentice.transport.time.monotonic", lambda: now[0])
    seen: list[Mapping[str, float]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.extensions["timeout"])
        return httpx.Response(200, content=b"{}")

    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        assert sender(client).send(Request(Endpoint("http://vendor/v1"), b"{}"), 10.0).content == b"{}"
    (waits,) = seen
    assert dict(waits) == {"connect": 10.0, "read": 10.0, "write": 10.0, "pool": 10.0}
    now[0] = 107.0
    assert waits.get("read") == 3.0
    now[0] = 120.0
    assert waits.get("read") == 0.001  # 0 would mean not to wait at all
    assert waits.get("trace") is None
