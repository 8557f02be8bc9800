"""What the Hub answers when it refuses, in the terms by which its clients tell refusals apart."""

from collections.abc import Mapping
from typing import Literal

Code = Literal["RepoNotFound", "RevisionNotFound", "EntryNotFound", "GatedRepo"]


class HubError(Exception):
    """A refusal: HTTP status, message (X-Error-Message) and, where one exists, X-Error-Code."""

    def __init__(
        self,
        status: int,
        message: str,
        code: Code | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers or {})


def repo_not_found(*, anonymous: bool) -> HubError:
    """The one answer for a missing repo and for one that the caller may not know of."""
    if anonymous:
        return HubError(401, "Invalid username or password.", "RepoNotFound")
    return HubError(404, "Repository not found", "RepoNotFound")


def revision_not_found(revision: str) -> HubError:
    """No branch, tag, pull request or commit has this name."""
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def entry_not_found(path: str, commit: str, message: str | None = None) -> HubError:
    """The revision exists, the path in it does not; clients cache that fact by commit."""
    return HubError(
        404, message or f"{path} does not exist", "EntryNotFound", {"X-Repo-Commit": commit}
    )
