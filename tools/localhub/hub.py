"""The Hub's state: its repos, its blobs, and who may do what with them."""

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from localhub.access import Token, Tokens
from localhub.blobs import BlobStore
from localhub.errors import HubError, repo_not_found
from localhub.repos import Change, Delete, Entry, Kind, Put, Repo

# Metadata is public even where content is gated; to contribute is to open a pull request.
Need = Literal["metadata", "content", "contribute", "write"]

# Files that go to LFS whatever they hold; the Hub says so in every new repo's .gitattributes.
LFS_SUFFIXES = (".bin", ".gguf", ".h5", ".npz", ".onnx", ".pt", ".pth", ".safetensors", ".zip")
LFS_SIZE = 10_000_000  # bytes; from here on a file goes to LFS whatever its name
_ATTRIBUTES = "".join(
    f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES
).encode()

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_large(path: str, size: int, sample: bytes) -> bool:
    """Whether a file belongs in LFS: by its name, its size, or a first sample that is binary."""
    return PurePosixPath(path).suffix in LFS_SUFFIXES or size >= LFS_SIZE or b"\0" in sample


class Hub:
    """Repos by kind and id, over one blob store."""

    def __init__(self, data: Path, tokens: Iterable[Token] = ()) -> None:
        self.blobs = BlobStore(data)
        self.tokens = Tokens(tokens)
        self.before_commit: Callable[[Repo], None] | None = None
        self._repos: dict[tuple[Kind, str], Repo] = {}
        self._lock = threading.Lock()

    def create_repo(
        self, repo_id: str, *, kind: Kind = "model", owner: str | None = None, private: bool = False
    ) -> Repo:
        """Create a repo with an initial commit; HubError 400 for a bad id, 409 if it exists."""
        if not _REPO_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id:
            raise HubError(400, f"Invalid repo id: {repo_id}")
        tree = {".gitattributes": self._store(".gitattributes", _ATTRIBUTES)}
        repo = Repo(kind, repo_id, owner or repo_id.partition("/")[0], tree, private=private)
        with self._lock:
            if (kind, repo_id) in self._repos:
                raise HubError(409, f"You already created this {kind} repo")
            self._repos[kind, repo_id] = repo
        return repo

    def delete_repo(self, repo: Repo) -> None:
        """Forget a repo; its blobs stay, others may hold them too."""
        with self._lock:
            del self._repos[repo.kind, repo.id]

    def repo(self, repo_id: str, kind: Kind = "model") -> Repo:
        """A repo, no questions asked; KeyError if there is none."""
        return self._repos[kind, repo_id]

    def open_repo(self, kind: Kind, repo_id: str, token: Token | None, need: Need) -> Repo:
        """A repo for a token's user, or the HubError that says why not."""
        repo = self._repos.get((kind, repo_id))
        member = token is not None and repo is not None and token.is_member(repo.namespace)
        if repo is None or (repo.private and not member):
            raise repo_not_found(anonymous=token is None)
        if need != "metadata" and repo.gated and not member:
            self._pass_gate(repo, token)
        if need in ("contribute", "write"):
            if token is None:
                raise repo_not_found(anonymous=True)
            allowed = token.may_write if need == "write" else token.may_contribute
            if not allowed(repo_id):
                raise HubError(403, f"You don't have the rights to write to {kind} {repo_id}")
        return repo

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path] | None = None,
        *,
        delete: Iterable[str] = (),
        kind: Kind = "model",
        revision: str = "main",
        title: str = "commit behind the API",
    ) -> str:
        """Commit files (content or where it lies, by path) without HTTP; returns the sha."""
        changes: list[Change] = [Delete(path) for path in delete]
        changes += [Put(path, self._store(path, source)) for path, source in (files or {}).items()]
        repo = self.repo(repo_id, kind)
        return repo.commit(changes, author=repo.owner, title=title, revision=revision).sha

    def read(self, repo_id: str, path: str, revision: str = "main", kind: Kind = "model") -> bytes:
        """A file's content; KeyError if the revision has no such file."""
        entry = self.repo(repo_id, kind).files(revision)[path]
        return self.blobs.path(entry.sha256).read_bytes()

    def announce_commit(self, repo: Repo) -> None:
        """Run the `before_commit` hook, once: it may well commit, over HTTP too."""
        hook, self.before_commit = self.before_commit, None
        if hook is not None:
            hook(repo)

    def _store(self, path: str, source: bytes | Path) -> Entry:
        sha256 = self.blobs.put(source)
        blob = self.blobs.path(sha256)
        with blob.open("rb") as file:
            sample = file.read(512)
        if is_large(path, self.blobs.size(sha256), sample):
            return Entry.large(sha256, self.blobs.size(sha256))
        return Entry.regular(blob.read_bytes(), sha256)

    @staticmethod
    def _pass_gate(repo: Repo, token: Token | None) -> None:
        closed = f"Access to {repo.kind} {repo.id} is restricted"
        if token is None:
            raise HubError(401, f"{closed}. You must be authenticated to access it.", "GatedRepo")
        if token.user not in repo.allowed:
            raise HubError(403, f"{closed} and you are not in the authorized list.", "GatedRepo")
