"""A large file that is written, and read back once, past the page cache.

Caching costs more than the disk does: a page is allocated, cleared, filled and written back, and pushes out
one of the source's, which will be read again. So whole pages go straight from memory to the disk, and
only the edges between writes are cached. Where a file system cannot do that (tmpfs, some network ones),
everything is.
"""

import errno
import hashlib
import mmap
import os
import threading
from pathlib import Path

from smolquant.places import naming

_PAGE = 4096
"""Bytes; memory, offsets and lengths of direct transfers are multiples of it (open(2), O_DIRECT)."""

_BUFFER_BYTES = 1 << 20


class DiskFile:
    """A file of known size; :meth:`write` may be called from any thread, each byte once."""

    def __init__(self, path: Path, size: int) -> None:
        """Create the file and reserve its space.

        Args:
            size: bytes.

        Raises:
            OSError: ENOSPC when the disk is too small.
        """
        self.size = size
        self._path = path
        self._cached = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._open_files = [self._cached]
        try:
            with naming(path):
                os.posix_fallocate(self._cached, 0, size)
            self._direct = _open_direct(path) if size >= _PAGE else None
            self._open_files += [] if self._direct is None else [self._direct]
        except OSError:
            self.close()
            raise

    def write(self, data: memoryview, offset: int) -> None:
        """Write ``data`` at ``offset``, both in bytes.

        Raises:
            OSError: with the file's name.
        """
        with naming(self._path):
            self._write(data, offset)

    def _write(self, data: memoryview, offset: int) -> None:
        first = min(-offset % _PAGE, len(data))
        whole = (len(data) - first) // _PAGE * _PAGE if self._direct is not None else 0
        for start in range(first, first + whole, _BUFFER_BYTES):
            self._write_pages(
                data[start : min(start + _BUFFER_BYTES, first + whole)], offset + start
            )
        _write_all(self._cached, data[:first], offset)
        _write_all(self._cached, data[first + whole :], offset + first + whole)

    def sha256(self) -> str:
        """The sha256 of the whole file, hexadecimal.

        The file is not flushed to the disk first, as little as any copy of a checkpoint is: waiting for
        the edges would cost more than the rest of the work, and a run that goes on after a crash of the
        machine compares this digest.
        """
        digest = hashlib.sha256()
        file = self._cached if self._direct is None else self._direct
        buffer = _buffer()
        position = 0
        while position < self.size:
            count = os.preadv(file, [buffer], position)
            if not count:
                ends = f"The file ends at {position} bytes instead of {self.size}"
                raise OSError(errno.EIO, ends, str(self._path))
            digest.update(memoryview(buffer)[:count])
            position += count
        return digest.hexdigest()

    def close(self) -> None:
        """Close the file, if it is open; what is in it stays."""
        open_files, self._open_files = self._open_files, []
        for file in open_files:
            os.close(file)

    def _write_pages(self, pages: memoryview, offset: int) -> None:
        assert self._direct is not None
        buffer = memoryview(_buffer())[: len(pages)]
        buffer[:] = pages
        _write_all(self._direct, buffer, offset)


_buffers = threading.local()


def _buffer() -> mmap.mmap:
    """This thread's page-aligned memory."""
    if not hasattr(_buffers, "memory"):
        _buffers.memory = mmap.mmap(-1, _BUFFER_BYTES)
    memory: mmap.mmap = _buffers.memory
    return memory


def _open_direct(path: Path) -> int | None:
    """``path``, a file with a page of zeros or more, open for direct transfers where they work."""
    try:
        file = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        return None
    try:
        # With larger blocks, writing back a cached edge would rewrite what lies beside it.
        if os.fstatvfs(file).f_frsize <= _PAGE:
            with mmap.mmap(-1, _PAGE) as zeros:
                os.pwrite(file, zeros, 0)  # some file systems refuse only now
            return file
    except OSError:
        pass
    os.close(file)
    return None


def _write_all(file: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], offset + done)
