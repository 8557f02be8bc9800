"""Opens the checkpoint that a user names."""

from collections.abc import Callable
from pathlib import Path

from smolquant.checkpoint.folder import FolderSource
from smolquant.checkpoint.repository import HubSource
from smolquant.checkpoint.source import Source
from smolquant.hub import Hub, naming_folders_like


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
        source = FolderSource(Path(model), with_code=with_code)
        for name in source.linked_weights:
            notify(f"{name} is a link to {(source.folder / name).resolve()}")
        return source
    with naming_folders_like(model):
        return HubSource(hub, model, revision, with_code=with_code, notify=notify)
