"""What every route needs: the Hub, the caller's token, the repo that a URL names."""

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any, cast
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from localhub.access import Token
from localhub.errors import HubError
from localhub.hub import Hub, Need
from localhub.repos import Kind, Repo

Endpoint = Callable[[Request], Awaitable[Response]]

KINDS: dict[str, Kind] = {"models": "model", "datasets": "dataset", "spaces": "space"}


def api_route(suffix: str, endpoint: Endpoint, *methods: str) -> Route:
    """A route of the API below a repo."""
    return Route(f"/api/{{kind}}/{{namespace}}/{{name}}{suffix}", endpoint, methods=methods)


def web_routes(suffix: str, endpoint: Endpoint, *methods: str) -> Sequence[Route]:
    """Routes below a repo's own page: a model's has no prefix, the other kinds' have."""
    return [
        Route(f"{prefix}/{{namespace}}/{{name}}{suffix}", endpoint, methods=methods)
        for prefix in ("/{kind}", "")
    ]


def hub_of(request: Request) -> Hub:
    """The Hub that serves this request."""
    return cast(Hub, request.app.state.hub)


def token_of(request: Request) -> Token | None:
    """The caller's token, None for an anonymous one; HubError 401 for a bad token."""
    return hub_of(request).tokens.identify(request.headers.get("authorization"))


def signed_in(request: Request) -> Token:
    """The caller's token; HubError 401 without a good one."""
    token = token_of(request)
    if token is None:
        raise HubError(401, "Invalid username or password.")
    return token


def repo_of(request: Request, need: Need) -> Repo:
    """The repo that the URL names, for what the caller needs of it."""
    kind = KINDS.get(request.path_params.get("kind", "models"))
    if kind is None:
        raise HubError(404, "Sorry, we can't find the page you are looking for.")
    repo_id = f"{request.path_params['namespace']}/{request.path_params['name']}"
    return hub_of(request).open_repo(kind, repo_id, token_of(request), need)


def param(request: Request, name: str, default: str = "") -> str:
    """A path parameter, decoded; routes match on the path as sent."""
    return unquote(request.path_params.get(name, default))


def page_url(request: Request, repo: Repo) -> str:
    """Where the repo's page would be."""
    prefix = "" if repo.kind == "model" else f"{repo.kind}s/"
    return f"{request.base_url}{prefix}{repo.id}"


def iso(date: datetime) -> str:
    """A time in UTC as the API writes it."""
    return date.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


async def json_body(request: Request) -> dict[str, Any]:
    """The body's JSON object, empty for no body; HubError 400 for anything else."""
    try:
        body = await request.json() if await request.body() else {}
    except ValueError as error:
        raise HubError(400, f"The body is not JSON: {error}") from error
    if body is None:  # what the official client sends for no comment
        return {}
    if not isinstance(body, dict):
        raise HubError(400, "The body is not a JSON object")
    return body
