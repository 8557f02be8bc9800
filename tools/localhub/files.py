"""Reading a revision: its files, and what its tree holds."""

import hashlib
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute

from localhub.errors import entry_not_found
from localhub.repos import Entry, Tree
from localhub.routing import api_route, hub_of, json_body, param, repo_of, web_routes
from localhub.storage import Storage


def routes(storage: Storage) -> list[BaseRoute]:
    """All of them; large files are served by `storage`."""

    async def resolve(request: Request) -> Response:
        return await _resolve(request, storage)

    return [
        *web_routes("/resolve/{revision}/{path:path}", resolve, "GET"),
        api_route("/tree/{revision}", tree, "GET"),
        api_route("/tree/{revision}/{path:path}", tree, "GET"),
        api_route("/paths-info/{revision}", paths_info, "POST"),
    ]


async def _resolve(request: Request, storage: Storage) -> Response:
    """Serve a file or a range of it, or tell where it lies; HEAD tells its commit, ETag and size."""
    repo = repo_of(request, "content")
    commit = repo.resolve(param(request, "revision"))
    path = param(request, "path")
    entry = commit.tree.get(path)
    if entry is None:
        raise entry_not_found(path, commit.sha)
    headers = {"X-Repo-Commit": commit.sha}
    name = path.rsplit("/", 1)[-1]
    if entry.lfs:
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        return RedirectResponse(storage.sign(request, entry.sha256, name), 302, headers)
    headers["ETag"] = f'"{entry.oid}"'
    blob = hub_of(request).blobs.path(entry.sha256)
    return FileResponse(blob, headers=headers, filename=name, content_disposition_type="inline")


async def tree(request: Request) -> Response:
    """List a folder, with `recursive` all below it."""
    commit = repo_of(request, "metadata").resolve(param(request, "revision"))
    folder = param(request, "path").strip("/")
    prefix = f"{folder}/" if folder else ""
    rows = [row for path, row in _rows(commit.tree).items() if path.startswith(prefix)]
    if folder and not rows:
        raise entry_not_found(folder, commit.sha)
    if request.query_params.get("recursive", "").lower() not in ("true", "1"):
        rows = [row for row in rows if "/" not in row["path"].removeprefix(prefix)]
    return JSONResponse(rows)


async def paths_info(request: Request) -> Response:
    """Describe the paths asked for that exist; the official client sends a form, others JSON."""
    commit = repo_of(request, "metadata").resolve(param(request, "revision"))
    if request.headers.get("content-type", "").startswith("application/json"):
        paths = (await json_body(request)).get("paths", [])
    else:
        paths = parse_qs((await request.body()).decode()).get("paths", [])
    rows = _rows(commit.tree)
    return JSONResponse([rows[path.strip("/")] for path in paths if path.strip("/") in rows])


def _rows(tree: Tree) -> dict[str, dict[str, Any]]:
    """Every file and folder by its path, sorted."""
    folders = {str(folder) for path in tree for folder in PurePosixPath(path).parents[:-1]}
    rows = {path: _file_row(path, entry) for path, entry in tree.items()}
    rows |= {folder: _folder_row(folder, tree) for folder in folders}
    return dict(sorted(rows.items()))


def _file_row(path: str, entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "path": path, "oid": entry.oid, "size": entry.size}
    if entry.lfs:
        lfs = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
        row["lfs"] = lfs
    return row


def _folder_row(folder: str, tree: Tree) -> dict[str, Any]:
    below = [(path, tree[path].oid) for path in sorted(tree) if path.startswith(f"{folder}/")]
    oid = hashlib.sha1(repr(below).encode()).hexdigest()
    return {"type": "directory", "path": folder, "oid": oid, "size": 0}
