"""The memory that this process may still take on this machine, and the most that it has taken."""

import ctypes
import errno
import gc
import mmap
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from smolquant import cgroups

_UNMAPPED = ("failed to map segment", "cannot allocate memory", "Cannot allocate memory")
_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's malloc.h."""
_MADV_PAGEOUT = 21
"""Of Linux's mman.h, since 5.4; Python's ``mmap`` does not name it."""


def available_bytes(root: Path = cgroups.ROOT, own_groups: Path = cgroups.OWN) -> int:
    """Bytes that can be taken without swapping or being killed.

    Sources: ``MemAvailable`` of proc(5), and the limits of the process's control groups, version 2
    or 1 (kernel documentation, admin-guide/cgroup-v2 and cgroup-v1/memory). Page cache that a group
    could give back counts as available, as it does in ``MemAvailable``.
    """
    groups = cgroups.folders("memory", root, own_groups)
    return min([_kilobytes(_MEMINFO, "MemAvailable:") * 1024, *map(_left, groups)])


def peak_bytes() -> int:
    """The most memory that this process has had resident.

    Not ``ru_maxrss``, which a process inherits from the one that started it.
    """
    return _kilobytes(_STATUS, "VmHWM:") * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is the way in which Python, or torch on a CPU or a GPU, runs out of memory."""
    # By name, because this module does not import torch, whose CPU allocator has no error type of its own.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        # The dynamic linker's words; a limit on the address space is met while libraries are loaded.
        or (isinstance(error, ImportError) and any(words in str(error) for words in _UNMAPPED))
    )


def keep_freed_blocks() -> None:
    """From now on, reuse the memory of freed blocks of up to 32 MB instead of asking for new.

    For work in many blocks of a few sizes, which would otherwise have the system clear most of them.
    """
    _set_malloc({_M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 1 << 30})


def return_freed_blocks() -> None:
    """From now on, have blocks of a megabyte and more leave the process as soon as they are freed.

    glibc raises its threshold for that to the largest block freed so far, up to 32 MB, and keeps those
    below it for reuse: after a few layers of differently sized tensors, the pieces add up to another
    layer or two. A threshold that was set stays.
    """
    _set_malloc({_M_MMAP_THRESHOLD: 1 << 20, _M_TRIM_THRESHOLD: 1 << 20})


@contextmanager
def freed_blocks_kept() -> Iterator[None]:
    """Keep freed blocks until this is left; then none is kept, and large ones leave the process again."""
    keep_freed_blocks()
    try:
        yield
    finally:
        return_freed_blocks()
        _trim()


def give_back_garbage() -> None:
    """Collect what is no longer in use, cycles too, and return its memory to the system.

    The command looks for garbage seldom, and glibc keeps freed blocks.
    """
    gc.collect()
    _trim()


def page_out(address: int, size: int) -> None:
    """Let memory that was read once, and is not wanted soon, leave the process; nothing is lost.

    Pages of a mapped file are read again where they are touched (madvise(2), ``MADV_PAGEOUT``). Where a
    system has no such call, the memory stays.

    Args:
        address, size: in bytes. What shares its pages with others stays.
    """
    if sys.platform != "linux":
        return
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_PAGEOUT)


def _trim() -> None:
    """malloc_trim(3) of glibc; other C libraries have no such call."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def _set_malloc(parameters: Mapping[int, int]) -> None:
    """mallopt(3) of glibc; other C libraries have no such call."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for parameter, value in parameters.items():
            mallopt(parameter, value)


def _kilobytes(file: Path, field: str) -> int:
    """A field of a proc(5) file that counts in units of 1024 bytes."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def _left(folder: Path) -> int:
    """What the group at ``folder`` may still take; more than any machine has where it has no limit."""
    unlimited = 1 << 62
    for limit_file, usage_file, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            limit = (folder / limit_file).read_text(encoding="ascii").strip()
            used = int((folder / usage_file).read_text(encoding="ascii"))
            stat = (folder / "memory.stat").read_text(encoding="ascii")
        except OSError:
            continue
        if limit == "max":
            return unlimited
        counts = {name: int(count) for name, count in map(str.split, stat.splitlines())}
        cache = sum(counts.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
        return int(limit) - used + cache
    return unlimited
