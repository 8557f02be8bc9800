"""One commit: the root card and its picture, the main model where the rule asks for it, and the variants.

Everything before the commit only uploads blobs, which no branch refers to; so a failure leaves the
repository as it was. The commit names the head that its cards were rendered for, and where others
have pushed meanwhile, all that depends on the head is made again.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from smolquant.checkpoint.download import is_commit
from smolquant.errors import HubError, InputError
from smolquant.hub import Hub, OddAnswer, hub_errors, upload_errors
from smolquant.publish.attempts import MAX_TRIES, Outcome, pause_after
from smolquant.publish.main_model import MainModelChange, main_model_change
from smolquant.publish.operations import Publication, changes_card
from smolquant.publish.operations import operations as operations_on
from smolquant.publish.preupload import refuse_ignored
from smolquant.publish.target import Target, find_tag, inspect_target

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from smolquant.publish.operations import CommitOperation


@dataclass(frozen=True)
class Published:
    """The addresses of what was published."""

    repo_url: str
    commit_sha: str
    commit_url: str
    pull_request_url: str | None
    variant_urls: Mapping[str, str]


def publish(
    hub: Hub, target: Target, publication: Publication, *, notify: Callable[[str], None]
) -> Published:
    """Create the repository if it is missing, and commit.

    A repository that this call created and could not fill stays, empty: deleting one is not ours
    to do, and the next run finds the uploaded files there.

    Args:
        target: as inspected before; inspected again when others have pushed since.
        notify: gets a line for people at each step.

    Raises:
        HubError: the Hub refused or cannot be reached, or others kept pushing.
        InputError: what others have pushed meanwhile conflicts: different main weights.
    """
    repo_id = target.repo_id
    if not target.exists:
        notify(f"Creating {repo_id}")
        target = create_repo(hub, repo_id, private=publication.private)
    commit = _commit_on_head(hub, target, publication, notify)
    revision = commit.pr_revision or "main"
    return Published(
        repo_url=hub.url(repo_id),
        commit_sha=commit.oid,
        commit_url=commit.commit_url,
        pull_request_url=commit.pr_url,
        variant_urls={name: hub.url(repo_id, name, revision) for name in publication.variants},
    )


def tag_commit(hub: Hub, repo_id: str, tag: str, commit: str) -> None:
    """Tag a commit, given by its sha; that it has the tag already is fine.

    Raises:
        HubError: another commit was given the tag meanwhile, or the Hub refused.
    """
    from huggingface_hub.errors import HfHubHTTPError

    with hub_errors(repo_id, f"tagging {commit[:7]} (which is published) as {tag}"):
        try:
            hub.api.create_tag(repo_id, tag=tag, revision=commit)
            return
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
    if find_tag(hub, repo_id, tag) != commit:
        raise HubError(
            f"The variants are published ({commit[:7]}), but {tag} names another commit by now.",
            hint="Choose another tag for this commit, or delete that one first.",
        )


def create_repo(hub: Hub, repo_id: str, *, private: bool) -> Target:
    """Create a repository, empty, unless another run was first.

    Raises:
        HubError: the Hub refused, or cannot be reached.
    """
    with hub_errors(repo_id, f"creating {repo_id}"):
        # Not private leaves it to the organization's default. exist_ok: another run may be first.
        hub.api.create_repo(repo_id, private=private or None, exist_ok=True)
    target = inspect_target(hub, repo_id)
    if not target.exists:
        raise HubError(
            f"{repo_id} was created, and cannot be seen.",
            hint="Give the token read access to it, then run again.",
        )
    return target


def _commit_on_head(
    hub: Hub, target: Target, publication: Publication, notify: Callable[[str], None]
) -> "CommitInfo":
    """Commit on the head of the branch, following it while others push.

    A commit whose answer is lost may have been made. Making it again is safe, since it names its parent,
    and is only done after looking: what was made is not made twice.
    """
    for attempt in range(1, MAX_TRIES + 1):
        operations = operations_on(target, publication)
        doing, to = ("Changing", "of") if publication.withdrawn else ("Uploading", "to")
        notify(f"{doing} {len(operations)} files {to} {target.repo_id}")
        with hub_errors(target.repo_id, f"publishing to {target.repo_id}"):
            _upload(hub, target, publication, operations)
            try:
                return _create_commit(hub, target, publication, operations)
            except Exception as error:
                outcome = Outcome.of(error)
                if outcome is Outcome.REFUSED:
                    raise
                pause = pause_after(attempt, error)
                notify(f"The Hub has not confirmed the commit; looking for it in {pause:.0f} s")
                time.sleep(pause)
                if made := _find_commit(hub, target, publication, error):
                    notify(f"The Hub has made the commit {made.oid[:7]}, and its answer was lost")
                    return made
                if outcome is Outcome.ODD or attempt == MAX_TRIES:
                    raise
        before, target = target, inspect_target(hub, target.repo_id)
        if target.head == before.head:
            notify("The Hub has not made the commit; trying again")
            continue
        notify(f"Others have pushed to {target.repo_id} meanwhile; starting from their commit")
        _refuse_changed_variants(before, target, publication)
    raise AssertionError("unreachable: the last try returns or raises")


def _find_commit(
    hub: Hub, target: Target, publication: Publication, error: Exception
) -> "CommitInfo | None":
    """The commit or pull request of ``publication`` that was made on ``target``; None if there is none.

    Args:
        error: what making the commit ended with.

    Raises:
        HubError: the Hub does not tell.
    """
    from huggingface_hub import CommitInfo

    repo_id = target.repo_id
    try:
        with hub_errors(repo_id, f"looking whether {repo_id} has the commit"):
            for revision, pr_url in _candidates(hub, target, publication):
                there = inspect_target(hub, repo_id, revision)
                if there.head is not None and _is_published(there, publication):
                    return CommitInfo(
                        commit_url=f"{hub.url(repo_id)}/commit/{there.head}",
                        commit_message=publication.title,
                        commit_description="",
                        oid=there.head,
                        pr_url=pr_url,
                        _endpoint=hub.api.endpoint,
                    )
    except HubError as unknown:
        raise HubError(
            f"{unknown.message} So it is not known whether the variants are published.",
            hint="Run again later: what is published is not made again.",
        ) from error
    return None


def _candidates(
    hub: Hub, target: Target, publication: Publication
) -> "Iterator[tuple[str, str | None]]":
    """The revisions that may be this run's commit, each with the address of its pull request."""
    if publication.create_pr:
        found = hub.api.get_repo_discussions(target.repo_id, discussion_type="pull_request")
        ours = [one for one in found if one.title == publication.title and one.status == "open"]
        for one in sorted(ours, key=lambda pull_request: -pull_request.num):
            yield f"refs/pr/{one.num}", one.url
        return
    commits = hub.api.list_repo_commits(target.repo_id)
    since = list(takewhile(lambda commit: commit.commit_id != target.head, commits))
    if since and since[-1].title == publication.title:
        yield since[-1].commit_id, None


