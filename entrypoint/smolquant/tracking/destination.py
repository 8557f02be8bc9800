"""Where Trackio runs: a Hugging Face Space or a self-hosted server, as users name it."""

import re
from dataclasses import dataclass, field
from urllib.parse import SplitResult, parse_qsl, quote, urlencode, urlsplit, urlunsplit

from smolquant.errors import InputError
from smolquant.names import is_repo_id
from smolquant.tokens import WRITE_TOKEN, clean_token

_HUB_HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
_APP_DOMAIN = ".hf.space"
_TOKEN_PARAMETER = "write_token"  # noqa: S105 - its name, not a token

LOCAL = "local"
"""The address that stands for a project in the output folder, which no server serves."""

_ACCEPTED = (
    "Give a Space (`user/space`, or its address), a server's address such as "
    f"`https://trackio.example.org`, or `{LOCAL}` for a project in the output folder."
)


@dataclass(frozen=True)
class Destination:
    """A Trackio dashboard that records the runs. Build it with :func:`make_destination`."""

    url: str
    """The address of the dashboard, without a query and a closing slash; it contains no secret."""
    space: str | None = None
    """The Space's Hub id; None for a server, and for a Space known by its app address only."""
    bucket: str | None = None
    """The Hub bucket in which the Space keeps its data; None leaves the choice to Trackio."""
    write_token: str | None = field(default=None, repr=False)
    """The token for writing: a server's write token, or a Hugging Face token for a Space."""
    secrets: tuple[str, ...] = field(default=(), repr=False)
    """The texts that must be masked before anything is shown."""

    @property
    def is_space(self) -> bool:
        """Whether Hugging Face serves it, so that a Hugging Face token opens it."""
        return self.space is not None or (urlsplit(self.url).hostname or "").endswith(_APP_DOMAIN)

    @property
    def address(self) -> str:
        """The address from which :func:`make_destination` builds it again, without the token."""
        return self.space or self.url

    def run_url(self, project: str, run_id: str) -> str:
        """The address of the dashboard's page about one run."""
        return f"{self.url}/run?{urlencode({'project': project, 'selected_run_id': run_id})}"

    def project_url(self, project: str, run_ids: list[str]) -> str:
        """The address of the dashboard's charts of these runs, without smoothing."""
        query = {"project": project, "run_ids": ",".join(run_ids), "smoothing": 0}
        return f"{self.url}/?{urlencode(query, safe=',')}"


def make_destination(
    address: str | None, *, write_token: str | None = None, bucket: str | None = None
) -> Destination | None:
    """The dashboard at an address; None where none was given, and for :data:`LOCAL`.

    Args:
        address: ``user/space``, a Space's page or app address, or a server's address. A write token
            in its query is taken out.
        write_token: from the environment, as it is there; the token in a server's address has precedence.
        bucket: Hub bucket for a Space's data.

    Raises:
        InputError: the address is not valid, or the bucket does not go with it.
    """
    if not address or address.strip() == LOCAL:
        if bucket:
            raise InputError(
                "--dataset-repo says where a Trackio Space keeps its data, but no Space was named.",
                hint="Add --trackio-url, or leave --dataset-repo out.",
            )
        return None
    text, write_token = address.strip(), clean_token(write_token, WRITE_TOKEN)
    if is_repo_id(text):
        return _space(text, write_token, (), bucket)
    parts = _split(text)
    in_address = dict(parse_qsl(parts.query)).get(_TOKEN_PARAMETER)
    in_address = clean_token(in_address, f"{_TOKEN_PARAMETER} in --trackio-url")
    secrets = _spellings(parts.query, in_address)
    if parts.hostname in _HUB_HOSTS:
        space = parts.path.removeprefix("/spaces/").rstrip("/")
        if not parts.path.startswith("/spaces/") or not is_repo_id(space):
            raise InputError(
                f"{_shown(parts)} is not the page of a Space.",
                hint="Its page is `https://huggingface.co/spaces/user/space`.",
            )
        return _space(space, write_token, secrets, bucket)
    url = _shown(parts)
    if (parts.hostname or "").endswith(_APP_DOMAIN):
        # The id does not follow from the host name, in which `a-b/c` and `a/b-c` look the same.
        _refuse_bucket(bucket, "a Space's id: `user/space`, not the address of its app")
        url = f"https://{parts.netloc}"  # a Hugging Face token never travels in the clear
        return Destination(url, write_token=write_token, secrets=_known(write_token, secrets))
    _refuse_bucket(bucket, "a Space; a server of your own keeps its data itself")
    token = in_address or write_token
    return Destination(url, write_token=token, secrets=_known(write_token, secrets))


def _space(
    space: str, write_token: str | None, secrets: tuple[str, ...], bucket: str | None
) -> Destination:
    if bucket is not None and not is_repo_id(bucket):
        raise InputError(
            f"{bucket!r} is not the name of a bucket on the Hub.",
            hint="Write --dataset-repo as `user/name`.",
        )
    host = re.sub(r"[/_.]", "-", space.lower())
    return Destination(
        f"https://{host}{_APP_DOMAIN}",
        space=space,
        bucket=bucket,
        write_token=write_token,
        secrets=_known(write_token, secrets),
    )


def _split(text: str) -> SplitResult:
    """The parts of a web address; no error message repeats what may be a secret."""
    try:
        parts = urlsplit(text)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        valid = valid and parts.port != 0  # reading the port checks it
    except ValueError:
        valid = False
    if not valid:
        raise InputError("--trackio-url is not the address of a Trackio dashboard.", hint=_ACCEPTED)
    if parts.username is not None:
        raise InputError(
            f"--trackio-url holds a user name or a password for {parts.hostname}.",
            hint="Leave them out: links to the dashboard are published. "
            "The write token goes into TRACKIO_WRITE_TOKEN.",
        )
    return parts


def _shown(parts: SplitResult) -> str:
    """The address without query, fragment and closing slash."""
    path = quote(parts.path.rstrip("/"), safe="/%")
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def _spellings(query: str, token: str | None) -> tuple[str, ...]:
    """The token itself, and as the address spells it."""
    if not token:
        return ()
    pairs = (pair.partition("=") for pair in query.split("&"))
    return (token, *(value for name, _, value in pairs if name == _TOKEN_PARAMETER and value))


def _known(write_token: str | None, secrets: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*secrets, *([write_token] if write_token else []))))


def _refuse_bucket(bucket: str | None, needs: str) -> None:
    if bucket is not None:
        raise InputError(
            f"--dataset-repo needs {needs}.", hint="Leave it out, or name the Space `user/space`."
        )
