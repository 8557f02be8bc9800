"""Where a checkpoint comes from: a folder, or a Hub repository at one commit.

A source tells its identity before a weight is fetched, so that a run with nothing to do costs nothing,
and hands out local paths when there is work. A folder's identity takes reading all of it, which goes on
beside the work; until it is asked for, the folder's state tells it from others.
"""

import hashlib
import json
import os
import re
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from smolquant.checkpoint.files import (
    identity,
    is_auxiliary,
    is_code,
    sha256_of,
    shard_names,
    weight_layout,
)
from smolquant.errors import CheckpointError
from smolquant.hub import Hub, hub_errors

if TYPE_CHECKING:
    from smolquant.checkpoint.reader import Checkpoint, Layout


class FileState(NamedTuple):
    """What a write, a replacement or a touch changes of a file, known without reading it."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int
    """Of the inode; unlike the time of the last write it cannot be set back."""

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
    found: FileState
    """Its state before a byte of it was read."""
    digest: Future[str]

    @property
    def size(self) -> int:
        return self.found.size

    @property
    def sha256(self) -> str:
        """Hexadecimal; waits until it is known."""
        return self.digest.result()

    @property
    def has_changed(self) -> bool:
        """Whether it is no longer as it was found, or no longer there."""
        try:
            return FileState.of(self.path) != self.found
        except OSError:
            return True


@dataclass(frozen=True)
class Download:
    """Bytes that are still to come, and a folder on the disk that will hold them."""

    size: int
    folder: Path


class Source(ABC):
    """One checkpoint. ``auxiliary_files`` is everything of it that is not weights."""

    _auxiliary_files: list[str]
    """The files that are no weights; in any order."""
    _layout: str
    """The single weight file, or the index of shards."""
    _shards: list[str]
    """The files that hold tensors."""
    repo: str | None = None
    revision: str | None = None
    """Commit sha on the Hub; None for a folder."""
    terms: Mapping[str, str] | None = None
    """License entries of the model's card; None where only the target can tell them."""

    @property
    @abstractmethod
    def folder(self) -> Path:
        """A folder with the auxiliary_files; the weights are there once :meth:`fetch_weights` ran."""

    @cached_property
    @abstractmethod
    def digests(self) -> Mapping[str, str]:
        """sha256 of every config, tokenizer and weight file, by name."""

    @property
    def identity(self) -> str:
        """What "the same source" means, see :func:`smolquant.checkpoint.files.identity`.

        The first to ask for a folder's waits until all of it has been read.
        """
        return identity(self.digests)

    @property
    @abstractmethod
    def state(self) -> str:
        """What tells this source from another at once, before anything of it was hashed here.

        Equal states mean equal identities. The converse does not hold: a touched folder is another.
        """

    @abstractmethod
    def require_unchanged(self) -> None:
        """Make sure, after reading, that all that was read belongs to the one :attr:`identity`.

        Raises:
            CheckpointError: something was changed meanwhile.
        """

    @property
    def weight_digests(self) -> Mapping[str, str]:
        """sha256 of the files that hold tensors, by name."""
        return {
            n: digest
            for n, digest in self.digests.items()
            if n in self.weights and not n.endswith(".json")
        }

    @property
    def auxiliary_files(self) -> list[str]:
        """Names of the files that travel into every variant."""
        return sorted(set(self._auxiliary_files).difference(self.weights))

    @property
    def weights(self) -> list[str]:
        """Names of the weight files and, where there are shards, of their index."""
        return self._shards + ([self._layout] if self._layout not in self._shards else [])

    @abstractmethod
    def to_fetch(self) -> "Download":
        """What :meth:`fetch_weights` still has to bring here."""

    @abstractmethod
    def fetch_weights(self) -> list[Path]:
        """Local paths of the files that hold tensors, in order."""

    @property
    def can_stream(self) -> bool:
        """Whether the weights can be read without being stored here."""
        return False

    @contextmanager
    def checkpoint(self, *, streamed: bool = False) -> "Iterator[Checkpoint]":
        """The weights, open for reading.

        Args:
            streamed: without storing them here; only where they :attr:`can_stream`.
        """
        from smolquant.checkpoint.reader import Checkpoint

        with Checkpoint(self.fetch_weights()) as checkpoint:
            yield checkpoint

    @abstractmethod
    def layout(self) -> "Layout":
        """What the weight files' headers say, at the least possible price."""