def _is_published(there: Target, publication: Publication) -> bool:
    """Whether a commit has what was to be published."""
    main = publication.main_model
    return (
        all(there.records.get(name) == made for name, made in publication.records.items())
        and all(name not in there.folders for name in publication.withdrawn)
        and not (publication.cards and changes_card(there, publication))
        and (main is None or main_model_change(main, there.root_files) == MainModelChange())
    )


def _refuse_changed_variants(before: Target, now: Target, publication: Publication) -> None:
    """Refuse where others have changed a variant of which shards are uploaded already.

    The client leaves a file out of a commit that stood in the repository when it was uploaded.
    """
    changed = [v for v in publication.records if before.records.get(v) != now.records.get(v)]
    if publication.preuploaded and changed:
        raise HubError(
            f"Others have changed {', '.join(changed)} of {now.repo_id} while it was being published.",
            hint="Run again when they are done.",
        )


def _upload(
    hub: Hub, target: Target, publication: Publication, operations: "list[CommitOperation]"
) -> None:
    """Upload what the commit names, and make sure that it will hold all of that, as it was recorded."""
    from huggingface_hub import CommitOperationAdd

    additions = [one for one in operations if isinstance(one, CommitOperationAdd)]
    size = sum(one.upload_info.size for one in additions)
    with hub.sending(size), upload_errors(target.repo_id):
        hub.api.preupload_lfs_files(
            target.repo_id, additions, create_pr=publication.create_pr, free_memory=False
        )
    refuse_ignored(target.repo_id, additions)
    main_model = publication.main_model.files if publication.main_model else {}
    known = {name: file.sha256 for name, file in main_model.items()}
    for variant, made in publication.records.items():
        known |= {f"{variant}/{name}": file.sha256 for name, file in made.files.items()}
    for addition in additions:
        path = addition.path_in_repo
        if path in known and addition.upload_info.sha256.hex() != known[path]:
            raise InputError(
                f"{path} was changed while it was being published; the repository is as it was.",
                hint="Run again when nothing else writes to the folders of the model and the output.",
            )


def _create_commit(
    hub: Hub, target: Target, publication: Publication, operations: "list[CommitOperation]"
) -> "CommitInfo":
    """Make the commit of what is uploaded.

    Raises:
        InputError: the Hub does not accept the root card's front matter.
        OddAnswer: the Hub does not say which commit it has made.
        Exception: whatever else the client raises.
    """
    try:
        with warnings.catch_warnings():
            # That a card has no front matter, which is its owner's to decide.
            warnings.filterwarnings("ignore", "Warnings while validating metadata", UserWarning)
            made = hub.api.create_commit(
                target.repo_id,
                operations,
                commit_message=publication.title,
                parent_commit=target.head,
                create_pr=publication.create_pr,
            )
    except ValueError as error:
        if "README.md" not in str(error):
            raise
        raise InputError(
            f"The Hub does not accept the front matter of README.md: {error}",
            hint="Correct it in the repository, then run again.",
        ) from error
    if not is_commit(made.oid):
        raise OddAnswer(f"the commit is {made.oid!r}")
    return made
