"""The Hub's client: what its errors become, and that none of them holds a token or hangs."""

import os

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # read when huggingface_hub is imported

import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import httpx2
import pytest
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    OIDCError,
)
from huggingface_hub.utils._http import (
    close_session,
    get_session,
    hf_raise_for_status,
    hf_request_event_hook,
)

from smolquant.errors import HubError, InputError, SmolquantError
from smolquant.hub import Hub, hub_errors, valid_repo_id
from smolquant.secrecy import redact

TOKEN = "hf_verysecret0123456789"
REPO = "alice/model"


def refusal(
    status: int, code: str = "", message: str = "", headers: dict[str, str] | None = None
) -> Exception:
    """What the client raises for an answer of the Hub."""
    request = httpx2.Request(
        "GET",
        f"https://huggingface.co/api/models/{REPO}",
        headers={"Authorization": f"Bearer {TOKEN}"},
    )
    told = {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})}
    response = httpx2.Response(
        status, headers={name: value for name, value in told.items() if value}, request=request
    )
    try:
        hf_raise_for_status(response)
    except Exception as error:
        return error
    raise AssertionError("not an error")


def translated(error: Exception) -> SmolquantError:
    with pytest.raises(SmolquantError) as caught, hub_errors(REPO, "reading the model"):
        raise error
    return caught.value


@pytest.mark.fault(
    "hub",
    "The Hub refuses: 400, 401, 403, 404, 412, 429, 503, gated, no such revision, no token",
    "Exit 5 with why and what to do next.",
)
@pytest.mark.parametrize(
    ("error", "why", "next_step"),
    [
        (refusal(403, "GatedRepo"), "gated", "Ask for access"),
        (refusal(404, "RepoNotFound"), "does not exist, or is private", "spelling"),
        (refusal(401), "does not exist, or is private", "HF_TOKEN"),
        (refusal(404, "RevisionNotFound"), "no such revision", "branch, tag"),
        (refusal(404, "EntryNotFound"), "a file is missing", "run again"),
        (refusal(401, message="Invalid credentials in Authorization header"), "token", "HF_TOKEN"),
        (refusal(403, message="No rights"), "rights.*The Hub said: No rights", "write rights"),
        (refusal(404), "does not exist", "HF_ENDPOINT"),
        (refusal(412), "kept pushing", "Run again"),
        (refusal(429), "too many requests", "later"),
        (refusal(429, headers={"Retry-After": "77"}), "too many requests", "77 seconds"),
        (refusal(503), "HTTP 503", "status.huggingface.co"),
        (refusal(400, message="No such thing"), "HTTP 400.*No such thing", "what to change"),
        (LocalTokenNotFoundError("none"), "no Hugging Face token", "hf-token"),
        (OIDCError("no id token"), "keyless.*no id token", "id-token: write"),
        (OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE", "save-only"),
        (httpx2.ReadTimeout("slow"), "in time", "network"),
        (httpx2.ConnectError("Connection refused"), "Connection refused", "HF_ENDPOINT"),
        (TimeoutError("slow"), "in time", "network"),
        (ConnectionError("Network error: 404"), "Network error: 404", "HF_HUB_DISABLE_XET"),
        (LocalEntryNotFoundError("not cached"), "cannot be reached", "network"),
    ],
)
def test_each_error_of_the_client_tells_why_and_what_next(
    error: Exception, why: str, next_step: str
) -> None:
    told = translated(error)
    assert isinstance(told, HubError)
    assert told.exit_code == 5
    assert told.message.startswith("Reading the model failed: ")
    assert re.search(why, told.message)
    assert next_step in told.hint
    assert TOKEN not in str(told)


@pytest.mark.fault(
    "input",
    "A repository's id is none",
    "Exit 2.",
)
def test_a_bad_id_is_bad_input() -> None:
    told = translated(HFValidationError("bad"))
    assert isinstance(told, InputError)
    assert "user/model" in told.hint


@pytest.mark.fault(
    "hub",
    "The client hides the Hub's refusal in an error of its own",
    "The refusal is told.",
)
def test_an_error_with_a_telling_cause_is_explained_by_it() -> None:
    wrapped = RuntimeError("Error while uploading 'int8/model.safetensors' to the Hub.")
    wrapped.__cause__ = refusal(403, message="Storage quota exceeded")
    assert "Storage quota exceeded" in str(translated(wrapped))
    download = LocalEntryNotFoundError("not cached")
    download.__cause__ = refusal(404, "RepoNotFound")
    assert "does not exist" in str(translated(download))


def test_what_is_no_error_of_the_hub_passes_through() -> None:
    for error in (ValueError("a bug"), RuntimeError("another"), InputError("ours")):
        with pytest.raises(type(error)) as caught, hub_errors(REPO, "reading the model"):
            raise error
        assert caught.value is error


@pytest.mark.fault(
    "secret",
    "The Hub's answer repeats the token",
    "The message does not.",
)
def test_a_token_that_the_hub_echoes_is_not_repeated() -> None:
    told = translated(refusal(403, message=f"Token {TOKEN} has no rights " + "x" * 1000))
    assert "verysecret" not in str(told)
    assert len(str(told)) < 1000


@pytest.mark.fault(
    "secret",
    "An object that holds the token is printed",
    "The token is not in it.",
)
def test_a_token_is_in_no_repr() -> None:
    assert TOKEN not in repr(Hub(token=TOKEN))


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("alice/model", True),
        ("gpt2", True),
        ("alice/model/int8", False),
        ("", False),
        ("./folder", False),
        ("alice/mo--del", False),
        ("alice/model.git", False),
        ("a b/c", False),
    ],
)
def test_ids(text: str, valid: bool) -> None:
    assert valid_repo_id(text) is valid


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    accepted.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    for connection in accepted:
        connection.close()


