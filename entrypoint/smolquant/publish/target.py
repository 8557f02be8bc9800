"""The target repository as it is before the work, and checks of what a run may do there.

Everything is read at one commit, so that it is consistent whatever is pushed meanwhile.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from smolquant import record
from smolquant.checkpoint.download import Listing, RemoteFile, fetch, list_files
from smolquant.checkpoint.files import README
from smolquant.errors import HubError, InputError
from smolquant.hub import HOW_TO_SIGN_IN, Hub, OddAnswer, hub_errors
from smolquant.publish.branches import Branch, find_branches
from smolquant.publish.front_matter import Readme, check_kinds, readme_text
from smolquant.record import InvalidRecord, VariantRecord
from smolquant.report import overview
from smolquant.text import one_line

_LARGEST_TEXT = 64 * 2**20
"""Bytes. A record of a model with a hundred thousand tensors has about 20 MiB."""
_LARGEST_PICTURE = 2**20
"""Bytes. Ours of many variants has some 20 kB."""


@dataclass(frozen=True)
class Target:
    """The target repository at one commit."""

    repo_id: str
    exists: bool
    head: str | None = None
    """The commit sha at which the rest was read; None for a missing repository."""
    readme: str | None = None
    """The root card as it is, line ends included."""
    records: Mapping[str, VariantRecord] = field(default_factory=dict)
    """Every readable ``*/quantization.json``, by subfolder."""
    unreadable: tuple[str, ...] = ()
    """Subfolders with a quantization.json that this version cannot read, or whose files are missing."""
    root_files: Mapping[str, RemoteFile] = field(default_factory=dict)
    has_another_picture: bool = False
    """Whether a file of somebody else's has the name of our picture, so that there is none."""
    folders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The files in and below each subfolder, as paths in the subfolder."""
    branches: Mapping[str, Branch] = field(default_factory=dict)
    """The branches that have the names of variants; of now, whichever commit the rest was read at."""

    @property
    def own_branches(self) -> set[str]:
        """The variants that have a branch of smolquant's making."""
        return {name for name, one in self.branches.items() if one.whose == "ours"}


