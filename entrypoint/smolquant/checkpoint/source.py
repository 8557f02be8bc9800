"""Where a checkpoint comes from: a folder, or a Hub repository at one commit.

A source tells its identity before a weight is fetched, so that a run with nothing to do costs nothing,
and hands out local paths when there is work.
"""

import os
import re
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from smolquant.checkpoint.files import (
    identity,
    is_code,
    is_companion,
    sha256_of,
    shard_names,
    weight_layout,
)
from smolquant.errors import CheckpointError
from smolquant.hub import Hub, hub_errors

if TYPE_CHECKING:
    from smolquant.checkpoint.reader import Checkpoint, Layout


@dataclass(frozen=True)
class LocalFile:
    """A file of the source on this machine."""

    path: Path
    sha256: str
    size: int


@dataclass(frozen=True)
class Download:
    """Bytes that are still to come, and a folder on the disk that will hold them."""

    size: int
    folder: Path


class Source(ABC):
    """One checkpoint. ``companions`` is everything of it that is not weights."""

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
        """A folder with the companions; the weights are there once :meth:`fetch_weights` ran."""

    @cached_property
    @abstractmethod
    def digests(self) -> Mapping[str, str]:
        """sha256 of every config, tokenizer and weight file, by name."""

    @property
    def identity(self) -> str:
        """What "the same source" means, see :func:`smolquant.checkpoint.files.identity`."""
        return identity(self.digests)

    @property
    def weight_digests(self) -> Mapping[str, str]:
        """sha256 of the files that hold tensors, by name."""
        return {
            n: digest
            for n, digest in self.digests.items()
            if n in self.weights and not n.endswith(".json")
        }

    @property
    def companions(self) -> list[str]:
        """Names of the files that travel into every variant."""
        return sorted(name for name in self.digests if name not in set(self.weights))

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
        self._companions = [
            name
            for name in _file_names(folder)
            if is_companion(name) or (with_code and is_code(name))
        ]
        self._layout = weight_layout(_file_names(folder))
        self._shards = _shards(folder, self._layout)
        for shard in self._shards:
            if not (folder / shard).is_file():
                raise CheckpointError(
                    f"{self._layout} names {shard}, which is not there.",
                    hint="Fetch or save the missing shard.",
                )
        names = sorted({*self._companions, *self.weights})
        self._hashing = dict(zip(names, _hash_beside([folder / n for n in names]), strict=True))

    @property
    def folder(self) -> Path:
        return self._folder

    @cached_property
    def digests(self) -> Mapping[str, str]:
        return {name: file.sha256 for name, file in self.files.items()}

    @cached_property
    def files(self) -> Mapping[str, LocalFile]:
        """Every file of the model, hashed."""
        return {
            name: LocalFile(
                self._folder / name, digest.result(), (self._folder / name).stat().st_size
            )
            for name, digest in self._hashing.items()
        }

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
        self._companions = [
            name for name in files if is_companion(name) or (with_code and is_code(name))
        ]
        index = [self._layout] if self._layout.endswith(".json") else []
        self._folder = self._download([*self._companions, *index])
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
        names = sorted({*self._companions, *self.weights})
        unknown = [name for name in names if name not in self._lfs and name in self._shards]
        if unknown:  # small weights need not be in LFS; only their content tells their sha256
            self._download(unknown)
        return {name: self._lfs.get(name) or sha256_of(self._folder / name) for name in names}

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


def _hash_beside(paths: Sequence[Path]) -> list[Future[str]]:
    """sha256 of each file, computed beside whatever comes next, which is the import of torch.

    In threads that do not keep a refused run from ending.
    """
    digests: list[Future[str]] = [Future() for _ in paths]
    waiting = deque(zip(paths, digests, strict=True))

    def work() -> None:
        while waiting:
            try:
                path, digest = waiting.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                digest.set_result(sha256_of(path))
            except OSError as error:
                digest.set_exception(error)

    for _ in os.sched_getaffinity(0):
        threading.Thread(target=work, name="hash source", daemon=True).start()
    return digests
