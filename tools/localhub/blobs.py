"""Content-addressed blobs on disk: named by their sha256, streamed in, never changed."""

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import Self

from localhub.errors import HubError

CHUNK = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BlobStore:
    """A folder of blobs."""

    def __init__(self, root: Path) -> None:
        self._root = root / "blobs"
        self._incoming = root / "incoming"
        self._root.mkdir(parents=True, exist_ok=True)
        self._incoming.mkdir(parents=True, exist_ok=True)

    def __contains__(self, sha256: str) -> bool:
        # The name comes from a client: only a sha256 may become a path.
        return _SHA256.fullmatch(sha256) is not None and self.path(sha256).is_file()

    def path(self, sha256: str) -> Path:
        """Where the blob is, or would be."""
        return self._root / sha256[:2] / sha256

    def size(self, sha256: str) -> int:
        """Size in bytes of a blob that is there."""
        return self.path(sha256).stat().st_size

    def receive(self) -> "Incoming":
        """Begin to write a blob of yet unknown content."""
        return Incoming(self, self._incoming)

    def put(self, source: bytes | Path) -> str:
        """Store bytes or a file's content; returns its sha256."""
        with self.receive() as incoming:
            if isinstance(source, bytes):
                incoming.write(source)
            else:
                incoming.write_file(source)
            return incoming.keep()


class Incoming:
    """A blob on its way in; what is not kept by the end of its `with` block is discarded."""

    def __init__(self, store: BlobStore, folder: Path) -> None:
        self._store = store
        self._hash = hashlib.sha256()
        handle, name = tempfile.mkstemp(dir=folder)
        self._file = os.fdopen(handle, "wb")
        self._path = Path(name)
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def write(self, chunk: bytes) -> None:
        """Append a chunk."""
        self._file.write(chunk)
        self._hash.update(chunk)
        self.size += len(chunk)

    def write_file(self, path: Path) -> None:
        """Append a file's content, chunk by chunk."""
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                self.write(chunk)

    def keep(self, expected: tuple[str, int] | None = None) -> str:
        """Move the blob into the store; returns its sha256.

        Raises HubError (400) where sha256 and size are not the expected ones.
        """
        sha256 = self._hash.hexdigest()
        if expected is not None and expected != (sha256, self.size):
            raise HubError(
                400, f"Expected {expected[1]} bytes of {expected[0]}, got {self.size} of {sha256}"
            )
        self._file.close()
        target = self._store.path(sha256)
        target.parent.mkdir(exist_ok=True)
        self._path.replace(target)
        return sha256
