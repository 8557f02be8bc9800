"""Weight files read from the Hub by ranges, in memory only, for a disk that would not hold them.

A file is read in chunks from its beginning to its end, a few ahead of the reader, and hashed on the way.
A chunk that is needed again later is fetched again and has to be the same, and so have rows that are read
out of order, which decide about columns and ties. So all that was read agrees with the Hub's own digest of
the whole file.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from smolquant.checkpoint.download import not_as_listed
from smolquant.errors import HubError
from smolquant.hub import Hub, hub_errors

CHUNK_BYTES = 8 << 20
_AHEAD = 4
"""Chunks that are fetched at a time; one connection seldom uses the whole bandwidth."""
_KEPT = 12
"""Chunks in memory, about 100 MB: those fetched ahead, and those that the workers still read."""


class RemoteFiles:
    """The files of one commit on the Hub, which share one cache of chunks."""

    def __init__(self, hub: Hub, repo: str, revision: str) -> None:
        """Prepare to fetch; nothing is fetched yet.

        Args:
            revision: a commit sha.
        """
        self._hub, self._repo, self._revision = hub, repo, revision
        self._chunks: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._digests: dict[tuple[str, int], bytes] = {}
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_AHEAD, "fetch")

    def open(self, name: str, size: int, sha256: str) -> "RemoteBytes":
        """The bytes of one file.

        Args:
            size: bytes.
            sha256: the digest that the Hub lists, hexadecimal.
        """
        self._sizes[name] = size
        return RemoteBytes(name, size, sha256, self._chunk, self._get)

    def recheck(self) -> None:
        """Fetch the chunks that were read last again, and make sure that they are the same.

        Raises:
            HubError: one is not.
        """
        for name, number in list(self._chunks):
            self._fetch(name, number, self._sizes[name])

    def close(self) -> None:
        """Stop fetching."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._chunks.clear()

    def _chunk(self, name: str, number: int, size: int) -> bytes:
        """A chunk of a file of ``size`` bytes."""
        with self._lock:
            in_order = number == 0 or (name, number - 1) in self._chunks
            last = (size - 1) // CHUNK_BYTES
            for wanted in range(number, min(number + _AHEAD if in_order else number, last) + 1):
                if (name, wanted) not in self._chunks:
                    future = self._pool.submit(self._fetch, name, wanted, size)
                    self._chunks[name, wanted] = future
            self._chunks.move_to_end((name, number))
            chunk = self._chunks[name, number]
            while len(self._chunks) > _KEPT:
                self._chunks.popitem(last=False)
        return chunk.result()

    def _fetch(self, name: str, number: int, size: int) -> bytes:
        start = number * CHUNK_BYTES
        content = self._get(name, start, min(start + CHUNK_BYTES, size))
        digest = hashlib.sha256(content).digest()
        if self._digests.setdefault((name, number), digest) != digest:
            raise not_as_listed(name, "a part of it was different when it was read again")
        return content

    def _get(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file; the client repeats requests that fail."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_backoff,
        )

        api = self._hub.api
        url = hf_hub_url(self._repo, name, revision=self._revision, endpoint=api.endpoint)
        headers = build_hf_headers(token=api.token) | {"Range": f"bytes={start}-{stop - 1}"}
        with hub_errors(self._repo, f"reading {name}"):
            response = http_backoff("GET", url, headers=headers)
            hf_raise_for_status(response)
            if response.status_code != 206 or len(response.content) != stop - start:
                raise HubError(
                    f"A request for bytes {start} to {stop} of {name} in {self._repo} was answered with "
                    f"{len(response.content)} bytes (HTTP {response.status_code}).",
                    hint="Run again with --low-disk never, which fetches whole files. If a proxy stands "
                    "between this machine and the Hub, it has to pass on requests for ranges.",
                )
            return response.content


class _Apart:
    """Bytes that were read out of order, and wait for the file to be hashed past them."""

    def __init__(self, start: int, content: bytes) -> None:
        self.start, self.size = start, len(content)
        self._read = hashlib.sha256(content).digest()
        self._passed, self._position = hashlib.sha256(), start

    @property
    def is_passed(self) -> bool:
        """Whether all of them were hashed."""
        return self._position == self.start + self.size

    @property
    def is_same(self) -> bool:
        """Whether they were hashed as they had been read."""
        return self._passed.digest() == self._read

    def pass_by(self, chunk: bytes, offset: int) -> None:
        """Look at the next piece of the file, which begins at ``offset``."""
        stop = min(self.start + self.size, offset + len(chunk))
        if offset <= self._position < stop:
            self._passed.update(memoryview(chunk)[self._position - offset : stop - offset])
            self._position = stop


class RemoteBytes:
    """One file on the Hub, see :class:`smolquant.checkpoint.reader.FileBytes`."""

    def __init__(
        self,
        name: str,
        size: int,
        sha256: str,
        chunk: Callable[[str, int, int], bytes],
        get: Callable[[str, int, int], bytes],
    ) -> None:
        self.name, self.size = name, size
        self._sha256, self._chunk, self._range = sha256, chunk, get
        self._digest = hashlib.sha256()
        self._hashed = 0
        """The number of chunks, from the beginning, that are hashed."""
        self._apart = list[_Apart]()
        self._hasher = ThreadPoolExecutor(1, "hash source")
        self._closed = False

    def read_into(self, view: memoryview, offset: int, *, sequential: bool = True) -> int:
        """Fill ``view`` from ``offset`` on and return the number of bytes that there were.

        Args:
            sequential: if false, only these bytes are fetched, and compared when they are fetched again
                with the chunk that they lie in.
        """
        if not sequential:
            content = self._range(self.name, offset, min(offset + len(view), self.size))
            self._apart.append(_Apart(offset, content))
            view[: len(content)] = content
            return len(content)
        done = 0
        stop = min(len(view), self.size - offset)
        while done < stop:
            number, skip = divmod(offset + done, CHUNK_BYTES)
            piece = memoryview(self._chunk(self.name, number, self.size))[skip:][: stop - done]
            assert piece, "a chunk is as long as was asked for, and the file as the Hub says"
            view[done : done + len(piece)] = piece
            done += len(piece)
            if number >= self._hashed:
                self._hasher.submit(self._hash_to, number + 1)
        return done

    def verify(self) -> None:
        """Read the chunks that were not needed so far, and compare the digest of the whole file.

        Raises:
            HubError: the digest is not the one that the Hub lists.
        """
        self._hasher.submit(self._hash_to, -(-self.size // CHUNK_BYTES)).result()
        if self._digest.hexdigest() != self._sha256:
            raise not_as_listed(self.name, "its sha256 differs")
        for apart in self._apart:
            if not apart.is_passed:  # it was read when the file had been hashed past it
                again = bytearray(apart.size)
                self.read_into(memoryview(again), apart.start)
                apart.pass_by(bytes(again), apart.start)
            if not apart.is_same:
                raise not_as_listed(self.name, "a part of it was different when it was read again")

    def close(self) -> None:
        """Stop hashing."""
        self._closed = True
        self._hasher.shutdown(wait=True, cancel_futures=True)

    def _hash_to(self, stop: int) -> None:
        """Hash chunks up to ``stop`` in their order; this runs in one thread."""
        while self._hashed < stop and not self._closed:
            chunk = self._chunk(self.name, self._hashed, self.size)
            self._digest.update(chunk)
            for apart in list(self._apart):
                apart.pass_by(chunk, self._hashed * CHUNK_BYTES)
            self._hashed += 1
