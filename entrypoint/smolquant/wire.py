"""Every request to the Hub on its way: how long it may take, when it is repeated, and where it may go.

The client library has no deadlines of its own for most of its requests, repeats some of them and not
others, waits for as long as a server asks, and follows whatever address an answer names. All of its
requests go through one HTTP client, so that this one decides for all of them.

A request has to be answered, repetitions and pauses included, within the client's patience. What moves many
bytes has as long again for each megabyte, so that a large file over a slow line is not given up, and a
server that sends a byte now and then is.
"""

import contextvars
import ipaddress
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    hf_raise_for_status,
    parse_ratelimit_headers,
)

_CONNECT_TIMEOUT = 10.0
"""Seconds until a connection stands."""
_STEP_BYTES = 1_000_000
"""Bytes that have to be moved for a transfer to count as alive."""
_MAX_TRIES = 5
_FIRST_PAUSE = 1.0
"""Seconds before the second try; it doubles from try to try, unless the Hub asks for another pause."""

_BUSY = frozenset({408, 429, 500, 502, 503, 504})
"""The statuses that may be another one when the same is asked again."""
_TROUBLE = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
_COMMIT = re.compile(r"/api/(models|datasets|spaces)/.+/commit/")

_FILE = "smolquant.file"
"""The extension of a request that sends a file: the file, and the position from which it is sent."""

FROM_STORAGE = "smolquant.from_storage"
"""The extension of a response that says whether it came from a place where the Hub keeps files."""

Origin = tuple[str, str, int | None]
"""Scheme, host and port, as the client library's URLs have them."""


class GivenUp(Exception):
    """A request was not answered in time, however often it was repeated; its cause is the last try's."""


class ForbiddenAddress(Exception):
    """An answer of the Hub leads to an address that no public Hub would name."""


