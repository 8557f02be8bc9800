"""Where a variant is made: a hidden folder beside its place, which a killed run leaves to the next.

Its name is a digest of all that decides the stored bytes, so only the same work finds it again; a
checkpoint folder counts as the same until its files are written, replaced or touched. What is finished
in it is noted in a journal, a line a shard, and compared by size and sha256 before it is trusted. A lock
that dies with its process keeps two runs out of one folder.
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
from smolquant.record import FileRecord

_LOCK = "lock"
_JOURNAL = "finished.jsonl"

_HOPELESS = (CheckpointError, InputError, GateError)
"""Failures that the same command would meet again, or that come of a source that changed meanwhile: what
was made is of no use."""

_INNOCENT = (CannotMeasure, Unmeasured)
"""Of these: what was made may be good, and another machine or another option publishes it."""


@dataclass(frozen=True)
class FinishedShard:
    """A shard that is complete on disk."""

    name: str
    size: int
    sha256: str
    errors: Mapping[str, float]
    """Source tensor -> relative error, for the quantized tensors in the shard."""

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
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(shard)) + "\n")


@dataclass(frozen=True)
class WorkFolder:
    """A variant in the making."""

    root: Path
    folder: Path
    """Becomes the variant's own folder; holds nothing but finished shards at first."""
    journal: Journal

    @property
    def finished_bytes(self) -> int:
        """Of the shards that an earlier run has left."""
        return sum(shard.size for shard in self.journal.shards.values())


@contextmanager
def work_folder(output_dir: Path, variant: str, key: str) -> Iterator[WorkFolder]:
    """A folder to make ``variant`` in, gone on success and where going on from it is of no use.

    Args:
        output_dir: exists.
        key: of what decides the stored bytes; letters and digits.
    """
    root, lock = _claim(output_dir, variant, key)
    try:
        work = WorkFolder(root, root / variant, Journal(root / _JOURNAL))
        _restore(work)
        _remove_abandoned(output_dir, variant, root)
        yield work
    except BaseException as error:
        hopeless = isinstance(error, _HOPELESS) and not isinstance(error, _INNOCENT)
        if hopeless or not (root / _JOURNAL).is_file():
            shutil.rmtree(root, ignore_errors=True)
        raise
    else:
        shutil.rmtree(root, ignore_errors=True)
    finally:
        os.close(lock)


def _claim(output_dir: Path, variant: str, key: str) -> tuple[Path, int]:
    """The work's own folder; or a fresh one, while another process is at the same work."""
    root = output_dir / f".{variant}.{key}"
    root.mkdir(exist_ok=True)
    lock = _try_lock(root)
    if lock is None:
        root = Path(tempfile.mkdtemp(prefix=f".{variant}.", dir=output_dir))
        lock = _try_lock(root)
        assert lock is not None, "no one else knows the folder"
    return root, lock


def _try_lock(root: Path) -> int | None:
    """Its open lock file; None while another process has it, or where it has just removed it."""
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
    """What killed runs with other options, or of a checkpoint that is another by now, have left."""
    for root in output_dir.glob(f".{variant}.*"):
        if root == own or not (root / _LOCK).is_file():
            continue
        lock = _try_lock(root)
        if lock is not None:
            shutil.rmtree(root, ignore_errors=True)
            os.close(lock)
