"""A branch for each variant, of its name and with it at the root, for servers that know no subfolders.

A branch repeats what stands on main. The Hub copies the large files by itself, in one commit that also
deletes what the branch has from main and the variant does not need. What others have committed to a branch
of such a name is never undone.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from smolquant.checkpoint.download import Listing, RemoteFile, fetch, list_files
from smolquant.checkpoint.files import is_code, is_license
from smolquant.errors import HubError, SmolquantError
from smolquant.hub import Hub, OddAnswer, hub_errors
from smolquant.publish.attempts import MAX_TRIES, Outcome, pause_after
from smolquant.record import FILE_NAME, InvalidRecord, VariantRecord
from smolquant.schemes import BY_VARIANT, in_order

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

BRANCH_TITLE = "Put the variant at the root of its branch"
"""The title of each of our commits on a branch, by which it is told from others'."""
_GITATTRIBUTES = ".gitattributes"
"""Each branch has its own, which the Hub keeps."""
_LARGEST_RECORD = 64 * 2**20
"""Bytes, several times those of the largest models' records."""


@dataclass(frozen=True)
class Branch:
    """A branch that has a variant's name."""

    head: str
    """A commit sha."""
    files: Mapping[str, RemoteFile]
    whose: Literal["ours", "main's", "another's"]
    """``ours``: the variant is at its root, and smolquant has made its last commit. ``main's``: all of its
    commits are main's, so that nothing is lost with it; an interrupted run may leave one."""


@dataclass(frozen=True)
class InStep:
    """A branch that has what main has of its variant."""

    variant: str
    url: str
    changed: bool
    """Whether that took a commit."""


def find_branches(
    hub: Hub, repo_id: str, variants: Collection[str] = BY_VARIANT
) -> dict[str, Branch]:
    """The branches of a repository that have the names of ``variants``, by that name.

    Raises:
        Exception: whatever the client raises; :func:`smolquant.hub.hub_errors` explains it.
    """
    refs = hub.api.list_repo_refs(repo_id).branches
    heads = {ref.name: ref.target_commit for ref in refs if ref.name in variants}
    return {variant: _read(hub, repo_id, variant, head) for variant, head in heads.items()}


def put_in_step(
    hub: Hub, repo_id: str, records: Mapping[str, VariantRecord], notify: Callable[[str], None]
) -> Iterator[InStep]:
    """Make and update the branch of every variant, one after the other; one that is in step gets no commit.

    Args:
        records: the variants that are published on main; one that is no longer there is passed over.
        notify: gets a line for people at each step.

    Raises:
        HubError: the Hub refused or cannot be reached, or a branch is somebody's by now. It tells which
            branches are in step and which are not.
    """
    variants = [name for name in in_order(records) if name in BY_VARIANT]
    for number, variant in enumerate(variants):
        try:
            with hub_errors(repo_id, f"putting the branch {variant} in step with main"):
                changed = _put_in_step(hub, repo_id, records[variant], notify)
        except SmolquantError as error:
            done = f"in step: {', '.join(variants[:number]) or 'none'}"
            raise HubError(
                f"{', '.join(variants)} {'is' if len(variants) == 1 else 'are'} published on main of "
                f"{repo_id}, but not every variant has its branch yet ({done}; not known to be: "
                f"{', '.join(variants[number:])}). {error.message}",
                hint=f"Run the same command again, which then only has the branches to do. {error.hint}",
            ) from error
        if changed is not None:
            yield InStep(variant, hub.url(repo_id, "", variant), changed)


def delete_branch(hub: Hub, repo_id: str, variant: str) -> bool:
    """Delete the branch of a variant that main has no longer; that it is gone already is fine.

    It is read again before, since others may have committed to it after it was looked at.

    Returns:
        False where it is not, or no longer, of smolquant's making, and stays.

    Raises:
        HubError: the Hub refused or cannot be reached.
    """
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        with hub_errors(repo_id, f"deleting the branch {variant}"), suppress(RevisionNotFoundError):
            branch = find_branches(hub, repo_id, [variant]).get(variant)
            if branch is not None and branch.whose != "ours":
                return False
            if branch is not None:
                hub.api.delete_branch(repo_id, branch=variant)
    except HubError as error:
        raise HubError(
            f"{variant} is removed from main of {repo_id}, but its branch is still there. {error.message}",
            hint=f"Run the same command again, which then only has the branch to delete. {error.hint}",
        ) from error
    return True


