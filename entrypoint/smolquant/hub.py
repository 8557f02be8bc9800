"""The Hub's client: how it is set up, and what its errors mean for the user.

This module knows nothing of variants. The client library is imported when it is first used.
"""

import functools
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from smolquant import __version__
from smolquant.errors import HubError, InputError, SmolquantError
from smolquant.places import nearby_folders
from smolquant.secrecy import remember
from smolquant.text import one_of, quoted
from smolquant.tokens import clean_token
from smolquant.transfer import Meter, bars, following_xet

if TYPE_CHECKING:
    from httpx2 import Response
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

DEFAULT_TIMEOUT = 120
"""Seconds, see :class:`Hub`."""

HOW_TO_SIGN_IN = (
    "Set HF_TOKEN (in a workflow: the input hf-token, from a secret) to a token with write rights "
    "from https://huggingface.co/settings/tokens, or publish without one: HF_OIDC_RESOURCE and "
    "`permissions: id-token: write`."
)
_CHECK_THE_NETWORK = "Check the network, and HF_ENDPOINT if it is set, then run again."
WITHOUT_XET = "If only large files fail, set HF_HUB_DISABLE_XET=1, which sends them in another way."
_CUT_OFF = "the Hub cannot be reached"


@dataclass(frozen=True)
class Hub:
    """A Hub, and the account that is used there."""

    token: str | None = field(default=None, repr=False)
    """None leaves the choice to the client: keyless OIDC, HF_TOKEN, or a login."""
    timeout: float = DEFAULT_TIMEOUT
    """Seconds until a request has to be answered, see :mod:`smolquant.wire`."""
    notify: Callable[[str], None] = field(default=lambda text: None, repr=False)
    """Is told a line for people when the Hub has to be waited for, from any thread."""
    endpoint: str | None = None
    """None: HF_ENDPOINT, or huggingface.co."""
    progress: Callable[[str, int], AbstractContextManager[Any]] = field(
        default=lambda label, n_bytes: nullcontext(), repr=False
    )
    """Shows how files move, given what is done and the bytes that this will take: until it is left, and by
    the method ``advance`` of what it yields. None is yielded where nobody looks."""
    _meter: Meter = field(default_factory=Meter, init=False, repr=False, compare=False)

    @functools.cached_property
    def api(self) -> "HfApi":
        """The official client. A process has one HTTP client, which is the latest Hub's.

        Raises:
            InputError: the token of a login is one that no header carries.
        """
        from huggingface_hub import HfApi, get_token, set_client_factory
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        from smolquant.wire import HubClient

        disable_progress_bars()  # they would disturb the reports
        hooks = _hooks_of_the_library()
        if self.token:
            # The client's large-file transfers look for a token of their own, keyless first.
            os.environ.pop("HF_OIDC_RESOURCE", None)
        elif "HF_OIDC_RESOURCE" not in os.environ:  # which would be asked for a token now
            clean_token(get_token(), "The Hugging Face token of this machine's login")
        api = HfApi(
            endpoint=self.endpoint,
            token=self.token or None,
            library_name="smolquant",
            library_version=__version__,
        )
        set_client_factory(
            lambda: HubClient(
                api.endpoint,
                patience=self.timeout,
                notify=self.notify,
                hooks=hooks,
                sent=self._meter.move,
            )
        )
        return api

    @contextmanager
    def sending(self, n_bytes: int) -> Iterator[None]:
        """Show how files are sent, until this is left, that have so many bytes in all."""
        with self.progress("uploading", n_bytes) as shown:
            if shown is None:
                yield
                return
            with self._meter.telling(shown.advance), following_xet(shown.advance):
                yield

    @contextmanager
    def receiving(self, n_bytes: int) -> Iterator[type | None]:
        """Show how files come, until this is left, that have so many bytes in all.

        Yields:
            the class of progress bars that the client is to tell; None where nobody looks.
        """
        with self.progress("downloading", n_bytes) as shown:
            yield None if shown is None else bars(shown.advance)

    def has_token(self) -> bool:
        """Whether the client will identify itself.

        Raises:
            HubError: when keyless publishing was asked for and the exchange fails.
        """
        from huggingface_hub import get_token

        with hub_errors("the Hub", "getting a token"):
            given = self.api.token
            token = given if isinstance(given, str) else get_token()
        remember(token)
        return bool(token)

    def url(self, repo_id: str, folder: str = "", revision: str = "main") -> str:
        """The page of a repository, of one of its branches, or of a folder in it."""
        page = f"{self.api.endpoint}/{repo_id}"
        if not folder and revision == "main":
            return page
        return f"{page}/tree/{quote(revision, safe='')}/{quote(folder)}".rstrip("/")


