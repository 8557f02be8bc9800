"""A repo: refs that point to commits, each of which is an immutable snapshot of a tree."""

import hashlib
import re
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from localhub.errors import HubError, entry_not_found, revision_not_found

Kind = Literal["model", "dataset", "space"]
Gate = Literal["auto", "manual", False]

MAIN = "refs/heads/main"
_SHORT_SHA = re.compile(r"[0-9a-f]{7,40}")
# What git check-ref-format refuses, as far as one expression says it.
_BAD_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|^[/.-]|[/.]$|\.lock$|^$")
_BAD_PATH = re.compile(r"(^|/)(|\.|\.\.|\.git)(/|$)")


def git_oid(content: bytes) -> str:
    """The name git gives a blob: sha1 over its header and content, hex."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """What git holds in place of an LFS file."""
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    ).encode()


@dataclass(frozen=True)
class Entry:
    """A file in a tree: git oid, size in bytes, sha256 of its content, whether it is in LFS."""

    oid: str
    size: int
    sha256: str
    lfs: bool

    @classmethod
    def regular(cls, content: bytes, sha256: str) -> "Entry":
        """A file that git itself holds."""
        return cls(git_oid(content), len(content), sha256, lfs=False)

    @classmethod
    def large(cls, sha256: str, size: int) -> "Entry":
        """A file in LFS; its oid is that of the pointer in git."""
        return cls(git_oid(lfs_pointer(sha256, size)), size, sha256, lfs=True)

    @property
    def pointer_size(self) -> int:
        """Size in bytes of an LFS file's pointer."""
        return len(lfs_pointer(self.sha256, self.size))


Tree = Mapping[str, Entry]


@dataclass(frozen=True)
class Put:
    """Add or overwrite a file."""

    path: str
    entry: Entry

    def apply(self, tree: dict[str, Entry], commit: str) -> None:
        """Change the tree; raises HubError (400) for a path that git would not take."""
        if _BAD_PATH.search(self.path):
            raise HubError(400, f"Invalid path: {self.path}")
        tree[self.path] = self.entry


@dataclass(frozen=True)
class Delete:
    """Delete a file, or a folder with all that is in it."""

    path: str
    is_folder: bool = False

    def apply(self, tree: dict[str, Entry], commit: str) -> None:
        """Change the tree; raises HubError (404) if there is nothing to delete."""
        prefix = self.path.rstrip("/") + "/"
        doomed = [p for p in tree if (p.startswith(prefix) if self.is_folder else p == self.path)]
        if not doomed:
            what = "folder" if self.is_folder else "file"
            raise entry_not_found(self.path, commit, f"A {what} with this name doesn't exist")
        for path in doomed:
            del tree[path]


Change = Put | Delete


@dataclass(frozen=True)
class Commit:
    """A snapshot of the tree and where it came from."""

    sha: str
    parent: str | None
    tree: Tree
    author: str
    title: str
    message: str
    date: datetime

    @classmethod
    def make(
        cls, parent: str | None, tree: Tree, author: str, title: str, message: str = ""
    ) -> "Commit":
        """A commit made now, named by the sha1 over all that it says."""
        date = datetime.now(UTC)
        listing = [f"{entry.oid} {path}" for path, entry in sorted(tree.items())]
        told = "\n".join([*listing, str(parent), author, title, message, date.isoformat()])
        sha = hashlib.sha1(told.encode()).hexdigest()
        return cls(sha, parent, tree, author, title, message, date)


@dataclass
class Discussion:
    """A discussion, or a pull request: then `base` is the branch and `base_sha` where it began."""

    num: int
    title: str
    description: str
    author: str
    date: datetime
    status: Literal["draft", "open", "closed", "merged"] = "open"
    base: str | None = None
    base_sha: str | None = None
    merge_sha: str | None = None

    @property
    def ref(self) -> str:
        """The ref of a pull request's head."""
        return f"refs/pr/{self.num}"


