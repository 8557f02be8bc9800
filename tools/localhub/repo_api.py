"""A repo as a whole: creating and deleting it, what it is, its settings, its refs and history."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from localhub import cards
from localhub.errors import HubError
from localhub.hub import Hub
from localhub.repos import Commit, Entry, Kind, Repo
from localhub.routing import (
    KINDS,
    api_route,
    hub_of,
    iso,
    json_body,
    page_url,
    param,
    repo_of,
    signed_in,
)


def routes() -> list[BaseRoute]:
    """All of them."""
    return [
        Route("/api/whoami-v2", whoami, methods=["GET"]),
        Route("/api/repos/create", create, methods=["POST"]),
        Route("/api/repos/delete", delete, methods=["DELETE"]),
        api_route("", info, "GET"),
        api_route("/revision/{revision}", info, "GET"),
        api_route("/auth-check", auth_check, "GET"),
        api_route("/auth-check/write", auth_check_write, "GET"),
        api_route("/settings", settings, "PUT"),
        api_route("/refs", refs, "GET"),
        api_route("/commits/{revision}", commits, "GET"),
        api_route("/branch/{branch}", create_branch, "POST"),
        api_route("/branch/{branch}", delete_branch, "DELETE"),
        api_route("/tag/{revision}", create_tag, "POST"),
        api_route("/tag/{tag}", delete_tag, "DELETE"),
    ]


async def whoami(request: Request) -> Response:
    """The token's user and rights."""
    return JSONResponse(signed_in(request).whoami())


async def create(request: Request) -> Response:
    """Create a repo in a namespace the token may write to."""
    token = signed_in(request)
    body = await json_body(request)
    kind, repo_id = _named(body, token.user)
    if not token.may_write(repo_id):
        namespace = repo_id.partition("/")[0]
        raise HubError(
            403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"'
        )
    private = body.get("visibility") == "private" or bool(body.get("private"))
    hub = hub_of(request)
    try:
        repo = hub.create_repo(repo_id, kind=kind, owner=token.user, private=private)
    except HubError as error:
        if error.status != 409:
            raise
        # With exist_ok the client reads the URL from the refusal.
        answer = {"error": error.message, "url": page_url(request, hub.repo(repo_id, kind))}
        return JSONResponse(answer, 409, {"X-Error-Message": error.message})
    return JSONResponse({"url": page_url(request, repo), "name": repo.id, "id": repo.id})


async def delete(request: Request) -> Response:
    """Delete a repo."""
    token = signed_in(request)
    kind, repo_id = _named(await json_body(request), token.user)
    hub = hub_of(request)
    hub.delete_repo(hub.open_repo(kind, repo_id, token, "write"))
    return JSONResponse({})


async def info(request: Request) -> Response:
    """Describe a revision; `blobs` adds sizes and object ids."""
    repo = repo_of(request, "metadata")
    commit = repo.resolve(param(request, "revision", "main"))
    blobs = request.query_params.get("blobs", "").lower() in ("true", "1")
    card = _card(hub_of(request), commit)
    return JSONResponse(
        {
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.namespace,
            "sha": commit.sha,
            "createdAt": iso(repo.commits[-1].date),
            "lastModified": iso(commit.date),
            "private": repo.private,
            "gated": repo.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags", []),
            "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
            "cardData": card,
            "siblings": [_sibling(*item, blobs) for item in sorted(commit.tree.items())],
        }
    )


async def auth_check(request: Request) -> Response:
    """Whether the caller may read the repo's files."""
    repo_of(request, "content")
    return JSONResponse({})


async def auth_check_write(request: Request) -> Response:
    """Whether the caller may write to the repo."""
    repo_of(request, "write")
    return JSONResponse({})


async def settings(request: Request) -> Response:
    """Change visibility or the gate."""
    repo = repo_of(request, "write")
    body = await json_body(request)
    with repo.lock:
        if "visibility" in body or "private" in body:
            repo.private = body.get("visibility") == "private" or bool(body.get("private"))
        repo.gated = body.get("gated", repo.gated)
    return JSONResponse({"private": repo.private, "gated": repo.gated})


async def refs(request: Request) -> Response:
    """List branches and tags, with `include_prs` the pull requests too."""
    repo = repo_of(request, "metadata")
    answer = {
        "branches": _refs(repo, "refs/heads/"),
        "converts": [],
        "tags": _refs(repo, "refs/tags/"),
    }
    if request.query_params.get("include_prs"):
        answer["pullRequests"] = _refs(repo, "refs/pr/")
    return JSONResponse(answer)


async def commits(request: Request) -> Response:
    """A revision's history, newest first."""
    history = repo_of(request, "metadata").history(param(request, "revision"))
    return JSONResponse(
        [
            {
                "id": commit.sha,
                "title": commit.title,
                "message": commit.message,
                "date": iso(commit.date),
                "authors": [{"user": commit.author}],
            }
            for commit in history
        ]
    )


async def create_branch(request: Request) -> Response:
    """Create a branch at `startingPoint`, by default at main's head."""
    repo = repo_of(request, "write")
    start = (await json_body(request)).get("startingPoint") or "main"
    repo.create_ref(f"refs/heads/{param(request, 'branch')}", start)
    return JSONResponse({})


async def delete_branch(request: Request) -> Response:
    """Delete a branch."""
    repo_of(request, "write").delete_ref(f"refs/heads/{param(request, 'branch')}")
    return JSONResponse({})


async def create_tag(request: Request) -> Response:
    """Tag a revision."""
    repo = repo_of(request, "write")
    tag = (await json_body(request))["tag"]
    repo.create_ref(f"refs/tags/{tag}", param(request, "revision"))
    return JSONResponse({})


async def delete_tag(request: Request) -> Response:
    """Delete a tag."""
    repo_of(request, "write").delete_ref(f"refs/tags/{param(request, 'tag')}")
    return JSONResponse({})


def _named(body: dict[str, Any], user: str) -> tuple[Kind, str]:
    kind = KINDS.get(f"{body.get('type') or 'model'}s")
    if kind is None:
        raise HubError(400, f"Invalid repo type: {body['type']}")
    return kind, f"{body.get('organization') or user}/{body.get('name')}"


def _card(hub: Hub, commit: Commit) -> dict[str, Any]:
    readme = commit.tree.get("README.md")
    if readme is None:
        return {}
    try:
        text = hub.blobs.path(readme.sha256).read_text(encoding="utf-8", errors="replace")
        return cards.front_matter(text) or {}
    except ValueError:  # a broken card does not hide the repo
        return {}


def _sibling(path: str, entry: Entry, blobs: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path}
    if blobs:
        sibling |= {"size": entry.size, "blobId": entry.oid}
        if entry.lfs:
            sibling["lfs"] = {
                "sha256": entry.sha256,
                "size": entry.size,
                "pointerSize": entry.pointer_size,
            }
    return sibling


def _refs(repo: Repo, prefix: str) -> list[dict[str, str]]:
    return [
        {"name": name, "ref": f"{prefix}{name}", "targetCommit": sha}
        for name, sha in repo.refs_under(prefix).items()
    ]
