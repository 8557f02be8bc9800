"""A model repository on the Hub, pinned to one commit, as a source."""

import glob
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from smolquant.checkpoint.files import (
    LARGEST_EXTRA,
    is_license,
    is_processor_config,
    sha256_of,
)
from smolquant.checkpoint.source import Download, Source, find_shards, layout_of
from smolquant.errors import CheckpointError
from smolquant.hub import Hub, hub_errors

if TYPE_CHECKING:
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
            info = hub.api.model_info(repo, revision=revision, files_metadata=True)
        self.revision = info.sha
        self.license = _license_entries(info.card_data)
        files = {file.rfilename: file for file in info.siblings or []}
        self._sort_files(files, with_code=with_code)
        small = sorted(name for name, file in files.items() if (file.size or 0) <= LARGEST_EXTRA)
        self._processor_configs = list(filter(is_processor_config, small))
        self.license_files = list(filter(is_license, small))
        index = [self._layout] if self._layout.endswith(".json") else []
        self._folder = self._download(
            [*self._auxiliary_files, *self._processor_configs, *self.license_files, *index]
        )
        self._shards = find_shards(self._folder, self._layout)
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
        if unknown:  # small weights need not be in LFS, and the Hub lists no sha256 for them
            self._download(unknown)
        return {name: self._lfs.get(name) or sha256_of(self._folder / name) for name in names}

    @property
    def state(self) -> str:
        return self.identity  # the Hub lists the digests of large files

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
                        f"The headers of the weight files of {self.repo} have changed during the run.",
                        hint="Run again. If a proxy stands between this machine and the Hub, check "
                        "the proxy.",
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
            return layout_of(self.fetch_weights())  # only unpickling shows what a pickle holds
        from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

        from smolquant.checkpoint.tensors import Layout, require_shape, source_tensor

        assert self.repo is not None
        # What the client lets through from a header that is JSON and none of tensors.
        not_readable = (TypeError, KeyError, AttributeError, ValueError, RecursionError)
        tensors = {}
        for shard in self._shards:
            with hub_errors(self.repo, f"reading the header of {shard}"):
                try:
                    header = self._hub.api.parse_safetensors_file_metadata(
                        self.repo, shard, revision=self.revision
                    )
                    in_order = sorted(header.tensors.items(), key=lambda item: item[1].data_offsets)
                except (*not_readable, NotASafetensorsRepoError, SafetensorsParsingError) as error:
                    raise CheckpointError(
                        f"{shard} is truncated or corrupt: {error!r}", hint="Upload the file again."
                    ) from error
            for name, entry in in_order:
                require_shape(shard, name, entry.shape)
                tensors[name] = source_tensor(shard, name, entry.dtype, entry.shape)
        if not tensors:
            raise CheckpointError(
                "The weight files hold no tensors.", hint="Upload the weights again."
            )
        return Layout.unwrapped(tensors)

    def _download(self, names: Iterable[str]) -> Path:
        assert self.repo is not None
        with hub_errors(self.repo, "downloading the model"):
            return Path(
                self._hub.api.snapshot_download(
                    self.repo,
                    revision=self.revision,
                    allow_patterns=[glob.escape(name) for name in names],
                )
            )


def _license_entries(card: object) -> dict[str, str]:
    """What a model's card states about its license, in the keys of the front matter."""
    keys = ("license", "license_name", "license_link")
    entries = {key: getattr(card, key, None) for key in keys}
    return {key: value for key, value in entries.items() if isinstance(value, str)}
