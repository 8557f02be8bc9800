"""Where large files lie: an origin of its own, as with the real Hub, for signed addresses and no tokens."""

import secrets

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Route

from localhub.errors import HubError
from localhub.routing import hub_of, param


class Storage:
    """The addresses that the Hub hands out for its files, on a port beside its own."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._signed: dict[str, str] = {}

    def routes(self) -> list[BaseRoute]:
        """All that is served to those who come with a signed address."""
        return [Route("/blobs/{sha256}", self.download, methods=["GET"])]

    def url(self, request: Request, path: str) -> str:
        """The address of a path here, for whoever made this request of the Hub."""
        return f"{request.url.scheme}://{request.url.hostname}:{self._port}/{path}"

    def sign(self, request: Request, sha256: str, name: str) -> str:
        """An address from which a blob can be read, under the name of its file."""
        signature = secrets.token_urlsafe(16)
        self._signed[signature] = sha256
        return self.url(request, f"blobs/{sha256}?filename={name}&signature={signature}")

    async def download(self, request: Request) -> Response:
        """Serve a blob, or a range of it."""
        sha256 = param(request, "sha256")
        if self._signed.get(request.query_params.get("signature", "")) != sha256:
            raise HubError(403, "Request has expired")
        return FileResponse(hub_of(request).blobs.path(sha256))
