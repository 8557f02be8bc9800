"""Reading --trackio-url: every way to write it, and no secret in what is made of it."""

import pytest

from smolquant.errors import InputError
from smolquant.tracking import Destination, make_destination


def made(address: str, **options: str) -> Destination:
    destination = make_destination(address, **options)
    assert destination is not None
    return destination


@pytest.mark.parametrize(
    "address",
    [
        "Some_User/My.Space",
        " https://huggingface.co/spaces/Some_User/My.Space ",
        "https://hf.co/spaces/Some_User/My.Space/",
    ],
)
def test_a_space_by_its_id_or_its_page(address: str) -> None:
    destination = made(address)
    assert destination.space == destination.address == "Some_User/My.Space"
    assert destination.url == "https://some-user-my-space.hf.space"
    assert destination.is_space


def test_a_space_by_its_app_address() -> None:
    destination = made("http://user-space.hf.space/run?project=p&selected_run_id=1")
    assert destination.is_space
    assert destination.space is None  # `user-a/b` and `user/a-b` have the same host name
    assert destination.address == "https://user-space.hf.space"


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("https://trackio.example.org/", "https://trackio.example.org"),
        ("http://127.0.0.1:7860", "http://127.0.0.1:7860"),
        ("http://[::1]:7860/?x=1#top", "http://[::1]:7860"),
        ("https://example.org/tracking/", "https://example.org/tracking"),
        ("https://example.org/a)](b", "https://example.org/a%29%5D%28b"),
    ],
)
def test_a_server(address: str, url: str) -> None:
    destination = made(address)
    assert destination.url == destination.address == url
    assert not destination.is_space


@pytest.mark.fault(
    "secret",
    "The address of Trackio holds a token",
    "It is in no link, log or file.",
)
def test_the_token_is_split_off_the_address() -> None:
    destination = made("http://host:7860/?write_token=s%2Bcret&project=p", write_token="other")
    assert destination.write_token == "s+cret"
    assert set(destination.secrets) == {"s+cret", "s%2Bcret", "other"}  # however it is spelled
    shown = repr(destination) + destination.run_url("p", "1") + destination.project_url("p", ["1"])
    for secret in destination.secrets:
        assert secret not in shown


def test_a_dashboards_token_does_not_open_a_space() -> None:
    destination = made("https://huggingface.co/spaces/u/n?write_token=secret", write_token="hf_x")
    assert destination.write_token == "hf_x"
    assert "secret" in destination.secrets


def test_links_name_project_and_runs() -> None:
    destination = made("https://trackio.example.org")
    assert destination.run_url("p", "abc") == (
        "https://trackio.example.org/run?project=p&selected_run_id=abc"
    )
    assert destination.project_url("p", ["abc", "def"]) == (
        "https://trackio.example.org/?project=p&run_ids=abc,def&smoothing=0"
    )


@pytest.mark.fault(
    "input",
    "--trackio-url is no address",
    "Exit 2.",
)
@pytest.mark.parametrize(
    "address",
    [
        "justaname",
        "ftp://host/",
        "http://",
        "http://host:port/",
        "http://[::1/",
        "user/space/more",
        "../../etc",
        "https://huggingface.co/user/model",
        "https://huggingface.co/spaces/user",
        "host:7860",
        "javascript:alert(1)",
    ],
)
def test_no_address_at_all(address: str) -> None:
    with pytest.raises(InputError):
        make_destination(address)


@pytest.mark.fault(
    "secret",
    "A refused address holds a token",
    "The message does not.",
)
@pytest.mark.parametrize(
    "address",
    [
        "https://me:secret@host/",
        "http://host:x/?write_token=secret",
        "ht!tp://x?write_token=secret",
    ],
)
def test_a_refusal_does_not_repeat_a_secret(address: str) -> None:
    with pytest.raises(InputError) as refusal:
        make_destination(address)
    assert "secret" not in str(refusal.value)


@pytest.mark.fault(
    "input",
    "--dataset-repo is no name, or goes with no Space",
    "Exit 2.",
)
def test_a_bucket_goes_with_a_space_only() -> None:
    assert made("u/n", bucket="u/data").bucket == "u/data"
    for address in (None, "https://u-n.hf.space", "https://trackio.example.org"):
        with pytest.raises(InputError, match="--dataset-repo"):
            make_destination(address, bucket="u/data")
    with pytest.raises(InputError, match="bucket"):
        make_destination("u/n", bucket="not a name")


def test_nothing_was_asked_for() -> None:
    assert make_destination(None, write_token="t") is None
    assert make_destination("") is None


@pytest.mark.fault(
    "secret",
    "The token holds characters that no header carries",
    "Exit 2; it is not shown.",
)
@pytest.mark.parametrize(
    "token", ["caf%C3%A9-token", "one%20two", "%22quoted%22", "a%0D%0AHost:%20b"]
)
def test_a_write_token_that_no_header_carries_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(InputError, match="write_token in --trackio-url holds") as refused:
        make_destination(f"http://host/?write_token={token}")
    assert not any(part in str(refused.value) for part in ("caf", "one", 'quoted"', "Host"))