def inspect_target(hub: Hub, repo_id: str, revision: str | None = None) -> Target:
    """Read what is in a repository; one that cannot be seen counts as missing.

    Args:
        revision: a commit or pull request; None for the head of the main branch.

    Raises:
        HubError: it is gated, the token is not accepted, or the Hub cannot be reached.
        InputError: the id is not valid, or the README or its front matter cannot be read.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    with hub_errors(repo_id, f"looking into {repo_id}"):
        try:
            listing = list_files(hub, repo_id, revision)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return Target(repo_id, exists=False)
        branches = find_branches(hub, repo_id)
    files = listing.files
    folders: dict[str, list[str]] = {}
    for path in sorted(files):
        folder, slash, name = path.partition("/")
        if slash:
            folders.setdefault(folder, []).append(name)
    texts = _read_texts(hub, repo_id, listing)
    records, unreadable = _read_records(texts, folders)
    return Target(
        repo_id,
        exists=True,
        head=listing.commit,
        # A card that cannot be edited is refused now, not after hours of work.
        readme=readme_text(texts[README], repo_id) if README in texts else None,
        records=records,
        unreadable=unreadable,
        root_files={path: file for path, file in files.items() if "/" not in path},
        has_another_picture=overview.FILE_NAME in files
        and not overview.is_ours(texts.get(overview.FILE_NAME, b"")),
        folders={folder: tuple(names) for folder, names in folders.items()},
        branches=branches,
    )


def check_write_access(hub: Hub, target: Target, *, create_pr: bool = False) -> None:
    """Make sure, before any work, that the run will be able to publish.

    Args:
        create_pr: in a pull request, which whoever may read a repository may open.

    Raises:
        HubError: there is no token, or it does not have the rights.
    """
    repo_id = target.repo_id
    if not hub.has_token():
        raise HubError(f"Publishing to {repo_id} needs a Hugging Face token.", hint=HOW_TO_SIGN_IN)
    if target.exists and not create_pr:
        with hub_errors(repo_id, f"getting write access to {repo_id}"):
            hub.api.auth_check(repo_id, write=True)
        return
    with hub_errors(repo_id, "finding out whose the token is"):
        account = hub.api.whoami()
        try:
            reason = "" if target.exists else _why_not_create(account, repo_id)
            is_for_reading = _role(account) == "read"
        except (AttributeError, TypeError) as error:
            raise OddAnswer("an account is described in another way") from error
    if target.exists and is_for_reading:
        raise HubError(
            f"The token has the role read, with which no pull request can be opened in {repo_id}.",
            hint="Give a token with the role write, from https://huggingface.co/settings/tokens.",
        )
    if reason:
        raise HubError(
            f"{repo_id} does not exist (or is private and hidden from this token), and cannot be "
            f"created: {reason}.",
            hint="Check the spelling, or give a token that may write there, from "
            "https://huggingface.co/settings/tokens.",
        )


def check_readme(hub: Hub, readme: str | None, place: str) -> None:
    """Make sure, before any work, that the Hub will take a card with this front matter.

    Args:
        readme: the card as its owner wrote it; None for none.
        place: the name of the card in messages.

    Raises:
        InputError: the Hub refuses it, with its reasons.
        HubError: the Hub cannot be asked.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
    )

    if readme is None or not Readme.split(readme).front:
        return
    check_kinds(readme, place)
    with hub_errors(place, f"checking the front matter of {place}"):
        response = get_session().post(
            f"{hub.api.endpoint}/api/validate-yaml",
            json={"content": readme, "repoType": "model"},
            headers=build_hf_headers(token=hub.api.token),
        )
        if response.status_code != 400:
            hf_raise_for_status(response)
            return
        try:
            said = "; ".join(one_line(str(one["message"])) for one in response.json()["errors"])
        except (LookupError, TypeError) as error:
            raise OddAnswer("a refused card has no reasons") from error
    raise InputError(
        f"The Hub does not accept the front matter of {place}: {said}.",
        hint="Correct it, then run again; nothing was done so far.",
    )


def check_folder_is_ours(target: Target, variant: str) -> None:
    """Make sure that a variant's subfolder is free, or holds a variant.

    Raises:
        InputError: the folder holds something else, which publishing would delete.
    """
    names = target.folders.get(variant, ())
    if names and record.FILE_NAME not in names:
        raise InputError(
            f"{variant}/ in {target.repo_id} holds something other than a variant ({names[0]}).",
            hint="Move it away, or add --force to replace everything in it.",
        )


def read_cards(hub: Hub, target: Target, variants: Sequence[str]) -> dict[str, str]:
    """The variants' own cards as they are published, by variant; one that cannot be read is left out.

    Raises:
        HubError: the repository cannot be read.
    """
    if not variants:
        return {}
    doing = f"reading the cards of {target.repo_id}"
    with hub_errors(target.repo_id, doing):
        listing = list_files(hub, target.repo_id, target.head)
    paths = [f"{variant}/{README}" for variant in variants]
    wanted = {path: listing.files[path] for path in paths if path in listing.files}
    if not wanted:
        return {}
    folder, cards = fetch(hub, target.repo_id, listing.commit, wanted, doing=doing), {}
    for variant in variants:
        with suppress(InputError, FileNotFoundError):
            content = (folder / variant / README).read_bytes()
            cards[variant] = readme_text(content, f"{target.repo_id}'s {variant}")
    return cards


def check_branches(hub: Hub, target: Target, variants: Iterable[str]) -> None:
    """Make sure that each variant may have the branch of its name.

    Raises:
        InputError: a branch holds something that smolquant has not put there, or a tag has the name.
    """
    if not target.exists:
        return
    with hub_errors(target.repo_id, f"reading the tags of {target.repo_id}"):
        tags = {ref.name for ref in hub.api.list_repo_refs(target.repo_id).tags}
    for variant in variants:
        branch = target.branches.get(variant)
        if branch is not None and branch.whose == "another's":
            raise InputError(
                f"The branch {variant} of {target.repo_id} has commits that smolquant has not made, and "
                "--branches would replace what they put there.",
                hint="Rename or delete that branch first, or leave --branches out.",
            )
        if variant in tags:
            raise InputError(
                f"{target.repo_id} has a tag {variant}, and a revision of that name could then be either, "
                "the tag or the branch.",
                hint="Delete or rename that tag first, or leave --branches out.",
            )