@pytest.mark.fault(
    "hub",
    "The Hub accepts the connection and never answers",
    "Exit 5 after the time limit.",
)
def test_a_hub_that_does_not_answer_is_given_up(silent_server: str) -> None:
    hub = Hub(TOKEN, 0.2, endpoint=silent_server)
    with pytest.raises(HubError, match="in time"), hub_errors(REPO, "looking"):
        hub.api.whoami()


@pytest.mark.fault(
    "hub",
    "A connection is lost",
    "The next session has the same time limits.",
)
def test_the_clients_session_keeps_its_hooks_and_outlives_a_lost_connection() -> None:
    _ = Hub(TOKEN, 7).api
    for _ in range(2):  # the client makes a new session after a lost connection
        session = get_session()
        assert session.timeout.read == 7
        assert hf_request_event_hook in session.event_hooks["request"]
        assert session.follow_redirects
        close_session()


@pytest.mark.fault(
    "hub",
    "Nothing answers at the Hub's address",
    "Exit 5 at once.",
)
def test_a_hub_that_is_not_there_is_told_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    hub = Hub(token=TOKEN, endpoint=f"http://127.0.0.1:{port}")
    with pytest.raises(HubError, match="cannot be reached") as caught, hub_errors(REPO, "looking"):
        hub.api.whoami()
    assert TOKEN not in str(caught.value)


def test_importing_the_module_does_not_import_the_client() -> None:
    code = "import sys, smolquant.publish.commit; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.fault(
    "secret",
    "The token holds characters that no header carries",
    "Exit 2; it is not shown.",
)
@pytest.mark.parametrize("token", ["hf_caf\u00e9_of_a_login", '"hf_quoted_of_a_login"'])
def test_a_login_that_is_no_token_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    with pytest.raises(InputError, match="this machine's login holds") as refused:
        _ = Hub().api
    assert "of_a_login" not in str(refused.value)


@pytest.mark.fault(
    "secret",
    "The token is that of this machine's login",
    "It is kept secret like a given one.",
)
def test_the_token_of_a_login_is_kept_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_of-a-login")
    _ = Hub().api
    assert redact("hf_of-a-login") == "***"
