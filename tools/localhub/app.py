"""The Hub as an ASGI application."""

from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from localhub import commits, discussions, files, repo_api
from localhub.errors import HubError
from localhub.hub import Hub
from localhub.lfs import Lfs, Transfer
from localhub.wire import RawPath


def make_app(hub: Hub, data: Path, transfer: Transfer) -> Starlette:
    """All routes over one Hub; `data` is where unfinished uploads wait."""
    routes = [
        *repo_api.routes(),
        *files.routes(),
        *commits.routes(),
        *discussions.routes(),
        *Lfs(data, transfer).routes(),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(RawPath)],
        exception_handlers={HubError: _refuse},
    )
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
