"""The interface of a checkpoint's source, which is a folder or a Hub repository at one commit.

A source knows its identity before a weight is fetched, so that a run with nothing to do costs nothing,
and hands out local paths when there is work.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from smolquant.checkpoint.files import (
    identity,
    is_auxiliary,
    is_code,
    shard_names,
    unread_index,
    weight_layout,
)

if TYPE_CHECKING:
    from smolquant.checkpoint.reader import Checkpoint
    from smolquant.checkpoint.tensors import Layout


@dataclass(frozen=True)
class Download:
    """The bytes that are still to be fetched, and a folder on the disk that will hold them."""

    size: int
    folder: Path


class Source(ABC):
    """One checkpoint: its weights, and auxiliary files such as config, tokenizer and chat template."""

    _auxiliary_files: list[str]
    """The files other than weights that the identity covers, in any order."""
    _processor_configs: Sequence[str] = ()
    """Configs that travel into every variant, and that the identity does not cover."""
    _layout: str
    """The name of the single weight file, or of the index of shards."""
    _shards: list[str]
    """The files that hold tensors."""
    unread_index: str | None = None
    """An index of shards beside the single weight file, which transformers prefers to it."""
    all_files: Collection[str] = ()
    """The names of the files at the top of the folder, or in the whole repository, the model's or not."""
    repo: str | None = None
    """Hub id; None for a folder."""
    revision: str | None = None
    """Commit sha on the Hub; None for a folder."""
    license: Mapping[str, str] | None = None
    """License entries of the model's card; None where only the target's card can state them."""
    license_files: Sequence[str] = ()
    """Names of the files that state the terms of use."""
    readme: Path | None = None
    """The owner's README.md in a folder; a repository's own README stays where it is."""

    def _sort_files(
        self, names: Collection[str], place: str, *, with_code: bool, below: Sequence[str] = ()
    ) -> None:
        """Tell by their names which of all files are the model's.

        Args:
            place, below: as for :func:`smolquant.checkpoint.files.weight_layout`.

        Raises:
            CheckpointError: there are no weights.
        """
        self.all_files = frozenset(names)
        self._auxiliary_files = [n for n in names if is_auxiliary(n) or (with_code and is_code(n))]
        self._layout = weight_layout(names, place, below=below)
        self.unread_index = unread_index(names, self._layout)

    @property
    @abstractmethod
    def folder(self) -> Path:
        """A folder with the auxiliary files, and with the weights once :meth:`fetch_weights` ran."""

    @cached_property
    @abstractmethod
    def digests(self) -> Mapping[str, str]:
        """The sha256 of every config, tokenizer and weight file, by name."""

    @property
    def identity(self) -> str:
        """What "the same source" means, see :func:`smolquant.checkpoint.files.identity`.

        The first caller that asks for a folder's identity waits until all of it has been read.
        """
        return identity(self.digests)

    @property
    @abstractmethod
    def state(self) -> str:
        """What distinguishes this source from others at once, before anything in it has been hashed.

        Equal states mean equal identities. The converse does not hold: a touched folder has a new state.
        """

    @abstractmethod
    def require_unchanged(self) -> None:
        """Make sure, after reading, that everything that was read belongs to the :attr:`identity`.

        Raises:
            CheckpointError: a file was changed meanwhile.
            HubError: a file that was fetched is not the one that the Hub lists.
        """

    @property
    def weight_digests(self) -> Mapping[str, str]:
        """The sha256 of the files that hold tensors, by name."""
        return {shard: self.digests[shard] for shard in self._shards}

    @property
    def auxiliary_files(self) -> list[str]:
        """Names of the files that travel into every variant."""
        travelling = {*self._auxiliary_files, *self._processor_configs}
        return sorted(travelling.difference(self.weights))

    @property
    def weights(self) -> list[str]:
        """Names of the weight files and, where there are shards, of their index."""
        return self._shards + ([self._layout] if self._layout not in self._shards else [])

    @abstractmethod
    def to_fetch(self) -> "Download":
        """What :meth:`fetch_weights` still has to download."""

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
            streamed: whether to read them without storing them here; only where :attr:`can_stream`.
        """
        from smolquant.checkpoint.reader import Checkpoint

        with Checkpoint(self.fetch_weights()) as checkpoint:
            yield checkpoint

    @abstractmethod
    def layout(self) -> "Layout":
        """What the weight files' headers say, read with as little downloading as possible."""


def layout_of(paths: list[Path]) -> "Layout":
    """What the headers of these weight files say.

    Raises:
        CheckpointError: one of them cannot be read.
    """
    from smolquant.checkpoint.reader import Checkpoint

    with Checkpoint(paths) as checkpoint:
        return checkpoint.layout


def find_shards(folder: Path, layout: str) -> list[str]:
    """The files that hold tensors, by the index ``layout`` in ``folder``, or the single file of this name.

    Raises:
        CheckpointError: the index cannot be read.
    """
    if not layout.endswith(".json"):
        return [layout]
    return shard_names(layout, (folder / layout).read_bytes())
