"""``smolquant remove``: a variant taken out again, with its part of the card, in one commit.

As with any commit, what was published stays in the repository's history, and where a tag names it.
"""

from collections.abc import Callable
from pathlib import Path

import click

from smolquant.errors import HubError, InputError
from smolquant.hub import Hub
from smolquant.parameters import hub_token
from smolquant.places import is_folder
from smolquant.publish.branches import delete_branch
from smolquant.publish.commit import publish
from smolquant.publish.local import remove_saved
from smolquant.publish.operations import Publication
from smolquant.publish.target import Target, check_write_access, inspect_target
from smolquant.report.console import Console
from smolquant.runtime.contents import missing_variant, require_place, variants_in
from smolquant.schemes import BY_VARIANT, in_order
from smolquant.tokens import masked_token


@click.command(short_help="Take a variant out of a repository again.")
@click.argument("repo_or_folder")
@click.argument("variant")
@hub_token("Hugging Face token with write rights.")
@click.option(
    "--create-pr",
    is_flag=True,
    help="Propose it in a pull request on the Hub instead of changing the main branch.",
)
@click.pass_context
def remove(
    context: click.Context,
    /,
    repo_or_folder: str,
    variant: str,
    token: str | None,
    create_pr: bool,
) -> int:
    """Take VARIANT (such as int8) and its part of the card out of REPO_OR_FOLDER again.

    In a repository, that is one commit; then the branch of its name is deleted, if --branches has made it.
    """
    console: Console = context.obj
    token = masked_token(token, console.mask)
    require_place(repo_or_folder)
    if not is_folder(repo_or_folder):
        hub = Hub(token, notify=console.info)
        from_repository(hub, repo_or_folder, variant, create_pr=create_pr, notify=console.info)
        return 0
    if create_pr:
        raise InputError(
            f"--create-pr was given, but {repo_or_folder} is a folder.",
            hint="Leave --create-pr out, or name the repository.",
        )
    folder = Path(repo_or_folder)
    if variant not in variants_in(folder):
        raise missing_variant(repo_or_folder, variant, variants_in(folder))
    remove_saved(folder, variant)
    console.info(f"Removed {variant} from {repo_or_folder}")
    return 0


def from_repository(
    hub: Hub, repo_id: str, variant: str, *, create_pr: bool, notify: Callable[[str], None]
) -> None:
    """Take a variant out of a repository on the Hub, by a commit or a pull request.

    Args:
        notify: gets a line for people at each step.

    Raises:
        InputError: there is no such variant, or the card cannot be edited.
        HubError: the Hub refused or cannot be reached, or others kept pushing.
    """
    target = inspect_target(hub, repo_id)
    if not target.exists:
        raise HubError(
            f"{repo_id} does not exist, or is private and this token may not see it.",
            hint="Check the spelling, or give a token that has access (HF_TOKEN).",
        )
    there = _variants(target)
    has_branch = variant in target.own_branches and not create_pr
    if variant not in there and not has_branch:
        raise missing_variant(repo_id, variant, there)
    check_write_access(hub, target, create_pr=create_pr)
    if variant in there:
        publication = Publication({}, {}, None, withdrawn=(variant,), create_pr=create_pr)
        made = publish(hub, target, publication, notify=notify)
        done = "Proposed to remove" if create_pr else "Removed"
        notify(f"{done} {variant} from {repo_id}: {made.pull_request_url or made.commit_url}")
    if has_branch and delete_branch(hub, repo_id, variant):
        notify(f"Deleted the branch {variant}")
    elif variant in target.own_branches and create_pr:
        notify(
            f"The branch {variant} stays. When the pull request is merged, the same command without "
            "--create-pr deletes it."
        )
    elif variant in target.branches:
        notify(f"The branch {variant} stays: smolquant has not made what it holds.")


def _variants(target: Target) -> list[str]:
    """The variants of a repository, those among them that cannot be read."""
    damaged = (name for name in target.unreadable if name in BY_VARIANT)
    return in_order({*target.records, *damaged})