class HubClient(httpx2.Client):
    """The HTTP client that the Hub's client library uses for everything but Xet."""

    def __init__(
        self,
        endpoint: str,
        *,
        patience: float,
        notify: Callable[[str], None],
        hooks: Mapping[str, list[Callable[..., Any]]],
        sent: Callable[[int], None] = lambda n_bytes: None,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            endpoint: the Hub's address.
            patience: seconds, see the module.
            notify: is told a line for people before each pause, from any thread.
            hooks: the client library's own, called first.
            sent: is told of the bytes of files that are sent, from any thread; of a negative number where
                they are sent again.
        """
        super().__init__(
            follow_redirects=True,
            timeout=patience,
            event_hooks={**hooks, "request": [*hooks["request"], self._guard]},
        )
        self._endpoint = httpx2.URL(endpoint)
        self._patience, self._notify, self._sent = patience, notify, sent
        self._reached = set[Origin]()
        self._known_hosts: dict[str, bool] = {}

    def is_hub(self, url: httpx2.URL) -> bool:
        """Whether the Hub itself answers at ``url``, and not a place where it keeps files."""
        hub = self._endpoint
        encrypted = hub.port is None and _origin(url) == ("https", hub.host, None)
        return encrypted or _origin(url) == _origin(hub)

    def build_request(self, *arguments: Any, **options: Any) -> httpx2.Request:
        """As any client does, but remember where a file's part begins that may have to be sent again."""
        request = super().build_request(*arguments, **options)
        file: Any = options.get("data")
        if hasattr(file, "seek"):
            request.extensions = {**request.extensions, _FILE: (file, file.tell())}
        return request

    def send(
        self,
        request: httpx2.Request,
        *,
        stream: bool = False,
        auth: Any = httpx2.USE_CLIENT_DEFAULT,
        follow_redirects: Any = httpx2.USE_CLIENT_DEFAULT,
    ) -> httpx2.Response:
        """Send a request, and again where the Hub is busy or out of reach for a moment.

        A commit is never repeated here, because only its caller can find out whether it was made.

        Raises:
            GivenUp: there was no answer in time, or the Hub stayed busy.
            ForbiddenAddress: an answer leads to where nothing is read from or sent to.
            httpx2.HTTPError: as from any client, for requests that are not repeated here.
        """
        body, clock = request.stream, _Clock(self._patience)
        file, begin = request.extensions.get(_FILE, (None, 0))
        replayed = file is not None or isinstance(body, httpx2.ByteStream)
        repeated = replayed and not _is_commit(request)
        request.extensions = {**request.extensions, "timeout": self._timeouts(request)}
        tries = 0
        while True:
            tries += 1
            if file is not None:
                file.seek(begin)
                self._sent(-clock.counted)
                clock.counted = 0
            request.stream = _Watched(body, clock, self._sent if file is not None else None)
            try:
                response = self._try(request, clock, stream, auth, follow_redirects)
            except _TROUBLE as trouble:
                misspelt = (
                    isinstance(trouble, httpx2.ConnectError)
                    and _origin(request.url) not in self._reached
                )
                if not repeated or misspelt or self.is_closed:
                    raise
                what = f"The connection to the Hub broke ({str(trouble) or type(trouble).__name__})"
                self._pause(clock, tries, what, cause=trouble)
                continue
            self._reached.add(_origin(request.url))
            response.extensions[FROM_STORAGE] = not self.is_hub(response.request.url)
            if response.status_code not in _BUSY:
                return response
            asked = asked_pause(response.headers)
            if not repeated and (asked or 0.0) < clock.remaining:
                return response  # whoever sends it again waits as it asks
            what = f"The Hub is busy (HTTP {response.status_code})"
            refusal = _refusal(response)
            response.close()
            self._pause(clock, tries, what, cause=refusal, asked=asked)

    def _pause(
        self,
        clock: "_Clock",
        tries: int,
        what: str,
        *,
        cause: Exception,
        asked: float | None = None,
    ) -> None:
        """Wait before the next try, or give up where that would take too long."""
        pause = _FIRST_PAUSE * 2 ** (tries - 1) if asked is None else asked
        if tries >= _MAX_TRIES or pause >= clock.remaining:
            raise GivenUp from cause
        asks = ", as it asks" if asked is not None else ""
        self._notify(f"{what}: again in {pause:.0f} s{asks}")
        time.sleep(pause)

    def _try(
        self, request: httpx2.Request, clock: "_Clock", stream: bool, auth: Any, follow: Any
    ) -> httpx2.Response:
        """Send once, in a thread of its own: no timeout of a socket ends what trickles in."""
        answer: Future[httpx2.Response] = Future()

        def work() -> None:
            try:
                response = super(HubClient, self).send(
                    request, stream=True, auth=auth, follow_redirects=follow
                )
                try:
                    response.stream = _Watched(response.stream, clock)
                    if not stream:
                        response.read()
                    clock.require_time()
                except BaseException:
                    response.close()
                    raise
                answer.set_result(response)
            except BaseException as error:  # whoever waits receives it
                answer.set_exception(error)

        # The client library keeps in a context variable what it notes in the headers.
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(work,), name="request", daemon=True).start()
        while not wait([answer], max(clock.remaining, 0.0)).done:
            if clock.remaining <= 0:
                clock.stop()
                raise GivenUp from _timed_out(request)
        return answer.result()

    def _timeouts(self, request: httpx2.Request) -> dict[str, float | None]:
        """Seconds that a socket may take: at most what was asked for, and never for ever.

        Half of the time in silence leaves the other half for another try, but a large commit keeps the Hub
        busy for a while before it answers.
        """
        silence = self._patience if _is_commit(request) else self._patience / 2
        most = {"connect": min(_CONNECT_TIMEOUT, self._patience), "read": silence, "write": silence}
        given = request.extensions.get("timeout", {})
        limits = {name: min(given.get(name) or limit, limit) for name, limit in most.items()}
        return {**limits, "pool": None}

    def _guard(self, request: httpx2.Request) -> None:
        """Refuse an address that no public Hub would name, and tell the token to nobody but the Hub.

        It sees each request, those that a redirect leads to as well.
        """
        url = request.url
        # The exchange of keyless publishing shows GitHub, of any network, a token of GitHub's own.
        exchange = os.environ.get("ACTIONS_ID_TOKEN_REQUEST_URL", "")
        if self.is_hub(url) or (exchange and _origin(url) == _origin(httpx2.URL(exchange))):
            return
        if self._endpoint.scheme == "https" and url.scheme != "https":
            raise ForbiddenAddress(f"it leads to {_shown(url)}, which is not encrypted")
        if self._is_private(url.host) and not self._is_private(self._endpoint.host):
            raise ForbiddenAddress(f"it leads to {_shown(url)}, an address of a private network")
        request.headers.pop("Authorization", None)

    def _is_private(self, host: str) -> bool:
        """Whether a host is in no public network. A name that is not known here is left to a proxy."""
        if host not in self._known_hosts:
            self._known_hosts[host] = any(not address.is_global for address in _addresses(host))
        return self._known_hosts[host]


