"""Sending: the whole answer or a clear failure, by the deadline, whoever's client it is."""

import contextlib
import gzip
import http.server
import json
import multiprocessing
import pathlib
import socket
import ssl
import threading
import tracemalloc
import zlib
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

from apprentice.errors import ConfigError
from apprentice.remote.transport import MOST_BYTES, Endpoint, Request, Response, Sender


def post(url: str, *, own: bool = False, deadline_s: float = 5.0) -> Response:
    """Post over real connections: those of a client that the application brought (``own``), or Apprentice's."""
    with httpx.Client() as client, contextlib.closing(Sender(client if own else None)) as sender:
        return sender.send(Request(Endpoint(url), b"{}"), deadline_s)


def post_to(answer: httpx.Response) -> Response:
    """Post where there is no network, and get ``answer``."""
    with httpx.Client(transport=httpx.MockTransport(lambda _: answer)) as client:
        return Sender(client).send(Request(Endpoint("http://vendor/v1"), b"{}"), 5.0)


either_client = pytest.mark.parametrize("own", [True, False], ids=["the application's client", "its own"])


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


@either_client
def test_an_answer_comes_whole_and_decoded(own: bool) -> None:
    """From a real server, with its headers; and where nobody listens, an error that says so."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the name that the library looks for
            body = gzip.compress(b'{"path": "zipped"}')
            self.send_response(200)
            self.send_header("content-encoding", "gzip")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        answer = post(url, own=own)
    assert (answer.status, json.loads(answer.content)) == (200, {"path": "zipped"})
    assert answer.headers["Content-Encoding"] == "gzip"
    with pytest.raises(httpx.ConnectError):
        post(url, own=own)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "identity", "GZIP"])
def test_an_answer_is_decoded_once_whatever_its_coding(coding: str) -> None:
    """Also where a client has read the body already."""
    pack = {"gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes}[coding.lower()]
    answer = httpx.Response(200, content=pack(b'{"a": 1}'), headers={"content-encoding": coding})
    assert post_to(answer).content == b'{"a": 1}'


@pytest.mark.parametrize(
    ("coding", "body", "says"),
    [("br", b"{}", "'br', which was not asked for"), ("gzip", b"{}", "is not the gzip that it says")],
)
def test_an_answer_that_cannot_be_decoded_says_why(coding: str, body: bytes, says: str) -> None:
    """It is a failure of the answer, not of the connection."""

    class Raw(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, stream=httpx.ByteStream(body), headers={"content-encoding": coding})

    with httpx.Client(transport=Raw()) as client, pytest.raises(httpx.DecodingError, match=says):
        Sender(client).send(Request(Endpoint("http://vendor/v1"), b"{}"), 5.0)


def zeros(total: int) -> Iterator[bytes]:
    """So many zeros, compressed, in pieces of what a network brings at once."""
    pack = zlib.compressobj(wbits=31)
    for _ in range(total // 2**20):
        yield pack.compress(bytes(2**20))
    yield pack.flush()


@pytest.mark.parametrize("coding", ["gzip", "identity"])
def test_an_answer_larger_than_any_ends_early(coding: str) -> None:
    """300 MB, packed into 300 kB or not: given up at the bound, with the bound's memory and not the body's."""
    read = 0

    class Body(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            nonlocal read
            for chunk in zeros(300 * 2**20) if coding == "gzip" else (bytes(65536) for _ in range(4800)):
                read += len(chunk)
                yield chunk

    class Large(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            return httpx.Response(200, stream=Body(), headers={"content-encoding": coding})

    tracemalloc.start()
    try:
        with httpx.Client(transport=Large()) as client, pytest.raises(httpx.DecodingError, match="larger than 16,777"):
            Sender(client).send(Request(Endpoint("http://vendor/v1"), b"{}"), 60.0)
        assert tracemalloc.get_traced_memory()[1] < 4 * MOST_BYTES
    finally:
        tracemalloc.stop()
    assert 0 < read <= 2 * MOST_BYTES


def test_proxies_that_the_environment_names_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request arrives at the proxy, with the vendor's address in it."""
    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    for name in ("http_proxy", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), Proxy) as server:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.handle_request).start()
        assert post("http://vendor.invalid/v1").status == 200
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
    with contextlib.closing(Sender()) as direct:
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