def check_tag(hub: Hub, target: Target, tag: str, expected: str | None = None) -> None:
    """Make sure that a tag is free, or already names the right commit.

    Args:
        expected: the commit that the tag is to name; None when that commit does not exist yet, so that
            any existing tag of this name is in the way.

    Raises:
        InputError: the tag names another commit.
    """
    commit = find_tag(hub, target.repo_id, tag) if target.exists else None
    if commit is not None and commit != expected:
        raise InputError(
            f"The tag {tag} already exists in {target.repo_id}, at commit {commit[:7]}.",
            hint="Choose another tag, or delete that one first; smolquant never moves a tag.",
        )


def find_tag(hub: Hub, repo_id: str, tag: str) -> str | None:
    """The commit that a tag names; None if there is no such tag."""
    with hub_errors(repo_id, f"reading the tags of {repo_id}"):
        tags = hub.api.list_repo_refs(repo_id).tags
    return next((ref.target_commit for ref in tags if ref.name == tag), None)


def _read_texts(hub: Hub, repo_id: str, listing: Listing) -> dict[str, bytes]:
    """The root card, its picture, and every record, but what is too large for one, by path."""
    wanted = {
        path: file
        for path, file in listing.files.items()
        if path == README
        or (path == overview.FILE_NAME and file.size <= _LARGEST_PICTURE)
        or (
            (path.count("/") == 1 and path.endswith(f"/{record.FILE_NAME}"))
            and file.size <= _LARGEST_TEXT
        )
    }
    if not wanted:
        return {}
    folder = fetch(hub, repo_id, listing.commit, wanted, doing=f"reading the card of {repo_id}")
    return {path: (folder / path).read_bytes() for path in wanted}


def _read_records(
    texts: Mapping[str, bytes], folders: Mapping[str, list[str]]
) -> tuple[dict[str, VariantRecord], tuple[str, ...]]:
    records, unreadable = {}, []
    for folder, names in folders.items():
        if record.FILE_NAME not in names:
            continue
        text = texts.get(f"{folder}/{record.FILE_NAME}")
        try:
            if text is None:
                raise InvalidRecord("too large")
            published = VariantRecord.in_folder(folder, text)
            if missing := set(published.files) - set(names):
                raise InvalidRecord(f"{len(missing)} of its files are missing")
            records[folder] = published
        except InvalidRecord:
            unreadable.append(folder)
    return records, tuple(unreadable)


def _why_not_create(account: Mapping[str, Any], repo_id: str) -> str:
    """Why a token may not create a repository; empty if it may, or if its rights are not known.

    ``account`` is the answer of ``GET /api/whoami-v2``.
    """
    namespace = repo_id.partition("/")[0]
    if _role(account) == "read":
        return "the token has the role read"
    roles = {org.get("name"): org.get("roleInOrg") for org in account.get("orgs", ())}
    if namespace != account.get("name") and namespace not in roles:
        return f"the token is {account.get('name')}'s, who is no member of {namespace}"
    if roles.get(namespace) == "read":
        return f"{account.get('name')} may only read in {namespace}"
    if _role(account) == "fineGrained":
        scopes = account["auth"]["accessToken"].get("fineGrained", {}).get("scoped", ())
        writable = {
            scope.get("entity", {}).get("name")
            for scope in scopes
            if "repo.write" in scope.get("permissions", ())
        }
        if not writable & {namespace, repo_id}:
            return f"the fine-grained token has no write rights on {namespace}"
    return ""


def _role(account: Mapping[str, Any]) -> str | None:
    """What a token may do at all: ``read``, ``write``, or ``fineGrained``; keyless ones have none."""
    token = account.get("auth", {}).get("accessToken") or {}
    role: str | None = token.get("role")
    return role