class OddAnswer(Exception):
    """An answer of the Hub that its client took, and that is not one; for :func:`hub_errors` to explain."""


def valid_repo_id(text: str) -> bool:
    """Whether the client takes ``text`` for a repository's id: ``namespace/name``, or ``name`` alone."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


@contextmanager
def naming_folders_like(repo_id: str) -> Iterator[None]:
    """Where a repository cannot be read, name folders that may be meant: a path may look like an id.

    Raises:
        HubError: as it came, with their names in its hint.
    """
    try:
        yield
    except HubError as error:
        if similar := nearby_folders(repo_id):
            raise HubError(error.message, hint=f"{one_of(similar)}{error.hint}") from error
        raise


@contextmanager
def hub_errors(repo_id: str, doing: str) -> Iterator[None]:
    """Translate the client's errors into smolquant's.

    Args:
        repo_id: the repository that the work is about.
        doing: the work, in words that "failed" can follow: ``reading the model``.

    Raises:
        HubError: the Hub refused, or cannot be reached; it has the reason and the next step.
        InputError: the repository's id is not valid.
    """
    try:
        yield
    except SmolquantError:
        raise
    except Exception as error:
        explained = _first_explained(error, repo_id, doing)
        if explained is None:
            raise
        raise explained from error


@contextmanager
def upload_errors(repo_id: str) -> Iterator[None]:
    """Translate the errors of the client's transfer of large files that :func:`hub_errors` does not know.

    Raises:
        HubError: the transfer failed.
    """
    try:
        yield
    except RuntimeError as error:
        if error.__cause__ is not None:  # the client's wrapping of what hub_errors explains
            raise
        raise HubError(
            f"Uploading to {repo_id} failed: {quoted(error)}",
            hint=f"Run again: what has arrived is not sent again. {WITHOUT_XET}",
        ) from error


@functools.cache
def _hooks_of_the_library() -> Mapping[str, list[Callable[..., Any]]]:
    """What the client library does to each request: offline mode, request ids."""
    from huggingface_hub import get_session

    return get_session().event_hooks


def _first_explained(error: BaseException, repo_id: str, doing: str) -> SmolquantError | None:
    """The explanation of the error, or of the first of its causes that has one."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    failed = f"{doing[:1].upper()}{doing[1:]} failed"
    current: BaseException | None = error
    while current is not None:
        explained = _explain(current, repo_id, failed)
        if explained is not None:
            return explained
        current = current.__cause__
    if isinstance(error, LocalEntryNotFoundError):  # what a download makes of every lost connection
        return HubError(f"{failed}: {_CUT_OFF}.", hint=_CHECK_THE_NETWORK)
    return None


def _explain(error: BaseException, repo_id: str, failed: str) -> SmolquantError | None:
    from huggingface_hub import errors

    match error:
        case errors.HfHubHTTPError():
            return _refused(error, repo_id, failed)
        case errors.HFValidationError():
            return InputError(
                f"{failed}: {repo_id!r} is not the id of a Hub repository.",
                hint="Write it as `user/model`; a subfolder is not a part of it.",
            )
        case errors.LocalTokenNotFoundError():
            why, hint = "there is no Hugging Face token", HOW_TO_SIGN_IN
        case errors.OIDCError():
            why = f"keyless publishing was asked for, and it gave no token: {quoted(error)}"
            hint = (
                "Give the job `permissions: id-token: write` and make the workflow a trusted "
                "publisher of the repository, or unset HF_OIDC_RESOURCE and give a token."
            )
        case errors.OfflineModeIsEnabled():
            why = "HF_HUB_OFFLINE forbids the network"
            hint = "Unset HF_HUB_OFFLINE, or work from a local folder with --save-only."
        case _:
            return _unanswered(error, failed)
    return HubError(f"{failed}: {why}.", hint=hint)


def _unanswered(error: BaseException, failed: str) -> HubError | None:
    """What is known of a request that got no answer, or none that can be used; None if it is not one."""
    import json

    import httpx2

    from smolquant.wire import ForbiddenAddress

    hint = _CHECK_THE_NETWORK
    match error:
        case httpx2.TimeoutException() | TimeoutError():
            why = f"{_CUT_OFF}: it did not answer in time"
        case ConnectionError():  # of Xet, by which the client sends large files
            why = f"{_CUT_OFF}: {quoted(error)}"
            hint = f"{_CHECK_THE_NETWORK} {WITHOUT_XET}"
        case httpx2.RequestError() | httpx2.InvalidURL():
            why = f"{_CUT_OFF}: {quoted(error) or 'the connection broke'}"
        case ForbiddenAddress():
            why = f"the Hub's answer is not followed: {quoted(error)}"
            hint = "Check the network: something else may answer in the Hub's place."
        case OSError() if type(error) is OSError and error.errno is None:  # by the client library
            why = f"a file did not arrive whole: {quoted(error)}"
        case json.JSONDecodeError():
            why = f"{_CUT_OFF}: the answer is not JSON, so something else may answer in its place"
        case _ if isinstance(error, OddAnswer) or _is_of_the_library(error):
            why = f"the Hub's answer is not one that can be used ({quoted(repr(error))})"
            hint = "Run again later; if it stays so, check what HF_ENDPOINT names, and any proxy."
        case _:
            return None
    return HubError(f"{failed}: {why}.", hint=hint)


