"""A model repository on the Hub, pinned to one commit, as a source.

Small files are held against the Hub's list before anybody reads them. Weights are hashed beside the work,
as a folder's are, and nothing that was made of them is kept before that is done.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from smolquant.checkpoint.download import (
    discard,
    fetch,
    list_files,
    not_as_listed,
    snapshot,
)
from smolquant.checkpoint.files import (
    LARGEST_EXTRA,
    is_license,
    is_processor_config,
    sha256_of,
)
from smolquant.checkpoint.folder import FileState, LocalFile, hash_in_background
from smolquant.checkpoint.source import Download, Source, find_shards, layout_of
from smolquant.errors import CheckpointError
from smolquant.hub import Hub, hub_errors

if TYPE_CHECKING:
    from huggingface_hub.utils._safetensors import TensorInfo

    from smolquant.checkpoint.reader import Checkpoint
    from smolquant.checkpoint.tensors import Layout


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

        Args:
            with_code: whether the model's own Python files belong to it (--trust-remote-code).
            notify: called with a line for people when weights are fetched.

        Raises:
            HubError: the repository is missing, gated or private, the revision is unknown, or there is
                no connection.
            CheckpointError: there are no weights, or the index names a missing shard.
        """
        self.repo = repo
        self._hub = hub
        self._notify = notify
        with hub_errors(repo, "reading the model"):
            listing = list_files(hub, repo, revision)
        self.revision = listing.commit
        self.license = _license_entries(listing.card_data)
        self._files = files = listing.files
        self._sort_files(files, repo, with_code=with_code)
        small = sorted(name for name, file in files.items() if file.size <= LARGEST_EXTRA)
        self._processor_configs = list(filter(is_processor_config, small))
        self.license_files = list(filter(is_license, small))
        index = [self._layout] if self._layout.endswith(".json") else []
        self._folder = self._fetch(
            [*self._auxiliary_files, *self._processor_configs, *self.license_files, *index]
        )
        self._shards = find_shards(self._folder, self._layout)
        for shard in self._shards:
            if shard not in files:
                raise CheckpointError(
                    f"{self._layout} of {repo} names {shard}, which is not there.",
                    hint="Upload the missing shard.",
                )
        self._lfs = {name: file.sha256 for name, file in files.items() if file.sha256}
        self._copies: dict[str, LocalFile] = {}
        """The weights that were fetched, being hashed."""

    @property
    def folder(self) -> Path:
        return self._folder

    @cached_property
    def digests(self) -> Mapping[str, str]:
        names = sorted({*self._auxiliary_files, *self.weights})
        unknown = [name for name in names if name not in self._lfs and name in self._shards]
        if unknown:  # small weights need not be in LFS, and the Hub lists no sha256 for them
            self._fetch(unknown)
        return {name: self._lfs.get(name) or sha256_of(self._folder / name) for name in names}

    @property
    def state(self) -> str:
        return self.identity  # the Hub lists the digests of large files

    def require_unchanged(self) -> None:
        """Make sure that the weights that were fetched are those of the commit, which does not change.

        Raises:
            HubError: they are not; they are taken out of the client's cache.
        """
        for name, copy in self._copies.items():
            arrived = copy.sha256
            if copy.has_changed:
                how = "the fetched copy was changed while it was read"
            elif arrived != self._lfs[name]:
                how = "its sha256 differs"
            else:
                continue
            discard([copy.path])
            raise not_as_listed(name, how)

    def to_fetch(self) -> Download:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.constants import HF_HUB_CACHE

        assert self.repo is not None
        missing = [
            shard
            for shard in self._shards
            if not isinstance(try_to_load_from_cache(self.repo, shard, revision=self.revision), str)
        ]
        return Download(sum(self._files[shard].size for shard in missing), Path(HF_HUB_CACHE))

    def fetch_weights(self) -> list[Path]:
        assert self.repo is not None
        assert self.revision is not None
        if not self._copies:
            self._notify(f"Fetching {len(self._shards)} weight file(s) of {self.repo}")
            large = [shard for shard in self._shards if shard in self._lfs]
            if small := [shard for shard in self._shards if shard not in self._lfs]:
                self._fetch(small)
            folder = self._fetch_large(large)
            paths = {shard: folder / shard for shard in large}
            self._copies = {
                shard: LocalFile(path, FileState.of(path), Future())
                for shard, path in paths.items()
            }
            hash_in_background(self._copies.values())
        return [self._folder / shard for shard in self._shards]

    @property
    def can_stream(self) -> bool:
        return self._is_safetensors and all(shard in self._lfs for shard in self._shards)

    @contextmanager
    def checkpoint(self, *, streamed: bool = False) -> "Iterator[Checkpoint]":
        if not streamed:
            with _telling_damage(self.require_unchanged), super().checkpoint() as checkpoint:
                self._require_planned(checkpoint)
                yield checkpoint
            return
        from smolquant.checkpoint.reader import Checkpoint
        from smolquant.checkpoint.remote import RemoteFiles

        assert self.repo is not None
        assert self.revision is not None
        self._notify(f"Streaming {len(self._shards)} weight file(s) of {self.repo}")
        with closing(RemoteFiles(self._hub, self.repo, self.revision)) as files:
            opened = [files.open(n, self._files[n].size, self._lfs[n]) for n in self._shards]
            with _telling_damage(files.recheck), Checkpoint(opened) as checkpoint:
                self._require_planned(checkpoint)
                yield checkpoint

    def _require_planned(self, checkpoint: "Checkpoint") -> None:
        """Make sure that the weights have the headers that the run was planned by.

        Raises:
            HubError: they have not, since one of both did not arrive whole.
        """
        if checkpoint.layout != self.layout():
            raise not_as_listed("A weight file's header", "it is another one than before")

    @property
    def _is_safetensors(self) -> bool:
        return self._layout.startswith("model.safetensors")

    def layout(self) -> "Layout":
        return self._layout_at_first

    @cached_property
    def _layout_at_first(self) -> "Layout":
        if not self._is_safetensors:
            return layout_of(self.fetch_weights())  # only unpickling shows what a pickle holds
        from smolquant.checkpoint.tensors import Layout, require_shape, source_tensor

        tensors = {}
        for shard in self._shards:
            for name, entry in self._header(shard):
                require_shape(shard, name, entry.shape)
                tensors[name] = source_tensor(shard, name, entry.dtype, entry.shape)
        if not tensors:
            raise CheckpointError(
                "The weight files hold no tensors.", hint="Upload the weights again."
            )
        return Layout.unwrapped(tensors)

    def _header(self, shard: str) -> "list[tuple[str, TensorInfo]]":
        """A weight file's tensors in its order; a header that cannot be read is fetched again, once.

        Raises:
            CheckpointError: it cannot be read then either.
        """
        from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

        # The latter are what the client lets through from a header that is JSON and none of tensors.
        unreadable = (
            *(NotASafetensorsRepoError, SafetensorsParsingError),
            *(TypeError, KeyError, AttributeError, ValueError, RecursionError),
        )

        def read() -> "list[tuple[str, TensorInfo]]":
            assert self.repo is not None
            header = self._hub.api.parse_safetensors_file_metadata(
                self.repo, shard, revision=self.revision
            )
            return sorted(header.tensors.items(), key=lambda item: item[1].data_offsets)

        assert self.repo is not None
        with hub_errors(self.repo, f"reading the header of {shard}"):
            with suppress(*unreadable):
                return read()
            try:
                return read()
            except unreadable as error:
                raise CheckpointError(
                    f"{shard} is truncated or corrupt: {error!r}", hint="Upload the file again."
                ) from error

    def _fetch_large(self, names: Sequence[str]) -> Path:
        """Fetch weights as they come, and return their folder."""
        assert self.repo is not None
        assert self.revision is not None
        doing, missing = "downloading the model", self.to_fetch().size
        if not missing:
            return snapshot(self._hub, self.repo, self.revision, names, doing=doing)
        with self._hub.receiving(missing) as bars:
            return snapshot(self._hub, self.repo, self.revision, names, doing=doing, bars=bars)

    def _fetch(self, names: Iterable[str]) -> Path:
        """Fetch small files, whole and as listed, and return their folder."""
        assert self.repo is not None
        assert self.revision is not None
        files = {name: self._files[name] for name in names}
        return fetch(self._hub, self.repo, self.revision, files, doing="downloading the model")


def _license_entries(card: object) -> dict[str, str]:
    """What a model's card states about its license, in the keys of the front matter."""
    keys = ("license", "license_name", "license_link")
    entries = {key: getattr(card, key, None) for key in keys}
    return {key: value for key, value in entries.items() if isinstance(value, str)}


@contextmanager
def _telling_damage(check: Callable[[], None]) -> Iterator[None]:
    """Where weights are found to be unusable, tell that they did not arrive whole, if that is why.

    Args:
        check: raises HubError for what did not.
    """
    try:
        yield
    except CheckpointError:
        check()
        raise
