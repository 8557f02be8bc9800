"""Requests on their way to the Hub: deadlines that trickling cannot evade, addresses that are refused."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx2
import pytest

from smolquant import wire
from smolquant.wire import ForbiddenAddress, GivenUp, HubClient, asked_pause

Serve = Callable[[socket.socket, bytes], None]
"""Handles a connection on which a request has arrived."""
OK = b"HTTP/1.1 200 OK\r\nContent-Length: "


@contextmanager
def raw_server(serve: Serve) -> Iterator[str]:
    """A server that handles each connection as ``serve`` does."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                threading.Thread(target=handle, args=(connection,), daemon=True).start()

        def handle(connection: socket.socket) -> None:
            with connection, suppress(OSError):  # the client may have gone
                request = connection.recv(65536)
                while request.startswith(b"P") and request.endswith(b"\r\n\r\n"):
                    request += connection.recv(65536)  # the body comes as a piece of its own
                serve(connection, request)

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def client(endpoint: str, patience: float = 0.4, lines: list[str] | None = None) -> HubClient:
    notify = (lambda line: None) if lines is None else lines.append
    return HubClient(endpoint, patience=patience, notify=notify, hooks={"request": []})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_FIRST_PAUSE", 0.01)


def trickle(connection: socket.socket, content: bytes) -> None:
    for byte in content:
        connection.sendall(bytes([byte]))
        time.sleep(0.1)


def trickled_head(connection: socket.socket, request: bytes) -> None:
    trickle(connection, OK + b"2\r\n\r\nok")


def trickled_body(connection: socket.socket, request: bytes) -> None:
    connection.sendall(OK + b"200\r\n\r\n")
    trickle(connection, b"x" * 200)


@pytest.mark.fault(
    "hub",
    "An answer trickles in, byte by byte",
    "It is given up after the time limit.",
)
@pytest.mark.parametrize("serve", [trickled_head, trickled_body])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_that_trickles_in_is_given_up(serve: Serve, streamed: bool) -> None:
    with raw_server(serve) as url, client(url) as http:
        started = time.monotonic()
        # A busy machine may make a pause between two bytes as long as a silence that is not borne.
        with pytest.raises((GivenUp, httpx2.ReadTimeout) if streamed else GivenUp):
            if streamed:
                with http.stream("GET", url, timeout=None) as response:
                    response.read()
            else:
                http.get(url, timeout=None)
        assert time.monotonic() - started < 3.0


@pytest.mark.fault(
    "hub",
    "A transfer is slow and goes on",
    "It may take longer than the time limit.",
)
def test_a_transfer_that_goes_on_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_STEP_BYTES", 1000)

    def slowly(connection: socket.socket, request: bytes) -> None:
        connection.sendall(OK + b"10000\r\n\r\n")
        for _ in range(10):
            connection.sendall(b"x" * 1000)
            time.sleep(0.1)

    with raw_server(slowly) as url, client(url) as http:
        started = time.monotonic()
        assert len(http.get(url).content) == 10_000
        assert time.monotonic() - started > 0.8


@pytest.mark.fault(
    "hub",
    "A server stops reading an upload",
    "It is given up after the time limit.",
)
def test_an_upload_that_nobody_reads_is_given_up() -> None:
    def read_nothing(connection: socket.socket, request: bytes) -> None:
        time.sleep(9)

    with raw_server(read_nothing) as url, client(url) as http:
        started = time.monotonic()
        with pytest.raises(GivenUp):
            http.put(url, content=b"x" * 20_000_000)
        assert time.monotonic() - started < 3.0


@pytest.mark.fault(
    "hub",
    "The connection is lost while a file is sent",
    "It is sent again from where it began, and that is told.",
)
def test_a_lost_connection_is_followed_by_another_try_and_a_file_is_sent_from_its_beginning(
    tmp_path: Path,
) -> None:
    received: list[bytes] = []

    def lose_the_first(connection: socket.socket, request: bytes) -> None:
        received.append(request)
        if len(received) > 1:
            connection.sendall(OK + b"0\r\n\r\n")

    file = tmp_path / "shard"
    file.write_bytes(b"0123456789")
    lines: list[str] = []
    with (
        raw_server(lose_the_first) as url,
        client(url, 5, lines) as http,
        file.open("rb") as opened,
    ):
        body: Any = opened  # as the Hub's client library passes it, past what is declared
        body.seek(4)
        assert http.request("PUT", url, data=body).status_code == 200
    assert all(b"456789" in one and b"0123" not in one for one in received) and len(received) == 2
    assert ["again in 0 s" in line for line in lines] == [True]


@pytest.mark.fault(
    "hub",
    "Nothing answers at the Hub's address",
    "Exit 5 at once.",
)
def test_what_was_never_reached_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    lines: list[str] = []
    with client(f"http://127.0.0.1:{port}", 5, lines) as http, pytest.raises(httpx2.ConnectError):
        http.get(f"http://127.0.0.1:{port}")
    assert not lines


