"""Weight files read from the Hub by ranges, in memory only, for a disk that would not hold them.

A file is read in chunks from its beginning to its end, a few ahead of whoever needs them, and hashed on
the way; so what was read is known to be what the Hub has. A chunk that is needed again later is fetched
again.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

from smolquant.errors import CheckpointError
from smolquant.hub import Hub, hub_errors

CHUNK_BYTES = 8 << 20
_AHEAD = 4
"""Chunks fetched at a time; one connection seldom fills a line."""
_KEPT = 12
"""Chunks in memory, about 100 MB: those ahead, and those that the workers still read from."""


class RemoteFiles:
    """The files of one commit on the Hub, sharing one memory."""

    def __init__(self, hub: Hub, repo: str, revision: str) -> None:
        """Nothing is fetched yet.

        Args:
            revision: a commit sha.
        """
        self._hub, self._repo, self._revision = hub, repo, revision
        self._chunks: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_AHEAD, "fetch")
        self._handles = threading.local()

    def open(self, name: str, size: int, sha256: str) -> "RemoteBytes":
        """The bytes of one file.

        Args:
            size: bytes.
            sha256: hexadecimal, as the Hub tells it.
        """
        return RemoteBytes(name, size, sha256, self._chunk)

    def close(self) -> None:
        """Fetch no more."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._chunks.clear()

    def _chunk(self, name: str, number: int, size: int) -> bytes:
        """A chunk of a file of ``size`` bytes."""
        with self._lock:
            in_order = number == 0 or (name, number - 1) in self._chunks
            last = (size - 1) // CHUNK_BYTES
            for wanted in range(number, min(number + _AHEAD if in_order else number, last) + 1):
                if (name, wanted) not in self._chunks:
                    self._chunks[name, wanted] = self._pool.submit(self._fetch, name, wanted)
            self._chunks.move_to_end((name, number))
            found = self._chunks[name, number]
            while len(self._chunks) > _KEPT:
                self._chunks.popitem(last=False)
        return found.result()

    def _fetch(self, name: str, number: int) -> bytes:
        with hub_errors(self._repo, f"reading {name}"):
            file = self._handle(name)
            file.seek(number * CHUNK_BYTES)
            return file.read(CHUNK_BYTES)

    def _handle(self, name: str) -> BinaryIO:
        """This thread's own, as a handle has one position."""
        handles: dict[str, BinaryIO] = self._handles.__dict__
        if name not in handles:
            from huggingface_hub import HfFileSystem

            api = self._hub.api
            files = HfFileSystem(endpoint=api.endpoint, token=api.token)
            handles[name] = files.open(
                f"{self._repo}/{name}",
                "rb",
                revision=self._revision,
                block_size=CHUNK_BYTES,
                cache_type="none",
            )
        return handles[name]


class RemoteBytes:
    """One file on the Hub, see :class:`smolquant.checkpoint.reader.FileBytes`."""

    def __init__(
        self, name: str, size: int, sha256: str, chunk: Callable[[str, int, int], bytes]
    ) -> None:
        self.name, self.size = name, size
        self._sha256, self._chunk = sha256, chunk
        self._digest = hashlib.sha256()
        self._hashed = 0
        """Chunks, from the beginning."""
        self._hasher = ThreadPoolExecutor(1, "hash source")

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` from ``offset`` on; fewer bytes at the end of the file."""
        done = 0
        stop = min(len(view), self.size - offset)
        while done < stop:
            number, skip = divmod(offset + done, CHUNK_BYTES)
            piece = memoryview(self._chunk(self.name, number, self.size))[skip:][: stop - done]
            view[done : done + len(piece)] = piece
            done += len(piece)
            if number >= self._hashed:
                self._hasher.submit(self._hash_to, number + 1)
        return done

    def verify(self) -> None:
        """Read whatever nobody needed, and compare the whole.

        Raises:
            CheckpointError: what arrived is not what the Hub's own digest says.
        """
        self._hasher.submit(self._hash_to, -(-self.size // CHUNK_BYTES)).result()
        if self._digest.hexdigest() != self._sha256:
            raise CheckpointError(
                f"{self.name} did not arrive as the Hub has it: its sha256 differs.",
                hint="Run again; where a proxy stands between here and the Hub, look there.",
            )

    def close(self) -> None:
        """Hash no more."""
        self._hasher.shutdown(wait=True, cancel_futures=True)

    def _hash_to(self, stop: int) -> None:
        """In order, so that the digest is that of the file; runs in one thread."""
        while self._hashed < stop:
            self._digest.update(self._chunk(self.name, self._hashed, self.size))
            self._hashed += 1
