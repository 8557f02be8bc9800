"""The hidden folder beside its final place in which a variant is made; a killed run leaves it to the next.

The folder's name contains a digest of all that decides the stored bytes, so that only the same work uses
it again; a checkpoint folder counts as the same until its files are written, replaced or touched. A
journal lists the finished shards, one per line, and each is compared by size and sha256 before it is
trusted. A lock that ends with its process keeps two runs out of one folder.
"""

import fcntl
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from smolquant.checkpoint.files import is_intact
from smolquant.errors import CannotMeasure, CheckpointError, GateError, InputError, Unmeasured
from smolquant.places import naming
from smolquant.record import FileRecord

_LOCK = "lock"
_JOURNAL = "finished.jsonl"

_INVALIDATING = (CheckpointError, InputError, GateError)
"""Failures that the same command would meet again, or that come from a source that changed meanwhile: the
finished shards are of no use."""

_NOT_INVALIDATING = (CannotMeasure, Unmeasured)
"""Subclasses of these failures after which the finished shards may be good, so that a run on another
machine or with another option publishes them."""


@dataclass(frozen=True)
class FinishedShard:
    """A shard that is complete on disk."""

    name: str
    size: int
    sha256: str
    errors: Mapping[str, float]
    """Source tensor -> relative error, for the quantized tensors in the shard."""
    bounded: Mapping[str, float] = field(default_factory=dict)
    """The same of only the rows that a bound holds for, of the tensors that have others too."""

    @property
    def file(self) -> FileRecord:
        """The shard's file as a variant's record lists it."""
        return FileRecord(self.sha256, self.size)


@dataclass
class Journal:
    """The finished shards of one variant, by name; on disk too where ``path`` says so."""

    path: Path | None = None
    shards: dict[str, FinishedShard] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, shard: FinishedShard) -> None:
        """Note a shard, from any thread, once the file is complete."""
        with self._lock:
            self.shards[shard.name] = shard
            if self.path is not None:
                with naming(self.path), self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(shard)) + "\n")


@dataclass(frozen=True)
class WorkFolder:
    """A variant that is being made."""

    root: Path
    folder: Path
    """The folder that becomes the variant's own; at first it contains only finished shards."""
    journal: Journal

    @property
    def finished_bytes(self) -> int:
        """The size of the shards that an earlier run has left."""
        return sum(shard.size for shard in self.journal.shards.values())

    @property
    def keeps_shards(self) -> bool:
        """Whether a finished shard is still here, which another run can go on from."""
        return any((self.folder / name).is_file() for name in self.journal.shards)


@contextmanager
def work_folder(output_dir: Path, variant: str, key: str) -> Iterator[WorkFolder]:
    """A folder to make ``variant`` in, removed on success and after failures that make it useless.

    Args:
        output_dir: an existing folder.
        key: a digest of what decides the stored bytes, in letters and digits.
    """
    root, lock = _claim(output_dir, variant, key)
    try:
        work = WorkFolder(root, root / variant, Journal(root / _JOURNAL))
        _restore(work)
        _remove_abandoned(output_dir, variant, root)
        yield work
    except BaseException as error:
        useless = isinstance(error, _INVALIDATING) and not isinstance(error, _NOT_INVALIDATING)
        if useless or not (root / _JOURNAL).is_file():
            shutil.rmtree(root, ignore_errors=True)
        raise
    else:
        shutil.rmtree(root, ignore_errors=True)
    finally:
        os.close(lock)


def _claim(output_dir: Path, variant: str, key: str) -> tuple[Path, int]:
    """The folder of this work, or a fresh one while another process does the same work; and its lock."""
    root = output_dir / f".{variant}.{key}"
    root.mkdir(exist_ok=True)
    lock = _try_lock(root)
    if lock is None:
        root = Path(tempfile.mkdtemp(prefix=f".{variant}.", dir=output_dir))
        lock = _try_lock(root)
        assert lock is not None, "no one else knows the folder"
    return root, lock


def _try_lock(root: Path) -> int | None:
    """The folder's open lock file; None while another process holds the lock or removes the folder."""
    try:
        lock = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), (root / _LOCK).stat()):
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _restore(work: WorkFolder) -> None:
    """Keep the shards that are what the journal says; remove everything else."""
    noted = _noted(work.root / _JOURNAL)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        intact = list(
            pool.map(lambda shard: is_intact(work.folder / shard.name, shard.file), noted)
        )
    work.folder.mkdir(exist_ok=True)
    (work.root / _JOURNAL).unlink(missing_ok=True)
    for shard, good in zip(noted, intact, strict=True):
        if good:
            work.journal.add(shard)
    for path in work.folder.iterdir():
        if path.name not in work.journal.shards:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _noted(journal: Path) -> Sequence[FinishedShard]:
    if not journal.is_file():
        return []
    shards = {}
    for line in journal.read_text(encoding="utf-8").splitlines():
        try:
            shard = FinishedShard(**json.loads(line))
        except (ValueError, TypeError):
            continue  # the line at which the run was killed
        shards[shard.name] = shard
    return list(shards.values())


def _remove_abandoned(output_dir: Path, variant: str, own: Path) -> None:
    """Remove what killed runs with other options, or on a checkpoint that has changed since, have left."""
    for root in output_dir.glob(f".{variant}.*"):
        if root == own or not (root / _LOCK).is_file():
            continue
        lock = _try_lock(root)
        if lock is not None:
            shutil.rmtree(root, ignore_errors=True)
            os.close(lock)
