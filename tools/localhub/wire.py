"""What is between the socket and the routes: raw paths, the request log, injected failures."""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from localhub.access import Tokens


@dataclass(frozen=True)
class Request:
    """A request as it was answered. `path` is decoded; `user` is the token's, None without one."""

    method: str
    path: str
    query: str
    authorized: bool
    user: str | None
    status: int


_PULL_REQUEST = re.compile(r"/refs/pr/(\d+)")


class RawPath:
    """Routes on the path as sent, where `refs%2Fpr%2F1` is one segment.

    Some clients leave a pull request's slashes bare; those are escaped for them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = _PULL_REQUEST.sub(r"/refs%2Fpr%2F\1", scope["raw_path"].decode("ascii"))
            scope = {**scope, "path": path}
        await self._app(scope, receive, send)


class WithoutToken:
    """Refuses who brings a token along, as S3 does beside a signature."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "authorization" in Headers(scope=scope):
            await _drain(receive)
            refusal = JSONResponse({"error": "Only one auth mechanism allowed"}, 400)
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)


Fault = Callable[[ASGIApp, Scope, Receive, Send], Awaitable[None]]
"""What happens to a request instead of its answer."""


@dataclass
class _Planned:
    fault: Fault
    method: str
    path: re.Pattern[str]
    times: int
    skip: int


class Tap:
    """Logs every request, and fails those that a test wants to fail."""

    def __init__(self, tokens: Tokens) -> None:
        self.requests: list[Request] = []
        self._tokens = tokens
        self._planned: list[_Planned] = []

    def plan(
        self, fault: Fault, method: str, path_regex: str, times: int = 1, *, skip: int = 0
    ) -> None:
        """Let a fault meet `times` requests whose decoded path matches, after `skip`."""
        self._planned.append(_Planned(fault, method, re.compile(path_regex), times, skip))

    def around(self, app: ASGIApp) -> ASGIApp:
        """The application, tapped."""

        async def tapped(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            fault = self._fault_for(scope)
            if fault is None:
                await app(scope, receive, self._logging(scope, send))
            else:
                await fault(app, scope, receive, self._logging(scope, send))

        return tapped

    def _fault_for(self, scope: Scope) -> Fault | None:
        for planned in self._planned:
            if (
                planned.times > 0
                and planned.method == scope["method"]
                and planned.path.search(unquote(scope["path"]))
            ):
                if planned.skip:
                    planned.skip -= 1
                    continue
                planned.times -= 1
                return planned.fault
        return None

    def _logging(self, scope: Scope, send: Send) -> Send:
        async def logging(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.requests.append(self._describe(scope, message["status"]))
            await send(message)

        return logging

    def _describe(self, scope: Scope, status: int) -> Request:
        authorization = Headers(scope=scope).get("authorization")
        token = self._tokens.find(authorization)
        return Request(
            method=scope["method"],
            path=unquote(scope["path"]),
            query=scope["query_string"].decode("ascii"),
            authorized=authorization is not None,
            user=token.user if token else None,
            status=status,
        )


async def _drain(receive: Receive) -> None:
    # An answer before the upload is read would reach the client as a broken connection.
    while (await receive()).get("more_body"):
        pass


def failing(status: int, headers: Mapping[str, str] | None = None) -> Fault:
    """The fault that answers with an error status, and does nothing."""

    async def fail(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        await _drain(receive)
        response = JSONResponse({"error": "Injected failure"}, status, headers)
        await response(scope, receive, send)

    return fail


def altering(change: Callable[[bytes], bytes], status: int | None = None) -> Fault:
    """The fault that does what was asked for, and answers with another body or status."""

    async def alter(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        start: list[Message] = []
        body = bytearray()

        async def keep(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.append(message)
            else:
                body.extend(message.get("body", b""))

        await app(scope, receive, keep)
        headers = MutableHeaders(raw=start[0]["headers"])
        content = change(bytes(body))
        headers["Content-Length"] = str(len(content))
        await send({**start[0], "status": status or start[0]["status"]})
        await send({"type": "http.response.body", "body": content})

    return alter


async def stalling(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """The fault that never answers, as long as the client stays."""
    while (await receive())["type"] != "http.disconnect":
        pass
