"""What is between the socket and the routes: raw paths, the request log, injected failures."""

import re
from dataclasses import dataclass
from urllib.parse import unquote

from starlette.datastructures import Headers
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


@dataclass
class _Failure:
    method: str
    path: re.Pattern[str]
    status: int
    times: int
    skip: int


class Tap:
    """Logs every request, and fails those that a test wants to fail."""

    def __init__(self, tokens: Tokens) -> None:
        self.requests: list[Request] = []
        self._tokens = tokens
        self._failures: list[_Failure] = []

    def fail_next(
        self, method: str, path_regex: str, status: int, times: int = 1, *, skip: int = 0
    ) -> None:
        """Answer `times` requests whose decoded path matches with an error status, after `skip`."""
        self._failures.append(_Failure(method, re.compile(path_regex), status, times, skip))

    def around(self, app: ASGIApp) -> ASGIApp:
        """The application, tapped."""

        async def tapped(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            failure = self._failure_for(scope)
            if failure is None:
                await app(scope, receive, self._logging(scope, send))
                return
            await _drain(receive)
            response = JSONResponse({"error": "Injected failure"}, failure.status)
            await response(scope, receive, self._logging(scope, send))

        return tapped

    def _failure_for(self, scope: Scope) -> _Failure | None:
        for failure in self._failures:
            if (
                failure.times > 0
                and failure.method == scope["method"]
                and failure.path.search(unquote(scope["path"]))
            ):
                if failure.skip:
                    failure.skip -= 1
                    continue
                failure.times -= 1
                return failure
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
