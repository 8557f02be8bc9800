"""A proxy in front of servers on this machine that damages one of the exchanges with them."""

import http.client
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """What the server answered, with the proxy's addresses in place of its own."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def is_file(self) -> bool:
        """Whether it is the content of a file, and no metadata."""
        kinds = [value for name, value in self.headers if name.lower() == "content-type"]
        return self.status in (200, 206) and not any("json" in kind for kind in kinds)

    def raw(self, *, length: int | None = None) -> bytes:
        """The bytes on the wire; ``length`` is what the head says of the body, if not the truth."""
        kept = [
            f"{name}: {value}"
            for name, value in self.headers
            if name.lower() not in ("content-length", "transfer-encoding", "connection")
        ]
        size = len(self.body) if length is None else length
        head = [f"HTTP/1.1 {self.status} answer", *kept, f"Content-Length: {size}"]
        return "\r\n".join([*head, "Connection: close", "", ""]).encode("latin-1") + self.body


@dataclass(frozen=True)
class Exchange:
    """A request that has come in, whose answer is what a fault decides about."""

    method: str
    path: str
    ask: Callable[[], Answer]
    """Have the server do what is asked for."""
    head_only: bool


Fault = Callable[[Exchange], bytes]
"""Returns what the client gets to read before the connection is closed."""


def sound(exchange: Exchange) -> bytes:
    answer = exchange.ask()
    if exchange.head_only:  # says how long the body would be
        lengths = [int(value) for name, value in answer.headers if name.lower() == "content-length"]
        return answer.raw(length=lengths[0] if lengths else 0)
    return answer.raw()


def delay(seconds: float) -> Fault:
    """The answer comes late."""

    def late(exchange: Exchange) -> bytes:
        time.sleep(seconds)
        return sound(exchange)

    return late


def status(code: int) -> Fault:
    """Nothing is done, and the answer is an error."""
    return lambda exchange: Answer(code, [], b"" if exchange.head_only else b"Injected").raw()


def unheard(exchange: Exchange) -> bytes:
    """Nothing is done, and the connection ends without an answer."""
    return b""


def lost(exchange: Exchange) -> bytes:
    """All is done, and the connection ends without an answer."""
    exchange.ask()
    return b""


def cut_head(exchange: Exchange) -> bytes:
    """The answer ends in the middle of its head."""
    return sound(exchange)[:30]


def cut_body(exchange: Exchange) -> bytes:
    """The answer ends in the middle of its body."""
    answer = exchange.ask()
    raw = answer.raw()
    return raw[: len(raw) - (len(answer.body) + 1) // 2]


def too_long(exchange: Exchange) -> bytes:
    """The head promises more than there is."""
    answer = exchange.ask()
    return answer.raw(length=len(answer.body) + 9)


def too_short(exchange: Exchange) -> bytes:
    """The head promises less than there is, so that the client reads a part."""
    answer = exchange.ask()
    return answer.raw(length=len(answer.body) // 2)


def flipped(exchange: Exchange) -> bytes:
    """A bit in the middle of a file's content is another; metadata, which TLS guards alone, is let pass."""
    answer = exchange.ask()
    if not (answer.is_file and answer.body):
        return answer.raw() if not exchange.head_only else sound(exchange)
    body = bytearray(answer.body)
    body[len(body) // 2] ^= 1
    return Answer(answer.status, answer.headers, bytes(body)).raw()


class FaultyProxy:
    """Serves each of ``origins`` at an address of its own while its ``with`` block runs."""

    def __init__(self, origins: Sequence[str]) -> None:
        self.requests: list[tuple[str, str]] = []
        """Method and path of every request so far."""
        self._origins = list(dict.fromkeys(origins))
        self._faults: dict[int, Fault] = {}
        self._lock = threading.Lock()
        self._servers = [
            ThreadingHTTPServer(("127.0.0.1", 0), self._handler(origin)) for origin in self._origins
        ]
        self.urls = [f"http://127.0.0.1:{server.server_port}" for server in self._servers]
        self.url = self.urls[0]

    def __enter__(self) -> Self:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def strike(self, fault: Fault, number: int) -> None:
        """Let ``fault`` meet the request with this number from now on, and none before or after it."""
        with self._lock:
            self._faults = {len(self.requests) + number: fault}

    def calm(self) -> None:
        """Let nothing be damaged any more."""
        with self._lock:
            self._faults = {}

    def _handler(self, origin: str) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _exchange(self) -> None:
                content = _body_of(self)
                fault = proxy._next_fault(self.command, self.path)
                exchange = Exchange(
                    self.command,
                    self.path,
                    lambda: proxy._ask(origin, self, content),
                    self.command == "HEAD",
                )
                with suppress(OSError):  # the client has gone
                    self.wfile.write(fault(exchange))
                self.close_connection = True

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _exchange  # noqa: N815 - names of the base

            def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002

        return Handler

    def _next_fault(self, method: str, path: str) -> Fault:
        with self._lock:
            fault = self._faults.pop(len(self.requests), sound)
            self.requests.append((method, path))
        return fault

    def _ask(self, origin: str, handler: BaseHTTPRequestHandler, content: bytes) -> Answer:
        server = urlsplit(origin).netloc
        kept = {
            name: value
            for name, value in handler.headers.items()
            if name.lower() not in ("host", "connection", "accept-encoding", "transfer-encoding")
        }
        headers = kept | {"Host": server, "Content-Length": str(len(content))}
        connection = http.client.HTTPConnection(server, timeout=60)
        try:
            connection.request(handler.command, handler.path, content, headers)
            response = connection.getresponse()
            body = response.read()
            named = [(name, self._own(value)) for name, value in response.getheaders()]
        finally:
            connection.close()
        answer = Answer(response.status, named, body)
        return (
            answer
            if answer.is_file
            else Answer(response.status, named, self._own(body.decode()).encode())
        )

    def _own(self, text: str) -> str:
        """``text`` with this proxy's addresses in place of the servers'."""
        for origin, url in zip(self._origins, self.urls, strict=True):
            text = text.replace(origin, url)
        return text


def _body_of(handler: BaseHTTPRequestHandler) -> bytes:
    if "chunked" not in handler.headers.get("Transfer-Encoding", ""):
        return handler.rfile.read(int(handler.headers.get("Content-Length", 0)))
    content = b""
    while size := int(handler.rfile.readline(), 16):
        content += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return content
