"""A checkpoint folder on this machine as a source.

A folder's identity takes reading all of it, which goes on beside the work; until the identity is asked
for, the folder's state distinguishes it from other sources.
"""

import hashlib
import json
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from smolquant.checkpoint.extras import find_extras
from smolquant.checkpoint.files import file_names, sha256_of
from smolquant.checkpoint.links import (
    linked_weights,
    refuse_links_out,
    refuse_what_is_no_file,
)
from smolquant.checkpoint.source import Download, Source, find_shards, layout_of
from smolquant.errors import CheckpointError

if TYPE_CHECKING:
    from smolquant.checkpoint.tensors import Layout


class FileState(NamedTuple):
    """The properties of a file that a write, a replacement or a touch changes, known without reading it."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int
    """The time of the inode's last change; unlike the time of the last write it cannot be set back."""

    @classmethod
    def of(cls, path: Path) -> Self:
        """The state of ``path`` now.

        Raises:
            OSError: it is gone, or out of reach.
        """
        stat = path.stat()
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@dataclass(frozen=True)
class LocalFile:
    """A file of the source on this machine, which is being hashed beside other work."""

    path: Path
    initial_state: FileState
    """The state before a byte of the file was read."""
    digest: Future[str]

    @property
    def size(self) -> int:
        return self.initial_state.size

    @property
    def sha256(self) -> str:
        """The digest, hexadecimal; the caller waits until it is known."""
        return self.digest.result()

    @property
    def has_changed(self) -> bool:
        """Whether the file is no longer as it was at first, or no longer there."""
        try:
            return FileState.of(self.path) != self.initial_state
        except OSError:
            return True


_FILE_PATTERNS = ("*", "additional_chat_templates/*")


class FolderSource(Source):
    """A checkpoint folder; it is only read."""

    def __init__(self, folder: Path, *, with_code: bool = False) -> None:
        """Look at ``folder``, and begin to hash its files.

        Args:
            with_code: whether the model's own Python files belong to it (--trust-remote-code).

        Raises:
            CheckpointError: there are no weights, the index names a missing shard, a link leads out of the
                folder, or a device stands for a file.
        """
        self._folder = folder
        refuse_what_is_no_file(folder)
        states = {name: FileState.of(folder / name) for name in file_names(folder, *_FILE_PATTERNS)}
        self._sort_files(states, str(folder), with_code=with_code, below=_checkpoints_below(folder))
        if self._layout.endswith(".json"):
            refuse_links_out(folder, [self._layout])
        self._shards = find_shards(folder, self._layout)
        for shard in self._shards:
            if shard not in states:
                raise CheckpointError(
                    f"{self._layout} names {shard}, which is not there.",
                    hint="Fetch or save the missing shard.",
                )
        self.linked_weights = linked_weights(folder, self._shards)
        """Weight files that are links to another place, such as a larger disk."""
        names = sorted({*self._auxiliary_files, *self.weights})
        refuse_links_out(folder, set(names).difference(self._shards))
        self.files: Mapping[str, LocalFile] = {
            name: LocalFile(folder / name, states[name], Future()) for name in names
        }
        """Config, tokenizer and weights, which the identity covers, by name."""
        self.extras = find_extras(folder, self.files)
        """What lies beside them, and whether it travels."""
        self._processor_configs = self.extras.processor_configs
        self.license_files, self.readme = self.extras.licenses, self.extras.readme
        hash_in_background(self.files.values())

    @property
    def folder(self) -> Path:
        return self._folder

    @cached_property
    def digests(self) -> Mapping[str, str]:
        return {name: file.sha256 for name, file in self.files.items()}

    @property
    def state(self) -> str:
        states = json.dumps({name: file.initial_state for name, file in self.files.items()})
        return hashlib.sha256(states.encode()).hexdigest()

    def require_unchanged(self) -> None:
        wait([file.digest for file in self.files.values()])  # hashing reads, too
        changed = [name for name, file in self.files.items() if file.has_changed]
        if changed:
            raise CheckpointError(
                f"{', '.join(changed[:3])} changed while the checkpoint was being read, so the "
                "output may mix its old and its new content.",
                hint="Run again when nothing writes to the checkpoint.",
            )

    def to_fetch(self) -> Download:
        return Download(0, self._folder)

    def fetch_weights(self) -> list[Path]:
        return [self._folder / shard for shard in self._shards]

    def layout(self) -> "Layout":
        return layout_of(self.fetch_weights())


def _checkpoints_below(folder: Path) -> list[str]:
    """The folders of a training run that hold a model each, the last step's first."""
    found = [path.parent for path in folder.glob("*/config.json")]
    step = re.compile(r"\d+$")

    def age(place: Path) -> tuple[int, str]:
        number = step.search(place.name)
        return -int(number[0]) if number else 0, place.name

    return [str(place) for place in sorted(found, key=age)]


_HASHERS = 8
"""The largest number of threads; each holds megabytes, and no disk serves more."""


def hash_in_background(files: Iterable[LocalFile]) -> None:
    """Hash the files in the background, while the run imports, plans and quantizes.

    The threads do not keep a refused run from ending.
    """
    waiting = deque(files)

    def work() -> None:
        while waiting:
            try:
                file = waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                file.digest.set_result(sha256_of(file.path))
            except BaseException as error:  # whoever waits for the digest receives it
                file.digest.set_exception(error)

    for _ in range(min(len(os.sched_getaffinity(0)), len(waiting), _HASHERS)):
        threading.Thread(target=work, name="hash source", daemon=True).start()
