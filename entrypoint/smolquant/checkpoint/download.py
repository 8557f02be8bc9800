"""What the Hub lists of a commit's files, and files fetched from it, each held against that list.

The client library compares no content with a digest, only sizes. A proxy, a cache or a disk that changes a
byte would go unseen.
"""

import glob
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from smolquant.checkpoint.files import sha256_of
from smolquant.errors import HubError
from smolquant.hub import Hub, OddAnswer, hub_errors, naming_folders_like

_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub lists it, without its content."""

    size: int
    """Bytes."""
    sha256: str | None
    """None for a file that git itself stores, not LFS."""
    git_sha1: str
    """Git's name of the blob, which is the pointer where the file is in LFS."""


@dataclass(frozen=True)
class Listing:
    """A repository's files at one commit."""

    commit: str
    """A commit sha."""
    files: Mapping[str, RemoteFile]
    """By path, with slashes; none leads out of the repository."""
    card_data: Any
    """The front matter of the model card; None where there is none."""


def list_files(hub: Hub, repo_id: str, revision: str | None) -> Listing:
    """Resolve a revision and list the files of its commit.

    Raises:
        Exception: whatever the client raises, and OddAnswer where the answer lacks what the Hub always
            tells or names a path that no repository has; :func:`smolquant.hub.hub_errors` explains them.
    """
    from huggingface_hub import RepoFile

    info = hub.api.model_info(repo_id, revision=revision)
    if not is_commit(info.sha):
        raise OddAnswer(f"the commit is {info.sha!r}")
    files = {}
    for entry in hub.api.list_repo_tree(repo_id, recursive=True, revision=info.sha):
        if not isinstance(entry, RepoFile):
            continue
        path, lfs = entry.path, entry.lfs
        if not _is_path(path):
            raise OddAnswer(f"it names a file {path!r}")
        sound = isinstance(entry.size, int) and _matches(_SHA1, entry.blob_id)
        if not sound or (lfs is not None and not _matches(_SHA256, lfs.sha256)):
            raise OddAnswer(f"the size or the digest of {path} is missing")
        files[path] = RemoteFile(entry.size, lfs.sha256 if lfs else None, entry.blob_id)
    return Listing(str(info.sha), files, info.card_data)


def fetch_some(
    hub: Hub, repo_id: str, revision: str | None, wanted: Callable[[str], bool], *, doing: str
) -> Path:
    """Fetch some of a repository's files; without a network, take what was fetched before.

    Args:
        wanted: whether a path in the repository is.

    Raises:
        HubError: the repository cannot be read, or a file is not the one that the Hub lists.
    """
    from huggingface_hub.constants import is_offline_mode

    with naming_folders_like(repo_id), hub_errors(repo_id, doing):
        if is_offline_mode():
            return Path(hub.api.snapshot_download(repo_id, revision=revision))
        listing = list_files(hub, repo_id, revision)
    files = {path: file for path, file in listing.files.items() if wanted(path)}
    return fetch(hub, repo_id, listing.commit, files, doing=doing)


def is_commit(text: object) -> bool:
    """Whether an answer's text is a commit sha."""
    return _matches(_SHA1, text)


def fetch(
    hub: Hub, repo_id: str, commit: str, files: Mapping[str, RemoteFile], *, doing: str
) -> Path:
    """Download files of a commit into the client's cache, and hold each against the Hub's list.

    A copy that is not as listed, whether it was here or has just arrived, is fetched once more.

    Args:
        files: what to fetch, of what the Hub lists of the commit.
        doing: as for :func:`smolquant.hub.hub_errors`.

    Returns:
        The folder in which the files lie by their paths, with others that were fetched before.

    Raises:
        HubError: a file does not arrive as the Hub lists it, or the Hub cannot be reached.
    """
    folder = snapshot(hub, repo_id, commit, files, doing=doing)
    if not (damaged := _damaged_of(folder, files)):
        return folder
    discard(folder / name for name in damaged)
    snapshot(hub, repo_id, commit, damaged, doing=doing)
    if damaged := _damaged_of(folder, files):
        discard(folder / name for name in damaged)
        raise not_as_listed(damaged[0], "its digest differs, a second time as well")
    return folder


def snapshot(
    hub: Hub,
    repo_id: str,
    commit: str,
    names: Collection[str],
    *,
    doing: str,
    bars: type | None = None,
) -> Path:
    """Download files of a commit into the client's cache, as they come, and return their folder.

    Args:
        bars: the class of progress bars that the client is to tell; None for no other than its own.

    Raises:
        HubError: the Hub cannot be reached, or does not stand by its own list of files.
    """
    with hub_errors(repo_id, doing):
        patterns = [glob.escape(name) for name in names]
        folder = Path(
            hub.api.snapshot_download(
                repo_id, revision=commit, allow_patterns=patterns, tqdm_class=bars
            )
        )
    for name in names:
        if not (folder / name).is_file():
            raise not_as_listed(name, "it is missing")
    return folder


def discard(paths: Iterable[Path]) -> None:
    """Take damaged copies out of the client's cache, so that they are fetched again."""
    for path in paths:
        path.resolve().unlink(missing_ok=True)  # a snapshot's files are links to blobs
        path.unlink(missing_ok=True)


def not_as_listed(name: str, how: str) -> HubError:
    """The error for a file that is not what the Hub says of it."""
    return HubError(
        f"{name} did not arrive as it is on the Hub: {how}.",
        hint="Run again. If a proxy stands between this machine and the Hub, check the proxy.",
    )


def _damaged_of(folder: Path, files: Mapping[str, RemoteFile]) -> list[str]:
    return [name for name, listed in files.items() if not _is_as_listed(folder / name, listed)]


def _is_as_listed(path: Path, listed: RemoteFile) -> bool:
    from huggingface_hub.utils.sha import git_hash

    if not path.is_file() or path.stat().st_size != listed.size:
        return False
    if listed.sha256 is not None:
        return sha256_of(path) == listed.sha256
    return git_hash(path.read_bytes()) == listed.git_sha1  # git itself stores only small files


def _is_path(name: object) -> bool:
    """Whether a name is a path inside a repository."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and str(path) == name


def _matches(pattern: re.Pattern[str], text: object) -> bool:
    return isinstance(text, str) and pattern.fullmatch(text) is not None