@dataclass
class Repo:
    """One repo. Readers get immutable snapshots; whoever changes it holds its lock."""

    kind: Kind
    id: str
    owner: str
    initial_tree: Tree
    private: bool = False
    gated: Gate = False
    allowed: set[str] = field(default_factory=set)
    refs: dict[str, str] = field(default_factory=dict)
    discussions: dict[int, Discussion] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _commits: dict[str, Commit] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._record(MAIN, Commit.make(None, self.initial_tree, self.owner, "initial commit"))

    @property
    def namespace(self) -> str:
        """The user or organization that has the repo."""
        return self.id.partition("/")[0]

    @property
    def head(self) -> str:
        """Sha of the main branch."""
        return self.refs[MAIN]

    @property
    def commits(self) -> list[Commit]:
        """The main branch's commits, newest first."""
        return self.history("main")

    @property
    def branches(self) -> dict[str, str]:
        """Sha by branch name."""
        return self.refs_under("refs/heads/")

    @property
    def tags(self) -> dict[str, str]:
        """Sha by tag name."""
        return self.refs_under("refs/tags/")

    def refs_under(self, prefix: str) -> dict[str, str]:
        """Sha by name of every ref with this prefix, which the names come without."""
        with self.lock:
            return {r.removeprefix(prefix): s for r, s in self.refs.items() if r.startswith(prefix)}

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, tag, ref, sha (7 digits suffice) or HEAD; else HubError 404."""
        with self.lock:
            if revision == "HEAD":
                return self._commits[self.head]
            for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
                if ref in self.refs:
                    return self._commits[self.refs[ref]]
            if _SHORT_SHA.fullmatch(revision):
                for sha, commit in self._commits.items():
                    if sha.startswith(revision):
                        return commit
        raise revision_not_found(revision)

    def files(self, revision: str = "main") -> Tree:
        """The tree of a revision: every file's entry by its path."""
        return self.resolve(revision).tree

    def history(self, revision: str) -> list[Commit]:
        """A revision and its ancestors, newest first."""
        commit = self.resolve(revision)
        commits = [commit]
        while commit.parent is not None:
            commit = self._commits[commit.parent]
            commits.append(commit)
        return commits

    def commit(
        self,
        changes: Iterable[Change],
        *,
        author: str,
        title: str,
        message: str = "",
        revision: str = "main",
        parent: str | None = None,
    ) -> Commit:
        """Commit changes to a branch or a pull request.

        Raises HubError: 404 for a revision that is neither, 412 if `parent` (a sha, 7 digits
        suffice) is no longer its head, and whatever a change that cannot be applied raises.
        """
        with self.lock:
            ref = self._writable(revision)
            head = self._commits[self.refs[ref]]
            if parent is not None and not head.sha.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            return self._record(ref, self._child(head, changes, author, title, message))

    def open_pull_request(
        self,
        changes: Iterable[Change],
        *,
        author: str,
        title: str,
        message: str = "",
        revision: str = "main",
        parent: str | None = None,
    ) -> tuple[Discussion, Commit]:
        """Open a pull request against a branch, with a commit on `parent` or its head."""
        with self.lock:
            branch = self._writable(revision)
            base = self.resolve(parent or branch)
            commit = self._child(base, changes, author, title, message)
            request = self.discuss(title, message, author, base=revision, base_sha=base.sha)
            request.status = "open"
            return request, self._record(request.ref, commit)

    def discuss(
        self,
        title: str,
        description: str,
        author: str,
        base: str | None = None,
        base_sha: str | None = None,
    ) -> Discussion:
        """Open a discussion, or with `base` an empty draft of a pull request."""
        with self.lock:
            num = len(self.discussions) + 1
            discussion = Discussion(num, title, description, author, datetime.now(UTC))
            if base is not None:
                discussion.status, discussion.base = "draft", base
                discussion.base_sha = base_sha or self.resolve(base).sha
                self.refs[discussion.ref] = discussion.base_sha
            self.discussions[num] = discussion
            return discussion

    def conflicts(self, request: Discussion) -> list[str]:
        """Files that a pull request and its branch have changed since, each in its own way."""
        base, ours, theirs = self._three_trees(request)
        return [
            p for p in _changed(base, theirs) if ours.get(p) not in (base.get(p), theirs.get(p))
        ]

    def merge(self, request: Discussion, author: str) -> Commit:
        """Merge a pull request; raises HubError (409) on conflicts or if it is not open."""
        with self.lock:
            if request.base is None or request.status in ("merged", "closed"):
                raise HubError(409, f"Discussion {request.num} cannot be merged: {request.status}")
            if conflicts := self.conflicts(request):
                raise HubError(409, f"Pull request has conflicts: {', '.join(conflicts)}")
            base, ours, theirs = self._three_trees(request)
            changes = [
                Put(path, theirs[path]) if path in theirs else Delete(path)
                for path in _changed(base, theirs)
                if ours.get(path) != theirs.get(path)
            ]
            title = f"{request.title} (#{request.num})"
            merged = self.commit(changes, author=author, title=title, revision=request.base)
            request.status, request.merge_sha = "merged", merged.sha
            return merged

    def create_ref(self, ref: str, revision: str) -> None:
        """Create a branch (refs/heads/…) or tag (refs/tags/…); HubError 409 if it exists."""
        with self.lock:
            if _BAD_REF.search(ref.split("/", 2)[2]):
                raise HubError(400, f"Invalid reference name: {ref}")
            if ref in self.refs:
                raise HubError(409, f"Reference already exists: {ref}")
            self.refs[ref] = self.resolve(revision).sha

    def delete_ref(self, ref: str) -> None:
        """Delete a branch other than main, or a tag; HubError 404 if it does not exist."""
        with self.lock:
            if ref == MAIN:
                raise HubError(403, "The main branch cannot be deleted")
            if self.refs.pop(ref, None) is None:
                raise revision_not_found(ref)

    def _writable(self, revision: str) -> str:
        for ref in (revision, f"refs/heads/{revision}"):
            if ref in self.refs and not ref.startswith("refs/tags/"):
                return ref
        raise revision_not_found(revision)

    def _child(
        self, parent: Commit, changes: Iterable[Change], author: str, title: str, message: str
    ) -> Commit:
        tree = dict(parent.tree)
        for change in changes:
            change.apply(tree, parent.sha)
        return Commit.make(parent.sha, tree, author, title, message)

    def _record(self, ref: str, commit: Commit) -> Commit:
        self._commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit

    def _three_trees(self, request: Discussion) -> tuple[Tree, Tree, Tree]:
        assert request.base is not None and request.base_sha is not None
        base = self.files(request.base_sha)
        return base, self.files(request.base), self.files(request.ref)


def _changed(before: Tree, after: Tree) -> list[str]:
    return sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))
