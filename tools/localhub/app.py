"""The Hub as an ASGI application: itself on one port, and on another the place where large files lie."""

from collections.abc import Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from localhub import commits, discussions, files, login, repo_api
from localhub.errors import HubError
from localhub.hub import Hub
from localhub.lfs import Lfs, Transfer
from localhub.storage import Storage
from localhub.wire import RawPath, WithoutToken


def make_app(hub: Hub, data: Path, transfer: Transfer, storage_port: int) -> ASGIApp:
    """All routes over one Hub; `data` is where unfinished uploads wait."""
    storage = Storage(storage_port)
    lfs = Lfs(data, transfer, storage)
    routes = [
        *login.routes(),
        *repo_api.routes(),
        *files.routes(storage),
        *commits.routes(),
        *discussions.routes(),
        *lfs.routes(),
    ]
    itself = _app(hub, routes, Middleware(RawPath))
    large_files = _app(hub, [*storage.routes(), *lfs.storage_routes()], Middleware(WithoutToken))

    async def by_port(scope: Scope, receive: Receive, send: Send) -> None:
        app = large_files if scope["server"][1] == storage_port else itself
        await app(scope, receive, send)

    return by_port


def _app(hub: Hub, routes: Sequence[BaseRoute], middleware: Middleware) -> Starlette:
    app = Starlette(routes=routes, middleware=[middleware], exception_handlers={HubError: _refuse})
    app.state.hub = hub
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HubError)
    # The message may quote what the client sent; a header holds one line of latin-1.
    line = " ".join(error.message.split()).encode("latin-1", "replace").decode("latin-1")
    headers = error.headers | {"X-Error-Message": line}
    if error.code is not None:
        headers["X-Error-Code"] = error.code
    return JSONResponse({"error": error.message}, error.status, headers)