class FolderSource(Source):
    """A checkpoint folder; it is only read."""

    def __init__(self, folder: Path, *, with_code: bool = False) -> None:
        """Look at ``folder``.

        Args:
            with_code: take the model's own Python files along (--trust-remote-code).

        Raises:
            CheckpointError: no weights, or an index that names a missing shard.
        """
        self._folder = folder
        found = {name: FileState.of(folder / name) for name in _file_names(folder)}
        self._auxiliary_files = [
            name for name in found if is_auxiliary(name) or (with_code and is_code(name))
        ]
        self._layout = weight_layout(found)
        self._shards = _shards(folder, self._layout)
        for shard in self._shards:
            if shard not in found:
                raise CheckpointError(
                    f"{self._layout} names {shard}, which is not there.",
                    hint="Fetch or save the missing shard.",
                )
        names = sorted({*self._auxiliary_files, *self.weights})
        self.files: Mapping[str, LocalFile] = {
            name: LocalFile(folder / name, found[name], Future()) for name in names
        }
        """Every file of the model."""
        _hash_beside(self.files.values())

    @property
    def folder(self) -> Path:
        return self._folder

    @cached_property
    def digests(self) -> Mapping[str, str]:
        return {name: file.sha256 for name, file in self.files.items()}

    @property
    def state(self) -> str:
        found = json.dumps({name: file.found for name, file in self.files.items()})
        return hashlib.sha256(found.encode()).hexdigest()

    def require_unchanged(self) -> None:
        wait([file.digest for file in self.files.values()])  # hashing reads, too
        changed = [name for name, file in self.files.items() if file.has_changed]
        if changed:
            raise CheckpointError(
                f"{', '.join(changed[:3])} changed while the checkpoint was being read, so what was "
                "made of it may be of the old and of the new.",
                hint="Run again when nothing writes to the checkpoint.",
            )

    def to_fetch(self) -> Download:
        return Download(0, self._folder)

    def fetch_weights(self) -> list[Path]:
        return [self._folder / shard for shard in self._shards]

    def layout(self) -> "Layout":
        return _layout_of(self.fetch_weights())