def test_a_vendors_certificate_is_checked(certificate: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TLS, to whom the environment trusts; to anybody else nothing is sent, so nothing is billed."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), KeptAlive) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever).start()
        url = f"https://127.0.0.1:{server.server_port}/v1"
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            post(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert post(url).status == 200
        server.shutdown()


def _post_in_child(sender: Sender, url: str) -> None:
    assert sender.send(Request(Endpoint(url), b"{}"), 5.0).status == 200


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_has_connections_of_its_own(kept_alive: str) -> None:
    """Two processes that talk on one socket would read each other's answers."""
    with contextlib.closing(Sender()) as sender:
        assert sender.send(Request(Endpoint(kept_alive), b"{}"), 5.0).status == 200
        child = multiprocessing.get_context("fork").Process(target=_post_in_child, args=(sender, kept_alive))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert sender.send(Request(Endpoint(kept_alive), b"{}"), 5.0).status == 200
    assert len(KeptAlive.connections) == 2


def test_threads_have_connections_of_their_own(kept_alive: str) -> None:
    """Fifty requests by five threads: every one answered, by no more connections than threads."""
    with contextlib.closing(Sender()) as direct, ThreadPoolExecutor(5) as threads:
        endpoint = Endpoint(kept_alive)
        statuses = list(threads.map(lambda n: direct.send(Request(endpoint, b"%d" % n), 5.0).status, range(50)))
    assert statuses == [200] * 50
    assert 1 <= len(KeptAlive.connections) <= 5


def test_what_is_no_web_address_is_an_error() -> None:
    """As httpx says it; a base_url without its scheme is the usual cause."""
    with pytest.raises(httpx.UnsupportedProtocol):
        post("localhost:8000/v1")


def test_keys_are_in_no_repr() -> None:
    """Requests are printed by debuggers and in tracebacks."""
    request = Request(Endpoint("http://vendor/v1", ("x-api-key", "sk-secret")), b"{}")
    assert "secret" not in repr(request)


@either_client
def test_a_deadline_holds_against_a_body_that_drips(own: bool, dripping_server: str) -> None:
    """The deadline is for the whole answer, not for each read of it."""
    with pytest.raises(httpx.ReadTimeout):
        post(dripping_server, own=own, deadline_s=0.3)


@pytest.mark.parametrize(
    ("start", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\nx-header: ", b"a"),
        (b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2;", b"a"),
    ],
    ids=["headers", "interim answers", "a chunk's extension"],
)
def test_a_deadline_holds_against_whatever_drips(start: bytes, drop: bytes) -> None:
    """No single read times out, and none of them brings a part of the body: the request ends at its deadline."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(start)
                while not stop.wait(0.02):
                    connection.sendall(drop)

        thread = threading.Thread(target=serve)
        thread.start()
        timer = threading.Timer(20, stop.set)  # a request that never ended would end here
        timer.start()
        try:
            with pytest.raises(httpx.ReadTimeout):
                post(f"http://127.0.0.1:{listener.getsockname()[1]}", deadline_s=0.3)
            assert not stop.is_set()
        finally:
            timer.cancel()
            stop.set()
            thread.join()


def test_an_asynchronous_client_is_refused_before_anything_is_paid() -> None:
    """Requests are sent from threads: its answers would be coroutines, each counted as a lost call."""
    with pytest.raises(ConfigError, match=r"http_client: is an httpx\.AsyncClient"):
        Sender(httpx.AsyncClient())  # type: ignore[arg-type]


def test_every_wait_of_a_request_ends_at_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting, writing and reading share the deadline: each may wait for what the others have left."""
    now = [100.0]
    monkeypatch.setattr("apprentice.remote.transport.time.monotonic", lambda: now[0])
    seen: list[Mapping[str, float]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.extensions["timeout"])
        return httpx.Response(200, content=b"{}")

    with httpx.Client(transport=httpx.MockTransport(answer)) as client:
        assert Sender(client).send(Request(Endpoint("http://vendor/v1"), b"{}"), 10.0).content == b"{}"
    (waits,) = seen
    assert dict(waits) == {"connect": 10.0, "read": 10.0, "write": 10.0, "pool": 10.0}
    now[0] = 107.0
    assert waits.get("read") == 3.0
    now[0] = 120.0
    assert waits.get("read") == 0.001  # 0 would mean not to wait at all
    assert waits.get("trace") is None