def _is_of_the_library(error: BaseException) -> bool:
    """Whether the client library stumbled, which the shape of an answer makes it do.

    It reads answers without checking what is in them.
    """
    of_shape = (ValueError, LookupError, TypeError, AttributeError, AssertionError, RecursionError)
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    packages = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    ours_or_theirs = [name for name in packages if name in ("smolquant", "huggingface_hub")]
    return isinstance(error, of_shape) and ours_or_theirs[-1:] == ["huggingface_hub"]


def _refused(error: "HfHubHTTPError", repo_id: str, failed: str) -> HubError:
    """A refusal by HTTP status, or by the finer code that the client has already read."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from smolquant.wire import FROM_STORAGE

    words = quoted(error.server_message)
    said = f" The Hub said: {words}" if words else ""
    if error.response.extensions.get(FROM_STORAGE):
        why, hint = _by_storage(error.response.status_code)
        return HubError(f"{failed}: {why}{said.replace('The Hub', 'It')}", hint=hint)
    match error:
        case GatedRepoError():
            why = f"{repo_id} is gated, and this account was not granted access."
            hint = (
                "Ask for access on the repository's page, then give a token of that account "
                "(HF_TOKEN) that may read gated repositories."
            )
        case RepositoryNotFoundError():
            why = f"{repo_id} does not exist, or is private and this token may not see it."
            hint = "Check the spelling, or give a token that has access (HF_TOKEN)."
        case RevisionNotFoundError():
            why = f"{repo_id} has no such revision."
            hint = "Name an existing branch, tag or commit sha."
        case EntryNotFoundError():
            why = f"a file is missing from {repo_id}.{said}"
            hint = "Look at the repository's files; if one has just been deleted, run again."
        case _:
            why, hint = _by_status(error.response, repo_id, said)
    return HubError(f"{failed}: {why}", hint=hint)


def _by_status(response: "Response", repo_id: str, said: str) -> tuple[str, str]:
    """Why the Hub refused and what to do, by the HTTP status.

    Args:
        said: a sentence with the Hub's own words, or nothing.
    """
    status = response.status_code
    match status:
        case 401:
            why = "the Hub does not accept the token: it is wrong, expired or revoked."
            hint = HOW_TO_SIGN_IN
        case 403:
            why = f"the token does not have the rights to do that in {repo_id}.{said}"
            hint = HOW_TO_SIGN_IN
        case 404:
            why = f"{repo_id}, or something asked for in it, does not exist.{said}"
            hint = "Check the spelling of the repository and of HF_ENDPOINT if it is set."
        case 412:
            why = f"others kept pushing to {repo_id} at the same time."
            hint = "Run again when they are done."
        case 416:
            why = f"a file of {repo_id} is shorter than the Hub lists it.{said}"
            hint = "Run again; if it stays so, the file has to be uploaded again."
        case 429:
            wait = response.headers.get("Retry-After", "")
            why = "the Hub has received too many requests from this account or address."
            hint = f"Run again in {wait} seconds." if wait.isdecimal() else "Run again later."
        case _ if status >= 500:
            why = f"the Hub has a problem of its own (HTTP {status}).{said}"
            hint = "Look at https://status.huggingface.co, and run again later."
        case _:
            why = f"the Hub refused (HTTP {status}).{said}"
            hint = "The Hub's message says what to change."
    return why, hint


def _by_storage(status: int) -> tuple[str, str]:
    """Why a place where the Hub keeps files refused, which knows nothing of tokens and repositories."""
    where = "the place where the Hub keeps the file"
    if status in (400, 401, 403):
        why = f"{where} does not accept the address that the Hub gave; it may have expired (HTTP {status})."
        return why, "Run again: the Hub then gives a new address."
    if status == 416:
        why = "the stored file is shorter than the Hub lists it (HTTP 416)."
        return why, "Run again; if it stays so, the file has to be uploaded again."
    why = f"{where} does not serve it (HTTP {status})."
    return why, "Look at https://status.huggingface.co, and run again later."