class _Clock:
    """The time that is left to a request; what it moves gives it more."""

    def __init__(self, patience: float) -> None:
        self._patience, self._moved = patience, 0
        self.counted = 0
        """Bytes of a file that somebody was told of."""
        self._until = time.monotonic() + patience

    @property
    def remaining(self) -> float:
        """Seconds."""
        return self._until - time.monotonic()

    def stop(self) -> None:
        """Let whoever still works for the request find that its time is over."""
        self._until = 0.0

    def require_time(self) -> None:
        if self.remaining <= 0:
            raise GivenUp from httpx2.ReadTimeout("less than a megabyte arrived in time")

    def move(self, n_bytes: int) -> None:
        """Note that bytes were moved.

        Raises:
            GivenUp: there were too few in the time that is over.
        """
        self.require_time()
        self._moved += n_bytes
        if self._moved >= _STEP_BYTES:
            self._moved, self._until = 0, time.monotonic() + self._patience


class _Watched(httpx2.SyncByteStream):
    """A body on its way out or in, which a clock looks at."""

    def __init__(
        self, stream: Any, clock: _Clock, told: Callable[[int], None] | None = None
    ) -> None:
        self._stream, self._clock, self._told = stream, clock, told

    def __iter__(self) -> Iterator[bytes]:
        self._clock.require_time()
        for chunk in self._stream:
            yield chunk
            self._clock.move(len(chunk))  # when it is sent, and before a file is read on
            if self._told is not None:
                self._clock.counted += len(chunk)
                self._told(len(chunk))

    def close(self) -> None:
        self._stream.close()


def _is_commit(request: httpx2.Request) -> bool:
    return request.method == "POST" and _COMMIT.search(request.url.path) is not None


def _origin(url: httpx2.URL) -> Origin:
    return url.scheme, url.host, url.port


def _shown(url: httpx2.URL) -> str:
    """An address without its query, which may hold a signature."""
    return f"{url.scheme}://{url.netloc.decode('ascii', 'replace')}"


def _addresses(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return []
    addresses = [ipaddress.ip_address(str(one).partition("%")[0]) for one in found]
    return [getattr(one, "ipv4_mapped", None) or one for one in addresses]


def asked_pause(headers: httpx2.Headers) -> float | None:
    """Seconds that a busy server asks to wait: Retry-After (RFC 9110), or the Hub's own rate limit."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = headers.get("Retry-After", "").strip()
    if asked.isdecimal():
        return float(asked)
    try:
        return max(parsedate_to_datetime(asked).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return None


def _timed_out(request: httpx2.Request) -> httpx2.ReadTimeout:
    return httpx2.ReadTimeout("no answer in time", request=request)


def _refusal(response: httpx2.Response) -> Exception:
    """What the client library makes of an answer that is an error."""
    try:
        hf_raise_for_status(response)
    except Exception as error:
        return error
    raise AssertionError("a busy status is an error")