def _put_in_step(
    hub: Hub, repo_id: str, made: VariantRecord, notify: Callable[[str], None]
) -> bool | None:
    """Commit until the branch is as main wants it, and return whether that took a commit.

    A commit whose answer is lost may have been made, and what the client copies by itself is held against
    no digest. So the branch is read again after each commit.

    Returns:
        None where main has the variant no longer.
    """
    variant, odd = made.variant, None
    for attempt in range(1, MAX_TRIES + 1):
        main = list_files(hub, repo_id, None)
        wanted = _wanted(main.files, made)
        if FILE_NAME not in wanted:
            return None
        branch = find_branches(hub, repo_id, [variant]).get(variant)
        if branch is None:
            notify(f"Creating the branch {variant} of {repo_id}")
            hub.api.create_branch(repo_id, branch=variant, revision=main.commit, exist_ok=True)
            branch = Branch(main.commit, main.files, "main's")
        if branch.whose == "another's":
            raise HubError(
                f"The branch {variant} has a commit by now that smolquant has not made.",
                hint="Rename or delete that branch before.",
            )
        operations = _operations(branch, main, wanted)
        if not operations:
            return attempt > 1
        if odd is not None:
            raise odd
        try:
            hub.api.create_commit(
                repo_id,
                operations,
                commit_message=BRANCH_TITLE,
                revision=variant,
                parent_commit=branch.head,
            )
        except Exception as error:
            outcome = Outcome.of(error)
            if outcome is Outcome.REFUSED or attempt == MAX_TRIES:
                raise
            odd = error if outcome is Outcome.ODD else None
            pause = pause_after(attempt, error)
            notify(f"The Hub has not confirmed the commit on {variant}; looking in {pause:.0f} s")
            time.sleep(pause)
    raise OddAnswer(f"the branch {variant} is never as it was put")


def _wanted(files: Mapping[str, RemoteFile], made: VariantRecord) -> dict[str, str]:
    """Path on the branch -> path on main of what belongs there.

    That is the variant's folder and, as the branch stands alone, the license files from the root of main
    and the code of the model's own.
    """
    inside = f"{made.variant}/"
    beside = (path for path in files if is_license(path) or (made.runs_own_code and is_code(path)))
    return {path: path for path in beside} | {
        path.removeprefix(inside): path for path in files if path.startswith(inside)
    }


def _operations(
    branch: Branch, main: Listing, wanted: Mapping[str, str]
) -> "list[CommitOperationCopy | CommitOperationDelete]":
    """What puts a branch in step."""
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    return [
        *(
            CommitOperationCopy(source, path, src_revision=main.commit)
            for path, source in wanted.items()
            if branch.files.get(path) != main.files[source]
        ),
        *(
            CommitOperationDelete(path, is_folder=False)
            for path in branch.files
            if path not in wanted and path != _GITATTRIBUTES
        ),
    ]


def _read(hub: Hub, repo_id: str, variant: str, head: str) -> Branch:
    listing = list_files(hub, repo_id, head)
    last = next(iter(hub.api.list_repo_commits(repo_id, revision=head)), None)
    whose: Literal["ours", "main's", "another's"] = "another's"
    if last is not None and last.title == BRANCH_TITLE and _holds(hub, repo_id, variant, listing):
        whose = "ours"
    elif any(commit.commit_id == head for commit in hub.api.list_repo_commits(repo_id)):
        whose = "main's"
    return Branch(listing.commit, listing.files, whose)


def _holds(hub: Hub, repo_id: str, variant: str, listing: Listing) -> bool:
    """Whether there is a record at the root of a commit, and not that of another variant.

    One that cannot be read may have been damaged on its way, and is put right.
    """
    file = listing.files.get(FILE_NAME)
    if file is None or file.size > _LARGEST_RECORD:
        return False
    doing = f"reading the branch {variant}"
    folder = fetch(hub, repo_id, listing.commit, {FILE_NAME: file}, doing=doing)
    try:
        return VariantRecord.from_json((folder / FILE_NAME).read_bytes()).variant == variant
    except InvalidRecord:
        return True
