"""What of a mapped file is in memory."""

import os
from pathlib import Path


def resident_bytes_of(file: Path) -> int:
    """Bytes of this process's mappings of a file that are in memory (proc(5), smaps)."""
    ours, resident = False, 0
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if not line.split()[0].endswith(":"):
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            resident += int(line.split()[1]) * 1024
    return resident


def leave_cache(file: Path) -> None:
    """Have a file that was just written on the disk alone, as one that was downloaded some time ago."""
    with file.open("rb") as opened:
        os.fsync(opened)
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