class HubSource(Source):
    """A repository on the Hub, pinned to the commit that its revision names now."""

    def __init__(
        self,
        hub: Hub,
        repo: str,
        revision: str | None,
        *,
        with_code: bool = False,
        notify: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Resolve ``revision`` and fetch everything but the weights.

        Raises:
            HubError: missing, gated or private repository, unknown revision, no connection.
            CheckpointError: no weights, or an index that names a missing shard.
        """
        self.repo = repo
        self._hub = hub
        self._notify = notify
        with hub_errors(repo, "reading the model"):
            info = hub.api.model_info(repo, revision=revision, files_metadata=True)
        self.revision = info.sha
        self.terms = _terms(info.card_data)
        files = {file.rfilename: file for file in info.siblings or []}
        self._layout = weight_layout(files)
        self._auxiliary_files = [
            name for name in files if is_auxiliary(name) or (with_code and is_code(name))
        ]
        index = [self._layout] if self._layout.endswith(".json") else []
        self._folder = self._download([*self._auxiliary_files, *index])
        self._shards = _shards(self._folder, self._layout)
        for shard in self._shards:
            if shard not in files:
                raise CheckpointError(
                    f"{self._layout} of {repo} names {shard}, which is not there.",
                    hint="Upload the missing shard.",
                )
        self._lfs = {name: file.lfs.sha256 for name, file in files.items() if file.lfs}
        self._sizes = {name: file.size or 0 for name, file in files.items()}

    @property
    def folder(self) -> Path:
        return self._folder

    @cached_property
    def digests(self) -> Mapping[str, str]:
        names = sorted({*self._auxiliary_files, *self.weights})
        unknown = [name for name in names if name not in self._lfs and name in self._shards]
        if unknown:  # small weights need not be in LFS; only their content tells their sha256
            self._download(unknown)
        return {name: self._lfs.get(name) or sha256_of(self._folder / name) for name in names}

    @property
    def state(self) -> str:
        return self.identity  # the Hub tells the digests of whatever is large

    def require_unchanged(self) -> None:
        """Nothing to do: a commit does not change."""

    def to_fetch(self) -> Download:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.constants import HF_HUB_CACHE

        assert self.repo is not None
        missing = [
            shard
            for shard in self._shards
            if not isinstance(try_to_load_from_cache(self.repo, shard, revision=self.revision), str)
        ]
        return Download(sum(self._sizes[shard] for shard in missing), Path(HF_HUB_CACHE))

    def fetch_weights(self) -> list[Path]:
        self._notify(f"Fetching {len(self._shards)} weight file(s) of {self.repo}")
        self._download(self._shards)
        return [self._folder / shard for shard in self._shards]

    @property
    def can_stream(self) -> bool:
        return self._is_safetensors and all(shard in self._lfs for shard in self._shards)

    @contextmanager
    def checkpoint(self, *, streamed: bool = False) -> "Iterator[Checkpoint]":
        if not streamed:
            with super().checkpoint() as checkpoint:
                yield checkpoint
            return
        from smolquant.checkpoint.reader import Checkpoint
        from smolquant.checkpoint.remote import RemoteFiles

        assert self.repo is not None
        assert self.revision is not None
        self._notify(f"Streaming {len(self._shards)} weight file(s) of {self.repo}")
        with closing(RemoteFiles(self._hub, self.repo, self.revision)) as files:
            opened = [files.open(n, self._sizes[n], self._lfs[n]) for n in self._shards]
            with Checkpoint(opened) as checkpoint:
                if checkpoint.layout != self.layout():
                    raise CheckpointError(
                        f"The headers of {self.repo} are others than a moment ago.",
                        hint="Run again; where a proxy stands between here and the Hub, look there.",
                    )
                yield checkpoint

    @property
    def _is_safetensors(self) -> bool:
        return self._layout.startswith("model.safetensors")

    def layout(self) -> "Layout":
        return self._layout_at_first

    @cached_property
    def _layout_at_first(self) -> "Layout":
        if not self._is_safetensors:
            return _layout_of(self.fetch_weights())  # only unpickling tells what a pickle holds
        from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

        from smolquant.checkpoint.reader import Layout, source_tensor

        assert self.repo is not None
        tensors = {}
        for shard in self._shards:
            with hub_errors(self.repo, f"reading the header of {shard}"):
                try:
                    header = self._hub.api.parse_safetensors_file_metadata(
                        self.repo, shard, revision=self.revision
                    )
                except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
                    raise CheckpointError(
                        f"{shard} is truncated or corrupt: {error}", hint="Upload the file again."
                    ) from error
            in_order = sorted(header.tensors.items(), key=lambda item: item[1].data_offsets)
            for name, entry in in_order:
                tensors[name] = source_tensor(shard, name, entry.dtype, entry.shape)
        if not tensors:
            raise CheckpointError(
                "The weight files hold no tensors.", hint="Upload the weights again."
            )
        return Layout(tensors)

    def _download(self, names: Iterable[str]) -> Path:
        assert self.repo is not None
        with hub_errors(self.repo, "downloading the model"):
            return Path(
                self._hub.api.snapshot_download(
                    self.repo,
                    revision=self.revision,
                    allow_patterns=[_literal(name) for name in names],
                )
            )


def open_source(
    hub: Hub,
    model: str,
    *,
    is_folder: bool,
    revision: str | None,
    with_code: bool,
    notify: Callable[[str], None],
) -> Source:
    """The checkpoint that ``model`` names: a folder, or a repository on the Hub.

    Args:
        revision: a branch, tag or commit sha on the Hub.
        with_code: take the model's own Python files along.
        notify: is told a line for people when something is fetched.

    Raises:
        CheckpointError: no weights, or an index that names a missing shard.
        HubError: missing, gated or private repository, unknown revision, no connection.
    """
    if is_folder:
        return FolderSource(Path(model), with_code=with_code)
    return HubSource(hub, model, revision, with_code=with_code, notify=notify)


def _terms(card: object) -> dict[str, str]:
    keys = ("license", "license_name", "license_link")
    entries = {key: getattr(card, key, None) for key in keys}
    return {key: value for key, value in entries.items() if isinstance(value, str)}


def _layout_of(paths: list[Path]) -> "Layout":
    from smolquant.checkpoint.reader import Checkpoint

    with Checkpoint(paths) as checkpoint:
        return checkpoint.layout


def _literal(name: str) -> str:
    """``name`` as a pattern that matches only itself."""
    return re.sub(r"([\[*?])", r"[\1]", name)


def _file_names(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for pattern in ("*", "additional_chat_templates/*")
        for path in folder.glob(pattern)
        if path.is_file()
    )


def _shards(folder: Path, layout: str) -> list[str]:
    if not layout.endswith(".json"):
        return [layout]
    return shard_names(layout, (folder / layout).read_bytes())


_HASHERS = 8
"""Threads at most; each holds megabytes, and no disk serves more."""


def _hash_beside(files: Iterable[LocalFile]) -> None:
    """Hash the files beside whatever comes next: import, plan, quantize.

    In threads that do not keep a refused run from ending.
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
            except BaseException as error:  # somebody waits for it
                file.digest.set_exception(error)

    for _ in range(min(len(os.sched_getaffinity(0)), len(waiting), _HASHERS)):
        threading.Thread(target=work, name="hash source", daemon=True).start()