@pytest.mark.fault(
    "hub",
    "The connection is lost after the commit was sent",
    "The request is not sent a second time.",
)
def test_a_commit_is_never_repeated() -> None:
    seen: list[bytes] = []

    def lose(connection: socket.socket, request: bytes) -> None:
        seen.append(request)

    with raw_server(lose) as url, client(url, 5) as http:
        with pytest.raises(httpx2.RemoteProtocolError):
            http.post(f"{url}/api/models/a/b/commit/main", json={})
        assert len(seen) == 1


@pytest.mark.fault(
    "hub",
    "The Hub asks for a pause that is negative, past, or no time at all",
    "It counts as none.",
)
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "17000"}, 17_000),
        ({"Retry-After": formatdate(time.time() + 9000, usegmt=True)}, 9000),
        ({"Retry-After": formatdate(time.time() - 9000, usegmt=True)}, 0),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-5"}, None),
        ({"ratelimit": '"api";r=0;t=55000'}, 55_000),
        ({"ratelimit": '"api";r=3;t=55'}, None),
    ],
)
def test_the_pause_that_a_server_asks_for(headers: dict[str, str], seconds: float | None) -> None:
    asked = asked_pause(httpx2.Headers(headers))
    assert asked == (None if seconds is None else pytest.approx(seconds, abs=4000))


HUB = "https://huggingface.co"
PUBLIC, PRIVATE = "8.8.8.8", "192.168.1.7"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What names stand for; others are not known here, as behind a proxy."""
    known = {"huggingface.co": PUBLIC, "cdn.example": PUBLIC, "inside.example": PRIVATE}

    def look_up(host: str) -> list[object]:
        try:
            return [ip_address(known.get(host, host))]
        except ValueError:
            return []

    monkeypatch.setattr(wire, "_addresses", look_up)
    return known


@pytest.mark.fault(
    "hub",
    "A public Hub's answer leads to a private or local address, or to one without https",
    "Nothing is sent there; the message does not show the address's signature.",
)
@pytest.mark.parametrize(
    "url",
    [
        "http://cdn.example/x",
        "http://huggingface.co/x",
        "ftp://cdn.example/x",
        "https://inside.example/x",
        "https://169.254.169.254/latest/meta-data",
        "https://127.0.0.1/x",
        "https://10.1.2.3:8443/x",
        "https://[::1]/x",
        "https://[fd00::1]/x",
    ],
)
def test_a_public_hub_leads_to_no_odd_address(names: dict[str, str], url: str) -> None:
    request = httpx2.Request("GET", f"{url}?X-Amz-Signature=abc")
    with client(HUB) as http, pytest.raises(ForbiddenAddress) as caught:
        http._guard(request)
    assert "Signature" not in str(caught.value)


@pytest.mark.fault(
    "secret",
    "The Hub keeps large files at another address",
    "The token is not sent there.",
)
@pytest.mark.parametrize(
    ("endpoint", "url"),
    [
        (HUB, "https://cdn.example/x"),
        (HUB, "https://known-to-the-proxy-only.example/x"),
        ("https://inside.example", "https://10.1.2.3/x"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8001/x"),
    ],
)
def test_files_may_lie_elsewhere_where_the_token_does_not_go(
    names: dict[str, str], endpoint: str, url: str
) -> None:
    request = httpx2.Request("GET", url, headers={"Authorization": "Bearer hf_x"})
    with client(endpoint) as http:
        http._guard(request)
        assert "Authorization" not in request.headers
        to_the_hub = httpx2.Request("GET", endpoint, headers={"Authorization": "Bearer hf_x"})
        http._guard(to_the_hub)
        assert "Authorization" in to_the_hub.headers


@pytest.mark.fault(
    "secret",
    "An address differs from the Hub's in its port, scheme or subdomain",
    "It is not taken for the Hub.",
)
@pytest.mark.parametrize(
    ("endpoint", "url", "is_hub"),
    [
        (HUB, "https://huggingface.co:443/api/models", True),
        (HUB, "https://huggingface.co:8443/api/models", False),
        (HUB, "http://huggingface.co/api/models", False),
        (HUB, "https://cdn.huggingface.co/x", False),
        ("http://hub.example", "https://hub.example/api", True),
        ("http://hub.example:8080", "https://hub.example/api", False),
    ],
)
def test_the_hub_is_known_by_its_origin(endpoint: str, url: str, is_hub: bool) -> None:
    with client(endpoint) as http:
        assert http.is_hub(httpx2.URL(url)) is is_hub


def test_keyless_publishing_shows_github_its_own_token(
    names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACTIONS_ID_TOKEN_REQUEST_URL", "https://cdn.example/token?api=1")
    request = httpx2.Request(
        "GET", "https://cdn.example/token", headers={"Authorization": "Bearer of-github"}
    )
    with client(HUB) as http:
        http._guard(request)
    assert "Authorization" in request.headers


@pytest.mark.fault(
    "hub",
    "A private address is written as an IPv6 one",
    "It is known by its IPv4 address.",
)
def test_addresses_are_told_apart() -> None:
    assert [str(one) for one in wire._addresses("::ffff:10.0.0.1")] == ["10.0.0.1"]
    assert all(one.is_loopback for one in wire._addresses("localhost"))
    assert wire._addresses("no such name") == []
