"""Sends finished shards while the others are still being made, so that the disk need not hold them all.

A shard that was sent is a blob that no branch refers to, until the one commit names it.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from smolquant.errors import HubError
from smolquant.hub import Hub, hub_errors, upload_errors

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd


class PreuploadedShards:
    """The shards that one run has sent to a repository."""

    def __init__(
        self,
        hub: Hub,
        repo_id: str,
        *,
        create_pr: bool,
        create: Callable[[], object] | None = None,
    ) -> None:
        """Prepare to send; nothing is sent yet.

        Args:
            create_pr: whether the commit will be a pull request.
            create: creates the repository, and is called before the first shard is sent; None if the
                repository exists.
        """
        self._hub, self._repo_id, self._create_pr = hub, repo_id, create_pr
        self._create, self._lock = create, threading.Lock()
        self._operations: dict[str, CommitOperationAdd] = {}

    @property
    def operations(self) -> "Mapping[str, CommitOperationAdd]":
        """Path in the repository -> the operation that names the file in a commit, without its content."""
        return self._operations

    def send(self, variant: str, shard: Path) -> None:
        """Send a finished shard and delete it; a shard that the Hub wants in the commit itself stays.

        Raises:
            HubError: the Hub refused, or cannot be reached.
        """
        from huggingface_hub import CommitOperationAdd

        with self._lock:
            if self._create is not None:
                self._create()
                self._create = None
        path = f"{variant}/{shard.name}"
        operation = CommitOperationAdd(path, shard)
        with hub_errors(self._repo_id, f"sending {path}"), upload_errors(self._repo_id):
            self._hub.api.preupload_lfs_files(self._repo_id, [operation], create_pr=self._create_pr)
        refuse_ignored(self._repo_id, [operation])
        if operation.path_or_fileobj == b"":  # this is how the client shows that it was sent
            self._operations[path] = operation
            shard.unlink()


def refuse_ignored(repo_id: str, additions: "Iterable[CommitOperationAdd]") -> None:
    """Make sure that a commit will hold every file: the client silently drops those of a .gitignore.

    Args:
        additions: as the client has asked the Hub about them.

    Raises:
        HubError: the Hub will leave a file out.
    """
    ignored = [addition.path_in_repo for addition in additions if addition._should_ignore]
    if ignored:
        raise HubError(
            f"{repo_id} has a .gitignore that keeps {ignored[0]} out of every commit.",
            hint="Take the pattern out of .gitignore, then run again.",
        )
