"""The Hub on a port: a server in a thread, and the handle by which tests steer and inspect it."""

import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Self

import uvicorn

from localhub.access import Token
from localhub.app import make_app
from localhub.hub import Hub
from localhub.lfs import Transfer
from localhub.wire import Request, Tap, altering, failing, stalling


class LocalHub(Hub):
    """A Hub that serves at `url` while its `with` block runs; its state is there to be seen.

    Large files are read from and written to `storage_url`, an origin of its own.

    `port` 0 takes a free one. Uploads above `multipart_threshold` bytes come in parts of
    `part_size` bytes. Repos last as long as this object, blobs as long as `data_dir`.
    """

    def __init__(
        self,
        data_dir: Path,
        tokens: Iterable[Token] = (),
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        multipart_threshold: int = Transfer.threshold,
        part_size: int = Transfer.part_size,
    ) -> None:
        super().__init__(data_dir, tokens)
        self._tap = Tap(self.tokens)
        self._socket, self._storage_socket = (
            socket.create_server((host, wanted)) for wanted in (port, 0)
        )
        storage_port: int = self._storage_socket.getsockname()[1]
        app = make_app(self, data_dir, Transfer(multipart_threshold, part_size), storage_port)
        # A client that keeps its connection open must not hold up the end of a test.
        config = uvicorn.Config(
            self._tap.around(app), log_level="warning", lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run,
            args=([self._socket, self._storage_socket],),
            name="localhub",
            daemon=True,
        )
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://{host}:{self.port}"
        self.storage_url = f"http://{host}:{storage_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the local Hub did not start; its log says why")
            time.sleep(0.01)
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
        self._storage_socket.close()

    @property
    def requests(self) -> list[Request]:
        """Every request answered so far, oldest first."""
        return self._tap.requests

    def fail_next(
        self,
        method: str,
        path_regex: str,
        status: int,
        times: int = 1,
        *,
        skip: int = 0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer `times` requests whose decoded path matches with an error status, after `skip`."""
        self._tap.plan(failing(status, headers), method, path_regex, times, skip=skip)

    def alter_next(
        self,
        method: str,
        path_regex: str,
        change: Callable[[bytes], bytes],
        times: int = 1,
        *,
        skip: int = 0,
        status: int | None = None,
    ) -> None:
        """Do what `times` requests ask for, and answer with a changed body, or another status."""
        self._tap.plan(altering(change, status), method, path_regex, times, skip=skip)

    def stall_next(self, method: str, path_regex: str, times: int = 1, *, skip: int = 0) -> None:
        """Leave `times` requests whose decoded path matches without an answer, after `skip`."""
        self._tap.plan(stalling, method, path_regex, times, skip=skip)
