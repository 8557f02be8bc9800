"""Writing to a repo: what goes to LFS, the commit itself, and the card check before it."""

import base64
import json
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from localhub import cards
from localhub.blobs import BlobStore
from localhub.errors import HubError
from localhub.hub import is_large
from localhub.repos import Change, Delete, Entry, Put, Repo
from localhub.routing import api_route, hub_of, json_body, page_url, param, repo_of, signed_in


def routes() -> list[BaseRoute]:
    """All of them."""
    return [
        api_route("/preupload/{revision}", preupload, "POST"),
        api_route("/commit/{revision}", commit, "POST"),
        Route("/api/validate-yaml", validate_card, methods=["POST"]),
    ]


async def preupload(request: Request) -> Response:
    """Say of each file whether it goes to LFS, and what the revision has in its place."""
    tree = _target(request).files(param(request, "revision"))
    answers = []
    for file in (await json_body(request))["files"]:
        large = is_large(file["path"], file["size"], base64.b64decode(file["sample"]))
        answer = {
            "path": file["path"],
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
        }
        if (entry := tree.get(file["path"])) is not None:
            answer["oid"] = entry.sha256 if entry.lfs else entry.oid
        answers.append(answer)
    return JSONResponse({"files": answers})


async def commit(request: Request) -> Response:
    """Apply an NDJSON commit to a branch, or open a pull request with it."""
    repo = _target(request)
    hub = hub_of(request)
    header, changes = _parse(await request.body(), hub.blobs)
    # The hook may come back over HTTP, so it must not block the server's event loop.
    await run_in_threadpool(hub.announce_commit, repo)
    said: dict[str, Any] = {
        "author": signed_in(request).user,
        "title": header["summary"],
        "message": header.get("description", ""),
        "revision": param(request, "revision"),
        "parent": header.get("parentCommit"),
    }
    page = page_url(request, repo)
    if not _as_pull_request(request):
        return JSONResponse(_answer(page, repo.commit(changes, **said).sha))
    discussion, made = repo.open_pull_request(changes, **said)
    pull_request = {"pullRequestUrl": f"{page}/discussions/{discussion.num}"}
    return JSONResponse(_answer(page, made.sha) | pull_request)


async def validate_card(request: Request) -> Response:
    """Check a README as the Hub would before it takes it."""
    body = await json_body(request)
    errors, warnings = cards.problems(body["content"])
    answer = {
        "errors": [{"message": message} for message in errors],
        "warnings": [{"message": message} for message in warnings],
    }
    return JSONResponse(answer, 400 if errors else 200)


def _as_pull_request(request: Request) -> bool:
    return request.query_params.get("create_pr") == "1"


def _target(request: Request) -> Repo:
    return repo_of(request, "contribute" if _as_pull_request(request) else "write")


def _answer(page: str, sha: str) -> dict[str, Any]:
    return {"success": True, "commitOid": sha, "commitUrl": f"{page}/commit/{sha}"}


def _parse(body: bytes, blobs: BlobStore) -> tuple[dict[str, Any], list[Change]]:
    """The header and the changes of an NDJSON body; HubError 400 if it is not one."""
    header: dict[str, Any] | None = None
    changes: list[Change] = []
    try:
        for line in filter(None, body.split(b"\n")):
            item = json.loads(line)
            if item["key"] == "header":
                header = item["value"]
            else:
                changes.append(_change(item["key"], item["value"], blobs))
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(400, f"Malformed commit: {error!r}") from error
    if header is None or not header.get("summary"):
        raise HubError(400, "A commit needs a header with a summary")
    return header, changes


def _change(key: str, value: dict[str, Any], blobs: BlobStore) -> Change:
    path = value["path"]
    if key in ("deletedFile", "deletedFolder"):
        return Delete(path, is_folder=key == "deletedFolder")
    if key == "file":
        content = base64.b64decode(value["content"], validate=True)
        return Put(path, Entry.regular(content, blobs.put(content)))
    if key == "lfsFile":
        if value["oid"] not in blobs:
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        # The client knows no size when it copies; the object itself always does.
        return Put(path, Entry.large(value["oid"], blobs.size(value["oid"])))
    raise ValueError(f"unknown key {key!r}")
