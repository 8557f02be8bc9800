"""Opens the checkpoint that a user names."""

from collections.abc import Callable
from pathlib import Path

from smolquant.checkpoint.folder import FolderSource
from smolquant.checkpoint.repository import HubSource
from smolquant.checkpoint.source import Source
from smolquant.errors import HubError
from smolquant.hub import Hub
from smolquant.places import nearby_folders
from smolquant.text import one_of


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
    try:
        return HubSource(hub, model, revision, with_code=with_code, notify=notify)
    except HubError as error:
        if similar := nearby_folders(model):  # a misspelt path may have the form of an id
            raise HubError(error.message, hint=f"{one_of(similar)}{error.hint}") from error
        raise
