"""Large files: the LFS batch API with its basic and multipart transfers."""

import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from localhub.blobs import BlobStore
from localhub.errors import HubError
from localhub.routing import hub_of, json_body, param, repo_of, token_of, web_routes
from localhub.storage import Storage


@dataclass(frozen=True)
class Transfer:
    """How uploads are cut: objects larger than `threshold` bytes come in parts of `part_size`."""

    threshold: int = 64 << 20
    part_size: int = 16 << 20


@dataclass(frozen=True)
class _Upload:
    """What may be uploaded with a ticket: parts arrive without a token, as to S3."""

    oid: str
    size: int
    folder: Path

    @property
    def parts(self) -> BlobStore:
        """The parts so far; a part's ETag is its sha256."""
        return BlobStore(self.folder)


class Lfs:
    """The LFS routes, and the uploads under way."""

    def __init__(self, data: Path, transfer: Transfer, storage: Storage) -> None:
        self._parts = data / "parts"
        self._storage = storage
        self._transfer = transfer
        self._uploads: dict[str, _Upload] = {}

    def routes(self) -> list[BaseRoute]:
        """Those of the Hub itself."""
        return [
            *web_routes(".git/info/lfs/objects/batch", self.batch, "POST"),
            Route("/lfs/verify", self.verify, methods=["POST"]),
            Route("/lfs/{ticket}", self.complete, methods=["POST"]),
        ]

    def storage_routes(self) -> list[BaseRoute]:
        """Those of the place where large files lie."""
        return [
            Route("/lfs/{ticket}", self.basic, methods=["PUT"]),
            Route("/lfs/{ticket}/{part:int}", self.part, methods=["PUT"]),
        ]

    async def batch(self, request: Request) -> Response:
        """Say for each object how to upload it, or by no actions that it is already there."""
        repo_of(request, "contribute")  # an object alone changes no repo
        body = await json_body(request)
        if body.get("operation") != "upload":
            raise HubError(422, "Only uploads are negotiated here; downloads go through resolve")
        objects = [self._negotiate(request, o["oid"], o["size"]) for o in body["objects"]]
        return JSONResponse({"transfer": "multipart", "objects": objects})

    async def basic(self, request: Request) -> Response:
        """Receive a whole object."""
        upload = self._upload(request)
        with hub_of(request).blobs.receive() as incoming:
            async for chunk in request.stream():
                incoming.write(chunk)
            incoming.keep((upload.oid, upload.size))
        return Response()

    async def part(self, request: Request) -> Response:
        """Receive one part."""
        with self._upload(request).parts.receive() as incoming:
            async for chunk in request.stream():
                incoming.write(chunk)
            return Response(headers={"ETag": f'"{incoming.keep()}"'})

    async def complete(self, request: Request) -> Response:
        """Join the parts, in the order of their numbers."""
        upload = self._upload(request)
        body = await json_body(request)
        parts = sorted(body["parts"], key=lambda part: int(part["partNumber"]))
        etags = [str(part["etag"]).strip('"') for part in parts]
        await run_in_threadpool(_join, upload, etags, hub_of(request).blobs)
        return JSONResponse({})

    async def verify(self, request: Request) -> Response:
        """Confirm that an object arrived in its full size."""
        token_of(request)
        body = await json_body(request)
        blobs = hub_of(request).blobs
        if body["oid"] not in blobs or blobs.size(body["oid"]) != body["size"]:
            raise HubError(404, f"Object {body['oid']} was not uploaded")
        return JSONResponse({})

    def _negotiate(self, request: Request, oid: str, size: int) -> dict[str, Any]:
        if oid in hub_of(request).blobs:
            return {"oid": oid, "size": size}
        ticket = secrets.token_urlsafe(16)
        self._uploads[ticket] = _Upload(oid, size, self._parts / ticket)
        href = stored = self._storage.url(request, f"lfs/{ticket}")
        header: dict[str, str] = {}
        if size > self._transfer.threshold:
            part_size = self._transfer.part_size
            header["chunk_size"] = str(part_size)
            for number in range(1, -(-size // part_size) + 1):
                header[f"{number:05}"] = f"{stored}/{number}"
            href = f"{request.base_url}lfs/{ticket}"  # where the parts are told to be complete
        actions = {
            "upload": {"href": href, "header": header},
            "verify": {"href": f"{request.base_url}lfs/verify"},
        }
        return {"oid": oid, "size": size, "authenticated": True, "actions": actions}

    def _upload(self, request: Request) -> _Upload:
        try:
            return self._uploads[param(request, "ticket")]
        except KeyError:
            raise HubError(403, "No such upload, or its URL has expired") from None


def _join(upload: _Upload, etags: list[str], blobs: BlobStore) -> None:
    with blobs.receive() as incoming:
        for etag in etags:
            if etag not in upload.parts:
                raise HubError(400, f"No part with ETag {etag} was uploaded")
            incoming.write_file(upload.parts.path(etag))
        incoming.keep((upload.oid, upload.size))
    shutil.rmtree(upload.folder)
