"""Discussions and pull requests."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from localhub.errors import HubError
from localhub.repos import Discussion, Repo
from localhub.routing import api_route, iso, json_body, page_url, repo_of, signed_in


def routes() -> list[BaseRoute]:
    """All of them."""
    return [
        api_route("/discussions", list_all, "GET"),
        api_route("/discussions", create, "POST"),
        api_route("/discussions/{num:int}", details, "GET"),
        api_route("/discussions/{num:int}/merge", merge, "POST"),
    ]


async def list_all(request: Request) -> Response:
    """Every discussion, on one page."""
    repo = repo_of(request, "metadata")
    rows = [_describe(repo, discussion) for discussion in repo.discussions.values()]
    return JSONResponse({"discussions": rows, "count": len(rows), "start": 0})


async def create(request: Request) -> Response:
    """Open a discussion, or a pull request without changes yet; readers may, too."""
    repo = repo_of(request, "content")
    body = await json_body(request)
    base = "main" if body.get("pullRequest") else None
    author = signed_in(request).user
    discussion = repo.discuss(body["title"], body.get("description", ""), author, base)
    url = f"{page_url(request, repo)}/discussions/{discussion.num}"
    return JSONResponse({"num": discussion.num, "url": url, "pullRequest": base is not None})


async def details(request: Request) -> Response:
    """One discussion, with what has happened in it."""
    repo = repo_of(request, "metadata")
    discussion = _discussion(request, repo)
    answer = _describe(repo, discussion) | {"events": _events(repo, discussion)}
    if discussion.base is not None:
        changes = {"base": f"refs/heads/{discussion.base}"}
        if discussion.merge_sha is not None:
            changes["mergeCommitId"] = discussion.merge_sha
        pending = discussion.merge_sha is None
        conflicts = repo.conflicts(discussion) if pending else []
        answer |= {"changes": changes, "filesWithConflicts": conflicts}
    return JSONResponse(answer)


async def merge(request: Request) -> Response:
    """Merge a pull request into its branch."""
    repo = repo_of(request, "write")
    repo.merge(_discussion(request, repo), signed_in(request).user)
    return JSONResponse({})


def _discussion(request: Request, repo: Repo) -> Discussion:
    num = request.path_params["num"]
    if num not in repo.discussions:
        raise HubError(404, f"Discussion {num} not found")
    return repo.discussions[num]


def _describe(repo: Repo, discussion: Discussion) -> dict[str, Any]:
    return {
        "num": discussion.num,
        "title": discussion.title,
        "author": {"name": discussion.author},
        "createdAt": iso(discussion.date),
        "status": discussion.status,
        "isPullRequest": discussion.base is not None,
        "repo": {"type": repo.kind, "name": repo.id},
    }


def _events(repo: Repo, discussion: Discussion) -> list[dict[str, Any]]:
    told = {
        "id": f"{discussion.num:024x}",
        "type": "comment",
        "author": {"name": discussion.author},
        "createdAt": iso(discussion.date),
        "data": {"edited": False, "hidden": False, "latest": {"raw": discussion.description}},
    }
    if discussion.base_sha is None:
        return [told]
    made: list[dict[str, Any]] = []
    for commit in repo.history(discussion.ref):
        if commit.sha == discussion.base_sha:
            break
        made.append(
            {
                "id": commit.sha[:24],
                "type": "commit",
                "author": {"name": commit.author},
                "createdAt": iso(commit.date),
                "data": {"subject": commit.title, "oid": commit.sha},
            }
        )
    return [told, *reversed(made)]
